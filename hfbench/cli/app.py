"""The command line: everything about single runs. Each command imports what it needs.

Only this module, `cli_studies` and `cli_options` print.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn, TextIO

import typer

from hfbench.cli.options import AsJson, OutputDir, Overrides, print_json, say, show, uncollected
from hfbench.cli.selftest import selftesting
from hfbench.cli.studies import studies
from hfbench.cli.tune import tuning
from hfbench.errors import HfbenchError, Interrupted
from hfbench.errors.harmless import message
from hfbench.machine.failures import WorldError, explain, write_patiently
from hfbench.machine.launched import check_launch, is_first, speaks_at_the_end
from hfbench.machine.signals import Interruption
from hfbench.studies.suite.tether import END_WITH_PARENT, end_with_parent

app = typer.Typer(
    name="hfbench",
    help="Does this performance tuning really make my fine-tuning faster, and what does it cost "
    "in accuracy?\n\n"
    "One recipe is one experiment: an image classifier, CIFAR-10 or CIFAR-100, and "
    "TrainingArguments. Begin with: hfbench recipe quickstart_tuned",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Several GPUs: accelerate launch --multi_gpu --num_processes 2 -m hfbench recipe RECIPE",
)
_PATIENCE_SECONDS = 10
_OF_ALL_PROCESSES = (
    "recipe",
    "suite",
    "tune",
    "ablate",
    "doctor",
    "selftest",
)  # the last five refuse several


def main() -> None:
    """Run the command line.

    A user's error becomes a message and exit code 2, a failure of disk, memory or another process
    one with exit code 1.
    """
    write_patiently()
    _log_to_stderr()
    # A letter that the output cannot take is no reason to fail.
    with contextlib.suppress(AttributeError, OSError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    if os.environ.get(END_WITH_PARENT):
        end_with_parent()
    interruption = Interruption()
    try:
        # Several processes end as their launcher says.
        with interruption.listen() if _is_single() else contextlib.nullcontext():
            app()
    except HfbenchError as error:
        if not is_first() and not (isinstance(error, WorldError) and speaks_at_the_end()):
            # The launcher ends all when one ends: let process 0 speak first. If it does not fail,
            # this is the only one that knows.
            time.sleep(_PATIENCE_SECONDS)
        prefix = "" if isinstance(error, Interrupted) else "Error: "
        say(f"{prefix}{error}", file=sys.stderr)
        _leave(error.exit_code)
    except Exception as error:
        said = explain(error)
        if said is None and not interruption.came:
            raise
        if interruption.came:
            _leave_stopped()
        say(f"Error: {said}", file=sys.stderr)
        _leave(WorldError.exit_code)
    except KeyboardInterrupt:
        _leave_stopped()
    except SystemExit as ended:
        if ended.code != Interrupted.exit_code:  # which typer makes of an interruption
            raise
        _leave_stopped()


def _leave_stopped() -> NoReturn:
    if is_first():
        say("Stopped.", file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # After an interruption in code that was made from a string, as dataclasses do, Python itself
    # would end as if killed by SIGINT.
    os._exit(Interrupted.exit_code)


def _leave(code: int) -> NoReturn:
    """End this process; in a process group at once, since the others may be waiting for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not _is_single():
        os._exit(code)
    sys.exit(code)


def _is_single() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


def _version(wanted: bool) -> None:
    if wanted:
        import hfbench

        say(f"hfbench {hfbench.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand not in _OF_ALL_PROCESSES and not is_first():
        raise typer.Exit  # the first one lists, compares or writes for all


@app.command("recipe")
def recipe_command(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file, or the name of a shipped one (see: hfbench list --recipes).",
        ),
    ],
    overrides: Overrides = None,
    output_dir: OutputDir = Path("runs"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished run of this recipe.")
    ] = False,
    rerun: Annotated[
        bool, typer.Option("--rerun", help="Run again although a finished run is there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run one experiment and print what it reached.

    A finished run is not run again; with push_to_hub it is then only pushed. Ctrl-C saves a
    checkpoint, --resume goes on.
    """
    check_launch()
    with uncollected():
        from hfbench.recipe.schema import load_recipe, local_path

        local_path(output_dir)  # refuses at once what no folder can be called
        loaded = load_recipe(recipe, overrides or [])
        from hfbench.training.run import run_recipe

    # Trainer prints its log to stdout; with --json that belongs to the result alone.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = run_recipe(loaded, output_dir, resume=resume, rerun=rerun)
    if not is_first():
        return
    if as_json:
        print_json(result.model_dump(mode="json", by_alias=True))
        return
    from hfbench.report.terminal.run import result_table

    show(result_table(result))
    say(f"Everything is in {output_dir / result.recipe.name / result.run_id}")
    if result.hub:
        say(f"Pushed to {result.hub.url}")


app.add_typer(studies)
app.add_typer(tuning)
app.add_typer(selftesting)


@app.command("list")
def list_command(
    output_dir: OutputDir = Path("runs"),
    recipes: Annotated[
        bool, typer.Option("--recipes", help="List the shipped recipes instead.")
    ] = False,
) -> None:
    """List the runs in a folder, finished or not."""
    if recipes:
        from hfbench.recipe.schema import shipped_recipes

        for name, path in shipped_recipes().items():
            say(f"{name:28} {json.loads(path.read_text('utf-8'))['description']}")
        return
    from hfbench.recipe.schema import local_path
    from hfbench.results.schema import find_runs

    runs = list(find_runs(local_path(output_dir)))
    if not runs:
        say(f"No runs in {output_dir}. Begin with: hfbench recipe quickstart_tuned")
        return
    from hfbench.report.terminal.run import run_table

    show(run_table(runs))


@app.command("validate")
def validate_command(
    recipes: Annotated[list[str], typer.Argument(help="Recipe files, or names of shipped ones.")],
) -> None:
    """Check recipes without running them; says too what this machine could not do."""
    from hfbench.machine.environment import check_machine
    from hfbench.machine.precision import say_slow_precision
    from hfbench.recipe.schema import load_recipe, local_path

    failed = 0
    for name in recipes:
        try:
            loaded = load_recipe(name)
            if (local_path(loaded.model.name_or_path) / "config.json").is_file():
                from hfbench.models.configs import check_local_model  # takes torchvision

                check_local_model(loaded)
        except HfbenchError as error:
            failed += 1
            say(error, file=sys.stderr)
            continue
        say(f"{name}: valid")
        for problem in check_machine(loaded):
            say(f"  not on this machine: {problem}")
        if slow := say_slow_precision(loaded):
            say(f"  slow on this machine: {slow}")
    if failed:
        say(f"{failed} of {len(recipes)} recipes are not valid.", file=sys.stderr)
        raise typer.Exit(2)


@app.command("env")
def env_command(as_json: AsJson = False) -> None:
    """Show what this machine is, which versions are installed, and what the machine cannot do."""
    from hfbench.machine.environment import (
        describe_environment,
        missing_capabilities,
        requested_processes,
    )

    environment, processes = describe_environment(), requested_processes()
    if as_json:
        found = environment.model_dump(mode="json") | {"world_size": processes}
        print_json(found)
        return
    from hfbench.report.terminal.run import environment_table

    show(environment_table(environment, processes, missing_capabilities()))


@app.command("predict")
def predict_command(
    model: Annotated[
        str, typer.Argument(help="A run's folder, its model/ folder, or a model on the Hub.")
    ],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files.")],
    top_k: Annotated[
        int, typer.Option("--top-k", min=1, help="Classes to show for each image.")
    ] = 5,
    as_json: AsJson = False,
) -> None:
    """Classify image files with a fine-tuned model."""
    from hfbench.models.inference import predict

    found = predict(model, images, top_k)
    if as_json:
        print_json(dict(zip(images, found, strict=True)))
        return
    from hfbench.report.terminal.run import prediction_table

    show(prediction_table(images, found))


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of a recipe, for editors (hfbench schema > recipe.schema.json)."""
    from hfbench.recipe.schema import recipe_json_schema

    print_json(recipe_json_schema())


class _HarmlessFormatter(logging.Formatter):
    """Writes log lines without credentials, and without what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return message(super().format(record))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever stderr is now: a program that runs several commands may replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr() -> None:
    handler = _StderrHandler()
    handler.setFormatter(_HarmlessFormatter("hfbench: %(message)s"))
    logger = logging.getLogger("hfbench")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_first() else logging.ERROR)
    logger.propagate = False
