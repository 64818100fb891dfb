"""Resize uint8 images on any device to the very pixels that torchvision gives on a CPU.

There torch, like Pillow, resizes first along rows and then along columns, with weights that are
whole numbers of 16 bits, and rounds to grey levels in between (`aten/src/ATen/native/cpu`,
``UpSampleKernel.cpp``); on a GPU it makes one pass in float32. Here both passes are products with a
matrix of the CPU's weights. Whole numbers below 2**24 are exact in float32, and so are their sums
in whatever order, if nothing on the way rounds to fewer bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_REACH = {"bilinear": 1, "bicubic": 2}  # pixels of the coarser grid on each side
_WEIGHT_BITS = 15  # and a sign
_MOST_BITS = 22  # behind the point
_EXACT = 2**24  # float32 holds all whole numbers up to here
_PART_BITS = 8

_Parts = tuple[tuple[Tensor, float], ...]


def resize_exactly(
    images: Tensor, size: tuple[int, int], interpolation: str, *, channels_last: bool = False
) -> Tensor:
    """Resize as `torchvision.transforms.v2.functional.resize` does on a CPU, with antialiasing.

    Args:
        images: uint8, (N, C, H, W).
        size: Height and width.
        interpolation: ``bilinear`` or ``bicubic``.
        channels_last: Whether the result lies so in memory.

    Returns:
        uint8, (N, C, height, width).
    """
    count, channels, height, width = images.shape
    with _whole_float32(images.device):
        if width != size[1]:
            parts = _parts(width, size[1], interpolation, images.device)
            rows = _with_ones(images.reshape(-1, width), (0, 1))
            wide = _round([(rows @ part.T, unit) for part, unit in parts])
            images = wide.view(count, channels, height, size[1])
        # The product below leaves its axes as they are: here the layout is changed for less.
        levels = images.permute(0, 2, 3, 1).flatten(2) if channels_last else images.flatten(0, 1)
        levels = levels.contiguous()
        if height != size[0]:
            parts = _parts(height, size[0], interpolation, images.device)
            columns = _with_ones(levels, (0, 0, 0, 1))
            whole = [part.expand(len(columns), -1, -1) for part, _ in parts]
            products = [torch.bmm(part, columns) for part in whole]
            levels = _round(list(zip(products, [unit for _, unit in parts], strict=True)))
    if channels_last:
        return levels.view(count, *size, channels).permute(0, 3, 1, 2)
    return levels.reshape(count, channels, *size)


def _with_ones(levels: Tensor, where: tuple[int, ...]) -> Tensor:
    """Add what the half in the weights is multiplied by; float32."""
    return nn.functional.pad(levels, where, value=1).to(torch.float32)


def _round(products: list[tuple[Tensor, float]]) -> Tensor:
    """Add up what the parts of the weights gave, from the lowest to the highest; uint8."""
    total = products[0][0]
    for (_, unit), (higher, _) in pairwise(products):
        total = higher.add_(total.floor_(), alpha=unit)
    return total.clamp_(0, 255).to(torch.uint8)  # which cuts off what is behind the point


@lru_cache(maxsize=32)
def _parts(old: int, new: int, interpolation: str, device: torch.device) -> _Parts:
    """Split an axis's weights into matrices whose products with grey levels float32 sums exactly.

    Nearly always there is one; where images are shrunk to less than a half or a quarter, the
    weights have more bits behind the point, and there are two.

    Returns:
        From the lowest bits to the highest: the matrix, (new, old + 1), whose last column is one
        half in the highest and else zero, to be multiplied by one, so that cutting off rounds; and
        its unit in that of the next.
    """
    weights, bits = _whole_weights(old, new, interpolation)
    taps = int((weights != 0).sum(1).max())
    step = min(_PART_BITS, int(math.log2(_EXACT / 255 / taps)))
    if step < 1:
        raise ValueError(f"{old} pixels cannot be resized to {new}: each would be of too many.")
    split = []
    # What is carried over is below a grey level a tap, and the half below 2**bits.
    while 255 * (int(weights.abs().sum(1).max()) + taps) + 2**bits >= _EXACT:
        split.append((weights & (2**step - 1), step, 0.0))
        weights, bits = weights >> step, bits - step
    split.append((weights, bits, 0.5))
    matrices = []
    for number, (part, behind, half) in enumerate(split, 1):
        matrix = nn.functional.pad(part.double() / 2**behind, (0, 1), value=half)
        following = split[number][1] if number < len(split) else 0
        matrices.append((matrix.to(torch.float32).to(device), 2.0**-following))
    return tuple(matrices)


def _whole_weights(old: int, new: int, interpolation: str) -> tuple[Tensor, int]:
    """Return the weights that torch gives to uint8 images on a CPU.

    Returns:
        int64, (new, old): how much of each old pixel is in each new one; and how many of its bits
        are behind the point: as many as leave the largest weight in 16 bits.
    """
    scale = old / new
    stretch = max(scale, 1.0)  # where images are shrunk, all pixels in between count
    centres = (scale * (torch.arange(new, dtype=torch.float64) + 0.5))[:, None]
    pixels = torch.arange(old, dtype=torch.float64)
    reach = _REACH[interpolation] * stretch
    near = (pixels >= (centres - reach + 0.5).trunc()) & (pixels < (centres + reach + 0.5).trunc())
    weights = _kernel((pixels - centres + 0.5) * (1 / stretch), interpolation) * near
    weights /= weights.sum(1, keepdim=True)
    largest, bits = float(weights.max()), 0
    while bits < _MOST_BITS and int(0.5 + largest * 2 ** (bits + 1)) < 2**_WEIGHT_BITS:
        bits += 1
    weights *= 2**bits
    return (weights + torch.where(weights < 0, -0.5, 0.5)).trunc().to(torch.int64), bits


def _kernel(distance: Tensor, interpolation: str) -> Tensor:
    """Return the weight of a pixel: a triangle, or Keys's cubic with a = -1/2.

    Keys, Cubic Convolution Interpolation for Digital Image Processing, 1981,
    doi:10.1109/TASSP.1981.1163711.
    """
    x = distance.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp_(min=0)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


@contextmanager
def _whole_float32(device: torch.device) -> Iterator[None]:
    """Multiply in full float32, whatever is set for the model: autocast, TF32, bfloat16."""
    backends: Any = torch.backends
    reduced = [
        (place, place.fp32_precision)
        for place in (backends.cuda.matmul, backends.mkldnn.matmul)
        if place.fp32_precision not in ("none", "ieee")
    ]
    available = torch.amp.is_autocast_available(device.type)
    for place, _ in reduced:
        place.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False) if available else nullcontext():
            yield
    finally:
        for place, precision in reduced:
            place.fp32_precision = precision
