"""The first loss is checked against a plain loop: right models pass, wrong losses are flagged."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import EfficientNetConfig

from hfbench.recipe.schema import ModelSection, Recipe
from hfbench.recipe.techniques import change
from hfbench.studies.first_loss import check_first_loss, plain_first_loss
from hfbench.studies.windows import Bench, with_arguments
from hfbench.training import trainer as training
from tests.builders import TIMM, TIMM_VIT, tiny_recipe, vit_config, write_model

SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Leave imports out of garbage collections, of which there are two a window, 0.4 s each."""
    gc.freeze()
    yield
    gc.unfreeze()


def effnet(folder: Path) -> Path:
    """Write a small EfficientNet that drops much."""
    config = EfficientNetConfig(
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
        image_size=32,
        dropout_rate=0.5,
        drop_connect_rate=0.5,
        num_labels=10,
    )
    return write_model(folder, config)


@pytest.mark.parametrize("kind", ["timm with batch norm", "timm vit", "vit", "efficientnet"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_right_models_are_not_flagged(kind: str, precision: str, tmp_path: Path) -> None:
    models: dict[str, Any] = {"timm with batch norm": TIMM, "timm vit": TIMM_VIT}
    if kind == "vit":
        config = vit_config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
        models[kind] = write_model(tmp_path, config)
    elif kind == "efficientnet":
        models[kind] = effnet(tmp_path)
    bench = Bench(tiny_recipe(models[kind]))
    recipe = with_arguments(bench.recipe, bf16=precision == "bf16", **SPLIT)
    found = check_first_loss(bench, recipe, precision)
    assert found.problem is None
    assert not found.flagged
    assert found.found == pytest.approx(found.expected, rel=found.tolerance)
    if precision == "fp32":
        assert found.tolerance == 1e-5
        assert found.found == pytest.approx(found.expected, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("timm with batch norm", "memory_format", "channels_last"),
        ("vit", "attn_implementation", "sdpa"),
        ("vit", "attn_implementation", "eager"),
    ],
)
def test_way_of_computing_leaves_the_first_loss(
    kind: str, setting: str, value: str, precision: str, tmp_path: Path
) -> None:
    model = TIMM if kind != "vit" else write_model(tmp_path, vit_config())
    bench = Bench(tiny_recipe(model, bf16=precision == "bf16"))
    recipe = change(bench.recipe, [(f"model.{setting}", value)])
    found = check_first_loss(bench, recipe, precision)
    assert found.problem is None
    assert found.found == pytest.approx(found.expected, rel=found.tolerance)
    assert bench.measure_window(1, 1, recipe).switches[setting].applied == value


def test_way_of_computing_that_computes_something_else_is_flagged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(model: nn.Module, section: ModelSection) -> None:
        if section.memory_format == "channels_last":  # as if a kernel took filters mirrored
            first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
            first.weight.data = first.weight.data.flip(-1)

    monkeypatch.setattr("hfbench.training.inputs.set_implementation", wrong)
    bench = Bench(tiny_recipe())
    recipe = change(bench.recipe, [("model.memory_format", "channels_last")])
    assert check_first_loss(bench, recipe, "fp32").flagged
    assert not check_first_loss(bench, bench.recipe, "fp32").flagged


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Return a bench of a tiny model with batch norm."""
    return Bench(tiny_recipe())


def test_plain_loss_is_the_mean_of_micro_batches_as_batch_norm_sees_them(bench: Bench) -> None:
    split = plain_first_loss(bench, with_arguments(bench.recipe, **SPLIT))
    whole = plain_first_loss(bench, bench.recipe)
    assert abs(split - whole) > 1e-2  # the same images in batches of 4 and of 8
    bench_without = Bench(tiny_recipe(TIMM_VIT))
    split = plain_first_loss(bench_without, with_arguments(bench_without.recipe, **SPLIT))
    assert split == pytest.approx(plain_first_loss(bench_without, bench_without.recipe), rel=1e-6)


def test_label_smoothing_is_part_of_what_the_loss_should_be(bench: Bench) -> None:
    recipe = with_arguments(bench.recipe, label_smoothing_factor=0.3, **SPLIT)
    assert check_first_loss(bench, recipe, "fp32").problem is None
    assert abs(plain_first_loss(bench, recipe) - plain_first_loss(bench, bench.recipe)) > 1e-3


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("bf16", [False, True])
def test_loss_that_is_not_divided_by_the_accumulation_is_flagged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, steps: int, bf16: bool
) -> None:
    """What classifiers do that drop `num_items_in_batch`: transformers issue 47688."""

    def mean_of_each_micro_batch(smoothing: float) -> Any:
        return lambda outputs, labels, num_items_in_batch=None: nn.functional.cross_entropy(
            outputs["logits"].float(), labels
        )

    monkeypatch.setattr(training, "cross_entropy_loss", mean_of_each_micro_batch)
    recipe = with_arguments(bench.recipe, gradient_accumulation_steps=steps, bf16=bf16)
    found = check_first_loss(bench, recipe, "bf16" if bf16 else "fp32")
    assert found.flagged
    assert found.expected == pytest.approx(plain_first_loss(bench, recipe))
    assert found.found == pytest.approx(steps * found.expected, rel=0.02)
    assert found.problem is not None
    assert f"{steps} times too high" in found.problem
    assert "47688" in found.problem
    # Without accumulation nothing is wrong.
    assert not check_first_loss(bench, bench.recipe, "fp32").flagged


def test_wrong_preprocessing_is_flagged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = training.BenchTrainer._prepare_inputs

    def twice(self: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = before(self, inputs)
        return prepared | {"pixel_values": 1.1 * prepared["pixel_values"]}

    monkeypatch.setattr(training.BenchTrainer, "_prepare_inputs", twice)
    bench_vit = Bench(tiny_recipe(TIMM_VIT))  # batch norm would not see a factor
    found = check_first_loss(bench_vit, bench_vit.recipe, "fp32")
    assert found.flagged
    assert found.problem is not None
    assert "more than rounding explains" in found.problem


@pytest.mark.parametrize(("off", "flagged"), [(0.07, False), (0.09, True)])
def test_loss_may_be_eight_times_as_far_off_as_random_rounding(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, off: float, flagged: bool
) -> None:
    monkeypatch.setattr(
        "hfbench.studies.first_loss.plain_first_loss",
        lambda bench, recipe, seed, roundoff=0.0: 3.0 + (0.01 * (-1) ** seed if roundoff else 0.0),
    )
    monkeypatch.setattr(bench, "measure_first_loss", lambda recipe: 3.0 + off)
    found = check_first_loss(bench, bench.recipe, "bf16")
    assert found.tolerance == pytest.approx(8 * 0.01 / 3)
    assert found.flagged is flagged


def test_loss_that_is_not_finite_is_flagged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        training,
        "cross_entropy_loss",
        lambda smoothing: (
            lambda outputs, labels, num_items_in_batch=None: outputs["logits"].sum() * torch.inf
        ),
    )
    found = check_first_loss(bench, bench.recipe, "fp32")
    assert (found.flagged, found.found) == (True, None)
    assert found.problem is not None
    assert "not finite" in found.problem


def test_model_with_randomness_of_its_own_is_not_checked_and_says_so() -> None:
    class Noisy(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images + torch.randn_like(images)

    bench = Bench(tiny_recipe())
    first = bench.inputs.model.timm_model.conv1
    bench.inputs.model.timm_model.conv1 = nn.Sequential(Noisy(), first)
    found = check_first_loss(bench, bench.recipe, "fp32")
    assert (found.expected, found.tolerance, found.flagged) == (None, None, False)
    assert found.problem is not None
    assert "draws random numbers" in found.problem


def test_check_leaves_switches_of_the_machine_as_they_were(bench: Bench) -> None:
    recipe: Recipe = bench.recipe
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    plain_first_loss(bench, recipe)
    assert [backend.fp32_precision for backend in backends] == before
