"""What a reader sees."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from hfbench.report.terminal.run import (
    environment_table,
    prediction_table,
    result_table,
    run_table,
)
from hfbench.results.formats import duration, percent
from hfbench.results.schema import Metrics, Switch, find_runs
from tests.builders import make_recipe, make_result, make_split, save_run


def show(what: RenderableType) -> str:
    """Render as the command line does in a pipe."""
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def cells(text: str, name: str) -> list[str]:
    """Return the cells of the first row with this name."""
    for line in text.splitlines():
        found = [cell.strip() for cell in line.strip("│┃").split("│")]
        if found[0] == name:
            return found[1:]
    raise AssertionError(f"no row {name} in\n{text}")


# Numbers


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, "0.00 %"), (1.0, "100.00 %"), (0.8, "80.00 %"), (2 / 3, "66.67 %"), (0.00004, "0.00 %")],
)
def test_percent(share: float, expected: str) -> None:
    assert percent(share) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0.000 s"),
        (0.0314, "0.031 s"),
        (1.0, "1.0 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (60.0, "1 min 00 s"),
        (60.4, "1 min 00 s"),
        (245.0, "4 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3600.0, "1 h 00 min"),
        (3960.0, "1 h 06 min"),
        (90000.0, "25 h 00 min"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.9996, "1.0 s"), (59.96, "1 min 00 s"), (3659.0, "1 h 01 min"), (7199.0, "2 h 00 min")],
)
def test_duration_rounds_across_units(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


# One run


def test_result_shows_every_number_with_its_unit() -> None:
    text = show(result_table(make_result()))
    assert "tiny, run 20260101T000000000-abcdef01" in text
    assert cells(text, "test accuracy") == ["80.00 %"]
    assert cells(text, "test F1 macro") == ["79.00 %"]
    assert cells(text, "train F1 weighted") == ["88.00 %"]
    assert cells(text, "test images") == ["20"]
    assert cells(text, "execution time") == ["1 min 40 s"]
    assert cells(text, "of it training") == ["1 min 20 s"]
    assert cells(text, "of it evaluation") == ["15.0 s"]
    assert cells(text, "steady-state training") == ["50.0 images/s"]
    assert cells(text, "peak memory, process") == ["1000 MiB"]
    assert "Measured in 1 process on Some CPU, 2 CPU cores." in text
    assert "reference" not in text
    assert "top-5" not in text
    assert "peak memory, device" not in text


def test_reference_stands_beside_and_is_marked() -> None:
    reference = {
        "accuracy": 0.84,
        "train_accuracy": 0.99,
        "f1": 0.83,
        "execution_seconds": 3725.0,
        "source": "Somebody's README, on an A100",
        "note": "F1's average is not stated.",
    }
    text = show(result_table(make_result(recipe=make_recipe(reference=reference))))
    header = next(line for line in text.splitlines() if "this run" in line)
    assert header.index("this run") < header.index("reference")
    assert cells(text, "test accuracy") == ["80.00 %", "84.00 %"]
    assert cells(text, "train accuracy") == ["90.00 %", "99.00 %"]
    assert cells(text, "test F1 macro") == ["79.00 %", "83.00 %"]
    assert cells(text, "train F1 macro") == ["89.00 %", "not given"]
    assert cells(text, "execution time") == ["1 min 40 s", "1 h 02 min"]
    assert "Reference: Somebody's README, on an A100. F1's average is not stated." in text


def test_reference_without_numbers_says_so() -> None:
    recipe = make_recipe(reference={"source": "nobody"})
    text = show(result_table(make_result(recipe=recipe)))
    assert cells(text, "test accuracy") == ["80.00 %", "not given"]
    assert cells(text, "execution time") == ["1 min 40 s", "not given"]


def test_reference_of_zero_is_a_number() -> None:
    recipe = make_recipe(reference={"source": "nobody", "accuracy": 0.0, "f1": 0.0})
    text = show(result_table(make_result(recipe=recipe)))
    assert cells(text, "test accuracy") == ["80.00 %", "0.00 %"]
    assert cells(text, "test F1 macro") == ["79.00 %", "0.00 %"]


def test_what_was_not_applied_is_said_with_its_reason() -> None:
    switches = {
        "precision": Switch(requested="bf16", applied="bf16"),
        "dataloader_pin_memory": Switch(requested=True, applied=False, reason="no device"),
    }
    text = show(result_table(make_result(switches=switches, training={"world_size": 2})))
    assert cells(text, "precision, as seen") == ["bf16"]
    assert "dataloader_pin_memory: asked for true, applied false (no device)." in text
    assert "Measured in 2 processes" in text


def test_synthetic_data_has_no_accuracy() -> None:
    result = make_result(
        metrics=Metrics(test=None, train=None),
        throughput={"samples_per_second": None},
        data={"notes": ["3 of 48 images are not RGB and were converted."]},
    )
    text = show(result_table(result))
    assert "accuracy  " not in text
    assert "Synthetic data: labels mean nothing, so there is no accuracy." in text
    assert cells(text, "steady-state training") == ["run too short"]
    assert "3 of 48 images are not RGB and were converted." in text


def test_top_five_and_device_memory_are_shown_where_there_are_any() -> None:
    result = make_result(
        metrics=Metrics(test=make_split(0.5, top5_accuracy=0.875), train=None),
        memory={"peak_device_memory_mib": 2048.4},
    )
    text = show(result_table(result))
    assert cells(text, "test top-5 accuracy") == ["87.50 %"]
    assert cells(text, "peak memory, device") == ["2048 MiB"]


# Lists


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    save_run(tmp_path, "one", "1")
    save_run(tmp_path, "one", "2", finished=False)
    text = show(run_table(find_runs(tmp_path)))
    lines = [line for line in text.splitlines() if " one " in line]
    assert [cell.strip() for cell in lines[0].strip("│").split("│")] == [
        "one",
        "1",
        "finished",
        "fresh",
        "80.00 %",
        "79.00 %",
        "1 min 40 s",
        "50.0",
    ]
    assert "unfinished" in lines[1]


def test_one_damaged_result_does_not_hide_the_other_runs(tmp_path: Path) -> None:
    folder = save_run(tmp_path, "one", "1")
    (folder / "result.json").write_text("{", "utf-8")
    save_run(tmp_path, "two", "2")
    assert "80.00 %" in show(run_table(find_runs(tmp_path)))


def test_environment_is_shown_with_what_it_lacks() -> None:
    text = show(environment_table(make_result().environment, 2, ["No accelerator is visible."]))
    assert cells(text, "device_name") == ["Some CPU"]
    assert cells(text, "memory_mib") == ["8000"]
    assert cells(text, "cuda") == ["null"]
    assert cells(text, "packages") == ["torch 2.15.0"]
    assert "No accelerator is visible." in text


def test_predictions_are_listed_by_file() -> None:
    found = [
        [{"label": "cat", "score": 0.75}, {"label": "dog", "score": 0.25}],
        [{"label": "dog", "score": 1.0}],
    ]
    text = show(prediction_table(["a.png", "b.png"], found))
    assert cells(text, "a.png") == ["cat", "75.00 %"]
    assert cells(text, "") == ["dog", "25.00 %"]
    assert cells(text, "b.png") == ["dog", "100.00 %"]


@pytest.mark.parametrize("file", ["photo[red].png", "photo[/red].png"])
def test_brackets_in_file_names_are_no_markup(file: str) -> None:
    text = show(prediction_table([file], [[{"label": "a [b] c", "score": 1.0}]]))
    assert cells(text, file) == ["a [b] c", "100.00 %"]
