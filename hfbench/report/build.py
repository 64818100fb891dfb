"""Put a report together and write it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hfbench.comparison.comparison import MARGIN_POINTS
from hfbench.errors import ResultError
from hfbench.recipe.rechecking import output_folder
from hfbench.recipe.schema import local_path
from hfbench.report.ablations import ablation_section, load_ablations
from hfbench.report.closing import left_out_section, machines_section, reading_section
from hfbench.report.comparisons import comparison_section
from hfbench.report.details import (
    calibration_section,
    compute_section,
    learning_section,
    mistakes_section,
    time_section,
    tradeoff_section,
)
from hfbench.report.document import Document, Figure, Section
from hfbench.report.drawing import for_file
from hfbench.report.markdown import render_markdown
from hfbench.report.page import render_page
from hfbench.report.reference import has_reference, reference_section
from hfbench.report.sets import Collection, collect_runs
from hfbench.report.verdicts import headline, runs_section

if TYPE_CHECKING:
    from hfbench.studies.ablation.schema import Ablation

TITLE = "What tuning bought: hfbench report"


def write_report(
    runs: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    margin_points: float = MARGIN_POINTS,
) -> list[Path]:
    """Write a report of all finished runs in a folder, as Markdown and as one HTML page.

    Args:
        runs: Folder of ``<recipe name>/<run id>/``.
        output: Folder for ``report.md``, ``index.html``, ``data/`` and ``figures/``; made if it is
            not there. Files of the same names are replaced, others left alone.
        margin_points: The loss of accuracy, in percentage points, that would be put up with.

    Returns:
        Every file written, the page first.

    Raises:
        ResultError: If there is no finished run that can be read, or the report cannot be written.
        ComparisonError: If the margin cannot be.
    """
    collection = collect_runs(local_path(runs), margin_points)
    ablations, unreadable = load_ablations(local_path(runs))
    left_out = [*collection.left_out, *unreadable]
    document = build_document(replace(collection, left_out=left_out), ablations)
    folder = output_folder(output, "output")
    try:
        return list(_write(document, folder))
    except OSError as error:
        raise ResultError(
            f"The report cannot be written to {folder}: {error.strerror or error}; give another "
            "folder with -o."
        ) from None


def build_document(runs: Collection, ablations: Sequence[Ablation]) -> Document:
    """Build the report, its sections in the order in which questions are asked."""
    sections: list[Section] = []
    reference = reference_section(runs.sets)
    has_reference_runs = any(map(has_reference, runs.sets))
    if has_reference_runs:
        sections.append(reference)
    sections.append(runs_section(runs))
    if runs.pairs:
        sections.append(comparison_section(runs.pairs, runs.margin_points))
    if ablations:
        sections.append(ablation_section(ablations))
    sections += [
        tradeoff_section(runs.sets),
        time_section(runs.sets),
        learning_section(runs.sets),
        mistakes_section(runs.sets),
        calibration_section(runs.sets),
        compute_section(runs.sets),
    ]
    if not has_reference_runs:  # two tables of "not run" are not what a reader looks for first
        sections.append(reference)
    sections += [
        machines_section(runs),
        reading_section(runs.margin_points),
        left_out_section(runs),
    ]
    return Document(TITLE, headline(runs), sections)


def _write(document: Document, folder: Path) -> Iterable[Path]:
    for name in ("data", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    yield _save(folder / "index.html", render_page(document))
    yield _save(folder / "report.md", render_markdown(document))
    for item in document.attachments():
        yield _save(folder / "data" / f"{item.name}.csv", item.csv())
        if isinstance(item, Figure):
            yield _save(folder / "figures" / f"{item.name}.svg", for_file(item.svg))


def _save(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8", newline="\n")
    return path
