"""What this machine has for training, measured where it can be, and what it lacks."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import psutil
import torch

from hfbench.machine.devices import why_no_tf32
from hfbench.machine.settings import tf32_set
from hfbench.studies.doctor.schema import Machine, MatrixProduct

_WORTH = 1.3  # below it a dtype has no units of its own, but is emulated or converted
_LITTLE_MEMORY_MIB = 2048


def examine_machine(device: torch.device) -> Machine:
    """Measure the device's matrix products, and look for what training can use.

    Args:
        device: That the recipe trains on.
    """
    products = _measure_products(device)
    threads, cores = torch.get_num_threads(), count_physical_cores()
    free = psutil.virtual_memory().available / 2**20
    free_device = torch.cuda.mem_get_info(device)[0] / 2**20 if device.type == "cuda" else None
    compiler, no_compiler = _find_compiler(device)
    lacks = [*_thread_problems(threads, cores, device), *_missing_dtypes(products, device)]
    if no_compiler:
        lacks.append(f"torch.compile cannot be used: {no_compiler}.")
    lacks += [
        f"Only {amount:.0f} MiB of {whose} memory are free."
        for whose, amount in (("host", free), ("device", free_device))
        if amount is not None and amount < _LITTLE_MEMORY_MIB
    ]
    return Machine(
        threads=threads,
        physical_cores=cores,
        free_memory_mib=free,
        free_device_memory_mib=free_device,
        compiler=compiler,
        matrix_products=products,
        lacks=lacks,
    )


def count_physical_cores() -> int:
    """Return the physical cores that this process may use: by affinity and a container's quota."""
    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else logical
    threads_a_core = max(logical // physical, 1)
    return max(1, min(physical, math.ceil(allowed / threads_a_core), _quota()))


def _quota() -> int:
    """Return the CPUs of a container's quota (cgroup v2, cpu.max: microseconds, period)."""
    try:
        used, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, math.ceil(int(used) / int(period)))
    except (OSError, ValueError):  # none, or "max"
        return sys.maxsize


def _thread_problems(threads: int, cores: int, device: torch.device) -> list[str]:
    if threads < cores and device.type == "cpu":
        said = os.environ.get("OMP_NUM_THREADS")
        cause = f" (OMP_NUM_THREADS={said})" if said else ""
        return [
            f"torch computes with {_count(threads, 'thread')} of {_count(cores, 'core')}{cause}: "
            f"set OMP_NUM_THREADS={cores}, unless other work needs them."
        ]
    if threads > cores:
        return [
            f"torch computes with {_count(threads, 'thread')} on {_count(cores, 'core')}, which "
            f"then wait for each other: set OMP_NUM_THREADS={cores}."
        ]
    return []


def _measure_products(device: torch.device) -> list[MatrixProduct]:
    from hfbench.profiling.flops import measure_matmul_peak

    found = {"fp32": (torch.float32, False)}
    if why_no_tf32(device) is None:
        found["tf32"] = (torch.float32, True)
    if device.type == "cpu" or _has_bf16(device):
        found["bf16"] = (torch.bfloat16, False)
    if device.type != "cpu":
        found["fp16"] = (torch.float16, False)
    speeds = {}
    for name, (dtype, tf32) in found.items():
        with tf32_set(tf32):
            speeds[name] = measure_matmul_peak(dtype, device)
    return [
        MatrixProduct(dtype=name, flops_per_second=speed, ratio_to_fp32=speed / speeds["fp32"])
        for name, speed in speeds.items()
    ]


def _has_bf16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _missing_dtypes(products: list[MatrixProduct], device: torch.device) -> list[str]:
    ratios = {item.dtype: item.ratio_to_fp32 for item in products}
    lacks = []
    if device.type == "cpu":
        lacks.append("No accelerator is visible: fp16, TF32 and pinned memory have no effect here.")
    for dtype, why in (("bf16", "emulated"), ("fp16", "no faster")):
        if dtype in ratios and ratios[dtype] < _WORTH:
            lacks.append(
                f"{dtype} is {why} here: its matrix products run {ratios[dtype]:.2g}× as fast as "
                "fp32's."
            )
    if device.type == "cuda" and "bf16" not in ratios:
        lacks.append("bf16: this GPU has no units for it (Ampere and newer have); fp16 is there.")
    if device.type == "cuda" and (reason := why_no_tf32(device)):
        lacks.append(f"TF32: {reason}.")
    return lacks


def _find_compiler(device: torch.device) -> tuple[str | None, str | None]:
    """Find what Inductor compiles with.

    Returns:
        Its name, or why there is none.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return None, "Triton is not installed"
        variable, names = "CC", ("gcc", "clang")  # for Triton's launcher
    else:
        variable, names = "CXX", ("g++", "clang++")
    wanted = [os.environ.get(variable, ""), *names]
    found = next((path for name in wanted if name and (path := shutil.which(name))), None)
    if found is None:
        return None, f"no compiler is installed ({' or '.join(names)})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return None, "Python's header files are not installed (python3-dev)"
    return Path(found).name, None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
