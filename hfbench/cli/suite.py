"""What ``hfbench suite`` does: load in a process apart, show what happens, print the outcome."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbench.cli.options import print_json, say, show
from hfbench.errors import DeviceError, HfbenchError, RecipeError
from hfbench.errors.harmless import shown

if TYPE_CHECKING:
    from hfbench.recipe.schema import Recipe
    from hfbench.studies.suite.plan import Plan
    from hfbench.studies.suite.progress import Progress
    from hfbench.studies.suite.run import SuiteOutcome, Verdict

_SEED_LIMIT = 2**32  # numpy's seeds are unsigned 32-bit integers
_SEED_DIGITS = 10
_HINT = "Half a minute a recipe measures what is unknown: add --dry-run --measure"


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell recipes from overrides: what has a ``=`` and is no file.

    Raises:
        RecipeError: If there is no recipe.
    """
    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    names = [word for word in words if word not in overrides]
    if not names:
        raise RecipeError("There is no recipe to run; see the shipped ones: hfbench list --recipes")
    return names, overrides


def load_apart(names: Sequence[str], overrides: Sequence[str]) -> list[Recipe]:
    """Load and check recipes in a process that ends then, since it takes torch to check them.

    Raises:
        HfbenchError: With all problems of all recipes.
    """
    from hfbench.studies.suite.plan import load_recipes

    if "torch" in sys.modules:  # nothing to be saved any more
        return _show_slow(load_recipes(names, overrides))
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_recipes, args=(sender, names, overrides))
    # Ctrl-C is the suite's to answer; what is ignored now, the process ignores from its beginning.
    answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, answer)
    sender.close()  # so that receiving fails if the process dies
    try:
        found: list[Recipe] | HfbenchError = receiver.recv()
    except EOFError:
        raise DeviceError("The process that checks the recipes has died; see above.") from None
    except KeyboardInterrupt:
        process.kill()  # or it would be waited for
        raise
    finally:
        process.join()
    if isinstance(found, HfbenchError):
        raise found
    return found


def _show_slow(recipes: list[Recipe]) -> list[Recipe]:
    """Say which of the recipes are slow on this machine, before hours are spent on them."""
    from hfbench.machine.precision import say_slow_precision

    for recipe in recipes:
        if slow := say_slow_precision(recipe):
            print(f"hfbench suite: {slow}", file=sys.stderr, flush=True)
    return recipes


def _send_recipes(sender: Connection, names: Sequence[str], overrides: Sequence[str]) -> None:
    from hfbench.studies.suite.plan import load_recipes

    try:
        sender.send(_show_slow(load_recipes(names, overrides)))
    except HfbenchError as error:
        sender.send(error)


def parse_seeds(text: str, repeats: int | None = None) -> list[int]:
    """Read ``1,2,3``.

    Raises:
        RecipeError: If there is anything else in it, not as many as `repeats`, or too many.
    """
    from hfbench.studies.suite.plan import check_count

    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if not _is_seed(word)]
    if wrong or len(set(map(int, words))) < len(words):
        raise RecipeError(
            f"--seeds: found {shown(text)}, expected different whole numbers from 0 to "
            f"{_SEED_LIMIT - 1}, as in 1,2,3."
        )
    if repeats not in (None, len(words)):
        raise RecipeError(
            f"--repeats {repeats} and --seeds with {len(words)} seeds contradict each other; leave "
            f"out --repeats."
        )
    check_count(len(words), "--seeds")
    return [int(word) for word in words]


def _is_seed(word: str) -> bool:
    # Of more digits Python may refuse to read a number.
    return word.isdecimal() and len(word.lstrip("0")) <= _SEED_DIGITS and int(word) < _SEED_LIMIT


def show_plan(plan: Plan, measured: bool, as_json: bool) -> None:
    """Print a plan; measure first what has not run here yet, if `measured`."""
    from hfbench.report.terminal.suite import plan_table
    from hfbench.studies.suite.estimates import measure_plan

    if measured:
        plan = measure_plan(plan, lambda what: say(f"hfbench suite: {what}", file=sys.stderr))
    if as_json:
        print_json(plan_json(plan))
    else:
        show(plan_table(plan, "" if measured else _HINT))


def run_watched(plan: Plan, as_json: bool) -> SuiteOutcome:
    """Run a plan, and show how it stands."""
    from hfbench.report.terminal.suite import plan_table, say_total
    from hfbench.studies.suite.run import run_plan

    live = _Live() if sys.stderr.isatty() and not as_json else None
    if not as_json:
        notes = any(run.notes or run.resumes for run in plan.todo)
        show(plan_table(plan, _HINT) if notes else say_total(plan))
    shown: AbstractContextManager[Any] = live or nullcontext()
    with shown:
        return run_plan(plan, live.update if live else _print_change)


def run_and_show(plan: Plan, as_json: bool) -> int:
    """Run a plan, show how it stands, and print what it reached.

    Returns:
        The exit code: 0 if all runs are finished, 1 if some failed.
    """
    from hfbench.report.terminal.suite import outcome_table
    from hfbench.studies.suite.run import find_verdicts

    outcome = run_watched(plan, as_json)
    verdicts = find_verdicts(outcome.runs)
    if as_json:
        print_json(outcome_json(outcome, verdicts))
    else:
        show(outcome_table(outcome, verdicts))
        for run in outcome.failed:
            say(f"{run.name} failed; its output is in {run.log}")
    return 1 if outcome.failed else 0


class _Live:
    """A table on the terminal that changes in place; without a thread of its own."""

    def __init__(self) -> None:
        from rich.live import Live

        from hfbench.report.console import HarmlessConsole

        self._live = Live(console=HarmlessConsole(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> _Live:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, progress: Progress) -> None:
        from hfbench.report.terminal.suite import progress_table

        self._live.update(progress_table(progress), refresh=True)


def _print_change(progress: Progress) -> None:
    from hfbench.report.terminal.suite import say_change

    if progress.changed:
        say(say_change(progress), file=sys.stderr, flush=True)


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as ``--dry-run --json`` prints it."""
    from hfbench.studies.suite.plan import total_estimate

    seconds, known = total_estimate(plan)
    runs = [
        {
            "recipe": run.recipe.name,
            "seed": run.seed,
            "state": "finished" if run.result else "waiting",
            "run_id": run.result.run_id if run.result else None,
            "resumes": run.resumes.name if run.resumes else None,
            "notes": list(run.notes),
            "estimate_seconds": run.estimate_seconds,
            "estimate_is_measured": run.is_measured,
        }
        for run in plan.runs
    ]
    return {"runs": runs, "estimate_seconds": seconds, "estimate_is_complete": known}


def outcome_json(outcome: SuiteOutcome, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return an outcome as ``--json`` prints it."""
    from dataclasses import asdict

    runs = [
        {
            "recipe": run.planned.recipe.name,
            "seed": run.planned.seed,
            "state": run.state,
            "seconds": run.seconds,
            "exit_code": run.exit_code,
            "reason": run.reason,
            "log": str(run.log) if run.log else None,
            "result": run.result and run.result.model_dump(mode="json", by_alias=True),
        }
        for run in outcome.runs
    ]
    comparisons = [asdict(verdict) for verdict in verdicts]
    return {"runs": runs, "seconds": outcome.seconds, "comparisons": comparisons}
