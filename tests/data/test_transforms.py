from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from transformers import ViTImageProcessor

from hfbench.data.augmentation import random_crop, random_horizontal_flip, uniform
from hfbench.data.images import ImageBatches, ImageSplit
from hfbench.data.sources import load_splits
from hfbench.data.transforms import Normalization, Preprocessing
from hfbench.machine.settings import tf32_set
from hfbench.recipe.schema import DatasetSection
from hfbench.training.switches import observe_switches
from hfbench.training.trainer import BenchTrainer
from tests.builders import make_trainer, tiny_recipe, vit_config, write_model

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


# --- layouts in memory, and where it runs ---

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ALL = ["random_crop", "horizontal_flip", "color", "cutout", "mixup", "cutmix"]


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 9)])
def test_memory_format_changes_the_layout_and_no_value(height: int, width: int, size: int) -> None:
    images, sample = noise(4, height, width), torch.arange(4)
    normalization = Normalization(size, "bilinear", *IMAGENET)
    plain = Preprocessing(normalization, ["random_crop"], 0)(images, sample)
    last = Preprocessing(normalization, ["random_crop"], 0, "channels_last")(images, sample)

    assert torch.equal(plain, last)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("mean", "std"), [IMAGENET, ((0.5,) * 3, (0.5,) * 3), ((0,) * 3, (1,) * 3)]
)
def test_every_grey_level_is_normalised_as_by_the_textbook(mean: Any, std: Any) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    exact = (images.double() / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(
        1, 3, 1, 1
    )

    values = Preprocessing(Normalization(16, "bilinear", mean, std), [], 0)(images)
    torch.testing.assert_close(values.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 64), (40, 20, 24), (9, 9, 50)])
def test_resized_pixels_are_those_of_torchvision(
    height: int, width: int, size: int, interpolation: str
) -> None:
    images = noise(3, height, width)
    mode = F.InterpolationMode(interpolation)
    expected = torch.stack([F.resize(image, [size] * 2, mode, antialias=True) for image in images])

    as_they_are = Normalization(size, interpolation, (0.0,) * 3, (1 / 255,) * 3)
    values = Preprocessing(as_they_are, [], 0)(images)
    assert torch.equal(values.round().to(torch.uint8), expected)


def test_real_images_are_resized_as_by_torchvision_and_on_both_sides_alike(shared: Path) -> None:
    section = DatasetSection(
        name_or_path=str(shared / "data" / "cifar10"),
        image_column="img",
        max_train_samples=10,
        max_eval_samples=500,
    )
    _, test = load_splits(section, 64, "bilinear")
    preprocessing = Preprocessing(Normalization(64, "bilinear", *IMAGENET), [], 0)
    host, device = (ImageBatches(test, preprocessing, at, False) for at in ("host", "device"))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)

    for start in range(0, 500, 125):
        numbers = list(range(start, start + 125))
        values = host.__getitems__(numbers)["pixel_values"]
        assert torch.equal(preprocessing(device.__getitems__(numbers)["pixel_values"]), values)
        pictures = [F.to_pil_image(test.images[n]).resize((64, 64), 2) for n in numbers]
        expected = torch.stack([F.pil_to_tensor(picture) for picture in pictures])
        assert torch.equal(((values * std + mean) * 255).round().to(torch.uint8), expected)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_no_step_has_to_wait_for_what_a_device_computed(memory_format: Any) -> None:
    # On the meta device nothing is computed: a value that is asked for, or a shape that depends on
    # one, is an error.
    images = torch.empty(4, 3, 20, 28, dtype=torch.uint8, device="meta")
    sample = torch.empty(4, dtype=torch.int64, device="meta")
    module = Preprocessing(HALF, ALL, 0, memory_format).to("meta")

    assert module(images, sample, images, sample).shape == (4, 3, 8, 8)
    assert module(images).shape == (4, 3, 8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("augmentation", [[], ALL])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [24, 48, 224])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_gpu_gives_the_values_of_a_cpu_bit_for_bit(
    augmentation: list[str], interpolation: str, size: int, memory_format: Any
) -> None:
    images, sample = noise(64, 32, 32), torch.arange(64) + 50_000
    normalization = Normalization(size, interpolation, *IMAGENET)
    module = Preprocessing(normalization, augmentation, 0, memory_format)
    partners = module.partners(sample, 64)
    arguments = (images, sample, images[partners % 64], partners)
    on_cpu = module(*arguments)

    with tf32_set(True), torch.autocast("cuda", torch.float16):
        on_gpu = module.cuda()(*(value.cuda() for value in arguments))
    assert torch.equal(on_gpu.cpu(), on_cpu)
    assert on_gpu.stride() == on_cpu.stride()


# --- mixing ---


def mixed(
    augmentation: Sequence[str], sample: Tensor, height: int = 16, width: int = 16
) -> tuple[Tensor, Tensor]:
    """Mix white images of class 0 with black ones of class 1: (own share of pixels, labels)."""
    count = len(sample)
    white = torch.full((count, 3, height, width), 255, dtype=torch.uint8)
    as_they_are = Normalization(16, "nearest", (0.0,) * 3, (1.0,) * 3)
    module = Preprocessing(as_they_are, augmentation, seed=3)
    own, other = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.int64)
    pixels = module(white, sample, torch.zeros_like(white), sample + 10**6)
    labels = module.mixed_labels(own, other, sample, (height, width), 3)
    assert torch.equal(labels[:, 2], torch.zeros(count))
    torch.testing.assert_close(labels.sum(1), torch.ones(count))
    return pixels, labels[:, 0]


def test_mixup_shares_are_those_of_the_labels_and_uniform() -> None:
    pixels, share = mixed(["mixup"], torch.arange(4000), 16, 16)

    assert (pixels.amax((1, 2, 3)) == pixels.amin((1, 2, 3))).all()
    torch.testing.assert_close(pixels[:, 0, 0, 0], share, rtol=0, atol=0.5 / 255 + 1e-6)
    deviation = (share.sort().values - (torch.arange(4000) + 0.5) / 4000).abs().max()
    assert deviation < 1.95 / 4000**0.5  # Kolmogorov and Smirnov, p = 0.001


def test_cutmix_labels_have_the_share_of_the_pixels_that_are_seen() -> None:
    pixels, share = mixed(["cutmix"], torch.arange(300))

    assert set(pixels.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(pixels.mean((1, 2, 3)), share)
    boxes = (pixels[:, 0] == 0).flatten(1).any(1)
    assert boxes.float().mean() > 0.9


def test_half_of_the_images_get_each_kind_of_mixing() -> None:
    pixels, share = mixed(["mixup", "cutmix"], torch.arange(2000))
    torch.testing.assert_close(pixels.mean((1, 2, 3)), share, rtol=0, atol=0.5 / 255 + 1e-6)

    flat = pixels.amax((1, 2, 3)) == pixels.amin((1, 2, 3))
    blended = flat & (pixels[:, 0, 0, 0] > 0) & (pixels[:, 0, 0, 0] < 1)
    assert abs(int(blended.sum()) - 1000) < 5 * 22.4


def test_partners_are_of_the_same_epoch_and_each_as_often() -> None:
    module = Preprocessing(HALF, ["mixup"], seed=0)
    sample = torch.arange(7 * 1000, 8 * 1000)
    partners = torch.cat([module.partners(sample + 1000 * n, 1000) - 1000 * n for n in range(20)])

    assert partners.min() >= 7000
    assert partners.max() < 8000
    counts = torch.bincount(partners - 7000, minlength=1000).double()
    # Chi-squared of 999 degrees of freedom: mean 999, standard deviation 44.7.
    assert abs(float((counts - 20).square().sum() / 20) - 999) < 5 * 44.7


def test_mixing_comes_last_and_does_not_move_the_streams_of_the_others() -> None:
    images, sample = noise(6), torch.arange(6)
    black = torch.zeros_like(images)
    later = Preprocessing(HALF, ["random_crop", "mixup"], 0)
    first = Preprocessing(HALF, ["mixup", "random_crop"], 0)

    assert torch.equal(first.partners(sample, 6), later.partners(sample, 6))
    cropped = Preprocessing(HALF, ["random_crop"], 0)(images, sample)
    without_partner = later(images, sample)
    assert torch.equal(without_partner, cropped)
    assert not torch.equal(later(images, sample, black, sample), cropped)


# --- the trainer ---


def split(count: int = 24, height: int = 12, width: int = 20) -> ImageSplit:
    labels = torch.arange(count) % 10
    return ImageSplit(
        noise(count, height, width), labels, [str(n) for n in range(10)], torch.arange(count)
    )


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=["loader", "resident"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "augmentation",
    [[], *([name] for name in ALL), ALL],
    ids=lambda names: "-".join(names) or "none",
)
def test_host_and_device_give_the_same_batch_bit_for_bit(
    augmentation: list[str],
    memory_format: Any,
    device: torch.device | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data, numbers = split(), [24 + 5, 48 + 1, 7, 24 * 9 + 23]
    normalization = Normalization(32, "bilinear", *IMAGENET)
    module = Preprocessing(normalization, augmentation, 11, memory_format)
    trainer = bare_trainer(tmp_path_factory)
    trainer.preprocessing = module

    for augment in (True, False):
        on_host = ImageBatches(data, module, "host", augment)
        on_device = ImageBatches(data, module, "device", augment, device)
        served = on_device.__getitems__(numbers)
        assert ("pixel_values" in served) == (device is None)
        trainer.train_dataset = on_device
        trainer.callback_handler.eval_dataloader = torch.utils.data.DataLoader(on_device)
        expected = trainer._prepare_inputs(on_host.__getitems__(numbers))
        found = trainer._prepare_inputs(served)
        assert expected.keys() == found.keys() == {"pixel_values", "labels"}
        for name, value in expected.items():
            assert torch.equal(found[name], value)
            assert found[name].stride() == value.stride()


_trainers: list[BenchTrainer] = []


def bare_trainer(factory: pytest.TempPathFactory) -> BenchTrainer:
    """Return the one trainer of a tiny model."""
    if not _trainers:
        folder = factory.mktemp("bare")
        recipe = tiny_recipe(write_model(folder / "vit", vit_config()), pretrained=True)
        _trainers.append(make_trainer(recipe, folder))
    return _trainers[0]


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return write_model(tmp_path / "vit", vit_config())


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], two[name])]


def test_training_is_the_same_wherever_images_are_prepared_and_lie(
    vit: Path, tmp_path: Path
) -> None:
    def train(location: str, resident: bool, **arguments: Any) -> dict[str, Tensor]:
        recipe = tiny_recipe(
            vit,
            pretrained=True,
            preprocessing={"location": location, "augmentation": ALL},
            num_train_epochs=2,
            eval_strategy="epoch",
            **arguments,
        )
        trainer: Any = make_trainer(recipe, tmp_path)
        if resident:
            for name in ("train_dataset", "eval_dataset"):
                old = getattr(trainer, name)
                place = (old.location, old.augment, torch.device("cpu"))
                setattr(trainer, name, ImageBatches(old.split, old.preprocessing, *place))
        trainer.train()
        losses.append([e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e])
        return weights(trainer)

    losses: list[list[float]] = []
    host = train("host", False)
    assert differing(host, train("device", False)) == []
    assert differing(host, train("device", True, dataloader_num_workers=1)) == []
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_labels_are_learned_as_by_a_plain_loop_under_accumulation(
    smoothing: float, vit: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        vit,
        pretrained=True,
        preprocessing={"location": "device", "augmentation": ["mixup", "cutmix"]},
        dataset={"max_train_samples": 20},  # batches of 8, 8 and 4 make up one step
        gradient_accumulation_steps=3,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        label_smoothing_factor=smoothing,
    )
    trainer: Any = make_trainer(recipe, tmp_path)
    model, data = trainer.model, trainer.train_dataset
    before = weights(trainer)
    # One batch of all, and the loss as the papers write it.
    batch = ImageBatches(data.split, data.preprocessing, "host", True).__getitems__(list(range(20)))
    logs = nn.functional.log_softmax(model(pixel_values=batch["pixel_values"]).logits, dim=1)
    targets = (1 - smoothing) * batch["mixed_labels"] + smoothing / 10
    loss = -(targets * logs).sum(1).mean()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    trainer.train()
    assert trainer.mean_training_loss() == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(before[name] - value, gradients[name], rtol=1e-4, atol=1e-6)


def test_switch_says_where_images_were_prepared_and_why_not_where_they_were_asked_to_lie(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def switch(location: str) -> tuple[Any, Any, str | None]:
        recipe = tiny_recipe(vit, pretrained=True, preprocessing={"location": location})
        trainer = make_trainer(recipe, tmp_path)
        trainer.get_train_dataloader()
        with monkeypatch.context() as patch:
            if other_device:
                patch.setattr(type(trainer.args), "device", torch.device("xpu"))
            found = observe_switches(recipe, trainer)["preprocessing_location"]
        return found.requested, found.applied, found.reason

    other_device = False
    assert switch("host") == ("host", "host", None)
    assert switch("device") == ("device", "device", None)
    other_device = True  # with images that were not copied there
    requested, applied, reason = switch("device")
    assert (requested, applied) == ("device", "device, images in host memory")
    assert reason
    assert "a quarter of the device's free memory" in reason


def test_evaluation_mixes_nothing(vit: Path, tmp_path: Path) -> None:
    def evaluate(augmentation: list[str]) -> float:
        preprocessing = {"location": "device", "augmentation": augmentation}
        recipe = tiny_recipe(vit, pretrained=True, preprocessing=preprocessing)
        return make_trainer(recipe, tmp_path).evaluate()["eval_loss"]

    assert evaluate([]) == evaluate(ALL)
