"""Two processes on CPUs, started by either launcher, are one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForImageClassification

from hfbench.data.images import ImageBatches
from hfbench.data.sources import load_splits
from hfbench.data.transforms import Preprocessing
from hfbench.models.loading import open_model
from hfbench.recipe.schema import load_recipe
from tests.hub_content import write_vit_checkpoint
from tests.integration.commands import (
    Done,
    WarmCommand,
    build_environment,
    find_free_port,
    only_run,
    read_result,
    run_fresh,
    wait_until_written,
)

# ViT has no batch norm, so that two processes train like one with batches twice as large. 101 test
# images do not divide by anything. Where a gradient is almost zero, AdamW would turn rounding into
# steps of a fixed size; SGD does not.
DATA = (
    "dataset.max_train_samples=64",
    "dataset.max_eval_samples=101",
    'preprocessing.augmentation=["random_crop","horizontal_flip","color","cutout","mixup","cutmix"]',
    "training_args.num_train_epochs=2",
    "training_args.per_device_eval_batch_size=8",
    "training_args.optim=sgd",
    "training_args.learning_rate=0.1",
    "training_args.logging_steps=1",
)


def accelerate(*options: str) -> list[str]:
    """Return what comes before ``recipe`` when accelerate launches hfbench."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options]
    port = ["--main_process_port", str(find_free_port())]
    return [*launch, *port, "--num_machines", "1", "--dynamo_backend", "no", "-m", "hfbench"]


def torchrun() -> list[str]:
    """Return what comes before ``recipe`` when torch launches hfbench."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return [*launch, "--master_port", str(find_free_port()), "-m", "hfbench"]


def run_recipe(
    command: Sequence[str], model: Path, folder: Path, *overrides: str, **variables: str
) -> Done:
    """Run the recipe of this file by some command."""
    model_overrides = [f"model.name_or_path={model}", "model.pretrained=true"]
    arguments = ["recipe", "quickstart_untuned", *DATA, *model_overrides, *overrides]
    environment = build_environment(**variables)
    return run_fresh(arguments, folder, command=command, environment=environment)


def read_losses(run: Path) -> list[float]:
    """Return the training loss of each step."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny ViT for 32 x 32 images."""
    folder = tmp_path_factory.mktemp("vit")
    write_vit_checkpoint(folder, image_size=32, patch_size=8)
    return folder


@pytest.fixture(scope="module")
def alone(warm: WarmCommand, vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run in one process with batches of 8; return the run's folder."""
    folder = tmp_path_factory.mktemp("alone")
    batch = "training_args.per_device_train_batch_size=8"
    arguments = ["recipe", "quickstart_untuned", *DATA, batch]
    arguments += [f"model.name_or_path={vit}", "model.pretrained=true"]
    warm.run(arguments, folder).check()
    return only_run(folder / "runs")


@pytest.mark.parametrize(
    "launcher",
    [
        lambda: accelerate("--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"),
        pytest.param(torchrun, marks=pytest.mark.slow),
    ],
    ids=["accelerate", "torchrun"],
)
def test_two_processes_train_like_one_with_twice_the_batch(
    launcher: object, vit: Path, alone: Path, tmp_path: Path
) -> None:
    assert callable(launcher)
    batch = "training_args.per_device_train_batch_size=4"
    done = run_recipe(launcher(), vit, tmp_path, batch).check()
    assert done.stdout.count("Everything is in") == 1
    assert "Measured in 2 processes" in done.stdout
    run = only_run(tmp_path / "runs")
    ours, theirs = read_result(run), read_result(alone)
    assert ours["training"]["world_size"] == 2
    assert ours["switches"]["world_size"] == {"requested": 2, "applied": 2, "reason": None}
    for name in ("effective_batch_size", "optimizer_steps", "epochs"):
        assert ours["training"][name] == theirs["training"][name], name
    assert ours["training"]["effective_batch_size"] == 8
    for split in ("test", "train"):
        loss, expected = (result["metrics"][split]["loss"] for result in (ours, theirs))
        assert loss == pytest.approx(expected, abs=1e-4)
    # The order of the training images does not depend on the number of processes: each step sees
    # the same eight images, and its loss tells them apart.
    losses, expected_losses = read_losses(run), read_losses(alone)
    assert len(expected_losses) == 16
    assert max(expected_losses) - min(expected_losses) > 0.05
    assert losses == pytest.approx(expected_losses, abs=2e-4)
    with np.load(run / "predictions.npz") as two, np.load(alone / "predictions.npz") as one:
        assert len(two["index"]) == len(set(two["index"])) == 101
        assert np.array_equal(two["index"], one["index"])
        assert np.array_equal(two["label"], one["label"])
        assert np.allclose(two["probability"], one["probability"], atol=1e-4)


def test_processes_that_the_launcher_did_not_start_are_an_error(vit: Path, tmp_path: Path) -> None:
    command = accelerate("--cpu", "--num_processes", "2", "--mixed_precision", "no")
    done = run_recipe(command, vit, tmp_path)
    assert done.exit_code != 0
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert "asked for 2 processes, but training would run in 1" in message
    assert "accelerate launch --multi_gpu --num_processes 2" in message
    assert not (tmp_path / "runs").exists()


def test_mistake_under_a_launcher_is_said_once(vit: Path, tmp_path: Path) -> None:
    # The launcher kills all processes as soon as one has failed; the one that speaks is late here.
    late = tmp_path / "late"
    late.mkdir()
    code = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(2)\n"
    (late / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(late), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run_recipe(torchrun(), vit, tmp_path, "training_args.learning_ratee=1", PYTHONPATH=path)
    assert done.exit_code != 0
    said = [line for line in done.stderr.splitlines() if "did you mean learning_rate?" in line]
    assert len(said) == 1
    assert not (tmp_path / "runs").exists()


def test_accuracy_of_several_processes_is_that_of_the_saved_model(tmp_path: Path) -> None:
    # Batch norm's running statistics differ between processes after each step.
    arguments = ["recipe", "quickstart_untuned", *DATA, "training_args.eval_strategy=epoch"]
    arguments += ["training_args.per_device_train_batch_size=4"]
    run_fresh(arguments, tmp_path, command=torchrun(), environment=build_environment()).check()
    run = only_run(tmp_path / "runs")
    model = AutoModelForImageClassification.from_pretrained(run / "model").eval()
    assert any(name.endswith("running_mean") for name, _ in model.named_buffers())
    recipe = load_recipe(run / "recipe.json")
    normalization = open_model(recipe).normalization
    _, test = load_splits(recipe.dataset, 32, normalization.interpolation)
    batches = ImageBatches(test, Preprocessing(normalization, [], 0), "host", augment=False)
    with torch.no_grad():
        pixels = batches.__getitems__(list(range(len(test))))["pixel_values"]
        expected = model(pixel_values=pixels).logits.softmax(-1).amax(-1).numpy()
    with np.load(run / "predictions.npz") as found:
        assert found["probability"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["0", "1"])
def test_lost_process_is_said_with_what_is_kept_and_the_run_goes_on_alike(
    lost: str, vit: Path, tmp_path: Path
) -> None:
    overrides = [*DATA, f"model.name_or_path={vit}", "model.pretrained=true"]
    overrides += ["training_args.num_train_epochs=6", "training_args.per_device_train_batch_size=4"]
    arguments = ["recipe", "quickstart_untuned", *overrides]
    environment = build_environment()
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*torchrun(), *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        wait_until_written(tmp_path, "runs/*/*/checkpoints/checkpoint-*/manifest.json")
        (rank,) = (
            child
            for child in psutil.Process(process.pid).children()
            if child.environ().get("RANK") == lost
        )
        rank.kill()
        assert process.wait(timeout=60) != 0
    text = (tmp_path / "said").read_text("utf-8")
    offered = [line for line in text.splitlines() if "Go on with the same command and" in line]
    assert len(offered) == 1, text
    run = only_run(tmp_path / "runs")
    assert f"What was done until its checkpoint is in runs/{run.parent.name}/{run.name}." in text

    for folder, more in ((tmp_path, ["--resume"]), (tmp_path, ["-o", "whole"])):
        run_fresh([*arguments, *more], folder, command=torchrun(), environment=environment).check()
    whole = only_run(tmp_path / "whole")
    with np.load(run / "predictions.npz") as one, np.load(whole / "predictions.npz") as two:
        assert all(np.array_equal(one[name], two[name]) for name in two)
    assert read_losses(run) == read_losses(whole)
