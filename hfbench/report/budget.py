"""Where the time of a run goes: its parts, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context

from hfbench.report.document import Figure
from hfbench.report.drawing import (
    BACKGROUND,
    INK,
    LABEL,
    SERIES,
    STYLE,
    WIDTH,
    canvas,
    in_lines,
    time_ticks,
    to_svg,
)
from hfbench.report.sets import RunSet, with_n
from hfbench.results.formats import duration
from hfbench.results.schema import Result


@dataclass(frozen=True)
class Phase:
    """A part of a run's time.

    Attributes:
        title: What the reader sees.
        name: In the CSV file.
        read: Seconds of a run; ``None`` if they were not measured.
        color: Of its bar.
        hatch: Of its bar, so that it can be told without colours.
    """

    title: str
    name: str
    read: Callable[[Result], float | None]
    color: str
    hatch: str


def _budget(field: str) -> Callable[[Result], float | None]:
    return lambda result: getattr(result.budget, field) if result.budget else None


SET_UP = Phase("set-up", "setup_seconds", lambda r: r.times.setup_seconds, SERIES[5], "")
AFTER = (
    Phase(
        "final evaluation",
        "final_evaluation_seconds",
        lambda r: r.times.final_evaluation_seconds,
        SERIES[5],
        "///",
    ),
    Phase(
        "final save", "final_save_seconds", lambda r: r.times.final_save_seconds, SERIES[5], "xx"
    ),
)
# Of the training call, as `TimeBudget` has them; neighbours differ in colour or hatch.
PHASES = tuple(
    Phase(title, name, _budget(name), SERIES[color], hatch)
    for title, name, color, hatch in (
        ("start", "start_seconds", 4, ""),
        ("first step", "first_step_seconds", 4, "///"),
        ("data wait", "data_wait_seconds", 1, ""),
        ("copy to device", "copy_seconds", 1, "///"),
        ("device preprocessing", "preprocessing_seconds", 1, "xx"),
        ("forward", "forward_seconds", 0, ""),
        ("backward", "backward_seconds", 0, "///"),
        ("optimizer", "optimizer_seconds", 0, "xx"),
        ("evaluation", "evaluation_seconds", 2, ""),
        ("checkpoints", "save_seconds", 2, "///"),
        ("bookkeeping", "overhead_seconds", 3, ""),
    )
)
# Of a result that has no budget: what is known of the training call.
COARSE_PHASES = (
    Phase("data wait", "data_wait_seconds", lambda r: r.waited_seconds, SERIES[1], ""),
    Phase(
        "training, not split",
        "steps_seconds",
        lambda r: r.times.train_seconds - r.waited_seconds,
        SERIES[0],
        "",
    ),
    Phase("evaluation", "evaluation_seconds", lambda r: r.times.evaluation_seconds, SERIES[2], ""),
    Phase("checkpoints", "save_seconds", lambda r: r.times.save_seconds, SERIES[2], "///"),
)


def phases_of(found: RunSet) -> tuple[Phase, ...]:
    """Return the parts of a set's training call, the coarse ones if it has no budget."""
    return PHASES if all(result.budget for result in found.results) else COARSE_PHASES


def mean_seconds(found: RunSet, phase: Phase) -> float:
    """Return the arithmetic mean over the repeats: these add up as the phases of one run do."""
    summary = found.share(phase.read)
    return summary.mean if summary else 0.0


def budget_figure(sets: Sequence[RunSet], name: str) -> Figure:
    """Draw where the time of each set went, the training call from 0 on."""
    labels = [f"{in_lines(found.label, LABEL)}\n(n = {found.n})" for found in sets]
    lines = max(label.count("\n") + 1 for label in labels)
    with rc_context(STYLE):
        figure = canvas(WIDTH, 170 + max(44, 16 * lines + 4) * len(sets))
        axes = figure.subplots()
        shown: dict[str, Any] = {}
        for row, found in enumerate(sets):
            before = mean_seconds(found, SET_UP)
            _bar(axes, shown, row, -before, before, SET_UP)
            left = 0.0
            for phase in (*phases_of(found), *AFTER):
                seconds = mean_seconds(found, phase)
                if seconds > 0:
                    _bar(axes, shown, row, left, seconds, phase)
                left += seconds
            end = left - sum(mean_seconds(found, phase) for phase in AFTER)
            axes.plot([end, end], [row - 0.46, row + 0.46], color=INK, linewidth=1.4)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(sets)), labels)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        unit = time_ticks(axes.xaxis, *axes.get_xlim())
        axes.set_xlabel(f"time from the start of the training call ({unit})")
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4)
        svg = to_svg(figure, name)
    sentences = []
    for found in sets:
        parts = sorted(
            ((mean_seconds(found, phase), phase.title) for phase in phases_of(found)), reverse=True
        )
        total = sum(seconds for seconds, _ in parts)
        main = ", ".join(
            f"{title} {seconds / total:.0%}" for seconds, title in parts[:3] if seconds > 0
        )
        sentences.append(
            f"{found.label}: training call {duration(total)}" + (f", of it {main}" if main else "")
        )
    return Figure(
        name=name,
        svg=svg,
        alt=f"Where the time goes. {'; '.join(sentences)}.",
        caption=f"Where the time goes, {with_n(sets)}. Sums over a run, not a time line; means "
        "over the runs. Between 0 and the mark at the end of each bar is the training call; set-up "
        "lies before, what follows it after.",
        header=("set", "n", "part", "seconds"),
        data=[
            (found.label, found.n, phase.name, mean_seconds(found, phase))
            for found in sets
            for phase in (SET_UP, *phases_of(found), *AFTER)
        ],
    )


def _bar(
    axes: Any, shown: dict[str, Any], row: int, left: float, seconds: float, phase: Phase
) -> None:
    (bar,) = axes.barh(
        row,
        seconds,
        left=left,
        height=0.72,
        facecolor=phase.color,
        hatch=phase.hatch or None,
        edgecolor=BACKGROUND,
        linewidth=0.6,
    )
    shown.setdefault(phase.title, bar)
