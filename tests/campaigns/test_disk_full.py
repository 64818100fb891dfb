"""A disk that fills up anywhere: each command says so, and nothing that was trained is lost.

The disk is a real one of a few MiB, filled so that a random part of what a command needs is left;
only root can mount it. `HFBENCH_DISKS` sets how many times each command meets one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hfbench.recipe.schema import Recipe
from hfbench.results.manifest import has_checkpoint
from hfbench.results.schema import find_runs
from tests.builders import tiny_recipe, vit_config, write_model
from tests.integration.commands import Done, WarmCommand, build_environment

pytestmark = pytest.mark.campaign

TIMES = int(os.environ.get("HFBENCH_DISKS", "13"))
SIZE = 64 * 2**20
FILLER = ".filler"
SLOW = ("suite", "ablate", "tune")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small disk."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmCommand]:
    """Return a command that has imported everything."""
    with WarmCommand(build_environment()) as command:
        yield command


def fill(disk: Path, left: int) -> None:
    """Fill a disk until so many bytes are left."""
    with (disk / FILLER).open("wb") as file:
        free = shutil.disk_usage(disk).free
        os.posix_fallocate(file.fileno(), 0, max(free - left, 1))


def empty(disk: Path) -> None:
    """Make room again."""
    (disk / FILLER).unlink()


def used(disk: Path) -> int:
    """Return how many bytes are used."""
    return shutil.disk_usage(disk).used


def amounts(name: str, most: int) -> list[int]:
    """Return random amounts of room, few and many alike."""
    rng = random.Random(f"{name} {os.environ.get('HFBENCH_TEST_SEED', '0')}")
    return [0, *(int(most * rng.random() ** rng.choice((1, 3))) for _ in range(TIMES - 1))]


def assert_said(done: Done, left: int) -> None:
    """Assert that a command ended with a message about the disk, and not with a traceback."""
    said = f"{left} bytes left, exit code {done.exit_code}:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in said, said
    assert done.exit_code in (1, 2), said
    assert "disk is full" in done.stderr or "No space left on device" in done.stderr, said


@pytest.mark.parametrize("saves", ["no", "steps"])
def test_recipe(saves: str, disk: Path, warm: WarmCommand, tmp_path: Path) -> None:
    vit = write_model(tmp_path / "vit", vit_config(hidden_dropout_prob=0.1))
    saving = {"save_strategy": saves} | ({"save_steps": 4} if saves == "steps" else {})
    recipe = tiny_recipe(vit, pretrained=True, eval_strategy="epoch", **saving)
    file = write(recipe, tmp_path)
    warm.run(["recipe", file, "-o", tmp_path / "whole"], tmp_path).check()
    (whole,) = find_runs(tmp_path / "whole")
    empty_disk = used(disk)
    warm.run(["recipe", file, "-o", disk / "runs"], tmp_path).check()
    most = 3 * (used(disk) - empty_disk)  # checkpoints have gone again
    kept = 0
    for number, left in enumerate(amounts(f"recipe {saves}", most)):
        root = disk / f"runs{number}"
        fill(disk, left)
        done = warm.run(["recipe", file, "-o", root], tmp_path)
        there = [run for run in find_runs(root) if has_checkpoint(run.folder)]
        empty(disk)
        if done.exit_code:
            assert_said(done, left)
            assert ("--resume" in done.stderr) == bool(there), done.stderr
            kept += bool(there)
            done = warm.run(["recipe", file, "-o", root, "--resume"], tmp_path)
        done.check()
        (found,) = find_runs(root)
        with (
            np.load(found.folder / "predictions.npz") as one,
            np.load(whole.folder / "predictions.npz") as two,
        ):
            assert all(np.array_equal(one[name], two[name]) for name in two.files)
        assert not (found.folder / "checkpoints").exists()
        shutil.rmtree(root)
    print(f"\nrecipe, saves {saves}: {TIMES} full disks, {kept} with something to go on from")


def write(recipe: Recipe, folder: Path) -> Path:
    """Write a recipe file."""
    path = folder / f"{recipe.name}.json"
    path.write_text(json.dumps(recipe.as_json()), "utf-8")
    return path


@pytest.mark.parametrize("command", ["suite", "ablate", "tune", "report"])
def test_other_commands(command: str, disk: Path, warm: WarmCommand, tmp_path: Path) -> None:
    file = write(tiny_recipe(), tmp_path)
    arguments: list[str | Path] = {
        "suite": ["suite", file, "-o", disk / "out"],
        "ablate": ["ablate", file, "-o", disk / "out", "--steps", "2", "--rounds", "2"],
        "tune": ["tune", file, "-o", disk / "out" / "best.json", "--seconds", "5", "--force"],
        "report": ["report", tmp_path / "runs", "-o", disk / "out"],
    }[command]
    if command == "report":
        warm.run(["recipe", file, "-o", tmp_path / "runs"], tmp_path).check()
    if command == "tune":
        (disk / "out").mkdir()
    before = used(disk)
    warm.run(arguments, tmp_path, timeout=120).check()
    most = 2 * (used(disk) - before)
    failed = 0
    for left in amounts(command, most)[: max(3, TIMES // (4 if command in SLOW else 1))]:
        for path in (disk / "out").iterdir() if (disk / "out").exists() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        fill(disk, left)
        done = warm.run(arguments, tmp_path, timeout=120)
        empty(disk)
        if done.exit_code:
            assert_said(done, left)
            failed += 1
        warm.run(arguments, tmp_path, timeout=120).check()
    print(f"\n{command}: {failed} full disks")
