"""Trainer callbacks: the log file, and stopping on Ctrl-C so that the run can go on later."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class LogFile(TrainerCallback):
    """Append Trainer's log entries to ``log.jsonl``, with step, epoch and seconds of training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drop what was logged after the checkpoint that a resumed run goes on from."""
        self.start = time.perf_counter()
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text("utf-8").splitlines(keepends=True)
            kept = [
                line
                for line in lines
                if line.endswith("\n") and json.loads(line)["step"] <= state.global_step
            ]
            self.path.write_text("".join(kept), "utf-8")

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
            entry |= {
                key: value if value == value and abs(value) != float("inf") else None
                for key, value in logs.items()
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, allow_nan=False) + "\n")


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, end the current step, write a checkpoint and stop.

    On a second one, stop at once. Only for a single process: several would have to agree on the
    step, and their launcher kills them anyway. They go on from the last checkpoint.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.process = os.getpid()

    @contextmanager
    def listen(self, single_process: bool) -> Iterator[None]:
        """Catch the signals while inside."""
        if not single_process or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data loader's worker, which inherited this handler
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        logger.warning(
            "Stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once."
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask the Trainer to save and stop."""
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Do not evaluate and save again: the Trainer takes a stop for the end of an epoch."""
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = control.should_evaluate = False
