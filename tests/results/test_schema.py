"""Results: written whole or not at all, read back as they were, found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hfbench.errors import ResultError
from hfbench.machine.environment import environment_differences
from hfbench.results.schema import (
    SCHEMA_VERSION,
    TimeBudget,
    find_runs,
    load_result,
    save_result,
    write_json,
)
from tests.builders import make_recipe, make_result, save_run

# Writing


def test_json_is_written_with_a_newline_and_nothing_else_left(tmp_path: Path) -> None:
    write_json({"name": "Zürich"}, tmp_path / "file.json")
    assert (tmp_path / "file.json").read_text("utf-8") == '{\n  "name": "Zürich"\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("content", [{"a": object()}, {"a": float("nan")}])
def test_failed_write_keeps_the_old_file(content: Any, tmp_path: Path) -> None:
    write_json({"old": True}, tmp_path / "file.json")
    with pytest.raises((TypeError, ValueError)):
        write_json(content, tmp_path / "file.json")
    assert json.loads((tmp_path / "file.json").read_text("utf-8")) == {"old": True}


def test_killed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json({"old": True}, tmp_path / "file.json")

    def kill(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hfbench.results.schema.os.fsync", kill)
    with pytest.raises(KeyboardInterrupt):
        write_json({"new": True}, tmp_path / "file.json")
    assert json.loads((tmp_path / "file.json").read_text("utf-8")) == {"old": True}


def test_half_written_result_is_no_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_run(tmp_path, "one", "1", finished=False)

    def kill(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hfbench.results.schema.os.fsync", kill)
    with pytest.raises(KeyboardInterrupt):
        save_result(make_result(), folder)
    assert [run.finished for run in find_runs(tmp_path)] == [False]


# Reading

# What older versions of the schema lack, by the part that it is in.
NEWER = {
    "": ("conditions",),
    "environment": ("driver", "power_limit_watts", "mig_profile", "device_note"),
}


@pytest.mark.parametrize("part", ["result.json", "", ".."])
def test_result_is_loaded_by_file_by_folder_and_by_recipe(part: str, tmp_path: Path) -> None:
    folder = save_run(tmp_path, "one", "2")
    assert load_result(folder / part).run_id == "2"
    assert load_result(str(folder / part)) == make_result(
        recipe=make_recipe(name="one"), run_id="2"
    )


def test_recipe_folder_stands_for_its_newest_finished_run(tmp_path: Path) -> None:
    for run_id in ("20260102T000000000-a", "20260103T000000000-a", "20260101T000000000-a"):
        save_run(tmp_path, "one", run_id)
    save_run(tmp_path, "one", "20260104T000000000-a", finished=False)
    assert load_result(tmp_path / "one").run_id == "20260103T000000000-a"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path, "one", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_result("~/one").run_id == "1"


def test_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    folder = save_run(tmp_path, "one", "1", finished=False)
    with pytest.raises(ResultError, match=r"not finished; go on with it: .* --resume"):
        load_result(folder)
    with pytest.raises(ResultError, match="no finished run"):
        load_result(folder.parent)


def test_missing_folder_says_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"nowhere does not exist; .*hfbench list"):
        load_result(tmp_path / "nowhere")


def test_other_schema_version_is_refused(tmp_path: Path) -> None:
    folder = save_run(tmp_path, "one", "1")
    file = folder / "result.json"
    content = json.loads(file.read_text("utf-8"))
    for version in (SCHEMA_VERSION + 1, None):
        file.write_text(json.dumps(content | {"schema_version": version}), "utf-8")
        expected = f"schema_version {version}, expected {SCHEMA_VERSION}; run the recipe"
        with pytest.raises(ResultError, match=expected):
            load_result(folder)


@pytest.mark.parametrize("version", [1, 2])
def test_result_of_an_older_schema_version_is_read_and_compares(
    version: int, tmp_path: Path
) -> None:
    folder = save_run(tmp_path, "one", "1")
    file = folder / "result.json"
    content = json.loads(file.read_text("utf-8"))
    for part, names in NEWER.items():
        for name in names:
            del (content[part] if part else content)[name]
    file.write_text(json.dumps(content | {"schema_version": version}), "utf-8")
    old, new = load_result(folder), load_result(save_run(tmp_path, "one", "2"))
    assert (old.schema_version, old.environment.driver) == (version, None)
    assert environment_differences(old.environment, new.environment) == []


@pytest.mark.parametrize("text", ["", "[]", "null", "3"])
def test_file_that_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text, "utf-8")
    with pytest.raises(ResultError, match=r"result\.json (cannot be read|has schema_version None)"):
        load_result(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_number_that_is_none_is_refused_and_named(number: str, tmp_path: Path) -> None:
    file = save_run(tmp_path, "one", "1") / "result.json"
    text = json.loads(file.read_text("utf-8"))
    text["times"]["execution_seconds"] = text["environment"]["memory_mib"] = "NUMBER"
    file.write_text(json.dumps(text).replace('"NUMBER"', number), "utf-8")
    with pytest.raises(ResultError, match=r"has 2 problems:\n  times\.execution_seconds: "):
        load_result(tmp_path / "one")


@pytest.mark.parametrize("seed", [None, "abc"])
def test_result_without_a_seed_is_refused(seed: object, tmp_path: Path) -> None:
    file = save_run(tmp_path, "one", "1") / "result.json"
    content = json.loads(file.read_text("utf-8"))
    content["recipe"]["training_args"]["seed"] = seed
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ResultError, match=r"training_args\.seed is .*, expected a whole number"):
        load_result(tmp_path / "one")


def test_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("[" * 100_000, "utf-8")
    with pytest.raises(ResultError, match="cannot be read"):
        load_result(tmp_path)


def test_truncated_result_is_refused(tmp_path: Path) -> None:
    file = save_run(tmp_path, "one", "1") / "result.json"
    file.write_text(file.read_text("utf-8")[:500], "utf-8")
    with pytest.raises(ResultError, match=r"result\.json cannot be read: .*line"):
        load_result(file)


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="cannot be read"):
        load_result(tmp_path)


def test_every_wrong_field_is_named(tmp_path: Path) -> None:
    file = save_run(tmp_path, "one", "1") / "result.json"
    content = json.loads(file.read_text("utf-8"))
    del content["times"]["train_seconds"]
    content["memory"]["peak_process_memory_mib"] = "much"
    content["speed"] = 3
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ResultError, match="has 3 problems") as caught:
        load_result(file)
    for name in ("times.train_seconds", "memory.peak_process_memory_mib", "speed"):
        assert f"\n  {name}: " in str(caught.value)


def test_results_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_result().run_id = "other"


# Finding


def test_runs_are_sorted_by_recipe_and_time(tmp_path: Path) -> None:
    for name, run_id in (("b", "2"), ("a", "3"), ("b", "1"), ("a", "10")):
        save_run(tmp_path, name, run_id, finished=run_id != "3")
    found = [(run.folder.parent.name, run.folder.name) for run in find_runs(tmp_path)]
    assert found == [("a", "10"), ("a", "3"), ("b", "1"), ("b", "2")]
    assert [run.finished for run in find_runs(tmp_path)] == [True, False, True, True]
    assert [run.recipe and run.recipe.name for run in find_runs(tmp_path)] == ["a", "a", "b", "b"]


def test_run_with_a_damaged_recipe_is_found_without_it(tmp_path: Path) -> None:
    for run_id, text in (("1", "{"), ("2", '{"name": 3}'), ("3", "")):
        folder = save_run(tmp_path, "one", run_id, finished=False)
        (folder / "recipe.json").write_text(text, "utf-8")
    assert [run.recipe for run in find_runs(tmp_path)] == [None, None, None]


@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_recipe_that_is_no_object_is_found_without_it(text: str, tmp_path: Path) -> None:
    folder = save_run(tmp_path, "one", "1", finished=False)
    (folder / "recipe.json").write_text(text, "utf-8")
    assert [run.recipe for run in find_runs(tmp_path)] == [None]


def test_folder_that_does_not_exist_has_no_runs(tmp_path: Path) -> None:
    assert list(find_runs(tmp_path / "nowhere")) == []


def test_waiting_for_data_is_the_devices_own_where_it_has_a_timeline() -> None:
    # The host waited 8 s, most of it in copies that waited for the device.
    result = make_result()
    times = result.times.model_copy(update={"data_wait_seconds": 8.0})
    assert result.budget is not None
    budget = result.budget.model_copy(update={"data_wait_seconds": 1.5})

    def on(device: str, budget: TimeBudget | None) -> float:
        machine = result.environment.model_copy(update={"device_type": device})
        changes = {"times": times, "budget": budget, "environment": machine}
        return result.model_copy(update=changes).waited_seconds

    assert on("cuda", budget) == on("xpu", budget) == 1.5
    assert on("cpu", budget) == on("mps", budget) == on("cuda", None) == 8.0
