"""A suite as tables for the terminal: its plan, how it stands, what it reached."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hfbench.report.terminal.run import PlainTable
from hfbench.results.formats import duration, percent
from hfbench.studies.suite.plan import Plan, PlannedRun, total_estimate
from hfbench.studies.suite.processes import say_ending
from hfbench.studies.suite.progress import Progress, SuiteRun, by_recipe
from hfbench.studies.suite.run import SuiteOutcome, Verdict

_COLORS = {"finished": "green", "failed": "red", "running": "bold", "waiting": "dim"}


def plan_table(plan: Plan, hint: str = "") -> Group:
    """Show what would be run, in its order, and how long it would take.

    Args:
        plan: From `plan_runs`.
        hint: Shown if that is not known for every run.
    """
    table = PlainTable()
    right = ("", "seed", "estimate")
    for heading in ("", "recipe", "seed", "what happens", "estimate"):
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for number, run in enumerate(plan.runs, 1):
        name, seed = run.recipe.name, str(run.seed)
        table.add_row(str(number), name, seed, _say_planned(run), _say_estimate(run))
    parts: list[Table | Text] = [table, Text(say_total(plan))]
    unknown = any(run.estimate_seconds is None for run in plan.todo)
    if hint and unknown and plan.world_size == 1:  # of several processes nothing is measured
        parts.append(Text(hint))
    return Group(*parts)


def say_total(plan: Plan) -> str:
    """Say how many runs there are, how many are finished, and how long the others take."""
    todo, all_runs = len(plan.todo), len(plan.runs)
    if not todo:
        return f"All {all_runs} runs are finished."
    seconds, known = total_estimate(plan)
    each = f", each in {plan.world_size} processes" if plan.world_size > 1 else ""
    said = f"{todo} of {all_runs} runs to do{each}"
    if known:
        return f"{said}: about {duration(seconds)}."
    if seconds:
        return f"{said}: at least {duration(seconds)}; not all recipes have run here yet."
    return f"{said}: how long is unknown, since none of these recipes has run here yet."


def _say_planned(run: PlannedRun) -> str:
    said = f"goes on with {run.resumes.name}" if run.resumes else "runs"
    if run.result:
        said = f"finished: {run.result.run_id}"
    return "\n".join([said, *run.notes])


def _say_estimate(run: PlannedRun) -> str:
    if run.result:
        return ""
    if run.estimate_seconds is None:
        return "unknown"
    measured = ", measured now" if run.is_measured else ""
    return f"about {duration(run.estimate_seconds)}{measured}"


def progress_table(progress: Progress) -> Group:
    """Show how a suite stands: a row a recipe, a column a repeat."""
    rows = by_recipe(progress.runs)
    table = PlainTable()
    table.add_column("recipe", overflow="fold")  # shortened, two recipes may look the same
    for number in range(max(map(len, rows.values()), default=0)):
        seeds = {runs[number].planned.seed for runs in rows.values() if len(runs) > number}
        table.add_column(f"seed {seeds.pop()}" if len(seeds) == 1 else f"repeat {number + 1}")
    for name, runs in rows.items():
        table.add_row(name, *(Text(_say_cell(run), style=_COLORS[run.state]) for run in runs))
    return Group(table, Text(say_left(progress)))


def _say_cell(run: SuiteRun) -> str:
    if run.state == "finished" and run.result:
        seconds = run.seconds or run.result.times.total_seconds
        return f"{_accuracy(run)}, {duration(seconds)}"
    if run.state == "failed":
        return say_ending(run.exit_code or 0)
    if run.waits_for:
        return "still runs elsewhere"
    if run.state == "running":
        made = f"{run.progress.step}/{run.progress.steps}, " if run.progress else ""
        return f"{made}{_whole(run.seconds or 0)}"
    return "waiting"


def say_left(progress: Progress) -> str:
    """Say how much is done and how long the rest takes."""
    ended = sum(run.state in ("finished", "failed") for run in progress.runs)
    said = f"{ended} of {len(progress.runs)} runs, {_whole(progress.elapsed_seconds)}"
    if progress.stopping:
        return f"{said}. Stopping; the run in progress saves a checkpoint (Ctrl-C again: at once)."
    if ended == len(progress.runs):
        return f"{said}."
    if progress.left_seconds:
        least = "about" if progress.left_is_known else "at least"
        return f"{said}; {least} {_whole(progress.left_seconds)} left."
    return f"{said}; time left: unknown yet."


def say_change(progress: Progress) -> str:
    """Say what has just happened to a run, in one line, for a file or a pipe."""
    run = progress.changed
    if run is None:
        return ""
    number = f"[{progress.runs.index(run) + 1}/{len(progress.runs)}] {run.name}"
    if progress.stopping and run.state == "running":
        return f"{number}: stopping; it saves a checkpoint"
    if run.waits_for and run.state == "waiting":
        return f"{number}: still running in another process ({run.waits_for}); waiting for it"
    if run.state == "running":
        return f"{number}: running ({say_left(progress).partition('; ')[2].removesuffix('.')})"
    if run.state == "failed":
        reason = "\n".join(f"    {line}" for line in run.reason)
        return f"{number}: failed, {say_ending(run.exit_code or 0)}\n{reason}".rstrip()
    return f"{number}: {run.state}, {_say_cell(run)}"


def outcome_table(outcome: SuiteOutcome, verdicts: Sequence[Verdict]) -> Group:
    """Show every run with what it reached, then each candidate against its baseline."""
    table = PlainTable()
    right = ("seed", "execution", "images/s")
    for heading in ("recipe", "seed", "state", "test accuracy", "F1 macro", *right[1:]):
        table.add_column(
            heading,
            justify="right" if heading in right else "left",
            overflow="fold",
            no_wrap=heading in right,
        )
    for run in outcome.runs:
        table.add_row(run.planned.recipe.name, str(run.planned.seed), *_cells(run))
    lines = [Text(f"{v.candidate} against {v.baseline}: {v.sentence}") for v in verdicts]
    return Group(table, *lines)


def _cells(run: SuiteRun) -> list[str]:
    if run.result is None:
        return [f"failed: {say_ending(run.exit_code or 0)}", "", "", "", ""]
    test, speed = run.result.metrics.test, run.result.throughput.samples_per_second
    return [
        "finished" if run.seconds is not None else "finished before",
        _accuracy(run),
        percent(test.f1_macro) if test else "–",
        duration(run.result.times.execution_seconds),
        f"{speed:.1f}" if speed else "–",
    ]


def _whole(seconds: float) -> str:
    return f"{round(seconds)} s" if round(seconds) < 60 else duration(round(seconds))


def _accuracy(run: SuiteRun) -> str:
    test = run.result.metrics.test if run.result else None
    return percent(test.accuracy) if test else "–"
