"""What the tests of the command line share: a warm command, and one finished pair of runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.commands import (
    SHORT,
    Done,
    WarmCommand,
    build_environment,
    run_fresh,
)


@dataclass(frozen=True)
class Pair:
    """Two finished runs of the quickstart recipes, shortened.

    Attributes:
        folder: They are in ``runs/`` under it, hfbench's default.
        untuned: How ``python -m hfbench recipe quickstart_untuned`` ended; started as a user would.
        tuned: How the same of ``quickstart_tuned --json`` ended.
    """

    folder: Path
    untuned: Done
    tuned: Done

    @property
    def runs(self) -> tuple[Path, Path]:
        """The folders of the untuned and of the tuned run."""
        names = ("quickstart_untuned", "quickstart_tuned")
        untuned, tuned = (next((self.folder / "runs" / name).glob("*/")) for name in names)
        return untuned, tuned


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmCommand]:
    """Return a command that has everything imported, without a network."""
    with WarmCommand(build_environment()) as command:
        yield command


@pytest.fixture(scope="session")
def pair(warm: WarmCommand, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Run both quickstart recipes once; tests must leave the folder as it is."""
    folder = tmp_path_factory.mktemp("pair")
    untuned = run_fresh(["recipe", "quickstart_untuned", *SHORT], folder).check()
    tuned = warm.run(["recipe", "quickstart_tuned", "--json", *SHORT], folder).check()
    return Pair(folder, untuned, tuned)
