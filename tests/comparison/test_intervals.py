"""Intervals and tests, by hand and against tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hfbench.comparison.intervals import (
    Interval,
    holm,
    mcnemar,
    mean_interval,
    ratio_interval,
    seeds_and_images_interval,
)


def test_ratio_is_the_geometric_mean_with_t_on_logarithms() -> None:
    # log2 of the ratios: 0, 1, 2; mean 1, deviation 1, error 1 / sqrt 3; t(2) at 97.5 % is 4.30265.
    found = ratio_interval([1.0, 2.0, 4.0])
    half = 4.30265 / math.sqrt(3)
    assert found.value == pytest.approx(2.0)
    assert found.low == pytest.approx(2 ** (1 - half), rel=1e-4)
    assert found.high == pytest.approx(2 ** (1 + half), rel=1e-4)


def test_one_pair_has_no_interval() -> None:
    found = ratio_interval([1.15])
    assert found.value == pytest.approx(1.15)
    assert (found.low, found.high) == (None, None)


@pytest.mark.parametrize("ratios", [[], [1.0, 0.0], [1.0, -2.0], [float("nan")], [math.inf]])
def test_ratios_that_mean_nothing_are_refused(ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="expected positive numbers"):
        ratio_interval(ratios)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=8))
def test_turning_the_comparison_round_turns_the_interval_round(ratios: list[float]) -> None:
    one, other = ratio_interval(ratios), ratio_interval([1 / ratio for ratio in ratios])
    assert one.value == pytest.approx(1 / other.value)
    assert one.low is not None
    assert other.high is not None
    assert one.low == pytest.approx(1 / other.high)


def test_mean_interval_by_hand() -> None:
    # 1, 2, 3, 4: mean 2.5, deviation 1.290994, error 0.645497; t(3) at 97.5 % is 3.182446.
    found = mean_interval([1, 2, 3, 4])
    assert found.value == 2.5
    assert found.low == pytest.approx(2.5 - 3.182446 * 0.645497, rel=1e-5)


@pytest.mark.parametrize(
    ("only_baseline", "only_candidate", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 6, 2 / 64),  # both tails of six coins on one side
        (1, 9, 2 * (1 + 10) / 1024),
        (9, 1, 2 * (1 + 10) / 1024),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(
    only_baseline: int, only_candidate: int, p: float
) -> None:
    assert mcnemar(only_baseline, only_candidate) == pytest.approx(p)


def of_pairs(differences: np.ndarray, resampled: np.ndarray) -> Interval:
    """Return the interval of differences from a baseline that is always 0."""
    sides, images = (np.stack([np.zeros_like(item), item]) for item in (differences, resampled))
    return seeds_and_images_interval(sides, images, paired=True)


def test_two_sides_are_judged_with_the_degrees_of_freedom_of_welch() -> None:
    # Three trainings a side, no noise of images. Variances 1 and 4, of the means 1/3 and 4/3: their
    # sum is 5/3, and Welch's degrees of freedom are 2 (5/3)^2 / ((1/3)^2 + (4/3)^2) = 50/17.
    sides = np.array([[-1.0, 0.0, 1.0], [8.0, 10.0, 12.0]])
    still = np.repeat(sides[:, None], 4000, axis=1)
    found = seeds_and_images_interval(sides, still, paired=False)
    half = float(stats.t.ppf(0.975, 50 / 17)) * math.sqrt(5 / 3)
    assert found.value == 10
    assert found.high == pytest.approx(10 + half, rel=0.02)
    assert found.low == pytest.approx(10 - half, rel=0.02)


def test_one_seed_has_the_interval_of_its_images() -> None:
    resampled = np.linspace(-1, 1, 2001)[:, None]
    found = of_pairs(np.array([0.1]), resampled)
    assert found.value == 0.1
    assert (found.low, found.high) == (pytest.approx(-0.95), pytest.approx(0.95))


def test_seeds_that_scatter_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    resampled = generator.normal(0, 0.1, (4000, 3))
    calm = of_pairs(np.array([0.0, 0.01, -0.01]), resampled)
    wild = of_pairs(np.array([0.0, 1.0, -1.0]), resampled)
    # Calm: three means of deviation 0.1: 1.96 x 0.1 / sqrt 3. Wild: t(2) x 1 / sqrt 3.
    assert calm.high == pytest.approx(1.96 * 0.1 / math.sqrt(3), rel=0.1)
    assert wild.high == pytest.approx(4.30265 / math.sqrt(3), rel=0.15)
    assert calm.low == pytest.approx(-calm.high, rel=0.1) if calm.high else False


def test_what_all_seeds_share_is_not_averaged_away() -> None:
    generator = np.random.default_rng(0)
    shared = np.repeat(generator.normal(0, 0.1, (4000, 1)), 3, axis=1)
    found = of_pairs(np.zeros(3), shared)
    assert found.high == pytest.approx(1.96 * 0.1, rel=0.1)


def test_holm_adjusts_what_is_looked_at_together() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1; none below the one before it.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []
