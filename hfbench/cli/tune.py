"""The command ``hfbench tune``: show how it stands, write the recipe, print what was found."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfbench.cli.options import AsJson, Overrides, expanded, finite, print_json, say, show
from hfbench.machine.launched import check_alone

if TYPE_CHECKING:
    from hfbench.results.windows import Window
    from hfbench.studies.tune.schema import Trial, Tuning
    from hfbench.studies.tune.search import Observer

tuning = typer.Typer()


@tuning.command("tune")
def tune_command(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one."),
    ],
    overrides: Overrides = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            min=5,
            max=86400,
            callback=finite,
            help="For measuring; loading comes on top.",
        ),
    ] = 90,
    larger_batch: Annotated[
        bool,
        typer.Option(
            "--larger-batch",
            help="Try larger effective batches too. That changes what is learnt: the learning rate "
            "stays as it is.",
        ),
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory",
            min=1,
            callback=finite,
            help="MiB that training may take: of the device, on a CPU of the process (default: "
            "what is free).",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            callback=expanded,
            help="File of the new recipe; measurements go beside it (default: RECIPE_best.json).",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over files that are there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find the fastest settings on this machine in a minute or two, and write them as a recipe.

    Tried one by one, each on top of the best so far: where images are prepared, precision, memory
    format, cuDNN's choice of algorithms, fused optimizer, NaN filter, attention, loader workers,
    pinned memory, and micro-batches of other sizes at the same effective batch. A change is taken
    if it is faster beyond noise. What does not fit into memory is recorded.

    Next: hfbench suite RECIPE RECIPE_best.json --repeats 3 says whether the whole run is faster,
    and as accurate.
    """
    from hfbench.recipe.schema import load_recipe, local_path

    check_alone("tune")
    loaded = load_recipe(recipe, overrides or [])
    target = output or Path(f"{loaded.name}_best.json")
    from hfbench.studies.tune.schema import check_output
    from hfbench.studies.tune.tuning import tune

    source = local_path(recipe)
    check_output(loaded, target, source if source.is_file() else None, force)
    # Trainer prints to stdout; with --json that belongs to the tuning alone.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = tune(
            loaded,
            target,
            seconds=seconds,
            larger_batch=larger_batch,
            memory_mib=memory,
            force=force,
            observer=_observer(seconds),
        )
    if as_json:
        print_json(found.model_dump(mode="json", by_alias=True))
        return
    from hfbench.report.terminal.tune import tuning_tables

    show(tuning_tables(found))
    _say_next(found, recipe, target, overrides or [])


def _observer(seconds: float) -> Observer:
    from hfbench.report.terminal.tune import say_trial
    from hfbench.results.formats import duration
    from hfbench.studies.tune.search import Observer

    class Tell(Observer):
        def planned(self, candidates: int, window_seconds: float, start: Window) -> None:
            say(
                f"{candidates} candidates or more, in windows of {duration(window_seconds)}: about "
                f"{duration(seconds)}. Ctrl-C keeps the best so far.\n"
                f"start: {start.samples_per_second:.1f} images/s",
                file=sys.stderr,
            )

        def tried(self, trial: Trial) -> None:
            say(say_trial(trial), file=sys.stderr)

        def confirming(self) -> None:
            say("The best against the start …", file=sys.stderr)

    return Tell()


def _say_next(found: Tuning, recipe: str, target: Path, overrides: list[str]) -> None:
    """Print what was written, and what to do with it."""
    from hfbench.studies.tune.offers import setting_of
    from hfbench.studies.tune.schema import measurements_file

    say(f"Wrote {target}; its measurements are in {measurements_file(target)}")
    if not found.taken:
        say(f"It is {found.recipe.name} under another name.")
        return
    settings = {name for trial in found.taken for name in trial.settings}
    changed = {n for n in settings if setting_of(found.recipe, n) != setting_of(found.best, n)}
    kept = [word for word in overrides if word.partition("=")[0] not in changed]
    words = ["hfbench", "suite", recipe, str(target), "--repeats", "3", *kept]
    say(f"Whether whole runs are faster, and as accurate: {shlex.join(words)}")
    say(f"Then at any time: hfbench compare runs/{found.recipe.name} runs/{found.best.name}")
    undone = [word for word in overrides if word not in kept]
    if undone:
        say(
            f"Write {' '.join(undone)} into a recipe file first: tuning changed it, and as an "
            "override it would change both."
        )
