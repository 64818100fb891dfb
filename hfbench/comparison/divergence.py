"""Trainings that diverged: nothing that is measured of them says what a recipe is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hfbench.results.formats import join_words
from hfbench.results.predictions import Predictions
from hfbench.results.schema import Result

_SHOWN = 3  # runs that a sentence names


def find_diverged(
    runs: Sequence[Result], predictions: Sequence[Predictions | None]
) -> dict[str, str]:
    """Find the trainings that diverged.

    Args:
        runs: Finished.
        predictions: Of each; ``None`` where there are none.

    Returns:
        ``recipe/run id`` -> what shows it.
    """
    found = {
        f"{run.recipe.name}/{run.run_id}": _what_shows_it(run, predicted)
        for run, predicted in zip(runs, predictions, strict=True)
    }
    return {name: why for name, why in found.items() if why}


def say_diverged(diverged: Mapping[str, str]) -> str:
    """Return a clause that names trainings that diverged."""
    names = list(diverged)
    more = f"{len(names) - _SHOWN} more" if len(names) > _SHOWN else None
    named = join_words([*names[:_SHOWN], *([more] if more else [])])
    return f"since the training of {named} diverged"


def _what_shows_it(run: Result, predicted: Predictions | None) -> str | None:
    test = run.metrics.test
    if test is None:  # labels mean nothing, and no loss does
        return None
    if run.training.train_loss is None or not math.isfinite(run.training.train_loss):
        return "its training loss became infinite or no number"
    if test.loss is None or not math.isfinite(test.loss):
        return "the model's outputs for test images are infinite or no numbers"
    if predicted is None or not len(predicted.label):
        return None
    if not predicted.calibrated:
        return "its probabilities for test images are no numbers"
    if np.ptp(predicted.prediction) == 0 and np.ptp(predicted.label) > 0:
        name = run.data.label_names[int(predicted.prediction[0])]
        return f"it says {name} of all {len(predicted.label):,} test images"
    return None
