"""A comparison as tables for the terminal: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hfbench.comparison.comparison import Comparison
from hfbench.comparison.differences import Difference
from hfbench.comparison.quantities import Row
from hfbench.comparison.verdict import AccuracyVerdict
from hfbench.report.terminal.run import PlainTable, as_text
from hfbench.results.formats import duration, enough_digits, factor, percent, signed

_CLASSES_SHOWN = 5
_ENGINEERING = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def comparison_tables(comparison: Comparison) -> Group:
    """Show the verdict, every quantity with its interval, and everything in which they differ."""
    a, b = comparison.baseline[0].recipe.name, comparison.candidate[0].recipe.name
    parts: list[Table | Text] = [
        Text(f"{b} against {a}", style="bold"),
        Text(comparison.sentence, style="bold green" if comparison.speed == "faster" else "bold"),
        *(Text(line, style="yellow") for line in (comparison.order, comparison.shared) if line),
        *([Text(comparison.ablation)] if comparison.ablation else []),
        *(Text(line) for line in _say_beyond(comparison)),
        _quantities(comparison, a, b),
        Text(_explain(comparison)),
    ]
    if comparison.accuracy:
        parts += _accuracy(comparison.accuracy)
    parts += [
        _differences("Settings that differ", comparison.settings, a, b),
        _differences("Circumstances that differ", comparison.circumstances, a, b),
        *(Text(f"Note: {note}") for note in comparison.notes),
    ]
    return Group(*parts)


def _say_beyond(comparison: Comparison) -> Iterator[str]:
    beyond = [
        f"{item.name.removeprefix('training_args.')} {as_text(item.baseline)} → "
        f"{as_text(item.candidate)}"
        for item in comparison.beyond
    ]
    if beyond:
        yield f"Beyond the techniques they differ in: {', '.join(beyond)}."
    idle = [item.name for item in comparison.techniques if not item.applied]
    if idle:
        yield f"Asked for, but not applied here: {', '.join(idle)}."


def _quantities(comparison: Comparison, a: str, b: str) -> Table:
    table = PlainTable()
    for heading in ("", a, b, "gain", "95 % interval"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for row in comparison.rows:
        if row.baseline is not None or row.candidate is not None:
            values = (_value(row, row.baseline), _value(row, row.candidate))
            table.add_row(row.name, *values, _gain(row), _ends(row))
    return table


def _explain(comparison: Comparison) -> str:
    pairs = "1 pair of runs" if comparison.pairs == 1 else f"{comparison.pairs} pairs of runs"
    seeds = "1 seed" if comparison.seeds == 1 else f"{comparison.seeds} seeds"
    text = (
        f"{pairs}, {seeds}. gain: how many times faster, or less memory or energy (geometric mean "
        "over pairs, interval by t on log ratios); points for shares"
    )
    if comparison.accuracy and comparison.accuracy.low is not None:
        over = "images" if comparison.seeds == 1 else "images and seeds"
        text += f" (paired bootstrap over {over})"
    if comparison.pairs == 1:
        name = comparison.candidate[0].recipe.baseline or "BASELINE"
        text += (
            ". One pair cannot tell a gain from noise; repeat it: hfbench suite "
            f"{name} {comparison.candidate[0].recipe.name} --repeats 5"
        )
    return text + "."


def _accuracy(accuracy: AccuracyVerdict) -> list[Table | Text]:
    parts: list[Table | Text] = []
    if accuracy.mcnemar:
        tests = [
            f"seed {item.seed}: {item.only_baseline} images only the baseline gets right, "
            f"{item.only_candidate} only the candidate, p = {item.p:.3g}"
            for item in accuracy.mcnemar
        ]
        parts.append(Text(f"Exact McNemar test on {accuracy.images:,} images. " + "; ".join(tests)))
    changed = [item for item in accuracy.classes if item.points][:_CLASSES_SHOWN]
    if changed:
        table = PlainTable()
        for heading in ("classes that changed most", "images", "baseline", "candidate", "points"):
            table.add_column(heading, justify="left" if "classes" in heading else "right")
        table.add_column("95 %, all classes at once", justify="right")
        for item in changed:
            table.add_row(
                item.name,
                str(item.images),
                percent(item.baseline),
                percent(item.candidate),
                signed(item.points),
                ""
                if item.low is None or item.high is None
                else f"{signed(item.low)} to {signed(item.high)}",
            )
        parts.append(table)
    return parts


def _differences(title: str, differences: Sequence[Difference], a: str, b: str) -> Table | Text:
    if not differences:
        return Text(f"{title}: none.")
    table = PlainTable()
    for heading in (title, a, b):
        table.add_column(heading, overflow="fold")
    for difference in differences:
        table.add_row(difference.name, as_text(difference.baseline), as_text(difference.candidate))
    return table


def _value(row: Row, value: float | None) -> str:
    if value is None:
        return "not measured"
    if row.unit == "share":
        return percent(value)
    if row.unit == "s":
        return duration(value)
    if row.unit == "price":
        return f"{value:.4g}"
    for size, prefix in _ENGINEERING:
        if row.unit.startswith("FLOP") and value >= size:
            return f"{value / size:.2f} {prefix}{row.unit}"
    return f"{value:.1f} {row.unit}"


def _gain(row: Row) -> str:
    if row.points is not None:
        return f"{signed(row.points)} points"
    return f"{factor(row.speedup, _digits(row))}×" if row.speedup is not None else ""


def _ends(row: Row) -> str:
    if row.low is None or row.high is None:
        return ""
    if row.points is not None:
        return f"{signed(row.low)} to {signed(row.high)}"
    digits = _digits(row)
    return f"{factor(row.low, digits)} to {factor(row.high, digits)}"


def _digits(row: Row) -> int:
    return enough_digits([end for end in (row.low, row.high) if end is not None], 1)
