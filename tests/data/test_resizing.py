"""The same pixels on every device: what other devices compute, computed on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as F

from hfbench.data.resizing import resize_exactly
from hfbench.data.sources import load_splits
from hfbench.data.transforms import Normalization, Preprocessing
from hfbench.machine.settings import tf32_set
from hfbench.recipe.schema import DatasetSection

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ALL = ["random_crop", "horizontal_flip", "color", "cutout", "mixup", "cutmix"]

# Without AVX torchvision itself resizes these in float32.
without_avx = pytest.mark.skipif(
    "AVX" not in torch.backends.cpu.get_cpu_capability(), reason="needs a CPU with AVX2"
)
interpolations = pytest.mark.parametrize(
    "interpolation", [pytest.param("bilinear", marks=without_avx), "bicubic"]
)
layouts = pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])


def noise(count: int, height: int, width: int, seed: int = 0, levels: int = 256) -> Tensor:
    """Draw images of evenly spaced grey levels: of two, they are black and white."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, levels, (count, 3, height, width), generator=generator)
    return (drawn * 255 // (levels - 1)).to(torch.uint8)


def by_torchvision(images: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    mode = F.InterpolationMode(interpolation)
    resized: Tensor = F.resize(images, [height, width], interpolation=mode, antialias=True)
    return resized


@pytest.fixture
def other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go the ways that are not a CPU's."""
    for module in ("data.augmentation", "data.transforms"):
        monkeypatch.setattr(f"hfbench.{module}.on_cpu", lambda images: False)


# --- resizing ---

# torch 2.14 fails itself on images that are one pixel wide.
sides = st.one_of(st.integers(2, 9), st.integers(2, 64), st.integers(2, 320))


@interpolations
@given(old=st.tuples(sides, sides), new=st.tuples(sides, sides), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=150)
def test_pixels_of_any_size_are_those_of_torchvision(
    interpolation: str, old: tuple[int, int], new: tuple[int, int], seed: int
) -> None:
    # Black and white gives the largest sums.
    images = noise(2, *old, seed, levels=256 if seed % 2 else 2)
    expected = by_torchvision(images, *new, interpolation)

    for last in (False, True):
        found = resize_exactly(images, new, interpolation, channels_last=last)
        assert torch.equal(found, expected)
        layout = torch.channels_last if last else torch.contiguous_format
        assert found.is_contiguous(memory_format=layout)


# 112 to 28 has one matrix of weights, 2,000 to 28 two, 20,000 to 1 seven.
@interpolations
@pytest.mark.parametrize(("old", "new"), [(112, 28), (2_000, 28), (9_000, 50), (20_000, 1)])
def test_sums_stay_exact_however_much_images_are_shrunk(
    old: int, new: int, interpolation: str
) -> None:
    for levels in (2, 256):
        images = noise(4, old, 2, levels=levels)
        for turned in (images, images.mT.contiguous()):
            size = (new, 2) if turned is images else (2, new)
            expected = by_torchvision(turned, *size, interpolation)
            assert torch.equal(resize_exactly(turned, size, interpolation), expected)


def test_images_of_more_pixels_than_can_be_summed_are_refused() -> None:
    with pytest.raises(ValueError, match="40000 pixels cannot be resized to 1"):
        resize_exactly(torch.zeros(1, 1, 1, 40_000, dtype=torch.uint8), (1, 1), "bilinear")


@interpolations
def test_layout_of_the_images_does_not_matter(interpolation: str) -> None:
    images = noise(3, 20, 28)
    expected = by_torchvision(images, 33, 17, interpolation)

    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(resize_exactly(last, (33, 17), interpolation), expected)
    turned = by_torchvision(images.mT.contiguous(), 33, 17, interpolation)
    assert torch.equal(resize_exactly(images.mT, (33, 17), interpolation), turned)
    assert torch.equal(images, noise(3, 20, 28))


@interpolations
def test_pixels_are_exact_whatever_precision_is_set_for_the_model(interpolation: str) -> None:
    images = noise(4, 32, 32)
    expected = by_torchvision(images, 96, 96, interpolation)
    mkldnn: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

    with tf32_set(True), torch.autocast("cpu", torch.bfloat16):
        mkldnn.fp32_precision = "bf16"  # a CPU's TF32
        assert torch.equal(resize_exactly(images, (96, 96), interpolation), expected)
        assert mkldnn.fp32_precision == "bf16"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.is_autocast_enabled("cpu")


@pytest.fixture(scope="session")
def cifar10(shared: Path) -> Tensor:
    """Return all test images of CIFAR-10."""
    section = DatasetSection(
        name_or_path=str(shared / "data" / "cifar10"), image_column="img", max_train_samples=10
    )
    _, test = load_splits(section, 32, "bilinear")
    assert test.images.shape == (10_000, 3, 32, 32)
    return test.images


@interpolations
@pytest.mark.parametrize("size", [16, 24, 64, 96, pytest.param(224, marks=pytest.mark.slow)])
def test_all_test_images_of_cifar10_are_resized_as_by_torchvision(
    size: int, interpolation: str, cifar10: Tensor
) -> None:
    for images in cifar10.split(250):
        last = images.contiguous(memory_format=torch.channels_last)  # its fast way
        expected = by_torchvision(last, size, size, interpolation)
        assert torch.equal(resize_exactly(images, (size, size), interpolation), expected)


# --- all of preprocessing ---


@layouts
@pytest.mark.parametrize("size", [16, 24, 12])
@pytest.mark.parametrize("augmentation", [[], *([name] for name in ALL), ALL], ids="-".join)
def test_other_devices_give_the_batch_of_a_cpu_bit_for_bit(
    augmentation: list[str], size: int, memory_format: Any, request: pytest.FixtureRequest
) -> None:
    normalization = Normalization(size, "bicubic", *IMAGENET)
    images, sample = noise(8, 16, 20), torch.arange(8) + 50_000
    module = Preprocessing(normalization, augmentation, 0, memory_format)
    partners = module.partners(sample, 8)
    arguments = (images, sample, images[partners % 8], partners)
    expected, expected_tests = module(*arguments), module(images)
    request.getfixturevalue("other_device")

    for found, values in ((module(*arguments), expected), (module(images), expected_tests)):
        assert torch.equal(found, values)
        assert found.stride() == values.stride()


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["cpu", "other device"])
def test_values_of_a_smaller_type_are_those_that_autocast_rounds_to(
    where: str, dtype: torch.dtype, memory_format: Any, request: pytest.FixtureRequest
) -> None:
    normalization = Normalization(16, "bilinear", *IMAGENET)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    expected = Preprocessing(normalization, [], 0)(images).to(dtype)
    if where != "cpu":
        request.getfixturevalue("other_device")

    found = Preprocessing(normalization, [], 0, memory_format, dtype)(images)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


class Sizes(TorchDispatchMode):
    """Keeps how many elements the largest tensor of each operation has that it reads or writes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [v.numel() for v in tree_leaves((args, kwargs, result)) if isinstance(v, Tensor)]
        if not func.is_view and func is not torch.ops.aten.empty_like.default:
            self.elements.append(max(found))
        return result


@layouts
@pytest.mark.parametrize(("count", "side"), [(4096, 32), (256, 224)])
def test_no_operation_on_a_large_batch_needs_64_bits_to_count_elements(
    count: int, side: int, memory_format: Any
) -> None:
    images = torch.empty(count, 3, side, side, dtype=torch.uint8, device="meta")
    sample = torch.empty(count, dtype=torch.int64, device="meta")
    module = Preprocessing(Normalization(224, "bicubic", *IMAGENET), ALL, 0, memory_format)

    with Sizes() as sizes:
        values = module.to("meta")(images, sample, images, sample)
    assert values.numel() <= max(sizes.elements) < 2**31


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@interpolations
def test_values_of_the_result_are_gone_through_five_times(
    interpolation: str, dtype: torch.dtype, memory_format: Any
) -> None:
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    module = Preprocessing(
        Normalization(224, interpolation, *IMAGENET), [], 0, memory_format, dtype
    )

    with Sizes() as sizes:
        values = module.to("meta")(images)
    # A product, a clamp, to uint8, less the mean, times the scale; torchvision's take 6 to 9.
    assert sizes.elements.count(values.numel()) == 5
