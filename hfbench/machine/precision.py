"""Whether bfloat16 pays on this CPU at all: x86 without AVX-512 has to emulate it.

There a step takes ten to twenty times as long as in float32, and nothing in torch says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from hfbench.machine.environment import accelerator_type

if TYPE_CHECKING:
    import torch

    from hfbench.recipe.schema import Recipe

logger = logging.getLogger(__name__)

# Between two readings of one machine lie some 10 %, and a choice must not change from run to run.
_SLOWER = 1.25
_ROUNDS, _SECONDS = 5, 0.4  # at most; two rounds at least, of which the first warms up


def find_slow_precision(recipe: Recipe) -> str | None:
    """Measure whether a recipe's mixed precision is slower than float32 on the CPU it trains on.

    Returns:
        What was measured, as part of a sentence; ``None`` if it is not slower, or if the recipe has
        no mixed precision or does not train on a CPU. Takes half a second at most, once a process.
    """
    if not recipe.argument("bf16") or (accelerator_type() and not recipe.argument("use_cpu")):
        return None
    return say_slow_bfloat16()


def say_slow_bfloat16() -> str | None:
    """Say how much slower than float32 this CPU computes bfloat16; ``None`` if it is not slower."""
    slowdown = measure_bfloat16_slowdown()
    if slowdown < _SLOWER:
        return None
    return f"bfloat16 is {slowdown:.2g}× slower than float32 on this CPU"


def takes_float32(recipe: Recipe) -> bool:
    """Tell whether a recipe is to train in float32 here, since it asks for what is not slower."""
    return recipe.model.float32_if_faster and find_slow_precision(recipe) is not None


def log_slow_precision(recipe: Recipe) -> None:
    """Warn before anything is loaded."""
    if slow := say_slow_precision(recipe):
        logger.warning(slow)


def say_slow_precision(recipe: Recipe) -> str | None:
    """Say what a recipe's mixed precision means on this CPU, and what to do; a sentence.

    Returns:
        ``None`` if it is not slower than float32.
    """
    slow = find_slow_precision(recipe)
    if slow is None:
        return None
    if recipe.model.float32_if_faster:
        return f"{slow}, so that {recipe.name} trains in float32 here (model.float32_if_faster)."
    return (
        f"{recipe.name}: {slow}, which has no units for it. Train in float32 with "
        "training_args.bf16=false, or let each machine take what is faster with "
        "model.float32_if_faster=true."
    )


@cache
def measure_bfloat16_slowdown() -> float:
    """Measure how many times as long as float32 bfloat16 takes on this CPU; once in a process.

    Returns:
        Time of a convolution and a matrix product under autocast, forward and backward, over that
        in float32, in one thread: the smallest of a few each, taken in turn.
    """
    import torch

    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    with _plain_state():
        end = time.perf_counter() + _SECONDS
        for number in range(_ROUNDS):
            for dtype in best:
                seconds = _time_step(dtype)
                best[dtype] = seconds if number < 2 else min(best[dtype], seconds)
            if number and time.perf_counter() > end:
                break
    return best[torch.bfloat16] / best[torch.float32]


@contextmanager
def _plain_state() -> Iterator[None]:
    """Compute in one thread, with gradients, and leave this process's settings as they were.

    Several threads wait for each other where other programs compute too.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _time_step(dtype: torch.dtype) -> float:
    import torch
    from torch.nn import functional as F

    def make(*shape: int) -> torch.Tensor:  # draws nothing from the generator of the run
        return torch.full(shape, 0.5, dtype=torch.float32, device="cpu", requires_grad=True)

    images, filters = make(4, 32, 16, 16), make(32, 32, 3, 3)
    rows, weights = make(256, 256), make(256, 256)
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        outputs = (F.conv2d(images, filters, padding=1), F.linear(rows, weights))
    loss = outputs[0].float().sum() + outputs[1].float().sum()
    torch.autograd.grad(loss, (images, filters, rows, weights))
    return time.perf_counter() - start
