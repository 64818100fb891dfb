"""Trainer callbacks: the log file, and stopping on Ctrl-C so that the run can go on later."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfbench.errors import first_line

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
                entry = json.loads(line)
            except (ValueError, RecursionError):
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


def _signals() -> list[int]:
    """Return what ends a run; a hang-up that is ignored, as under nohup, stays ignored."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    heard = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([hangup] if hangup is not None and heard else [])]


class StopOnSignal(TrainerCallback):
    """On Ctrl-C, SIGTERM or SIGHUP while training, let the current step end, save and stop.

    On a second one, and outside of training, stop at once. Only for a single process: several would
    have to agree on the step, and their launcher kills them anyway. They go on from the last
    checkpoint.

    Attributes:
        stopped: Whether a signal came while training; `ResumableTrainer` saves.
        interrupted: Whether one came outside of it. Libraries in C may make something else of the
            `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.stopped = self.interrupted = False
        self.process = os.getpid()

    @contextmanager
    def listen(self, single_process: bool) -> Iterator[None]:
        """Let a first signal end the step, and a second one everything, while inside."""
        with self._catch(single_process, self._end_step):
            yield

    @contextmanager
    def listen_outside(self, single_process: bool) -> Iterator[None]:
        """Let SIGTERM and SIGHUP do what Ctrl-C does, while inside and not in `listen`."""
        with self._catch(single_process, self._interrupt):
            yield

    @contextmanager
    def _catch(self, single_process: bool, handle: Callable[[], None]) -> Iterator[None]:
        if not single_process or threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            if os.getpid() == self.process:
                handle()
            elif number != signal.SIGINT:  # a data loader's worker, which inherited this handler
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        before = {number: signal.signal(number, on_signal) for number in _signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end_step(self) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        logger.warning(
            "Stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once."
        )

    def _interrupt(self) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask the Trainer to stop."""
        if self.stopped and state.global_step < state.max_steps:
            control.should_training_stop = True
