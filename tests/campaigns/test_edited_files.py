"""Files of a run and of a study, left half-written or edited: named, and never for ever in the way.

Each file is damaged in four ways, and each of its values replaced by something else; every command
that reads it must end without a traceback.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.builders import tiny_recipe
from tests.damages import DAMAGES
from tests.integration.commands import Done, WarmCommand, build_environment

pytestmark = pytest.mark.campaign

EDITS = int(os.environ.get("HFBENCH_EDITS", "60"))
INSTEAD = (None, True, -1, 0, 1e308, 2**70, "", "x" * 300, "\udc80", [], {}, [[]], {"a": 1}, "1")


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmCommand]:
    """Return a command that has imported everything."""
    with WarmCommand(build_environment()) as command:
        yield command


@pytest.fixture(scope="module")
def made(warm: WarmCommand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make runs of two recipes, an ablation and a tuning."""
    folder = tmp_path_factory.mktemp("made")
    for name, rate in (("one", 1e-3), ("two", 2e-3)):
        content = tiny_recipe(learning_rate=rate).as_json() | {"name": name}
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
        for seed in (1, 2):
            recipe = ["recipe", f"{name}.json", f"training_args.seed={seed}"]
            warm.run(recipe, folder).check()
    warm.run(["ablate", "one.json", "--steps", "2", "--rounds", "2"], folder, timeout=200).check()
    warm.run(["tune", "one.json", "--seconds", "5"], folder, timeout=200).check()
    return folder


COMMANDS = (
    ["list"],
    ["compare", "runs/one", "runs/two"],
    ["report", "runs", "-o", "report"],
    ["suite", "one.json", "two.json", "--seeds", "1,2", "--dry-run"],
    ["recipe", "one.json", "training_args.seed=2", "--resume"],
    ["validate", "one_best.json"],
)


def places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value in a JSON document."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        yield (*place, key)
        if isinstance(value, dict | list):
            yield from places(value, (*place, key))


def edited(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a document with another value in one place."""
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


def variants(file: Path, rng: random.Random) -> Iterator[tuple[str, Any]]:
    """Yield ways to spoil a file, each a function of its path."""
    yield from DAMAGES.items()
    if file.suffix == ".json":
        content = json.loads(file.read_text("utf-8"))
        everywhere = list(places(content))
        for _ in range(EDITS):
            place, value = rng.choice(everywhere), rng.choice((*INSTEAD, KeyError))
            text = json.dumps(edited(content, place, value))

            def write(path: Path, text: str = text) -> None:
                path.write_text(text, "utf-8")

            yield f"{place} = {value!r}", write
        for text in ("null", "[]", "1", "{}", "[" * 100_000, '{"a":' * 50_000):
            yield text[:9], lambda path, text=text: path.write_text(text, "utf-8")


FILES = (
    "runs/one/*/result.json",
    "runs/one/*/recipe.json",
    "runs/one/*/predictions.npz",
    "runs/one/*/log.jsonl",
    "runs/ablations/one/*/ablation.json",
    "one_best.json",
    "one_best*.measurements.json",
)


@pytest.mark.parametrize("pattern", FILES)
def test_spoilt_file(pattern: str, made: Path, warm: WarmCommand, tmp_path: Path) -> None:
    rng = random.Random(f"{pattern} {os.environ.get('HFBENCH_TEST_SEED', '0')}")
    found = sorted(made.glob(pattern))
    if not found:
        pytest.skip(f"there is no {pattern} in {sorted(p.name for p in made.iterdir())}")
    inside = found[-1].relative_to(made)
    wrong, tried = [], 0
    for name, spoil in variants(made / inside, rng):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
        spoil(folder / inside)
        for command in COMMANDS:
            done: Done = warm.run(command, folder, timeout=60)
            tried += 1
            if "Traceback" in done.stderr or done.exit_code not in (0, 2):
                last = done.stderr.strip().splitlines()[-1:]
                wrong.append(f"{name}: {command[0]}: {done.exit_code} {last}")
    print(f"\n{pattern}: {tried} commands, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)
