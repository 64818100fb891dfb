"""Results as tables for the terminal; `cli.py` prints them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hfbench.errors import ResultError
from hfbench.errors.harmless import for_terminal
from hfbench.machine.environment import Environment
from hfbench.recipe.schema import Recipe
from hfbench.results.formats import duration, percent
from hfbench.results.schema import Result, Run, load_result
from hfbench.results.sharing import say_shared
from hfbench.training.loss_scale import say_skipped

_RUN_COLUMNS = (
    "recipe",
    "run",
    "state",
    "weights",
    "test accuracy",
    "F1 macro",
    "execution",
    "images/s",
)
_FRAME = 3  # characters beside a cell: a border and a space on both sides
_INDENT = "  "
_BETWEEN = " | "  # cells that are written behind each other


class PlainTable(Table):
    """A table whose cells are shown as they are, and whose words stay whole.

    rich would take [brackets] for markup, and break names to fit a narrow terminal, so that they
    could be neither read nor copied. Where not even the longest words of all columns fit side by
    side, each row is written as a few lines instead: its name, and what is known under it.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table if all words fit, else as lines."""
        columns = [[column.header, *column.cells] for column in self.columns]
        sizes = [[Measurement.get(console, options, cell) for cell in cells] for cells in columns]
        least = [max(size.minimum for size in column) for column in sizes]
        most = [max(size.maximum for size in column) for column in sizes]
        given = [column.width for column in self.columns]
        most = [max(a, width or b) for a, b, width in zip(least, most, given, strict=True)]
        room = options.max_width - _FRAME * len(columns) - 1 - sum(least)
        if room < 0:
            yield from self._as_lines(options.max_width)
            return
        wanted = sum(most) - sum(least)
        share = min(1.0, room / wanted) if wanted else 0.0
        try:
            for column, a, b in zip(self.columns, least, most, strict=True):
                column.width = a + int((b - a) * share)
            yield from list(super().__rich_console__(console, options))
        finally:
            for column, width in zip(self.columns, given, strict=True):
                column.width = width

    def _as_lines(self, width: int) -> Iterator[Text]:
        """Write each row as its name, and under it each cell behind its column's heading."""
        headings = [_text(column.header) for column in self.columns]
        named = next((at for at, heading in enumerate(headings) if heading.plain), 0)
        if self.title:
            yield with_whole_words(_text(self.title), width)
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            texts = [_text(cell) for cell in cells]
            name = Text(" ").join(text for text in texts[: named + 1] if text.plain)
            if name.plain:
                yield with_whole_words(name, width)
            items = [
                Text.assemble(heading, " ", text)
                for heading, text in zip(headings[named + 1 :], texts[named + 1 :], strict=True)
                if text.plain
            ]
            yield from _packed(items, width)

    def add_column(self, header: Any = "", *others: Any, **options: Any) -> None:
        """Add a column whose heading is no markup."""
        super().add_column(_plain(header), *others, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row whose cells are no markup."""
        super().add_row(*map(_plain, cells), **options)


def _plain(cell: Any) -> Any:
    return Text(for_terminal(cell)) if isinstance(cell, str) else cell


def _text(cell: Any) -> Text:
    return cell if isinstance(cell, Text) else Text(for_terminal(str(cell)))


def _packed(items: Sequence[Text], width: int) -> Iterator[Text]:
    """Put as many items on a line as fit, each line a little to the right."""
    line: list[Text] = []
    for item in items:
        wide = sum(part.cell_len + len(_BETWEEN) for part in line) + item.cell_len + len(_INDENT)
        if line and wide > width:
            yield _indented(line, width)
            line = []
        line.append(item)
    if line:
        yield _indented(line, width)


def _indented(items: Sequence[Text], width: int) -> Text:
    return with_whole_words(Text.assemble(_INDENT, Text(_BETWEEN).join(items)), width, _INDENT)


def with_whole_words(text: Text, width: int, indent: str = "") -> Text:
    """Break lines between words only: a name or path has to be copied.

    Args:
        text: Several lines, maybe.
        width: Of the terminal; words that are wider are left to it.
        indent: Before each line but the first.
    """
    if max(map(cell_len, text.plain.split("\n")), default=0) <= width:
        return text
    lines = (
        textwrap.fill(
            line,
            width,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.plain.split("\n")
    )
    return Text("\n".join(lines), style=text.style, overflow="ignore")  # no more breaks


def result_table(result: Result) -> Group:
    """Show a finished run, the reference's numbers beside it, and what was not applied as asked."""
    reference = result.recipe.reference
    table = PlainTable()
    table.add_column("")
    table.add_column("this run", justify="right")
    if reference:
        table.add_column("reference", justify="right")

    def add(name: str, ours: str, theirs: str = "") -> None:
        table.add_row(*((name, ours, theirs) if reference else (name, ours)))

    add("model", f"{result.recipe.model.name_or_path}, {result.recipe.model.weights}")
    for split, found in (("test", result.metrics.test), ("train", result.metrics.train)):
        if not found:
            continue
        accuracy, f1 = None, None
        if reference:
            is_test = split == "test"
            accuracy = reference.accuracy if is_test else reference.train_accuracy
            f1 = reference.f1 if is_test else None
        add(f"{split} accuracy", percent(found.accuracy), _given(accuracy))
        add(f"{split} F1 macro", percent(found.f1_macro), _given(f1))
        add(f"{split} F1 weighted", percent(found.f1_weighted))
        if found.top5_accuracy is not None:
            add(f"{split} top-5 accuracy", percent(found.top5_accuracy))
        add(f"{split} images", str(found.samples))
    theirs = reference.execution_seconds if reference else None
    times = result.times
    add(
        "execution time",
        duration(times.execution_seconds),
        duration(theirs) if theirs else "not given",
    )
    add("  of it training", duration(times.train_seconds))
    add("  of it evaluation", duration(times.evaluation_seconds))
    add("  of it checkpoints", duration(times.save_seconds))
    add("  waiting for data", duration(result.waited_seconds))
    add(
        "first step",
        duration(times.first_step_seconds) if times.first_step_seconds is not None else "–",
    )
    add("set-up before it", duration(times.setup_seconds))
    add("final evaluation after it", duration(times.final_evaluation_seconds))
    if result.training.compilations:
        graphs = _count(result.training.compilations, "graph")
        add("  compiling", f"{duration(times.compile_seconds or 0.0)}, {graphs}")
    if times.paused_seconds:
        add("pauses, not counted", duration(times.paused_seconds))
    speed = result.throughput.samples_per_second
    add("steady-state training", f"{speed:.1f} images/s" if speed else "run too short")
    add("optimizer steps", str(result.training.optimizer_steps))
    if result.training.skipped_steps:
        add("  of them skipped", str(result.training.skipped_steps))
    add("effective batch size", str(result.training.effective_batch_size))
    add("precision, as seen", str(result.switches["precision"].applied))
    add("peak memory, process", f"{result.memory.peak_process_memory_mib:.0f} MiB")
    if result.memory.peak_device_memory_mib is not None:
        add("peak memory, device", f"{result.memory.peak_device_memory_mib:.0f} MiB")
    title = Text(f"{result.recipe.name}, run {result.run_id}", style="bold")
    return Group(title, table, *(Text(line) for line in _remarks(result)))


def _remarks(result: Result) -> list[str]:
    machine, reference = result.environment, result.recipe.reference
    processes = result.training.world_size
    lines = [
        f"Measured in {_count(processes, 'process', 'es')} on {machine.device_name}, "
        f"{machine.cpu_cores} CPU cores."
    ]
    lines += filter(None, [say_shared([result])])
    if result.metrics.test is None:
        lines.append("Synthetic data: labels mean nothing, so there is no accuracy.")
    if result.training.train_loss is None:
        lines.append("Training diverged: its loss is not a finite number.")
    training = result.training
    if skipped := say_skipped(training.skipped_steps, training.optimizer_steps):
        lines.append(skipped)
    if reference:
        lines.append(
            f"Reference: {reference.source}." + (f" {reference.note}" if reference.note else "")
        )
    for name, switch in result.switches.items():
        if switch.reason:
            lines.append(
                f"{name}: asked for {as_text(switch.requested)}, applied {as_text(switch.applied)} "
                f"({switch.reason})."
            )
    return lines + result.data.notes


def run_table(runs: Iterable[Run]) -> Table:
    """List runs with what they reached."""
    table = PlainTable()
    for heading in _RUN_COLUMNS:
        justify = "right" if heading in ("execution", "images/s") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for run in runs:
        name = run.folder.parent.name
        if not run.finished:
            weights = _short_weights(run.recipe) if run.recipe else ""
            table.add_row(name, run.folder.name, "unfinished", weights, "", "", "", "")
            continue
        try:
            result = load_result(run.folder)
        except ResultError:
            table.add_row(name, run.folder.name, "unreadable", "", "", "", "", "")
            continue
        test, speed = result.metrics.test, result.throughput.samples_per_second
        table.add_row(
            name,
            run.folder.name,
            "finished",
            _short_weights(result.recipe),
            percent(test.accuracy) if test else "–",
            percent(test.f1_macro) if test else "–",
            duration(result.times.execution_seconds),
            f"{speed:.1f}" if speed else "–",
        )
    return table


def _short_weights(recipe: Recipe) -> str:
    return "pretrained" if recipe.model.pretrained else "fresh"


def environment_table(environment: Environment, world_size: int, cannot: Sequence[str]) -> Group:
    """Show this machine, how many processes were started, and which techniques it lacks."""
    table = PlainTable(show_header=False)
    for name, value in (environment.model_dump() | {"world_size": world_size}).items():
        if name == "packages":
            value = "\n".join(f"{package} {version}" for package, version in value.items())
        table.add_row(name, f"{value:.0f}" if isinstance(value, float) else as_text(value))
    return Group(table, *(Text(line) for line in cannot))


def prediction_table(files: Sequence[str], found: Sequence[Sequence[dict[str, Any]]]) -> Table:
    """Show the most probable classes of each file."""
    table = PlainTable()
    table.add_column("image")
    table.add_column("class")
    table.add_column("probability", justify="right")
    for file, classes in zip(files, found, strict=True):
        for rank, item in enumerate(classes):
            table.add_row(
                "" if rank else file,
                str(item["label"]),
                percent(item["score"]),
                end_section=rank == len(classes) - 1,
            )
    return table


def _given(share: float | None) -> str:
    return "not given" if share is None else percent(share)


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def as_text(value: Any) -> str:
    """Write a setting as JSON, text without quotes."""
    return value if isinstance(value, str) else json.dumps(value)
