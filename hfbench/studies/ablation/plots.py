"""An ablation as a picture and as a table of plain text."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullLocator

from hfbench.comparison.verdict import FASTER, SLOWER
from hfbench.studies.ablation.schema import Ablation, Row

PLOT_FILE = "ablation.png"
CSV_FILE = "ablation.csv"

# Colours of Okabe and Ito that people with any colour vision tell apart.
_COLORS = {FASTER: "#009E73", SLOWER: "#D55E00"}
_PLAIN = "#555555"
_FLAG = "#CC0000"
_BEYOND = 1.6  # the axis ends at so many times the largest speed-up


def plot_ablation(ablation: Ablation, path: Path) -> None:
    """Draw speed-ups with intervals, and peak memory, of every configuration.

    Args:
        ablation: With at least one finished round.
        path: PNG to write.
    """
    rows = [row for row in ablation.rows if row.speedup is not None]
    figure = Figure(figsize=(9, 1.8 + 0.4 * len(rows)), layout="constrained")
    speeds, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_speedups(speeds, rows)
    _draw_memory(memory, rows)
    speeds.set_yticks(range(len(rows)), [_name(row) for row in rows])
    for label, row in zip(speeds.get_yticklabels(), rows, strict=True):
        if row.flagged:
            label.set_color(_FLAG)
    speeds.invert_yaxis()
    figure.suptitle(
        f"{ablation.recipe.name} on {ablation.environment.device_name}: "
        f"{ablation.finished_rounds} {'seeds, whole runs' if ablation.full else 'rounds'}",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)


def _name(row: Row) -> str:
    return f"{row.label} (first loss wrong)" if row.flagged else row.label


def _draw_speedups(axes: Axes, rows: Sequence[Row]) -> None:
    values = [row.speedup.value for row in rows if row.speedup]
    # Intervals that say nothing would press all others together.
    left, right = min(values) / _BEYOND, max(values) * _BEYOND
    axes.set(xscale="log", xlim=(left, right))
    axes.axvline(1, color="black", linewidth=1)
    for place, row in enumerate(rows):
        found = row.speedup
        if found is None:
            continue
        color = _FLAG if row.flagged else _COLORS.get(row.verdict, _PLAIN)
        if found.low is not None and found.high is not None:
            ends = max(found.low, left), min(found.high, right)
            axes.plot(ends, [place, place], color=color, linewidth=2)
            for end, edge, mark in ((found.low, left, "<"), (found.high, right, ">")):
                if not left <= end <= right:
                    axes.plot(edge, place, mark, color=color, clip_on=False)
        axes.plot(found.value, place, "X" if row.flagged else "o", color=color, markersize=8)
        axes.annotate(
            f"{found.value:.2f}×",
            (found.value, place),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=color,
            bbox={"boxstyle": "square,pad=0.1", "color": "white"},  # the line at 1 goes behind it
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(
        "speed-up over none, 95 % interval\n(green: faster, orange: slower,\n"
        "grey: no difference shown; an arrow: it goes on)"
    )
    axes.grid(axis="x", alpha=0.3)
    axes.margins(y=0.12)


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    on_device = any(row.peak_device_memory_mib is not None for row in rows)
    values = [
        (row.peak_device_memory_mib if on_device else row.peak_process_memory_mib) or 0.0
        for row in rows
    ]
    bars = axes.barh(range(len(rows)), values, height=0.55, color="#56B4E9")
    axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=3, fontsize=8)
    axes.set_xlabel(f"peak {'device' if on_device else 'process'} memory (MiB)")
    axes.margins(x=0.15)
    axes.tick_params(left=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def write_csv(ablation: Ablation, path: Path) -> None:
    """Write one line a configuration; empty cells were not measured."""
    lines = [_line(row) for row in ablation.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    path.write_text(text.getvalue(), "utf-8")


def _line(row: Row) -> dict[str, Any]:
    speedup, loss = row.speedup, row.first_loss
    return {
        "configuration": row.name,
        "techniques": "; ".join(row.techniques),
        "effective_batch_size": row.effective_batch_size,
        "speedup": speedup.value if speedup else None,
        "speedup_low": speedup.low if speedup else None,
        "speedup_high": speedup.high if speedup else None,
        "rounds": speedup.rounds if speedup else 0,
        "verdict": row.verdict,
        "samples_per_second": row.samples_per_second,
        "seconds_per_step": row.seconds_per_step,
        "data_wait_share": row.data_wait_share,
        "peak_process_memory_mib": row.peak_process_memory_mib,
        "peak_device_memory_mib": row.peak_device_memory_mib,
        "first_loss": loss.found if loss else None,
        "expected_first_loss": loss.expected if loss else None,
        "first_loss_tolerance": loss.tolerance if loss else None,
        "flagged": row.flagged,
        "accuracy": row.accuracy.value if row.accuracy else None,
        "accuracy_points": row.accuracy.points if row.accuracy else None,
        "accuracy_points_low": row.accuracy.low if row.accuracy else None,
        "accuracy_points_high": row.accuracy.high if row.accuracy else None,
        "failure": row.failure,
    }
