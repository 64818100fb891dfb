"""Numbers as readers see them in the report's tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hfbench.comparison.quantities import Row
from hfbench.report.document import NOT_GIVEN, NOT_MEASURED, NOT_RUN, Cell
from hfbench.report.sets import Summary
from hfbench.results.formats import duration, enough_digits, factor, percent, signed


def not_run() -> Cell:
    """Return the cell of what was not run."""
    return Cell(NOT_RUN)


def number(value: int) -> Cell:
    """Return the cell of a count."""
    return Cell(f"{value:,}", value)


def given_share(value: float | None) -> Cell:
    """Return the cell of a reference's share, which it may not give."""
    return Cell(NOT_GIVEN) if value is None else Cell(percent(value), value)


def given_seconds(value: float | None) -> Cell:
    """Return the cell of a reference's time, which it may not give."""
    return Cell(NOT_GIVEN) if value is None else Cell(duration(value), value)


def share(summary: Summary | None) -> Cell:
    """Return the cell of a share: the mean, and the range of several runs."""
    return _summarized(summary, lambda value: f"{100 * value:.2f}", " %")


def seconds(summary: Summary | None) -> Cell:
    """Return the cell of a time: the mean, and the range of several runs."""
    return _summarized(summary, duration, "")


def amount(summary: Summary | None, unit: str = "", digits: int = 1) -> Cell:
    """Return the cell of another quantity: the mean, and the range of several runs."""
    return _summarized(summary, lambda value: f"{value:,.{digits}f}", f" {unit}" if unit else "")


def _summarized(summary: Summary | None, show: Callable[[float], str], unit: str) -> Cell:
    if summary is None:
        return Cell(NOT_MEASURED)
    mean, low, high = map(show, (summary.mean, summary.low, summary.high))
    between = f" ({low}–{high})" if low != high else ""
    return Cell(f"{mean}{unit}{between}", summary.mean)


def measured(row: Row, value: float | None) -> Cell:
    """Return the cell of one side of a comparison's row."""
    if value is None:
        return Cell(NOT_MEASURED)
    if row.unit == "share":
        return Cell(percent(value), value)
    if row.unit == "s":
        return Cell(duration(value), value)
    if row.unit in ("FLOP", "FLOP/s", "J"):
        return prefixed(value, row.unit)
    return Cell(f"{value:,.0f} {row.unit}" if value >= 100 else f"{value:.3g} {row.unit}", value)


def prefixed(value: float, unit: str) -> Cell:
    """Return the cell of a large quantity, with a prefix such as G for 10^9."""
    shown, prefix = value, ""
    for larger in "kMGTP":
        if shown < 1000:
            break
        shown, prefix = shown / 1000, larger
    return Cell(f"{shown:.3g} {prefix}{unit}", value)


def gain(row: Row | None) -> Cell:
    """Return the cell of a row's gain with its interval, where there is one."""
    if row is None:
        return Cell(NOT_MEASURED)
    if row.points is not None:
        return points(row.points, row.low, row.high)
    if row.speedup is None:
        return Cell(NOT_MEASURED)
    if row.low is None or row.high is None:
        return Cell(f"{factor(row.speedup)}×", row.speedup)
    digits = enough_digits((row.low, row.high), 1)
    value, low, high = (factor(number, digits) for number in (row.speedup, row.low, row.high))
    return Cell(f"{value}× [{low}, {high}]", row.speedup)


def points(value: float, low: float | None, high: float | None) -> Cell:
    """Return the cell of a difference in percentage points with its interval, if it has one."""
    text = f"{signed(value)} points"
    if low is not None and high is not None:
        text += f" [{signed(low)}, {signed(high)}]"
    return Cell(text, value)


def setting(name: str, value: Any) -> Cell:
    """Return the cell of a setting; of a folder only its last part is published."""
    if isinstance(value, str) and name.endswith("name_or_path"):
        value = value.rstrip("/").rsplit("/", 1)[-1]
    return Cell(value if isinstance(value, str) else json.dumps(value))
