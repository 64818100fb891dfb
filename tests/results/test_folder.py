"""Which earlier run counts, which one is gone on with, and who may write into its folder."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hfbench.errors import ResultError
from hfbench.machine.environment import Environment
from hfbench.recipe.schema import Recipe
from hfbench.results.folder import (
    find_earlier_run,
    hold,
    is_held,
    make_folder,
    match_runs,
    note_environment,
    tidy_up,
)
from hfbench.results.manifest import seal
from hfbench.results.schema import Run, find_runs, save_result
from tests.builders import make_recipe, make_result

HERE = make_result().environment
NEWER = HERE.model_copy(update={"packages": {"torch": "2.16.0"}})
RECIPE = make_recipe(name="tiny")


@pytest.fixture(autouse=True)
def _speaking(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # The command line, run by an earlier test, keeps hfbench's log to itself.
    monkeypatch.setattr(logging.getLogger("hfbench"), "propagate", True)
    caplog.set_level(logging.INFO, logger="hfbench")


def add_run(
    root: Path,
    *,
    recipe: Recipe = RECIPE,
    environment: Environment = HERE,
    processes: int = 1,
    finished: bool = True,
) -> Path:
    folder = make_folder(recipe, root)
    if finished:
        result = make_result(
            recipe=recipe,
            run_id=folder.name,
            environment=environment,
            training={"world_size": processes},
        )
        save_result(result, folder)
    else:
        note_environment(folder, environment, processes)
    return folder


def earlier(root: Path, *, resume: bool = False, rerun: bool = False) -> Run | None:
    return find_earlier_run(RECIPE, root, HERE, 1, resume=resume, rerun=rerun)


def test_newest_finished_run_of_this_environment_is_found(tmp_path: Path) -> None:
    add_run(tmp_path)
    newest = add_run(tmp_path)
    add_run(tmp_path, environment=NEWER)
    found = earlier(tmp_path)
    assert found is not None
    assert (found.folder, found.finished) == (newest, True)
    assert earlier(tmp_path, rerun=True) is None


@pytest.mark.parametrize(
    ("environment", "processes", "said"),
    [(NEWER, 1, "torch 2.16.0, now 2.15.0"), (HERE, 2, "processes 2, now 1")],
)
@pytest.mark.parametrize("finished", [True, False])
def test_run_made_elsewhere_is_passed_over_and_said_to_be(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    environment: Environment,
    processes: int,
    said: str,
    finished: bool,
) -> None:
    folder = add_run(tmp_path, environment=environment, processes=processes, finished=finished)
    assert earlier(tmp_path, resume=True) is None
    assert f"{folder} was made elsewhere and is passed over: {said}." in caplog.text


def test_unfinished_run_is_gone_on_with_only_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = add_run(tmp_path, finished=False)
    (folder / "checkpoints" / "checkpoint-1").mkdir()
    (folder / "checkpoints" / "checkpoint-1" / "clock.json").write_text("{}")
    seal(folder / "checkpoints" / "checkpoint-1")
    assert earlier(tmp_path) is None
    assert f"--resume would go on with {folder}" in caplog.text
    found = earlier(tmp_path, resume=True)
    assert found is not None
    assert (found.folder, found.finished) == (folder, False)


def test_run_killed_before_it_noted_its_environment_is_gone_on_with(tmp_path: Path) -> None:
    folder = make_folder(RECIPE, tmp_path)
    found = earlier(tmp_path, resume=True)
    assert found is not None
    assert found.folder == folder


def test_unreadable_result_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = add_run(tmp_path)
    (folder / "result.json").write_text("{")
    assert earlier(tmp_path, resume=True) is None
    assert "result.json cannot be read" in caplog.text
    assert "It is passed over." in caplog.text


def test_other_recipes_and_damaged_ones_are_no_match(tmp_path: Path) -> None:
    add_run(tmp_path, recipe=make_recipe(name="tiny", training_args={"learning_rate": 0.5}))
    add_run(tmp_path, recipe=make_recipe(name="other"))
    damaged = add_run(tmp_path)
    (damaged / "recipe.json").write_text("[]")
    matches = match_runs(RECIPE, list(find_runs(tmp_path)), HERE, 1)
    assert (matches.finished, matches.unfinished, matches.elsewhere) == ([], [], [])


def test_folder_is_held_until_it_is_let_go(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with hold(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(ResultError, match="still running in another process"), hold(tmp_path):
            pass
    assert not is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hfbench.results.folder import hold\n"
        f"with hold(Path({str(tmp_path)!r})):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        assert is_held(tmp_path)
        process.kill()
    assert not is_held(tmp_path)
    with hold(tmp_path):
        pass


def test_finished_run_that_was_killed_while_tidying_up_is_tidied_up(tmp_path: Path) -> None:
    folder = add_run(tmp_path)
    note_environment(folder, HERE, 1)
    (folder / ".lock").touch()
    with hold(folder):
        tidy_up(folder)
        assert (folder / "checkpoints").exists()  # its own process does it
    tidy_up(folder)
    assert {path.name for path in folder.iterdir()} == {"recipe.json", "result.json"}


def test_folders_of_runs_killed_in_set_up_are_removed_by_the_next(tmp_path: Path) -> None:
    killed = add_run(tmp_path, finished=False)
    (killed / ".lock").touch()
    running = add_run(tmp_path, finished=False)
    logged = add_run(tmp_path, finished=False)
    (logged / "log.jsonl").write_text('{"step": 1}\n')
    finished = add_run(tmp_path, recipe=make_recipe(name="tiny", training_args={"seed": 7}))
    half = tmp_path / ".new" / "tiny" / "20260101T000000000-00000000"
    half.mkdir(parents=True)
    os.utime(half, (1, 1))
    with hold(running):
        assert earlier(tmp_path) is None
    assert set((tmp_path / "tiny").iterdir()) == {running, logged, finished}
    assert list((tmp_path / ".new").glob("*/*")) == []


def test_two_never_hold_a_folder_at_once(tmp_path: Path) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def try_often() -> None:
        nonlocal inside, most
        for _ in range(200):
            try:
                with hold(tmp_path):
                    with lock:
                        inside += 1
                        most = max(most, inside)
                    with lock:
                        inside -= 1
            except ResultError:
                pass

    threads = [threading.Thread(target=try_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_module_is_light() -> None:
    # The process of a suite must take nothing from the machine that it measures.
    code = (
        "import sys, hfbench.cli.suite, hfbench.studies.suite.run, hfbench.report.terminal.suite; "
        "print({'torch', 'transformers', 'accelerate', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
