"""The line about an ablation beside the runs, below a comparison's verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfbench.comparison.attribution import say_attribution
from hfbench.comparison.comparison import compare
from hfbench.results.schema import Result
from hfbench.studies.ablation.schema import ABLATION_VERSION
from tests.made_up import draw_right, save_repeats

TUNED = {"baseline": "base", "training_args": {"bf16": True}}


def ratio(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.25, "high": value + 0.25, "rounds": 5}


def contribution(technique: str, alone: float, **changes: Any) -> dict[str, Any]:
    measured = {"alone": ratio(alone), "with_others": ratio(1.0), "interaction": None}
    return {"technique": technique, "detail": "so"} | measured | changes


def save_ablation(root: Path, run: Result, day: int, **changes: Any) -> None:
    """Write an ablation of a run's recipe beside it; its seed is another."""
    content = run.recipe.as_json()
    content["training_args"]["seed"] = 7
    ablation: dict[str, Any] = {
        "schema_version": ABLATION_VERSION,
        "created_at": f"2026-11-{day:02d}T10:00:00+00:00",
        "recipe": content,
        "recipe_sha256": "0" * 64,
        "environment": run.environment.model_dump(),
        "rounds": 5,
        "finished_rounds": 5,
        "steps": 23,
        "seconds": 60.0,
        "verdict": "Said elsewhere.",
        "findings": [],
        "notes": [],
        "rows": [],
        "contributions": [
            contribution("mixed precision", 1.5),
            contribution("accumulation, larger batch", 1.25),
            contribution("accumulation, same batch", 1.0, with_others=None),
        ],
        "not_run": [],
        "windows": [],
    }
    folder = root / "ablations" / run.recipe.name / f"202611{day:02d}T100000000-abcdef01"
    folder.mkdir(parents=True)
    (folder / "ablation.json").write_text(json.dumps(ablation | changes), "utf-8")


@pytest.fixture
def runs(tmp_path: Path) -> list[Result]:
    right = draw_right(np.random.default_rng(0), 2, 100, 0.9)
    return save_repeats(tmp_path, "cand", [50, 51], right, recipe=TUNED)


def test_without_an_ablation_nothing_is_said(runs: list[Result]) -> None:
    assert say_attribution(runs) is None


def test_newest_ablation_says_what_each_technique_of_the_recipe_gains_alone(
    tmp_path: Path, runs: list[Result]
) -> None:
    save_ablation(tmp_path, runs[0], 3, contributions=[contribution("mixed precision", 9.0)])
    save_ablation(tmp_path, runs[0], 24)
    right = draw_right(np.random.default_rng(0), 2, 100, 0.9)
    found = compare(save_repeats(tmp_path, "base", [100, 101], right), runs)
    assert found.ablation == (
        "Ablation of 2026-11-24 (5 rounds of 23 steps): mixed precision alone 1.50× [1.25, 1.75]; "
        "accumulation, larger batch alone 1.25× [1.00, 1.50]."
    )
    assert "Ablation" not in found.sentence


def test_whole_runs_are_said_to_be_whole_runs(tmp_path: Path, runs: list[Result]) -> None:
    save_ablation(tmp_path, runs[0], 24, full=True, finished_rounds=1, steps=None)
    said = say_attribution(runs)
    assert said is not None
    assert said.startswith("Ablation of 2026-11-24 (whole runs with 1 seed): mixed precision")


def test_ablation_of_another_recipe_or_machine_is_not_used(
    tmp_path: Path, runs: list[Result]
) -> None:
    other = runs[0].recipe.as_json()
    other["training_args"]["num_train_epochs"] = 9
    save_ablation(tmp_path, runs[0], 20, recipe=other)
    machine = runs[0].environment.model_dump() | {"device_name": "another"}
    save_ablation(tmp_path, runs[0], 21, environment=machine)
    save_ablation(tmp_path, runs[0], 22, schema_version=99)
    save_ablation(tmp_path, runs[0], 23, contributions=[])
    assert say_attribution(runs) is None
