"""The doctor divides a step, bounds techniques by hand-worked numbers, agrees with real runs."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import TrainerCallback

from hfbench.errors import DeviceError
from hfbench.profiling.timeline import PHASES
from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import MIXED_PRECISION, change
from hfbench.studies.accumulation import check_accumulation
from hfbench.studies.doctor import machine as capabilities
from hfbench.studies.doctor.advice import Evidence, advise
from hfbench.studies.doctor.examine import examine
from hfbench.studies.doctor.forecast import Schedule, plan_schedule, predict_duration
from hfbench.studies.doctor.limits import find_limit, say_verdict
from hfbench.studies.doctor.parts import Sides
from hfbench.studies.doctor.schema import Advice, Forecast, Machine, MatrixProduct, Step
from hfbench.studies.doctor.slices import Slices, divide_step
from hfbench.studies.uses import find_uses
from hfbench.studies.windows import Bench, with_arguments
from hfbench.training.run import run_recipe
from hfbench.training.trainer import BenchTrainer, build_training_arguments
from tests.builders import TIMM_VIT, make_trainer, tiny_recipe, vit_config, write_model


def step(**changes: float) -> Step:
    """Return a batch of 100 ms: loader 30, copy 10, model 50 (of it optimizer 5), rest 10."""
    seconds = {
        "batch": 0.100,
        "loader": 0.030,
        "copy": 0.010,
        "model": 0.050,
        "rest": 0.010,
        "optimizer": 0.005,
        "preprocessing": 0.020,
        "epoch_start": 0.0,
    }
    return Step(**{f"{name}_seconds": value for name, value in (seconds | changes).items()})


def machine(**ratios: float) -> Machine:
    products = [
        MatrixProduct(dtype=dtype, flops_per_second=ratio * 1e9, ratio_to_fp32=ratio)
        for dtype, ratio in ratios.items()
    ]
    return Machine(
        threads=1,
        physical_cores=2,
        free_memory_mib=9000.0,
        free_device_memory_mib=None,
        compiler="g++",
        matrix_products=products,
        lacks=[],
    )


def evidence(recipe: Recipe | None = None, **changes: Any) -> Evidence:
    recipe = recipe or tiny_recipe()
    values: dict[str, Any] = {
        "recipe": recipe,
        "device_type": "cpu",
        "step": step(),
        "machine": machine(fp32=1.0, bf16=3.0),
        "precision": next(u for u in find_uses(recipe) if u.technique is MIXED_PRECISION),
        "model_seconds": 0.040,
        "other_model_seconds": 0.020,
        "fused_optimizer_seconds": None,
        "pageable_copy_seconds": None,
        "pinned_copy_seconds": None,
    }
    return Evidence(**(values | changes))


def on_technique(name: str, given: Evidence) -> Advice:
    return next(item for item in advise(given) if item.technique == name)


class Counter(TrainerCallback):
    """Counts what a trainer does."""

    def __init__(self) -> None:
        self.evaluations = self.saves = 0

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.evaluations += 1

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saves += 1


# -- how long a run will take


@pytest.mark.parametrize(
    "arguments",
    [
        {"eval_strategy": "epoch", "save_strategy": "epoch"},
        {"eval_strategy": "epoch", "eval_delay": 2, "num_train_epochs": 2.5},
        {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 4},
        {"eval_strategy": "steps", "eval_steps": 0.4, "eval_on_start": True, "eval_delay": 4},
        {"max_steps": 7, "save_strategy": "steps", "save_steps": 7, "dataloader_drop_last": True},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 5},
    ],
)
def test_schedule_counts_what_trainer_does(arguments: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset={"max_train_samples": 44}, **arguments)
    counter = Counter()
    trainer = make_trainer(recipe, tmp_path, [counter])
    trainer.train()
    plan = plan_schedule(build_training_arguments(recipe, tmp_path), 44)
    assert plan.optimizer_steps == trainer.state.global_step
    assert plan.epochs == math.ceil(trainer.state.epoch or 0)
    assert (plan.evaluations, plan.saves) == (counter.evaluations, counter.saves)
    assert plan.samples == pytest.approx(trainer.clock._samples, abs=8)


def test_step_of_another_batch_grows_but_for_optimizer_and_trainer() -> None:
    found = step().scaled(2, 1 / 5)
    # Loader 60, copy 20, forward and backward 90, optimizer 1, rest 10.
    assert found.batch_seconds == pytest.approx(0.181)
    assert found.model_seconds == pytest.approx(0.091)
    assert (found.loader_seconds, found.preprocessing_seconds) == pytest.approx((0.06, 0.04))
    assert (found.optimizer_seconds, found.rest_seconds) == pytest.approx((0.001, 0.01))


def test_forecast_adds_up_what_grows_with_the_batch_and_what_does_not() -> None:
    # Of 100 ms, optimizer 5 and rest 10 stay as they are; the other 85 are for 10 images.
    plan = Schedule(
        samples=1000,
        batches=50,
        optimizer_steps=50,
        epochs=5,
        evaluations=5,
        saves=2,
        evaluates_last=True,
    )
    found = predict_duration(
        plan,
        step(epoch_start=0.05),
        batch_size=10,
        measured_batch_size=5,
        first_step_seconds=1.0,
        evaluation_seconds=0.4,
        save_seconds=0.5,
        final_evaluation_seconds=3.0,
        windows=[0.1, 0.1],
    )
    # 1000 x 0.0085 + 50 x 0.015 + 5 x 0.05 = 9.5 s
    assert found.samples_per_second == pytest.approx(1000 / 9.5)
    assert found.train_seconds == pytest.approx(10.5)
    assert (found.evaluation_seconds, found.save_seconds) == pytest.approx((2.0, 1.0))
    assert found.execution_seconds == pytest.approx(13.5)
    # Another batch was measured: a factor of 1.5, as for the other parts.
    assert found.lowest_execution_seconds == pytest.approx(9.0)
    assert found.highest_execution_seconds == pytest.approx(20.25)
    assert "5 instead of 10" in found.note


def test_range_is_two_standard_deviations_of_the_windows() -> None:
    plan = Schedule(
        samples=10,
        batches=1,
        optimizer_steps=1,
        epochs=1,
        evaluations=0,
        saves=0,
        evaluates_last=False,
    )
    found = predict_duration(
        plan,
        step(),
        batch_size=10,
        measured_batch_size=10,
        first_step_seconds=0.0,
        evaluation_seconds=0.0,
        save_seconds=0.0,
        final_evaluation_seconds=0.0,
        windows=[0.1, 0.1 * math.e],  # logarithms differ by 1: deviation sqrt(1/2)
    )
    assert found.samples_per_second == pytest.approx(100)
    factor = math.exp(math.sqrt(2))
    assert found.highest_execution_seconds == pytest.approx(0.1 * factor)
    assert found.lowest_samples_per_second == pytest.approx(100 / factor)


# -- where a step goes, and the verdict


def test_step_is_divided_by_the_median_shares_of_the_windows() -> None:
    shares = dict.fromkeys(PHASES, 0.0) | {
        "data_wait": 0.3,
        "copy": 0.1,
        "preprocessing": 0.05,
        "forward": 0.15,
        "backward": 0.2,
        "optimizer": 0.1,
        "overhead": 0.1,
    }
    slow = shares | {"data_wait": 0.9, "forward": 0.0, "backward": 0.0}
    slices = Slices(
        training=[0.1, 0.1, 0.5],
        phases=[shares, shares, slow],
        preprocessing=[0.02],
        epoch_start=[0.5],
    )
    found = divide_step(slices, on_device=False)
    assert found.loader_seconds == pytest.approx(0.03)
    assert found.copy_seconds == pytest.approx(0.01)
    assert found.model_seconds == pytest.approx(0.05)
    assert found.rest_seconds == pytest.approx(0.01)
    assert found.optimizer_seconds == pytest.approx(0.01)
    assert found.preprocessing_seconds == 0.02
    assert divide_step(slices, on_device=True).preprocessing_seconds == pytest.approx(0.005)


def test_speedup_without_a_part_is_amdahls() -> None:
    assert step().speedup_without(0.030) == pytest.approx(100 / 70)
    assert step().speedup_without(0.0) == 1
    assert math.isfinite(step().speedup_without(0.100))


@pytest.mark.parametrize(
    ("changes", "limit", "words"),
    [
        ({}, "model", "The model limits vit on this machine: it takes 50 % of the 100 ms"),
        ({"loader": 0.06, "model": 0.02}, "loader", "the model in no time would make it only 1.25"),
        ({"copy": 0.06, "model": 0.0}, "copy", "The copy to the device limits vit"),
        ({"rest": 0.06, "model": 0.0}, "rest", "Neither loader nor model limits vit"),
    ],
)
def test_verdict_names_the_largest_part(changes: Any, limit: str, words: str) -> None:
    found = step(**changes)
    assert find_limit(found) == limit
    verdict = say_verdict("vit", find_limit(found), found, forecast(), advise(evidence()), None)
    assert words in verdict
    assert "about 1 min 05 s (50.0 s to 1 min 20 s), training at 123.4 images/s" in verdict
    assert "mixed precision would gain 1.33×" in verdict  # 100 / (100 - 50 + 50 x 20 / 40)


def test_verdict_names_what_the_recipe_has_and_is_slower_by() -> None:
    slower = evidence(tiny_recipe(bf16=True), other_model_seconds=0.020)
    verdict = say_verdict("vit", "model", step(), forecast(), advise(slower), None)
    assert "It has mixed precision, which makes it slower: 0.75×" in verdict


def forecast() -> Forecast:
    return Forecast(
        samples_per_second=123.4,
        lowest_samples_per_second=100,
        highest_samples_per_second=150,
        optimizer_steps=10,
        train_seconds=60,
        evaluation_seconds=5,
        save_seconds=0,
        final_evaluation_seconds=0,
        execution_seconds=65,
        lowest_execution_seconds=50,
        highest_execution_seconds=80,
        note="",
    )


# -- what can help and what cannot


def test_mixed_precision_is_judged_by_this_model_and_not_by_matrix_products() -> None:
    found = on_technique("mixed precision", evidence())
    assert (found.helps, found.in_recipe) == ("yes", False)
    assert found.speedup_measured == pytest.approx(100 / 75)
    assert "bf16 matrix products run 3.0× as fast" in found.sentence
    assert "runs 2.00× as fast" in found.sentence
    slower = on_technique("mixed precision", evidence(other_model_seconds=0.060))
    assert slower.helps == "no"
    assert slower.speedup_measured == pytest.approx(100 / 125)


def test_mixed_precision_that_is_on_is_judged_against_fp32() -> None:
    recipe = tiny_recipe(bf16=True)
    found = on_technique("mixed precision", evidence(recipe, other_model_seconds=0.080))
    assert (found.helps, found.in_recipe) == ("yes", True)
    assert found.speedup_measured == pytest.approx(1.5)  # 50 + 50 x 80 / 40 of 100


def test_pinning_is_bounded_by_the_copy_and_useless_on_a_cpu() -> None:
    assert "Nothing is copied" in on_technique("pinned memory", evidence()).sentence
    assert on_technique("pinned memory", evidence()).helps == "no"
    gpu = evidence(device_type="cuda", pageable_copy_seconds=0.010, pinned_copy_seconds=0.004)
    found = on_technique("pinned memory", gpu)
    assert found.helps == "perhaps"
    assert found.speedup_at_most == pytest.approx(100 / 90)
    assert "10 ms from pageable memory, 4 ms from pinned" in found.sentence


def test_loader_techniques_are_bounded_by_the_wait() -> None:
    workers = on_technique("loader workers", evidence())
    assert workers.speedup_at_most == pytest.approx(100 / 70)
    assert "30 % of a step" in workers.sentence
    on_cpu = on_technique("device preprocessing", evidence())
    assert (on_cpu.helps, on_cpu.speedup_at_most) == ("no", 1.0)
    on_gpu = on_technique("device preprocessing", evidence(device_type="cuda"))
    assert on_gpu.speedup_at_most == pytest.approx(100 / 80)  # 20 ms of preparing, 30 of waiting
    shared = evidence(tiny_recipe(dataloader_num_workers=4), device_type="cuda")
    assert on_technique("device preprocessing", shared).speedup_at_most == pytest.approx(100 / 95)


def test_accumulation_saves_optimizer_steps_alone() -> None:
    off = on_technique("gradient accumulation", evidence())
    assert off.speedup_at_most == pytest.approx(100 / 95)
    assert "At the same effective batch it cannot be faster" in off.sentence
    on = on_technique("gradient accumulation", evidence(tiny_recipe(gradient_accumulation_steps=4)))
    assert on.in_recipe
    assert on.speedup_at_most == pytest.approx(1.15)  # three more optimizer steps of 5 ms


def test_fused_optimizer_is_measured_where_there_is_one() -> None:
    found = on_technique("optimizer implementation", evidence(fused_optimizer_seconds=0.001))
    assert found.speedup_measured == pytest.approx(100 / 96)
    fused = on_technique("optimizer implementation", evidence(tiny_recipe(optim="sgd")))
    assert fused.speedup_measured is None
    assert fused.speedup_at_most == pytest.approx(100 / 95)


def test_what_a_machine_lacks_cannot_help() -> None:
    bare = machine(fp32=1.0).model_copy(update={"compiler": None})
    found = {item.technique: item for item in advise(evidence(machine=bare))}
    assert (found["torch.compile"].helps, found["TF32"].helps) == ("no", "no")
    ampere = machine(fp32=1.0, tf32=5.0)
    tf32 = on_technique("TF32", evidence(machine=ampere, device_type="cuda"))
    assert tf32.speedup_at_most == pytest.approx(100 / (100 - 45 * 0.8))
    assert on_technique("torch.compile", evidence(machine=ampere)).helps == "perhaps"


def test_memory_format_may_help_convolutions_alone() -> None:
    found = on_technique("memory format", evidence())
    assert (found.helps, found.in_recipe, found.speedup_at_most) == ("perhaps", False, None)
    assert "model.memory_format=channels_last" in found.sentence
    assert on_technique("memory format", evidence(tiny_recipe(TIMM_VIT))).helps == "no"
    last = change(tiny_recipe(), [("model.memory_format", "channels_last")])
    on = on_technique("memory format", evidence(last))
    assert (on.helps, on.in_recipe) == ("no", True)


def test_advice_has_each_technique_once_and_the_most_helpful_first() -> None:
    found = advise(evidence())
    order = [("yes", "perhaps", "no").index(item.helps) for item in found]
    assert order == sorted(order)
    assert len({item.technique for item in found}) == len(found) == 9


# -- the machine


def speeds(monkeypatch: pytest.MonkeyPatch, bf16: float) -> None:
    measured = {torch.float32: 1e11, torch.bfloat16: bf16}
    monkeypatch.setattr(
        "hfbench.profiling.flops.measure_matmul_peak", lambda dtype, _: measured[dtype]
    )


def test_emulated_bf16_and_idle_cores_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds(monkeypatch, 0.4e11)
    monkeypatch.setattr(capabilities, "count_physical_cores", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = capabilities.examine_machine(torch.device("cpu"))
    assert found.ratio("bf16") == pytest.approx(0.4)
    said = " ".join(found.lacks)
    assert "bf16 is emulated here: its matrix products run 0.4× as fast as fp32's" in said
    assert "1 thread of 16 cores (OMP_NUM_THREADS=1): set OMP_NUM_THREADS=16" in said


def test_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    speeds(monkeypatch, 3e11)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = capabilities.examine_machine(torch.device("cpu"))
    assert found.compiler is None
    assert any("g++ or clang++" in line for line in found.lacks)
    assert not any("bf16" in line for line in found.lacks)


# -- accumulation


@pytest.fixture(scope="module", params=["timm/test_resnet.r160_in1k", TIMM_VIT])
def bench(request: pytest.FixtureRequest) -> Bench:
    """Return a bench with batch norm, and one without."""
    return Bench(
        tiny_recipe(
            request.param,
            preprocessing={"augmentation": ["random_crop"]},
            label_smoothing_factor=0.1,
        )
    )


def test_right_accumulation_passes(bench: Bench, tmp_path: Path) -> None:
    found = check_accumulation(bench, 4, 3, "fp32", tmp_path)
    assert found.passed, found.sentence
    assert found.loss_accumulated == pytest.approx(found.loss_expected, rel=1e-5)
    apart = abs(found.gradient_norm_of_one_batch / found.gradient_norm_expected - 1)
    if found.batch_statistics:
        assert apart > 0.01  # so that the test would notice a comparison with the wrong one
        assert "batch norm" in found.sentence
    else:
        assert apart < 1e-4


def test_sum_of_micro_batch_means_is_flagged(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers issue 47688: heads that drop num_items_in_batch.
    def dropping(smoothing: float) -> Any:
        def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
            return nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=smoothing)

        return loss

    monkeypatch.setattr("hfbench.training.trainer.cross_entropy_loss", dropping)
    found = check_accumulation(bench, 4, 3, "fp32", tmp_path)
    assert not found.passed
    assert found.loss_accumulated == pytest.approx(4 * found.loss_expected, rel=1e-4)
    assert "ACCUMULATION IS WRONG" in found.sentence
    assert "4 times too much" in found.sentence
    assert "47688" in found.sentence


# -- the whole, against measured runs


def loader_bound(folder: Path) -> Recipe:
    """A small model on images that are cropped, coloured and resized from 512 to 256 pixels.

    More than twice the input they would be resized before training.
    """
    picture = Image.fromarray(np.arange(512 * 512, dtype=np.uint8).reshape(512, 512)).convert("RGB")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    for split, count in (("train", 48), ("test", 8)):
        rows = {"image": [picture] * count, "label": [0, 1] * (count // 2)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return tiny_recipe(
        write_model(
            folder / "flat", vit_config(num_hidden_layers=1, image_size=256, patch_size=64)
        ),
        pretrained=True,
        dataset={"name_or_path": str(folder)},
        preprocessing={"image_size": 256, "augmentation": ["random_crop", "color"]},
    )


def model_bound(folder: Path) -> Recipe:
    """A deeper model of 64 patches on images of 32 pixels."""
    config = vit_config(hidden_size=96, num_hidden_layers=4, intermediate_size=192, patch_size=4)
    return tiny_recipe(write_model(folder / "deep", config), pretrained=True)


@pytest.mark.parametrize(("build", "limit"), [(loader_bound, "loader"), (model_bound, "model")])
def test_diagnosis_agrees_with_a_measured_run(
    build: Any, limit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = with_arguments(build(tmp_path), num_train_epochs=4, eval_strategy="epoch")
    found = examine(recipe, seconds=1)
    assert capsys.readouterr().out == ""
    result = run_recipe(recipe, tmp_path / "runs")
    waited = result.times.data_wait_seconds / result.times.train_seconds
    assert found.limited_by == limit
    assert (waited > 0.5) == (limit == "loader")
    # Generous: other work may slow this machine down at any time.
    measured = result.throughput.samples_per_second
    assert measured is not None
    assert 1 / 3 < found.forecast.samples_per_second / measured < 3
    assert found.forecast.optimizer_steps == result.training.optimizer_steps
    parts = [found.step.seconds(part) for part in ("loader", "copy", "model", "rest")]
    assert sum(parts) == pytest.approx(found.step.batch_seconds)
    assert min(parts) >= 0
    assert {side.name for side in found.sides} == {"loader", "model", "training"}
    assert all(side.slices >= 3 for side in found.sides)


def test_doctor_flags_wrong_accumulation_and_measures_a_batch_that_there_is_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def twice(_: float) -> Any:
        return lambda outputs, labels, **_: nn.functional.cross_entropy(outputs["logits"], labels)

    monkeypatch.setattr("hfbench.training.trainer.cross_entropy_loss", twice)
    recipe = tiny_recipe(
        gradient_accumulation_steps=2, per_device_train_batch_size=24, dataloader_num_workers=1
    )
    found = examine(recipe, seconds=0.02)  # a millisecond for an update: too little for 24 images
    assert found.accumulation is not None
    assert not found.accumulation.passed
    assert found.verdict.startswith("ACCUMULATION IS WRONG")
    assert found.measured_batch_size < found.batch_size == 24
    assert any("instead of 24" in note for note in found.notes)
    assert list(tmp_path.iterdir()) == []


def test_two_trainers_take_turns_each_in_its_own_precision(tmp_path: Path) -> None:
    bench = Bench(tiny_recipe())
    plain = Sides(bench, bench.recipe, tmp_path)
    mixed = Sides(bench, with_arguments(bench.recipe, bf16=True), tmp_path)
    for sides, precision in ((plain, "no"), (mixed, "bf16"), (plain, "no")):
        assert sides.time_model(1) > 0
        assert sides.trainer.accelerator.mixed_precision == precision
    assert (plain.precision, mixed.precision) == ("fp32", "bf16")


def test_machine_that_cannot_run_the_recipe_is_refused_with_every_problem() -> None:
    if torch.accelerator.is_available():
        pytest.skip("needs a machine without an accelerator")
    with pytest.raises(DeviceError, match="fp16") as caught:
        examine(with_arguments(tiny_recipe(), fp16=True, tf32=True, use_cpu=False))
    assert "tf32" in str(caught.value)


def test_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(Bench, "measure_window", fail)
    with pytest.raises(DeviceError, match="per_device_train_batch_size=8") as caught:
        examine(tiny_recipe())
    assert "Halve it" in str(caught.value)


def live_trainers() -> int:
    """Count the trainers that something keeps alive."""
    return sum(type(item) is BenchTrainer for item in gc.get_objects())


def test_accumulation_is_checked_when_the_other_trainers_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each holds a model and its optimizer's state: on a GPU that a recipe fills, none is left over.
    seen: list[int] = []

    def count(*args: Any, **kwargs: Any) -> Any:
        seen.append(live_trainers())
        return check_accumulation(*args, **kwargs)

    gc.collect()
    before = live_trainers()
    monkeypatch.setattr("hfbench.studies.doctor.examine.check_accumulation", count)
    examine(tiny_recipe(bf16=True, gradient_accumulation_steps=2), seconds=1)
    assert len(seen) == 1
    assert seen[0] <= before  # some test before may have left one


def test_other_precision_that_does_not_fit_beside_the_recipe_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Sides.time_model

    def full(self: Sides, updates: int) -> float:
        if self.precision == "bf16":
            raise torch.AcceleratorError("CUDA error: out of memory\nmore")
        return original(self, updates)

    monkeypatch.setattr(Sides, "time_model", full)
    found = examine(tiny_recipe(), seconds=1)
    assert found.step.batch_seconds > 0
    assert any("other precision could not be run: CUDA error" in note for note in found.notes)
