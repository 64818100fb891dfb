"""`hfbench doctor` answers a user in words or in JSON, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.commands import SHORT, WarmCommand

QUICK = (
    "--seconds",
    "1",
    "model.name_or_path=timm/test_resnet.r160_in1k",
    "model.pretrained=false",
    *SHORT,
)


def test_doctor_says_what_limits_and_what_helps(warm: WarmCommand, tmp_path: Path) -> None:
    done = warm.run(["doctor", "quickstart_tuned", *QUICK], tmp_path).check()
    shown = " ".join(done.stdout.split())
    assert "limits quickstart_tuned on this machine" in shown
    assert "The whole run will take about" in shown
    for technique in ("mixed precision", "pinned memory", "loader workers", "torch.compile"):
        assert technique in shown
    assert "Nothing is copied on a CPU" in shown
    assert "Accumulation is right" in shown
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_doctor_prints_json_and_nothing_else(warm: WarmCommand, tmp_path: Path) -> None:
    # An override without a recipe: the default one is changed.
    arguments = ["doctor", "training_args.bf16=true", *QUICK, "--json"]
    found = json.loads(warm.run(arguments, tmp_path).check().stdout)
    assert found["recipe"] == "quickstart_untuned"
    assert found["precision"] in ("bf16", "fp32")  # what is faster on this CPU
    assert found["limited_by"] in ("loader", "model", "rest")
    assert found["forecast"]["optimizer_steps"] == 7  # 200 images, 32 each
    assert found["accumulation"] is None
    assert {item["technique"] for item in found["advice"]} == {
        "mixed precision",
        "pinned memory",
        "gradient accumulation",
        "torch.compile",
        "device preprocessing",
        "loader workers",
        "optimizer implementation",
        "TF32",
        "memory format",
    }
    assert {item["dtype"] for item in found["machine"]["matrix_products"]} == {"fp32", "bf16"}


def test_doctor_refuses_what_cannot_run_before_measuring(warm: WarmCommand, tmp_path: Path) -> None:
    values = ("fp16=true", "tf32=true", "bf16=false", "use_cpu=false")
    wrong = [f"training_args.{value}" for value in values]
    message = warm.run(["doctor", "quickstart_tuned", *wrong], tmp_path).refused()
    assert "fp16" in message
    assert "tf32" in message
    message = warm.run(["doctor", "--seconds", "inf"], tmp_path).refused()
    assert "--seconds" in message
    message = warm.run(["doctor", "quickstart_tunde"], tmp_path).refused()
    assert "quickstart_tuned" in message
