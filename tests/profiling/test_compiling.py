"""Whether a model is compiled: one answer, whatever flag, mode and backend say together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import is_compiled, not_compiled
from hfbench.studies.ablation.measure import ablate, warmup_steps_of
from hfbench.studies.ablation.plan import Plan, plan_ablation
from hfbench.studies.accumulation import check_accumulation
from hfbench.studies.doctor.examine import examine
from hfbench.studies.tune.windows import _small
from hfbench.studies.uses import find_uses
from hfbench.studies.windows import Bench, with_arguments
from hfbench.training.run import run_recipe
from hfbench.training.trainer import BenchTrainer, build_training_arguments
from tests.builders import tiny_recipe

COMPILED: list[dict[str, Any]] = [
    {"torch_compile": True},
    {"torch_compile_mode": "default"},
    {"torch_compile_backend": "eager"},
    {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
]
NOT_COMPILED: list[dict[str, Any]] = [
    {},
    {"torch_compile": False},
    {"torch_compile": False, "torch_compile_mode": "default"},
    {"torch_compile": False, "torch_compile_backend": "inductor"},
]


def names_compile(recipe: Recipe) -> bool:
    return any(use.name == "torch.compile" for use in find_uses(recipe))


@pytest.mark.parametrize("arguments", COMPILED)
def test_mode_or_backend_alone_compiles(arguments: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(**arguments)
    assert is_compiled(recipe)
    assert names_compile(recipe)
    assert warmup_steps_of(recipe) > warmup_steps_of(tiny_recipe())
    assert build_training_arguments(recipe, tmp_path).torch_compile


@pytest.mark.parametrize("arguments", NOT_COMPILED)
def test_false_does_not_compile(arguments: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(**arguments)
    assert not is_compiled(recipe)
    assert not names_compile(recipe)
    assert warmup_steps_of(recipe) == warmup_steps_of(tiny_recipe())
    assert not build_training_arguments(recipe, tmp_path).torch_compile


@pytest.mark.parametrize("arguments", [*COMPILED, *NOT_COMPILED])
def test_turning_off_turns_off(arguments: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(**arguments)
    for off in (with_arguments(recipe, **not_compiled(recipe)), _small(recipe, 2)):
        assert not is_compiled(off)
        args = build_training_arguments(off, tmp_path)
        assert (args.torch_compile, args.torch_compile_mode) == (False, None)


def test_what_false_makes_idle_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = tiny_recipe(torch_compile=False, torch_compile_mode="default")
    build_training_arguments(recipe, tmp_path)
    said = "torch_compile is false, so that torch_compile_mode=default does nothing."
    assert said in caplog.text


def test_run_with_false_and_a_backend_is_not_compiled(tmp_path: Path) -> None:
    recipe = tiny_recipe(torch_compile=False, torch_compile_backend="eager", max_steps=1)
    switch = run_recipe(recipe, tmp_path).switches["torch_compile"]
    assert (switch.requested, switch.applied) == (False, False)


def test_accumulation_check_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr(
        "hfbench.studies.accumulation.build_training_arguments",
        lambda recipe, folder: (seen.append(recipe), build_training_arguments(recipe, folder))[1],
    )
    recipe = tiny_recipe(torch_compile_backend="eager")
    check_accumulation(Bench(recipe), 2, 2, "fp32", tmp_path)
    assert seen
    assert not any(is_compiled(recipe) for recipe in seen)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"torch_compile": True}, {"torch_compile_mode": "default"}])
def test_run_really_compiles(arguments: dict[str, Any], tmp_path: Path) -> None:
    result = run_recipe(tiny_recipe(max_steps=2, **arguments), tmp_path)
    switch = result.switches["torch_compile"]
    assert (switch.requested, switch.applied) == (True, True)
    plain = run_recipe(tiny_recipe(max_steps=2), tmp_path)
    assert plain.switches["torch_compile"].applied is False
    assert result.training.train_loss == pytest.approx(plain.training.train_loss, rel=1e-4)


@pytest.mark.slow
def test_ablation_really_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_few(recipe: Recipe) -> Plan:
        plan = plan_ablation(recipe)
        kept = [c for c in plan.configurations if c.name in ("none", "torch-compile", "all")]
        return replace(plan, configurations=kept, attributions=[])

    monkeypatch.setattr("hfbench.studies.ablation.measure.plan_ablation", plan_few)
    # Dynamo alone: Inductor would compile anew for each window.
    recipe = tiny_recipe(torch_compile_backend="eager")
    windows = ablate(recipe, tmp_path, steps=1, rounds=2).windows
    applied = {
        item.configuration: bool(item.window.switches["torch_compile"].applied) for item in windows
    }
    assert applied == {"none": False, "torch-compile": True, "all": True}


@pytest.mark.slow
def test_doctor_really_compiles() -> None:
    advice = examine(tiny_recipe(torch_compile_backend="eager"), 0.1).advice
    (said,) = [item for item in advice if item.technique == "torch.compile"]
    assert said.in_recipe
    assert said.sentence.startswith("It is on")


SLOW_SECONDS = 3.0  # of each compilation; all steps together take a tenth of it


@pytest.fixture
def slow_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the name of a backend that takes its time, and changes nothing."""

    def slow(graph: Any, inputs: Any, **_: Any) -> Any:
        time.sleep(SLOW_SECONDS)
        return graph.forward

    torch._dynamo.lookup_backend("eager")  # loads it
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "eager", slow)
    yield "eager"
    torch.compiler.reset()


def test_compiling_in_the_midst_of_training_is_no_steady_state(
    slow_backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The last of the ten batches of an epoch has three images instead of five.
    recipe = tiny_recipe(
        torch_compile_backend=slow_backend, per_device_train_batch_size=5, eval_strategy="epoch"
    )
    result = run_recipe(recipe, tmp_path)
    times, throughput = result.times, result.throughput
    compilations = result.training.compilations
    assert compilations is not None
    assert times.compile_seconds is not None
    assert compilations > 1
    assert times.compile_seconds >= compilations * SLOW_SECONDS
    assert times.execution_seconds > times.compile_seconds
    assert 0 < throughput.measured_seconds < SLOW_SECONDS
    assert "more after warm-up" in caplog.text
    plain = run_recipe(tiny_recipe(max_steps=1), tmp_path)
    assert (plain.training.compilations, plain.times.compile_seconds) == (0, 0.0)


def test_window_leaves_compiling_out(slow_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(torch_compile_backend=slow_backend)
    step = BenchTrainer.training_step

    def other_shape(self: BenchTrainer, model: Any, inputs: Any, *args: Any) -> Any:
        if self.state.global_step == 4:
            inputs = {name: value[:3] for name, value in inputs.items()}
        return step(self, model, inputs, *args)

    monkeypatch.setattr(BenchTrainer, "training_step", other_shape)
    window = Bench(recipe).measure_window(4, 2)
    assert window.seconds < SLOW_SECONDS
