"""Runs made up with known effects: how long they took, which images they got right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfbench.results.schema import Metrics, Result, load_result, save_result, write_json
from tests.builders import make_recipe, make_result, make_split

CLASSES = 10


def draw_right(
    generator: np.random.Generator, seeds: int, images: int, accuracy: float
) -> np.ndarray:
    """Return which images each of several trainings gets right, bool, (S, N)."""
    return generator.random((seeds, images)) < accuracy


def change_right(
    generator: np.random.Generator, right: np.ndarray, loss: float, churn: float
) -> np.ndarray:
    """Return another model's: of the images, `churn` change, and `loss` more are lost than won.

    Args:
        generator: Chooses the images anew for each seed.
        right: bool, (S, N).
        loss: Share of all images.
        churn: Share of all images.
    """
    changed = right.copy()
    images = right.shape[1]
    for row in changed:
        won, lost = (round((churn + sign * loss) / 2 * images) for sign in (-1, 1))
        wrong, good = np.flatnonzero(~row), np.flatnonzero(row)
        row[generator.choice(wrong, won, replace=False)] = True
        row[generator.choice(good, lost, replace=False)] = False
    return changed


def save_repeats(
    root: Path,
    name: str,
    seconds: Sequence[float],
    right: np.ndarray,
    seeds: Sequence[int] | None = None,
    **changes: Any,
) -> list[Result]:
    """Write one finished run of each seed into ``root/name``, with predictions.

    Args:
        root: Folder of all runs.
        name: Of the recipe.
        seconds: (S,): execution time of each run; others follow from it.
        right: bool, (S, N): which images it gets right.
        seeds: 42, 43, … by default.
        changes: For `make_result`; ``recipe`` holds changes for `make_recipe`.
    """
    images = right.shape[1]
    label = np.arange(images) % CLASSES
    runs = []
    recipe_changes = changes.pop("recipe", {})
    data = {"eval_samples": images, "label_names": [f"class {i}" for i in range(CLASSES)]}
    data |= changes.pop("data", {})
    for number, (duration, row) in enumerate(zip(seconds, right, strict=True)):
        seed = seeds[number] if seeds is not None else 42 + number
        arguments = recipe_changes.get("training_args", {}) | {"seed": seed}
        recipe = make_recipe(name=name, **(recipe_changes | {"training_args": arguments}))
        folder = root / name / f"202601{number + 1:02d}T000000000-{recipe.digest()[:8]}"
        folder.mkdir(parents=True)
        accuracy = float(row.mean())
        result = make_result(
            recipe=recipe,
            recipe_sha256=recipe.digest(),
            run_id=folder.name,
            times={"execution_seconds": duration, "train_seconds": 0.8 * duration},
            throughput={"samples_per_second": 4000 / duration},
            data=data,
            metrics=Metrics(test=make_split(accuracy, samples=images), train=make_split(accuracy)),
            **changes,
        )
        write_json(recipe.as_json(), folder / "recipe.json")
        save_result(result, folder)
        prediction = np.where(row, label, (label + 1) % CLASSES)
        probability = np.full(images, 0.72, dtype=np.float32)
        np.savez(
            folder / "predictions.npz",
            index=np.arange(images),
            label=label,
            prediction=prediction,
            probability=probability,
        )
        runs.append(load_result(folder))
    return runs
