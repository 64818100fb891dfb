"""One run from beginning to end, and what is found before training starts."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score
from transformers import TrainerControl, TrainerState, TrainingArguments

from hfbench.data.sources import load_splits
from hfbench.errors import (
    DataError,
    DeviceError,
    HfbenchError,
    Interrupted,
    ModelError,
    RecipeError,
    ResultError,
)
from hfbench.recipe.schema import Recipe, load_recipe
from hfbench.results.calibration import calibration_error
from hfbench.results.folder import hold, make_folder
from hfbench.results.manifest import newest_checkpoint, seal
from hfbench.results.schema import Result, find_runs, load_result
from hfbench.training.callbacks import LogFile
from hfbench.training.run import run_recipe
from tests.builders import tiny_recipe, vit_config, write_model
from tests.hub_content import CIFAR10_NAMES, write_cifar_parquet


class Finished(NamedTuple):
    """A finished run."""

    recipe: Recipe
    result: Result
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / self.recipe.name / self.result.run_id


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """Return the folder of a tiny ViT for ten classes."""
    return write_model(tmp_path / "vit", vit_config())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Run once, with evaluations and checkpoints."""
    root = tmp_path_factory.mktemp("runner")
    recipe = tiny_recipe(
        write_model(root / "vit", vit_config()),
        pretrained=True,
        dataset={"max_train_eval_samples": 30},
        per_device_train_batch_size=5,  # the last of an epoch's ten batches has 3 images
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    return Finished(recipe, run_recipe(recipe, root / "runs"), root / "runs")


def no_runs(root: Path) -> bool:
    """Tell that nothing was written."""
    return not root.exists() or not list(root.iterdir())


# What a run leaves behind


def test_folder_holds_everything_but_checkpoints(finished: Finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    expected = {"recipe.json", "result.json", "predictions.npz", "log.jsonl", "model", "README.md"}
    assert expected <= names
    assert "checkpoints" not in names
    assert not [name for name in names if name.startswith(".")]
    everything = [path.name for path in finished.folder.rglob("*")]
    assert "training_args.bin" not in everything  # a pickle


def test_run_is_named_after_time_and_recipe(finished: Finished) -> None:
    moment, _, digest = finished.result.run_id.partition("-")
    assert len(moment) == len("20260101T000000000")
    assert digest == finished.recipe.digest()[:8]
    assert finished.result.recipe_sha256 == finished.recipe.digest()


def test_recipe_is_written_as_resolved(finished: Finished) -> None:
    assert load_recipe(finished.folder / "recipe.json") == finished.recipe
    assert finished.result.recipe == finished.recipe


def test_result_is_what_was_saved(finished: Finished) -> None:
    assert load_result(finished.folder) == finished.result


def test_numbers_equal_scikit_learn_on_the_saved_predictions(finished: Finished) -> None:
    saved = np.load(finished.folder / "predictions.npz")
    label, prediction, test = saved["label"], saved["prediction"], finished.result.metrics.test
    assert test is not None
    assert test.samples == len(label) == 20
    assert test.accuracy == pytest.approx(accuracy_score(label, prediction))
    for average in ("macro", "weighted"):
        expected = f1_score(label, prediction, labels=range(10), average=average, zero_division=0)
        assert getattr(test, f"f1_{average}") == pytest.approx(expected)
    each = f1_score(label, prediction, labels=range(10), average=None, zero_division=0)
    assert list(test.f1_per_class.values()) == pytest.approx(list(each))
    assert test.loss == pytest.approx(-np.log(saved["label_probability"]).mean(), abs=1e-5)
    assert test.top5_accuracy is None


def test_predictions_are_those_of_the_test_images_in_order(finished: Finished) -> None:
    saved = np.load(finished.folder / "predictions.npz")
    _, test = load_splits(finished.recipe.dataset, 32, "bilinear")
    assert np.array_equal(saved["index"], test.index.numpy())
    assert np.array_equal(saved["label"], test.labels.numpy())
    assert np.array_equal(saved["top"][:, 0], saved["prediction"])
    assert saved["top"].shape == (20, 5)
    assert np.all(saved["label_probability"] <= saved["probability"])


def test_parts_of_the_time_add_up(finished: Finished) -> None:
    times = finished.result.times
    assert min(times.evaluation_seconds, times.save_seconds, times.data_wait_seconds) > 0
    parts = times.train_seconds + times.evaluation_seconds + times.save_seconds
    assert parts == pytest.approx(times.execution_seconds, abs=1e-6)
    assert times.execution_seconds >= times.train_seconds > times.data_wait_seconds
    assert times.first_step_seconds is not None
    assert times.first_step_seconds < times.train_seconds
    whole = times.setup_seconds + times.execution_seconds
    whole += times.final_evaluation_seconds + times.final_save_seconds
    assert times.total_seconds >= whole - 1e-6


def assert_budget_adds_up(result: Result) -> None:
    """Compare the sum of the parts with the whole, which is measured without them."""
    assert result.budget is not None
    parts = result.budget.model_dump()
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(result.times.execution_seconds, rel=0.02)


def test_budget_adds_up_with_evaluations_and_checkpoints(finished: Finished) -> None:
    assert_budget_adds_up(finished.result)
    budget, times = finished.result.budget, finished.result.times
    assert budget is not None
    assert 0 < budget.evaluation_seconds <= times.evaluation_seconds
    assert 0 < budget.save_seconds <= times.save_seconds
    computing = (budget.forward_seconds, budget.backward_seconds, budget.optimizer_seconds)
    assert min(*computing, budget.first_step_seconds, budget.start_seconds) > 0
    assert budget.preprocessing_seconds == 0  # on the host


def test_budget_adds_up_with_accumulation_on_the_device(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        vit,
        pretrained=True,
        preprocessing={"location": "device"},
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=4,
    )
    result = run_recipe(recipe, tmp_path)
    assert_budget_adds_up(result)
    assert result.budget is not None
    assert result.budget.preprocessing_seconds > 0


def test_budget_of_two_sessions_adds_up(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(
        vit, pretrained=True, save_strategy="steps", save_steps=4, eval_strategy="epoch"
    )
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path)
    (run,) = find_runs(tmp_path)
    kept = json.loads((newest_checkpoint(run.folder) / "clock.json").read_text("utf-8"))
    assert sum(kept["budget"].values()) == pytest.approx(kept["execution_seconds"], rel=0.02)
    result = run_recipe(recipe, tmp_path, resume=True)
    assert result.training.sessions == 2
    assert result.times.execution_seconds > kept["execution_seconds"]
    assert_budget_adds_up(result)


def test_arithmetic_of_a_run_is_counted(finished: Finished) -> None:
    compute, throughput = finished.result.compute, finished.result.throughput
    assert compute is not None
    # 17 tokens of 32 in two layers (see test_flops), in 16 patches.
    layer = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 2 * 17 * 17 * 32
    assert compute.forward_flops_per_image == 2 * 16 * 192 * 32 + 2 * layer + 2 * 32 * 10
    assert compute.dtype == "fp32"
    assert compute.train_flops_per_image is not None
    assert throughput.samples_per_second is not None
    expected = compute.train_flops_per_image * throughput.samples_per_second
    assert compute.achieved_flops_per_second == pytest.approx(expected)
    assert compute.utilization is not None
    assert 0 < compute.utilization < 1  # tiny layers are far from the peak


def test_energy_is_measured_or_its_absence_explained(finished: Finished) -> None:
    energy = finished.result.energy
    assert energy is not None
    assert energy.device_joules is None
    assert "device: no NVIDIA GPU was used" in str(energy.note)
    assert energy.cpu_joules is not None or "cpu: " in str(energy.note)


def test_calibration_is_measured_on_the_saved_predictions(finished: Finished) -> None:
    saved = np.load(finished.folder / "predictions.npz")
    test = finished.result.metrics.test
    assert test is not None
    expected = calibration_error(saved["probability"], saved["prediction"] == saved["label"])
    assert test.calibration_error == pytest.approx(expected, abs=1e-5)


def test_every_image_is_counted_once(finished: Finished) -> None:
    # Ten steps an epoch, of 5 images and a last one of 3; five of the 20 steps are warm-up.
    throughput, training = finished.result.throughput, finished.result.training
    assert training.optimizer_steps == 20
    assert training.epochs == 2.0
    assert throughput.warmup_steps == 5
    assert throughput.measured_samples == 2 * 48 - 5 * 5
    assert throughput.measured_seconds < finished.result.times.train_seconds
    assert throughput.samples_per_second == pytest.approx(
        throughput.measured_samples / throughput.measured_seconds
    )


def test_data_and_model_are_described(finished: Finished) -> None:
    data, model = finished.result.data, finished.result.model
    train, test = load_splits(finished.recipe.dataset, 32, "bilinear")
    assert (data.train_samples, data.eval_samples) == (48, 20)
    assert (data.image_height, data.image_width) == (8, 8)
    assert data.train_fingerprint == train.fingerprint()
    assert data.eval_fingerprint == test.fingerprint()
    assert data.label_names == [str(digit) for digit in range(10)]
    assert (model.architecture, model.initialization) == (
        "ViTForImageClassification",
        "pretrained",
    )
    # Two layers of 8,544, patches 6,176, table 544, class token 32, norm 64, head 330.
    assert model.parameters == 2 * 8_544 + 6_176 + 544 + 32 + 64 + 330


def test_train_accuracy_is_measured_on_the_asked_for_images(finished: Finished) -> None:
    assert finished.result.metrics.train is not None
    assert finished.result.metrics.train.samples == 30


def test_effective_batch_counts_accumulation(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True, gradient_accumulation_steps=3)
    training = run_recipe(recipe, tmp_path / "runs").training
    assert (training.per_device_train_batch_size, training.effective_batch_size) == (8, 24)
    assert training.optimizer_steps == 4


def test_timm_model_is_described_by_its_name(tmp_path: Path) -> None:
    model = run_recipe(tiny_recipe(max_steps=1), tmp_path).model
    assert model.architecture == "TimmWrapperForImageClassification (test_resnet)"
    assert model.initialization == "timm"


def test_repeat_gives_the_same_predictions(finished: Finished) -> None:
    again = run_recipe(finished.recipe, finished.root.parent / "again")
    assert again.metrics == finished.result.metrics
    one = np.load(finished.folder / "predictions.npz")
    two = np.load(finished.root.parent / "again" / "tiny" / again.run_id / "predictions.npz")
    assert all(np.array_equal(one[name], two[name]) for name in one.files)


def test_precision_of_an_earlier_run_in_the_process_is_forgotten(vit: Path, tmp_path: Path) -> None:
    for bf16, applied in ((True, "bf16"), (False, "fp32"), (True, "bf16")):
        recipe = tiny_recipe(vit, pretrained=True, bf16=bf16, max_steps=1)
        result = run_recipe(recipe, tmp_path / "runs", rerun=True)
        assert result.switches["precision"].applied == applied


def test_each_run_keeps_its_own_tensorboard_files(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    recipe = tiny_recipe(vit, pretrained=True, max_steps=1, report_to="tensorboard")
    for _ in range(2):
        result = run_recipe(recipe, tmp_path / "runs", rerun=True)
        folder = tmp_path / "runs" / "tiny" / result.run_id
        assert len(list(folder.glob("tensorboard/**/events.out.tfevents.*"))) == 1


# Data without labels, and other data


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_synthetic_data_gives_no_accuracy(strategy: str, vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        vit, pretrained=True, dataset={"name_or_path": "synthetic"}, eval_strategy=strategy
    )
    result = run_recipe(recipe, tmp_path / "runs")
    assert result.metrics.test is None
    assert result.metrics.train is None
    assert result.throughput.samples_per_second is not None
    assert (result.data.image_height, result.data.image_width) == (32, 32)
    saved = np.load(tmp_path / "runs" / "tiny" / result.run_id / "predictions.npz")
    assert saved["probability"].shape == (20,)


def test_parquet_folder_is_trained_and_tested_on(vit: Path, tmp_path: Path) -> None:
    write_cifar_parquet(tmp_path / "cifar10", "cifar10", train=40, test=20)
    dataset = {"name_or_path": str(tmp_path / "cifar10"), "image_column": "img"}
    result = run_recipe(tiny_recipe(vit, pretrained=True, dataset=dataset), tmp_path / "runs")
    assert result.data.label_names == CIFAR10_NAMES
    assert (result.data.train_samples, result.data.eval_samples) == (40, 20)


# Runs that are there already


def test_finished_run_is_returned_and_not_run_again(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr("hfbench.training.trainer.BenchTrainer.train", fail)
    with caplog.at_level(logging.INFO, "hfbench"):
        assert run_recipe(finished.recipe, finished.root) == finished.result
        assert run_recipe(finished.recipe, finished.root, resume=True) == finished.result
    assert "Already finished" in caplog.text
    assert "--rerun" in caplog.text


def test_description_and_reference_do_not_make_another_experiment(finished: Finished) -> None:
    content = finished.recipe.as_json() | {"description": "the same, said better"}
    assert run_recipe(Recipe.model_validate(content), finished.root) == finished.result


def test_rerun_makes_a_new_folder_and_keeps_the_old(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True, max_steps=1)
    first = run_recipe(recipe, tmp_path / "runs")
    second = run_recipe(recipe, tmp_path / "runs", rerun=True)
    assert [run.folder.name for run in find_runs(tmp_path / "runs")] == [
        first.run_id,
        second.run_id,
    ]
    assert run_recipe(recipe, tmp_path / "runs") == second  # the newest
    assert load_result(tmp_path / "runs" / "tiny" / first.run_id) == first


def test_other_settings_are_another_run(vit: Path, tmp_path: Path) -> None:
    first = run_recipe(tiny_recipe(vit, pretrained=True, max_steps=1), tmp_path / "runs")
    second = run_recipe(tiny_recipe(vit, pretrained=True, max_steps=2), tmp_path / "runs")
    assert first.run_id != second.run_id
    assert second.training.optimizer_steps == 2


# Checkpoints


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stop at once in the step after this one, without a checkpoint."""

    def on_step_begin(
        self: LogFile,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LogFile, "on_step_begin", on_step_begin)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no clock"])
def test_half_written_checkpoint_is_skipped_for_an_older_whole_one(
    damage: str,
    vit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = tiny_recipe(
        vit,
        pretrained=True,
        preprocessing={"augmentation": ["random_crop"]},
        save_strategy="steps",
        save_steps=4,
    )
    whole = run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path / "parts")
    (run,) = find_runs(tmp_path / "parts")
    newest = run.folder / "checkpoints" / "checkpoint-8"
    assert newest_checkpoint(run.folder) == newest
    state = newest / "trainer_state.json"
    if damage == "missing":
        state.unlink()
        (newest / "model.safetensors").write_bytes(b"half")
    elif damage == "truncated":
        state.write_text(state.read_text("utf-8")[:100], "utf-8")
    else:
        (newest / "clock.json").unlink()

    assert newest_checkpoint(run.folder) == run.folder / "checkpoints" / "checkpoint-4"
    resumed = run_recipe(recipe, tmp_path / "parts", resume=True)
    assert "checkpoint-8 is not whole and is left out" in caplog.text
    assert resumed.metrics == whole.metrics
    assert resumed.training.optimizer_steps == 12
    assert resumed.training.sessions == 2
    log = (run.folder / "log.jsonl").read_text("utf-8").splitlines()
    steps = [entry["step"] for entry in map(json.loads, log) if "loss" in entry]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("stopped", ["in training", "after training"])
def test_mean_training_loss_covers_every_session(
    stopped: str, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    recipe = tiny_recipe(vit, pretrained=True, save_strategy="steps", save_steps=4)
    with monkeypatch.context() as patch:
        if stopped == "in training":
            interrupt_after(patch, 9)
        else:
            patch.setattr("hfbench.training.metrics.score", interrupt)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path / "runs")
    result = run_recipe(recipe, tmp_path / "runs", resume=True)
    log = (tmp_path / "runs" / "tiny" / result.run_id / "log.jsonl").read_text("utf-8")
    losses = [entry["loss"] for entry in map(json.loads, log.splitlines()) if "loss" in entry]
    assert len(losses) == result.training.optimizer_steps == 12
    assert result.training.train_loss == pytest.approx(sum(losses) / 12, abs=1e-4)


def test_run_that_was_stopped_before_its_first_checkpoint_starts_over(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(vit, pretrained=True)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path / "runs")
    (run,) = find_runs(tmp_path / "runs")
    assert newest_checkpoint(run.folder) is None
    result = run_recipe(recipe, tmp_path / "runs", resume=True)
    assert (result.run_id, result.training.sessions) == (run.folder.name, 1)
    log = (run.folder / "log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log][:12] == list(range(1, 13))


def test_without_resume_an_unfinished_run_is_left_alone(
    vit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = tiny_recipe(vit, pretrained=True, save_strategy="steps", save_steps=2)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path / "runs")
    with caplog.at_level(logging.INFO, "hfbench"):
        result = run_recipe(recipe, tmp_path / "runs")
    assert "Starting anew; --resume would go on with" in caplog.text
    runs = list(find_runs(tmp_path / "runs"))
    assert [run.finished for run in runs] == [False, True]
    assert runs[1].folder.name == result.run_id


def test_newest_checkpoint_is_by_number(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-last", "tmp-checkpoint-11"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        for file in ("trainer_state.json", "clock.json"):
            (tmp_path / "checkpoints" / name / file).write_text("{}", "utf-8")
        seal(tmp_path / "checkpoints" / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-10"
    assert newest_checkpoint(tmp_path / "nowhere") is None


# What is found before training


def test_everything_the_machine_lacks_is_in_one_error(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True, tf32=True, report_to=["comet_ml", "clearml"])
    with pytest.raises(DeviceError, match="tiny has 3 problems") as caught:
        run_recipe(recipe, tmp_path / "runs")
    for name in ("training_args.tf32", '"comet_ml"', '"clearml"'):
        assert name in str(caught.value)
    assert no_runs(tmp_path / "runs")


def test_fp16_without_a_gpu_is_refused(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbench.machine.environment.accelerator_type", lambda: None)
    recipe = tiny_recipe(vit, pretrained=True, fp16=True, use_cpu=False)
    with pytest.raises(DeviceError, match=r"fp16: needs a CUDA device .*training_args\.bf16=true"):
        run_recipe(recipe, tmp_path / "runs")


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ({"image_column": "img"}, r'dataset\.image_column: "img" is not a column of digits'),
        ({"train_split": "trian"}, r'"trian" is not a split .* did you mean train'),
    ],
)
def test_data_error_leaves_no_folder(
    dataset: dict[str, Any], expected: str, vit: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(vit, pretrained=True, dataset=dataset)
    with pytest.raises(DataError, match=expected):
        run_recipe(recipe, tmp_path / "runs")
    assert no_runs(tmp_path / "runs")


def test_damaged_images_leave_no_folder(vit: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "a.png")
            (folder / "b.png").write_bytes(b"no image")
    dataset = {"name_or_path": str(tmp_path / "images")}
    with pytest.raises(DataError, match="2 of 4 images cannot be used") as caught:
        run_recipe(tiny_recipe(vit, pretrained=True, dataset=dataset), tmp_path / "runs")
    assert all(f"{name}/b.png" in str(caught.value) for name in ("cat", "dog"))
    assert no_runs(tmp_path / "runs")


def test_model_error_leaves_no_folder(vit: Path, tmp_path: Path) -> None:
    (vit / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        run_recipe(tiny_recipe(vit, pretrained=True), tmp_path / "runs")
    assert no_runs(tmp_path / "runs")


@pytest.mark.skipif(bool(importlib.util.find_spec("bitsandbytes")), reason="it is installed")
def test_optimizer_of_a_package_that_is_missing_leaves_no_folder(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True, optim="adamw_bnb_8bit")
    with pytest.raises(DeviceError, match=r"training_args\.optim: .* `bitsandbytes`"):
        run_recipe(recipe, tmp_path / "runs")
    assert no_runs(tmp_path / "runs")


def test_last_batch_of_one_image_is_refused_with_batch_norm(tmp_path: Path) -> None:
    # 41 images in batches of 8 leave one over; over a feature map of 1 x 1 batch norm has no
    # deviation then, and torch raises at the end of the first epoch.
    recipe = tiny_recipe(dataset={"max_train_samples": 41})
    with pytest.raises(HfbenchError, match="dataloader_drop_last"):
        run_recipe(recipe, tmp_path / "runs")


def test_batches_of_one_image_are_refused_with_batch_norm(tmp_path: Path) -> None:
    with pytest.raises(HfbenchError, match=r"on a single image \(.*\)\. Make it 2 or more"):
        run_recipe(tiny_recipe(per_device_train_batch_size=1), tmp_path / "runs")


def test_training_on_no_batch_at_all_is_refused(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        vit, pretrained=True, dataloader_drop_last=True, per_device_train_batch_size=64
    )
    with pytest.raises(RecipeError, match=r"dataloader_drop_last: 48 training images"):
        run_recipe(recipe, tmp_path / "runs")
    assert no_runs(tmp_path / "runs")


def test_output_folder_that_is_a_file_is_a_message(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("", "utf-8")
    with pytest.raises(HfbenchError):
        run_recipe(tiny_recipe(vit, pretrained=True, max_steps=1), tmp_path / "runs")


def test_out_of_memory_names_the_batch_size(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 20 MiB.\nmore")

    monkeypatch.setattr("hfbench.training.trainer.BenchTrainer.training_step", fail)
    expected = r"ran out of memory at per_device_train_batch_size=8: .*Halve it, and double"
    with pytest.raises(DeviceError, match=expected):
        run_recipe(tiny_recipe(vit, pretrained=True), tmp_path / "runs")


def test_dropping_the_last_training_batch_keeps_every_test_image(vit: Path, tmp_path: Path) -> None:
    # 20 test images in batches of 8; Trainer drops the last batch of an evaluation too.
    recipe = tiny_recipe(
        vit,
        pretrained=True,
        dataloader_drop_last=True,
        per_device_eval_batch_size=8,
        eval_strategy="epoch",
    )
    result = run_recipe(recipe, tmp_path)

    assert result.metrics.test is not None
    assert result.metrics.test.samples == 20
    assert result.training.optimizer_steps == 12


def test_run_that_goes_on_elsewhere_is_not_joined(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True)
    folder = make_folder(recipe, tmp_path)
    with hold(folder), pytest.raises(ResultError, match="still running in another process"):
        run_recipe(recipe, tmp_path, resume=True)

    assert run_recipe(recipe, tmp_path, resume=True).run_id == folder.name
    assert not (folder / ".lock").exists()


def test_top5_of_few_classes_is_no_metric_to_choose_by(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        vit,
        pretrained=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="top5_accuracy",
    )
    with pytest.raises(RecipeError, match="from 20 classes on"):
        run_recipe(recipe, tmp_path)
