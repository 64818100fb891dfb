"""A run that was stopped anywhere ends like one that was not, and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from hfbench.errors import Interrupted
from hfbench.recipe.schema import Recipe
from hfbench.results.folder import tidy_up
from hfbench.results.manifest import find_damage, newest_checkpoint, seal
from hfbench.results.schema import Result, find_runs
from hfbench.training.hub import PushTarget, push
from hfbench.training.run import run_recipe
from hfbench.training.trainer import BenchTrainer
from tests.builders import make_trainer, tiny_recipe, vit_config, write_model
from tests.damages import DAMAGES, flip

# Of these a log line says how fast something was, which no two runs agree on.
TIMES = ("seconds", "runtime", "per_second", "train_loss")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny ViT with dropout, whose end depends on the random generators."""
    config = vit_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    return write_model(tmp_path_factory.mktemp("models") / "vit", config)


def make(vit: Path, **arguments: Any) -> Recipe:
    """Return a recipe of two epochs of six steps."""
    return tiny_recipe(
        vit, pretrained=True, preprocessing={"augmentation": ["random_crop"]}, **arguments
    )


def folder_of(root: Path) -> Path:
    """Return the folder of the only run."""
    (run,) = find_runs(root)
    return run.folder


def log_of(root: Path) -> list[dict[str, Any]]:
    """Return the log of the only run, without what a clock said."""
    lines = (folder_of(root) / "log.jsonl").read_text("utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith(TIMES)}
        for line in lines
    ]


def assert_same_end(one: Path, two: Path) -> None:
    """Assert that two folders' only runs left the same weights, predictions and log."""
    first, second = folder_of(one), folder_of(two)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (first, second)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    predictions = [np.load(folder / "predictions.npz") for folder in (first, second)]
    for name in predictions[0].files:
        assert np.array_equal(predictions[0][name], predictions[1][name])
    assert log_of(one) == log_of(two)


def interrupt(*args: Any, **kwargs: Any) -> None:
    """Do what Ctrl-C does."""
    raise KeyboardInterrupt


def stop_when(
    monkeypatch: pytest.MonkeyPatch, where: str, when: Callable[[BenchTrainer], bool]
) -> None:
    """Send SIGTERM where a trainer calls a method, once."""
    original = getattr(BenchTrainer, where)
    done: list[bool] = []

    def method(self: BenchTrainer, *args: Any, **kwargs: Any) -> Any:
        if not done and when(self):
            done.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(BenchTrainer, where, method)


@pytest.fixture(scope="module")
def whole(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return what gives the folder of an undisturbed run of some arguments."""
    made: dict[str, Path] = {}

    def run(**arguments: Any) -> Path:
        key = json.dumps(arguments, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            run_recipe(make(vit, **arguments), made[key])
        return made[key]

    return run


EPOCHS = {"eval_strategy": "epoch", "logging_strategy": "epoch"}
STEPS = {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 5}


@pytest.mark.parametrize(
    ("arguments", "where", "step"),
    [
        (EPOCHS, "training_step", 5),  # the last of an epoch: its evaluation is still due
        (EPOCHS, "training_step", 3),  # Trainer takes the stop for the end of the epoch
        (EPOCHS, "prediction_step", 6),  # in the evaluation
        (EPOCHS | {"save_strategy": "epoch"}, "prediction_step", 12),  # in the last one
        (EPOCHS, "prediction_step", 12),
        (STEPS, "training_step", 3),  # its evaluation is due
        (STEPS, "prediction_step", 8),
        (STEPS | {"save_strategy": "steps", "save_steps": 3}, "training_step", 6),
    ],
)
def test_stopped_run_leaves_the_same_weights_and_the_same_log(
    arguments: dict[str, Any],
    where: str,
    step: int,
    vit: Path,
    whole: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        stop_when(patch, where, lambda trainer: trainer.state.global_step == step)
        with pytest.raises(Interrupted, match="--resume"):
            run_recipe(make(vit, **arguments), tmp_path)
    result = run_recipe(make(vit, **arguments), tmp_path, resume=True)
    assert result.training.sessions == 2
    assert_same_end(whole(**arguments), tmp_path)


def test_kill_between_a_checkpoint_and_the_end_of_its_epoch_loses_no_evaluation(
    vit: Path, whole: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = EPOCHS | {"save_strategy": "steps", "save_steps": 3}

    def die(self: BenchTrainer, *args: Any, **kwargs: Any) -> Any:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(BenchTrainer, "evaluate", die)
        with pytest.raises(SystemExit):
            run_recipe(make(vit, **arguments), tmp_path)
    run_recipe(make(vit, **arguments), tmp_path, resume=True)
    assert_same_end(whole(**arguments), tmp_path)


@pytest.mark.parametrize(
    "save", [{"save_strategy": "epoch"}, STEPS | {"save_strategy": "steps", "save_steps": 4}]
)
def test_kill_after_an_evaluation_and_its_checkpoint_evaluates_once(
    save: dict[str, Any],
    vit: Path,
    whole: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = EPOCHS | save
    original = BenchTrainer.training_step

    def die(self: BenchTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 7:
            raise SystemExit(9)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BenchTrainer, "training_step", die)
        with pytest.raises(SystemExit):
            run_recipe(make(vit, **arguments), tmp_path)
    run_recipe(make(vit, **arguments), tmp_path, resume=True)
    assert_same_end(whole(**arguments), tmp_path)


@pytest.mark.parametrize("place", ["metrics.score", "plots.plot_curves", "save_model", "record"])
def test_nothing_after_the_last_step_can_lose_the_training(
    place: str, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"hfbench.training.run.{place}", interrupt)
        with pytest.raises(Interrupted, match=r"Stopped; what was trained .* --resume"):
            run_recipe(make(vit), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(BenchTrainer, "training_step", interrupt)  # nothing is trained again
        result = run_recipe(make(vit), tmp_path, resume=True)
    assert (result.training.sessions, result.training.optimizer_steps) == (2, 12)
    assert not (folder_of(tmp_path) / "checkpoints").exists()
    assert result.metrics == run_recipe(make(vit), tmp_path / "whole").metrics


def test_checkpoint_after_the_last_step_is_in_no_time_of_the_run(vit: Path, tmp_path: Path) -> None:
    times = run_recipe(make(vit), tmp_path).times
    assert times.save_seconds == 0
    assert times.keeping_seconds > 0


def test_model_is_there_before_it_is_evaluated(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*args: Any, **kwargs: Any) -> None:
        assert (folder_of(tmp_path) / "model" / "model.safetensors").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("hfbench.training.run.metrics.score", look)
    with pytest.raises(Interrupted):
        run_recipe(make(vit), tmp_path)


@pytest.mark.parametrize("place", ["load_inputs", "assemble", "_prepare_folder"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_in_set_up_leaves_nothing_and_says_so(
    number: int, place: str, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(f"hfbench.training.run.{place}", interrupt)
    with pytest.raises(Interrupted, match="before anything was trained; nothing is left behind"):
        run_recipe(make(vit), tmp_path / "runs")
    assert list(find_runs(tmp_path / "runs")) == []


def test_stop_that_a_library_turns_into_another_error_is_a_stop(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*args: Any, **kwargs: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("Invalid bounding box") from None

    monkeypatch.setattr("hfbench.training.run.plots.plot_curves", draw)
    with pytest.raises(Interrupted, match=r"what was trained is in .* --resume"):
        run_recipe(make(vit), tmp_path)


def test_stop_in_the_set_up_of_a_resumed_run_says_what_is_kept(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_when(patch, "training_step", lambda trainer: trainer.state.global_step == 3)
        with pytest.raises(Interrupted):
            run_recipe(make(vit), tmp_path)

    monkeypatch.setattr("hfbench.training.run.load_inputs", interrupt)
    with pytest.raises(Interrupted, match=r"what was done is in .* --resume"):
        run_recipe(make(vit), tmp_path, resume=True)
    assert newest_checkpoint(folder_of(tmp_path)) is not None


def test_hang_up_saves_and_one_that_is_ignored_stays_ignored(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(self: BenchTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return original(self, *args, **kwargs)

    original = BenchTrainer.training_step
    monkeypatch.setattr(BenchTrainer, "training_step", hang_up)
    with pytest.raises(Interrupted, match="--resume"):
        run_recipe(make(vit), tmp_path / "heard")
    checkpoint = newest_checkpoint(folder_of(tmp_path / "heard"))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = run_recipe(make(vit), tmp_path / "nohup")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.training.optimizer_steps == 12


def test_steps_read_nothing_from_the_device(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(value: Any) -> None:
        raise AssertionError("this would wait for the device in each step")

    monkeypatch.setattr("hfbench.training.resuming._finite", read)
    make_trainer(make(vit, logging_strategy="no"), tmp_path / "run").train()


# Checkpoints


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Return a run's folder with two sealed checkpoints of three files each."""
    for step in (4, 12):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "trainer_state.json", "rng_state.pth"):
            (folder / name).write_bytes(name.encode() * 50)
        seal(folder)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "trainer_state.json", "rng_state.pth", "manifest.json"]
)
def test_newest_whole_checkpoint_is_taken_whatever_is_damaged(
    name: str, damage: str, checkpoints: Path
) -> None:
    older, newer = (checkpoints / "checkpoints" / f"checkpoint-{step}" for step in (4, 12))
    assert newest_checkpoint(checkpoints) == newer
    DAMAGES[damage](newer / name)
    problem = find_damage(newer)
    assert problem is not None
    assert name in problem or name == "manifest.json"  # which then says so of another
    assert newest_checkpoint(checkpoints) == older
    DAMAGES[damage](older / name)
    assert newest_checkpoint(checkpoints) is None


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {}}', '{"files": {"a": 1}}', "nul"])
def test_manifest_that_lists_nothing_is_damaged(content: str, checkpoints: Path) -> None:
    folder = checkpoints / "checkpoints" / "checkpoint-12"
    (folder / "manifest.json").write_text(content)
    assert find_damage(folder) == "manifest.json is damaged"


def test_checkpoint_that_is_being_replaced_is_kept_until_the_new_one_is_sealed(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After the last step there is one of our own; the recipe's, after the evaluation, replaces it.
    arguments = EPOCHS | {"save_strategy": "epoch", "save_total_limit": 1}

    def die(folder: Path) -> None:
        if folder.name == "checkpoint-12" and (folder.parent / "before-checkpoint-12").exists():
            raise SystemExit(9)
        seal(folder)

    with monkeypatch.context() as patch:
        patch.setattr("hfbench.training.resuming.seal", die)
        with pytest.raises(SystemExit):
            run_recipe(make(vit, **arguments), tmp_path)
    place = folder_of(tmp_path)
    shutil.rmtree(place / "checkpoints" / "checkpoint-6", ignore_errors=True)
    found = newest_checkpoint(place)
    assert found == place / "checkpoints" / "checkpoint-12"
    assert find_damage(found) is None


def test_run_without_a_whole_checkpoint_starts_from_its_first_step(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_when(patch, "training_step", lambda trainer: trainer.state.global_step == 3)
        with pytest.raises(Interrupted):
            run_recipe(make(vit), tmp_path)
    flip(folder_of(tmp_path) / "checkpoints" / "checkpoint-4" / "optimizer.pt")
    result = run_recipe(make(vit), tmp_path, resume=True)
    assert (result.training.sessions, result.training.optimizer_steps) == (1, 12)


# What is left behind


def test_weights_are_as_readable_as_the_rest(vit: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run_recipe(make(vit), tmp_path)
    finally:
        os.umask(before)
    modes = {
        stat.S_IMODE(path.stat().st_mode) for path in (folder_of(tmp_path) / "model").iterdir()
    }
    assert modes == {0o640}


def test_leftovers_of_a_finished_run_are_removed_by_who_comes_next(
    vit: Path, tmp_path: Path
) -> None:
    result = run_recipe(make(vit), tmp_path)
    folder = folder_of(tmp_path)
    (folder / "model" / ".tmp123").write_bytes(b"half")
    (folder / ".result.json.partial").write_bytes(b"half")
    (folder / "checkpoints" / "checkpoint-12").mkdir(parents=True)
    (folder / ".lock").touch()
    assert run_recipe(make(vit), tmp_path) == result  # finished already
    left = {path.name for path in folder.rglob("*")}
    assert not left & {".tmp123", ".result.json.partial", "checkpoints", ".lock"}
    assert "model.safetensors" in left
    tidy_up(folder)
    assert {path.name for path in folder.rglob("*")} == left


def test_nothing_but_the_models_own_files_is_pushed(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result: Result = run_recipe(make(vit), tmp_path)
    folder = folder_of(tmp_path)
    (folder / "model" / ".tmp123").write_bytes(b"half")
    (folder / "model" / "notes.txt").write_text("mine")
    (folder / "model" / "optimizer.pt").write_bytes(b"")
    sent: list[str] = []

    class Api:
        endpoint = "https://hub.example"

        def create_repo(self, *args: Any, **kwargs: Any) -> Any:
            return type("Url", (), {"repo_id": "me/tiny"})

        def create_commit(self, repo_id: str, operations: Any, **kwargs: Any) -> Any:
            sent.extend(operation.path_in_repo for operation in operations)
            return type("Commit", (), {"oid": "0"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    push(result, folder, PushTarget("me/tiny", None, None))
    assert set(sent) == {
        "README.md",
        "config.json",
        "confusion.png",
        "curves.png",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.json",
        "result.json",
    }
