from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from hfbench.data.augmentation import (
    COLOR_OPERATIONS,
    cutmix_box,
    cutout,
    draw,
    mix_labels,
    mix_pixels,
    mixup_share,
    random_color,
    random_crop,
    random_horizontal_flip,
    stream_offsets,
    uniform,
)

BLACK = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
largest_below_one = float(np.nextafter(np.float32(1), np.float32(0)))
draws = st.floats(0, largest_below_one, width=32)


def noise(count: int = 6, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (count, 3, height, width)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def flat(*levels: int) -> Tensor:
    """Return an image of one row, grey, with these levels."""
    return torch.tensor(levels, dtype=torch.uint8).expand(1, 3, 1, len(levels)).contiguous()


# --- random numbers ---


def test_streams_drawn_together_are_those_drawn_alone() -> None:
    sample = torch.arange(20) * 977

    together = draw(sample, stream_offsets(5, [0, 3, 1000]))
    alone = [uniform(5, sample, stream) for stream in (0, 3, 1000)]
    assert torch.equal(together, torch.stack(alone))


# --- layouts in memory ---


@pytest.mark.parametrize(
    "change",
    [
        lambda images, a, b: random_crop(images, a, b),
        lambda images, a, b: random_horizontal_flip(images, a),
        lambda images, a, b: cutout(images, a, b, BLACK),
        lambda images, a, b: random_color(images, a, b),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 20), (1, 3)])
def test_layout_in_memory_does_not_matter(change: Any, height: int, width: int) -> None:
    images = noise(8, height, width)
    first, second = (uniform(0, torch.arange(8), stream) for stream in (0, 1))
    before = images.clone()
    plain = change(images, first, second)

    assert plain.dtype == torch.uint8
    assert torch.equal(images, before)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(change(last, first, second), plain)
    wider = torch.cat((images, images), dim=3)[..., :width]
    assert torch.equal(change(wider, first, second), plain)


# --- cutout ---


def test_cutout_covers_a_square_of_half_the_side_about_its_centre() -> None:
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    # Centre (4, 3): rows 2 to 5, columns 1 to 4.
    cut = cutout(images, torch.tensor([4 / 8]), torch.tensor([3 / 8]), BLACK)

    expected = images.clone()
    expected[..., 2:6, 1:5] = 0
    assert torch.equal(cut, expected)


def test_cutout_reaches_over_the_edge_and_takes_the_shorter_side() -> None:
    images = torch.full((2, 3, 4, 8), 9, dtype=torch.uint8)
    # A square of 2: about (0, 0) row -1 to 0 and column -1 to 0; about (3, 7) rows 2 and 3.
    ends = torch.tensor([0.0, largest_below_one])
    cut = cutout(images, ends, ends, BLACK)

    assert (cut[0] == 0).nonzero().tolist() == [[channel, 0, 0] for channel in range(3)]
    assert (cut[1, 0] == 0).nonzero().tolist() == [[2, 6], [2, 7], [3, 6], [3, 7]]


def test_cutout_fills_with_the_level_of_each_channel() -> None:
    fill = torch.tensor([10, 20, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    cut = cutout(noise(1, 2, 2), torch.tensor([0.5]), torch.tensor([0.5]), fill)

    assert cut[0, :, 1, 1].tolist() == [10, 20, 255]


def test_cutout_centres_lie_on_each_pixel_equally_often() -> None:
    sample = torch.arange(16_000)
    images = torch.ones(16_000, 3, 4, 4, dtype=torch.uint8)
    cut = cutout(images, uniform(0, sample, 0), uniform(0, sample, 1), BLACK)[:, 0]
    # About the first pixel the square of 2 covers one pixel, about 3 x 2 others on the edge two.
    covered = (cut == 0).sum((1, 2))

    counts = torch.bincount(covered, minlength=5).tolist()
    assert counts[0] == counts[3] == 0
    for count, cells in ((counts[1], 1), (counts[2], 6), (counts[4], 9)):
        share = cells / 16
        assert abs(count - 16_000 * share) < 5 * math.sqrt(16_000 * share * (1 - share))


# --- colour ---


def chosen(name: str, count: int = 1) -> Tensor:
    """Return a draw that leads to an operation."""
    return torch.full((count,), (COLOR_OPERATIONS.index(name) + 0.5) / len(COLOR_OPERATIONS))


def colored(images: Tensor, name: str, magnitude: float) -> Tensor:
    return random_color(images, chosen(name, len(images)), torch.full((len(images),), magnitude))


# Factors of 256: 26 + floor(462 m) = 26 for m = 0, 257 for m = 0.5.
@pytest.mark.parametrize(
    ("name", "magnitude", "levels", "expected"),
    [
        ("identity", 0.3, (0, 7, 255), (0, 7, 255)),
        # 100 * 26 / 256 = 10.16, 255 * 26 / 256 = 25.9
        ("brightness", 0.0, (0, 100, 255), (0, 10, 26)),
        # 200 * 487 / 256 = 380
        ("brightness", largest_below_one, (0, 100, 200), (0, 190, 255)),
        # The mean is 100: 100 + (x - 100) * 26 / 256 = 89.8, 100, 110.2
        ("contrast", 0.0, (0, 100, 200), (90, 100, 110)),
        # 100 + (x - 100) * 487 / 256 = 4.9, 195.1, 100
        ("contrast", largest_below_one, (50, 150, 100), (5, 195, 100)),
        # Grey stays grey.
        ("saturation", 0.0, (0, 100, 255), (0, 100, 255)),
        # (x - 50) * 255 / 100 = 0, 127.5, 255; halves go up
        ("autocontrast", 0.5, (50, 100, 150), (0, 128, 255)),
        ("autocontrast", 0.5, (7, 7, 7), (7, 7, 7)),
        # 4 bits: steps of 16; 7 bits: steps of 2; 8 bits: as it is
        ("posterize", 0.0, (15, 16, 255), (0, 16, 240)),
        ("posterize", 0.7, (15, 16, 255), (14, 16, 254)),
        ("posterize", largest_below_one, (15, 16, 255), (15, 16, 255)),
        # The threshold is 0, 128 (257 / 2), 256.
        ("solarize", 0.0, (0, 100, 255), (255, 155, 0)),
        ("solarize", 0.5, (127, 128, 255), (127, 127, 0)),
        ("solarize", largest_below_one, (0, 100, 255), (0, 100, 255)),
    ],
)
def test_color_operation_by_hand(
    name: str, magnitude: float, levels: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert torch.equal(colored(flat(*levels), name, magnitude), flat(*expected))


def test_saturation_blends_with_the_grey_of_itu_601() -> None:
    pixel = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    # 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2; 124 + (x - 124) * 26 / 256
    assert colored(pixel, "saturation", 0.0).flatten().tolist() == [132, 122, 116]


@pytest.mark.parametrize("magnitude", [0.0, 0.21, 0.5, 0.83, largest_below_one])
@pytest.mark.parametrize("name", COLOR_OPERATIONS)
def test_color_is_that_of_pillow(name: str, magnitude: float) -> None:
    images = noise(3, 9, 11)
    factor = (26 + int(462 * np.float32(magnitude))) / 256

    def in_pillow(picture: Image.Image) -> Image.Image:
        match name:
            case "brightness":
                return ImageEnhance.Brightness(picture).enhance(factor)
            case "contrast":
                return ImageEnhance.Contrast(picture).enhance(factor)
            case "saturation":
                return ImageEnhance.Color(picture).enhance(factor)
            case "autocontrast":
                return ImageOps.autocontrast(picture)
            case "posterize":
                return ImageOps.posterize(picture, 4 + int(5 * magnitude))
            case "solarize":
                return ImageOps.solarize(picture, int(257 * magnitude))
        return picture

    found = colored(images, name, magnitude)
    for image, changed in zip(images, found, strict=True):
        expected = np.array(in_pillow(Image.fromarray(image.permute(1, 2, 0).numpy())))
        difference = np.abs(changed.permute(1, 2, 0).numpy().astype(int) - expected).max()
        # Pillow cuts fractions off where this rounds.
        assert difference <= (0 if name in ("identity", "posterize", "solarize") else 1)


def test_each_image_gets_its_own_operation_whatever_is_beside_it() -> None:
    images = noise(len(COLOR_OPERATIONS))
    choice = torch.cat([chosen(name) for name in COLOR_OPERATIONS])
    magnitude = torch.linspace(0, 0.9, len(COLOR_OPERATIONS))

    together = random_color(images, choice, magnitude)
    for n, name in enumerate(COLOR_OPERATIONS):
        alone = colored(images[n : n + 1], name, float(magnitude[n]))
        assert torch.equal(together[n : n + 1], alone)


# --- mixing ---


def test_mixup_share_keeps_sixteen_bits() -> None:
    draws = torch.tensor([0.0, 0.5, 0.5 + 2**-20, largest_below_one])

    assert mixup_share(draws).tolist() == [0.0, 0.5, 0.5, 65535 / 65536]


def test_mixed_pixels_by_hand() -> None:
    # 0.25 * 100 + 0.75 * 10 = 32.5, which goes up; 0.25 * 3 + 0.75 * 4 = 3.75; 0.25 * 255 = 63.75
    mixed = mix_pixels(flat(100, 3, 255), flat(10, 4, 0), torch.full((1, 1, 1, 1), 0.25))

    assert torch.equal(mixed, flat(33, 4, 64))


@given(
    levels=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=8),
    share=st.integers(0, 65536),
)
@settings(deadline=None)
def test_mixed_pixels_are_rounded_exactly(levels: list[tuple[int, int]], share: int) -> None:
    own, other = (flat(*(pair[side] for pair in levels)) for side in (0, 1))
    mixed = mix_pixels(own, other, torch.full((1, 1, 1, 1), share / 65536))

    exact = [(share * a + (65536 - share) * b + 32768) // 65536 for a, b in levels]
    assert mixed[0, 0, 0].tolist() == exact


def box(share: float, row: float, column: float, height: int, width: int) -> tuple[Any, Any]:
    rows, columns = cutmix_box(
        *(torch.tensor([value]) for value in (share, row, column)), height, width
    )
    return rows[0].nonzero().flatten().tolist(), columns[0].nonzero().flatten().tolist()


def test_cutmix_box_by_hand() -> None:
    # sqrt(1 - 0.75) = 0.5 of each side, about (4, 8): rows 2 to 5, columns 4 to 11.
    assert box(0.75, 0.5, 0.5, 8, 16) == ([2, 3, 4, 5], [4, 5, 6, 7, 8, 9, 10, 11])
    # About (0, 15): rows -2 to 1, columns 11 to 18.
    assert box(0.75, 0.0, 15 / 16, 8, 16) == ([0, 1], [11, 12, 13, 14, 15])
    assert box(0.0, 0.5, 0.5, 4, 4) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert box(largest_below_one, 0.5, 0.5, 4, 4) == ([], [])


def test_mixed_labels_by_hand() -> None:
    labels, partner = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0])
    mixed = mix_labels(labels, partner, torch.tensor([0.25, 0.75, 1.0]), 3)

    assert mixed.tolist() == [[0.25, 0.75, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert mixed.dtype == torch.float32
