"""Each candidate against its baseline: all together first, then one by one."""

from __future__ import annotations

from collections.abc import Sequence

from hfbench.comparison.comparison import Comparison
from hfbench.comparison.verdict import AccuracyVerdict
from hfbench.report import cells
from hfbench.report.document import Block, Bullets, Cell, Column, Paragraph, Section, Table
from hfbench.report.sets import Pair, grouped
from hfbench.report.speed_figures import speedup_figure
from hfbench.report.verdicts import anchor, anchor_of, counted

_CHANGED_CLASSES = 5
_QUANTITY = Column("quantity", "quantity", numeric=False)


def comparison_section(pairs: Sequence[Pair], margin_points: float) -> Section:
    """Set each candidate against its baseline: all together first, then one by one.

    Args:
        pairs: Candidates with their baselines.
        margin_points: The loss of accuracy, in percentage points, that is put up with.
    """
    blocks: list[Block] = []
    figure = speedup_figure(pairs)
    if figure:
        blocks.append(figure)
    columns = [
        Column("candidate", "candidate", numeric=False),
        Column("baseline", "baseline", numeric=False),
        Column("pairs", "pairs"),
        Column("speed", "speed_verdict", numeric=False),
        Column("accuracy", "accuracy_verdict", numeric=False),
        Column("execution time", "execution_speedup"),
        Column("test accuracy", "accuracy_points"),
        Column("train time", "train_speedup"),
        Column("steady-state training", "steady_speedup"),
        Column("peak device memory", "device_memory_gain"),
        Column("peak process memory", "process_memory_gain"),
    ]
    blocks.append(
        Table(
            "comparisons",
            "Each candidate against its baseline: how many times faster or smaller, and the "
            "difference of test accuracy, with 95 % intervals over n pairs of runs. The accuracy's "
            f"verdict puts up with a loss of {margin_points:g} points.",
            columns,
            [_pair_row(pair) for pair in pairs],
        )
    )
    return Section(
        " and ".join(_names(pairs)), "comparison", blocks, [_pair_section(pair) for pair in pairs]
    )


def _names(pairs: Sequence[Pair]) -> list[str]:
    variants = grouped([pair.candidate for pair in pairs], lambda found: found.recipe.variant)
    return [
        f"{'u' if number else 'U'}ntuned against {variant}"
        for number, variant in enumerate(variants)
    ]


def _pair_row(pair: Pair) -> list[Cell]:
    found = pair.comparison
    name = [Cell(pair.candidate.label), Cell(pair.baseline.label if pair.baseline else "not run")]
    if found is None:
        return [*name, cells.number(0), *[Cell("not compared")] * 8]
    rows = {row.name: row for row in found.rows}
    measures = (
        "execution time",
        "test accuracy",
        "train time",
        "steady-state training",
        "peak device memory",
        "peak process memory",
    )
    accuracy = found.accuracy.verdict if found.accuracy else "not measured"
    gains = [cells.gain(rows.get(measure)) for measure in measures]
    return [*name, cells.number(found.pairs), Cell(found.speed), Cell(accuracy), *gains]


def _pair_section(pair: Pair) -> Section:
    found = pair.comparison
    title = f"{pair.candidate.label} against " + (
        pair.baseline.label if pair.baseline else str(pair.candidate.recipe.baseline)
    )
    if found is None:
        return Section(title, anchor_of(pair), [Paragraph(f"Not compared. {pair.refusal}")])
    name = anchor(pair.candidate.label)
    blocks: list[Block] = [
        Paragraph(f"{found.sentence[0].upper()}{found.sentence[1:]}."),
        *(Paragraph(line) for line in (found.shared, found.ablation) if line),
        _quantities(found, name),
    ]
    blocks += _accuracy_blocks(found, name)
    blocks.append(_settings(found, name))
    notes = [*([found.order] if found.order else []), *_causes(found), *found.notes]
    if notes:
        blocks.append(Bullets(notes))
    return Section(title, anchor_of(pair), blocks)


def _causes(found: Comparison) -> list[str]:
    """Say which techniques differ, and what else does that may explain a gain too."""
    techniques = [
        f"{item.name} ({'applied' if item.applied else 'not seen to change what ran'})"
        for item in found.techniques
    ]
    beyond = [
        f"{item.name} ({cells.setting(item.name, item.baseline).text} against "
        f"{cells.setting(item.name, item.candidate).text})"
        for item in found.beyond
    ]
    return [
        f"{title}: {', '.join(items)}."
        for title, items in (
            ("Techniques that differ", techniques),
            ("What differs beyond them", beyond),
        )
        if items
    ]


def _quantities(found: Comparison, name: str) -> Table:
    rows = [
        [
            Cell(row.name),
            cells.measured(row, row.baseline),
            cells.measured(row, row.candidate),
            cells.gain(row),
        ]
        for row in found.rows
        if row.baseline is not None or row.candidate is not None
    ]
    return Table(
        f"compare_{name}",
        f"{found.candidate[0].recipe.name} against {found.baseline[0].recipe.name}, "
        f"{counted(found)}: means, and the gain with its 95 % interval.",
        [
            _QUANTITY,
            Column("baseline", "baseline"),
            Column("candidate", "candidate"),
            Column("gain", "gain"),
        ],
        rows,
    )


def _accuracy_blocks(found: Comparison, name: str) -> list[Block]:
    accuracy = found.accuracy
    if accuracy is None:
        return [Paragraph("Accuracy: not measured, since the labels are synthetic.")]
    blocks: list[Block] = []
    if accuracy.mcnemar:
        blocks.append(
            Table(
                f"mcnemar_{name}",
                f"Which of the {accuracy.images:,} test images only one side gets right, for each "
                "pair of runs, and the p-value of McNemar's exact test.",
                [
                    Column("seed", "seed"),
                    Column("only the baseline", "only_baseline"),
                    Column("only the candidate", "only_candidate"),
                    Column("p", "p"),
                ],
                [
                    [
                        cells.number(item.seed),
                        cells.number(item.only_baseline),
                        cells.number(item.only_candidate),
                        Cell(f"{item.p:.3g}", item.p),
                    ]
                    for item in accuracy.mcnemar
                ],
            )
        )
    if accuracy.classes:
        blocks.append(_class_table(accuracy, found.pairs, name))
    return blocks


def _class_table(accuracy: AccuracyVerdict, pairs: int, name: str) -> Table:
    return Table(
        f"classes_{name}",
        f"The classes whose accuracy changed most, means of n = {pairs} pairs; the intervals "
        "hold for all classes at once.",
        [
            Column("class", "class", numeric=False),
            Column("test images", "images"),
            Column("baseline", "baseline"),
            Column("candidate", "candidate"),
            Column("difference", "points"),
        ],
        [
            [
                Cell(item.name),
                cells.number(item.images),
                Cell(f"{100 * item.baseline:.2f} %", item.baseline),
                Cell(f"{100 * item.candidate:.2f} %", item.candidate),
                cells.points(item.points, item.low, item.high),
            ]
            for item in accuracy.classes[:_CHANGED_CLASSES]
        ],
    )


def _settings(found: Comparison, name: str) -> Block:
    if not found.settings:
        return Paragraph("No setting differs.")
    return Table(
        f"settings_{name}",
        "Settings that differ.",
        [
            Column("setting", "setting", numeric=False),
            Column("baseline", "baseline", numeric=False),
            Column("candidate", "candidate", numeric=False),
        ],
        [
            [
                Cell(item.name),
                cells.setting(item.name, item.baseline),
                cells.setting(item.name, item.candidate),
            ]
            for item in found.settings
        ],
    )
