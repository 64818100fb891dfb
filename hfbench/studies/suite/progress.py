"""How a suite stands, and how far a run has come, read from its log while it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from hfbench.machine.bounds import parse_json
from hfbench.recipe.schema import Recipe
from hfbench.results.schema import LOG_FILE, Result
from hfbench.studies.suite.plan import STARTUP_SECONDS, PlannedRun

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


def by_recipe(runs: Sequence[SuiteRun]) -> dict[str, list[SuiteRun]]:
    """Return the runs of each recipe in their order, each baseline before its candidates."""
    baselines = {run.planned.recipe.name: run.planned.recipe.baseline for run in runs}

    def line(name: str) -> list[str]:
        names = [name]
        while (above := baselines.get(names[0])) in baselines and above not in names:
            names.insert(0, str(above))
        return names

    return {
        name: [run for run in runs if run.planned.recipe.name == name]
        for name in sorted(baselines, key=line)
    }


class LogReader:
    """Follows the log of a run that another process writes; reads each line once."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        """Begin at the log's first line.

        Args:
            folder: Of the run.
            recipe: Says when the run ends.
        """
        self._path = folder / LOG_FILE
        self._recipe = recipe
        self._forget()

    def _forget(self) -> None:
        self._position = 0
        self._last: dict[str, Any] = {"step": 0, "seconds": 0.0, "epoch": 0.0}
        self._begun = 0  # step that this session began at

    def read(self) -> RunProgress | None:
        """Return how far the run is; ``None`` before this session has logged a step."""
        try:
            if self._path.stat().st_size < self._position:  # a resumed run drops its last lines
                self._forget()
            with self._path.open("rb") as file:
                file.seek(self._position)
                for line in file:
                    if line.endswith(b"\n"):
                        self._position += len(line)
                        self._take(parse_json(line))
        except (OSError, ValueError, KeyError):
            return None
        steps, made = self._count_steps(), self._last["step"] - self._begun
        if made <= 0 or steps <= 0:
            return None
        left = max(steps - self._last["step"], 0) * self._last["seconds"] / made
        return RunProgress(self._last["step"], steps, left)

    def _take(self, entry: dict[str, Any]) -> None:
        if entry["seconds"] < self._last["seconds"]:  # a new session's clock begins anew
            self._begun = self._last["step"]
        self._last = entry

    def _count_steps(self) -> int:
        arguments = self._recipe.training_args
        most = arguments.get("max_steps", -1)
        if most > 0:
            return int(most)
        epochs = arguments.get("num_train_epochs", _DEFAULT_EPOCHS)
        made = self._last["epoch"]
        return round(epochs * self._last["step"] / made) if made else 0


class TimeLeft:
    """Estimates how long a suite still takes from what its runs have taken so far."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}  # digest_but_seed -> wall times of whole runs
        self._startups: list[float] = []

    def note(self, run: SuiteRun, result: Result) -> None:
        """Learn from a run whose process has just ended."""
        whole, total = run.seconds or 0.0, result.times.total_seconds
        if result.training.sessions == 1:
            self._startups.append(whole - total)
        else:  # its process made only a part of it
            whole = total + self._startup()
        self._times.setdefault(run.planned.recipe.digest_but_seed(), []).append(whole)

    def estimate(self, runs: Sequence[SuiteRun]) -> tuple[float, bool]:
        """Return the seconds that are left, and whether they count every run."""
        lefts = [self._left(run, runs) for run in runs if run.state in ("waiting", "running")]
        return math.fsum(left or 0.0 for left in lefts), None not in lefts

    def _left(self, run: SuiteRun, runs: Sequence[SuiteRun]) -> float | None:
        if run.progress:
            return run.progress.left_seconds
        whole = self._whole(run, runs)
        return None if whole is None else max(whole - (run.seconds or 0.0), 0.0)

    def _whole(self, run: SuiteRun, runs: Sequence[SuiteRun]) -> float | None:
        key = run.planned.recipe.digest_but_seed()
        if key in self._times:
            return median(self._times[key])
        for other in runs:  # a first repeat on its way says how long the others will take
            if other.progress and other.planned.recipe.digest_but_seed() == key:
                return (other.seconds or 0.0) + other.progress.left_seconds
        known = run.planned.estimate_seconds
        return None if known is None else known - STARTUP_SECONDS + self._startup()

    def _startup(self) -> float:
        return median(self._startups) if self._startups else STARTUP_SECONDS
