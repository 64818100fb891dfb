"""A run's folder: which one to go on with, where a new one goes, what is in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from hfbench.data import ImageSplit
from hfbench.environment import is_main_process
from hfbench.errors import ResultError
from hfbench.metrics import probabilities
from hfbench.recipe import Recipe
from hfbench.result import RECIPE_FILE, Run, find_runs, write_json
from hfbench.training import CLOCK_FILE

logger = logging.getLogger(__name__)


def find_earlier_run(recipe: Recipe, root: Path, *, resume: bool, rerun: bool) -> Run | None:
    """Find the finished run to return or the unfinished one to go on with.

    Process 0 decides for all.

    Args:
        recipe: A run belongs to it if it has the same name and digest.
        root: Folder of all runs.
        resume: Whether to go on with an unfinished one.
        rerun: Whether to pass over a finished one.

    Returns:
        The newest such run, ``None`` if a new one has to be made.
    """
    choice: list[Run | None] = [None]
    if is_main_process():
        named = [run for run in find_runs(root) if run.folder.parent.name == recipe.name]
        same = [run for run in named if run.recipe and run.recipe.digest() == recipe.digest()]
        finished = [run for run in same if run.finished]
        unfinished = [run for run in same if not run.finished]
        if finished and not rerun:
            logger.info(
                f"Already finished: {finished[-1].folder}; whether files of the same names have "
                f"changed since is not checked. Run it again with --rerun."
            )
            choice = [finished[-1]]
        elif unfinished and resume:
            folder = unfinished[-1].folder
            bare = "" if newest_checkpoint(folder) else " from the start: it has no checkpoint yet"
            logger.info(f"Going on with {folder}{bare}.")
            choice = [unfinished[-1]]
        elif unfinished:
            logger.info(f"Starting anew; --resume would go on with {unfinished[-1].folder}.")
        elif resume:
            others = sum(not run.finished for run in named)
            hint = f" ({others} of that name have other settings)" if others else ""
            logger.info(f"There is no unfinished run of this recipe{hint}; starting anew.")
    broadcast_object_list(choice)
    return choice[0]


def make_folder(recipe: Recipe, root: Path) -> Path:
    """Make ``root/<name>/<UTC time>-<hash>`` with ``recipe.json``; sorted by name is by time."""
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
    choice = [root / recipe.name / f"{moment}-{recipe.digest()[:8]}"]
    if is_main_process():
        try:
            choice[0].mkdir(parents=True)
        except OSError as error:
            raise ResultError(f"--output-dir: {choice[0]} cannot be made: {error}") from None
        write_json(recipe.as_json(), choice[0] / RECIPE_FILE)
    broadcast_object_list(choice)
    return choice[0]


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep a run's folder to one process; a killed process lets go of it.

    Raises:
        ResultError: If another process is running in it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ResultError(f"{folder} is still running in another process; wait for it.") from None
    try:
        yield
    finally:
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run.

    A kill while saving leaves one without a readable ``trainer_state.json``, which is written last.
    """
    numbered = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in (folder / "checkpoints").glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            json.loads((path / CLOCK_FILE).read_text())
        except (OSError, ValueError):
            logger.warning(f"{path} is not whole and is left out.")
            continue
        return path
    return None


def save_predictions(path: Path, test: ImageSplit, logits: np.ndarray) -> None:
    """Write ``predictions.npz``, in the order of the data set.

    It holds for each test image ``index`` (its position in the split), ``label``, ``prediction``
    and ``probability``, the latter float32 of shape (N, C).
    """
    partial = path.with_name(f".{path.name}")
    np.savez_compressed(
        partial,
        index=test.index.numpy(),
        label=test.labels.numpy(),
        prediction=logits.argmax(axis=1).astype(np.int64),
        probability=probabilities(logits).astype(np.float32),
    )
    partial.replace(path)
