"""The command ``hfbench selftest``: try what only this machine can show, and write it down."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfbench.cli.options import AsJson, finite, print_json, say
from hfbench.machine.launched import check_alone

if TYPE_CHECKING:
    from hfbench.studies.selftest import Outcome

selftesting = typer.Typer()


@selftesting.command("selftest")
def selftest_command(
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", min=1, max=86400, callback=finite, help="No check begins later than this."
        ),
    ] = 300,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="File to attach to a report of a fault."),
    ] = Path("selftest.json"),
    as_json: AsJson = False,
) -> None:
    """Try in five minutes what only a GPU can show, offline: precisions, pixels, clocks, resume.

    On a CPU the emulated half runs. The outcomes, the environment and every traceback go into one
    file, without credentials. Exit code 1 if something failed.
    """
    check_alone("selftest")
    from hfbench.errors import DeviceError
    from hfbench.recipe.schema import local_path
    from hfbench.results.schema import write_json
    from hfbench.training.run import find_unwritable

    place = local_path(output)
    problems = find_unwritable(place.parent)
    if place.is_dir() or not place.parent.is_dir():
        problems = [f"--output: {output} is no file in a folder that exists."]
    if problems:
        raise DeviceError("\n".join(problems))
    from hfbench.studies.selftest import run_selftest

    say("hfbench selftest: a few minutes; Ctrl-C stops it.", file=sys.stderr)
    found = run_selftest(seconds, _tell)
    content = found.model_dump(mode="json")
    write_json(content, place)
    if as_json:
        print_json(content)
    else:
        done = sum(outcome.outcome != "not run" for outcome in found.outcomes)
        say(
            f"{len(found.failed)} of {done} checks failed on {found.environment.device_name}. "
            f"Everything is in {output}"
        )
    if found.failed:
        raise typer.Exit(1)


def _tell(outcome: Outcome) -> None:
    where = ", emulated on a CPU" if outcome.emulated else ""
    said = f"{outcome.name}: {outcome.outcome} ({outcome.seconds:.1f} s{where}). {outcome.said}"
    say(said, file=sys.stderr, flush=True)
