"""A CPU without units for bfloat16: it is measured, said, and the quickstart takes float32."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hfbench.machine.precision
from hfbench.comparison.comparison import compare
from hfbench.machine.precision import measure_bfloat16_slowdown, say_slow_precision
from hfbench.recipe.schema import Recipe, load_recipe
from hfbench.recipe.techniques import change
from hfbench.studies.ablation.plan import plan_ablation
from hfbench.studies.tune import offers as tune_plan
from hfbench.training.run import run_recipe
from tests.builders import tiny_recipe

BF16 = "training_args.bf16"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this machine a CPU that emulates bfloat16."""
    monkeypatch.setattr(hfbench.machine.precision, "measure_bfloat16_slowdown", lambda: 16.3)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this machine a CPU with units for bfloat16."""
    monkeypatch.setattr(hfbench.machine.precision, "measure_bfloat16_slowdown", lambda: 0.4)


def taking_what_is_faster(recipe: Recipe) -> Recipe:
    return change(recipe, [("model.float32_if_faster", True)])


@pytest.mark.usefixtures("slow")
def test_slow_precision_is_said_with_what_to_do() -> None:
    said = say_slow_precision(tiny_recipe(bf16=True))
    assert said is not None
    assert said.startswith("tiny: bfloat16 is 16× slower than float32 on this CPU")
    assert "training_args.bf16=false" in said
    assert "model.float32_if_faster=true" in said
    assert "trains in float32 here" in str(say_slow_precision(load_recipe("quickstart_tuned")))
    assert say_slow_precision(load_recipe("quickstart_untuned")) is None


@pytest.mark.usefixtures("fast")
def test_fast_precision_is_no_word_worth() -> None:
    assert say_slow_precision(tiny_recipe(bf16=True)) is None
    assert say_slow_precision(load_recipe("quickstart_tuned")) is None


def test_an_accelerator_is_not_judged_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> float:
        raise AssertionError

    monkeypatch.setattr(hfbench.machine.precision, "measure_bfloat16_slowdown", fail)
    monkeypatch.setattr(hfbench.machine.precision, "accelerator_type", lambda: "cuda")
    assert say_slow_precision(tiny_recipe(bf16=True, use_cpu=False)) is None
    assert say_slow_precision(tiny_recipe()) is None


def test_measuring_is_short_and_leaves_no_trace() -> None:
    measure_bfloat16_slowdown.cache_clear()
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.inference_mode():  # as a host may have left it
        slowdown = measure_bfloat16_slowdown()
    assert 0.01 < slowdown < 1000
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("slow")
def test_run_takes_float32_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = taking_what_is_faster(tiny_recipe(bf16=True))
    with caplog.at_level(logging.WARNING, "hfbench"):
        tuned = run_recipe(recipe, tmp_path)
    precision = tuned.switches["precision"]
    assert (precision.requested, precision.applied) == ("bf16", "fp32")
    assert precision.reason == "bfloat16 is 16× slower than float32 on this CPU"
    assert "trains in float32 here" in caplog.text
    assert tuned.compute is not None
    assert tuned.compute.dtype == "fp32"

    plain = change(recipe, [(BF16, False)]).model_copy(update={"name": "plain"})
    untuned = run_recipe(plain, tmp_path)
    assert "the gain is mixed precision" not in compare([untuned], [tuned]).sentence
    assert untuned.metrics == tuned.metrics  # it is the same training


@pytest.mark.usefixtures("slow")
def test_a_recipe_that_insists_trains_in_bfloat16_and_the_result_says_what_it_costs(
    tmp_path: Path,
) -> None:
    precision = run_recipe(tiny_recipe(bf16=True, max_steps=1), tmp_path).switches["precision"]
    assert (precision.requested, precision.applied) == ("bf16", "bf16")
    assert precision.reason == "bfloat16 is 16× slower than float32 on this CPU"


@pytest.mark.usefixtures("slow")
def test_ablation_does_not_measure_what_is_not_done() -> None:
    plan = plan_ablation(load_recipe("quickstart_tuned"))
    reasons = {item.technique: item.reason for item in plan.not_run}
    assert reasons["mixed precision"].startswith("bfloat16 is 16× slower than float32 on this CPU")


@pytest.mark.usefixtures("slow")
def test_tune_does_not_try_it() -> None:
    subject = tune_plan.Subject("cpu", 2, 48, True, True, None)
    offers = tune_plan.list_techniques(larger_batch=False)["precision"]
    assert list(offers(tiny_recipe(), subject)) == []
    assert [item.detail for item in offers(tiny_recipe(bf16=True), subject)] == ["fp32"]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="caps are those of x86")
def test_commands_say_it_under_caps(tmp_path: Path) -> None:
    caps = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "hfbench", "validate", "quickstart_tuned"]
    done = subprocess.run(
        command, env=os.environ | caps, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "slower than float32 on this CPU" in done.stdout
    assert "trains in float32 here" in done.stdout
