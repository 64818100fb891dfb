"""``hfbench report`` on real runs, as a user starts it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from tests.integration.commands import WarmCommand, read_result
from tests.integration.conftest import Pair


def test_report_holds_the_numbers_of_the_runs(
    warm: WarmCommand, tmp_path: Path, pair: Pair
) -> None:
    done = warm.run(["report", pair.folder / "runs", "-o", tmp_path / "report"], tmp_path).check()
    assert "report/index.html" in done.stdout
    assert "Traceback" not in done.stderr
    with (tmp_path / "report" / "data" / "recipes.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["set"]: row for row in csv.DictReader(file)}
    page = (tmp_path / "report" / "index.html").read_text("utf-8")
    for run in pair.runs:
        result = read_result(run)
        row = rows[result["recipe"]["name"]]
        assert float(row["accuracy"]) == result["metrics"]["test"]["accuracy"]
        assert float(row["execution_seconds"]) == result["times"]["execution_seconds"]
        assert f'data-sort-value="{result["times"]["execution_seconds"]!r}"' in page
    with (tmp_path / "report" / "data" / "time_1.csv").open(encoding="utf-8", newline="") as file:
        parts = [row for row in csv.DictReader(file) if row["set"] == "quickstart_tuned"]
    inside = sum(
        float(row["seconds"])
        for row in parts
        if row["part"] not in ("setup_seconds", "final_evaluation_seconds", "final_save_seconds")
    )
    whole = read_result(pair.runs[1])["times"]["execution_seconds"]
    assert np.isclose(inside, whole, rtol=0.02)


def test_report_of_nothing_says_what_to_do(warm: WarmCommand, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    error = warm.run(["report"], tmp_path).refused()
    assert (
        "runs holds no finished run. Run a recipe first: hfbench recipe quickstart_tuned" in error
    )
    error = warm.run(["report", "nowhere"], tmp_path).refused()
    assert "nowhere is not a folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
