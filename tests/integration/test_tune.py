"""`hfbench tune` measures, writes a recipe that runs, and refuses what it cannot do at once."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from hfbench.recipe.schema import shipped_recipes
from tests.integration.commands import SHORT, WarmCommand

TUNE = ("tune", "quickstart_untuned", *SHORT)
FILE = "quickstart_untuned_best.json"
BESIDE = "quickstart_untuned_best.measurements.json"


def test_best_recipe_is_written_shown_and_runs(warm: WarmCommand, tmp_path: Path) -> None:
    done = warm.run([*TUNE, "--seconds", "5"], tmp_path).check()
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, BESIDE]
    recipe = json.loads((tmp_path / FILE).read_text("utf-8"))
    found = json.loads((tmp_path / BESIDE).read_text("utf-8"))
    assert (recipe["name"], recipe["variant"], recipe["baseline"]) == (
        "quickstart_untuned_best",
        "fast",
        "quickstart_untuned",
    )
    assert recipe["dataset"]["max_train_samples"] == 200  # the override is in it
    assert found["budget_seconds"] == 5
    shown = " ".join(done.stdout.split())
    assert found["sentence"].split(":")[0] in shown
    for word in ("against best", "Not tried: pinned memory: nothing is copied", f"Wrote {FILE}"):
        assert word in shown
    for trial in found["trials"]:
        said = f"{trial['technique']}: {trial['detail']}"
        assert said in done.stderr
        assert trial["detail"].split(",")[0] in shown
    assert "train_runtime" not in done.stdout
    taken = [trial for trial in found["trials"] if trial["outcome"] == "taken"]
    if taken:
        assert f"hfbench suite quickstart_untuned {FILE} --repeats 3 {' '.join(SHORT)}" in shown
    warm.run(["recipe", FILE], tmp_path).check()
    (result,) = (tmp_path / "runs" / "quickstart_untuned_best").glob("*/result.json")
    assert json.loads(result.read_text("utf-8"))["recipe"] == recipe | {"$schema": None}


def test_json_is_the_tuning_and_replaces_files_if_told_to(
    warm: WarmCommand, tmp_path: Path
) -> None:
    options = ["--seconds", "5", "--json", "-o", "mine.json", "--larger-batch", "--memory", "10"]
    for name in ("mine.json", "mine.measurements.json"):
        (tmp_path / name).write_text("mine", "utf-8")
    printed = json.loads(warm.run([*TUNE, *options, "--force"], tmp_path).check().stdout)
    assert printed == json.loads((tmp_path / "mine.measurements.json").read_text("utf-8"))
    assert json.loads((tmp_path / "mine.json").read_text("utf-8"))["name"].endswith("_best")
    # What needs more memory than the limit is not started.
    (trial,) = [trial for trial in printed["trials"] if trial["technique"] == "larger batch"]
    assert (trial["outcome"], trial["windows"]) == ("would not fit", [])
    assert trial["reason"].endswith("10 MiB are available")


def test_files_that_are_there_are_refused_before_measuring(
    warm: WarmCommand, tmp_path: Path
) -> None:
    (tmp_path / FILE).write_text("mine", "utf-8")
    (tmp_path / BESIDE).write_text("mine", "utf-8")
    said = warm.run(TUNE, tmp_path).refused()
    assert "hfbench tune has 2 problems" in said
    assert f"{FILE} is there already; name another file, or add --force" in said
    assert "candidates or more" not in said
    assert (tmp_path / FILE).read_text("utf-8") == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune", "quickstart_untunedd"], "did you mean quickstart_untuned"),
        ([*TUNE, "training_args.fp16=true"], "fp16"),
        ([*TUNE, "-o", "no/such/folder.json"], "there is no folder no/such"),
        ([*TUNE, "--seconds", "1"], "--seconds"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    warm: WarmCommand, tmp_path: Path, arguments: list[str], said: str
) -> None:
    assert said in warm.run(arguments, tmp_path).refused()
    assert list(tmp_path.iterdir()) == []


def test_recipe_is_never_written_over(warm: WarmCommand, tmp_path: Path) -> None:
    shipped = shipped_recipes()["quickstart_untuned"].read_text("utf-8")
    (tmp_path / "mine.json").write_text(shipped, "utf-8")
    said = warm.run(["tune", "mine.json", "-o", "mine.json", "--force"], tmp_path).refused()
    assert "is the recipe that is tuned" in said
    assert (tmp_path / "mine.json").read_text("utf-8") == shipped


def test_ctrl_c_keeps_the_best_so_far(warm: WarmCommand, tmp_path: Path) -> None:
    running = warm.start([*TUNE, "--seconds", "1000"], tmp_path)
    said, deadline = running.output / "stderr", time.monotonic() + 60
    while not said.exists() or "start:" not in said.read_text("utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send(signal.SIGINT)
    done = running.wait()
    assert done.exit_code == 130
    assert "Traceback" not in done.stderr
    assert f"The best so far is in {FILE}" in done.stderr
    assert json.loads((tmp_path / BESIDE).read_text("utf-8"))["stopped"] is True
