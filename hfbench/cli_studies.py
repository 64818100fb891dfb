"""The commands that put several runs together: suite, compare, ablate, doctor, report."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hfbench.cli_options import AsJson, show
from hfbench.errors import ResultError

studies = typer.Typer()


@studies.command("compare")
def compare_command(
    baseline: Annotated[
        str, typer.Argument(help="A run's folder, its result.json, or runs/<recipe name>.")
    ],
    candidate: Annotated[str, typer.Argument(help="The same, of the run that should be better.")],
    as_json: AsJson = False,
) -> None:
    """Set a run against its baseline: speed-up, memory, accuracy, F1, differing settings."""
    from hfbench.comparison import compare
    from hfbench.result import load_result

    results, problems = [], []
    for path in (baseline, candidate):
        try:
            results.append(load_result(path))
        except ResultError as error:
            problems.append(str(error))
    if problems:
        raise ResultError("\n".join(problems))
    comparison = compare(*results)
    if as_json:
        from dataclasses import asdict

        parts: dict[str, Any] = {
            name: [asdict(item) for item in getattr(comparison, name)] for name in _COMPARED
        }
        ids = {"baseline": comparison.baseline.run_id, "candidate": comparison.candidate.run_id}
        print(json.dumps(ids | parts, indent=2, ensure_ascii=False))
        return
    from hfbench.tables import comparison_tables

    show(comparison_tables(comparison))


_COMPARED = ("rows", "settings", "circumstances")
