"""Figures of speed and memory: what each candidate gained, and what accuracy costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from matplotlib import rc_context

from hfbench.report.document import Figure
from hfbench.report.drawing import (
    BACKGROUND,
    INK,
    LEGEND,
    MARKERS,
    MUTED,
    SERIES,
    STYLE,
    WIDTH,
    canvas,
    cut,
    in_lines,
    plain_ticks,
    time_ticks,
    to_svg,
)
from hfbench.report.sets import Pair, RunSet, Summary, say_n, with_n
from hfbench.results.formats import duration, percent
from hfbench.results.schema import Result

SPEEDS = ("execution time", "train time", "steady-state training")
_NARROW = 480  # pixels; most of it is seen on a phone
_LONGEST_NAME = 56  # characters across it
_VARIANT_MARKERS = {"untuned": "o", "tuned": "s", "fast": "^"}


def speedup_figure(pairs: Sequence[Pair]) -> Figure | None:
    """Draw each candidate's speed-ups with their intervals; ``None`` if nothing was compared."""
    lines = list(_speedups(pairs))
    if not lines:
        return None
    parts = [
        f"{label}, {measure}: {speedup:.2f} times as fast"
        + (f", 95 % interval {low:.2f} to {high:.2f}" if low is not None else ", no interval")
        for label, measure, _, speedup, low, high in lines
        if measure == SPEEDS[0]
    ]
    return Figure(
        name="speedup",
        svg=_draw_speedups(lines),
        alt=f"Speed-ups of {len(_pair_counts(lines))} candidates. {'; '.join(parts)}.",
        caption="Speed-up of each candidate over its baseline with 95 % intervals, "
        + say_n(_pair_counts(lines))
        + " (pairs of runs). Hollow: one pair, so no interval.",
        header=("candidate", "measure", "pairs", "speedup", "low", "high"),
        data=lines,
    )


_Line = tuple[str, str, int, float, float | None, float | None]


def _speedups(pairs: Sequence[Pair]) -> Iterator[_Line]:
    for pair in pairs:
        if pair.comparison is None:
            continue
        rows = {row.name: row for row in pair.comparison.rows}
        for measure in SPEEDS:
            row = rows.get(measure)
            if row is not None and row.speedup is not None:
                yield (
                    pair.candidate.label,
                    measure,
                    pair.comparison.pairs,
                    row.speedup,
                    row.low,
                    row.high,
                )


def _draw_speedups(lines: Sequence[_Line]) -> str:
    with rc_context(STYLE):
        figure = canvas(_NARROW, 90 + 21 * len(lines) + 24 * len(_pair_counts(lines)))
        axes = figure.subplots()
        positions, height, before = [], 0.0, ""
        for label, *_ in lines:
            height += 2.0 if label != before else 0.9
            positions.append(height)
            before = label
        for kind, measure in enumerate(SPEEDS):
            chosen = [
                (y, line) for y, line in zip(positions, lines, strict=True) if line[1] == measure
            ]
            for y, (_, _, _, speedup, low, high) in chosen:
                if low is not None and high is not None:
                    axes.plot([low, high], [y, y], color=SERIES[kind], linewidth=1.6)
                axes.plot(
                    speedup,
                    y,
                    MARKERS[kind],
                    color=SERIES[kind],
                    markerfacecolor=BACKGROUND if low is None else SERIES[kind],
                )
            axes.plot([], [], MARKERS[kind], color=SERIES[kind], label=measure)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, "×")
        axes.grid(visible=False, axis="y")
        for label, _ in _pair_counts(lines):
            first = min(y for y, line in zip(positions, lines, strict=True) if line[0] == label)
            # Above its lines, not beside the axis: on a phone that would be all there is to see.
            axes.text(
                0.01,
                first - 0.95,
                cut(label, _LONGEST_NAME),
                transform=axes.get_yaxis_transform(),
                in_layout=False,
                va="center",
                weight="bold",
                bbox={"facecolor": BACKGROUND, "edgecolor": "none", "pad": 1},
            )
        axes.set_yticks([])
        axes.set_ylim(0, height + 0.8)
        axes.invert_yaxis()
        axes.set_xlabel("speed-up over the baseline; right of 1 is faster")
        figure.legend(loc="outside upper center", ncols=3)
        return to_svg(figure, "speedup")


def _pair_counts(lines: Sequence[_Line]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((label, n) for label, _, n, *_ in lines))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other beats: none is as cheap and as accurate, and better in one.

    Args:
        points: (cost, accuracy) each.

    Returns:
        Their indices, cheapest first.
    """
    front = [
        index
        for index, (cost, accuracy) in enumerate(points)
        if not any(
            other_cost <= cost and other >= accuracy and (other_cost, other) != (cost, accuracy)
            for other_cost, other in points
        )
    ]
    return sorted(front, key=lambda index: points[index])


def tradeoff_figure(
    sets: Sequence[RunSet], what: str, unit: str, read: Callable[[Result], float | None], name: str
) -> Figure | None:
    """Draw accuracy against a cost, with the Pareto front.

    Args:
        sets: Tested on the same images, run on the same machine.
        what: The cost, such as ``execution time``.
        unit: Of the cost, ``s`` or ``MiB``.
        read: Takes the cost from a result.
        name: Of the figure.

    Returns:
        ``None`` if fewer than two sets have both.
    """
    drawn = []
    for found in sets:
        cost = found.amount(read)
        accuracy = found.share(lambda r: r.metrics.test.accuracy if r.metrics.test else None)
        if cost is not None and accuracy is not None:
            drawn.append((found, cost, accuracy))
    if len(drawn) < 2:
        return None
    front = pareto_front([(cost.mean, accuracy.mean) for _, cost, accuracy in drawn])
    show = duration if unit == "s" else (lambda value: f"{value:.0f} {unit}")
    on_front = ", ".join(
        f"{drawn[index][0].label} ({percent(drawn[index][2].mean)}, {show(drawn[index][1].mean)})"
        for index in front
    )
    return Figure(
        name=name,
        svg=_draw_tradeoff(drawn, front, what, unit, name),
        alt=f"Test accuracy against {what} of {len(drawn)} recipes. On the Pareto front: "
        f"{on_front}.",
        caption=f"{sets[0].dataset}, {sets[0].newest.data.eval_samples:,} test images, machine "
        f"{sets[0].machine}: accuracy against {what}. Means of all runs, "
        f"{with_n(found for found, _, _ in drawn)}; bars from the lowest to the highest run. "
        "Filled: on the Pareto front, where none is both cheaper and more accurate.",
        header=("set", "variant", "n", f"{what} ({unit})", "accuracy", "on_front"),
        data=[
            (found.label, found.recipe.variant, found.n, cost.mean, accuracy.mean, index in front)
            for index, (found, cost, accuracy) in enumerate(drawn)
        ],
    )


def _draw_tradeoff(
    drawn: Sequence[tuple[RunSet, Summary, Summary]],
    front: Sequence[int],
    what: str,
    unit: str,
    name: str,
) -> str:
    models = list(dict.fromkeys(found.model for found, _, _ in drawn))
    with rc_context(STYLE):
        figure = canvas(WIDTH, 380 + 20 * math.ceil(len(drawn) / 2))
        axes = figure.subplots()
        for index, (found, cost, accuracy) in enumerate(drawn):
            color = SERIES[models.index(found.model) % len(SERIES)]
            place = (cost.mean, 100 * accuracy.mean)
            axes.errorbar(
                *place, xerr=_reach(cost, 1), yerr=_reach(accuracy, 100), color=color, zorder=2
            )
            axes.plot(
                *place,
                _VARIANT_MARKERS[found.recipe.variant],
                color=color,
                markerfacecolor=color if index in front else BACKGROUND,
                markersize=9,
                label=in_lines(f"{found.label} (n = {found.n})", LEGEND),
            )
        steps = [drawn[index] for index in front]
        axes.plot(
            [cost.mean for _, cost, _ in steps],
            [100 * accuracy.mean for _, _, accuracy in steps],
            color=MUTED,
            linestyle="--",
            label="Pareto front",
            zorder=1,
        )
        costs = [cost.mean for _, cost, _ in drawn]
        axes.margins(0.12)
        shown = unit
        if max(costs) > 8 * min(costs):
            axes.set_xscale("log")
            plain_ticks(axes.xaxis, "")
        elif unit == "s":
            shown = time_ticks(axes.xaxis, *axes.get_xlim())
        axes.set(xlabel=f"{what} ({shown})", ylabel="test accuracy (%)")
        figure.legend(loc="outside lower center", ncols=2)
        return to_svg(figure, name)


def _reach(summary: Summary, scale: float) -> list[list[float]]:
    """Return how far the lowest and the highest run lie from the mean; rounding gives no sign."""
    down, up = summary.mean - summary.low, summary.high - summary.mean
    return [[max(0.0, scale * down)], [max(0.0, scale * up)]]
