"""Trainer callbacks: the log file, and stopping on Ctrl-C so that the run can go on later."""

from __future__ import annotations

import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfbench.errors import first_line
from hfbench.machine.bounds import parse_json
from hfbench.machine.signals import caught

logger = logging.getLogger(__name__)


class LogFile(TrainerCallback):
    """Append Trainer's log entries to ``log.jsonl``, with step, epoch and seconds of training."""

    def __init__(self, path: Path, before: float = 0.0) -> None:
        """Begin a log, or go on with one.

        Args:
            path: Of the file.
            before: Seconds of training in earlier sessions.
        """
        self.path, self.before = path, before
        self._lost = False  # lines, as was said
        self.start = time.perf_counter() - before

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep what the checkpoint that a resumed run goes on from has seen, and nothing else.

        Lines that are damaged or missing are written anew from the checkpoint, which knows all but
        their seconds.
        """
        self.start = time.perf_counter() - self.before
        if not state.is_world_process_zero or not (self.path.exists() or state.log_history):
            return
        there = self._read()
        lines, damaged = [], 0
        for number, known in enumerate(state.log_history):
            entry = _clean(known)
            old = there[number] if number < len(there) else None
            if old is None or any(old.get(key) != value for key, value in entry.items()):
                damaged += 1
                old = {"step": entry["step"], "epoch": entry.get("epoch"), "seconds": None} | entry
            lines.append(json.dumps(old, allow_nan=False) + "\n")
        if damaged:
            logger.warning(
                f"{self.path}: {damaged} of {len(lines)} lines were missing or damaged, and are "
                "written anew from the checkpoint, without their seconds."
            )
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(lines), "utf-8")
        partial.replace(self.path)

    def _say_lost(self, error: OSError) -> None:
        if not self._lost:
            logger.warning(f"Lines of {self.path} are lost, since they cannot be written: {error}")
        self._lost = True

    def _read(self) -> list[dict[str, Any] | None]:
        """Return what each line of the file holds; ``None`` where it cannot be read."""
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return []
        found: list[dict[str, Any] | None] = []
        for line in lines:
            try:
                entry = parse_json(line)
            except ValueError:
                entry = None
            found.append(entry if isinstance(entry, dict) else None)
        return found

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        """Write one line; numbers that JSON does not have become null."""
        if state.is_world_process_zero:
            entry = {
                "step": state.global_step,
                "epoch": state.epoch,
                "seconds": time.perf_counter() - self.start,
            }
            entry |= _clean(logs)
            try:
                _append(self.path, json.dumps(entry, allow_nan=False) + "\n")
            except OSError as error:  # a line is not worth a run
                self._say_lost(error)


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


class PatientTracker(TrainerCallback):
    """A tracker that is dropped, with a warning, as soon as it fails: it must not cost a run."""

    def __init__(self, tracker: TrainerCallback) -> None:
        self.tracker: TrainerCallback | None = tracker

    def tell(self, event: str, *args: Any, **kwargs: Any) -> Any:
        """Pass an event of Trainer on, while the tracker works."""
        if self.tracker is None:
            return None
        try:
            return getattr(self.tracker, event)(*args, **kwargs)
        except Exception as error:  # trackers raise whatever their servers and libraries do
            logger.warning(
                f"{type(self.tracker).__name__} failed and is left out from here on; the run goes "
                f"on: {first_line(error)}"
            )
            self.tracker = None
            return None


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(PatientTracker, _event, partialmethod(PatientTracker.tell, _event))


def _clean(logs: dict[str, Any]) -> dict[str, Any]:
    """Return log values with null for numbers that JSON does not have."""
    return {
        key: value if value == value and abs(value) != float("inf") else None
        for key, value in logs.items()
    }


class StopOnSignal(TrainerCallback):
    """On Ctrl-C, SIGTERM or SIGHUP while training, let the current step end, save and stop.

    On a second one, and outside of training, stop at once. Only for a single process: several would
    have to agree on the step, and their launcher kills them anyway. They go on from the last
    checkpoint.

    Attributes:
        stopped: Whether a signal came while training; `ResumableTrainer` saves.
    """

    def __init__(self) -> None:
        self.stopped = False

    def listen(self, single_process: bool) -> AbstractContextManager[None]:
        """Let a first signal end the step, and a second one everything, while inside."""
        return caught(self._end_step) if single_process else nullcontext()

    def _end_step(self) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        logger.warning(
            "Stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once."
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask the Trainer to stop."""
        if self.stopped and state.global_step < state.max_steps:
            control.should_training_stop = True
