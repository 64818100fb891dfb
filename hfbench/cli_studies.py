"""The commands that put several runs together: suite, compare, ablate, doctor, report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfbench.cli_options import AsJson, show
from hfbench.errors import ResultError

if TYPE_CHECKING:
    from hfbench.comparison import Comparison

studies = typer.Typer()


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
    from hfbench.comparison import compare
    from hfbench.repeats import select_repeats
    from hfbench.result import load_results

    sides, notes, problems = [], [], []
    for path in (baseline, candidate):
        try:
            chosen, left_out = select_repeats(load_results(path))
            sides.append(chosen)
            notes += left_out
        except ResultError as error:
            problems.append(str(error))
    if problems:
        raise ResultError("\n".join(problems))
    comparison = compare(*sides, margin_points=margin, price_per_hour=price_per_hour)
    comparison = replace(comparison, notes=notes + comparison.notes)
    if as_json:
        print(json.dumps(_as_json(comparison), indent=2, ensure_ascii=False))
        return
    from hfbench.tables_comparison import comparison_tables

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
) -> None:
    """Write a report of all finished runs: Markdown, and one HTML page that needs nothing else."""
    from hfbench.report import write_report

    written = write_report(runs, output)
    print(f"Wrote {written[0]}, {written[1]} and {len(written) - 2} files of figures and data.")
