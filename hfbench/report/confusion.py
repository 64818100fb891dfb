"""Which classes are taken for which: counts, the most frequent mistakes, a drawing of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

from hfbench.report.document import Figure
from hfbench.report.drawing import SERIES, STYLE, canvas, cut, to_svg
from hfbench.report.loading import load_predictions
from hfbench.report.sets import RunSet
from hfbench.results.formats import percent

NAMED_CLASSES = 20  # more names than this cannot be read along an axis
_LEVELS = 12  # shades


def count_confusions(found: RunSet) -> np.ndarray | None:
    """Count how often each class was taken for each, over all runs of a set.

    Returns:
        int, (C, C): row true class, column predicted; ``None`` without predictions.
    """
    classes = len(found.newest.data.label_names)
    total, read = np.zeros((classes, classes), dtype=np.int64), 0
    for predictions in map(load_predictions, found.results):
        if predictions is not None:
            np.add.at(total, (predictions.label, predictions.prediction), 1)
            read += 1
    return total if read else None


def confusion_figure(found: RunSet, counts: np.ndarray, name: str) -> Figure:
    """Draw a confusion matrix; right answers and mistakes in different colours.

    Args:
        found: The set.
        counts: From `count_confusions`.
        name: Of the figure.
    """
    names = found.newest.data.label_names
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    worst = confused_pairs(counts)[:3]
    main = "; ".join(
        f"{names[row]} taken for {names[column]} in {share[row, column]:.1%}"
        for row, column in worst
    )
    right = np.trace(counts) / counts.sum()
    return Figure(
        name=name,
        svg=_draw(share, names, name),
        alt=f"Confusion matrix of {found.label}: {percent(right)} of the test images are right. "
        + (f"Most frequent mistakes: {main}." if main else "There are no mistakes."),
        caption=f"{found.label}: share of each true class's test images, in per cent, that was "
        f"predicted as each class; mistakes in the second colour. n = {found.n}, with "
        f"{found.newest.data.eval_samples:,} test images each."
        + (
            ""
            if len(names) <= NAMED_CLASSES
            else f" The {len(names)} classes are numbered as in the data set."
        ),
        header=("true", "predicted", "count", "share of true class"),
        data=[
            (names[row], names[column], int(counts[row, column]), float(share[row, column]))
            for row, column in zip(*np.nonzero(counts), strict=True)
        ],
    )


def _draw(share: np.ndarray, names: Sequence[str], name: str) -> str:
    few = len(names) <= NAMED_CLASSES
    with rc_context(STYLE | {"axes.grid": False}):
        size = 190 + 42 * len(names) if few else 640
        figure = canvas(max(size, 400), max(size - 40, 360))
        axes = figure.subplots()
        # Cells with numbers stay pale enough to read them.
        darkest = 0.45 if few else 1.0
        _shade(axes, np.where(np.eye(len(names), dtype=bool), share, 0), SERIES[0], darkest)
        _shade(axes, np.where(np.eye(len(names), dtype=bool), 0, share), SERIES[1], darkest)
        axes.set(
            xlim=(-0.5, len(names) - 0.5),
            ylim=(len(names) - 0.5, -0.5),
            xlabel="predicted class",
            ylabel="true class",
            aspect="equal",
        )
        if few:
            axes.set_xticks(range(len(names)), map(cut, names), rotation=45, ha="right")
            axes.set_yticks(range(len(names)), map(cut, names))
            for row, column in zip(*np.nonzero(share), strict=True):
                value = 100 * share[row, column]
                axes.text(
                    column,
                    row,
                    f"{value:.0f}" if value >= 1 else f"{value:.1f}" if value >= 0.05 else "<.1",
                    ha="center",
                    va="center",
                    fontsize=11,
                )
        return to_svg(figure, name)


def confused_pairs(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return (true, predicted) classes that were mixed up, the most frequent mistakes first."""
    mistakes = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-mistakes, axis=None, kind="stable")
    pairs = [divmod(int(index), len(counts)) for index in order]
    return [(row, column) for row, column in pairs if mistakes[row, column]]


def _shade(axes: Any, share: np.ndarray, color: str, darkest: float) -> None:
    """Draw cells as one path a shade: 100 classes would otherwise be 10,000 elements."""
    # By the square root, or the few per cent of a mistake could not be seen.
    level = np.ceil(np.sqrt(share) * _LEVELS).astype(int)
    for shade in range(1, _LEVELS + 1):
        corners = [
            ((x - 0.5, y - 0.5), (x + 0.5, y - 0.5), (x + 0.5, y + 0.5), (x - 0.5, y + 0.5))
            for y, x in zip(*np.nonzero(level == shade), strict=True)
        ]
        if not corners:
            continue
        codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
        outline = Outline(
            [point for square in corners for point in (*square, square[0])], codes * len(corners)
        )
        alpha = darkest * (shade + 2) / (_LEVELS + 2)  # the palest can still be seen
        axes.add_patch(PathPatch(outline, facecolor=color, alpha=alpha, linewidth=0))
