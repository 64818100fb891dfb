"""How often the accuracy interval holds the truth, and how wide it is, by seeds that share little.

Trainings of two recipes with the same seeds are drawn with known effects: of seeds, of images, of
both; scattering alike or three times as much on one side; sharing nothing to half of what a seed
does. `HFBENCH_EXPERIMENTS` sets how many experiments a case draws.
"""

from __future__ import annotations

import os
from itertools import product

import numpy as np
import pytest

from hfbench.comparison.intervals import seeds_and_images_interval

pytestmark = pytest.mark.campaign

EXPERIMENTS = int(os.environ.get("HFBENCH_EXPERIMENTS", "600"))
RESAMPLES = 400
LOWEST = 0.95 - 3 * (0.05 * 0.95 / EXPERIMENTS) ** 0.5


def draw(
    generator: np.random.Generator, shape: tuple[int, ...], variances: tuple[float, float], r: float
) -> np.ndarray:
    """Return two sides of normal numbers, (2, *shape), of a correlation `r`."""
    common, *own = generator.normal(size=(3, *shape))
    sides = (
        np.sqrt(v) * (np.sqrt(r) * common + np.sqrt(1 - r) * mine)
        for v, mine in zip(variances, own, strict=True)
    )
    return np.stack(list(sides))


def experiment(
    generator: np.random.Generator,
    seeds: int,
    of_seeds: float,
    of_images: float,
    more: float,
    shared: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return sides and resamples without a true difference; variances in units of the rest's."""
    sides = draw(generator, (seeds,), (of_seeds, of_seeds * more), shared)
    sides += draw(generator, (seeds,), (1.0, 1.0), shared)
    spread = np.sqrt(of_images / seeds)
    sides[1] += generator.normal(0, spread)
    resampled = sides[:, None] + draw(generator, (RESAMPLES, seeds), (1.0, 1.0), shared)
    resampled[1] += generator.normal(0, spread, (RESAMPLES, 1))
    return sides, resampled


@pytest.mark.parametrize("shared", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("more", [1.0, 9.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_sides_cover_and_are_narrower_than_pairs(seeds: int, more: float, shared: float) -> None:
    generator = np.random.default_rng(seeds)
    for of_images, of_seeds in product((0.0, 1.0), (0.0, 0.3, 1.0, 3.0, 30.0)):
        hits = {True: 0, False: 0}
        widths: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(EXPERIMENTS):
            drawn = experiment(generator, seeds, of_seeds, of_images, more, shared)
            for paired in (True, False):
                found = seeds_and_images_interval(*drawn, paired=paired)
                assert found.low is not None
                assert found.high is not None
                hits[paired] += found.low <= 0 <= found.high
                widths[paired].append(found.high - found.low)
        pairs, sides = (float(np.mean(widths[paired])) for paired in (True, False))
        print(
            f"seeds {seeds}, images {of_images:g}, seeds' variance {of_seeds:g}, candidate's x "
            f"{more:g}, shared {shared:g}: sides cover {hits[False] / EXPERIMENTS:.3f}, pairs "
            f"{hits[True] / EXPERIMENTS:.3f}; width of sides {sides / pairs:.2f} of that of pairs"
        )
        assert hits[False] / EXPERIMENTS > LOWEST
