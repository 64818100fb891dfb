"""What a reader of a comparison sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hfbench.comparison.comparison import compare
from hfbench.report.terminal.comparison import comparison_tables
from hfbench.results.schema import Metrics, Switch
from tests.builders import make_recipe, make_result, make_split
from tests.made_up import change_right, draw_right, save_repeats
from tests.report.terminal.test_run import cells, show


def words(text: str) -> str:
    return " ".join(text.split())


def test_verdict_comes_first_and_every_gain_has_its_interval(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    right = draw_right(generator, 3, 1000, 0.9)
    other = change_right(generator, right, 0.0, churn=0.02)
    changes: dict[str, Any] = {
        "recipe": {"training_args": {"bf16": True}},
        "switches": {"precision": Switch(requested="bf16", applied="bf16")},
        "training": {"optimizer_steps": 6},
    }
    baseline = save_repeats(tmp_path, "base", [100, 101, 99], right)
    found = compare(baseline, save_repeats(tmp_path, "cand", [50, 50, 50], other, **changes))
    text = show(comparison_tables(found))
    lines = text.splitlines()
    assert lines[0] == "cand against base"
    assert words(text).startswith(f"cand against base {found.sentence}")
    assert "differ in: optimizer_steps 12 → 6." in text
    assert cells(text, "execution time") == [
        "1 min 40 s",
        "50.0 s",
        "2.00×",
        "1.95 to 2.05",
    ]
    assert cells(text, "train F1 macro")[-1] == ""
    assert "3 pairs of runs, 3 seeds" in text
    assert "Exact McNemar test on 1,000 images. seed 42: 10 images only the baseline" in words(text)
    assert "classes that changed most" in text


def test_single_pair_is_told_how_to_get_a_verdict() -> None:
    tuned = make_recipe(name="tiny_tuned", baseline="tiny", training_args={"bf16": True})
    candidate = make_result(
        recipe=tuned,
        times={"execution_seconds": 80.0},
        metrics=Metrics(test=make_split(0.79), train=None),
    )
    text = show(comparison_tables(compare(make_result(), candidate)))
    assert "speed undecided: 1.25× in the one pair there is" in text
    assert cells(text, "execution time") == ["1 min 40 s", "1 min 20 s", "1.25×", ""]
    assert cells(text, "test accuracy") == ["80.00 %", "79.00 %", "-1.00 points", ""]
    assert cells(text, "train accuracy") == ["90.00 %", "not measured", "", ""]
    assert "peak device memory" not in text
    assert "hfbench suite tiny tiny_tuned --repeats 5" in words(text)
    assert cells(text, "training_args.bf16") == ["null", "true"]
    assert "Asked for, but not applied here: mixed precision." in text


def test_comparison_of_equal_runs_says_none() -> None:
    text = show(comparison_tables(compare(make_result(), make_result())))
    assert "Settings that differ: none." in text
    assert "Circumstances that differ: none." in text


def test_brackets_in_settings_are_no_markup() -> None:
    recipe = make_recipe(dataset={"name_or_path": "data[/old]"})
    text = show(comparison_tables(compare(make_result(), make_result(recipe=recipe))))
    assert cells(text, "dataset.name_or_path") == ["digits", "data[/old]"]
