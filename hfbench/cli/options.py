"""What the modules of the command line share: options, and how tables are printed."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from hfbench.errors.harmless import for_json, message

if TYPE_CHECKING:
    from rich.console import Console


def expanded(path: Path | None) -> Path | None:
    """Return the value of a path option, ``~`` expanded: the shell does it only in front.

    Raises:
        RecipeError: If it is empty.
    """
    from hfbench.recipe.rechecking import output_folder

    return None if path is None else output_folder(path, "--output-dir, -o")


_UNBROKEN = 10_000  # characters

OutputDir = Annotated[
    Path,
    typer.Option(
        "--output-dir",
        "-o",
        callback=expanded,
        help="Runs go into OUTPUT_DIR/<recipe name>/<run id>.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=VALUE]",
        help="Change the recipe for this run: training_args.num_train_epochs=1 "
        "dataset.name_or_path=/data/cifar10",
        show_default=False,
    ),
]


def count_of_repeats(value: int | None) -> int | None:
    """Refuse a number of repeats that nobody waits for, before anything is loaded.

    Raises:
        RecipeError: With the numbers that are taken.
    """
    if value is not None:
        from hfbench.studies.suite.plan import check_count

        check_count(value)
    return value


def finite(value: float | None) -> float | None:
    """Refuse what is no number: ``nan`` is neither below a lower bound nor above an upper one.

    Raises:
        typer.BadParameter: If it is not finite.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import without garbage collections, and leave what was imported out of later ones.

    There is nothing to find among a million objects that stay for good, yet looking takes a quarter
    of the time that torch and transformers take to import, and 0.4 s again when `Trainer` collects
    before it trains.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def say(text: object, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a message, whatever is named in it: no credential, nothing that a terminal obeys."""
    print(message(str(text)), file=file or sys.stdout, flush=flush)


def print_json(content: Any) -> None:
    """Print JSON; escaped, where the output cannot take every letter."""
    encoding = str(getattr(sys.stdout, "encoding", None) or "ascii")
    can_take_all = encoding.lower().startswith("utf")
    print(for_json(content) if can_take_all else json.dumps(content, indent=2))


def show(what: Any) -> None:
    """Print a table or text of rich."""
    from hfbench.report.console import HarmlessConsole

    console = HarmlessConsole()
    if not console.is_terminal:
        console = HarmlessConsole(width=_UNBROKEN)  # in a file or a pipe a row is a line
    print_whole(console, what)


def print_whole(console: Console, what: Any) -> None:
    """Print so that names and paths stay whole, to be copied, however narrow the terminal is."""
    from rich.console import Group
    from rich.text import Text

    from hfbench.report.terminal.run import with_whole_words

    for part in what.renderables if isinstance(what, Group) else [what]:
        if isinstance(part, Text):
            lines = with_whole_words(part, console.width)
            console.print(lines, overflow="ignore", crop=False)
        else:
            console.print(part, crop=False)
