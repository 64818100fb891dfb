"""What ``hfbench ablate`` does: show the plan and how it stands, measure, print the outcome."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hfbench.cli.options import print_json, say, show
from hfbench.errors import DeviceError, RecipeError

if TYPE_CHECKING:
    from hfbench.recipe.schema import Recipe
    from hfbench.results.schema import Result

_REPEATS = 3


def check_options(full: bool, steps: int | None, rounds: int | None, repeats: int | None) -> None:
    """Refuse options that belong to the other way of measuring.

    Raises:
        RecipeError: With all of them.
    """
    given = {"--steps": steps, "--rounds": rounds} if full else {"--repeats": repeats}
    other = "short windows; leave out --full" if full else "full runs; add --full"
    problems = [f"{name}: is for {other}." for name, value in given.items() if value is not None]
    if problems:
        raise RecipeError("\n".join(problems))


def check_recipe(recipe: Recipe) -> None:
    """Refuse what cannot run here before anything is shown.

    Raises:
        DeviceError: With everything that this machine cannot do for the recipe.
    """
    from hfbench.machine.environment import check_machine

    problems = check_machine(recipe)
    if problems:
        raise DeviceError.from_problems(recipe.name, problems)


def show_plan(recipe: Recipe, as_json: bool) -> None:
    """Print what would be measured."""
    from hfbench.report.terminal.ablation import plan_table
    from hfbench.studies.ablation.plan import plan_ablation

    plan = plan_ablation(recipe)
    if not as_json:
        show(plan_table(plan))
        return
    configurations = [
        {
            "name": item.name,
            "also": item.also,
            "techniques": item.techniques,
            "recipe": item.recipe.as_json(),
        }
        for item in plan.configurations
    ]
    not_run = [{"technique": item.technique, "reason": item.reason} for item in plan.not_run]
    content = {"configurations": configurations, "not_run": not_run, "notes": plan.notes}
    print_json(content)


def measure_and_show(
    recipe: Recipe, output_dir: Path, steps: int | None, rounds: int | None, as_json: bool
) -> None:
    """Measure short windows, and print what they say."""
    from hfbench.recipe.techniques import COMPILE
    from hfbench.report.terminal.ablation import ablation_tables, plan_table
    from hfbench.results.formats import duration
    from hfbench.results.windows import FirstLoss, Window
    from hfbench.studies.ablation.measure import ROUNDS, Observer, ablate
    from hfbench.studies.ablation.plan import Configuration, Plan

    class Tell(Observer):
        def planned(self, plan: Plan, steps: int, rounds: int, seconds: float) -> None:
            self.total, self.done = rounds * len(plan.configurations), 0
            if not as_json:
                show(plan_table(plan))
            compiled = any(COMPILE.name in item.techniques for item in plan.configurations)
            beside = ", and compiling for several minutes" if compiled else ""
            say(
                f"{rounds} rounds of {len(plan.configurations)} windows of {steps} steps: about "
                f"{duration(round(seconds))}{beside}. Ctrl-C keeps what was measured.",
                file=sys.stderr,
            )

        def checked(self, configuration: Configuration, first_loss: FirstLoss | None) -> None:
            if first_loss is not None and first_loss.problem:
                say(f"{configuration.label}: {first_loss.problem}", file=sys.stderr)

        def measured(self, configuration: Configuration, round_number: int, window: Window) -> None:
            self.done += 1
            say(
                f"[{self.done}/{self.total}] round {round_number}: {configuration.label}: "
                f"{window.samples_per_second:.1f} images/s",
                file=sys.stderr,
            )

    # Libraries print to stdout; with --json that belongs to the ablation alone.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = ablate(recipe, output_dir, steps=steps, rounds=rounds or ROUNDS, observer=Tell())
    if as_json:
        content = found.model_dump(mode="json", by_alias=True)
        print_json(content)
        return
    show(ablation_tables(found))
    say(f"Everything is in {found.folder}")


def run_full(
    recipe: Recipe, output_dir: Path, repeats: int | None, dry_run: bool, as_json: bool
) -> int:
    """Run every configuration from beginning to end, and compare each with none.

    Returns:
        The exit code: 1 if a run failed.
    """
    from hfbench.cli.suite import plan_json, run_watched
    from hfbench.report.terminal.ablation import ablation_tables, plan_table
    from hfbench.report.terminal.suite import plan_table as runs_table
    from hfbench.studies.ablation.plan import full_recipes, plan_ablation
    from hfbench.studies.ablation.whole_runs import record_full_runs
    from hfbench.studies.suite.plan import plan_runs, repeat_recipes

    plan = plan_ablation(recipe, whole_runs=True)
    repeats = repeats or _REPEATS
    runs = plan_runs(repeat_recipes(full_recipes(plan), repeats), output_dir)
    if not as_json:
        show(plan_table(plan))
    if dry_run and as_json:
        print_json(plan_json(runs))
    elif dry_run:
        show(runs_table(runs))
    if dry_run:
        return 0
    outcome = run_watched(runs, as_json)
    prefix = f"{recipe.name}."
    results: dict[str, list[Result]] = {}
    for result in outcome.results:
        results.setdefault(result.recipe.name.removeprefix(prefix), []).append(result)
    failures = {
        run.planned.recipe.name.removeprefix(prefix): f"a run failed; its output is in {run.log}"
        for run in outcome.failed
    }
    found = record_full_runs(
        plan, results, output_dir, repeats=repeats, seconds=outcome.seconds, failures=failures
    )
    if as_json:
        content = found.model_dump(mode="json", by_alias=True)
        print_json(content)
    else:
        show(ablation_tables(found))
        say(f"Everything is in {found.folder}; the runs are in {output_dir / prefix}*")
    for run in outcome.failed:
        say(f"{run.name} failed; its output is in {run.log}", file=sys.stderr)
    return 1 if outcome.failed else 0
