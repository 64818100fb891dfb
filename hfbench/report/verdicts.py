"""What was found: the headline, all recipes, and each candidate against its baseline."""

from __future__ import annotations

from collections.abc import Sequence

from hfbench.comparison import Comparison
from hfbench.report import cells
from hfbench.report.document import (
    Block,
    Bullets,
    Cell,
    Column,
    Link,
    Paragraph,
    Section,
    Table,
    Text,
)
from hfbench.report.sets import Collection, Pair, RunSet, grouped
from hfbench.report.speed_figures import speedup_figure
from hfbench.result import Result
from hfbench.verdict import AccuracyVerdict

_CHANGED_CLASSES = 5
_QUANTITY = Column("quantity", "quantity", numeric=False)


def headline(runs: Collection) -> list[Block]:
    """Return the verdicts, a sentence each, and how much they stand on."""
    count = sum(found.n for found in runs.sets)
    recipes = len({found.recipe.name for found in runs.sets})
    days = sorted({result.created_at[:10] for found in runs.sets for result in found.results})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    blocks: list[Block] = [
        Paragraph(
            [
                f"{count} finished runs of {recipes} recipes on "
                f"{_plural(len(runs.machines), 'machine')} ({when}). ",
                Link("How to read this", "reading"),
                ".",
            ]
        )
    ]
    if runs.pairs:
        blocks.append(Bullets([_verdict(pair) for pair in runs.pairs]))
    else:
        blocks.append(
            Paragraph("No recipe here names a baseline, so that there is nothing to compare.")
        )
    return blocks


def _verdict(pair: Pair) -> Text:
    link = Link(pair.candidate.label, anchor_of(pair))
    if pair.comparison is None:
        return [link, f": not compared. {pair.refusal}"]
    baseline = pair.baseline.label if pair.baseline else ""
    return [
        link,
        f" against {baseline} ({_counts(pair.comparison)}, machine {pair.candidate.machine}): "
        f"{pair.comparison.sentence}.",
    ]


def anchor_of(pair: Pair) -> str:
    """Return the anchor of the section about a pair."""
    return f"compare-{anchor(pair.candidate.label)}"


def anchor(label: str) -> str:
    """Turn a label into what anchors and file names may hold; labels differ in these too."""
    return label.replace(" #", "-no")


def runs_section(runs: Collection) -> Section:
    """Show what every recipe reached."""
    columns = [
        Column("recipe", "set", numeric=False),
        Column("model", "model", numeric=False),
        Column("data", "dataset", numeric=False),
        Column("variant", "variant", numeric=False),
        Column("machine", "machine", numeric=False),
        Column("n", "n"),
        Column("test accuracy", "accuracy"),
        Column("F1 macro", "f1_macro"),
        Column("train accuracy", "train_accuracy"),
        Column("execution time", "execution_seconds"),
        Column("train time", "train_seconds"),
        Column("images/s", "samples_per_second"),
        Column("peak device memory", "peak_device_memory_mib"),
        Column("peak process memory", "peak_process_memory_mib"),
        Column("effective batch", "effective_batch_size"),
        Column("optimizer steps", "optimizer_steps"),
    ]
    return Section(
        "All recipes",
        "recipes",
        [
            Table(
                "recipes",
                "Every recipe that was run: means, and in brackets the lowest and the highest of n "
                "runs. Steady-state training in images/s.",
                columns,
                [_run_row(found) for found in runs.sets],
            )
        ],
    )


def _run_row(found: RunSet) -> list[Cell]:
    def test(field: str) -> Cell:
        return cells.share(found.share(lambda r: getattr(r.metrics.test, field, None)))

    def train_accuracy(result: Result) -> float | None:
        return result.metrics.train.accuracy if result.metrics.train else None

    training = found.newest.training
    return [
        Cell(found.label),
        Cell(found.model),
        Cell(f"{found.dataset}, {found.newest.data.eval_samples:,} test images"),
        Cell(found.recipe.variant),
        Cell(found.machine),
        cells.number(found.n),
        test("accuracy"),
        test("f1_macro"),
        cells.share(found.share(train_accuracy)),
        cells.seconds(found.amount(lambda r: r.times.execution_seconds)),
        cells.seconds(found.amount(lambda r: r.times.train_seconds)),
        cells.amount(found.amount(lambda r: r.throughput.samples_per_second)),
        cells.amount(found.amount(lambda r: r.memory.peak_device_memory_mib), "MiB", 0),
        cells.amount(found.amount(lambda r: r.memory.peak_process_memory_mib), "MiB", 0),
        cells.number(training.effective_batch_size),
        cells.number(training.optimizer_steps),
    ]


def comparison_section(pairs: Sequence[Pair]) -> Section:
    """Set each candidate against its baseline: all on one page first, then one by one."""
    blocks: list[Block] = []
    figure = speedup_figure(pairs)
    if figure:
        blocks.append(figure)
    columns = [
        Column("candidate", "candidate", numeric=False),
        Column("baseline", "baseline", numeric=False),
        Column("pairs", "pairs"),
        Column("execution time", "execution_speedup"),
        Column("train time", "train_speedup"),
        Column("steady-state training", "steady_speedup"),
        Column("peak device memory", "device_memory_gain"),
        Column("peak process memory", "process_memory_gain"),
        Column("test accuracy", "accuracy_points"),
        Column("speed", "speed_verdict", numeric=False),
        Column("accuracy", "accuracy_verdict", numeric=False),
    ]
    blocks.append(
        Table(
            "comparisons",
            "Each candidate against its baseline: how many times faster or smaller, and the "
            "difference of test accuracy, with 95 % intervals over n pairs of runs.",
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
        "train time",
        "steady-state training",
        "peak device memory",
        "peak process memory",
        "test accuracy",
    )
    accuracy = found.accuracy.verdict if found.accuracy else "not measured"
    gains = [cells.gain(rows.get(measure)) for measure in measures]
    return [*name, cells.number(found.pairs), *gains, Cell(found.speed), Cell(accuracy)]


def _pair_section(pair: Pair) -> Section:
    found = pair.comparison
    title = f"{pair.candidate.label} against " + (
        pair.baseline.label if pair.baseline else str(pair.candidate.recipe.baseline)
    )
    if found is None:
        return Section(title, anchor_of(pair), [Paragraph(f"Not compared. {pair.refusal}")])
    name = anchor(pair.candidate.label)
    blocks: list[Block] = [Paragraph(f"{found.sentence}."), _quantities(found, name)]
    blocks += _accuracy_blocks(found, name)
    blocks.append(_settings(found, name))
    notes = [
        f"{item.name} differs between the recipes, "
        + ("and was applied." if item.applied else "but was not seen to change what ran.")
        for item in found.techniques
    ]
    notes += [
        f"Beyond the techniques {item.name} differs: {cells.setting(item.name, item.baseline).text}"
        f" against {cells.setting(item.name, item.candidate).text}."
        for item in found.beyond
    ]
    if notes + found.notes:
        blocks.append(Bullets(notes + found.notes))
    return Section(title, anchor_of(pair), blocks)


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
        f"{_counts(found)}: means, and the gain with its 95 % interval.",
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


def _counts(found: Comparison) -> str:
    return f"n = {_plural(found.pairs, 'pair')}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
