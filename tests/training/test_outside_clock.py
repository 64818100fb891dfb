"""What a run says of its time against a clock outside of it, a resume and a pause included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import hfbench.training.recording
import hfbench.training.run
from hfbench.errors import Interrupted
from hfbench.models.loading import save_model
from hfbench.profiling.flops import describe_compute
from hfbench.recipe.schema import Recipe
from hfbench.results.schema import Result, Times, load_results
from hfbench.training.inputs import load_inputs
from hfbench.training.run import run_recipe
from hfbench.training.trainer import BenchTrainer
from tests.builders import tiny_recipe

SLACK = 0.1  # seconds: what is written after the result was put together
PARTS = ("setup", "execution", "final_evaluation", "final_save", "analysis", "paused", "keeping")


def parts(times: Times) -> float:
    return sum(float(getattr(times, f"{name}_seconds")) for name in PARTS)


def slow_down(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, seconds: float) -> None:
    """Let a function take longer, so that what forgets it is found out."""
    original = getattr(place, name)

    def slower(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, slower)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every part take a while."""
    slow_down(monkeypatch, hfbench.training.run, load_inputs.__name__, 0.6)
    slow_down(monkeypatch, hfbench.training.run, save_model.__name__, 0.7)
    slow_down(monkeypatch, hfbench.training.recording, describe_compute.__name__, 0.8)
    slow_down(monkeypatch, BenchTrainer, "_save_clock", 0.3)
    slow_down(monkeypatch, BenchTrainer, "training_step", 0.1)
    slow_down(monkeypatch, BenchTrainer, "evaluation_loop", 0.5)


def measured_run(recipe: Recipe, root: Path, **options: Any) -> tuple[Result, float]:
    start = time.perf_counter()
    result = run_recipe(recipe, root, **options)
    return result, time.perf_counter() - start


@pytest.mark.usefixtures("slow")
def test_parts_add_up_to_what_an_outside_clock_sees(tmp_path: Path) -> None:
    recipe = tiny_recipe(eval_strategy="epoch", save_strategy="epoch")
    result, outside = measured_run(recipe, tmp_path)
    times = result.times
    assert times.total_seconds == pytest.approx(parts(times))
    assert times.total_seconds == pytest.approx(outside, rel=0.01, abs=SLACK)
    assert times.analysis_seconds >= 0.8
    assert times.final_save_seconds >= 0.7
    assert times.save_seconds >= 2 * 0.3  # the recipe's two checkpoints
    assert times.keeping_seconds >= 0.3  # and our own after the last step
    assert times.train_seconds >= 12 * 0.1
    assert times.train_seconds == pytest.approx(
        times.execution_seconds - times.evaluation_seconds - times.save_seconds
    )


class StopAt(TrainerCallback):
    """Press Ctrl-C in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("slow")
def test_parts_of_two_sessions_add_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(eval_strategy="epoch", save_strategy="epoch")
    original = hfbench.training.run.assemble

    def assemble(*args: Any) -> BenchTrainer:
        trainer = original(*args)
        trainer.add_callback(StopAt(4))
        return trainer

    start = time.perf_counter()
    with monkeypatch.context() as patch:
        patch.setattr(hfbench.training.run, "assemble", assemble)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path)
    first = time.perf_counter() - start
    result, second = measured_run(recipe, tmp_path, resume=True)
    assert result.training.sessions == 2
    # After the last writing of the clock, which cannot count itself.
    assert result.times.total_seconds == pytest.approx(first + second, rel=0.01, abs=2 * SLACK)


PROGRAM = """
import sys, time
from hfbench.training.run import run_recipe
from tests.builders import tiny_recipe
from hfbench.training.trainer import BenchTrainer
original = BenchTrainer.training_step
def slower(self, *args, **kwargs):
    time.sleep(0.02)
    print("step", flush=True)
    return original(self, *args, **kwargs)
BenchTrainer.training_step = slower
start = time.perf_counter()
run_recipe(tiny_recipe(max_steps=100), sys.argv[1])
print("outside", time.perf_counter() - start, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals that stop are POSIX's")
def test_stopped_run_is_no_slower_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    stopped_for = 6.0
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        for _ in range(40):
            next(line for line in lines if line == "step\n")
        process.send_signal(signal.SIGSTOP)
        time.sleep(stopped_for)
        process.send_signal(signal.SIGCONT)
        said, errors = process.communicate()
    assert "stood still for" in errors
    outside = float(said.rpartition("outside ")[2])
    (result,) = load_results(tmp_path / "tiny")
    assert result.times.paused_seconds == pytest.approx(stopped_for, abs=0.5)
    assert result.times.total_seconds == pytest.approx(outside, rel=0.01, abs=SLACK)
    assert result.throughput.measured_seconds < outside - stopped_for
    assert result.budget is not None
    in_phases = sum(result.budget.model_dump().values())
    assert in_phases == pytest.approx(result.times.execution_seconds, rel=0.02)
