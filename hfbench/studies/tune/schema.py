"""What `hfbench tune` leaves behind: a recipe, and its measurements beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from hfbench.comparison.ratio import Ratio
from hfbench.errors import ResultError
from hfbench.machine.environment import Environment
from hfbench.recipe.schema import Recipe
from hfbench.results.schema import write_json
from hfbench.results.windows import Window

TUNING_VERSION = 1
EVALUATION = "evaluation batch"  # the one technique that does not change training
BEST = "_best"  # what the new recipe's name ends in
_MEASUREMENTS = ".measurements.json"

Outcome = Literal[
    "taken", "slower", "no gain shown", "out of memory", "would not fit", "failed", "not measured"
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measured(_Part):
    """One window; windows of the candidate and of the best so far take turns.

    Attributes:
        candidate: Whether it is the candidate's; else that of the best so far.
        window: What was measured.
    """

    candidate: bool
    window: Window


class Trial(_Part):
    """One candidate: the best recipe so far with one change.

    Attributes:
        technique: What was changed.
        detail: The new setting in words.
        settings: Dotted names of the recipe, and values.
        effect: What the change does to the results of training.
        outcome: Whether it was taken, or why not.
        reason: The same in a sentence; empty if the numbers say it.
        ratio: Images per second over those of the best so far, in pairs of windows; ``None`` if
            there is no pair.
        samples_per_second: Geometric mean of its windows.
        peak_memory_mib: Largest of its windows: of the device, on a CPU of the process.
        windows: In the order of measuring.
    """

    technique: str
    detail: str
    settings: dict[str, Any]
    effect: str
    outcome: Outcome
    reason: str = ""
    ratio: Ratio | None = None
    samples_per_second: float | None = None
    peak_memory_mib: float | None = None
    windows: list[Measured] = []


class Tuning(_Part):
    """The fastest settings of a recipe that were found on one machine, and how.

    Attributes:
        recipe: As given; the settings that are compared with.
        best: The recipe that was written.
        environment: The machine.
        seconds: That measuring took.
        budget_seconds: That it might take.
        window_seconds: Length that windows were given.
        speedup: Of `best` over `recipe`, measured at the end, in windows of their own; ``None`` if
            nothing was taken or there was no time.
        start_samples_per_second: Of the recipe as given; ``None`` if it does not run.
        best_samples_per_second: Of `best`.
        trials: Every candidate, in the order of measuring; those not measured last.
        not_applicable: Techniques without a candidate here, and why.
        final_windows: What `speedup` was computed from; `best` is the candidate.
        sentence: What came out.
        notes: What a reader has to know.
        stopped: Whether Ctrl-C ended it.
    """

    schema_version: int = TUNING_VERSION
    created_at: str
    recipe: Recipe
    recipe_sha256: str
    best: Recipe
    environment: Environment
    seconds: float
    budget_seconds: float
    window_seconds: float
    speedup: Ratio | None
    start_samples_per_second: float | None
    best_samples_per_second: float | None
    trials: list[Trial]
    not_applicable: dict[str, str]
    final_windows: list[Measured]
    sentence: str
    notes: list[str]
    stopped: bool = False

    @property
    def taken(self) -> list[Trial]:
        """The changes that make `best`."""
        return [trial for trial in self.trials if trial.outcome == "taken"]


def measurements_file(output: Path) -> Path:
    """Return where the measurements of a written recipe are."""
    return output.with_name(output.name.removesuffix(".json") + _MEASUREMENTS)


def check_output(recipe: Recipe, output: Path, source: Path | None, force: bool) -> None:
    """Refuse to write where something is, or where nothing can be, before anything is measured.

    Args:
        recipe: Whose name the new one's is made of.
        output: The file to be written.
        source: The file of the recipe that is tuned, which is never written over.
        force: Whether other files may be.

    Raises:
        ResultError: With every problem.
    """
    import os

    problems = []
    folder = output.parent
    if not folder.is_dir():
        problems.append(f"--output: there is no folder {folder}; make it first.")
    elif not os.access(folder, os.W_OK):
        problems.append(f"--output: {folder} is not writable.")
    if output.is_dir():
        problems.append(f"--output: {output} is a folder; name a file in it.")
    elif source is not None and output.exists() and output.samefile(source):
        problems.append(f"--output: {output} is the recipe that is tuned; name another file.")
    elif not force:
        problems += [
            f"--output: {path} is there already; name another file, or add --force."
            for path in (output, measurements_file(output))
            if path.exists()
        ]
    if len(recipe.name + BEST) > 96:
        problems.append(
            f"name: {recipe.name}{BEST} would have {len(recipe.name + BEST)} letters and may have "
            "at most 96; shorten the recipe's."
        )
    if problems:
        raise ResultError.from_problems("hfbench tune", problems)


def write_tuning(tuning: Tuning, output: Path) -> None:
    """Write the recipe, and the measurements beside it.

    Raises:
        ResultError: If the disk refuses.
    """
    content = tuning.best.as_json()
    content.pop("$schema")  # would be looked for beside the new file
    measurements = tuning.model_dump(mode="json", by_alias=True)
    try:
        write_json(measurements, measurements_file(output))
        write_json(content, output)
    except OSError as error:
        raise ResultError(f"{output} cannot be written: {error}") from None
