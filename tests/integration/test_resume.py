"""A run that was stopped or killed goes on, and ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.hub_content import write_vit_checkpoint
from tests.integration.commands import (
    SHORT,
    Done,
    Running,
    WarmCommand,
    only_run,
    read_result,
    wait_until_written,
)

# 4 epochs of 7 steps, a checkpoint after each.
LONG = ("dataset.max_train_samples=200", "training_args.num_train_epochs=4")
FIRST_CHECKPOINT = "runs/*/*/checkpoints/checkpoint-7/manifest.json"


def start_and_wait_for_checkpoint(
    warm: WarmCommand, recipe: list[str], folder: Path
) -> tuple[Running, Path]:
    """Start a run; return it, and its folder, as soon as it has written a checkpoint."""
    running = warm.start(recipe, folder)
    checkpoint = wait_until_written(folder, FIRST_CHECKPOINT)
    return running, checkpoint.parents[2]


def read_evaluations(run: Path) -> list[tuple[int, float]]:
    """Return step and test loss of each evaluation that was logged."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]


def assert_ended_like(run: Path, uninterrupted: Path) -> None:
    """Compare everything that a resume must not change."""
    ours, theirs = read_result(run), read_result(uninterrupted)
    with (
        np.load(run / "predictions.npz") as one,
        np.load(uninterrupted / "predictions.npz") as other,
    ):
        assert set(one) == set(other)
        for name in one:
            assert np.array_equal(one[name], other[name]), name
    assert ours["metrics"] == theirs["metrics"]
    assert (ours["training"]["sessions"], theirs["training"]["sessions"]) == (2, 1)
    for name in ("optimizer_steps", "epochs"):
        assert ours["training"][name] == theirs["training"][name]
    assert read_evaluations(run) == read_evaluations(uninterrupted)
    losses = [result["training"]["train_loss"] for result in (ours, theirs)]
    assert losses[0] == pytest.approx(
        losses[1], abs=0.05
    )  # its mean over all steps of all sessions
    assert not (run / "checkpoints").exists()


def assert_stopped_politely(done: Done, run: Path) -> None:
    """Assert that the message of a stopped run says how to go on."""
    assert done.exit_code == 130
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Stopped; what was done is in runs/quickstart_untuned/")
    assert run.name in last
    assert last.endswith("Go on with the same command and --resume.")
    assert not (run / "result.json").exists()


def test_interrupted_vit_goes_on_and_ends_the_same(warm: WarmCommand, tmp_path: Path) -> None:
    # Trainer itself would load the head alone and leave a ViT's body as it is.
    model = tmp_path / "tiny-vit"
    write_vit_checkpoint(model, image_size=32, patch_size=8)
    recipe = ["recipe", "quickstart_untuned", *LONG]
    recipe += ["model.name_or_path=tiny-vit", "model.pretrained=true"]
    running, run = start_and_wait_for_checkpoint(warm, recipe, tmp_path)
    running.send(signal.SIGINT)
    assert_stopped_politely(running.wait(), run)

    assert "unfinished" in warm.run(["list"], tmp_path).check().stdout
    said = warm.run(["compare", run, run], tmp_path).refused()
    assert "not finished" in said
    assert "--resume" in said

    resumed = warm.run([*recipe, "--resume"], tmp_path).check()
    assert f"Going on with runs/quickstart_untuned/{run.name}." in resumed.stderr
    assert only_run(tmp_path / "runs") == run
    warm.run([*recipe, "-o", "whole"], tmp_path).check()
    assert_ended_like(run, only_run(tmp_path / "whole"))


def test_killed_resnet_goes_on_from_its_newest_whole_checkpoint(
    warm: WarmCommand, tmp_path: Path
) -> None:
    recipe = ["recipe", "quickstart_untuned", *LONG, "training_args.save_total_limit=3"]
    running, run = start_and_wait_for_checkpoint(warm, recipe, tmp_path)
    running.send(signal.SIGKILL)
    assert running.wait().exit_code == -signal.SIGKILL
    broken = run / "checkpoints" / "checkpoint-27"  # as a kill while saving leaves it
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")

    resumed = warm.run([*recipe, "--resume"], tmp_path).check()
    assert "checkpoint-27 is not whole and is left out." in resumed.stderr
    assert only_run(tmp_path / "runs") == run
    warm.run([*recipe, "-o", "whole"], tmp_path).check()
    assert_ended_like(run, only_run(tmp_path / "whole"))


def test_termination_saves_a_checkpoint_and_a_second_signal_stops_at_once(
    warm: WarmCommand, tmp_path: Path
) -> None:
    recipe = ["recipe", "quickstart_untuned", *LONG, "training_args.save_strategy=no"]
    running = warm.start(recipe, tmp_path)
    wait_until_written(tmp_path, "runs/*/*/log.jsonl")
    running.send(signal.SIGTERM)
    run = only_run(tmp_path / "runs")
    assert_stopped_politely(running.wait(), run)
    assert list(run.glob("checkpoints/checkpoint-*/trainer_state.json"))

    running = warm.start([*recipe, "-o", "twice"], tmp_path)
    wait_until_written(tmp_path, "twice/*/*/log.jsonl")
    running.send(signal.SIGINT)
    running.send(signal.SIGINT)
    done = running.wait()
    assert done.exit_code == 130
    assert "Traceback" not in done.stderr


def test_nothing_to_resume_is_said_and_the_run_starts(warm: WarmCommand, tmp_path: Path) -> None:
    recipe = ["recipe", "quickstart_untuned", *SHORT, "--resume"]
    first = warm.run(recipe, tmp_path).check()
    assert "There is no unfinished run of this recipe; starting anew." in first.stderr
    assert read_result(only_run(tmp_path / "runs"))["training"]["sessions"] == 1
    again = warm.run(recipe, tmp_path).check()
    assert "Already finished" in again.stderr
    only_run(tmp_path / "runs")


def test_unfinished_run_of_other_settings_is_not_resumed(warm: WarmCommand, tmp_path: Path) -> None:
    recipe = ["recipe", "quickstart_untuned", *LONG]
    running, run = start_and_wait_for_checkpoint(warm, recipe, tmp_path)
    running.send(signal.SIGKILL)
    running.wait()
    other = warm.run(["recipe", "quickstart_untuned", *SHORT, "--resume"], tmp_path).check()
    assert "no unfinished run of this recipe (1 of that name have other settings)" in other.stderr
    assert not (run / "result.json").exists()
    assert len(list(run.parent.iterdir())) == 2
