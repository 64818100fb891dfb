"""What each technique contributes: the newest ablation of every recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rc_context

from hfbench.comparison.verdict import FASTER, SLOWER
from hfbench.errors import ResultError, briefly
from hfbench.report import cells
from hfbench.report.document import (
    NOT_MEASURED,
    Block,
    Bullets,
    Cell,
    Column,
    Figure,
    Paragraph,
    Section,
    Table,
)
from hfbench.report.drawing import (
    BACKGROUND,
    INK,
    SERIES,
    STYLE,
    WIDTH,
    canvas,
    plain_ticks,
    to_svg,
)
from hfbench.report.sets import Summary

if TYPE_CHECKING:
    from hfbench.comparison.ratio import Ratio
    from hfbench.studies.ablation.schema import Ablation, Accuracy

_FILES = "*/ablation.json"


def load_ablations(runs: Path) -> tuple[list[Ablation], list[str]]:
    """Load the newest ablation of every recipe.

    Args:
        runs: Folder of the runs; ablations are in ``ablations/<recipe name>/<id>`` under it.

    Returns:
        The ablations by recipe name, and a sentence for each that cannot be read.
    """
    found, problems = [], []
    for folder in sorted((runs / "ablations").glob("*/")):
        if not any(folder.glob(_FILES)):
            continue
        # It imports torch, which a report of runs does without.
        from hfbench.studies.ablation.schema import load_ablation

        try:
            found.append(load_ablation(folder))
        except ResultError as error:
            problems.append(f"ablations/{folder.name}: unreadable. {briefly(error)}")
    return found, problems


def ablation_section(ablations: Sequence[Ablation]) -> Section:
    """Show what each technique contributes, recipe by recipe."""
    return Section(
        "What each technique contributes", "ablations", [], [_of_recipe(item) for item in ablations]
    )


def _of_recipe(found: Ablation) -> Section:
    name = found.recipe.name
    machine = found.environment
    blocks: list[Block] = [Paragraph(found.verdict)]
    figure = _figure(found)
    if figure:
        blocks.append(figure)
    blocks += [_contributions(found), _configurations(found)]
    notes = [*found.findings, *filter(None, [found.judged]), *found.notes]
    notes += [f"{item.technique}: not run, {item.reason}." for item in found.not_run]
    notes.append(
        f"Measured on {machine.device_name}, {machine.cpu_cores} CPU cores, torch "
        f"{machine.packages.get('torch', 'not recorded')}."
    )
    blocks.append(Bullets(notes))
    return Section(name, f"ablation-{name}", blocks)


def _figure(found: Ablation) -> Figure | None:
    """Draw the speed-up of every configuration; ``None`` if none was measured."""
    drawn = [(row, row.speedup) for row in found.rows if row.speedup is not None]
    if not drawn:
        return None
    name = f"ablation_{found.recipe.name}"
    with rc_context(STYLE):
        figure = canvas(WIDTH, 70 + 28 * len(drawn))
        axes = figure.subplots()
        for place, (_, ratio) in enumerate(drawn):
            if ratio.low is not None and ratio.high is not None:
                axes.plot([ratio.low, ratio.high], [place, place], color=SERIES[0], linewidth=1.6)
            fill = SERIES[0] if ratio.verdict in (FASTER, SLOWER) else BACKGROUND
            axes.plot(ratio.value, place, "o", color=SERIES[0], markerfacecolor=fill)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_yticks(range(len(drawn)), [row.label for row, _ in drawn])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, "×")
        axes.set_xlabel("speed-up of training over none of the techniques; right of 1 is faster")
        svg = to_svg(figure, name)
    return Figure(
        name=name,
        svg=svg,
        alt="Speed-up over none of the techniques. "
        + "; ".join(f"{row.label}: {ratio}" for row, ratio in drawn)
        + ".",
        caption=f"{found.recipe.name}: speed-up of training over none of the techniques, with 95 % "
        f"intervals, in {_measured_in(found)}. Hollow: no difference is shown.",
        header=("configuration", "rounds", "speedup", "low", "high"),
        data=[(row.name, ratio.rounds, ratio.value, ratio.low, ratio.high) for row, ratio in drawn],
    )


def _contributions(found: Ablation) -> Table:
    return Table(
        f"contributions_{found.recipe.name}",
        f"{found.recipe.name}: what each technique contributes, alone and on top of all others, in "
        f"{_measured_in(found)}.",
        [
            Column("technique", "technique", numeric=False),
            Column("what was turned on", "detail", numeric=False),
            Column("alone", "alone"),
            Column("with all others", "with_others"),
            Column("interaction", "interaction"),
        ],
        [
            [
                Cell(item.technique),
                Cell(item.detail),
                _ratio(item.alone),
                _ratio(item.with_others),
                _ratio(item.interaction),
            ]
            for item in found.contributions
        ],
    )


def _configurations(found: Ablation) -> Table:
    rows = []
    for row in found.rows:
        loss = row.first_loss
        expected = loss.expected if loss else None
        seen = loss.found if loss else None
        rows.append(
            [
                Cell(row.label),
                _ratio(row.speedup),
                Cell(row.verdict),
                cells.amount(_single(row.samples_per_second)),
                cells.amount(_single(row.peak_device_memory_mib), "MiB", 0),
                cells.amount(_single(row.peak_process_memory_mib), "MiB", 0),
                cells.number(row.effective_batch_size),
                *_accuracy(row.accuracy),
                cells.amount(_single(seen), digits=4),
                cells.amount(_single(expected), digits=4),
                Cell(" ".join(filter(None, [loss.problem if loss else None, row.failure]))),
            ]
        )
    return Table(
        f"configurations_{found.recipe.name}",
        f"{found.recipe.name}: every configuration, in {_measured_in(found)}.",
        [
            Column("configuration", "configuration", numeric=False),
            Column("speed-up", "speedup"),
            Column("verdict", "verdict", numeric=False),
            Column("images/s", "samples_per_second"),
            Column("peak device memory", "peak_device_memory_mib"),
            Column("peak process memory", "peak_process_memory_mib"),
            Column("effective batch", "effective_batch_size"),
            Column("test accuracy", "accuracy"),
            Column("difference", "accuracy_points"),
            Column("first loss", "first_loss"),
            Column("expected first loss", "expected_first_loss"),
            Column("problem", "problem", numeric=False),
        ],
        rows,
    )


def _measured_in(found: Ablation) -> str:
    if found.full:
        return f"whole runs, n = {found.finished_rounds} seeds"
    return f"windows of {found.steps} optimizer steps, n = {found.finished_rounds} rounds"


def _accuracy(accuracy: Accuracy | None) -> list[Cell]:
    """Return the cells of what only whole runs show."""
    if accuracy is None:
        return [Cell(NOT_MEASURED)] * 2
    points = accuracy.points
    return [
        cells.share(_single(accuracy.value)),
        Cell(NOT_MEASURED) if points is None else cells.points(points, accuracy.low, accuracy.high),
    ]


def _ratio(ratio: Ratio | None) -> Cell:
    return Cell(NOT_MEASURED) if ratio is None else Cell(str(ratio), ratio.value)


def _single(value: float | None) -> Summary | None:
    return None if value is None else Summary(value, value, value, 1)
