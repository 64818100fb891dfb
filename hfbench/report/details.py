"""What lies behind the verdicts: trade-offs, time, learning, mistakes, arithmetic, energy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hfbench.report import cells
from hfbench.report.budget import (
    AFTER,
    COARSE_PHASES,
    PHASES,
    SET_UP,
    budget_figure,
    mean_seconds,
    phases_of,
)
from hfbench.report.confusion import (
    NAMED_CLASSES,
    confused_pairs,
    confusion_figure,
    count_confusions,
)
from hfbench.report.document import (
    NOT_MEASURED,
    Block,
    Cell,
    Column,
    Figure,
    Paragraph,
    Section,
    Table,
)
from hfbench.report.learning_figures import curves_figure, f1_figure, reliability_figure
from hfbench.report.sets import RunSet, grouped, same_test, same_work
from hfbench.report.speed_figures import tradeoff_figure
from hfbench.report.verdicts import anchor
from hfbench.results.formats import duration
from hfbench.results.schema import Compute, Result

_SHOWN_MISTAKES = 15
_SET = Column("recipe", "set", numeric=False)
_N = Column("n", "n")
_NOTE = Column("note", "note", numeric=False)


def tradeoff_section(sets: Sequence[RunSet]) -> Section:
    """Draw accuracy against time and against memory, for each test and machine."""
    sections = []
    for number, found in enumerate(grouped(sets, same_test).values(), start=1):
        blocks: list[Block] = []
        for what, unit, read, name in (
            ("execution time", "s", lambda r: r.times.execution_seconds, "time"),
            ("peak device memory", "MiB", lambda r: r.memory.peak_device_memory_mib, "device"),
            ("peak process memory", "MiB", lambda r: r.memory.peak_process_memory_mib, "process"),
        ):
            figure = tradeoff_figure(found, what, unit, read, f"accuracy_{name}_{number}")
            if figure:
                blocks.append(figure)
        if not blocks:
            blocks.append(
                Paragraph("Nothing to draw: one recipe alone was tested on these images.")
            )
        title = f"{found[0].dataset}, machine {found[0].machine}"
        sections.append(Section(title, f"tradeoffs-{number}", blocks))
    return Section("Accuracy against time and memory", "tradeoffs", [], sections)


def time_section(sets: Sequence[RunSet]) -> Section:
    """Show where the time of every set went."""
    sections = []
    for number, found in enumerate(grouped(sets, same_work).values(), start=1):
        figure = budget_figure(found, f"time_{number}")
        blocks: list[Block] = [figure, _time_table(found, number)]
        sections.append(Section(_title(found), f"time-{number}", blocks))
    return Section("Where the time goes", "time", [], sections)


def _time_table(sets: Sequence[RunSet], number: int) -> Table:
    # A set without a budget has other parts; each shows the parts that it has.
    phases = list(dict.fromkeys(phase for found in sets for phase in phases_of(found)))
    ordered = [phase for phase in (*PHASES, *COARSE_PHASES) if phase in phases]
    rows = []
    for phase in (SET_UP, *ordered, *AFTER):
        row = [Cell(phase.title)]
        for found in sets:
            measured = phase in (SET_UP, *phases_of(found), *AFTER)
            seconds = mean_seconds(found, phase)
            row.append(Cell(duration(seconds), seconds) if measured else Cell(NOT_MEASURED))
        rows.append(row)
    total = [Cell("training call, all of it")]
    for found in sets:
        seconds = sum(result.times.execution_seconds for result in found.results) / found.n
        total.append(Cell(duration(seconds), seconds))
    return Table(
        f"time_table_{number}",
        "Where the time goes, arithmetic means over the runs.",
        [Column("part", "part", numeric=False)]
        + [Column(f"{found.label} (n = {found.n})", found.label) for found in sets],
        [*rows, total],
    )


def learning_section(sets: Sequence[RunSet]) -> Section:
    """Draw how every set learned."""
    return Section(
        "How they learned", "learning", [], list(_work_sections(sets, "curves", curves_figure))
    )


def calibration_section(sets: Sequence[RunSet]) -> Section:
    """Draw how far the probabilities of every set can be believed."""
    sections = list(_work_sections(sets, "reliability", reliability_figure))
    return Section("How far the probabilities can be believed", "calibration", [], sections)


def _work_sections(
    sets: Sequence[RunSet], name: str, draw: Callable[[Sequence[RunSet], str], Figure | None]
) -> Iterator[Section]:
    for number, found in enumerate(grouped(sets, same_work).values(), start=1):
        figure = draw(found, f"{name}_{number}")
        block = figure or Paragraph("Not measured, or the files are no longer there.")
        yield Section(_title(found), f"{name}-{number}", [block])


def mistakes_section(sets: Sequence[RunSet]) -> Section:
    """Show which classes every set gets wrong, and what it takes them for."""
    sections = []
    for number, found in enumerate(grouped(sets, same_work).values(), start=1):
        blocks: list[Block] = []
        figure = f1_figure(found, f"f1_{number}")
        if figure:
            blocks.append(figure)
        for item in found:
            blocks += _confusions(item)
        if not blocks:
            blocks.append(Paragraph("Not measured, since the labels are synthetic."))
        sections.append(Section(_title(found), f"mistakes-{number}", blocks))
    return Section("What the models get wrong", "mistakes", [], sections)


def _confusions(found: RunSet) -> Iterator[Block]:
    counts = count_confusions(found)
    if counts is None:
        return
    name = anchor(found.label)
    yield confusion_figure(found, counts, f"confusion_{name}")
    names = found.newest.data.label_names
    if len(names) <= NAMED_CLASSES:
        return
    of_class = counts.sum(axis=1)
    rows = [
        [
            Cell(names[row]),
            Cell(names[column]),
            cells.number(int(counts[row, column])),
            Cell(f"{counts[row, column] / of_class[row]:.1%}", counts[row, column] / of_class[row]),
        ]
        for row, column in confused_pairs(counts)[:_SHOWN_MISTAKES]
    ]
    yield Table(
        f"mistakes_{name}",
        f"{found.label}: the most frequent mistakes, summed over all runs, n = {found.n}.",
        [
            Column("true class", "true", numeric=False),
            Column("taken for", "predicted", numeric=False),
            Column("images", "images"),
            Column("share of the class", "share"),
        ],
        rows,
    )


def compute_section(sets: Sequence[RunSet]) -> Section:
    """Show how much arithmetic a step is and how much of the device it used, and the energy."""
    if not any(result.compute for found in sets for result in found.results):
        text = "Arithmetic: not measured; these runs are older than its measurement."
        return Section("Arithmetic and energy", "compute", [Paragraph(text), _energy(sets)])
    rows = []
    for found in sets:
        latest = found.newest.compute
        note = latest.note or "" if latest else ""
        rows.append(
            [
                Cell(found.label),
                cells.number(found.n),
                Cell(latest.dtype if latest else NOT_MEASURED),
                _flops(found, "forward_flops_per_image", "FLOP"),
                _flops(found, "train_flops_per_image", "FLOP"),
                _flops(found, "achieved_flops_per_second", "FLOP/s"),
                _flops(found, "peak_flops_per_second", "FLOP/s"),
                _utilization(found),
                Cell(note),
            ]
        )
    columns = [
        _SET,
        _N,
        Column("computed in", "dtype", numeric=False),
        Column("forward, per image", "forward_flops_per_image"),
        Column("training, per image", "train_flops_per_image"),
        Column("achieved", "achieved_flops_per_second"),
        Column("measured peak of a device", "peak_flops_per_second"),
        Column("utilization", "utilization"),
        _NOTE,
    ]
    table = Table("compute", "Arithmetic of training, means of n runs.", columns, rows)
    return Section("Arithmetic and energy", "compute", [table, _energy(sets)])


def _flops(found: RunSet, field: str, unit: str) -> Cell:
    summary = found.amount(lambda result: getattr(result.compute, field, None))
    if summary is None:
        return Cell(NOT_MEASURED)
    return cells.prefixed(summary.mean, unit)


def _utilization(found: RunSet) -> Cell:
    """Write a share of the peak, or "unknown" where it was tried to measure one."""
    summary = found.share(lambda r: r.compute.utilization if r.compute else None)
    if summary is None and isinstance(found.newest.compute, Compute):
        return Cell("unknown")
    return cells.share(summary)


def _energy(sets: Sequence[RunSet]) -> Block:
    def joules(found: RunSet, field: str) -> Cell:
        summary = found.amount(lambda result: getattr(result.energy, field, None))
        return cells.amount(summary, "J", 0)

    def per_image(result: Result) -> float | None:
        used = result.energy and result.energy.device_joules
        images = result.training.epochs * result.data.train_samples
        return used / images if used and images else None

    if not any(_has_energy(result) for found in sets for result in found.results):
        notes = {
            result.energy.note
            for found in sets
            for result in found.results
            if result.energy and result.energy.note
        }
        return Paragraph(" ".join(["Energy: not measured.", *sorted(notes)]))
    return Table(
        "energy",
        "Energy of the training call, means of n runs.",
        [
            _SET,
            _N,
            Column("devices", "device_joules"),
            Column("devices, per training image", "device_joules_per_image"),
            Column("CPU packages", "cpu_joules"),
            _NOTE,
        ],
        [
            [
                Cell(found.label),
                cells.number(found.n),
                joules(found, "device_joules"),
                cells.amount(found.amount(per_image), "J", 3),
                joules(found, "cpu_joules"),
                Cell((found.newest.energy and found.newest.energy.note) or ""),
            ]
            for found in sets
        ],
    )


def _has_energy(result: Result) -> bool:
    energy = result.energy
    return energy is not None and (energy.device_joules, energy.cpu_joules) != (None, None)


def _title(sets: Sequence[RunSet]) -> str:
    first = sets[0]
    return f"{first.model} on {first.dataset}, machine {first.machine}"
