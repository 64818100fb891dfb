"""Intervals by simulation: how often they hold the truth, how often a verdict is wrong.

Each case draws many experiments whose true effect is known. Intervals at 95 % have to cover 93 to
97 %, of two seeds up to 99 %, but for three standard errors of the simulation.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from hfbench.comparison import accuracy as paired
from hfbench.comparison.accuracy import accuracy_interval
from hfbench.comparison.intervals import Interval, ratio_interval, seeds_and_images_interval
from hfbench.comparison.verdict import FASTER, SLOWER, WORSE, judge_accuracy, judge_speed

LOWEST, HIGHEST, HIGHEST_OF_TWO = 0.93, 0.97, 0.99


def holds(found: Interval, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


def allowance(experiments: int) -> float:
    return 3 * math.sqrt(0.05 * 0.95 / experiments)


@pytest.mark.parametrize("pairs", [2, 3, 5, 10])
@pytest.mark.parametrize("speedup", [1.0, 1.15, 2.1])
def test_speed_up_intervals_cover_the_true_ratio(pairs: int, speedup: float) -> None:
    generator = np.random.default_rng(pairs)
    found = [
        ratio_interval(speedup * np.exp(generator.normal(0, 0.05, pairs))) for _ in range(3000)
    ]
    share = np.mean([holds(item, speedup) for item in found])
    assert abs(share - 0.95) < allowance(3000)


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_nothing_is_called_faster_more_often_than_chance_allows(pairs: int) -> None:
    generator = np.random.default_rng(0)
    verdicts = [
        judge_speed(ratio_interval(np.exp(generator.normal(0, 0.1, pairs)))) for _ in range(4000)
    ]
    for word in (FASTER, SLOWER):
        assert verdicts.count(word) / 4000 == pytest.approx(0.025, abs=0.0075)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("of_seeds", [0.0, 0.3, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("of_images", [0.0, 1.0])
def test_seeds_and_images_are_both_covered(seeds: int, of_seeds: float, of_images: float) -> None:
    """Variances in units of the rest: image effects and the rest of each seed are 1 together."""
    generator = np.random.default_rng(1)
    experiments, resamples = 1200, 400
    hits = 0
    for _ in range(experiments):
        image = generator.normal(0, math.sqrt(of_images / seeds))
        rest = generator.normal(0, 1, seeds)
        found = image + rest + generator.normal(0, math.sqrt(of_seeds), seeds)
        spread = generator.normal(0, math.sqrt(of_images / seeds), (resamples, 1))
        resampled = found + spread + generator.normal(0, 1, (resamples, seeds))
        sides = (np.stack([np.zeros_like(item), item]) for item in (found, resampled))
        hits += holds(seeds_and_images_interval(*sides, paired=True), 0.0)
    share = hits / experiments
    highest = HIGHEST_OF_TWO if seeds == 2 else HIGHEST
    assert LOWEST - allowance(experiments) < share < highest + allowance(experiments)


@pytest.mark.parametrize(
    ("seeds", "images", "discordant", "loss", "of_seeds"),
    [
        (1, 10_000, 0.05, 0.01, 0.0),
        (3, 10_000, 0.05, 0.01, 0.0),
        (3, 2_000, 0.10, 0.0, 0.005),
        (5, 10_000, 0.05, 0.003, 0.002),
        (5, 1_000, 0.08, 0.02, 0.0),
    ],
)
def test_accuracy_intervals_cover_the_true_difference(
    seeds: int,
    images: int,
    discordant: float,
    loss: float,
    of_seeds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paired, "RESAMPLES", 1000)
    generator = np.random.default_rng(2)
    experiments, hits, worse = 500, 0, 0
    for _ in range(experiments):
        shift = generator.normal(0, of_seeds, (seeds, 1)) / 2
        lost = (discordant + loss) / 2 - shift
        won = (discordant - loss) / 2 + shift
        draw = generator.random((seeds, images))
        found = accuracy_interval(
            np.stack([draw < lost, (lost <= draw) & (draw < lost + won)]) * 1.0
        )
        hits += holds(found, -loss)
        worse += judge_accuracy(found, loss or 0.005, seeds) == WORSE
    assert LOWEST - allowance(experiments) < hits / experiments < HIGHEST + allowance(experiments)
    assert worse / experiments < 0.025 + allowance(experiments)  # at a margin of the true loss
