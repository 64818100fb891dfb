"""What was found: the headline, and what every recipe reached."""

from __future__ import annotations

from hfbench.comparison.comparison import Comparison
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
from hfbench.report.sets import Collection, Pair, RunSet
from hfbench.results.schema import Result


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
                f"{plural(len(runs.machines), 'machine')} ({when}). ",
                Link("How to read this", "reading"),
                ".",
            ]
        )
    ]
    if runs.pairs:
        blocks.append(Bullets([_verdict(pair) for pair in runs.pairs]))
        family = max((pair.comparison.family for pair in runs.pairs if pair.comparison), default=1)
        if family > 1:
            blocks.append(
                Paragraph(
                    f"The speeds of {family} candidates are judged together: “faster” and “slower” "
                    "are said where they hold among all of them (Holm's correction at 5 %), while "
                    "each interval is of one candidate."
                )
            )
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
        f" against {baseline} ({counted(pair.comparison)}, machine {pair.candidate.machine}): "
        f"{pair.comparison.sentence}.",
    ]


def anchor_of(pair: Pair) -> str:
    """Return the anchor of the section about a pair."""
    return f"compare-{anchor(pair.candidate.label)}"


def anchor(label: str) -> str:
    """Turn a label into what anchors and file names may hold, but the name of no recipe."""
    return label.replace(" #", "~")


def runs_section(runs: Collection) -> Section:
    """Show what every recipe reached."""
    columns = [
        Column("recipe", "set", numeric=False),
        Column("model", "model", numeric=False),
        Column("data", "dataset", numeric=False),
        Column("test images", "test_images"),
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
        Cell(found.dataset),
        cells.number(found.newest.data.eval_samples),
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


def counted(found: Comparison) -> str:
    """Say how many pairs of runs a comparison stands on."""
    return f"n = {plural(found.pairs, 'pair')}"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
