"""Intervals and tests: how sure a difference is. Every interval is at 95 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end; ``None`` where the data allow none (one repeat).
        high: Upper end.
    """

    value: float
    low: float | None
    high: float | None


def ratio_interval(ratios: Sequence[float]) -> Interval:
    """Return the geometric mean of paired ratios with Student's t interval on their logarithms.

    Noise of running times is multiplicative, so that log ratios are nearly normal, and a speed-up
    of 2 and one of 1/2 weigh the same (Fleming, Wallace, How not to lie with statistics, CACM 1986,
    doi:10.1145/5666.5673; Student, The probable error of a mean, Biometrika 1908).

    Args:
        ratios: Baseline / candidate, one of each pair, all above 0.

    Returns:
        The mean; no interval from a single pair.

    Raises:
        ValueError: If there is none, or one is not a positive, finite number.
    """
    values = np.asarray(ratios, dtype=np.float64)
    if values.size == 0 or not np.all(np.isfinite(values)) or np.any(values <= 0):
        raise ValueError(f"expected positive numbers, found {list(ratios)}")
    return _exponential(mean_interval(np.log(values)))


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean of independent values with Student's t interval; none from a single value."""
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if found.size < 2:
        return Interval(mean, None, None)
    error = float(found.std(ddof=1)) / np.sqrt(found.size)
    half = float(stats.t.ppf((1 + LEVEL) / 2, found.size - 1)) * error
    return Interval(mean, mean - half, mean + half)


def _exponential(interval: Interval) -> Interval:
    low, high = (
        None if end is None else float(np.exp(end)) for end in (interval.low, interval.high)
    )
    return Interval(float(np.exp(interval.value)), low, high)
