"""The finished runs of a folder and what they predicted; what cannot be read is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hfbench.errors import ResultError, briefly
from hfbench.results import predictions as predicted
from hfbench.results.calibration import calibration_error
from hfbench.results.predictions import Predictions
from hfbench.results.schema import RESULT_FILE, Result, find_runs, load_result


def load_runs(folder: Path) -> tuple[dict[str, list[Result]], list[str]]:
    """Load finished runs by recipe name, and say of the others why they are left out."""
    by_recipe: dict[str, list[Result]] = {}
    left_out = []
    # A result says everything: who copies results alone need not copy the recipes beside them.
    folders = {file.parent for file in folder.glob(f"*/*/{RESULT_FILE}")}
    folders |= {run.folder for run in find_runs(folder)}
    for place in sorted(folders):
        name = f"{place.parent.name}/{place.name}"
        if not (place / RESULT_FILE).is_file():
            left_out.append(f"{name}: not finished.")
            continue
        try:
            result = load_result(place)
        except ResultError as error:
            left_out.append(f"{name}: unreadable. {briefly(error)}")
            continue
        others = by_recipe.setdefault(result.recipe.name, [])
        if result in others:
            left_out.append(f"{name}: a copy of another run.")
            continue
        others.append(result)
        try:
            if result.metrics.test is not None:
                predicted.load_predictions(result)
        except ResultError as error:
            left_out.append(f"{name}: shown without its predictions. {briefly(error)}")
    return by_recipe, left_out


def nothing_in(folder: Path, left_out: Sequence[str]) -> str:
    """Say why there is nothing to report, and what to do."""
    if (folder / RESULT_FILE).is_file():
        return f"{folder} is a single run; give the folder that holds all: {folder.parent.parent}"
    if any(folder.glob(f"*/{RESULT_FILE}")):
        return f"{folder} holds the runs of one recipe; give the folder of all: {folder.parent}"
    return (
        f"{folder} holds no finished run"
        + (f" ({len(left_out)} unfinished or unreadable)" if left_out else "")
        + ". Run a recipe first: hfbench recipe quickstart_tuned"
    )


def load_predictions(result: Result) -> Predictions | None:
    """Load what a run predicted; ``None`` if labels mean nothing or the file cannot be read.

    A file that cannot be read is told of by `load_runs`.
    """
    if result.metrics.test is None:
        return None
    try:
        return predicted.load_predictions(result)
    except ResultError:
        return None


def calibration_of(result: Result) -> float | None:
    """Return a run's expected calibration error; ``None`` if it was not measured.

    Results from before it was measured have the predictions that it is computed from.
    """
    if result.metrics.test is None or result.metrics.test.calibration_error is not None:
        return result.metrics.test.calibration_error if result.metrics.test else None
    found = load_predictions(result)
    if found is None or not found.calibrated:
        return None
    return calibration_error(found.probability, found.right)
