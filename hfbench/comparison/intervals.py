"""Intervals and tests: how sure a difference is. Intervals are at 95 % unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95

# Seeds that scatter no more than this share of what the rest alone would give are taken not to
# differ; with few degrees of freedom such a scatter says little. Chosen by simulation for even
# coverage: of pairs with 1 and 2 degrees of freedom, and of two sides with 2 seeds each.
_BELIEVED_OF_PAIRS = {2: 0.0, 3: 0.9}
_BELIEVED_OF_SIDES = {2: 0.5, 3: 0.9}
_LARGEST = 700.0  # exp of more is no float


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
    return exponential(mean_interval(np.log(values)))


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean of independent values with Student's t interval; none from a single value."""
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if found.size < 2:
        return Interval(mean, None, None)
    error = float(found.std(ddof=1)) / np.sqrt(found.size)
    half = float(stats.t.ppf((1 + LEVEL) / 2, found.size - 1)) * error
    return Interval(mean, mean - half, mean + half)


def mean_p_value(values: Sequence[float] | np.ndarray) -> float | None:
    """Return the two-sided p-value of Student's t test that the mean is 0; none of a single value.

    It is below 0.05 where the interval of `mean_interval` does not hold 0.
    """
    found = np.asarray(values, dtype=np.float64)
    mean, scatter = float(found.mean()), float(np.ptp(found))
    if found.size < 2:
        return None
    if scatter == 0:
        return float(mean == 0)
    error = float(found.std(ddof=1)) / np.sqrt(found.size)
    return float(2 * stats.t.sf(abs(mean) / error, found.size - 1))


def seeds_and_images_interval(
    sides: np.ndarray,
    resampled: np.ndarray,
    *,
    paired: bool,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Return the mean difference of two sides of S trainings, tested on the same images.

    Two things vary: which images are in the test set, and the seed of a training. What a training
    reaches on an image is a mean + an effect of the seed + one of the image + a rest. Resampling
    images, the same ones for all seeds and both sides, shows the last two. Resampling seeds too
    would count the rest twice (the variance of the pigeonhole bootstrap is up to three times too
    large: Owen, Annals of Applied Statistics 2007, doi:10.1214/07-AOAS122) and would see only
    (S - 1) / S of the seeds' variance. So the seeds' part is drawn from Student's t, scaled by how
    the trainings scatter, and what all share of the image effect is added from the bootstrap (the
    fiducial sum of Behrens and Fisher).

    Two recipes change what a seed leads to: trainings of the same seed share next to nothing, and
    each side scatters by itself. The variances of the two means add up, with the degrees of
    freedom of Welch (The generalization of "Student's" problem when several different population
    variances are involved, Biometrika 1947, doi:10.1093/biomet/34.1-2.28) and Satterthwaite (An
    approximate distribution of estimates of variance components, Biometrics Bulletin 1946,
    doi:10.2307/3002019). Where they do share, the S differences scatter less and are what counts,
    with S - 1 degrees of freedom.

    Seeds cannot scatter less than the rest makes them: if they scatter no more than that, the
    resampled images alone give the interval. How often it covers the truth is simulated in
    tests/test_coverage.py, and at length in tests/campaigns/test_coverage_of_seeds.py.

    Args:
        sides: (2, S): what baseline and candidate reach with each seed.
        resampled: (2, R, S): the same on R resamples of the images.
        paired: Whether the trainings of a seed share what it does to them.
        level: Of the interval.
        seed: Of the draws.

    Returns:
        The mean of candidate less baseline; with one seed the interval of the images alone.
    """
    found = np.asarray(sides, dtype=np.float64)
    seeds = found.shape[1]
    mean = float((found[1] - found[0]).mean())
    of_images = (resampled[1] - resampled[0]).mean(axis=1)
    if seeds == 1:
        return _percentiles(mean, of_images, level)
    if paired:
        found, resampled = found[1:] - found[:1], resampled[1:] - resampled[:1]
    believed = _BELIEVED_OF_PAIRS if paired else _BELIEVED_OF_SIDES
    rest = resampled - resampled.mean(axis=2, keepdims=True)
    rest_variance = float(rest.var(axis=1, ddof=1).mean(axis=1).sum()) / (seeds - 1)
    of_sides = found.var(axis=1, ddof=1) / seeds  # of the means, the rest included
    seed_variance = float(of_sides.sum())
    if seed_variance <= believed.get(seeds, 1.0) * rest_variance:
        return _percentiles(mean, of_images, level)
    degrees = seed_variance**2 * (seeds - 1) / float((of_sides**2).sum())
    image_variance = float(of_images.var(ddof=1))
    shared = np.sqrt(max(0.0, 1 - rest_variance / image_variance)) if image_variance else 0.0
    # Evenly spaced quantiles in random order: the tails hold what they should, drawn or not.
    places = (np.random.default_rng(seed).permutation(len(of_images)) + 0.5) / len(of_images)
    draws = stats.t.ppf(places, degrees)
    around = (of_images - of_images.mean()) * shared + draws * np.sqrt(seed_variance)
    return _percentiles(mean, of_images.mean() + around, level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for being looked at together, so that any false claim is rare.

    The k-th smallest of m is multiplied by m - k + 1, and none is below the one before it (Holm,
    A simple sequentially rejective multiple test procedure, Scandinavian J. of Statistics 1979).
    Whatever the p-values have to do with each other, claims made where the adjusted one is at most
    alpha hold together with probability 1 - alpha.

    Args:
        p_values: Of one family, in any order.

    Returns:
        The adjusted ones, in the same order, at most 1.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def mcnemar(only_baseline: int, only_candidate: int) -> float:
    """Return the exact two-sided p-value that two classifiers err equally often.

    The binomial test of the images that only one of the two gets right (McNemar, Psychometrika
    1947, doi:10.1007/BF02295996).

    Args:
        only_baseline: Images that only the baseline classifies rightly.
        only_candidate: Images that only the candidate does.
    """
    total = only_baseline + only_candidate
    return float(stats.binomtest(only_baseline, total).pvalue) if total else 1.0


def _percentiles(value: float, draws: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, min(float(low), value), max(float(high), value))


def exponential(interval: Interval) -> Interval:
    """Return the interval of a number from that of its logarithm."""
    # Two pairs that differ by orders of magnitude leave no bound that a float can hold.
    low, high = (
        None if end is None else float(np.exp(np.clip(end, -_LARGEST, _LARGEST)))
        for end in (interval.low, interval.high)
    )
    return Interval(float(np.exp(interval.value)), low, high)
