"""Time torchvision's resizing against products with whole-number weights, and all of preprocessing.

    python -m tests.benchmarks.pixels --device cuda      # or cpu; a minute

Arms take turns, and a ratio is the median of those of each round. Pixels are compared with those of
torchvision on a CPU. Bytes are those that operations read and write where they are not a CPU's,
counted without computing anything.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from hfbench.data.resizing import resize_exactly
from hfbench.data.transforms import Normalization, Preprocessing
from hfbench.profiling.clock import synchronize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = ((32, 64), (32, 96), (32, 224), (256, 224), (512, 224))


def main() -> None:
    """Print a row for each interpolation and size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if device.type == "cpu":
        torch.set_num_threads(1)
    print("torchvision's time over ours, pixels that differ from a CPU's, bytes a value:")
    for interpolation in ("bilinear", "bicubic"):
        for old, new in SIZES:
            images = torch.randint(0, 256, (arguments.batch, 3, old, old), dtype=torch.uint8)
            arms = make_arms(images.to(device), new, interpolation, dtype)
            differing = count_differing(images, arms, new, interpolation)
            row = [f"{interpolation:8} {old:3} to {new:3}"]
            for theirs, ours in (("torchvision", "products"), ("in place", "preprocessing")):
                ratio = compare(arms[theirs], arms[ours], device, arguments.rounds)
                row.append(f"{ours} {ratio:.2f}")
            row += [f"{name} {share:.1%}" for name, share in differing.items()]
            for arm, run in make_arms(images.to("meta"), new, interpolation, dtype).items():
                if arm in ("in place", "preprocessing"):
                    row.append(f"{arm} {count_bytes(run):.0f} B")
            print("  ".join(row), flush=True)


def make_arms(
    images: Tensor, size: int, interpolation: str, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed: resizing alone, and with normalising to channels_last."""
    device, last = images.device, torch.channels_last
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    mode = InterpolationMode(interpolation)
    module = Preprocessing(
        Normalization(size, interpolation, MEAN, STD), [], 0, "channels_last", dtype
    ).to(device)

    def by_torchvision() -> Tensor:
        # On a CPU torch is 5 times as slow channel by channel.
        given = images.contiguous(memory_format=last) if device.type == "cpu" else images
        return F.resize(given, [size, size], interpolation=mode, antialias=True)

    def in_place() -> Tensor:
        values = by_torchvision().to(torch.float32, memory_format=last)
        return values.sub_(mean * 255).mul_(1 / (std * 255)).to(dtype)

    return {
        "torchvision": by_torchvision,
        "products": lambda: resize_exactly(images, (size, size), interpolation, channels_last=True),
        "in place": in_place,
        "preprocessing": lambda: module(images),
    }


def count_differing(
    images: Tensor, arms: dict[str, Callable[[], Tensor]], size: int, interpolation: str
) -> dict[str, float]:
    """Return the share of pixels that are not those of torchvision on a CPU."""
    mode = InterpolationMode(interpolation)
    last = images.contiguous(memory_format=torch.channels_last)
    expected = F.resize(last, [size, size], interpolation=mode, antialias=True)
    return {
        name: float((arms[name]().cpu() != expected).double().mean())
        for name in ("torchvision", "products")
    }


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if not func.is_view and "empty" not in func.__name__ and "unsafe" not in func.__name__:
            read = {name: value for name, value in named.items() if name != "out"}
            tensors = [v for v in tree_leaves((args, read, result)) if isinstance(v, Tensor)]
            # What is expanded lies in memory once.
            self.moved += sum(min(v.nbytes, v.untyped_storage().nbytes()) for v in tensors)
        return result


def count_bytes(arm: Callable[[], Tensor]) -> float:
    """Return how many bytes an arm on the meta device moves for each value of its result."""
    with _Traffic() as traffic:
        values = arm()
    return traffic.moved / values.numel()


def compare(
    theirs: Callable[[], Tensor], ours: Callable[[], Tensor], device: torch.device, rounds: int
) -> float:
    """Return the median of their time over ours."""
    ratios = []
    for number in range(rounds + 2):  # two warm up
        seconds = []
        for arm in (theirs, ours) if number % 2 else (ours, theirs):
            synchronize(device)
            start = time.perf_counter()
            arm()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        their_time, our_time = seconds if number % 2 else reversed(seconds)
        if number > 1:
            ratios.append(their_time / our_time)
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
