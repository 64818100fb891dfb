"""FLOPs by hand and against published tables; what a run achieved against what is possible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig

import hfbench.profiling.flops
from hfbench.models.loading import load_model, open_model
from hfbench.profiling.flops import count_flops, describe_compute, measure_matmul_peak
from tests.builders import TIMM, tiny_recipe, vit_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LINEAR = 2 * 48 * 10  # one image of 3 x 4 x 4 into ten classes


def linear() -> nn.Sequential:
    """Return a classifier of one layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10))


class FakeTime:
    """Stand in for the `time` module: each look at the clock takes `step` seconds."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def perf_counter(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every device reach 96 kFLOP/s."""
    monkeypatch.setattr(
        hfbench.profiling.flops, "measure_matmul_peak", lambda dtype, device: 96_000.0
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.fixture
def tf32() -> Iterator[Any]:
    """Return a function that switches TF32; put the switches back afterwards."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]

    def switch(*modes: str) -> None:
        for backend, mode in zip(backends, modes, strict=True):
            backend.fp32_precision = mode

    yield switch
    switch(*before)


# By hand, on images of 3 x 4 x 4


def test_linear_layers() -> None:
    assert count_flops(linear(), 4) == (LINEAR, 2 * LINEAR)  # images need no gradient
    # Backward: both weights, and the second layer's input.
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.Linear(10, 5))
    assert count_flops(model, 4) == (LINEAR + 100, 2 * (LINEAR + 100) + 100)


def test_convolution() -> None:
    forward = 2 * 16 * (3 * 3) * 3 * 6  # pixels, kernel, channels in and out
    assert count_flops(nn.Conv2d(3, 6, 3, padding=1), 4) == (forward, 2 * forward)
    strided = 2 * 4 * (3 * 3) * 3 * 6
    assert count_flops(nn.Conv2d(3, 6, 3, 2, padding=1), 4) == (strided, 2 * strided)


def test_transposed_convolution() -> None:
    forward = 2 * 16 * (2 * 2) * 3 * 6  # here each pixel of the input meets the kernel
    assert count_flops(nn.ConvTranspose2d(3, 6, 2, stride=2), 4) == (forward, 2 * forward)


def test_depthwise_convolution_is_counted_by_its_groups_in_both_directions() -> None:
    pointwise, depthwise = 2 * 16 * 3 * 3, 2 * 16 * (3 * 3) * 3
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3))
    forward = pointwise + depthwise
    assert count_flops(model, 4) == (forward, forward + pointwise + 2 * depthwise)


def test_frozen_layers_are_left_out_of_the_backward_pass() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.Linear(10, 5))
    model[1].requires_grad_(False)
    assert count_flops(model, 4) == (LINEAR + 100, LINEAR + 100 + 100)


def test_attention_is_counted_whichever_kernel_runs() -> None:
    counts = []
    for kernel in ("eager", "sdpa"):
        model = AutoModelForImageClassification.from_config(
            vit_config(), attn_implementation=kernel
        )
        counts.append(count_flops(model, 32))
    # 17 tokens of 32; scores and their product with the values, two layers.
    patches = 2 * 16 * (8 * 8 * 3) * 32
    layer = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 2 * 17 * 17 * 32
    assert counts[0] == counts[1]
    assert counts[0][0] == patches + 2 * layer + 2 * 32 * 10


# Against published multiply-adds, in billions, of 1000 classes at 224 pixels: torchvision's tables
# of weights, and Tan and Le, EfficientNet, 2019, table 2.


@pytest.mark.parametrize(
    ("name", "published"), [("resnet50", 4.09), ("efficientnet_b0", 0.39), ("vit_b_16", 17.56)]
)
def test_models_are_counted_as_published(name: str, published: float) -> None:
    with CPU if name != "vit_b_16" else torch.device("meta"):
        model = (
            AutoModelForImageClassification.from_config(ViTConfig(num_labels=1000))
            if name == "vit_b_16"
            else timm.create_model(name)
        )
    forward, train = count_flops(model, 224)
    assert forward / 2e9 == pytest.approx(published, rel=0.02)
    assert train / forward == pytest.approx(3, rel=0.02)  # but for the first layer's input


# What counting must not do


def test_counting_leaves_the_model_as_it_is() -> None:
    model = AutoModelForImageClassification.from_config(vit_config()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls: list[nn.Module] = []
    model.classifier.register_forward_hook(lambda module, *_: calls.append(module))
    count_flops(model, 32)

    assert calls == []
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_recomputed_activations_are_not_counted_twice() -> None:
    model = AutoModelForImageClassification.from_config(vit_config())
    plain = count_flops(model, 32)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert count_flops(model, 32) == plain


def test_model_that_accelerate_wrapped_is_counted_as_its_class() -> None:
    model = AutoModelForImageClassification.from_config(vit_config())
    plain = count_flops(model, 32)
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)  # holds the real weights
    assert count_flops(model, 32) == plain


def test_timm_model_is_counted_through_its_wrapper() -> None:
    recipe = tiny_recipe()
    wrapped, _ = load_model(recipe, open_model(recipe), [str(number) for number in range(10)])
    bare = timm.create_model(TIMM.removeprefix("timm/"), num_classes=10)
    assert count_flops(wrapped, 32) == count_flops(bare, 32)


# The peak


def test_peak_is_the_work_of_a_product_over_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hfbench.profiling.flops, "time", FakeTime(0.008))
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: None)
    peak = measure_matmul_peak(torch.float64, CPU)  # a type that no run has: it is kept
    assert peak == pytest.approx(2 * 512**3 / 0.008)


def test_short_products_are_made_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hfbench.profiling.flops, "time", FakeTime(0.001))
    sizes: list[int] = []
    monkeypatch.setattr(torch, "mm", lambda factor, *_, **__: sizes.append(len(factor)))
    peak = measure_matmul_peak(torch.complex64, CPU)
    assert peak == pytest.approx(2 * 4096**3 / 0.001)
    assert sorted(set(sizes)) == [512, 1024, 2048, 4096]


def test_peak_is_measured_once() -> None:
    first = measure_matmul_peak(torch.float32, CPU)
    assert 1e8 < first < 1e15
    assert measure_matmul_peak(torch.float32, CPU) == first


# A run


@pytest.mark.usefixtures("peak")
def test_utilization_is_achieved_over_the_peak_of_all_devices() -> None:
    compute = describe_compute(linear(), 4, torch.bfloat16, CPU, 50.0, world_size=2)
    assert compute.dtype == "bf16"
    assert compute.forward_flops_per_image == 960
    assert compute.train_flops_per_image == 1920
    assert compute.achieved_flops_per_second == 50 * 1920
    assert compute.peak_flops_per_second == 96_000
    assert compute.utilization == 0.5
    assert compute.note is None


@pytest.mark.usefixtures("peak")
def test_short_run_has_no_utilization() -> None:
    compute = describe_compute(linear(), 4, torch.float32, CPU, None, 1)
    assert (compute.achieved_flops_per_second, compute.utilization) == (None, None)
    assert compute.train_flops_per_image == 1920
    assert "too short to have a steady state" in str(compute.note)


@pytest.mark.usefixtures("peak")
def test_model_that_cannot_be_counted_is_unknown_not_a_failure() -> None:
    class DependsOnValues(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images if images.sum().item() > 0 else -images

    compute = describe_compute(DependsOnValues(), 4, torch.float32, CPU, 50.0, 1)
    assert compute.train_flops_per_image is None
    assert compute.utilization is None
    assert "FLOPs unknown: torch cannot count them" in str(compute.note)


def test_peak_that_cannot_be_measured_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dtype: torch.dtype, device: torch.device) -> float:
        raise torch.OutOfMemoryError("out of memory\nmore")

    monkeypatch.setattr(hfbench.profiling.flops, "measure_matmul_peak", fail)
    compute = describe_compute(linear(), 4, torch.float32, CPU, 50.0, 1)
    assert (compute.peak_flops_per_second, compute.utilization) == (None, None)
    assert compute.note == "peak unknown: its measurement failed (out of memory)"


@pytest.mark.usefixtures("peak")
@pytest.mark.parametrize("modes", [("ieee", "tf32"), ("tf32", "ieee")])
def test_tf32_of_one_kind_alone_has_no_peak(modes: tuple[str, str], tf32: Any) -> None:
    tf32(*modes)
    compute = describe_compute(linear(), 4, torch.float32, CUDA, 50.0, 1)
    assert compute.dtype == "fp32"
    assert (compute.peak_flops_per_second, compute.utilization) == (None, None)
    assert "TF32 is on for convolutions or matrix products alone" in str(compute.note)
    assert describe_compute(linear(), 4, torch.bfloat16, CUDA, 50.0, 1).utilization == 1.0


@pytest.mark.usefixtures("peak")
@pytest.mark.parametrize(("mode", "name"), [("ieee", "fp32"), ("tf32", "tf32")])
def test_tf32_is_a_type_of_its_own(mode: str, name: str, tf32: Any) -> None:
    tf32(mode, mode)
    compute = describe_compute(linear(), 4, torch.float32, CUDA, 50.0, 1)
    assert (compute.dtype, compute.utilization) == (name, 1.0)
    assert describe_compute(linear(), 4, torch.float32, CPU, 50.0, 1).dtype == "fp32"


@pytest.mark.usefixtures("peak")
def test_gpu_without_tf32_computes_in_float32_whatever_the_switches_say(
    tf32: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    tf32("tf32", "tf32")
    assert describe_compute(linear(), 4, torch.float32, CUDA, 50.0, 1).dtype == "fp32"
