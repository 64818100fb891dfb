"""Planning and running many runs; what is run here takes no time, see `tests/fake_hfbench.py`."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from hfbench.cli.suite import outcome_json, parse_seeds, plan_json, split_words
from hfbench.errors import DeviceError, HfbenchError, Interrupted, RecipeError, ResultError
from hfbench.recipe.arguments import training_argument_fields
from hfbench.recipe.schema import Recipe
from hfbench.report.terminal.suite import (
    outcome_table,
    plan_table,
    progress_table,
    say_change,
    say_left,
    say_total,
)
from hfbench.results.folder import hold, note_environment
from hfbench.results.schema import Result, find_runs, load_result, save_result, write_json
from hfbench.studies.suite import tether
from hfbench.studies.suite.estimates import measure_plan
from hfbench.studies.suite.plan import (
    Plan,
    PlannedRun,
    load_recipes,
    order_recipes,
    plan_runs,
    repeat_recipes,
    seed_of,
    total_estimate,
    unique,
    with_seed,
)
from hfbench.studies.suite.processes import RunProcess, build_command, last_lines, probe_environment
from hfbench.studies.suite.progress import LogReader, Progress, RunProgress, SuiteRun
from hfbench.studies.suite.run import SuiteOutcome, find_verdicts, run_plan, run_suite
from tests.builders import make_recipe, make_result

ENVIRONMENT = make_result().environment
linux = pytest.mark.skipif(not tether.HERE, reason="only Linux ends a process with its parent")


def a_recipe(name: str, baseline: str | None = None, **training_args: object) -> Recipe:
    return make_recipe(name=name, baseline=baseline, training_args=training_args)


def names(recipes: Sequence[Recipe]) -> list[str]:
    return [recipe.name for recipe in recipes]


@dataclass(frozen=True)
class Fake:
    """What stands in for hfbench, and the runs that it makes."""

    folder: Path
    runs: Path

    @property
    def launcher(self) -> str:
        script = Path(__file__).parents[2] / "fake_hfbench.py"
        return shlex.join([sys.executable, str(script), str(self.folder)])

    def behave(self, recipe: str, line: str) -> None:
        """Let one run do something first."""
        (self.folder / recipe).write_text(line)

    def starts(self) -> list[str]:
        """Return name and seed of each process that was started."""
        lines = (self.folder / "starts").read_text().splitlines()
        return [line.rpartition(" ")[0] for line in lines]

    def wait_for_start(self, number: int) -> int:
        """Wait for a process, and return its number."""
        for _ in range(1000):
            path = self.folder / "starts"
            lines = path.read_text().splitlines() if path.exists() else []
            if len(lines) >= number:
                return int(lines[number - 1].split()[-1])
            time.sleep(0.02)
        raise AssertionError(f"no start {number}")

    def plan(self, *recipes: Recipe, repeats: int = 2) -> Plan:
        return plan_runs(repeat_recipes(recipes, repeats), self.runs, self.launcher)

    def run(self, *recipes: Recipe, repeats: int = 2) -> SuiteOutcome:
        return run_plan(self.plan(*recipes, repeats=repeats))

    def see(self, torch: str, world_size: int = 1) -> None:
        """Let runs from now on be of another version of torch."""
        environment = ENVIRONMENT.model_copy(update={"packages": {"torch": torch}})
        result = make_result(environment=environment, training={"world_size": world_size})
        content = environment.model_dump(mode="json") | {"world_size": world_size}
        write_json(content, self.folder / "environment.json")
        write_json(result.model_dump(mode="json", by_alias=True), self.folder / "result.json")


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    folder = tmp_path / "fake"
    folder.mkdir()
    found = Fake(folder, tmp_path / "runs")
    found.see("2.15.0")
    return found


A, B = a_recipe("a"), a_recipe("b", baseline="a")
IN_TURN = [f"{run.name} {seed_of(run)}" for run in repeat_recipes([A, B], repeats=2)]


# --- what is run, and in what order ---


def test_recipes_that_are_compared_stay_together_in_any_order() -> None:
    recipes = [
        a_recipe("tuned", "untuned"),
        a_recipe("other"),
        a_recipe("untuned"),
        a_recipe("fast", "untuned"),
        a_recipe("faster", "fast"),
        a_recipe("alone", "somewhere-else"),
    ]
    ordered = names(order_recipes(recipes))
    assert sorted(ordered) == sorted(recipe.name for recipe in recipes)
    first = min(ordered.index(name) for name in ("untuned", "tuned", "fast", "faster"))
    assert set(ordered[first : first + 4]) == {"untuned", "tuned", "fast", "faster"}
    assert ordered == names(order_recipes(recipes[::-1]))  # however they are listed


def test_each_candidate_runs_before_its_baseline_as_often_as_after_it() -> None:
    recipes = [a_recipe("a"), *(a_recipe(name, baseline="a") for name in "bcd")]
    ordered = names(repeat_recipes(recipes, repeats=400))
    rounds = [ordered[start : start + 4] for start in range(0, len(ordered), 4)]
    for name in "bcd":
        before = sum(row.index(name) < row.index("a") for row in rounds)
        # Of 400 fair tosses 200 come out, give or take 10; six times that is one in 10^9.
        assert 140 < before < 260
    assert {tuple(row) for row in rounds} == set(itertools.permutations("abcd"))


@pytest.mark.parametrize("repeats", [0, -1, 1001, 100_000_000_000])
def test_numbers_of_repeats_that_nobody_waits_for_are_refused(repeats: int) -> None:
    with pytest.raises(RecipeError, match=rf"--repeats: found {repeats} runs .* 1 to 1000"):
        repeat_recipes([A, B], repeats)


def test_seeds_that_would_be_too_large_are_refused() -> None:
    with pytest.raises(RecipeError, match=r'training_args.seed of "a": 3 repeats need seeds up to'):
        repeat_recipes([a_recipe("a", seed=2**32 - 2)], repeats=3)


def test_plan_reads_each_result_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = ENVIRONMENT.on_cpu()
    recipes = repeat_recipes([A, B], repeats=10)
    for number, recipe in enumerate(recipes):
        folder = tmp_path / recipe.name / f"{number}"
        folder.mkdir(parents=True)
        write_json(recipe.as_json(), folder / "recipe.json")
        finished = make_result(recipe=recipe, run_id=folder.name, environment=environment)
        save_result(finished, folder)
    read: list[Path] = []

    def load(folder: Path) -> Result:
        read.append(folder)
        return load_result(folder)

    monkeypatch.setattr("hfbench.studies.suite.plan.load_result", load)
    monkeypatch.setattr(
        "hfbench.studies.suite.plan.probe_environment", lambda command: (environment, 1)
    )
    plan = plan_runs(recipes, tmp_path)
    assert all(run.result for run in plan.runs)
    assert len(read) == len(set(read)) == 20


def test_baselines_that_go_in_a_circle_are_all_run() -> None:
    recipes = [a_recipe("a", "b"), a_recipe("b", "a"), a_recipe("self", "self")]
    assert sorted(names(order_recipes(recipes))) == ["a", "b", "self"]


def test_baseline_and_candidate_alternate() -> None:
    repeated = repeat_recipes([B, A], repeats=3)
    assert {"".join(names(repeated)[start : start + 2]) for start in (0, 2, 4)} <= {"ab", "ba"}
    assert [seed_of(recipe) for recipe in repeated] == [42, 42, 43, 43, 44, 44]


def test_first_repeat_is_the_recipe_itself() -> None:
    for recipe in (a_recipe("a"), a_recipe("a", seed=7)):
        first, second = repeat_recipes([recipe], repeats=2)
        assert first.digest() == recipe.digest()
        assert second.digest() != recipe.digest()
        assert seed_of(second) == seed_of(recipe) + 1


def test_chosen_seeds_are_run_each_once() -> None:
    repeated = repeat_recipes([A, B], seeds=[3, 1, 3])
    assert [seed_of(recipe) for recipe in repeated] == [3, 3, 1, 1]
    assert sorted(names(repeated)) == ["a", "a", "b", "b"]


def test_defaults_are_those_of_training_arguments() -> None:
    fields = training_argument_fields()
    assert seed_of(a_recipe("a")) == fields["seed"].default
    from hfbench.studies.suite.progress import _DEFAULT_EPOCHS

    assert fields["num_train_epochs"].default == _DEFAULT_EPOCHS
    assert fields["max_steps"].default == -1


def test_two_recipes_of_one_name_are_refused_unless_they_are_the_same() -> None:
    same = A.model_copy(update={"description": "in other words"})
    assert names(unique([A, B, same])) == ["a", "b"]

    changed = [with_seed(recipe, 1) for recipe in (A, B)]
    with pytest.raises(RecipeError) as caught:
        unique([A, B, *changed])
    assert "both called a, and differ" in str(caught.value)
    assert "both called b" in str(caught.value)


def test_all_problems_of_all_recipes_are_one_error(tmp_path: Path) -> None:
    content = A.as_json()
    content["variant"] = "untunned"
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(RecipeError) as caught:
        load_recipes([str(tmp_path / "a.json"), "quickstart_untund", "quickstart_tuned"], ["x=1"])
    for problem in ('variant: found "untunned"', "did you mean quickstart_untuned?", '"x=1"'):
        assert problem in str(caught.value)


def test_everything_that_the_machine_lacks_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfbench.machine.environment.accelerator_type", lambda: None)
    with pytest.raises(DeviceError) as caught:
        load_recipes(["vit_cifar10_tuned", "quickstart_tuned", "resnet50_cifar10_tuned"])
    for name in ("vit_cifar10_tuned", "resnet50_cifar10_tuned"):
        assert f"{name} has 1 problem:\n  training_args.fp16" in str(caught.value)


@pytest.mark.parametrize("text", ["", "1,", "1,a", "-1", "1.5", "1,1", str(2**32)])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected different whole numbers"):
        parse_seeds(text)


def test_seeds_are_read_in_their_order() -> None:
    assert parse_seeds("3, 1,20") == parse_seeds("3,1,20", repeats=3) == [3, 1, 20]
    with pytest.raises(RecipeError, match="leave out --repeats"):
        parse_seeds("1,2", repeats=3)


def test_recipes_and_overrides_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "a=b.json"
    file.write_text("{}")
    assert split_words(["x", "a.b=1", str(file)]) == (["x", str(file)], ["a.b=1"])
    with pytest.raises(RecipeError, match="no recipe to run"):
        split_words(["training_args.seed=5"])


# --- what a run is started with ---

HFBENCH = ["-m", "hfbench"]


@pytest.mark.parametrize(
    ("launcher", "after"),
    [
        ("", [sys.executable, *HFBENCH]),
        (sys.executable, [sys.executable, *HFBENCH]),
        (f"nice -n 5 {sys.executable}", ["nice", "-n", "5", sys.executable, *HFBENCH]),
        ("nice -n 5", ["nice", "-n", "5", sys.executable, *HFBENCH]),
        ("env A='b c'", ["env", "A=b c", sys.executable, *HFBENCH]),
        ("env accelerate launch --cpu", ["env", "accelerate", "launch", "--cpu", *HFBENCH]),
        ("env torchrun --nproc 2", ["env", "torchrun", "--nproc", "2", *HFBENCH]),
        (
            "env python -m torch.distributed.run --nproc 2",
            ["env", "python", "-m", "torch.distributed.run", "--nproc", "2", *HFBENCH],
        ),
        ("env accelerate launch -m hfbench", ["env", "accelerate", "launch", *HFBENCH]),
        (
            "env deepspeed --num_gpus 2",
            ["env", "deepspeed", "--num_gpus", "2", "--module", "hfbench"],
        ),
    ],
)
def test_command_of_a_run(launcher: str, after: list[str]) -> None:
    assert build_command(launcher) == after


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ("acelerate launch", 'there is no program "acelerate"'),
        ("env accelerate", "write: accelerate launch"),
        ("nice 'python", "cannot be split into words"),
    ],
)
def test_launcher_that_cannot_work_is_refused(launcher: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        build_command(launcher)


def test_launcher_that_does_not_start_hfbench_says_what_it_said() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such device')"]
    with pytest.raises(DeviceError) as caught:
        probe_environment(command)
    assert "(exit code 1)\n  no such device" in str(caught.value)


def test_launcher_that_is_killed_is_said_to_be() -> None:
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    with pytest.raises(DeviceError, match=r"env --json \(killed by SIGKILL\)$"):
        probe_environment(command)


def test_launcher_may_speak_before_and_after_hfbench(fake: Fake) -> None:
    content = (fake.folder / "environment.json").read_text()
    code = f"print('{{hello'); print({content!r}); print('}}')"
    assert probe_environment([sys.executable, "-c", code]) == (ENVIRONMENT, 1)


def test_last_lines_show_how_a_progress_bar_stood() -> None:
    assert last_lines("a\n\n1 %\r50 %\r99 %\nboom\n \n") == ["a", "99 %", "boom"]
    assert last_lines("\n".join(map(str, range(100))))[0] == "92"


def test_process_keeps_its_output_and_its_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)"
    process = RunProcess([sys.executable, "-c", code], log)
    while process.poll() is None:
        time.sleep(0.01)
    process.settle()
    assert process.poll() == 3
    assert process.output() == "out\nerr\n"
    assert log.read_text().startswith("before\n$ ")


def test_what_a_run_leaves_behind_is_waited_for_and_then_killed(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)']); print(child.pid)"
    )
    process = RunProcess([sys.executable, "-c", code], tmp_path / "log")
    while process.poll() is None:
        time.sleep(0.01)
    child = psutil.Process(int(process.output()))
    start = time.monotonic()
    process.settle(patience=0.5)
    assert time.monotonic() - start >= 0.5
    child.wait(timeout=10)


@linux
def test_run_ends_when_the_suite_is_killed(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
import sys, time
from pathlib import Path
from hfbench.studies.suite.processes import RunProcess
RunProcess([sys.executable, "-c", "import os, time; open({str(child)!r}, 'w').write("
    "str(os.getpid())); time.sleep(60)"], Path({str(tmp_path / "log")!r}))
time.sleep(60)
"""
    suite = subprocess.Popen([sys.executable, "-c", code])
    while not (child.exists() and child.read_text()):
        time.sleep(0.01)
    running = psutil.Process(int(child.read_text()))
    suite.kill()
    suite.wait()
    running.wait(timeout=10)


@linux
def test_run_whose_suite_is_dead_already_does_not_start(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    command = [
        sys.executable,
        "-m",
        "hfbench.studies.suite.tether",
        str(dead.pid),
        "touch",
        "started",
    ]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 1
    assert not (tmp_path / "started").exists()


# --- what counts as finished ---


def test_finished_run_of_the_same_recipe_and_environment_counts(fake: Fake) -> None:
    fake.run(A, repeats=1)
    plan = fake.plan(A, B, repeats=1)
    assert {run.recipe.name: run.result is not None for run in plan.runs} == {"a": True, "b": False}
    assert names([run.recipe for run in plan.todo]) == ["b"]
    assert len(fake.plan(a_recipe("a", learning_rate=0.5), repeats=1).todo) == 1


def test_plain_run_of_a_recipe_is_its_first_repeat(fake: Fake) -> None:
    folder = fake.runs / "a" / "1"
    folder.mkdir(parents=True)
    write_json(A.as_json(), folder / "recipe.json")
    save_result(make_result(recipe=A, run_id="1"), folder)
    fake.run(A)
    assert fake.starts() == ["a 43"]


def test_run_with_another_library_is_shown_and_not_mixed(fake: Fake) -> None:
    fake.run(A, repeats=1)
    fake.see("2.16.0")
    plan = fake.plan(A, repeats=1)
    (run,) = plan.runs
    assert run.result is None
    assert len(run.notes) == 1
    assert run.notes[0].endswith("was finished with torch 2.15.0, now 2.16.0: it does not count.")
    assert run.estimate_seconds is None
    shown = show(plan_table(plan))
    assert "torch 2.15.0, now 2.16.0" in shown

    outcome = run_plan(plan)
    assert [r.environment.packages["torch"] for r in outcome.results] == ["2.16.0"]
    fake.see("2.15.0")
    assert fake.plan(A, repeats=1).todo == []


def test_run_of_another_commit_counts_and_is_shown(fake: Fake) -> None:
    fake.run(A, repeats=1)
    newer = ENVIRONMENT.model_copy(update={"hfbench_commit": "b" * 40})
    content = newer.model_dump(mode="json") | {"world_size": 1}
    for commit, notes in ((None, 0), ("a" * 40, 1)):
        older = ENVIRONMENT.model_copy(update={"hfbench_commit": commit})
        (folder,) = fake.runs.glob("a/*/")
        save_result(make_result(recipe=A, run_id=folder.name, environment=older), folder)
        write_json(content, fake.folder / "environment.json")
        (run,) = fake.plan(A, repeats=1).runs
        assert run.result is not None
        assert len(run.notes) == notes
    assert run.notes[0].endswith("commit aaaaaaaaaa, now bbbbbbbbbb: it counts.")


def test_run_with_another_number_of_processes_does_not_count(fake: Fake) -> None:
    fake.run(A, repeats=1)
    fake.see("2.15.0", world_size=2)
    (run,) = fake.plan(A, repeats=1).runs
    assert "processes 1, now 2" in run.notes[0]


def test_result_that_cannot_be_read_is_shown_and_does_not_count(fake: Fake) -> None:
    fake.run(A, repeats=1)
    (file,) = fake.runs.glob("a/*/result.json")
    file.write_text("{")
    (run,) = fake.plan(A, repeats=1).runs
    assert run.result is None
    assert "result.json cannot be read" in run.notes[0]


def test_recipe_that_leaves_the_gpu_alone_runs_in_the_cpus_environment(fake: Fake) -> None:
    gpu = {"device_type": "cuda", "device_name": "Some GPU", "device_count": 2, "cuda": "13.0"}
    probed = ENVIRONMENT.model_copy(update=gpu | {"device_memory_mib": 80000.0})
    write_json(probed.model_dump(mode="json") | {"world_size": 1}, fake.folder / "environment.json")
    plan = fake.plan(a_recipe("cpu"), a_recipe("gpu", use_cpu=False), repeats=1)
    found = {run.recipe.name: run.environment for run in plan.runs}
    assert found == {"cpu": ENVIRONMENT, "gpu": probed}


# --- how long it takes ---


def test_estimate_comes_from_runs_with_any_seed(fake: Fake) -> None:
    fake.run(A, repeats=1)
    plan = fake.plan(A, B)
    # make_result's 109 s, and 10 s for the imports.
    expected = {"a": 119.0, "b": None}
    assert all(run.estimate_seconds == expected[run.recipe.name] for run in plan.runs)
    assert total_estimate(plan) == (119.0, False)
    shown = show(plan_table(plan, "measure it"))
    assert "3 of 4 runs to do: at least 1 min 59 s" in shown
    assert "unknown" in shown
    assert shown.endswith("measure it\n")


def test_total_of_a_plan_is_said(fake: Fake) -> None:
    assert "how long is unknown" in say_total(fake.plan(A))
    fake.run(A, repeats=1)
    assert say_total(fake.plan(A, repeats=3)) == "2 of 3 runs to do: about 3 min 58 s."
    assert say_total(fake.plan(A, repeats=1)) == "All 1 runs are finished."


def test_time_left_counts_what_has_been_seen(fake: Fake) -> None:
    told, lefts = [], []

    def observe(progress: Progress) -> None:
        if progress.changed:
            told.append(say_left(progress))
            lefts.append((progress.left_seconds, progress.left_is_known))

    first = run_plan(fake.plan(A), observe).runs[0]
    assert "unknown" in told[0]
    # When the second begins, the first has shown how long one takes.
    assert lefts[2] == (first.seconds, True)
    assert told[-1].startswith("2 of 2 runs, ")


def test_resumed_run_counts_whole_in_the_time_left(fake: Fake) -> None:
    # make_result's 109 s were spent in two sessions, of which the suite saw the second.
    file = fake.folder / "result.json"
    content = json.loads(file.read_text())
    content["training"]["sessions"] = 2
    file.write_text(json.dumps(content))
    lefts = []
    run_plan(fake.plan(A), lambda progress: lefts.append(progress.left_seconds))
    assert lefts[2] == pytest.approx(119.0)


DIAGNOSIS = {
    "forecast": {"execution_seconds": 30.0, "final_evaluation_seconds": 3.0},
    "loading_seconds": 0.0,
    "seconds": 1000.0,  # longer than its process, so that no time is left for starting it
}


def test_recipes_that_never_ran_are_measured_once_each(fake: Fake) -> None:
    fake.run(A, repeats=1)
    doctor = "print('hfbench doctor: looking', file=sys.stderr); print('noise\\n' + {!r})"
    (fake.folder / "doctor.py").write_text(doctor.format(json.dumps(DIAGNOSIS, indent=2)))
    told: list[str] = []
    plan = measure_plan(fake.plan(A, B), told.append)
    expected = {"a": 119.0, "b": 33.0}
    assert all(run.estimate_seconds == expected[run.recipe.name] for run in plan.runs)
    assert all(run.is_measured == (run.recipe.name == "b") for run in plan.runs)
    assert total_estimate(plan) == (185.0, True)
    assert told == ["measuring b (1 of 1)", "looking"]
    assert (fake.folder / "measured").read_text() == "b ['--seconds', '10', '--json']\n"
    assert "about 33.0 s, measured now" in show(plan_table(plan))
    assert sum(run["estimate_is_measured"] for run in plan_json(plan)["runs"]) == 2


def test_start_up_and_loading_of_a_run_are_those_of_the_doctor(fake: Fake) -> None:
    content = DIAGNOSIS | {"loading_seconds": 5.0, "seconds": 0.0}
    (fake.folder / "doctor.py").write_text(f"print({json.dumps(content, indent=2)!r})")
    start = time.monotonic()
    (run,) = measure_plan(fake.plan(A, repeats=1), lambda _: None).runs
    assert run.estimate_seconds is not None
    assert 38 < run.estimate_seconds < 38 + time.monotonic() - start


@pytest.mark.parametrize(
    ("doctor", "reason"),
    [
        ("sys.exit('Error: the model is gone.')", "the model is gone."),
        ("sys.exit(3)", "exit code 3"),
        ("print('nothing')", "hfbench doctor printed no diagnosis"),
        ("print('{\\n  1\\n}')", "hfbench doctor printed no diagnosis"),
    ],
)
def test_doctor_that_fails_leaves_the_estimate_unknown(
    fake: Fake, doctor: str, reason: str
) -> None:
    (fake.folder / "doctor.py").write_text(doctor)
    plan = measure_plan(fake.plan(A, repeats=1), lambda _: None)
    (run,) = plan.runs
    assert run.estimate_seconds is None
    assert run.notes == (f"not measured: {reason}",)
    assert f"not measured: {reason}" in show(plan_table(plan))


def test_several_processes_are_not_measured_by_one(fake: Fake) -> None:
    fake.see("2.15.0", world_size=2)
    (run,) = measure_plan(fake.plan(A, repeats=1), lambda _: None).runs
    assert run.notes == ("not measured: hfbench doctor measures one process, and a run has 2",)


def write_log(folder: Path, *entries: tuple[int, float, float]) -> None:
    keys = ("step", "epoch", "seconds")
    lines = [json.dumps(dict(zip(keys, entry, strict=True))) + "\n" for entry in entries]
    (folder / "log.jsonl").write_text("".join(lines))


def test_progress_of_a_run_is_read_from_its_log(tmp_path: Path) -> None:
    reader = LogReader(tmp_path, a_recipe("a", num_train_epochs=4))
    assert reader.read() is None
    write_log(tmp_path, (10, 0.5, 20.0))
    assert reader.read() == RunProgress(step=10, steps=80, left_seconds=140.0)
    write_log(tmp_path, (10, 0.5, 20.0), (40, 2.0, 60.0))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 60, "ep')  # being written
    assert reader.read() == RunProgress(step=40, steps=80, left_seconds=60.0)


def test_progress_of_a_resumed_run_goes_by_its_own_session(tmp_path: Path) -> None:
    recipe = a_recipe("a", max_steps=100)
    write_log(tmp_path, (10, 1.0, 50.0), (20, 2.0, 100.0), (30, 3.0, 150.0))
    reader = LogReader(tmp_path, recipe)
    assert reader.read() == RunProgress(step=30, steps=100, left_seconds=350.0)
    # It goes on from step 20, where the log is cut, twice as fast.
    write_log(tmp_path, (10, 1.0, 50.0), (20, 2.0, 100.0))
    reader.read()
    write_log(tmp_path, (10, 1.0, 50.0), (20, 2.0, 100.0), (40, 4.0, 50.0))
    assert reader.read() == RunProgress(step=40, steps=100, left_seconds=150.0)


# --- running ---


def test_suite_runs_everything_once_in_turn(fake: Fake) -> None:
    outcome = run_suite([B, A], fake.runs, repeats=2, launcher=fake.launcher)
    assert fake.starts() == IN_TURN
    assert [run.state for run in outcome.runs] == ["finished"] * 4
    assert [result.seed for result in outcome.results] == [42, 42, 43, 43]
    assert outcome.failed == []

    again = run_suite([B, A], fake.runs, repeats=2, launcher=fake.launcher)
    assert len(fake.starts()) == 4
    assert again.results == outcome.results
    assert {run.folder.parent.name for run in find_runs(fake.runs)} == {"a", "b"}


def test_crash_is_recorded_and_the_others_go_on(fake: Fake) -> None:
    fake.behave("a-seed42", "print('Traceback'); sys.exit('CUDA error: out of luck')")
    fake.behave("b-seed43", "os.kill(os.getpid(), signal.SIGKILL)")
    outcome = fake.run(A, B)
    states = {f"{run.planned.recipe.name} {run.planned.seed}": run.state for run in outcome.runs}
    assert states == dict.fromkeys(IN_TURN, "finished") | {"a 42": "failed", "b 43": "failed"}
    crash, killed = outcome.failed
    assert (crash.exit_code, crash.reason) == (1, ["Traceback", "CUDA error: out of luck"])
    assert killed.exit_code == -signal.SIGKILL
    assert crash.log is not None
    assert "hfbench suite: exit code 1 after" in crash.log.read_text()
    shown = show(outcome_table(outcome, find_verdicts(outcome.runs)))
    assert "failed: exit code 1" in shown
    assert "failed: killed by SIGKILL" in shown
    described = outcome_json(outcome, [])["runs"]
    assert [run["state"] for run in described] == [run.state for run in outcome.runs]
    assert crash.reason in [run["reason"] for run in described]

    (fake.folder / "a-seed42").unlink()
    (fake.folder / "b-seed43").unlink()
    again = fake.run(A, B)
    assert again.failed == []
    assert fake.starts()[4:] == ["a 42", "b 43"]
    assert len(list(fake.runs.glob("*/*/"))) == 4


def test_run_that_leaves_no_result_is_a_failure(fake: Fake) -> None:
    fake.behave("a-seed42", "sys.exit(0)")
    (run,) = fake.run(A, repeats=1).failed
    assert run.exit_code == 0
    assert run.reason == ["It ended without a result that counts here."]


def test_run_that_saw_another_machine_is_a_failure(fake: Fake) -> None:
    plan = fake.plan(A, repeats=1)
    fake.see("2.16.0")
    (run,) = run_plan(plan).failed
    assert "There is one with torch 2.16.0, now 2.15.0." in run.reason


def test_second_suite_in_a_folder_is_refused(fake: Fake) -> None:
    plan = fake.plan(A, repeats=1)
    refused: list[HfbenchError] = []

    def start_another(progress: Progress) -> None:
        try:
            run_plan(plan)
        except ResultError as error:
            refused.append(error)

    run_plan(plan, start_another)
    assert refused
    assert "Another suite is running in" in str(refused[0])


def test_folder_that_is_a_file_is_a_message(fake: Fake) -> None:
    fake.runs.write_text("")
    with pytest.raises(ResultError, match="cannot be made"):
        run_plan(fake.plan(A))


def suite_apart(fake: Fake, *recipes: Recipe) -> multiprocessing.Process:
    """Start a suite in a process that is forked from this one, so that it need not import."""
    process = multiprocessing.get_context("fork").Process(target=_run_apart, args=(fake, recipes))
    process.start()
    return process


def _run_apart(fake: Fake, recipes: Sequence[Recipe]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        fake.run(*recipes)
    except Interrupted as error:
        (fake.folder / "said").write_text(str(error))
        os._exit(130)
    os._exit(0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_suite_passes_it_on_and_goes_on_later(fake: Fake, number: signal.Signals) -> None:
    second = IN_TURN[1].replace(" ", "-seed")
    fake.behave(second, "time.sleep(60)")
    suite = suite_apart(fake, A, B)
    running = psutil.Process(fake.wait_for_start(2))
    assert suite.pid is not None
    os.kill(suite.pid, number)
    suite.join(20)
    assert suite.exitcode == 130
    assert not running.is_running()
    said = (fake.folder / "said").read_text()
    assert said.startswith("Stopped; 1 of 4 runs are finished in ")
    assert said.endswith("Go on with the same command.")

    (fake.folder / second).unlink()
    assert fake.run(A, B).failed == []
    assert fake.starts() == [*IN_TURN[:2], *IN_TURN[1:]]
    assert len(list(fake.runs.glob("*/*/"))) == 4


def test_third_ctrl_c_ends_a_run_that_does_not_listen(fake: Fake) -> None:
    fake.behave("a-seed42", "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    suite = suite_apart(fake, A)
    running = psutil.Process(fake.wait_for_start(1))
    assert suite.pid is not None
    time.sleep(0.2)
    for _ in range(3):
        os.kill(suite.pid, signal.SIGINT)
        time.sleep(0.3)
    suite.join(20)
    assert suite.exitcode == 130
    assert not running.is_running()


@linux
def test_suite_killed_at_random_points_ends_like_one_that_ran_through(fake: Fake) -> None:
    rng = random.Random(0)
    for name in ("a-seed42", "b-seed42", "a-seed43", "b-seed43"):
        fake.behave(name, "time.sleep(0.6)")
    for _ in range(6):
        suite = suite_apart(fake, A, B)
        assert suite.pid is not None
        everything = [psutil.Process(suite.pid)]
        time.sleep(rng.uniform(0.1, 0.8))
        if rng.random() < 0.5:  # else what it started is left to end by itself
            everything += everything[0].children(recursive=True)
        for process in everything:
            process.kill()
        suite.join(20)
        assert suite.exitcode == -signal.SIGKILL
    outcome = fake.run(A, B)

    assert [f"{r.recipe.name} {r.seed}" for r in outcome.results] == IN_TURN
    accuracies = [r.metrics.test.accuracy for r in outcome.results if r.metrics.test]
    assert accuracies == [r.seed / 100 for r in outcome.results]
    assert all(run.finished for run in find_runs(fake.runs))
    assert len(list(fake.runs.glob("*/*/"))) == 4


def test_suite_waits_for_a_run_that_goes_on_in_another_process(fake: Fake) -> None:
    fake.behave("a-seed42", "sys.exit('should not have been started')")
    folder = fake.runs / "a" / "1"
    folder.mkdir(parents=True)
    write_json(A.as_json(), folder / "recipe.json")
    told = threading.Event()

    def finish() -> None:
        with hold(folder):
            holding.set()
            assert told.wait(20)
            save_result(make_result(recipe=A, run_id="1"), folder)

    holding = threading.Event()
    other = threading.Thread(target=finish)
    other.start()
    assert holding.wait(20)
    changes = []

    def observe(progress: Progress) -> None:
        if progress.changed:
            changes.append(say_change(progress))
            told.set()

    outcome = run_plan(fake.plan(A, repeats=1), observe)
    other.join()
    assert [run.state for run in outcome.runs] == ["finished"]
    assert "still running in another process" in changes[0]
    assert "finished, 80.00 %" in changes[-1]


def test_unfinished_run_of_another_environment_is_left_alone(fake: Fake) -> None:
    folder = fake.runs / "a" / "1"
    folder.mkdir(parents=True)
    write_json(A.as_json(), folder / "recipe.json")
    note_environment(folder, ENVIRONMENT, 1)
    (run,) = fake.plan(A, repeats=1).runs
    assert run.resumes == folder

    fake.see("2.16.0")
    (run,) = fake.plan(A, repeats=1).runs
    assert run.resumes is None
    assert "was begun with torch 2.15.0, now 2.16.0" in run.notes[0]


# --- what is shown ---


def show(what: object) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def planned(recipe: Recipe) -> PlannedRun:
    return PlannedRun(recipe, ENVIRONMENT, None, None, (), None)


@pytest.fixture
def suite_runs() -> list[SuiteRun]:
    finished = make_result(recipe=A)
    return [
        SuiteRun(planned(A), "finished", finished, seconds=125.0),
        SuiteRun(planned(B), "failed", seconds=3.0, exit_code=1, reason=["boom"]),
        SuiteRun(planned(with_seed(A, 43)), "running", seconds=61.0),
        SuiteRun(planned(with_seed(B, 43))),
    ]


def test_live_table_has_a_row_a_recipe_and_a_column_a_seed(suite_runs: list[SuiteRun]) -> None:
    suite_runs[2].progress = RunProgress(30, 80, 100.0)
    shown = show(progress_table(Progress(suite_runs, None, 200.0, 300.0, False)))
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert "seed 42" in shown
    assert "80.00 %, 2 min 05 s" in rows["a"]
    assert "30/80, 1 min 01 s" in rows["a"]
    assert "exit code 1" in rows["b"]
    assert "waiting" in rows["b"]
    assert "2 of 4 runs, 3 min 20 s; at least 5 min 00 s left." in shown


def test_names_stay_whole_on_a_narrow_terminal() -> None:
    name = "mobilenetv2_cifar100_untuned"
    runs = [SuiteRun(planned(a_recipe(name, seed=seed))) for seed in range(8)]
    for run in runs:
        run.state, run.exit_code = "failed", 1
    tables = (
        progress_table(Progress(runs, None, 200.0, 300.0, False)),
        outcome_table(SuiteOutcome(tuple(runs), 1.0), []),
    )
    for table in tables:
        console = Console(width=80)
        with console.capture() as capture:
            console.print(table)
        assert name in capture.get().split()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "[1/4] a, seed 42: finished, 80.00 %, 2 min 05 s"),
        (1, "[2/4] b, seed 42: failed, exit code 1\n    boom"),
        (2, "[3/4] a, seed 43: running (about 5 min 00 s left)"),
    ],
)
def test_changes_are_lines_in_a_pipe(suite_runs: list[SuiteRun], number: int, said: str) -> None:
    progress = Progress(suite_runs, suite_runs[number], 200.0, 300.0, True)
    assert say_change(progress) == said


def test_stopping_is_said(suite_runs: list[SuiteRun]) -> None:
    progress = Progress(suite_runs, suite_runs[2], 200.0, 300.0, True, stopping=True)
    assert "stopping" in say_change(progress)
    assert "Ctrl-C again" in say_left(progress)


def test_plan_as_json_says_what_is_finished(fake: Fake) -> None:
    fake.run(A, repeats=1)
    described = plan_json(fake.plan(A))
    assert [run["state"] for run in described["runs"]] == ["finished", "waiting"]
    assert described["estimate_seconds"] == 119.0
    assert described["estimate_is_complete"] is True


def test_candidates_are_compared_where_both_sides_have_runs(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = []

    def asked(baseline: list[object], candidate: list[object]) -> object:
        sides.append((len(baseline), len(candidate)))
        from hfbench.errors import ComparisonError

        raise ComparisonError("other images")

    monkeypatch.setattr("hfbench.comparison.comparison.compare", asked)
    fake.behave("c-seed42", "sys.exit(1)")
    fake.behave("c-seed43", "sys.exit(1)")
    outcome = fake.run(A, B, a_recipe("c", "a"), a_recipe("d", "elsewhere"))
    verdicts = {verdict.candidate: verdict.sentence for verdict in find_verdicts(outcome.runs)}
    assert verdicts == {"b": "other images", "c": "Not compared: no run of c is finished."}
    assert sides == [(2, 2)]
