"""The self-test tries everything, whatever fails, and writes it into one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from hfbench.studies import selftest
from hfbench.studies.selftest import BrokenError, Ground, NotHereError, run_selftest
from tests.integration.commands import build_environment, run_fresh

CPU = torch.device("cpu")


def broken(ground: Ground) -> str:
    """Fail as a check that found something."""
    sys.stdout.write("what a library prints: hf_" + "a" * 34)
    raise BrokenError("3 values differ")


def lacking(ground: Ground) -> str:
    """Lack what the check needs."""
    raise NotHereError("there is one GPU")


def crashing(ground: Ground) -> str:
    """Fail as a bug does."""
    (ground.folder / "file").write_text("x", "utf-8")
    raise RuntimeError("CUDA error: device-side assert triggered\nmore")


def test_what_fails_keeps_no_other_check_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {"a": broken, "b": lacking, "c": crashing, "d": lambda ground: "All is well."}
    monkeypatch.setattr(selftest, "CHECKS", checks)
    told: list[str] = []
    found = run_selftest(observer=lambda outcome: told.append(outcome.name))
    assert told == list(checks)
    assert [outcome.outcome for outcome in found.outcomes] == [
        "failed",
        "not run",
        "failed",
        "passed",
    ]
    assert [outcome.name for outcome in found.failed] == ["a", "c"]
    assert found.outcomes[0].said == "3 values differ"
    details = str(found.outcomes[0].details)
    assert "what a library prints" in details
    assert "hf_a" not in details  # a token
    assert "BrokenError" in details
    assert found.outcomes[2].said == "CUDA error: device-side assert triggered"


def test_no_check_begins_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "CHECKS", {"a": lambda ground: "", "b": lambda ground: ""})
    (first, second) = run_selftest(seconds=-1.0).outcomes
    assert (first.outcome, second.outcome) == ("not run", "not run")
    assert "no time left" in second.said


@pytest.mark.parametrize("name", ["pixels", "clocks", "resume", "out of memory", "first losses"])
def test_check_passes_on_a_cpu(name: str, tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("hfbench selftest runs it on the device")
    assert selftest.CHECKS[name](Ground(CPU, tmp_path))


def test_resume_that_forgets_something_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hfbench.training.trainer.BenchTrainer._load_from_checkpoint", lambda *_: None
    )
    with pytest.raises(BrokenError, match="resumed and whole differ"):
        selftest.CHECKS["resume"](Ground(CPU, tmp_path))


def test_wrong_pixels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hfbench.data.resizing.resize_exactly",
        lambda images, size, mode: torch.nn.functional.interpolate(
            images.float(), size, mode=mode, antialias=True
        ).to(torch.uint8),
    )
    with pytest.raises(BrokenError, match="values differ"):
        selftest.CHECKS["pixels"](Ground(CPU, tmp_path))


@pytest.mark.slow
def test_command_writes_one_file_and_passes(tmp_path: Path) -> None:
    done = run_fresh(["selftest"], tmp_path, environment=build_environment()).check()
    assert "0 of " in done.stdout
    assert "emulated on a CPU" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["selftest.json"]
    content = json.loads((tmp_path / "selftest.json").read_text("utf-8"))
    assert content["environment"]["device_type"] == "cpu"
    assert {outcome["name"] for outcome in content["outcomes"]} == set(selftest.CHECKS)


def test_file_that_cannot_be_written_is_said_before_anything_runs(tmp_path: Path) -> None:
    refused = run_fresh(["selftest", "-o", str(tmp_path)], tmp_path).refused()
    assert "no file in a folder that exists" in refused
