"""A run's folder: which one to go on with, where a new one goes, what is in it.

Only functions import what is heavy: a suite's own process imports this module and stays small.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import BaseFileLock, FileLock, Timeout

from hfbench.errors import ResultError
from hfbench.machine.bounds import parse_json
from hfbench.machine.environment import Environment, environment_differences, is_main_process
from hfbench.recipe.schema import Recipe
from hfbench.results.manifest import has_checkpoint
from hfbench.results.schema import (
    RECIPE_FILE,
    Result,
    Run,
    find_runs,
    load_result,
    write_json,
)

if TYPE_CHECKING:
    from hfbench.data.images import ImageSplit
    from hfbench.results.scores import Scores

_ENVIRONMENT_FILE = "environment.json"  # beside the checkpoints, and gone with them
_LOCK_FILE = ".lock"
_OLD_SECONDS = 60.0  # no process makes a folder for so long
_STAGING_FOLDER = ".new"  # where a run's folder is made before it is there

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Elsewhere:
    """A run of a recipe in another environment, or with another number of processes.

    Attributes:
        folder: Of the run.
        finished: Whether it is.
        differences: Name, value there, value here.
    """

    folder: Path
    finished: bool
    differences: list[tuple[str, Any, Any]]

    def __str__(self) -> str:
        """Say what differs, as in ``torch 2.13.0, now 2.14.1``."""
        return "; ".join(
            f"{name.removeprefix('packages.')} {there}, now {here}"
            for name, there, here in self.differences
        )


@dataclass(frozen=True)
class Matches:
    """What there is of a recipe already, each oldest first.

    Attributes:
        finished: Results of the same recipe in this environment and number of processes.
        unfinished: Folders to go on with.
        elsewhere: Runs whose numbers would not compare.
        unreadable: What is wrong with results that cannot be read.
    """

    finished: list[Result]
    unfinished: list[Path]
    elsewhere: list[Elsewhere]
    unreadable: list[str]


def match_runs(
    recipe: Recipe,
    runs: Sequence[Run],
    environment: Environment,
    world_size: int,
    load: Callable[[Path], Result] = load_result,
) -> Matches:
    """Find the runs of a recipe that count here: same digest, environment and processes.

    Args:
        recipe: A run belongs to it if it has the same name and digest.
        runs: From `find_runs`.
        environment: Of a run that would be made now.
        world_size: The same.
        load: Loads the result in a folder; who asks often passes one that remembers.
    """
    found = Matches([], [], [], [])
    digest = recipe.digest()
    for run in runs:
        if run.folder.parent.name != recipe.name or not run.recipe:
            continue
        if run.recipe.digest() != digest:
            continue
        try:
            result = load(run.folder) if run.finished else None
        except ResultError as error:
            found.unreadable.append(str(error))
            continue
        there = (result.environment, result.training.world_size) if result else _where(run)
        differences = _differences(there, environment, world_size) if there else []
        if differences:
            found.elsewhere.append(Elsewhere(run.folder, run.finished, differences))
        elif result:
            found.finished.append(result)
        else:
            found.unfinished.append(run.folder)
    return found


def _where(run: Run) -> tuple[Environment, int] | None:
    """Return environment and processes of an unfinished run, ``None`` if it is not so far yet."""
    try:
        text = (run.folder / "checkpoints" / _ENVIRONMENT_FILE).read_text("utf-8")
        content = parse_json(text)
        world_size = int(content.pop("world_size"))
        return Environment.model_validate(content), world_size
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _differences(
    there: tuple[Environment, int], environment: Environment, world_size: int
) -> list[tuple[str, Any, Any]]:
    processes = [("processes", there[1], world_size)] if there[1] != world_size else []
    return environment_differences(there[0], environment) + processes


def find_earlier_run(
    recipe: Recipe,
    root: Path,
    environment: Environment,
    world_size: int,
    *,
    resume: bool,
    rerun: bool,
) -> Run | None:
    """Find the finished run to return or the unfinished one to go on with.

    Process 0 decides for all.

    Args:
        recipe: A run belongs to it if it has the same name and digest.
        root: Folder of all runs.
        environment: A run in another one is passed over: its numbers are no repeat of these.
        world_size: The same.
        resume: Whether to go on with an unfinished one.
        rerun: Whether to pass over a finished one.

    Returns:
        The newest such run, ``None`` if a new one has to be made.
    """
    from accelerate.utils import broadcast_object_list

    choice: list[Run | None] = [None]
    if is_main_process():
        named = [run for run in find_runs(root) if run.folder.parent.name == recipe.name]
        same = match_runs(recipe, named, environment, world_size)
        for problem in same.unreadable:
            logger.warning(f"{problem} It is passed over.")
        for run in same.elsewhere:
            logger.info(f"{run.folder} was made elsewhere and is passed over: {run}.")
        if same.finished and not rerun:
            folder = root / recipe.name / same.finished[-1].run_id
            tidy_up(folder)
            logger.info(
                f"Already finished: {folder}; whether files of the same names have "
                f"changed since is not checked. Run it again with --rerun."
            )
            choice = [Run(folder, recipe, True)]
        elif same.unfinished and resume:
            folder = same.unfinished[-1]
            bare = "" if has_checkpoint(folder) else " from the start: it has no checkpoint yet"
            logger.info(f"Going on with {folder}{bare}.")
            choice = [Run(folder, recipe, False)]
        elif kept := [folder for folder in same.unfinished if has_checkpoint(folder)]:
            logger.info(f"Starting anew; --resume would go on with {kept[-1]}.")
        elif resume:
            others = sum(not run.finished for run in named)
            hint = f" ({others} of that name have other settings)" if others else ""
            logger.info(f"There is no unfinished run of this recipe{hint}; starting anew.")
        if choice[0] is None:
            remove_empty(root / recipe.name)
    broadcast_object_list(choice)
    return choice[0]


def make_folder(recipe: Recipe, root: Path, held: ExitStack | None = None) -> Path:
    """Make ``root/<name>/<UTC time>-<hash>`` with ``recipe.json``; sorted by name is by time.

    Args:
        recipe: That is run.
        root: Of all runs.
        held: Holds the folder, from before others can find it, until it is closed.
    """
    from accelerate.utils import broadcast_object_list

    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
    choice = [root / recipe.name / f"{moment}-{recipe.digest()[:8]}"]
    if is_main_process():
        staging = root / _STAGING_FOLDER / recipe.name / choice[0].name
        try:
            staging.mkdir(parents=True)
            choice[0].parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultError(f"--output-dir: {choice[0]} cannot be made: {error}") from None
        write_json(recipe.as_json(), staging / RECIPE_FILE)
        lock = FileLock(staging / _LOCK_FILE)
        if held is not None:
            lock.acquire()
            held.callback(_let_go, choice[0], lock)
        # A kill leaves a whole folder that is held, or none.
        staging.rename(choice[0])
        for folder in (staging.parent, staging.parent.parent):
            with contextlib.suppress(OSError):  # another run is beginning
                folder.rmdir()
    broadcast_object_list(choice)
    return choice[0]


def note_environment(folder: Path, environment: Environment, world_size: int) -> None:
    """Write down where an unfinished run is made, so that it does not go on elsewhere."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    content = environment.model_dump(mode="json") | {"world_size": world_size}
    write_json(content, folder / "checkpoints" / _ENVIRONMENT_FILE)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep a run's folder to one process; a killed process lets go of it.

    Raises:
        ResultError: If another process is running in it.
    """
    lock = FileLock(folder / _LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ResultError(f"{folder} is still running in another process; wait for it.") from None
    try:
        yield
    finally:
        _let_go(folder, lock)


def _let_go(folder: Path, lock: BaseFileLock) -> None:
    # While it is held: after its release the file may be another process's already. Windows does
    # not remove an open file.
    with contextlib.suppress(OSError):
        (folder / _LOCK_FILE).unlink()
    lock.release()


def is_held(folder: Path) -> bool:
    """Tell whether a process is running in a run's folder."""
    if not (folder / _LOCK_FILE).exists():
        return False
    lock = FileLock(folder / _LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def tidy_up(folder: Path) -> None:
    """Remove what a finished run leaves that was killed before it could do so itself."""
    leftovers = [
        path
        for path in (folder / "checkpoints", folder / _LOCK_FILE, *folder.glob(".*.partial"))
        if path.exists()
    ]
    leftovers += folder.glob("model/.*")
    if leftovers:
        with contextlib.suppress(ResultError), hold(folder):
            for path in leftovers:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != _LOCK_FILE:  # that one goes by itself
                    path.unlink(missing_ok=True)


def remove_empty(recipe_folder: Path) -> None:
    """Remove the folders of runs that were killed before anything was trained."""
    staging = (recipe_folder.parent / _STAGING_FOLDER / recipe_folder.name).glob("*/")
    left = [folder for folder in staging if time.time() - folder.stat().st_mtime > _OLD_SECONDS]
    for folder in (*recipe_folder.glob("*-*/"), *left):
        found = {path.name for path in folder.rglob("*")}
        if found <= {
            RECIPE_FILE,
            f".{RECIPE_FILE}.partial",
            _LOCK_FILE,
            "checkpoints",
            _ENVIRONMENT_FILE,
        }:
            with contextlib.suppress(ResultError), hold(folder):
                shutil.rmtree(folder, ignore_errors=True)
                logger.info(f"Removed {folder}: it was left before anything was trained.")


def save_predictions(path: Path, test: ImageSplit, scores: Scores) -> None:
    """Write ``predictions.npz``, in the order of the data set.

    It holds for each test image ``index`` (its position in the split), ``label``, ``prediction``,
    ``probability`` (of the predicted class), ``label_probability`` (of the true one) and ``top``
    (the five most probable classes, best first, or all if they are fewer).
    """
    import numpy as np

    partial = path.with_name(f".{path.name}")
    np.savez_compressed(
        partial,
        index=test.index.numpy(),
        label=test.labels.numpy(),
        prediction=scores.prediction,
        probability=scores.probability,
        label_probability=np.exp(scores.log_probability),
        top=scores.top,
    )
    partial.replace(path)
