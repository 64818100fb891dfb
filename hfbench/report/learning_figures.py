"""Figures of learning: curves, F1 of each class, how far probabilities can be believed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context

from hfbench.machine.bounds import parse_json
from hfbench.report.confusion import NAMED_CLASSES
from hfbench.report.document import Figure
from hfbench.report.drawing import (
    INK,
    LABEL,
    LEGEND,
    MARKERS,
    MUTED,
    SERIES,
    STYLE,
    WIDTH,
    canvas,
    cut,
    in_lines,
    time_ticks,
    to_svg,
)
from hfbench.report.loading import calibration_of, load_predictions
from hfbench.report.sets import RunSet, Summary, with_n
from hfbench.results.calibration import Bin, reliability
from hfbench.results.formats import percent
from hfbench.results.schema import LOG_FILE, Result

_NO_ACCURACY = "not measured, since the labels are synthetic"
_Log = tuple[RunSet, Result, list[dict[str, Any]]]  # what a run logged
_LINES = ("-", "--", "-.", ":")
_AXES = ("epoch", "seconds")
_QUANTITIES = ("loss", "eval_loss", "eval_accuracy")


def curves_figure(sets: Sequence[RunSet], name: str) -> Figure | None:
    """Draw loss and accuracy of each run over epochs and over time; ``None`` without logs."""
    logs = [(found, result, list(_entries(result))) for found in sets for result in found.results]
    data = [
        (found.label, result.seed, quantity, entry["epoch"], entry["seconds"], entry[quantity])
        for found, result, entries in logs
        for entry in entries
        for quantity in _QUANTITIES
        if _is_number(entry.get(quantity))
    ]
    if not data:
        return None
    ends = []
    for found in sets:
        last = found.share(lambda r: r.metrics.test.accuracy if r.metrics.test else None)
        if last:
            ends.append(f"{found.label} ends at {percent(last.mean)}")
    return Figure(
        name=name,
        svg=_draw_curves(sets, logs, name),
        alt="Loss and test accuracy over epochs and over time. Test accuracy: "
        f"{'; '.join(ends) or _NO_ACCURACY}.",
        caption="Training loss, test loss and test accuracy as logged, one line for each run: "
        f"{with_n(sets)}.",
        header=("set", "seed", "quantity", "epoch", "seconds", "value"),
        data=data,
    )


def _draw_curves(sets: Sequence[RunSet], logs: Sequence[_Log], name: str) -> str:
    with rc_context(STYLE):
        figure = canvas(WIDTH, 560 + 12 * len(sets))
        grid = figure.subplots(2, 2, sharex="col", sharey="row")
        for found, _, entries in logs:
            number = list(sets).index(found)
            for column, x in enumerate(_AXES):
                _draw_run(grid[:, column], entries, x, number)
        for number, found in enumerate(sets):
            style = {"color": SERIES[number % len(SERIES)], "linestyle": _LINES[number % 4]}
            label = in_lines(f"{found.label} (n = {found.n})", LEGEND)
            grid[0, 0].plot([], [], marker=MARKERS[number % 6], label=label, **style)
        unit = time_ticks(grid[1, 1].xaxis, 0, grid[1, 1].get_xlim()[1])
        for column, x in enumerate(
            ("epochs", f"time from the start of the training call ({unit})")
        ):
            grid[0, column].set(ylabel="" if column else "loss", ylim=(0, None))
            grid[1, column].set(
                ylabel="" if column else "test accuracy (%)", xlabel=x, xlim=(0, None)
            )
        grid[0, 0].set_title("faint: training loss; marked: test loss")
        figure.legend(loc="outside lower center", ncols=2)
        return to_svg(figure, name)


def _entries(result: Result) -> Iterator[dict[str, Any]]:
    """Read a run's log; after a resume its clock starts anew, and goes on from before here."""
    if result.folder is None:
        return
    try:
        lines = (result.folder / LOG_FILE).read_text("utf-8").splitlines()
        entries = [parse_json(line) for line in lines]
    except (OSError, ValueError):
        return
    before = last = 0.0
    for entry in entries:
        if not isinstance(entry, dict) or not all(map(_is_number, map(entry.get, _AXES))):
            continue
        if entry["seconds"] < last:
            before += last
        last = entry["seconds"]
        yield entry | {"seconds": before + last}


def _is_number(value: object) -> bool:
    """Tell whether it can be drawn; the loss of a training that diverged cannot."""
    return isinstance(value, int | float) and math.isfinite(value)


def _draw_run(rows: Sequence[Any], entries: Sequence[dict[str, Any]], x: str, number: int) -> None:
    color, line = SERIES[number % len(SERIES)], _LINES[number % len(_LINES)]
    marker = MARKERS[number % len(MARKERS)]
    axes_of = (rows[0], rows[0], rows[1])
    for axes, quantity, scale in zip(axes_of, _QUANTITIES, (1, 1, 100), strict=True):
        found = [(e[x], scale * e[quantity]) for e in entries if _is_number(e.get(quantity))]
        if not found:
            continue
        style = {"linewidth": 0.9, "alpha": 0.55} if quantity == "loss" else {"marker": marker}
        axes.plot(*zip(*found, strict=True), color=color, linestyle=line, markersize=5, **style)


def f1_figure(sets: Sequence[RunSet], name: str) -> Figure | None:
    """Draw F1 of each class, of many classes the worst; ``None`` if labels mean nothing."""
    measured = [found for found in sets if found.newest.metrics.test]
    if not measured:
        return None
    names = list(_f1_of(measured[0].newest))
    values = {found.label: [_f1(found, label) for label in names] for found in measured}
    order = sorted(range(len(names)), key=lambda index: values[measured[0].label][index])
    shown = order[:NAMED_CLASSES]
    with rc_context(STYLE):
        figure = canvas(WIDTH, 100 + 24 * len(shown) + 12 * len(measured))
        axes = figure.subplots()
        for number, found in enumerate(measured):
            axes.plot(
                [values[found.label][index] for index in shown],
                range(len(shown)),
                MARKERS[number % len(MARKERS)],
                color=SERIES[number % len(SERIES)],
                markerfacecolor="none" if number % 2 else SERIES[number % len(SERIES)],
                label=in_lines(f"{found.label} (n = {found.n})", LEGEND),
            )
        axes.set_yticks(range(len(shown)), [cut(names[index]) for index in shown])
        axes.invert_yaxis()
        drawn = [value for found in values.values() for value in (found[i] for i in shown)]
        axes.set(xlabel="F1", xlim=(max(min(drawn) - 0.02, -0.01), min(max(drawn) + 0.02, 1.01)))
        figure.legend(loc="outside lower center", ncols=2)
        svg = to_svg(figure, name)
    first = measured[0].label
    worst = ", ".join(f"{names[index]} {values[first][index]:.3f}" for index in shown[:3])
    which = f"the {len(shown)} worst of {len(names)} classes" if shown != order else "each class"
    return Figure(
        name=name,
        svg=svg,
        alt=f"F1 of {which}. Worst of {first}: {worst}.",
        caption=f"F1 of {which} on the test images, worst of {first} on top; means of all "
        f"runs, {with_n(measured)}.",
        header=("set", "n", "class", "f1"),
        data=[
            (found.label, found.n, label, value)
            for found in measured
            for label, value in zip(names, values[found.label], strict=True)
        ],
    )


def _f1(found: RunSet, label: str) -> float:
    summary = found.share(lambda result: _f1_of(result).get(label))
    return summary.mean if summary else float("nan")


def _f1_of(result: Result) -> dict[str, float]:
    return result.metrics.test.f1_per_class if result.metrics.test else {}


def reliability_figure(sets: Sequence[RunSet], name: str) -> Figure | None:
    """Draw accuracy against confidence, and the calibration error; ``None`` without predictions."""
    drawn = []
    for found in sets:
        loaded = [
            saved
            for saved in map(load_predictions, found.results)
            if saved is not None and saved.calibrated
        ]
        error = found.share(calibration_of)
        if loaded and error is not None:
            probability = np.concatenate([saved.probability for saved in loaded])
            right = np.concatenate([saved.right for saved in loaded])
            drawn.append((found, error, reliability(probability, right)))
    if not drawn:
        return None
    errors = "; ".join(f"{found.label} {percent(error.mean)}" for found, error, _ in drawn)
    return Figure(
        name=name,
        svg=_draw_reliability(drawn, name),
        alt=f"Reliability diagrams. Expected calibration error: {errors}.",
        caption="Share of right answers against the mean probability of the predicted class, in "
        f"{len(drawn[0][2])} bins over the test images of all runs "
        f"({with_n(found for found, _, _ in drawn)}). On the dashed line the probabilities can be "
        "believed; below it the model is too sure. ECE: expected calibration error, mean of the "
        "runs.",
        header=("set", "low", "high", "count", "confidence", "accuracy"),
        data=[
            (found.label, entry.low, entry.high, entry.count, entry.confidence, entry.accuracy)
            for found, _, bins in drawn
            for entry in bins
        ],
    )


def _draw_reliability(drawn: Sequence[tuple[RunSet, Summary, list[Bin]]], name: str) -> str:
    columns = min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    with rc_context(STYLE):
        figure = canvas(40 + 270 * columns, 20 + 300 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(drawn) :]:
            axes.set_axis_off()
        for axes, (found, error, bins) in zip(grid.flat, drawn, strict=False):
            used = [entry for entry in bins if entry.count]
            axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
            axes.bar(
                [entry.low for entry in used],
                [entry.accuracy for entry in used],
                width=bins[0].high - bins[0].low,
                align="edge",
                color=SERIES[0],
                alpha=0.35,
            )
            axes.plot(
                [entry.confidence for entry in used],
                [entry.accuracy for entry in used],
                "o-",
                color=INK,
                markersize=4,
                linewidth=1,
            )
            title = f"{in_lines(found.label, LABEL)}\nECE {percent(error.mean)}, n = {found.n}"
            axes.set_title(title, fontsize=11)
            axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        figure.supxlabel("mean probability of the predicted class")
        figure.supylabel("share of right answers")
        return to_svg(figure, name)
