"""The log file, and stopping on a signal."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hfbench.errors import Interrupted
from hfbench.results.schema import find_runs
from hfbench.training.callbacks import LogFile, StopOnSignal
from hfbench.training.run import run_recipe
from tests.builders import TIMM, make_trainer, tiny_recipe, vit_config, write_model


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read every line of a log."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    """Return arguments that no callback looks at."""
    return TrainingArguments(output_dir=str(tmp_path / "unused"), use_cpu=True)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """Return the folder of a tiny ViT for ten classes."""
    return write_model(tmp_path / "vit", vit_config())


def state_at(step: int, epoch: float = 0.0) -> TrainerState:
    """Return the state of the main process at a step."""
    return TrainerState(global_step=step, epoch=epoch, max_steps=100)


# The log


def test_log_has_step_epoch_and_seconds(args: TrainingArguments, tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log.jsonl")
    log.on_train_begin(args, state_at(0), TrainerControl())
    log.on_log(args, state_at(3, 0.5), TrainerControl(), {"loss": 1.5})
    log.on_log(args, state_at(6, 1.0), TrainerControl(), {"eval_loss": 1.25})
    first, second = read_log(tmp_path / "log.jsonl")
    assert 0 <= first.pop("seconds") <= second.pop("seconds")
    assert first == {"step": 3, "epoch": 0.5, "loss": 1.5}
    assert second == {"step": 6, "epoch": 1.0, "eval_loss": 1.25}


def test_numbers_that_json_lacks_become_null(args: TrainingArguments, tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log.jsonl")
    values = {"loss": float("nan"), "grad_norm": float("inf"), "learning_rate": -float("inf")}
    log.on_log(args, state_at(1), TrainerControl(), values)
    text = (tmp_path / "log.jsonl").read_text("utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert {json.loads(text)[name] for name in values} == {None}


def test_log_is_cut_back_to_the_checkpoint(args: TrainingArguments, tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log.jsonl")
    for step in (2, 4, 6):
        log.on_log(args, state_at(step), TrainerControl(), {"loss": 1.0})
    with log.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    state = state_at(4)
    state.log_history = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 1.0}]
    log.on_train_begin(args, state, TrainerControl())
    assert [entry["step"] for entry in read_log(log.path)] == [2, 4]
    assert all(entry["seconds"] is not None for entry in read_log(log.path))


def test_damaged_log_is_written_anew_from_the_checkpoint(
    args: TrainingArguments, tmp_path: Path
) -> None:
    log = LogFile(tmp_path / "log.jsonl")
    log.path.write_bytes(b'{"step": 2, "loss": 1.5, "seconds": 3.0}\n\x00\xff[[[\n')
    state = state_at(6)
    state.log_history = [
        {"step": 2, "loss": 1.5},
        {"step": 4, "loss": float("nan"), "epoch": 0.5},
        {"step": 6, "loss": 0.5, "epoch": 1.0},
    ]
    log.on_train_begin(args, state, TrainerControl())
    assert read_log(log.path) == [
        {"step": 2, "loss": 1.5, "seconds": 3.0},
        {"step": 4, "epoch": 0.5, "seconds": None, "loss": None},
        {"step": 6, "epoch": 1.0, "seconds": None, "loss": 0.5},
    ]


def test_other_processes_do_not_write(args: TrainingArguments, tmp_path: Path) -> None:
    log, state = LogFile(tmp_path / "log.jsonl"), state_at(1)
    state.is_world_process_zero = False
    log.on_train_begin(args, state, TrainerControl())
    log.on_log(args, state, TrainerControl(), {"loss": 1.0})
    assert not log.path.exists()


def test_run_logs_every_step_and_evaluation(tmp_path: Path) -> None:
    result = run_recipe(tiny_recipe(eval_strategy="epoch"), tmp_path)
    log = read_log(tmp_path / "tiny" / result.run_id / "log.jsonl")
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 13))
    assert [entry["epoch"] for entry in log if "eval_accuracy" in entry] == [1.0, 2.0]
    assert result.metrics.test is not None
    last = [entry for entry in log if "eval_accuracy" in entry][-1]
    assert last["eval_accuracy"] == result.metrics.test.accuracy
    assert last["eval_f1_macro"] == result.metrics.test.f1_macro


# Signals


def test_signal_outside_is_not_caught() -> None:
    stop = StopOnSignal()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop.listen(single_process=True):
        assert signal.getsignal(signal.SIGINT) != before[0]
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.stopped
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_second_signal_stops_at_once() -> None:
    stop = StopOnSignal()
    with stop.listen(single_process=True):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.stopped
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_several_processes_leave_signals_to_the_launcher() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopOnSignal().listen(single_process=False):
        assert signal.getsignal(signal.SIGINT) == before


def test_thread_cannot_and_does_not_listen() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with StopOnSignal().listen(single_process=True):
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_stop_in_the_last_step_changes_nothing(args: TrainingArguments) -> None:
    stop, control = StopOnSignal(), TrainerControl()
    stop.stopped = True
    stop.on_step_end(args, state_at(100), control)
    assert not control.should_training_stop
    stop.on_step_end(args, state_at(99), control)
    assert control.should_training_stop


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send a signal while a step is computed."""

    def on_step_begin(
        self: LogFile,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if state.global_step == step - 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(LogFile, "on_step_begin", on_step_begin)


@pytest.mark.parametrize(
    ("model", "step", "number"),
    [("vit", 4, signal.SIGINT), ("vit", 6, signal.SIGTERM), (TIMM, 9, signal.SIGINT)],
)
def test_stopped_run_goes_on_to_the_same_end(
    model: str,
    step: int,
    number: int,
    vit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Step 6 is the last of the first epoch: Trainer saves and evaluates there of its own accord.
    recipe = tiny_recipe(
        vit if model == "vit" else model,
        pretrained=model == "vit",
        preprocessing={"augmentation": ["random_crop", "horizontal_flip"]},
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    whole = run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, number)
        with pytest.raises(Interrupted, match=r"Stopped; .* Go on with .* --resume"):
            run_recipe(recipe, tmp_path / "parts")
    (run,) = find_runs(tmp_path / "parts")
    assert not run.finished
    assert (run.folder / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").is_file()
    assert not (run.folder / "model").exists()

    resumed = run_recipe(recipe, tmp_path / "parts", resume=True)
    assert resumed.run_id == run.folder.name
    assert resumed.training.sessions == 2
    assert resumed.training.optimizer_steps == whole.training.optimizer_steps == 12
    assert resumed.metrics == whole.metrics
    one = np.load(tmp_path / "whole" / "tiny" / whole.run_id / "predictions.npz")
    two = np.load(run.folder / "predictions.npz")
    assert all(np.array_equal(one[name], two[name]) for name in one.files)
    steps = [entry["step"] for entry in read_log(run.folder / "log.jsonl") if "loss" in entry]
    assert steps == list(range(1, 13))
    assert not (run.folder / "checkpoints").exists()


def test_signal_in_the_last_step_lets_the_run_finish(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 12)
    result = run_recipe(tiny_recipe(vit, pretrained=True), tmp_path)
    assert result.training.optimizer_steps == 12


def test_second_signal_in_training_leaves_the_run_resumable(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(vit, pretrained=True, save_strategy="steps", save_steps=2)
    with monkeypatch.context() as patch:

        def on_step_begin(
            self: LogFile,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            **_: Any,
        ) -> None:
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(LogFile, "on_step_begin", on_step_begin)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path)
    (run,) = find_runs(tmp_path)
    names = {path.name for path in (run.folder / "checkpoints").glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-4"}
    assert run_recipe(recipe, tmp_path, resume=True).training.sessions == 2


def test_stopping_saves_whatever_the_recipe_says_about_saving(vit: Path, tmp_path: Path) -> None:
    stop = StopOnSignal()
    stop.stopped = True
    trainer = make_trainer(tiny_recipe(vit, pretrained=True), tmp_path / "run", [stop])
    trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
