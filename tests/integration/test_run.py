"""A finished run holds what it says, is not run twice, and can be compared and used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score

from hfbench.results.schema import load_result
from tests.integration.commands import SHORT, WarmCommand, only_run, read_result
from tests.integration.conftest import Pair

FILES = {
    "README.md",
    "confusion.png",
    "curves.png",
    "log.jsonl",
    "model",
    "predictions.npz",
    "recipe.json",
    "result.json",
}


def test_run_leaves_its_files_and_no_checkpoints(pair: Pair) -> None:
    for run in pair.runs:
        assert {path.name for path in run.iterdir()} == FILES
        model = {path.name for path in (run / "model").iterdir()}
        assert model == {"config.json", "model.safetensors", "preprocessor_config.json"}
        entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert any("eval_accuracy" in entry for entry in entries)
        assert all({"step", "epoch", "seconds"} <= set(entry) for entry in entries)
    assert {path.name for path in pair.folder.iterdir()} == {"runs"}


def test_table_shows_what_the_result_holds(pair: Pair) -> None:
    run = pair.runs[0]
    result = read_result(run)
    shown = " ".join(pair.untuned.stdout.split())
    for split in ("test", "train"):
        found = result["metrics"][split]
        assert f"│ {split} accuracy │ {100 * found['accuracy']:.2f} % │" in shown
        assert f"│ {split} F1 macro │ {100 * found['f1_macro']:.2f} % │" in shown
    assert "execution time" in shown
    assert f"Everything is in {run.relative_to(pair.folder)}" in shown
    assert "Traceback" not in pair.untuned.stderr


def test_json_is_the_result_and_nothing_else(pair: Pair) -> None:
    assert json.loads(pair.tuned.stdout) == read_result(pair.runs[1])
    assert "train_runtime" in pair.tuned.stderr  # Trainer's own log is moved there


def test_times_add_up_and_fit_inside_an_external_clock(pair: Pair) -> None:
    for run, done in zip(pair.runs, (pair.untuned, pair.tuned), strict=True):
        times = read_result(run)["times"]
        assert all(name.endswith("_seconds") for name in times)
        assert all(value >= 0 for value in times.values())
        assert 0 < times["execution_seconds"] < times["total_seconds"] <= done.seconds
        pauses = times["evaluation_seconds"] + times["save_seconds"]
        assert math.isclose(times["train_seconds"], times["execution_seconds"] - pauses)
        parts = ("setup", "execution", "final_evaluation", "final_save", "analysis")
        parts += ("paused", "keeping")
        total = sum(times[f"{part}_seconds"] for part in parts)
        assert math.isclose(times["total_seconds"], total, abs_tol=1e-6)


def applied_precision(tuned: dict[str, Any]) -> str:
    """Return what a tuned quickstart takes on this CPU."""
    precision = tuned["switches"]["precision"]
    assert precision["requested"] == "bf16"
    return "fp32" if "slower than float32" in str(precision["reason"]) else "bf16"


def test_result_counts_what_was_trained(pair: Pair) -> None:
    untuned, tuned = (read_result(run) for run in pair.runs)
    for result, run in zip((untuned, tuned), pair.runs, strict=True):
        assert result["run_id"] == run.name
        assert result["schema_version"] == 3
        assert result["data"]["train_samples"] == result["metrics"]["train"]["samples"] == 200
        assert result["data"]["eval_samples"] == result["metrics"]["test"]["samples"] == 360
        assert (result["training"]["world_size"], result["training"]["sessions"]) == (1, 1)
        assert 0 <= result["metrics"]["test"]["accuracy"] <= 1
        assert result["memory"]["peak_process_memory_mib"] > 100
        assert result["memory"]["peak_device_memory_mib"] is None
        assert result["throughput"]["samples_per_second"] > 0
        assert result["recipe"]["dataset"]["max_train_samples"] == 200
        assert load_result(run).run_id == run.name
    # 200 images: 7 batches of 32, or 4 pairs of them.
    assert (untuned["training"]["optimizer_steps"], tuned["training"]["optimizer_steps"]) == (7, 4)
    sizes = [result["training"]["effective_batch_size"] for result in (untuned, tuned)]
    assert sizes == [32, 64]
    precisions = [result["switches"]["precision"]["applied"] for result in (untuned, tuned)]
    assert precisions == ["fp32", applied_precision(tuned)]
    assert untuned["switches"]["dataloader_pin_memory"]["applied"] is False


def test_pinning_without_an_accelerator_is_reported_as_not_applied(pair: Pair) -> None:
    pinning = read_result(pair.runs[1])["switches"]["dataloader_pin_memory"]
    assert (pinning["requested"], pinning["applied"]) == (True, False)
    assert "CPU" in pinning["reason"]


def test_predictions_are_the_metrics(pair: Pair) -> None:
    digits = load_digits()
    for run in pair.runs:
        result = read_result(run)["metrics"]["test"]
        with np.load(run / "predictions.npz") as saved:
            index, labels, predictions = (saved[key] for key in ("index", "label", "prediction"))
            probability, of_label = saved["probability"], saved["label_probability"]
            top = saved["top"]
        assert np.array_equal(labels, digits.target[index])
        assert len(set(index)) == 360
        assert np.array_equal(top[:, 0], predictions)
        assert np.all((of_label > 0) & (of_label <= probability + 1e-6) & (probability <= 1 + 1e-6))
        right = labels == predictions
        assert np.allclose(of_label[right], probability[right], atol=1e-6)
        assert result["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
        for average in ("macro", "weighted"):
            expected = f1_score(labels, predictions, average=average, zero_division=0)
            assert result[f"f1_{average}"] == pytest.approx(expected)


def test_finished_run_is_not_run_again_until_asked(
    warm: WarmCommand, tmp_path: Path, pair: Pair
) -> None:
    recipe = ["recipe", "quickstart_untuned", *SHORT, "-o", pair.folder / "runs"]
    again = warm.run([*recipe, "training_args.disable_tqdm=true"], tmp_path).check()
    assert "Already finished" in again.stderr
    assert pair.runs[0].name in again.stdout
    assert "test accuracy" in again.stdout
    assert len(list(pair.runs[0].parent.iterdir())) == 1

    recipe[-1] = tmp_path / "mine"
    first = warm.run([*recipe, "--json"], tmp_path).check()
    other = warm.run([*recipe, "--json", "--rerun"], tmp_path).check()
    ids = [json.loads(done.stdout)["run_id"] for done in (first, other)]
    assert ids[0] < ids[1]
    runs = sorted((tmp_path / "mine/quickstart_untuned").iterdir())
    assert [run.name for run in runs] == ids
    # The same seed on the same machine is the same run.
    results = [read_result(run) for run in runs]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["metrics"] == read_result(pair.runs[0])["metrics"]


def test_compare_shows_gain_and_every_difference(warm: WarmCommand, pair: Pair) -> None:
    names = ["runs/quickstart_untuned", "runs/quickstart_tuned"]
    shown = warm.run(["compare", *names], pair.folder).check().stdout
    for part in ("execution time", "peak process memory", "test accuracy", "test F1 macro", "×"):
        assert part in shown
    for part in ("points", "Settings that differ", "Circumstances that differ"):
        assert part in shown

    untuned, tuned = (read_result(run) for run in pair.runs)
    content = json.loads(warm.run(["compare", *names, "--json"], pair.folder).check().stdout)
    rows = {row["name"]: row for row in content["rows"]}
    seconds = [result["times"]["execution_seconds"] for result in (untuned, tuned)]
    assert rows["execution time"]["speedup"] == pytest.approx(seconds[0] / seconds[1])
    for name, field in (("accuracy", "accuracy"), ("F1 macro", "f1_macro")):
        values = [result["metrics"]["test"][field] for result in (untuned, tuned)]
        assert rows[f"test {name}"]["points"] == pytest.approx(100 * (values[1] - values[0]))
    settings = {item["name"]: (item["baseline"], item["candidate"]) for item in content["settings"]}
    assert settings == {
        "training_args.bf16": (False, True),
        "training_args.dataloader_pin_memory": (False, True),
        "training_args.accelerator_config.non_blocking": (False, True),
        "training_args.gradient_accumulation_steps": (1, 2),
    }
    beyond = {item["name"]: (item["baseline"], item["candidate"]) for item in content["beyond"]}
    assert beyond == {"optimizer_steps": (7, 4), "effective_batch_size": (32, 64)}
    circumstances = {
        item["name"]: (item["baseline"], item["candidate"]) for item in content["circumstances"]
    }
    taken = applied_precision(read_result(pair.runs[1]))
    same = ("fp32", "fp32")
    assert circumstances.get("precision (applied)", same) == ("fp32", taken)
    # Pinned memory was asked for, and is not applied on a CPU. One pair is no verdict.
    assert [(item["name"], item["applied"]) for item in content["techniques"]] == [
        ("mixed precision", taken == "bf16"),
        ("pinned memory", False),
        ("gradient accumulation", True),
    ]
    assert (content["pairs"], content["speed"]) == (1, "undecided")
    assert content["sentence"] in " ".join(shown.split())
    for name in (*settings, "optimizer_steps", "effective_batch_size"):
        assert name in shown


def test_predict_classifies_image_files(warm: WarmCommand, tmp_path: Path, pair: Pair) -> None:
    run = pair.runs[0]
    digits = load_digits()
    with np.load(run / "predictions.npz") as saved:
        index, classes, probability = (
            saved[name][:3] for name in ("index", "prediction", "probability")
        )
    names = [f"digit {number}.png" for number in index]
    for name, number in zip(names, index, strict=True):
        grey = np.rint(digits.images[number] * (255 / 16)).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / name)
    found = json.loads(warm.run(["predict", run, *names, "--json"], tmp_path).check().stdout)
    assert list(found) == names
    for name, label, expected in zip(names, classes, probability, strict=True):
        assert len(found[name]) == 5
        best = found[name][0]
        assert best["label"] == str(label)
        assert best["score"] == pytest.approx(expected, abs=1e-4)
    shown = warm.run(["predict", run / "model", names[0], "--top-k", "1"], tmp_path).check().stdout
    assert names[0] in shown
    assert found[names[0]][0]["label"] in shown


def test_recipe_of_ones_own_runs_from_its_folder(
    warm: WarmCommand, tmp_path: Path, pair: Pair
) -> None:
    content = json.loads((pair.runs[0] / "recipe.json").read_text())
    content |= {"name": "mine"}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    arguments = ["recipe", "mine.json", "dataset.max_eval_samples=50", "-o", "my runs"]
    warm.run(arguments, tmp_path).check()
    run = only_run(tmp_path / "my runs")
    assert run.parent.name == "mine"
    resolved = json.loads((run / "recipe.json").read_text())
    assert resolved["dataset"].pop("max_eval_samples") == 50
    assert content["dataset"].pop("max_eval_samples") is None
    assert resolved == content
    # Other test images: what was gained could not be told from what was measured on.
    said = warm.run(["compare", pair.runs[0], run], tmp_path).refused()
    assert "test images: 360 of digits against 50 of digits, which are not the same" in said


def test_synthetic_images_measure_speed_and_claim_no_accuracy(
    warm: WarmCommand, tmp_path: Path
) -> None:
    data = ["dataset.name_or_path=synthetic", "dataset.max_eval_samples=11"]
    warm.run(["recipe", "quickstart_tuned", *SHORT, *data], tmp_path).check()
    result = read_result(only_run(tmp_path / "runs"))
    assert result["metrics"] == {"test": None, "train": None}
    assert result["throughput"]["samples_per_second"] > 0


def test_run_without_evaluation_or_checkpoints_in_training_is_tested_at_its_end(
    warm: WarmCommand, tmp_path: Path
) -> None:
    off = ["training_args.eval_strategy=no", "training_args.save_strategy=no"]
    warm.run(["recipe", "quickstart_untuned", *SHORT, *off], tmp_path).check()
    result = read_result(only_run(tmp_path / "runs"))
    assert result["metrics"]["test"]["samples"] == 360
    assert result["times"]["evaluation_seconds"] == result["times"]["save_seconds"] == 0


def test_pretrained_model_is_fine_tuned_on_real_cifar10(
    warm: WarmCommand, tmp_path: Path, shared: Path
) -> None:
    arguments = [
        f"dataset.name_or_path={shared / 'data/cifar10'}",
        "dataset.max_train_samples=60",
        "dataset.max_eval_samples=40",
        "dataset.max_train_eval_samples=20",
        f"model.name_or_path={shared / 'models/mobilenetv2_100'}",
        "preprocessing.image_size=64",
        "training_args.num_train_epochs=2",
        "training_args.per_device_train_batch_size=20",
        "training_args.learning_rate=0.002",
        "training_args.dataloader_num_workers=0",
    ]
    warm.run(["recipe", "resnet50_cifar10_untuned", *arguments], tmp_path).check()
    run = only_run(tmp_path / "runs")
    result = read_result(run)
    assert result["model"]["initialization"] == "pretrained"
    assert result["data"]["label_names"][0] == "airplane"
    assert result["training"]["optimizer_steps"] == 6
    assert result["metrics"]["train"]["samples"] == 20
    with np.load(run / "predictions.npz") as saved:
        labels, predictions = saved["label"], saved["prediction"]
    assert np.array_equal(np.bincount(labels), [4] * 10)
    test = result["metrics"]["test"]
    assert test["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert test["f1_macro"] == pytest.approx(
        f1_score(labels, predictions, average="macro", zero_division=0)
    )
    assert test["accuracy"] > 0.15  # chance is 0.1
