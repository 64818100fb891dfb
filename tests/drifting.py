"""Machines that slow down, jump and remember, for simulations of what is claimed without reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

SCATTER = 0.02  # of the logarithm of one measurement

Noise = Callable[[np.random.Generator, int], np.ndarray]  # of so many measurements in a row


def drift(rng: np.random.Generator, size: int, share: float) -> np.ndarray:
    """Return independent noise on a machine that changes by a share of its speed each time."""
    return np.arange(size) * share + rng.normal(0, SCATTER, size)


def heavy(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return noise with rare large values: Student's t with 3 degrees of freedom."""
    return SCATTER * rng.standard_t(3, size)


def remembering(rng: np.random.Generator, size: int, memory: float) -> np.ndarray:
    """Return autoregressive noise of the first order."""
    fresh = rng.normal(0, SCATTER * np.sqrt(1 - memory**2), size)
    noise = np.empty(size)
    last = rng.normal(0, SCATTER)
    for place in range(size):
        last = noise[place] = memory * last + fresh[place]
    return noise


NOISES: dict[str, Noise] = {
    **{f"drift {share:+.1%}": partial(drift, share=share) for share in (0.005, 0.01, 0.02)},
    **{f"drift {share:+.1%}": partial(drift, share=share) for share in (-0.005, -0.01, -0.02)},
    "independent": partial(drift, share=0.0),
    "heavy tails": heavy,
    **{f"autocorrelation {memory}": partial(remembering, memory=memory) for memory in (0.5, 0.9)},
}
