"""Suites of real runs: in turn, counted once, and the same whatever was killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hfbench.recipe.schema import Recipe, load_recipe
from hfbench.studies.suite import tether
from hfbench.studies.suite.run import SuiteOutcome, run_suite
from tests.integration.commands import (
    MODULE,
    SHORT,
    WarmCommand,
    build_environment,
    wait_until_written,
)

PAIR = ("quickstart_untuned", "quickstart_tuned")
# 3 epochs of 4 or 2 steps, a checkpoint after each: about a second.
CHANGES = (
    "dataset.max_train_samples=100",
    "dataset.max_eval_samples=50",
    "training_args.num_train_epochs=3",
    "training_args.logging_steps=1",
)


class Forking:
    """A launcher whose runs need not import anything, see `tests.integration.forking`."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.process = process
        script = Path(__file__).with_name("forking.py")
        self.launcher = shlex.join([sys.executable, str(script), str(socket)])

    def runs(self) -> list[psutil.Process]:
        """Return the processes that train now."""
        return psutil.Process(self.process.pid).children()


@pytest.fixture(scope="module")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    folder = tmp_path_factory.mktemp("forking")
    command = [sys.executable, Path(__file__).with_name("forking.py"), "serve", folder / "socket"]
    with subprocess.Popen(command, env=build_environment()) as process:
        wait_until_written(folder, "socket", timeout=60)
        yield Forking(process, folder / "socket")
        process.kill()


@pytest.fixture(scope="module")
def recipes() -> list[Recipe]:
    return [load_recipe(name, CHANGES) for name in PAIR]


@pytest.fixture(scope="module")
def whole(
    forking: Forking, recipes: list[Recipe], tmp_path_factory: pytest.TempPathFactory
) -> SuiteOutcome:
    """Return a suite that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = run_suite(recipes, folder, repeats=2, launcher=forking.launcher)
    assert outcome.failed == [], [run.reason for run in outcome.failed]
    return outcome


def reached(outcome: SuiteOutcome) -> list[tuple[str, int, float, float | None]]:
    """Return name, seed, accuracy and loss of each run."""
    found = []
    for result in outcome.results:
        assert result.metrics.test is not None
        test = result.metrics.test
        found.append((result.recipe.name, result.seed, test.accuracy, test.loss))
    return found


def test_runs_are_interleaved_in_time(whole: SuiteOutcome) -> None:
    assert [result.seed for result in whole.results] == [42, 42, 43, 43]
    for start in (0, 2):  # in either order
        assert {run.recipe.name for run in whole.results[start : start + 2]} == set(PAIR)
    ids = [result.run_id for result in whole.results]
    assert ids == sorted(ids)  # they begin with the time


@pytest.mark.skipif(not tether.HERE, reason="only Linux ends a process with its parent")
def test_suite_killed_at_random_points_ends_like_one_that_ran_through(
    forking: Forking, recipes: list[Recipe], whole: SuiteOutcome, tmp_path: Path
) -> None:
    rng = random.Random(int(os.environ.get("HFBENCH_TEST_SEED", "0")))
    for victims in ("suite", "all", "run", "all", "suite"):
        suite = multiprocessing.get_context("fork").Process(
            target=run_suite,
            args=(recipes, tmp_path),
            kwargs={"repeats": 2, "launcher": forking.launcher},
        )
        suite.start()
        assert suite.pid is not None
        time.sleep(rng.uniform(0.5, 2.0))
        processes = [psutil.Process(suite.pid)] if victims != "run" else []
        if victims == "all":
            processes += processes[0].children(recursive=True)
        if victims != "suite":
            processes += forking.runs()
        for process in processes:
            process.kill()
        if victims == "run":  # the suite notes it, and goes on with the others
            time.sleep(1)
            suite.kill()
        suite.join(30)

    outcome = run_suite(recipes, tmp_path, repeats=2, launcher=forking.launcher)
    assert reached(outcome) == reached(whole)
    folders = sorted(tmp_path.glob("*/*/"))
    assert len(folders) == 4
    for folder in folders:
        left = {path.name for path in folder.iterdir()}
        assert "result.json" in left
        assert not {"checkpoints", ".lock"} & left


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on(
    forking: Forking, warm: WarmCommand, tmp_path: Path
) -> None:
    command = ["suite", "quickstart_untuned", *CHANGES, "training_args.num_train_epochs=8"]
    command += ["--repeats", "1", "--launcher", forking.launcher]
    running = warm.start(command, tmp_path)
    wait_until_written(tmp_path, "runs/*/*/log.jsonl", timeout=60)
    running.send(signal.SIGINT)
    stopped = running.wait()
    assert stopped.exit_code == 130
    assert "Traceback" not in stopped.stderr
    last = stopped.stderr.strip().splitlines()[-1]
    assert last == "Stopped; 0 of 1 runs are finished in runs. Go on with the same command."
    (checkpoint,) = tmp_path.glob("runs/*/*/checkpoints/checkpoint-*/trainer_state.json")
    assert 0 < json.loads(checkpoint.read_text())["global_step"] < 32

    done = warm.run([*command, "--json"], tmp_path).check()
    (run,) = json.loads(done.stdout)["runs"]
    assert run["state"] == "finished"
    assert run["result"]["training"]["sessions"] == 2


def test_suite_shows_its_plan_its_progress_and_its_verdict(
    forking: Forking, warm: WarmCommand, tmp_path: Path
) -> None:
    plain = warm.run(["recipe", "quickstart_untuned", *CHANGES], tmp_path).check()
    command = ["suite", *PAIR, *CHANGES, "--repeats", "1", "--launcher", forking.launcher]
    planned = warm.run([*command, "--dry-run"], tmp_path).check()
    assert "1 of 2 runs to do: how long is unknown" in planned.stdout
    assert "finished: " in planned.stdout
    assert not (tmp_path / "runs" / "quickstart_tuned").exists()

    done = warm.run(command, tmp_path).check()
    assert "[2/2] quickstart_tuned, seed 42: running" in done.stderr
    assert "[2/2] quickstart_tuned, seed 42: finished" in done.stderr
    assert "quickstart_tuned against quickstart_untuned: " in done.stdout
    accuracy = next(line for line in plain.stdout.splitlines() if "test accuracy" in line)
    assert accuracy.split("│")[2].strip() in done.stdout
    listed = warm.run(["list"], tmp_path).check().stdout
    assert listed.count("finished") == 2
    assert ".suite" not in listed


@pytest.mark.slow
def test_recipe_that_never_ran_is_measured(warm: WarmCommand, tmp_path: Path) -> None:
    command = ["suite", "quickstart_untuned", *CHANGES, "--repeats", "2"]
    done = warm.run([*command, "--dry-run", "--measure", "--json"], tmp_path).check()
    plan = json.loads(done.stdout)
    assert "hfbench suite: measuring quickstart_untuned (1 of 1)" in done.stderr
    assert plan["estimate_is_complete"]
    assert plan["runs"][0]["estimate_seconds"] == plan["runs"][1]["estimate_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_all_said_before_anything_runs(warm: WarmCommand, tmp_path: Path) -> None:
    refused = warm.run(["suite", "quickstart_tund", "nothing", "a.b=1"], tmp_path).refused()
    for problem in ("did you mean quickstart_tuned?", "No recipe nothing"):
        assert problem in refused
    assert "add --dry-run" in warm.run(["suite", "nothing", "--measure"], tmp_path).refused()
    command = ["suite", "quickstart_tuned", "--launcher", "no-such-launcher"]
    assert 'no program "no-such-launcher"' in warm.run(command, tmp_path).refused()
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_recipes_are_checked_ends_all_at_once(tmp_path: Path) -> None:
    command = [*MODULE, "suite", "quickstart_untuned"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=build_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as suite:
        while not (checking := _checking(suite.pid)):
            time.sleep(0.01)
        time.sleep(0.2)  # while a process is being started, Ctrl-C is ignored
        os.killpg(suite.pid, signal.SIGINT)  # as a terminal does
        assert suite.wait(20) == 130
        assert suite.stderr is not None
        assert "Traceback" not in suite.stderr.read()
    assert not psutil.wait_procs(checking, timeout=10)[1]


def _checking(suite: int) -> list[psutil.Process]:
    """Return the process that loads the recipes."""
    children = psutil.Process(suite).children()
    return [child for child in children if any("spawn_main" in w for w in child.cmdline())]


def test_crash_of_one_is_said_and_the_exit_code_is_one(
    forking: Forking, warm: WarmCommand, tmp_path: Path
) -> None:
    missing = load_recipe("quickstart_tuned", ["dataset.name_or_path=nobody/nothing"])
    (tmp_path / "bad.json").write_text(json.dumps(missing.as_json()))
    command = ["suite", "quickstart_untuned", "bad.json", *CHANGES, "--repeats", "1"]
    done = warm.run([*command, "--launcher", forking.launcher], tmp_path)
    assert done.exit_code == 1
    assert "quickstart_tuned, seed 42: failed, exit code 2" in done.stderr
    assert "nobody/nothing" in done.stderr
    assert "quickstart_untuned, seed 42: finished" in done.stderr
    assert "its output is in runs/.suite/quickstart_tuned-seed42.log" in done.stdout
    assert "no run of quickstart_tuned is finished" in done.stdout


def test_environment_is_said_once_with_the_number_of_processes(
    warm: WarmCommand, tmp_path: Path
) -> None:
    launched = {"WORLD_SIZE": "2", "HFBENCH_LAUNCHED": "1"}
    first = warm.run(["env", "--json"], tmp_path, RANK="0", **launched).check()
    assert json.loads(first.stdout)["world_size"] == 2
    assert warm.run(["env", "--json"], tmp_path, RANK="1", **launched).check().stdout == ""


def test_run_without_a_launcher_has_a_process_of_its_own(warm: WarmCommand, tmp_path: Path) -> None:
    command = ["suite", "quickstart_untuned", *SHORT, "--repeats", "1"]
    done = warm.run(command, tmp_path).check()
    assert "[1/1] quickstart_untuned, seed 42: finished" in done.stderr
    log = (tmp_path / "runs" / ".suite" / "quickstart_untuned-seed42.log").read_text()
    assert "Everything is in runs/quickstart_untuned/" in log
