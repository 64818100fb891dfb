"""Float16 with its loss scale, as on a GPU: what overflows is not taken for a fault."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from hfbench.errors import Interrupted
from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import change
from hfbench.results.schema import find_runs
from hfbench.studies.doctor.examine import examine
from hfbench.studies.emulation import float16_on_cpu
from hfbench.studies.windows import Bench
from hfbench.training.loss_scale import LossScale, say_skipped
from hfbench.training.run import run_recipe
from tests.builders import TIMM, TIMM_VIT, tiny_recipe, vit_config, write_model
from tests.training.test_run import interrupt_after


@pytest.fixture
def emulate() -> Iterator[Callable[..., list[torch.amp.GradScaler]]]:
    """Return a function that lets float16 train on this CPU; it may be given a first scale."""
    with ExitStack() as stack:
        yield lambda *scale: stack.enter_context(float16_on_cpu(*scale))


Emulate = Callable[..., list[torch.amp.GradScaler]]


def recipe_of(model: str, folder: Path, **training_args: object) -> Recipe:
    """Return a recipe in float16."""
    name = write_model(folder / "vit", vit_config()) if model == "vit" else model
    arguments = {"fp16": True, "use_cpu": False} | training_args
    return tiny_recipe(name, pretrained=model == "vit", **arguments)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("model", ["vit", TIMM, TIMM_VIT])
def test_doctor_examines_and_finds_accumulation_right(
    model: str, optim: str, emulate: Emulate, tmp_path: Path
) -> None:
    emulate()
    recipe = recipe_of(model, tmp_path, optim=optim, gradient_accumulation_steps=2)
    found = examine(recipe, seconds=2)
    assert found.precision == "fp16"
    assert found.accumulation is not None
    assert found.accumulation.passed, found.accumulation.sentence
    assert found.step.optimizer_seconds > 0


def test_wrong_accumulation_is_found_in_float16_too(
    emulate: Emulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    emulate()

    def summed(label_smoothing: float) -> object:
        def loss(outputs: dict[str, torch.Tensor], labels: torch.Tensor, **_: object) -> object:
            return torch.nn.functional.cross_entropy(outputs["logits"].float(), labels)

        return loss

    monkeypatch.setattr("hfbench.training.trainer.cross_entropy_loss", summed)
    found = examine(recipe_of("vit", tmp_path, gradient_accumulation_steps=2), seconds=2)
    assert found.accumulation is not None
    assert not found.accumulation.passed


def test_skipped_steps_are_counted_and_logged(
    emulate: Emulate,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("hfbench"), "propagate", True)
    made = emulate(2.0**40)  # nothing but 0 stays finite
    for optim in ("adamw_torch", "adamw_torch_fused"):
        result = run_recipe(recipe_of("vit", tmp_path, optim=optim), tmp_path / optim)
        scaler = made[-1]
        halvings = 40 - int(np.log2(scaler.get_scale()))
        assert result.training.skipped_steps == halvings > 1
        assert result.training.loss_scale == scaler.get_scale()
        (run,) = find_runs(tmp_path / optim)
        lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        path = [line["loss_scale"] for line in lines if "loss_scale" in line]
        assert path[0] == 2.0**39
        assert path == sorted(path, reverse=True)
        assert "optimizer steps" in caplog.text
        caplog.clear()


def test_skipped_steps_of_all_sessions_are_counted(
    emulate: Emulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    emulate(2.0**40)
    recipe = recipe_of("vit", tmp_path, save_strategy="steps", save_steps=4)
    whole = run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path / "stopped")
    resumed = run_recipe(recipe, tmp_path / "stopped", resume=True)
    assert resumed.training.sessions == 2
    assert resumed.training.skipped_steps == whole.training.skipped_steps
    assert resumed.training.loss_scale == whole.training.loss_scale
    assert resumed.predictions_sha256 == whole.predictions_sha256


def test_window_begins_when_the_scale_has_settled(emulate: Emulate, tmp_path: Path) -> None:
    emulate(2.0**24)
    recipe = recipe_of("vit", tmp_path)
    bench = Bench(recipe)
    window = bench.measure_window(3, 2)
    assert window.warmup_steps > 3
    assert window.steps == 3
    plain = bench.measure_window(3, 2, change(recipe, [("training_args.fp16", False)]))
    assert plain.warmup_steps == 2


def test_run_without_a_scaler_says_nothing(tmp_path: Path) -> None:
    training = run_recipe(tiny_recipe(TIMM), tmp_path).training
    assert training.skipped_steps is None
    assert training.loss_scale is None


@pytest.mark.parametrize("fused", [False, True])
def test_each_overflow_counts_once(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    watch = LossScale(scaler)
    for value in (1.0, float("inf"), 1.0, float("nan"), float("inf")):
        scaler.scale(weight.sum() * value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert watch.skipped_steps == 3
    assert watch.scale == 1.0
    watch.start_at(4.0)
    assert watch.scale == 4.0


def test_few_skipped_steps_are_not_worth_a_word() -> None:
    assert say_skipped(None, 10) is None
    assert say_skipped(1, 100) is None
    assert "2 of 100 optimizer steps (2 %)" in str(say_skipped(2, 100))
