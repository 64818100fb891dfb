"""Random kills and signals, in chains until the run is finished; it must end as if undisturbed.

Each try is forked from this process, which has imported everything: a kill costs what training
costs, and no imports. `HFBENCH_KILLS` sets how many kills and signals there are.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hfbench.errors import HfbenchError
from hfbench.recipe.schema import Recipe
from hfbench.results.manifest import has_checkpoint
from hfbench.results.schema import find_runs
from hfbench.training.run import run_recipe
from tests.builders import TIMM, tiny_recipe, vit_config, write_model

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

KILLS = int(os.environ.get("HFBENCH_KILLS", "40"))
TIMES = ("seconds", "runtime", "per_second", "train_loss")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KINDS: dict[str, dict[str, Any]] = {
    "no checkpoints": {"eval_strategy": "epoch"},
    "epochs": {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_strategy": "epoch",
    },
    "steps": {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 5,
        "gradient_accumulation_steps": 2,
    },
    "best": {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "save_total_limit": 2,
    },
    "workers": {"eval_strategy": "epoch", "dataloader_num_workers": 2},
}


def apart(work: Callable[[], Any], output: Path) -> int:
    """Start work in a process of its own, and return its number."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        place = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(place, 1)
        os.dup2(place, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        work()
        code = 0
    except HfbenchError as error:
        print(f"Error: {error}", flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(number: int) -> int:
    """Wait for a process; return its exit code, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return a log without what a clock said."""
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith(TIMES)}
        for line in lines
    ]


def assert_same(one: Path, two: Path) -> None:
    """Assert that two finished runs left the same, and nothing else."""
    first, second = (load_file(place / "model" / "model.safetensors") for place in (one, two))
    assert all(first[name].equal(second[name]) for name in first)
    with np.load(one / "predictions.npz") as a, np.load(two / "predictions.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)
    assert log_of(one) == log_of(two)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert {path.name for path in (one / "model").iterdir()} == {
        path.name for path in (two / "model").iterdir()
    }


@pytest.mark.parametrize("model", ["vit", TIMM])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_run_ends_like_one_that_was_not(kind: str, model: str, tmp_path: Path) -> None:
    rng = random.Random(f"{kind} {model} {os.environ.get('HFBENCH_TEST_SEED', '0')}")
    output = tmp_path / "output"
    place = tmp_path / "vit"
    config = vit_config(hidden_dropout_prob=0.1)
    assert ended(apart(lambda: write_model(place, config), output)) == 0
    named: Any = place if model == "vit" else model
    recipe: Recipe = tiny_recipe(named, pretrained=model == "vit", **KINDS[kind])
    start = time.perf_counter()
    assert ended(apart(lambda: run_recipe(recipe, tmp_path / "whole"), output)) == 0
    seconds = time.perf_counter() - start
    (whole,) = find_runs(tmp_path / "whole")
    left, runs, said = max(1, KILLS // (2 * len(KINDS))), 0, {}
    while left > 0:
        root = tmp_path / f"run{runs}"
        runs += 1
        for attempt in range(30):
            process = apart(lambda root=root: run_recipe(recipe, root, resume=True), output)
            number = rng.choice(SIGNALS) if left > 0 and attempt < 29 else None
            if number is not None:
                time.sleep(rng.uniform(0.1, 1.1) * seconds)
                for _ in range(rng.choice((1, 1, 2))):
                    try:
                        os.kill(process, number)
                    except ProcessLookupError:
                        break
            code = ended(process)
            text = output.read_text("utf-8", "replace")
            assert "Traceback" not in text, text
            if code == 0:
                break
            left -= 1
            assert number is not None, text
            name = "KILL" if number == signal.SIGKILL else "signal"
            said[name] = said.get(name, 0) + 1
            if number != signal.SIGKILL:
                assert code == 130, text
                last = text.rsplit("Error: ", 1)[-1]
                if "would go on with is as it was" in last:
                    continue  # stopped before it looked
                offered = "--resume" in last
                there = [run for run in find_runs(root) if has_checkpoint(run.folder)]
                assert offered == bool(there), text
        (found,) = find_runs(root)
        assert_same(found.folder, whole.folder)
        assert not (root / ".new").exists() or not list((root / ".new").rglob("*.json"))
    print(f"\n{kind}, {Path(model).name}: {runs} runs ended alike after {said}")
