"""What `hfbench tune` found, as tables for the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hfbench.comparison.ratio import Ratio
from hfbench.report.terminal.run import PlainTable
from hfbench.results.formats import duration
from hfbench.studies.tune.offers import ROUNDING, SAME_ARITHMETIC
from hfbench.studies.tune.schema import Trial, Tuning

_MISSING = "–"
_RATIO_WIDTH = 13  # of an interval, below its ratio: fixed, so that 80 columns are enough
_STYLES = {"taken": "green", "slower": "red"}
_RESULTS = {SAME_ARITHMETIC: "same", ROUNDING: "rounding", "": _MISSING}


def tuning_tables(tuning: Tuning) -> Group:
    """Show what came out, every candidate, and what a reader has to know."""
    idle = [f"Not tried: {name}: {why}." for name, why in tuning.not_applicable.items()]
    return Group(
        Text(f"{tuning.recipe.name}: what is fastest here", style="bold"),
        Text(tuning.sentence, style="bold"),
        _candidates(tuning),
        Text(
            f"Each candidate is the best so far with one change, in windows of "
            f"{duration(tuning.window_seconds)} that take turns (A B B A); taken if its interval "
            "(95 %, over pairs of windows) is above 1. Results: whether training gives the same "
            f"numbers. Measured for {duration(tuning.seconds)} on "
            f"{tuning.environment.device_name}."
        ),
        *(Text(line) for line in idle),
        *(Text(f"Note: {note}") for note in tuning.notes),
    )


def say_trial(trial: Trial) -> str:
    """Say in a line what became of a candidate."""
    speed = trial.samples_per_second
    said = "" if speed is None else f"{speed:.1f} images/s, {trial.ratio}, "
    return f"{trial.technique}: {trial.detail}: {said}{_say_outcome(trial)}"


def _say_outcome(trial: Trial) -> str:
    return f"{trial.outcome}: {trial.reason}" if trial.reason else trial.outcome


def _candidates(tuning: Tuning) -> Table:
    table = PlainTable()
    table.add_column("candidate", overflow="fold")
    for heading, width in {"images/s": 8, "against best": _RATIO_WIDTH, "MiB": 6}.items():
        table.add_column(heading, justify="right", width=width)
    table.add_column("outcome", overflow="fold")
    table.add_column("results", overflow="fold")
    start, best = tuning.start_samples_per_second, tuning.best_samples_per_second
    table.add_row("start", f"{start:.1f}", "1", _MISSING, "", "")
    for trial in tuning.trials:
        table.add_row(
            f"{trial.technique}: {trial.detail}",
            _MISSING if trial.samples_per_second is None else f"{trial.samples_per_second:.1f}",
            _ratio(trial.ratio),
            _MISSING if trial.peak_memory_mib is None else f"{trial.peak_memory_mib:.0f}",
            Text(_say_outcome(trial), style=_STYLES.get(trial.outcome, "")),
            _RESULTS.get(trial.effect, "check"),
        )
    if tuning.speedup is not None:
        table.add_section()
        said = "against start"
        table.add_row("all taken", f"{best:.1f}", _ratio(tuning.speedup), "", said, "")
    return table


def _ratio(ratio: Ratio | None) -> str:
    return _MISSING if ratio is None else str(ratio).replace(" [", "\n[")
