"""The commands that put several runs together: suite, compare, ablate, doctor, report."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfbench.cli.options import (
    AsJson,
    OutputDir,
    Overrides,
    count_of_repeats,
    finite,
    print_json,
    say,
    show,
)
from hfbench.errors import RecipeError, ResultError, briefly
from hfbench.machine.launched import check_alone

if TYPE_CHECKING:
    from hfbench.comparison.comparison import Comparison

studies = typer.Typer()
_MOST_STEPS = 100_000
_MOST_ROUNDS = 1000


@studies.command("suite")
def suite_command(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [NAME=VALUE]...",
            help="Recipe files or names of shipped ones, and changes to all of them: "
            "training_args.num_train_epochs=1",
        ),
    ],
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats",
            callback=count_of_repeats,
            help="Runs of each recipe, each with its own seed (default: 3).",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            help="As 1,2,3, instead of the recipe's own seed, the next one, and so on.",
        ),
    ] = None,
    output_dir: OutputDir = Path("runs"),
    launcher: Annotated[
        str,
        typer.Option(
            "--launcher", help='Starts each run: "accelerate launch --num_processes 2", "nice".'
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be run, and an estimate.")
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="With --dry-run: measure recipes that have not run here yet, half a minute each.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run recipes several times, baseline and candidate in turn, each run in its own process.

    Finished runs of the same recipe, seed, machine and library versions count; what was stopped or
    killed goes on with the same command. A failed run does not stop the others (exit code 1).
    """
    from hfbench.cli.suite import load_apart, parse_seeds, run_and_show, show_plan, split_words
    from hfbench.studies.suite.plan import plan_runs, repeat_recipes
    from hfbench.studies.suite.processes import build_command

    check_alone("suite")
    build_command(launcher)  # says at once what is wrong with it
    if measure and not dry_run:
        raise RecipeError("--measure: is for the plan; add --dry-run.")
    chosen = parse_seeds(seeds, repeats) if seeds is not None else None
    repeated = repeat_recipes(load_apart(*split_words(recipes)), repeats or 3, chosen)
    plan = plan_runs(repeated, output_dir, launcher)
    if not dry_run:
        raise typer.Exit(run_and_show(plan, as_json))
    show_plan(plan, measure, as_json)


@studies.command("compare")
def compare_command(
    baseline: Annotated[
        str,
        typer.Argument(
            help="runs/<recipe name> for all its repeats; or one run's folder or result.json."
        ),
    ],
    candidate: Annotated[str, typer.Argument(help="The same, of the runs that should be better.")],
    margin: Annotated[
        float,
        typer.Option(
            "--margin", help="Loss of test accuracy, in percentage points, that you put up with."
        ),
    ] = 0.5,
    price_per_hour: Annotated[
        float | None,
        typer.Option("--price-per-hour", help="Of the machine, in your currency: shows costs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give a verdict: faster or not, worse or not, with 95 % intervals over repeats.

    Runs of equal seeds are paired. Refused are runs on other test images, data, hardware or library
    versions. More repeats: hfbench suite RECIPES --repeats 5.
    """
    from hfbench.comparison.comparison import compare
    from hfbench.comparison.repeats import select_repeats
    from hfbench.results.schema import load_readable

    sides, notes, problems = [], [], []
    for path in (baseline, candidate):
        try:
            readable, unreadable = load_readable(path)
            chosen, left_out = select_repeats(readable)
            sides.append(chosen)
            notes += [f"Left out: {briefly(problem)}" for problem in unreadable] + left_out
        except ResultError as error:
            problems.append(str(error))
    if problems:
        raise ResultError("\n".join(problems))
    comparison = compare(*sides, margin_points=margin, price_per_hour=price_per_hour)
    comparison = replace(comparison, notes=notes + comparison.notes)
    if as_json:
        print_json(_as_json(comparison))
        return
    from hfbench.report.terminal.comparison import comparison_tables

    show(comparison_tables(comparison))


def _as_json(comparison: Comparison) -> dict[str, Any]:
    """Return all of a comparison; of the runs their names, ids and seeds."""
    sides = {
        side: {
            "name": runs[0].recipe.name,
            "runs": [{"run_id": run.run_id, "seed": run.seed} for run in runs],
        }
        for side, runs in (
            ("baseline", comparison.baseline),
            ("candidate", comparison.candidate),
        )
    }
    rest = asdict(replace(comparison, baseline=[], candidate=[]))
    return {"sentence": comparison.sentence} | rest | sides


@studies.command("report")
def report_command(
    runs: Annotated[
        str, typer.Argument(metavar="RUNS", help="Folder with the runs of one or more recipes.")
    ] = "runs",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the report; made if need be.")
    ] = Path("report"),
    margin: Annotated[
        float,
        typer.Option(
            "--margin", help="Loss of test accuracy, in percentage points, that you put up with."
        ),
    ] = 0.5,
) -> None:
    """Write a report of all finished runs: Markdown, and one HTML page that needs nothing else."""
    from hfbench.report import write_report

    written = write_report(runs, output, margin_points=margin)
    say(f"Wrote {written[0]}, {written[1]} and {len(written) - 2} files of figures and data.")


@studies.command("doctor")
def doctor_command(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="[RECIPE]",
            help="A recipe file, or the name of a shipped one.",
            show_default=True,
        ),
    ] = "quickstart_untuned",
    overrides: Overrides = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            min=1,
            max=3600,
            callback=finite,
            help="For measuring; loading comes on top.",
        ),
    ] = 30,
    as_json: AsJson = False,
) -> None:
    """Say in half a minute what limits a recipe on this machine, and which techniques can help.

    Measures the loader alone, the model alone, and training; predicts what the whole run takes;
    checks gradient accumulation where the recipe has it. Nothing is kept.
    """
    from hfbench.recipe.schema import load_recipe

    check_alone("doctor")
    changes = overrides or []
    if "=" in recipe and not Path(recipe).exists():  # an override without a recipe before it
        recipe, changes = "quickstart_untuned", [recipe, *changes]
    loaded = load_recipe(recipe, changes)
    from hfbench.studies.doctor.examine import examine

    def tell(what: str) -> None:
        say(f"hfbench doctor: {what} …", file=sys.stderr)

    # Trainer prints to stdout; with --json that belongs to the diagnosis alone.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = examine(loaded, seconds, tell)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    from hfbench.report.terminal.doctor import diagnosis_tables

    show(diagnosis_tables(found))


@studies.command("ablate")
def ablate_command(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one."),
    ],
    overrides: Overrides = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            max=_MOST_STEPS,
            help="Optimizer steps of a window, warm-up not counted.  [default: enough for 2 s]",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            min=1,
            max=_MOST_ROUNDS,
            help="Windows of each configuration, in turn with the others.  [default: 5]",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Whole runs, with accuracy, instead of short windows.")
    ] = False,
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats",
            callback=count_of_repeats,
            help="With --full: runs of each configuration, each with its own seed.  [default: 3]",
            show_default=False,
        ),
    ] = None,
    output_dir: OutputDir = Path("runs"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the configurations, and measure nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what each technique contributes: none, each alone, all but each, and all.

    Checks too that none of them changes the first loss by more than rounding can. Short windows go
    into OUTPUT_DIR/ablations/<recipe name>, whole runs into OUTPUT_DIR/<recipe name>.<techniques>.
    """
    from hfbench.cli.ablate import (
        check_options,
        check_recipe,
        measure_and_show,
        run_full,
        show_plan,
    )
    from hfbench.recipe.schema import load_recipe

    check_alone("ablate")
    check_options(full, steps, rounds, repeats)
    loaded = load_recipe(recipe, overrides or [])
    check_recipe(loaded)
    if full:
        raise typer.Exit(run_full(loaded, output_dir, repeats, dry_run, as_json))
    if dry_run:
        show_plan(loaded, as_json)
    else:
        measure_and_show(loaded, output_dir, steps, rounds, as_json)
