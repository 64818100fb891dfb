"""What an accelerator is: its name, its memory, and whether it has TF32."""

from __future__ import annotations

import contextlib

import torch


def name_of(device_type: str) -> str:
    """Return the name of the current device of a type; the type itself where torch knows none."""
    with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
        if device_type == "mps":  # chips of one name are sold with more and with fewer cores
            mps = torch.backends.mps
            return f"{mps.get_name()}, {mps.get_core_count()} GPU cores"
        return str(torch.get_device_module(device_type).get_device_name())
    return device_type


def memory_mib_of(device_type: str) -> float | None:
    """Return the memory of the current device of a type; ``None`` if it has none of its own."""
    if device_type not in ("cuda", "xpu"):
        return None
    properties = torch.get_device_module(device_type).get_device_properties()
    return float(properties.total_memory) / 2**20


def why_no_tf32(device: torch.device) -> str | None:
    """Say why a device has no TF32 units, whatever torch's switches say; ``None`` if it has them.

    `transformers.utils.is_torch_tf32_available` tells the same of the current device alone.
    """
    if device.type != "cuda":
        return "there is no TF32: the model is not on an NVIDIA GPU"
    if torch.version.hip:
        return "there is no TF32: torch was built for AMD's GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return (
            f"this GPU has no TF32 units: its compute capability is {major}.{minor}, and they came "
            "with 8.0 (Ampere)"
        )
    return None
