"""What the modules of the command line share: options, and how tables are printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

OutputDir = Annotated[
    Path, typer.Option("--output-dir", "-o", help="Runs go into OUTPUT_DIR/<recipe name>/<run id>.")
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


def show(what: Any) -> None:
    """Print a table or text of rich."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # in a file or a pipe, lines should not break at 80
    console.print(what)
