"""What is read from predictions.npz, and what is refused there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfbench.errors import ResultError
from hfbench.results.predictions import load_predictions
from hfbench.results.schema import Result
from tests.made_up import CLASSES, draw_right, save_repeats

IMAGES = 50


@pytest.fixture
def run(tmp_path: Path) -> Result:
    right = draw_right(np.random.default_rng(0), 1, IMAGES, 0.9)
    return save_repeats(tmp_path, "base", [100], right)[0]


def change(run: Result, **arrays: Any) -> None:
    assert run.folder is not None
    path = run.folder / "predictions.npz"
    with np.load(path) as file:
        content = dict(file) | arrays
    np.savez(path, **content)


def test_predictions_are_those_that_were_saved(run: Result) -> None:
    found = load_predictions(run)
    assert found is not None
    assert found.probability.shape == (IMAGES,)
    assert run.metrics.test is not None
    assert found.right.mean() == run.metrics.test.accuracy


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"label": np.zeros(49, dtype=int)}, "holds 49 images, but the run was tested on 50"),
        ({"label": np.full(IMAGES, 10)}, "a label from 10 to 10, but there are 10 classes"),
        ({"prediction": np.full(IMAGES, -1)}, "a prediction from -1 to -1"),
        ({"label": np.full(IMAGES, "cat")}, "a label of type <U3, expected whole numbers"),
        ({"probability": np.zeros(49)}, r"shapes .*\(49,\).*, expected .*\(50,\)"),
        ({"probability": np.zeros((IMAGES, 9))}, r"shapes .*\(50, 9\)"),
        ({"probability": np.zeros(IMAGES, dtype=int)}, "a probability of type int64"),
        ({"label": np.array([None] * IMAGES)}, "cannot be read: Object arrays"),
    ],
)
def test_predictions_that_cannot_be_of_this_run_are_refused(
    run: Result, arrays: dict[str, np.ndarray], said: str
) -> None:
    change(run, **arrays)
    with pytest.raises(ResultError, match=rf"predictions\.npz .*{said}.*run the recipe again"):
        load_predictions(run)


def test_probabilities_of_a_training_that_diverged_are_read_and_not_calibrated(
    run: Result,
) -> None:
    change(run, probability=np.full(IMAGES, np.nan, dtype=np.float32))
    found = load_predictions(run)
    assert found is not None
    assert not found.calibrated


def test_probabilities_of_all_classes_are_read_as_those_of_the_prediction(run: Result) -> None:
    # As version 0.1 wrote them.
    every = np.full((IMAGES, CLASSES), 0.02, dtype=np.float32)
    every[:, 3] = 0.82
    change(run, probability=every)
    found = load_predictions(run)
    assert found is not None
    assert found.probability == pytest.approx(np.full(IMAGES, 0.82))
