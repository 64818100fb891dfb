"""What the modules of the command line share: options, and how tables are printed."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from hfbench.harmless import for_json, message


def expanded(path: Path | None) -> Path | None:
    """Return the value of a path option, ``~`` expanded: the shell does it only in front.

    Raises:
        RecipeError: If it is empty.
    """
    from hfbench.rechecking import output_folder

    return None if path is None else output_folder(path, "--output-dir, -o")


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
    from hfbench.console import HarmlessConsole

    console = HarmlessConsole()
    if not console.is_terminal:
        console = HarmlessConsole(width=120)  # in a file or a pipe, lines should not break at 80
    console.print(what)
