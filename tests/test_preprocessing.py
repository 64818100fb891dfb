from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ViTImageProcessor

from hfbench.augmentation import random_crop, random_horizontal_flip, uniform
from hfbench.preprocessing import Normalization, Preprocessing

MASK = 2**64 - 1
# Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014
# (doi:10.1145/2660193.2660195): the golden gamma and the two multipliers of its mixing function.
GOLDEN_GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
HALF = Normalization(8, "bilinear", (0.5,) * 3, (0.5,) * 3)

largest_below_one = float(np.nextafter(np.float32(1), np.float32(0)))
samples = st.integers(0, 2**62)
seeds = st.integers(0, 2**32 - 1)


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * MIX_1 & MASK
    z = (z ^ (z >> 27)) * MIX_2 & MASK
    return z ^ (z >> 31)


def uniform_in_python(seed: int, sample: int, stream: int) -> float:
    state = sample * GOLDEN_GAMMA + (seed + 1) * MIX_1 + (stream + 1) * MIX_2
    return (mix(state & MASK) >> 40) / 2**24


def tensor(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def noise(count: int = 6, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (count, 3, height, width)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


# --- random numbers ---


def test_mixing_function_gives_the_known_numbers_of_splitmix64() -> None:
    # For the seed 1234567: https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    states = [1234567 + n * GOLDEN_GAMMA & MASK for n in (1, 2, 3)]

    assert [mix(state) for state in states] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(seed=seeds, sample=samples, stream=st.integers(0, 9))
@settings(deadline=None)
def test_uniform_is_splitmix64(seed: int, sample: int, stream: int) -> None:
    (drawn,) = uniform(seed, tensor(sample), stream).tolist()

    assert drawn == uniform_in_python(seed, sample, stream)
    assert 0 <= drawn < 1


def test_uniform_is_float32() -> None:
    drawn = uniform(0, torch.arange(5), 0)

    assert drawn.dtype == torch.float32
    assert drawn.shape == (5,)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1])
@pytest.mark.parametrize("stream", [0, 1, 3])
def test_uniform_fills_the_unit_interval_evenly(seed: int, stream: int) -> None:
    count, bins = 100_000, 50
    drawn = uniform(seed, torch.arange(count), stream).double()

    histogram = torch.histc(drawn, bins, 0, 1)
    chi_squared = float(((histogram - count / bins) ** 2 / (count / bins)).sum())
    # 49 degrees of freedom: mean 49, standard deviation sqrt(98) = 9.9.
    assert 49 - 4 * 9.9 < chi_squared < 49 + 5 * 9.9
    assert abs(float(drawn.mean()) - 0.5) < 5 / (12 * count) ** 0.5
    assert len(drawn.unique()) > 0.99 * count


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 0, 0), (0, 0, 1)),  # streams
        ((0, 0, 0), (1, 0, 0)),  # seeds
        ((0, 0, 0), (0, 1, 0)),  # neighbouring samples
        ((0, 0, 0), (0, 50_000, 0)),  # epochs
    ],
)
def test_uniform_does_not_correlate(
    first: tuple[int, int, int], second: tuple[int, int, int]
) -> None:
    count = 50_000
    one, other = (
        uniform(seed, torch.arange(count) + start, stream)
        for seed, start, stream in (first, second)
    )

    correlation = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
    assert abs(correlation) < 5 / count**0.5


@given(
    numbers=st.lists(samples, min_size=1, max_size=20),
    order=st.randoms(use_true_random=False),
    cut=st.integers(0, 20),
)
@settings(deadline=None)
def test_uniform_depends_on_the_sample_alone(numbers: list[int], order: Any, cut: int) -> None:
    whole = dict(zip(numbers, uniform(3, tensor(*numbers), 1).tolist(), strict=True))
    shuffled = list(numbers)
    order.shuffle(shuffled)

    for part in (shuffled[:cut], shuffled[cut:]):
        assert uniform(3, tensor(*part), 1).tolist() == [whole[number] for number in part]


# --- cropping ---


def crop_in_python(images: torch.Tensor, rows: list[float], columns: list[float]) -> torch.Tensor:
    _, channels, height, width = images.shape
    above, left = height // 8, width // 8
    result = torch.zeros_like(images)
    for n, (row, column) in enumerate(zip(rows, columns, strict=True)):
        top, start = int(row * (2 * above + 1)) - above, int(column * (2 * left + 1)) - left
        for y in range(height):
            for x in range(width):
                if 0 <= y + top < height and 0 <= x + start < width:
                    result[n, :, y, x] = images[n, :, y + top, x + start]
    assert channels == 3
    return result


draws = st.floats(0, largest_below_one, width=32)


@given(
    height=st.integers(1, 18),
    width=st.integers(1, 18),
    windows=st.lists(st.tuples(draws, draws), min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=50)
def test_crop_is_a_shift_with_zeros_around(
    height: int, width: int, windows: list[tuple[float, float]]
) -> None:
    images = noise(len(windows), height, width)
    rows, columns = ([window[side] for window in windows] for side in (0, 1))

    cropped = random_crop(images, torch.tensor(rows), torch.tensor(columns))
    assert cropped.dtype == torch.uint8
    assert torch.equal(cropped, crop_in_python(images, rows, columns))


@pytest.mark.parametrize("size", [8, 9, 31, 32, 64, 224, 1024])
def test_crop_window_stays_inside_at_the_ends_of_the_draw(size: int) -> None:
    images = torch.full((2, 3, size, 8), 255, dtype=torch.uint8)
    ends = torch.tensor([0.0, largest_below_one])

    cropped = random_crop(images, ends, torch.tensor([0.5, 0.5]))
    pad = size // 8
    assert (cropped[0, :, :pad] == 0).all()
    assert (cropped[0, :, pad:] == 255).all()
    assert (cropped[1, :, size - pad :] == 0).all()
    assert (cropped[1, :, : size - pad] == 255).all()


def test_crop_of_cifar_shifts_by_at_most_four_pixels_each_equally_often() -> None:
    images = torch.zeros(9000, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 16] = 255
    sample = torch.arange(len(images))

    cropped = random_crop(images, uniform(0, sample, 0), uniform(0, sample, 1))
    place = cropped[:, 0].nonzero()[:, 1:] - 16
    assert place.abs().max() == 4
    for axis in (0, 1):
        counts = torch.bincount(place[:, axis] + 4, minlength=9)
        assert counts.min() > 1000 - 5 * 30  # binomial, standard deviation 29.8
        assert counts.max() < 1000 + 5 * 30


# --- flipping ---


def test_flip_mirrors_below_one_half_only() -> None:
    images = noise(4)
    draw = torch.tensor([0.0, 0.4999, 0.5, largest_below_one])

    flipped = random_horizontal_flip(images, draw)
    assert torch.equal(flipped[:2], images[:2].flip(-1))
    assert torch.equal(flipped[2:], images[2:])


def test_half_of_the_images_are_flipped() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(10_000, 3, 1, 2)

    flipped = random_horizontal_flip(images, uniform(0, torch.arange(10_000), 0))
    assert abs(int((flipped[:, 0, 0, 0] == 255).sum()) - 5000) < 5 * 50


# --- the whole module ---


def test_nothing_is_augmented_without_a_sample() -> None:
    images = noise(height=8, width=8)
    module = Preprocessing(HALF, ["random_crop", "horizontal_flip"], seed=0)

    torch.testing.assert_close(
        module(images), (images.float() / 255 - 0.5) / 0.5, rtol=0, atol=1e-6
    )
    assert not torch.equal(module(images), module(images, torch.arange(len(images))))


def test_augmentation_follows_its_order_and_its_streams() -> None:
    images, sample = noise(8, 16, 16), torch.arange(8) + 100
    plain = Preprocessing(HALF, [], seed=5)

    crop_first = random_horizontal_flip(
        random_crop(images, uniform(5, sample, 0), uniform(5, sample, 1)), uniform(5, sample, 2)
    )
    flip_first = random_crop(
        random_horizontal_flip(images, uniform(5, sample, 0)),
        uniform(5, sample, 2),
        uniform(5, sample, 3),
    )
    for order, expected in (
        (["random_crop", "horizontal_flip"], crop_first),
        (["horizontal_flip", "random_crop"], flip_first),
    ):
        assert torch.equal(Preprocessing(HALF, order, seed=5)(images, sample), plain(expected))


@given(cut=st.integers(0, 12), seed=seeds, order=st.permutations(range(12)))
@settings(deadline=None, max_examples=25)
def test_augmentation_is_the_same_for_any_batch_and_order(
    cut: int, seed: int, order: list[int]
) -> None:
    images, sample = noise(12), torch.arange(12) * 1000
    module = Preprocessing(HALF, ["random_crop", "horizontal_flip"], seed)
    whole = module(images, sample)

    for part in (order[:cut], order[cut:]):
        if part:
            assert torch.equal(module(images[part], sample[part]), whole[part])


def test_augmentation_changes_with_the_seed_and_the_epoch() -> None:
    images, sample = noise(32), torch.arange(32)
    module = Preprocessing(HALF, ["random_crop"], seed=0)

    assert not torch.equal(module(images, sample), module(images, sample + 32))
    assert not torch.equal(
        module(images, sample), Preprocessing(HALF, ["random_crop"], seed=1)(images, sample)
    )


def test_augmentation_leaves_the_images_alone() -> None:
    images = noise()
    before = images.clone()
    Preprocessing(HALF, ["random_crop", "horizontal_flip"], seed=0)(images, torch.arange(6))

    assert torch.equal(images, before)


def test_augmentation_does_not_touch_the_state_of_torch() -> None:
    before = torch.get_rng_state()
    Preprocessing(HALF, ["random_crop"], seed=0)(noise(), torch.arange(6))

    assert torch.equal(torch.get_rng_state(), before)


def test_checkpoint_of_the_module_is_empty() -> None:
    assert Preprocessing(HALF, [], seed=0).state_dict() == {}


def test_each_channel_has_its_own_mean_and_deviation() -> None:
    images = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    normalization = Normalization(8, "bilinear", (0.0, 0.5, 1.0), (0.5, 0.25, 0.125))

    values = Preprocessing(normalization, [], seed=0)(images)[0, :, 0, 0]
    assert values.tolist() == [2.0, 2.0, 0.0]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_output_has_the_size_of_the_model(interpolation: str) -> None:
    normalization = Normalization(24, interpolation, (0.5,) * 3, (0.5,) * 3)

    values = Preprocessing(normalization, [], seed=0)(noise(2, 10, 13))
    assert values.shape == (2, 3, 24, 24)
    assert values.dtype == torch.float32
    assert values.abs().max() <= 1  # resized as uint8, so that nothing overshoots


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 224), (32, 32, 32), (8, 8, 32), (48, 32, 64), (300, 200, 96), (7, 200, 64)],
)
@pytest.mark.parametrize(("interpolation", "resample"), [("bilinear", 2), ("bicubic", 3)])
def test_output_is_that_of_the_image_processor(
    height: int, width: int, size: int, interpolation: str, resample: int
) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = noise(3, height, width)
    processor = ViTImageProcessor(
        size={"height": size, "width": size}, resample=resample, image_mean=mean, image_std=std
    )

    values = Preprocessing(Normalization(size, interpolation, mean, std), [], seed=0)(images)
    expected = processor(list(images), return_tensors="pt")["pixel_values"]
    # 1e-5 is a thousandth of one step of uint8, 1 / 255 / 0.225.
    assert torch.allclose(values, expected, rtol=0, atol=1e-5)
