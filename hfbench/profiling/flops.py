"""How much arithmetic a training step is, and how much of it this machine could do at best.

A multiplication and an addition are two operations; papers often count multiply-adds, half as many.
Counted are matrix products and convolutions, as torch's counter does; the rest is under 1 % of the
models that this is for.
"""

from __future__ import annotations

import copy
import time
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from hfbench.machine.devices import why_no_tf32
from hfbench.profiling.clock import synchronize
from hfbench.results.schema import Compute

_IMAGES = 2  # batch norm needs more than one
_GPU_SIZE = 8192  # of the matrices: large enough to fill any GPU
_CPU_SIZES = (512, 1024, 2048, 4096)
_SHORT_SECONDS = 0.005  # a product that takes less is mostly overhead: take a larger one
_GPU_SECONDS, _CPU_SECONDS = 0.3, 0.15
_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")  # transformers', timm's
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def count_flops(model: nn.Module, image_size: int) -> tuple[int, int]:
    """Count the operations of one image, without doing any.

    Args:
        model: An image classifier; parameters without gradients are left out of the backward pass.
        image_size: Height and width of its input in pixels.

    Returns:
        Of the forward pass, and of forward and backward pass. Activations that gradient
        checkpointing computes again are not counted twice: Chowdhery et al., PaLM, 2022, appendix B
        (model FLOPs).
    """
    twin = _copy_without_values(model).train()
    images = torch.empty(_IMAGES, 3, image_size, image_size, device="meta")
    corrected = {torch.ops.aten.convolution_backward: _count_convolution_backward}
    counter = FlopCounterMode(display=False, custom_mapping=corrected)
    # Of the fused kernels some have no formula; MATH is made of matrix products.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        with counter:
            output: Any = twin(pixel_values=images) if hasattr(model, "config") else twin(images)
        forward = counter.get_total_flops()
        logits = output if isinstance(output, torch.Tensor) else output[0]
        with counter:
            logits.sum().backward()
        backward = counter.get_total_flops()
    return forward // _IMAGES, (forward + backward) // _IMAGES


def _count_convolution_backward(
    grad_out_shape: list[int],
    x_shape: list[int],
    w_shape: list[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: list[bool],
    **_: Any,
) -> int:
    """Count each of both gradients as the convolution itself.

    Each product of the forward pass has one in either gradient. torch's own formula (of 2.14)
    forgets the groups in that of the weights: EfficientNet-B0's backward pass comes out 20 times
    too large.
    """
    forward = conv_flop_count(x_shape, w_shape, grad_out_shape, transposed)
    return forward * sum(map(bool, output_mask[:2]))


def _copy_without_values(model: nn.Module) -> Any:
    """Copy a model onto the meta device, as its class made it."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta", dtype=torch.float32)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        module._forward_hooks.clear()  # they belong to the original
        module._forward_pre_hooks.clear()
        for name in _CHECKPOINTING:
            if getattr(module, name, None) is True:
                setattr(module, name, False)
    twin.__dict__.pop("forward", None)  # accelerate's, which casts, and holds the original
    return twin


def measure_matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Measure how fast this device multiplies square matrices; once in a process.

    Args:
        dtype: Of both factors; float32 with TF32 where that is switched on now.
        device: On which to measure.

    Returns:
        Operations per second of the fastest product.
    """
    return _measure_peak(
        dtype, device, torch.backends.cuda.matmul.fp32_precision, torch.get_num_threads()
    )


@cache
def _measure_peak(dtype: torch.dtype, device: torch.device, precision: str, threads: int) -> float:
    on_cpu = device.type == "cpu"
    for size in _CPU_SIZES if on_cpu else (_GPU_SIZE,):
        factor = torch.rand(size, size, device=device).to(dtype)
        product = torch.empty_like(factor)
        for _ in range(1 if on_cpu else 3):  # choose kernels, raise clocks
            seconds = _multiply(factor, product)
        if seconds >= _SHORT_SECONDS:
            break
    end = time.perf_counter() + (_CPU_SECONDS if on_cpu else _GPU_SECONDS)
    while time.perf_counter() < end:
        seconds = min(seconds, _multiply(factor, product))
    return 2 * float(size) ** 3 / seconds


def _multiply(factor: torch.Tensor, product: torch.Tensor) -> float:
    synchronize(factor.device)
    start = time.perf_counter()
    torch.mm(factor, factor, out=product)
    synchronize(factor.device)
    return time.perf_counter() - start


def describe_compute(
    model: nn.Module,
    image_size: int,
    dtype: torch.dtype,
    device: torch.device,
    samples_per_second: float | None,
    world_size: int,
) -> Compute:
    """Set what a run achieved against what its devices can do; never fails.

    Args:
        model: As it was trained.
        image_size: Height and width of its input in pixels.
        dtype: In which it computed.
        device: Of this process.
        samples_per_second: In the steady state, over all processes; ``None`` if there was none.
        world_size: Number of processes, a device each.
    """
    notes = []
    forward = train = achieved = peak = utilization = None
    name = _name_dtype(dtype, device)
    try:
        forward, train = count_flops(model, image_size)
    except Exception as error:  # any model may come; what it cannot do must not cost a finished run
        notes.append(f"FLOPs unknown: torch cannot count them ({_first_line(error)})")
    if train is not None and samples_per_second is not None:
        achieved = train * samples_per_second
    if samples_per_second is None:
        notes.append("achieved FLOP/s unknown: the run was too short to have a steady state")
    if name is None:
        notes.append(
            "peak unknown: TF32 is on for convolutions or matrix products alone, "
            "so that no single peak applies"
        )
    else:
        try:
            peak = measure_matmul_peak(dtype, device)
        except Exception as error:  # out of memory, a device without this type
            notes.append(f"peak unknown: its measurement failed ({_first_line(error)})")
    if achieved is not None and peak is not None:
        utilization = achieved / (peak * world_size)
    return Compute(
        dtype=name or _NAMES[dtype],
        forward_flops_per_image=forward,
        train_flops_per_image=train,
        achieved_flops_per_second=achieved,
        peak_flops_per_second=peak,
        utilization=utilization,
        note="; ".join(notes) or None,
    )


def _name_dtype(dtype: torch.dtype, device: torch.device) -> str | None:
    """Name the type, or ``None`` where matrix products and convolutions differ in theirs."""
    if dtype != torch.float32 or why_no_tf32(device):
        return _NAMES[dtype]
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    found = {backend.fp32_precision == "tf32" for backend in backends}
    if len(found) > 1:
        return None
    return "tf32" if found == {True} else "fp32"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
