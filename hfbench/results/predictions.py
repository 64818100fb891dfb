"""What a run predicted for each test image: its ``predictions.npz``, read and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hfbench.errors import ResultError
from hfbench.machine.bounds import check_unpacked_size
from hfbench.results.schema import PREDICTIONS_FILE, Result, digest_of

_ARRAYS = ("index", "label", "prediction", "probability")
_ROUNDING = 1e-6  # of an accuracy


@dataclass(frozen=True)
class Predictions:
    """What a model said about each test image.

    Attributes:
        index: int, (N,): position of each image in its split.
        label: int, (N,).
        prediction: int, (N,).
        probability: float, (N,): of the predicted class; not finite if the training diverged.
    """

    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    probability: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether each image is classified rightly, bool, (N,)."""
        right: np.ndarray = self.label == self.prediction
        return right

    @property
    def calibrated(self) -> bool:
        """Whether the probabilities are numbers, so that they can be held against the labels."""
        return bool(np.isfinite(self.probability).all())


def load_predictions(result: Result) -> Predictions | None:
    """Read ``predictions.npz`` of a run; ``None`` if the run kept none.

    Raises:
        ResultError: If the file is damaged, is not the one that the run wrote, or says another
            accuracy than the run's result.
    """
    path = result.folder / PREDICTIONS_FILE if result.folder else None
    if path is None or not path.is_file():
        return None
    images, classes = result.data.eval_samples, len(result.data.label_names)
    try:
        check_unpacked_size(path, 2**20 + 8 * images * (16 + classes))
        with path.open("rb") as stream, np.load(stream) as file:
            found = Predictions(*(file[name] for name in _ARRAYS))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ResultError(f"{path} cannot be read: {error}; run the recipe again.") from None
    except Exception as error:  # zipfile and zlib raise their own
        raise ResultError(f"{path} is damaged: {error}; run the recipe again.") from None
    problem = _problem(found, images, classes) or _contradiction(found, result, path)
    if problem:
        raise ResultError(f"{path} {problem}; run the recipe again.")
    if found.probability.ndim == 2:  # of every class: what version 0.1 wrote
        return replace(found, probability=found.probability.max(axis=1, initial=0.0))
    return found


def _contradiction(found: Predictions, result: Result, path: Path) -> str | None:
    """Say where predictions and result are not of one run, or one was changed after it."""
    expected = result.predictions_sha256
    if expected is not None and digest_of(path) != expected:
        return (
            "is not the file that this run wrote (its SHA-256 is not the one in result.json): it "
            "was changed, or is another run's. Put the right one back"
        )
    if result.metrics.test is None or not len(found.label):
        return None
    said, counted = result.metrics.test.accuracy, float(found.right.mean())
    if abs(said - counted) > _ROUNDING:
        return (
            f"and result.json beside it contradict each other: an accuracy of {said:.4f} stands in "
            f"the result, the predictions have {counted:.4f}. One of them was changed, or is "
            "another run's"
        )
    return None


def _problem(found: Predictions, images: int, classes: int) -> str | None:
    """Say what is wrong with predictions for so many images of so many classes."""
    if len(found.label) != images:
        return f"holds {len(found.label)} images, but the run was tested on {images}"
    shapes = [getattr(found, name).shape for name in _ARRAYS]
    expected = [(images,)] * 4
    if shapes not in (expected, [*expected[:3], (images, classes)]):
        return f"holds arrays of the shapes {shapes}, expected {expected}"
    for name in ("label", "prediction"):
        values = getattr(found, name)
        if values.dtype.kind not in "iu":
            return f"holds a {name} of type {values.dtype}, expected whole numbers"
        if images and not 0 <= values.min() <= values.max() < classes:
            return (
                f"holds a {name} from {values.min()} to {values.max()}, but there are {classes} "
                "classes"
            )
    if found.probability.dtype.kind != "f":
        return f"holds a probability of type {found.probability.dtype}, expected floats"
    return None
