"""Measure how long recipes will take that have not run here yet, with ``hfbench doctor``.

One recipe at a time, each in a process of its own, as its runs will be.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfbench.recipe.schema import Recipe
from hfbench.results.schema import write_json
from hfbench.studies.suite.plan import Plan, PlannedRun
from hfbench.studies.suite.processes import find_json, last_lines, say_ending, tied_to_this_process

_SECONDS = 10
_PREFIX = "hfbench doctor: "


@dataclass(frozen=True)
class Measurement:
    """How long one run of a recipe takes, or why that is not known.

    Attributes:
        seconds: Wall time of the whole process; ``None`` if it could not be measured.
        problem: The reason.
    """

    seconds: float | None
    problem: str | None = None


def measure_plan(plan: Plan, tell: Callable[[str], None]) -> Plan:
    """Fill in the estimates of recipes that have no finished run here.

    Args:
        plan: From `plan_runs`.
        tell: Told what is done now, a line each.

    Returns:
        The plan; a run whose recipe cannot be measured has a note that says why.
    """
    unknown: dict[str, Recipe] = {}
    for run in plan.todo:
        if run.estimate_seconds is None:
            unknown.setdefault(run.recipe.digest_but_seed(), run.recipe)
    found = {}
    for number, (key, recipe) in enumerate(unknown.items(), 1):
        tell(f"measuring {recipe.name} ({number} of {len(unknown)})")
        found[key] = measure(plan, recipe, tell)
    return replace(plan, runs=tuple(_fill_in(run, found) for run in plan.runs))


def _fill_in(run: PlannedRun, found: dict[str, Measurement]) -> PlannedRun:
    measured = found.get(run.recipe.digest_but_seed())
    if measured is None or run.result:
        return run
    if measured.seconds is None:
        return replace(run, notes=(*run.notes, f"not measured: {measured.problem}"))
    return replace(run, estimate_seconds=measured.seconds, is_measured=True)


def measure(plan: Plan, recipe: Recipe, tell: Callable[[str], None]) -> Measurement:
    """Ask the doctor, started as a run would be."""
    if plan.world_size > 1:
        return Measurement(
            None, f"hfbench doctor measures one process, and a run has {plan.world_size}"
        )
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hfbench-suite-") as folder:
        file, printed = Path(folder) / f"{recipe.name}.json", Path(folder) / "printed"
        write_json(recipe.as_json(), file)
        command = [*plan.command, "doctor", str(file), "--seconds", str(_SECONDS), "--json"]
        code, said = _run(command, printed, tell)
        seconds = time.monotonic() - start
        content = find_json(printed.read_text("utf-8", errors="replace"))
    if code != 0:
        lines = [line for line in last_lines(said) if not line.startswith(_PREFIX)]
        reason = " ".join(lines).removeprefix("Error: ") or say_ending(code)
        return Measurement(None, reason)
    try:
        return Measurement(_whole_run(content or {}, seconds))
    except (KeyError, TypeError):
        return Measurement(None, "hfbench doctor printed no diagnosis")


def _run(command: list[str], printed: Path, tell: Callable[[str], None]) -> tuple[int, str]:
    """Run a command; return its exit code and what it said on stderr."""
    command, environment = tied_to_this_process(command)
    said = []
    with (
        printed.open("wb") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        for line in process.stderr or ():
            said.append(line)
            if line.startswith(_PREFIX):
                tell(line.removeprefix(_PREFIX).rstrip())
    return process.returncode, "".join(said)


def _whole_run(diagnosis: dict[str, Any], seconds: float) -> float:
    """Return the wall time of a run's process.

    Args:
        diagnosis: As the doctor prints it.
        seconds: Wall time of the doctor's process: a run starts up as long and loads as long.
    """
    forecast = diagnosis["forecast"]
    startup = seconds - diagnosis["seconds"] + diagnosis["loading_seconds"]
    return float(
        max(startup, 0.0) + forecast["execution_seconds"] + forecast["final_evaluation_seconds"]
    )
