"""How a suite stands, and how far a run has come, read from its log while it is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hfbench.recipe import Recipe
from hfbench.result import LOG_FILE, Result
from hfbench.schedule import PlannedRun

_DEFAULT_EPOCHS = 3.0  # of TrainingArguments, whose import takes seconds


@dataclass(frozen=True)
class RunProgress:
    """Where a run stood when it last logged something.

    Attributes:
        step: Optimizer steps made.
        steps: Optimizer steps in all.
        left_seconds: For the rest of the training at this session's pace.
    """

    step: int
    steps: int
    left_seconds: float


State = Literal["waiting", "running", "finished", "failed"]


@dataclass
class SuiteRun:
    """One run of a suite, as it stands.

    Attributes:
        planned: What it is.
        state: ``finished`` from the start if an earlier run counts.
        result: Once finished.
        seconds: Wall time of its process; ``None`` before it runs, and if an earlier run counts.
        progress: While it runs, once training has begun and something was logged.
        exit_code: Of a failed one; negative after a signal.
        reason: Why it failed, a few lines.
        waits_for: Folder in which another process still runs this recipe.
        log: Output of its process, once it was started.
    """

    planned: PlannedRun
    state: State = "waiting"
    result: Result | None = None
    seconds: float | None = None
    progress: RunProgress | None = None
    exit_code: int | None = None
    reason: list[str] = field(default_factory=list)
    waits_for: Path | None = None
    log: Path | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.planned.recipe.name}, seed {self.planned.seed}"


@dataclass(frozen=True)
class Progress:
    """How a suite stands.

    Attributes:
        runs: All of them, in their order.
        changed: Whose state has just changed; ``None`` if only time has passed.
        elapsed_seconds: Since the suite was started.
        left_seconds: Estimate of the time that is left.
        left_is_known: Whether `left_seconds` counts all runs; else it is a lower bound.
        stopping: Whether it was asked to stop.
    """

    runs: Sequence[SuiteRun]
    changed: SuiteRun | None
    elapsed_seconds: float
    left_seconds: float
    left_is_known: bool
    stopping: bool = False


def read_progress(folder: Path, recipe: Recipe) -> RunProgress | None:
    """Read how far an unfinished run is.

    Args:
        folder: Of the run.
        recipe: Says when it ends.

    Returns:
        ``None`` before this session has logged anything.
    """
    try:
        text = (folder / LOG_FILE).read_text("utf-8")
        entries = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
    except (OSError, ValueError):
        return None
    if not entries or not entries[-1]["step"]:
        return None
    last, steps = entries[-1], _count_steps(entries[-1], recipe)
    begun = _session_start(entries)
    made = last["step"] - begun
    if made <= 0 or not steps:
        return None
    left = max(steps - last["step"], 0) * last["seconds"] / made
    return RunProgress(last["step"], steps, left)


def _count_steps(entry: dict[str, Any], recipe: Recipe) -> int:
    most = recipe.training_args.get("max_steps", -1)
    if most > 0:
        return int(most)
    epochs = recipe.training_args.get("num_train_epochs", _DEFAULT_EPOCHS)
    return round(epochs * entry["step"] / entry["epoch"]) if entry["epoch"] else 0


def _session_start(entries: list[dict[str, Any]]) -> int:
    """Return the step that this session began at: before the seconds last began anew."""
    for earlier, later in zip(entries[-2::-1], entries[:0:-1], strict=True):
        if later["seconds"] < earlier["seconds"]:
            return int(earlier["step"])
    return 0
