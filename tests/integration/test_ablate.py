"""`hfbench ablate` measures, keeps what it measured, and refuses what it cannot do at once."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.commands import SHORT, WarmCommand, read_result, wait_until_written

# What is measured matters little here, so that a smaller model does.
SMALL = (
    "model.name_or_path=timm/test_resnet.r160_in1k",
    "model.pretrained=false",
    "model.float32_if_faster=false",  # mixed precision is measured on any machine
)
TUNED = ("ablate", "quickstart_tuned", *SHORT, *SMALL)


def read_ablation(output_dir: Path) -> dict[str, Any]:
    """Read the one ``ablation.json`` under a folder as a reader without hfbench would."""
    (file,) = output_dir.glob("ablations/*/*/ablation.json")
    content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return content


def test_ablation_is_shown_and_kept_and_is_no_run(warm: WarmCommand, tmp_path: Path) -> None:
    done = warm.run([*TUNED, "--steps", "2", "--rounds", "2"], tmp_path).check()
    found = read_ablation(tmp_path / "runs")
    assert (found["steps"], found["rounds"], found["finished_rounds"]) == (2, 2, 2)
    shown = " ".join(done.stdout.split())
    assert found["verdict"].split(":")[0] in shown
    for word in ("gain alone", "interaction", "first loss", "Not run: pinned memory: nothing is"):
        assert word in shown
    for row in found["rows"]:
        assert row["label"].split(",")[0] in shown
        assert f"{row['first_loss']['found']:.4g} ok" in shown
        assert f"{row['samples_per_second']:.1f}" in shown
    # The plan with its estimate comes before the first window.
    lines = done.stderr.splitlines()
    plan = next(n for n, line in enumerate(lines) if "2 rounds of 7 windows of 2 steps" in line)
    assert "[1/14] round 1: " in lines[plan + 1]
    assert "train_runtime" not in done.stdout
    listed = warm.run(["list"], tmp_path).check().stdout
    assert "No runs in runs" in listed


def test_json_is_the_ablation_and_nothing_else(warm: WarmCommand, tmp_path: Path) -> None:
    arguments = [*TUNED, "--steps", "1", "--rounds", "1", "--json", "-o", "mine"]
    done = warm.run(arguments, tmp_path).check()
    assert json.loads(done.stdout) == read_ablation(tmp_path / "mine")
    assert json.loads(done.stdout)["recipe"]["dataset"]["max_train_samples"] == 200


def test_ctrl_c_keeps_the_windows_so_far(warm: WarmCommand, tmp_path: Path) -> None:
    running = warm.start([*TUNED, "--steps", "1", "--rounds", "1000"], tmp_path)
    wait_until_written(tmp_path, "runs/ablations/*/*/ablation.json", timeout=60)
    running.send(signal.SIGINT)
    done = running.wait()
    assert done.exit_code == 130
    assert "Traceback" not in done.stderr
    assert "of 1000 rounds; what was measured is in runs/ablations/quickstart_tuned" in done.stderr
    found = read_ablation(tmp_path / "runs")
    assert 1 <= found["finished_rounds"] < 1000
    assert found["rows"][-1]["speedup"]["value"] > 0


def test_dry_run_shows_configurations_and_measures_nothing(
    warm: WarmCommand, tmp_path: Path
) -> None:
    shown = warm.run([*TUNED, "--dry-run"], tmp_path).check().stdout
    assert "7 configurations" in shown
    plan = json.loads(warm.run([*TUNED, "--dry-run", "--json"], tmp_path).check().stdout)
    assert [item["name"] for item in plan["configurations"]] == [
        "none",
        "mixed-precision",
        "accumulation-same-batch",
        "accumulation-larger-batch",
        "memory-format",
        "kept-memory",
        "all",
    ]
    assert plan["configurations"][0]["recipe"]["training_args"]["bf16"] is False
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quickstart_tunde"], "did you mean quickstart_tuned?"),
        (["quickstart_tuned", "training_args.bf61=true"], "bf61"),
        (["quickstart_tuned", "--repeats", "2"], "--repeats: is for full runs; add --full."),
        (["quickstart_tuned", "--full", "--steps", "2"], "--steps: is for short windows"),
        (["vit_cifar10_tuned"], "fp16: needs a CUDA device"),
        (["vit_cifar10_tuned", "--dry-run"], "fp16: needs a CUDA device"),
        (["vit_cifar10_tuned", "--full"], "fp16: needs a CUDA device"),
        (["vit_cifar10_fast"], "training_args.use_cpu=true"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    warm: WarmCommand, tmp_path: Path, arguments: list[str], said: str
) -> None:
    assert said in warm.run(["ablate", *arguments], tmp_path).refused()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_whole_runs_are_compared_with_none(warm: WarmCommand, tmp_path: Path) -> None:
    done = warm.run([*TUNED, "--full", "--repeats", "1"], tmp_path, timeout=200).check()
    runs = sorted((tmp_path / "runs").glob("quickstart_tuned.*/*/"))
    assert [run.parent.name.partition(".")[2] for run in runs] == [
        "accumulation-larger-batch",
        "accumulation-same-batch",
        "all",
        "kept-memory",
        "memory-format",
        "mixed-precision",
        "none",
    ]
    precisions = [read_result(run)["switches"]["precision"]["applied"] for run in runs]
    assert precisions == ["fp32", "fp32", "bf16", "fp32", "fp32", "bf16", "fp32"]
    found = read_ablation(tmp_path / "runs")
    assert (found["full"], found["finished_rounds"], len(found["runs"])) == (True, 1, 7)
    seconds = {run.parent.name: read_result(run)["times"]["execution_seconds"] for run in runs}
    assert found["rows"][-1]["speedup"]["value"] == pytest.approx(
        seconds["quickstart_tuned.none"] / seconds["quickstart_tuned.all"]
    )
    for row in found["rows"]:
        assert f"{100 * row['accuracy']['value']:.2f} %" in done.stdout
    assert "whole runs of each, one a seed" in done.stdout
