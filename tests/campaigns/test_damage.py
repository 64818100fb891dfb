"""Every file of a newest checkpoint, damaged in four ways: the older one is gone on from."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hfbench.errors import Interrupted
from hfbench.results.schema import find_runs
from hfbench.training.run import run_recipe
from hfbench.training.trainer import BenchTrainer
from tests.builders import tiny_recipe, vit_config, write_model
from tests.damages import DAMAGES

pytestmark = pytest.mark.campaign


def test_every_file_in_four_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("hfbench"), "propagate", True)
    caplog.set_level(logging.INFO, logger="hfbench")
    vit = write_model(tmp_path / "vit", vit_config(hidden_dropout_prob=0.1))
    recipe = tiny_recipe(vit, pretrained=True, save_strategy="steps", save_steps=4)
    run_recipe(recipe, tmp_path / "whole")
    (whole,) = find_runs(tmp_path / "whole")
    expected = load_file(whole.folder / "model" / "model.safetensors")
    original = BenchTrainer.training_step

    def stop(self: BenchTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BenchTrainer, "training_step", stop)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path / "stopped")
    (run,) = find_runs(tmp_path / "stopped")
    newest = run.folder / "checkpoints" / "checkpoint-9"
    tried = 0
    for name in sorted(path.name for path in newest.iterdir()):
        for damage in DAMAGES:
            root = tmp_path / f"{name}-{damage}"
            shutil.copytree(tmp_path / "stopped", root)
            (copy,) = find_runs(root)
            DAMAGES[damage](copy.folder / "checkpoints" / "checkpoint-9" / name)
            caplog.clear()
            result = run_recipe(recipe, root, resume=True)
            assert "checkpoint-9 is not whole and is left out" in caplog.text, (name, damage)
            assert f"Going on from {copy.folder / 'checkpoints' / 'checkpoint-8'}" in caplog.text
            assert result.training.sessions == 2
            found = load_file(copy.folder / "model" / "model.safetensors")
            assert all(found[key].equal(expected[key]) for key in expected)
            shutil.rmtree(root)
            tried += 1
    print(f"\n{tried} damages: each time the checkpoint before was gone on from, to the same end")
