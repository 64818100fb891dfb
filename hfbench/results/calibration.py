"""How far a classifier's probabilities can be believed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Images whose most probable class has a probability in ``(low, high]``.

    Attributes:
        count: Number of images.
        confidence: Mean probability of the predicted class; ``None`` without images.
        accuracy: Share of right predictions; ``None`` without images.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Sort images into bins of equal width by the probability of their predicted class.

    Args:
        confidence: float, (N,): that probability.
        right: bool, (N,): whether the predicted class is the true one.
        bins: Number of bins over (0, 1].
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    place = place_in_bins(confidence, bins)
    found = []
    for number in range(bins):
        inside = place == number
        count = int(inside.sum())
        found.append(
            Bin(
                low=number / bins,
                high=(number + 1) / bins,
                count=count,
                confidence=float(confidence[inside].mean()) if count else None,
                accuracy=float(right[inside].mean()) if count else None,
            )
        )
    return found


def place_in_bins(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Return the number of each image's bin, (N,), by its confidence, float64, (N,)."""
    # Bins are closed above, as in the paper: a probability of 1 belongs to the last one.
    place: np.ndarray = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return place


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error, a share in [0, 1].

    The mean over images of how far the accuracy of their bin is from its mean confidence: Guo,
    Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017, equation 3, with
    their 15 bins.

    Args:
        confidence: float, (N,): probability of the predicted class; N at least 1.
        right: bool, (N,): whether the predicted class is the true one.
        bins: Number of bins over (0, 1].
    """
    total = 0.0
    for found in reliability(confidence, right, bins):
        if found.accuracy is not None and found.confidence is not None:
            total += found.count * abs(found.accuracy - found.confidence)
    return total / len(right)
