"""What a report says, in Markdown, in its data files, and in the page's source."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfbench.errors import ResultError
from hfbench.recipe.schema import load_recipe, shipped_recipes
from hfbench.report import write_report
from hfbench.report.drawing import THEME
from hfbench.report.speed_figures import pareto_front
from hfbench.results.formats import duration, percent
from hfbench.results.schema import Metrics, Result, TimeBudget, load_result, save_result
from hfbench.studies.ablation.schema import ABLATION_VERSION
from tests.builders import make_result, make_split
from tests.made_up import save_repeats

IMAGES = 40
TUNED = {"baseline": "plain", "variant": "tuned", "training_args": {"bf16": True}}
_PARTS = (1.0, 2.0, 10.0, 0.5, 0.0, 20.0, 36.0, 9.0, 15.0, 5.0, 1.5)
BUDGET = dict(zip(TimeBudget.model_fields, _PARTS, strict=True))


def right(accuracies: list[float]) -> np.ndarray:
    """Return which of the images are right, bool, (S, N): the first of them."""
    return np.array([np.arange(IMAGES) < round(share * IMAGES) for share in accuracies])


def save_pair(root: Path, **changes: Any) -> tuple[list[Result], list[Result]]:
    """Write three runs of "plain" and of "quick", which is twice as fast."""
    plain = save_repeats(root, "plain", [100.0, 110.0, 120.0], right([0.9, 0.8, 0.85]), **changes)
    quick = save_repeats(
        root, "quick", [50.0, 55.0, 60.0], right([0.9, 0.8, 0.85]), recipe=TUNED, **changes
    )
    return plain, quick


def write_log(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def read_csv(report: Path, name: str) -> list[dict[str, str]]:
    with (report / "data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown_row(report: Path, start: str) -> dict[str, str]:
    """Return the first row of a table that starts so: heading -> text."""
    before: list[str] = []
    for line in (report / "report.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith(f"| {start} |"):
            return dict(zip(before, cells, strict=True))
        if line.startswith("| ") and not line.startswith("| ---"):
            before = before or cells
        elif not line:
            before = []
    raise AssertionError(f"no row {start}")


class Page(HTMLParser):
    """Collects what the tests ask of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, name: str) -> Iterator[dict[str, str | None]]:
        return (attributes for tag, attributes in self.tags if tag == name)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Result], list[Result], Path]:
    """Return runs of a pair and their report; tests only read it."""
    root = tmp_path_factory.mktemp("pair")
    plain, quick = save_pair(root / "runs", budget=TimeBudget(**BUDGET))
    for run, seconds in [(plain[0], 100.0), (quick[0], 50.0)]:
        assert run.folder
        write_log(
            run.folder,
            [
                {"step": 1, "epoch": 0.5, "seconds": seconds / 4, "loss": 2.0},
                {"step": 2, "epoch": 1.0, "seconds": seconds / 2, "eval_loss": 1.5}
                | {"eval_accuracy": 0.5},
                {"step": 3, "epoch": 1.5, "seconds": 1.0, "loss": 1.0},  # after a resume
            ],
        )
    write_report(root / "runs", root / "report")
    return plain, quick, root / "report"


Reported = tuple[list[Result], list[Result], Path]


# Files


def test_all_files_are_written_and_returned(tmp_path: Path) -> None:
    save_pair(tmp_path / "runs")
    written = write_report(tmp_path / "runs", tmp_path / "a" / "report")
    folder = tmp_path / "a" / "report"
    assert written[:2] == [folder / "index.html", folder / "report.md"]
    assert set(written) == {path for path in folder.rglob("*") if path.is_file()}
    # Again: the same files, since neither a date nor a random number is in them.
    before = {path: path.read_bytes() for path in written}
    assert write_report(tmp_path / "runs", folder) == written
    assert {path: path.read_bytes() for path in written} == before


def test_page_loads_nothing(pair: Reported) -> None:
    page = Page(pair[2] / "index.html")
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        for name in ("href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), target
    assert set(re.findall(r"url\(\s*['\"]?(.)", page.source)) <= {"#"}
    assert "@import" not in page.source


def test_links_and_labels_find_their_target_and_ids_are_unique(pair: Reported) -> None:
    page = Page(pair[2] / "index.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("href", "xlink:href"):
            target = attributes.get(name) or ""
            if target.startswith("#"):
                assert target[1:] in ids
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(ids)


def test_markdown_links_find_their_target(pair: Reported) -> None:
    folder = pair[2]
    text = (folder / "report.md").read_text("utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    anchors = re.findall(r'<a id="([^"]+)"></a>', text)
    assert len([target for target in targets if target.endswith(".svg")]) >= 8
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (folder / target).is_file()


def test_headings_descend_one_by_one(pair: Reported) -> None:
    page = Page(pair[2] / "index.html")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_tables_and_figures_say_what_they_are(pair: Reported) -> None:
    page = Page(pair[2] / "index.html")
    assert next(page.all("html"))["lang"] == "en"
    tables, captions = list(page.all("table")), list(page.all("caption"))
    assert len(tables) == len(captions) > 5
    assert all(heading["scope"] in ("col", "row") for heading in page.all("th"))
    figures = list(page.all("figure"))
    pictures = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(figures) == len(pictures) == len(list(page.all("svg"))) >= 8
    for picture in pictures:
        assert re.search(r"\d", picture["aria-label"] or ""), picture  # its main numbers
    downloads = [link for link in page.all("a") if link.get("download")]
    assert len(downloads) == len(figures) + len(tables)
    for caption in re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", page.source):
        assert re.search(r"\bn = \d", caption), caption
    regions = [attributes for _, attributes in page.tags if attributes.get("role") == "region"]
    assert all(region["tabindex"] == "0" for region in regions)


# Numbers


def test_numbers_in_csv_are_those_of_the_results(pair: Reported) -> None:
    plain, _, folder = pair
    row = next(row for row in read_csv(folder, "recipes") if row["set"] == "plain")
    assert int(row["n"]) == 3
    assert float(row["accuracy"]) == pytest.approx(0.85)  # 0.9, 0.8, 0.85
    times = [run.times.execution_seconds for run in plain]
    assert float(row["execution_seconds"]) == pytest.approx(np.prod(times) ** (1 / 3))
    assert row["peak_device_memory_mib"] == "not measured"
    budget = [row for row in read_csv(folder, "time_1") if row["set"] == "quick"]
    assert {row["part"]: float(row["seconds"]) for row in budget} == BUDGET | {
        "setup_seconds": 5.0,
        "final_evaluation_seconds": 3.0,
        "final_save_seconds": 1.0,
    }


def test_numbers_in_markdown_are_those_of_the_results(pair: Reported) -> None:
    row = markdown_row(pair[2], "plain")
    assert row["test accuracy"] == "85.00 % (80.00–90.00)"
    assert row["execution time"] == "1 min 50 s (1 min 40 s–2 min 00 s)"  # 109.7 s
    assert markdown_row(pair[2], "quick")["execution time"].startswith("54.8 s ")
    assert set(markdown_row(pair[2], "backward").values()) == {"backward", "36.0 s"}


def test_comparison_is_shown_with_interval_verdict_and_pairs(pair: Reported) -> None:
    folder = pair[2]
    (row,) = read_csv(folder, "comparisons")
    assert (row["candidate"], row["baseline"], row["pairs"]) == ("quick", "plain", "3")
    assert float(row["execution_speedup"]) == pytest.approx(2.0)
    assert (row["speed_verdict"], row["accuracy_points"]) == ("faster", "0.0")
    text = (folder / "report.md").read_text("utf-8")
    assert r"2.00× faster \[2.00, 2.00\]" in text
    assert "against plain (n = 3 pairs, machine A)" in text
    low_high = [row for row in read_csv(folder, "speedup") if row["measure"] == "execution time"]
    assert [float(low_high[0][end]) for end in ("low", "high")] == pytest.approx([2.0, 2.0])


def test_arithmetic_and_energy_are_those_of_the_results(pair: Reported) -> None:
    row = read_csv(pair[2], "compute")[0]
    assert (row["set"], row["n"], row["dtype"]) == ("plain", "3", "fp32")
    assert float(row["train_flops_per_image"]) == 3e9
    assert float(row["utilization"]) == 0.25
    shown = markdown_row(pair[2], "plain")
    assert shown["peak device memory"] == "not measured"
    text = (pair[2] / "report.md").read_text("utf-8")
    assert "| 3 GFLOP | 150 GFLOP/s | 600 GFLOP/s | 25.00 % |" in text
    energy = read_csv(pair[2], "energy")[0]
    assert (energy["device_joules"], float(energy["cpu_joules"])) == ("not measured", 2000.0)


def test_confusions_are_counted_over_all_runs(pair: Reported) -> None:
    rows = read_csv(pair[2], "confusion_plain")
    # 40 images of 10 classes, right in 36, 32 and 34; a wrong one is taken for the next class.
    right = sum(int(row["count"]) for row in rows if row["true"] == row["predicted"])
    assert (right, sum(int(row["count"]) for row in rows)) == (102, 120)
    # Images 32 to 39 are wrong in one or more runs: classes 2 to 9, for class 9 images 39 alone.
    worst = next(row for row in rows if row["true"] == "class 9" and row["predicted"] == "class 0")
    assert (worst["count"], float(worst["share of true class"])) == ("3", 0.25)


def test_reliability_bins_are_those_of_the_predictions(pair: Reported) -> None:
    rows = [row for row in read_csv(pair[2], "reliability_1") if row["set"] == "plain"]
    used = [row for row in rows if int(row["count"])]
    assert len(rows) == 15
    (only,) = used  # every image has a probability of 0.72
    assert float(only["confidence"]) == pytest.approx(0.72, abs=1e-6)
    assert float(only["accuracy"]) == pytest.approx(0.85)
    # As the results say; 5 %.
    drawing = pair[2] / "figures" / "reliability_1.svg"
    assert "ECE 5.00 %" in drawing.read_text("utf-8")


def test_curve_goes_on_after_a_resume(pair: Reported) -> None:
    rows = [row for row in read_csv(pair[2], "curves_1") if row["set"] == "plain"]
    assert [(row["quantity"], float(row["seconds"])) for row in rows] == [
        ("loss", 25.0),
        ("eval_loss", 50.0),
        ("eval_accuracy", 50.0),
        ("loss", 51.0),
    ]


def test_results_of_an_earlier_version_show_what_is_known(tmp_path: Path) -> None:
    runs = save_repeats(
        tmp_path / "runs",
        "plain",
        [100.0, 120.0],
        right([0.9, 0.8]),
        budget=None,
        compute=None,
        energy=None,
    )
    for run in runs:
        assert run.folder
        assert run.metrics.test
        test = run.metrics.test.model_copy(update={"calibration_error": None})
        save_result(run.model_copy(update={"metrics": Metrics(test=test, train=None)}), run.folder)
    write_report(tmp_path / "runs", tmp_path / "report")
    rows = {row["part"]: row for row in read_csv(tmp_path / "report", "time_table_1")}
    # 88 s of training on average, of them 10 s waiting; 15 s evaluation, 5 s checkpoints.
    assert float(rows["training, not split"]["plain"]) == pytest.approx(0.8 * 110 - 10)
    assert float(rows["evaluation"]["plain"]) == 15.0
    assert "backward" not in rows
    # |0.9 - 0.72| and |0.8 - 0.72| from the predictions: 13 points on average.
    drawing = tmp_path / "report" / "figures" / "reliability_1.svg"
    assert "ECE 13.00 %" in drawing.read_text("utf-8")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "Arithmetic: not measured" in text
    assert "Energy: not measured" in text


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 0.9)], [0]),
        ([(2, 0.9), (1, 0.8)], [1, 0]),
        ([(1, 0.9), (2, 0.8)], [0]),  # dearer and worse
        ([(1, 0.9), (1, 0.9)], [0, 1]),  # equals do not beat each other
        ([(1, 0.9), (2, 0.9), (1, 0.8)], [0]),  # as accurate and dearer, as cheap and worse
        ([(3, 0.95), (1, 0.7), (2, 0.69), (2, 0.9)], [1, 3, 0]),
    ],
)
def test_pareto_front(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto_front(points) == front


# What was not run, or not measured


def test_reference_stands_beside_ours_and_the_rest_was_not_run(tmp_path: Path) -> None:
    shipped = load_recipe("resnet50_cifar10_tuned").as_json()
    recipe = {name: shipped[name] for name in ("model", "dataset", "variant", "preprocessing")}
    recipe["dataset"] |= {"name_or_path": "/somewhere/cifar10", "max_train_samples": 500}
    save_repeats(tmp_path / "runs", "resnet50_cifar10_tuned", [100.0], right([0.9]), recipe=recipe)
    write_report(tmp_path / "runs", tmp_path / "report")
    rows = read_csv(tmp_path / "report", "reference_cifar10")
    ours = next(row for row in rows if row["accuracy"] != "not run")
    assert (ours["model"], ours["variant"]) == ("resnet50.a1_in1k", "tuned")
    assert [float(ours[f"{who}accuracy"]) for who in ("reference_", "")] == [0.92, 0.9]
    assert [float(ours[f"{who}execution_seconds"]) for who in ("reference_", "")] == [2760, 100]
    assert ours["runs"] == "resnet50_cifar10_tuned, n = 1, machine A, not as shipped"
    others = [row for row in rows if row is not ours]
    assert len(others) == len([name for name in shipped_recipes() if "_cifar10_" in name]) - 1
    assert {row[name] for row in others for name in ("accuracy", "f1_macro", "runs")} == {"not run"}
    untuned = [row for row in rows if row["variant"] == "untuned"]
    assert {row["reference_accuracy"] for row in untuned} == {"not given"}
    of_100 = read_csv(tmp_path / "report", "reference_cifar100")
    resnet = next(row for row in of_100 if row["model"].startswith("resnet50"))
    assert (resnet["reference_train_accuracy"], resnet["accuracy"]) == ("not given", "not run")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    changes = {row["setting"]: row for row in read_csv(tmp_path / "report", "not_as_shipped")}
    subset = changes["dataset.max_train_samples"]
    assert (subset["shipped"], subset["run"]) == ("null", "500")
    copy = changes["dataset.name_or_path"]
    assert (copy["shipped"], copy["run"]) == ("uoft-cs/cifar10", "cifar10, a local copy")
    assert "/somewhere" not in text


def test_baseline_that_was_not_run_is_said(tmp_path: Path) -> None:
    save_repeats(tmp_path / "runs", "quick", [50.0], right([0.9]), recipe=TUNED)
    write_report(tmp_path / "runs", tmp_path / "report")
    assert "not compared. Its baseline plain was not run." in (
        tmp_path / "report" / "report.md"
    ).read_text("utf-8")
    (row,) = read_csv(tmp_path / "report", "comparisons")
    assert (row["pairs"], row["execution_speedup"]) == ("0", "not compared")


def test_refused_comparison_shows_the_reason_instead_of_numbers(tmp_path: Path) -> None:
    save_repeats(tmp_path / "runs", "plain", [100.0], right([0.9]))
    save_repeats(
        tmp_path / "runs",
        "quick",
        [50.0],
        right([0.9]),
        recipe=TUNED,
        data={"eval_fingerprint": "c" * 64},
    )
    write_report(tmp_path / "runs", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "which are not the same; run both on the same ones." in text
    assert not (tmp_path / "report" / "data" / "speedup.csv").exists()


def test_other_machines_are_shown_apart(tmp_path: Path) -> None:
    plain, _ = save_pair(tmp_path / "runs")
    old = plain[0]
    assert old.folder
    environment = old.environment.model_copy(update={"device_name": "Older CPU"})
    save_result(old.model_copy(update={"environment": environment}), old.folder)
    write_report(tmp_path / "runs", tmp_path / "report")
    rows = {row["set"]: row for row in read_csv(tmp_path / "report", "recipes")}
    assert {name: row["n"] for name, row in rows.items()} == {
        "plain": "2",
        "plain #2": "1",
        "quick": "3",
    }
    assert rows["plain"]["machine"] == rows["quick"]["machine"] != rows["plain #2"]["machine"]
    (device,) = (
        row for row in read_csv(tmp_path / "report", "machines") if row["what"] == "device"
    )
    assert {device["A"], device["B"]} == {"Some CPU", "Older CPU"}
    (pair,) = read_csv(tmp_path / "report", "comparisons")
    assert (pair["baseline"], pair["pairs"]) == ("plain", "2")


def test_noise_has_times_and_no_accuracy(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "noise" / "20260101T000000000-abcdef01"
    folder.mkdir(parents=True)
    result = make_result(metrics=Metrics(test=None, train=None))
    (folder / "recipe.json").write_text(json.dumps(result.recipe.as_json()))
    save_result(result, folder)
    write_report(tmp_path / "runs", tmp_path / "report")
    (row,) = read_csv(tmp_path / "report", "recipes")
    assert (row["accuracy"], float(row["execution_seconds"])) == ("not measured", 100.0)
    assert not list((tmp_path / "report" / "data").glob("confusion_*"))


def test_unfinished_and_unreadable_runs_are_listed(tmp_path: Path) -> None:
    plain, quick = save_pair(tmp_path / "runs")
    assert plain[0].folder
    assert quick[0].folder
    (plain[0].folder / "result.json").write_text("{")
    (quick[0].folder / "result.json").unlink()
    write_report(tmp_path / "runs", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert f"- quick/{quick[0].run_id}: not finished." in text
    assert f"- plain/{plain[0].run_id}: unreadable." in text
    assert {row["n"] for row in read_csv(tmp_path / "report", "recipes")} == {"2"}


def test_damaged_predictions_leave_the_rest_of_the_report(tmp_path: Path) -> None:
    plain, _ = save_pair(tmp_path / "runs")
    for run in plain:
        assert run.folder
        (run.folder / "predictions.npz").write_bytes(b"not a zip")
    write_report(tmp_path / "runs", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "not compared." in text
    assert "run the recipe again" in text
    assert (tmp_path / "report" / "data" / "confusion_quick.csv").is_file()
    assert not (tmp_path / "report" / "data" / "confusion_plain.csv").is_file()


# Ablations


def save_ablation(root: Path) -> None:
    """Write an ablation in which the one technique is 1.5 times as fast, with a wrong loss."""
    gain = {"value": 1.5, "low": 1.4, "high": 1.6, "rounds": 3}
    row = {
        "name": "none",
        "label": "none",
        "also": [],
        "techniques": [],
        "settings": {},
        "effective_batch_size": 8,
        "speedup": None,
        "verdict": "baseline",
        "samples_per_second": 100.0,
        "seconds_per_step": 0.08,
        "data_wait_share": 0.1,
        "peak_process_memory_mib": 1000.0,
        "peak_device_memory_mib": None,
        "first_loss": None,
        "not_applied": [],
        "failure": None,
    }
    loss = {"expected": 2.5, "found": 5.0, "tolerance": 0.01, "problem": "Off.", "flagged": True}
    faster = {"name": "quick", "label": "mixed precision", "speedup": gain, "verdict": "faster"}
    result = make_result()
    ablation = {
        "schema_version": ABLATION_VERSION,
        "created_at": "2026-01-01T00:00:00+00:00",
        "recipe": result.recipe.as_json() | {"name": "quick"},
        "recipe_sha256": "0" * 64,
        "environment": result.environment.model_dump(),
        "rounds": 3,
        "finished_rounds": 3,
        "steps": 10,
        "seconds": 60.0,
        "verdict": "Mixed precision is 1.50× as fast.",
        "findings": ["A first loss is changed."],
        "notes": [],
        "rows": [row, row | faster | {"first_loss": loss, "samples_per_second": 150.0}],
        "contributions": [
            {
                "technique": "mixed precision",
                "detail": "bf16",
                "alone": gain,
                "with_others": None,
                "interaction": None,
            }
        ],
        "not_run": [{"technique": "pinned memory", "reason": "nothing is copied"}],
        "windows": [],
    }
    folder = root / "ablations" / "quick" / "20260101T000000000-abcdef01"
    folder.mkdir(parents=True)
    (folder / "ablation.json").write_text(json.dumps(ablation))


def test_ablations_are_a_section_of_their_own(tmp_path: Path) -> None:
    save_repeats(tmp_path / "runs", "plain", [100.0], right([0.9]))
    save_ablation(tmp_path / "runs")
    broken = tmp_path / "runs" / "ablations" / "plain" / "20260101T000000000-abcdef01"
    broken.mkdir(parents=True)
    (broken / "ablation.json").write_text("{")
    report = tmp_path / "report"
    write_report(tmp_path / "runs", report)
    (row,) = read_csv(report, "contributions_quick")
    assert (row["detail"], float(row["alone"]), row["with_others"]) == ("bf16", 1.5, "not measured")
    rows = read_csv(report, "configurations_quick")
    assert [row["verdict"] for row in rows] == ["baseline", "faster"]
    assert (rows[0]["speedup"], rows[0]["first_loss"]) == ("not measured", "not measured")
    assert (float(rows[1]["first_loss"]), float(rows[1]["expected_first_loss"])) == (5.0, 2.5)
    text = (report / "report.md").read_text("utf-8")
    assert "Mixed precision is 1.50× as fast." in text
    assert "pinned memory: not run, nothing is copied." in text
    assert "- ablations/plain: unreadable." in text
    assert "in windows of 10 optimizer steps, n = 3 rounds" in text


def test_margin_is_passed_on_and_said(tmp_path: Path) -> None:
    save_pair(tmp_path / "runs")
    write_report(tmp_path / "runs", tmp_path / "report", margin_points=99.0)
    (row,) = read_csv(tmp_path / "report", "comparisons")
    assert row["accuracy_verdict"] == "not worse"
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "accuracy not worse than 99 points" in text
    assert "puts up with a loss of 99 points" in text
    assert "above the loss of 99 points" in text


def test_results_alone_are_enough(tmp_path: Path) -> None:
    for run in (run for side in save_pair(tmp_path / "runs") for run in side):
        assert run.folder
        (run.folder / "recipe.json").unlink()
        (run.folder / "predictions.npz").unlink()
    write_report(tmp_path / "runs", tmp_path / "report")
    assert len(read_csv(tmp_path / "report", "comparisons")) == 1


def test_copy_of_a_run_does_not_count(tmp_path: Path) -> None:
    (run,) = save_repeats(tmp_path / "runs", "plain", [100.0], right([0.9]))
    assert run.folder
    shutil.copytree(run.folder, run.folder.with_name("20270101T000000000-copy"))
    write_report(tmp_path / "runs", tmp_path / "report")
    (row,) = read_csv(tmp_path / "report", "recipes")
    assert row["n"] == "1"
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "plain/20270101T000000000-copy: a copy of another run." in text


def test_runs_that_took_no_time_are_shown(tmp_path: Path) -> None:
    for run in save_repeats(tmp_path / "runs", "plain", [100.0, 101.0], right([0.9, 0.8])):
        nothing = dict.fromkeys(type(run.times).model_fields, 0.0)
        budget = TimeBudget(**dict.fromkeys(TimeBudget.model_fields, 0.0))
        times = run.times.model_copy(update=nothing)
        assert run.folder
        save_result(run.model_copy(update={"times": times, "budget": budget}), run.folder)
    write_report(tmp_path / "runs", tmp_path / "report")
    assert "plain: training call 0.000 s." in (tmp_path / "report" / "report.md").read_text("utf-8")


def test_log_lines_that_cannot_be_drawn_are_left_out(tmp_path: Path) -> None:
    (run,) = save_repeats(tmp_path / "runs", "plain", [100.0], right([0.9]))
    assert run.folder
    good = '{"epoch": 1.0, "seconds": 2.0, "loss": 0.5}'
    odd = ["null", "[1]", '{"loss": 1.0}', '{"epoch": 1, "seconds": "x", "loss": 1}']
    nan = '{"epoch": 2.0, "seconds": 3.0, "loss": NaN, "eval_loss": 0.7}'
    (run.folder / "log.jsonl").write_text("\n".join([*odd, good, nan]))
    write_report(tmp_path / "runs", tmp_path / "report")
    rows = read_csv(tmp_path / "report", "curves_1")
    assert [(row["quantity"], row["value"]) for row in rows] == [
        ("loss", "0.5"),
        ("eval_loss", "0.7"),
    ]


# Errors


@pytest.mark.parametrize("inside", ["plain", "plain/run"])
def test_folder_inside_that_of_all_runs_is_refused_with_the_right_one(
    inside: str, tmp_path: Path
) -> None:
    (run,) = save_repeats(tmp_path, "plain", [100.0], right([0.9]))
    assert run.folder
    run.folder.rename(tmp_path / "plain" / "run")
    with pytest.raises(ResultError, match=rf"give the folder .*: {re.escape(str(tmp_path))}$"):
        write_report(tmp_path / inside, tmp_path / "report")


def test_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"holds no finished run\. Run a recipe first"):
        write_report(tmp_path, tmp_path / "report")
    with pytest.raises(ResultError, match="is not a folder"):
        write_report(tmp_path / "nowhere", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_folder_of_unreadable_runs_is_refused_with_their_number(tmp_path: Path) -> None:
    (run,) = save_repeats(tmp_path, "plain", [100.0], right([0.9]))
    assert run.folder
    (run.folder / "result.json").unlink()
    with pytest.raises(ResultError, match="1 unfinished or unreadable"):
        write_report(tmp_path, tmp_path / "report")


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    save_repeats(tmp_path / "runs", "plain", [100.0], right([0.9]))
    (tmp_path / "report").write_text("")
    with pytest.raises(ResultError, match="give another folder with -o"):
        write_report(tmp_path / "runs", tmp_path / "report")


# Names and many classes


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>|`$x$`'
    names = [evil, *(f"class {number}" for number in range(1, 10))]
    f1 = dict.fromkeys(names, 0.5)
    save_repeats(
        tmp_path / "runs",
        "plain",
        [100.0],
        right([0.0]),
        recipe={"dataset": {"name_or_path": evil}},
        data={"label_names": names},
    )
    (run,) = (tmp_path / "runs" / "plain").iterdir()
    result = load_result(run)
    save_result(
        result.model_copy(
            update={"metrics": Metrics(test=make_split(0.0, f1_per_class=f1), train=None)}
        ),
        run,
    )
    write_report(tmp_path / "runs", tmp_path / "report")
    page = Page(tmp_path / "report" / "index.html")
    assert len(list(page.all("script"))) == 1  # the report's own
    assert "&lt;script&gt;" in page.source
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "<script" not in text
    assert r"&lt;/script>\|\`\$x\$\`" in text
    for drawing in (tmp_path / "report" / "figures").iterdir():
        assert "<script" not in drawing.read_text("utf-8")


def test_long_names_and_other_scripts_are_drawn_without_a_warning(tmp_path: Path) -> None:
    names = ["日本語", "emoji 🐱", "two\nlines", "x" * 80, *(f"class {i}" for i in range(6))]
    data = {"label_names": names}
    long = "b" * 96
    save_repeats(tmp_path / "runs", long, [100.0], right([0.9]), data=data)
    quick = TUNED | {"baseline": long}
    save_repeats(tmp_path / "runs", "a" * 96, [50.0], right([0.8]), recipe=quick, data=data)
    write_report(tmp_path / "runs", tmp_path / "report")  # pytest makes a warning an error
    figures = tmp_path / "report" / "figures"
    svg = (figures / f"confusion_{long}.svg").read_text("utf-8")
    assert {"日本語", "two lines", "x" * 23 + "…"} <= set(re.findall(r">([^<>]+)</text>", svg))
    assert long not in (figures / "time_1.svg").read_text("utf-8")  # in lines


def test_hundred_classes_stay_small_and_the_worst_are_named(tmp_path: Path) -> None:
    classes, images = 100, 1000
    label = np.arange(images) % classes
    # Half of each class is taken for the next; of class 7 everything for class 8.
    wrong = (np.arange(images) >= images // 2) | (label == 7)
    names = [f"class {number}" for number in range(classes)]
    metrics = Metrics(
        test=make_split(0.495, f1_per_class={name: n / classes for n, name in enumerate(names)}),
        train=None,
    )
    (run,) = save_repeats(tmp_path / "runs", "plain", [100.0], np.zeros((1, images), dtype=bool))
    assert run.folder
    prediction = np.where(wrong, (label + 1) % classes, label)
    probability = np.full((images, classes), 0.5 / (classes - 1), dtype=np.float32)
    probability[np.arange(images), prediction] = 0.5
    np.savez(
        run.folder / "predictions.npz",
        index=np.arange(images),
        label=label,
        prediction=prediction,
        probability=probability,
    )
    data = run.data.model_copy(update={"label_names": names})
    save_result(run.model_copy(update={"metrics": metrics, "data": data}), run.folder)
    write_report(tmp_path / "runs", tmp_path / "report")
    worst = read_csv(tmp_path / "report", "mistakes_plain")[0]
    assert (worst["true"], worst["predicted"], worst["images"]) == ("class 7", "class 8", "10")
    assert float(worst["share"]) == 1.0
    assert len(read_csv(tmp_path / "report", "f1_1")) == classes
    drawing = (tmp_path / "report" / "figures" / "f1_1.svg").read_text("utf-8")
    assert "class 0<" in drawing
    assert "class 99<" not in drawing  # the worst twenty are drawn
    assert (tmp_path / "report" / "figures" / "confusion_plain.svg").stat().st_size < 100_000


def test_twelve_recipes_with_repeats_make_one_report(tmp_path: Path) -> None:
    recipes = [name for name in shipped_recipes() if "cifar" in name and "fast" not in name]
    for number, name in enumerate(recipes):
        shipped = load_recipe(name).as_json()
        fields = ("model", "dataset", "variant", "baseline", "preprocessing")
        save_repeats(
            tmp_path / "runs",
            name,
            [100.0 + number, 101.0 + number],
            right([0.9, 0.8]),
            recipe={field: shipped[field] for field in fields},
            data={"eval_fingerprint": shipped["dataset"]["name_or_path"][-1] * 64},
        )
    write_report(tmp_path / "runs", tmp_path / "report")
    assert len(read_csv(tmp_path / "report", "comparisons")) == len(recipes) // 2 == 6
    # Three models of two variants, each a row that was run.
    rows = read_csv(tmp_path / "report", "reference_cifar10")
    assert [float(row["accuracy"]) for row in rows if "fast" not in row["variant"]] == [
        pytest.approx(0.85)
    ] * 6
    assert (tmp_path / "report" / "index.html").stat().st_size < 4_000_000


# Colours


def channel(color: str, place: int) -> float:
    """Return one channel of #rrggbb in [0, 1]."""
    return int(color[place : place + 2], 16) / 255


def luminance(color: str) -> float:
    """Return the relative luminance of sRGB, WCAG 2.2."""
    channels = [channel(color, place) for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    """Return the contrast ratio, WCAG 2.2."""
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_computed_as_published() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_series_stand_out_from_the_background(theme: int) -> None:
    background = THEME["background"][theme]
    for name, colors in THEME.items():
        if name not in ("background", "grid"):
            assert contrast(colors[theme], background) >= 4.5, name


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_numbers_can_be_read_on_the_darkest_cell_of_a_confusion_matrix(theme: int) -> None:
    ink, background = THEME["ink"][theme], THEME["background"][theme]
    for name in ("series-1", "series-2"):
        series = THEME[name][theme]
        over = [0.45 * channel(series, p) + 0.55 * channel(background, p) for p in (1, 3, 5)]
        cell = "#" + "".join(f"{round(255 * value):02x}" for value in over)
        assert contrast(ink, cell) >= 4.5, name


# Severe deuteranomaly and protanomaly in linear RGB: Machado, Oliveira, Fernandes, A
# Physiologically-based Model for Simulation of Color Vision Deficiency, IEEE TVCG 2009, severity 1.
DEFICIENCIES = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def lab(color: str, deficiency: str) -> np.ndarray:
    """Return CIE L*a*b* (D65) of a colour as seen with a deficiency."""
    channels = np.array([channel(color, place) for place in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ seen / np.array([0.9505, 1.0, 1.089])
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_first_series_differ_for_the_colour_blind(theme: int, deficiency: str) -> None:
    # A figure seldom has more; markers, hatches and line styles differ too.
    colors = [THEME[f"series-{number}"][theme] for number in (1, 2, 3)]
    for one, two in combinations(colors, 2):
        assert np.linalg.norm(lab(one, deficiency) - lab(two, deficiency)) > 20, (one, two)


def test_words_for_numbers_are_those_of_the_terminal(pair: Reported) -> None:
    plain, _, folder = pair
    row = markdown_row(folder, "plain")
    times = [run.times.execution_seconds for run in plain]
    assert row["execution time"].split(" (")[0] == duration(float(np.exp(np.mean(np.log(times)))))
    assert row["test accuracy"].split(" (")[0] == percent(0.85)
