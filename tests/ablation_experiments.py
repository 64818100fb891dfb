"""Experiments of ablation on a made-up machine: how often something is claimed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

import numpy as np

from hfbench.studies.ablation.analysis import describe_rows, say_verdict
from hfbench.studies.ablation.gains import Gains
from hfbench.studies.ablation.plan import Plan
from tests.drifting import Noise


def count_claims(
    plan: Plan, noise: Noise, *, rounds: int, experiments: int, effects: Mapping[str, float]
) -> Counter[str]:
    """Measure a plan over and over and count what is said.

    Args:
        plan: What is measured.
        noise: Of the logarithms of the speeds, window after window.
        rounds: Of each experiment, configurations in random order in each, as `ablate` has them.
        experiments: How many.
        effects: Logarithms of true gains, by configuration; 0 of those that are not named.

    Returns:
        Of experiments: with ``most`` ("gains most" in the verdict), ``row`` (a configuration
        without effect called faster or slower), ``any`` (or a contribution), and by name those in
        which a configuration is called faster.
    """
    said: Counter[str] = Counter()
    names = [item.name for item in plan.configurations]
    for number in range(experiments):
        rng = np.random.default_rng(number)
        order = [
            (r, name)
            for r in range(rounds)
            for name in random.Random(f"{number} {r}").sample(names, len(names))
        ]
        log_speeds = noise(rng, len(order))
        speeds = {
            place: float(np.exp(value + effects.get(place[1], 0.0)))
            for place, value in zip(order, log_speeds, strict=True)
        }
        gains = Gains(plan, speeds)
        rows = describe_rows(plan, [], gains, {}, {})
        contributions = gains.contributions()
        said["most"] += "gains most" in say_verdict(rows, contributions)
        shown = {row.name: row.verdict for row in rows if row.verdict in ("faster", "slower")}
        false_row = any(name not in effects for name in shown)
        further = (
            ratio for item in contributions for ratio in (item.with_others, item.interaction)
        )
        said["row"] += false_row
        said["any"] += false_row or any(
            ratio is not None and ratio.verdict in ("faster", "slower") for ratio in further
        )
        said.update(name for name, verdict in shown.items() if verdict == "faster")
    return said
