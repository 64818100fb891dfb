"""Random changes of whole batches of uint8 images: each draws from (seed, epoch, index) alone.

All arithmetic is on whole numbers that float32 holds exactly, so that a GPU and a CPU give the same
pixels, and nothing waits for the device: no shape depends on what was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

# splitmix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195), its constants as signed 64-bit
# integers: torch has no unsigned arithmetic, and multiplication wraps all the same.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

_CROP_FRACTION = 8  # random_crop pads by an eighth of each side: 4 pixels of CIFAR's 32
_SHORT_RUN = 32  # bytes that a GPU reads at once
_LUMA = (19595.0, 38470.0, 7471.0)  # of 65536: ITU-R 601-2 as Pillow computes it
_SHARES = 2**16  # mixup's weights are multiples of 1/65536, with which float32 is exact

COLOR_OPERATIONS = (
    "identity",
    "brightness",
    "contrast",
    "saturation",
    "autocontrast",
    "posterize",
    "solarize",
)


def stream_offsets(seed: int, streams: Sequence[int]) -> Tensor:
    """Return what `draw` adds to tell seeds and streams apart: int64, (S, 1)."""
    offsets = [_wrap((seed + 1) * _MIX_1 + (stream + 1) * _MIX_2) for stream in streams]
    return torch.tensor(offsets, dtype=torch.int64).view(-1, 1)


def draw(sample: Tensor, offsets: Tensor) -> Tensor:
    """Draw numbers in [0, 1), one for each stream and sample.

    Args:
        sample: int64, (N,): a number that is unique to each epoch and image.
        offsets: int64, (S, 1), from `stream_offsets`; different streams are independent.

    Returns:
        float32, (S, N): the upper 24 bits of splitmix64's output.
    """
    state = sample * _GOLDEN + offsets
    state.bitwise_xor_(_shift_right(state, 30)).mul_(_MIX_1)
    state.bitwise_xor_(_shift_right(state, 27)).mul_(_MIX_2)
    state.bitwise_xor_(_shift_right(state, 31))
    return _shift_right(state, 40).to(torch.float32).div_(2**24)


def on_cpu(images: Tensor) -> bool:
    """Tell whether a CPU is to compute, where other operations give the same pixels faster."""
    return images.device.type == "cpu"


def uniform(seed: int, sample: Tensor, stream: int) -> Tensor:
    """Draw one number in [0, 1) for each sample, (N,), from one stream."""
    return draw(sample, stream_offsets(seed, [stream]).to(sample.device))[0]


def random_crop(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Pad each image with zeros by an eighth and cut its own window of the old size.

    Args:
        images: uint8, (N, C, H, W).
        row: float32 in [0, 1), (N,): the windows' upper edges.
        column: float32 in [0, 1), (N,): the windows' left edges.
    """
    count, channels, height, width = images.shape
    above, left = height // _CROP_FRACTION, width // _CROP_FRACTION
    rows, columns = (row * (2 * above + 1)).long(), (column * (2 * left + 1)).long()
    # An image is one run of bytes, and a window that is moved by rows and columns the same run
    # begun elsewhere; where it takes in what is not the image's, zeros are to stand anyway. 7 times
    # as fast as indexing of a padded batch (32 images of 32 px, one thread). CUDA counts elements
    # of all possible runs, and with 64 bits from 2**31 on (228 images of 32 px, one of 224): there
    # windows are put together from short runs.
    size, margin = channels * height * width, above * width + left
    run = size if on_cpu(images) else math.gcd(width, _SHORT_RUN)
    memory = nn.functional.pad(images.reshape(-1), (margin, margin))
    runs = memory.as_strided((memory.numel() - run + 1, run), (1, 1))
    starts = _positions(count, images.device) * size + rows * width + columns
    starts = starts[:, None] + _positions(size // run, images.device) * run
    windows = runs.index_select(0, starts.view(-1)).view(images.shape)
    inside_rows = _inside_windows(height, above, images.device).index_select(0, rows)
    inside_columns = _inside_windows(width, left, images.device).index_select(0, columns)
    return windows.mul_(inside_rows[:, None, :, None] * inside_columns[:, None, None, :])


def random_horizontal_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Mirror the images whose draw, (N,), is below one half."""
    count = len(images)
    # Rows of bytes are chosen five times as fast as pixels by `torch.where`.
    both = torch.cat((images, images.flip(-1))).reshape(2 * count, -1)
    chosen = _positions(count, images.device) + count * (draws < 0.5)
    return both.index_select(0, chosen).view(images.shape)


def cutout(images: Tensor, row: Tensor, column: Tensor, fill: Tensor) -> Tensor:
    """Cover a square of half the shorter side, which may reach over the edge.

    DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout,
    arXiv 1708.04552: the centre is a pixel at random; the square is zero in the normalised image.

    Args:
        images: uint8, (N, C, H, W).
        row: float32 in [0, 1), (N,): the centres.
        column: float32 in [0, 1), (N,).
        fill: uint8, (1, C, 1, 1), what the square holds: the grey levels that become zero.
    """
    height, width = images.shape[-2:]
    side = min(height, width) // 2
    tops, lefts = (row * height).long() - side // 2, (column * width).long() - side // 2
    rows = _inside(tops, side, height).view(torch.uint8)
    columns = _inside(lefts, side, width).view(torch.uint8)
    covered = rows[:, None, :, None] * columns[:, None, None, :]
    return (images * (1 - covered)).add_(covered * fill)


def random_color(images: Tensor, choice: Tensor, magnitude: Tensor) -> Tensor:
    """Change the colours of each image by one of `COLOR_OPERATIONS`, as strongly as drawn.

    The operations of RandAugment (Cubuk et al., arXiv 1909.13719) that move no pixel, without
    equalize and sharpness, and with its ranges; one to an image, at a strength of its own, as
    TrivialAugment (Müller and Hutter, arXiv 2103.10158) has it. Brightness, contrast and saturation
    blend with black, the mean grey and the grey image by a factor from 0.1 to 1.9; posterize keeps
    4 to 8 bits; solarize inverts from a threshold of 0 to 256 on; autocontrast stretches each
    channel to 0 to 255.

    Args:
        images: uint8, (N, 3, H, W).
        choice: float32 in [0, 1), (N,): which operation.
        magnitude: float32 in [0, 1), (N,): how strong.
    """
    operation = (choice * len(COLOR_OPERATIONS)).long().view(-1, 1, 1, 1)
    magnitude = magnitude.view(-1, 1, 1, 1)
    brightness, contrast, saturation, autocontrast, posterize, solarize = (
        operation == number for number in range(1, len(COLOR_OPERATIONS))
    )
    values = images.to(torch.float32)
    grey = _grey(values)
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    stretched = autocontrast & (high > low)
    blended = brightness | contrast | saturation
    # All that is linear in one: (factor * image + offset + share * grey) / divisor, whole numbers.
    factor = torch.where(blended, 26 + (magnitude * 462).floor(), 256.0)  # of 256
    share = (256 - factor) * saturation
    offset = torch.where(stretched, -255 * low, (256 - factor) * contrast * _mean_grey(grey))
    divisor = torch.where(stretched, high - low, 256.0)
    factor = torch.where(stretched, 255.0, factor)
    values.mul_(factor).add_(offset).add_(share * grey).div_(divisor)
    values.add_(0.5).floor_().clamp_(0, 255)
    threshold = torch.where(solarize, (magnitude * 257).floor(), 256.0)
    # 1 from the threshold on, else 0; comparing and choosing is 4 times as slow on a CPU.
    inverted = (values - (threshold - 1)).clamp_(0, 1)
    values.add_(inverted.mul_(255 - 2 * values))
    # To keep 8 - m bits is to go in steps of 2**m.
    step = torch.where(posterize, 16 >> (magnitude * 5).long(), 1)
    return values.div_(step).floor_().mul_(step).to(torch.uint8)


def mixup_share(share: Tensor) -> Tensor:
    """Round the own image's share, in [0, 1), (N,), down to what pixels can be mixed by exactly.

    mixup (Zhang et al., arXiv 1710.09412) draws it from Beta(1, 1), which is uniform.
    """
    return (share * _SHARES).floor_() / _SHARES


def cutmix_box(
    share: Tensor, row: Tensor, column: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Place the box that comes from the partner.

    CutMix (Yun et al., arXiv 1905.04899): of the image's shape, of the area 1 - share before it is
    clipped at the edges, with its centre anywhere.

    Args:
        share: float32 in [0, 1), (N,): the own image's, before clipping.
        row: float32 in [0, 1), (N,): the centres.
        column: float32 in [0, 1), (N,).
        height: Of the images, in pixels.
        width: Of the images, in pixels.

    Returns:
        Which rows, bool (N, height), and which columns, bool (N, width), the box takes up.
    """
    side = (1 - share).sqrt()
    spans = []
    for centre, size in ((row, height), (column, width)):
        length = (side * size).long()
        spans.append(_inside((centre * size).long() - length // 2, length[:, None], size))
    return spans[0], spans[1]


def mix_pixels(images: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight * images + (1 - weight) * partner`` in whole grey levels, halves up.

    Args:
        images: uint8, (N, C, H, W).
        partner: uint8, (N, C, H, W).
        weight: float32 in [0, 1], multiples of 1/65536, (N, 1, 1, 1) or (N, 1, H, W).
    """
    mixed = torch.lerp(partner.to(torch.float32), images.to(torch.float32), weight)
    return mixed.add_(0.5).to(torch.uint8)


def mix_labels(labels: Tensor, partner: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """Return the probability of each class, float32, (N, num_classes).

    Args:
        labels: int64, (N,), of the images.
        partner: int64, (N,), of what they are mixed with.
        share: float32 in [0, 1], (N,): how much of an image is its own.
        num_classes: Of the data set.
    """
    classes, share = _positions(num_classes, labels.device), share[:, None]
    return (labels[:, None] == classes) * share + (partner[:, None] == classes) * (1 - share)


def _grey(values: Tensor) -> Tensor:
    """Return the grey levels, whole numbers in float32, (N, 1, H, W)."""
    red, green, blue = (values[:, n : n + 1] * weight for n, weight in enumerate(_LUMA))
    return (red + green).add_(blue).add_(2**15).div_(2**16).floor_()


def _mean_grey(grey: Tensor) -> Tensor:
    """Return the mean of each image in whole grey levels, halves up, (N, 1, 1, 1)."""
    pixels = grey.shape[-2] * grey.shape[-1]
    total = grey.sum((2, 3), dtype=torch.int64, keepdim=True)
    return ((2 * total + pixels) // (2 * pixels)).to(torch.float32)


@lru_cache(maxsize=32)
def _positions(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


@lru_cache(maxsize=32)
def _inside_windows(size: int, margin: int, device: torch.device) -> Tensor:
    """Return, of each window that starts in the margin, what is image: uint8, (2m + 1, size)."""
    starts = torch.arange(margin, -margin - 1, -1, device=device)
    return _inside(starts, size, size).view(torch.uint8)


def _inside(start: Tensor, length: Tensor | int, size: int) -> Tensor:
    """Tell which of `size` positions are in a span of each image: bool, (N, size)."""
    beyond = _positions(size, start.device) - start[:, None]
    return (beyond >= 0) & (beyond < length)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift 64-bit integers right, filling with zeros as on unsigned ones."""
    return (value >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _wrap(value: int) -> int:
    """Reduce to the range of a signed 64-bit integer."""
    return (value + 2**63) % 2**64 - 2**63
