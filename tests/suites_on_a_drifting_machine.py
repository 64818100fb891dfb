"""Suites on a machine that drifts: how often a candidate without effect is called faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hfbench.comparison.comparison import Comparison, compare, judge_together
from hfbench.recipe.schema import Recipe
from hfbench.results.schema import Result
from hfbench.studies.suite.plan import repeat_recipes, seed_of
from tests.builders import make_recipe, make_result
from tests.drifting import Noise

_SECONDS = 100.0  # of a run without noise


@cache
def recipes_of(candidates: int) -> tuple[Recipe, ...]:
    """Return a baseline and candidates that are the same but for a technique."""
    return (
        make_recipe(name="base"),
        *(
            make_recipe(
                name=f"candidate{number}",
                baseline="base",
                training_args={"gradient_accumulation_steps": 2},
            )
            for number in range(candidates)
        ),
    )


def run_suites(
    noise: Noise,
    *,
    pairs: int,
    candidates: int,
    experiments: int,
    gain: float = 0.0,
    order: Callable[[Sequence[Recipe], int], list[Recipe]] = repeat_recipes,
) -> Counter[str]:
    """Run suites over and over and count what is said of speed.

    Args:
        noise: Of the logarithm of a run's time, run after run.
        pairs: Repeats of each recipe.
        candidates: Behind one baseline.
        experiments: How many suites, each with seeds of its own and so with another order.
        gain: Logarithm of how many times faster the first candidate really is.
        order: Orders all runs; by default as `hfbench suite` does.

    Returns:
        Suites in which a candidate without effect is called faster (``faster``) or slower
        (``slower``), either (``any``), the first one faster (``first``), and in which the order is
        called unbalanced (``order``).
    """
    said: Counter[str] = Counter()
    for number in range(experiments):
        rng = np.random.default_rng(number)
        base = [
            recipe.model_copy(
                update={"training_args": recipe.training_args | {"seed": 1000 * number}}
            )
            for recipe in recipes_of(candidates)
        ]
        planned = order(base, pairs)
        effects = {"candidate0": gain}
        found = _judge(planned, noise(rng, len(planned)), effects)
        null = [item for item in found if not effects.get(item.candidate[0].recipe.name)]
        said["faster"] += any(item.speed == "faster" for item in null)
        said["slower"] += any(item.speed == "slower" for item in null)
        said["any"] += any(item.speed in ("faster", "slower") for item in null)
        said["first"] += found[0].speed == "faster"
        said["order"] += any(item.order is not None for item in found)
    return said


def _judge(
    planned: Sequence[Recipe], noise: np.ndarray, effects: Mapping[str, float]
) -> list[Comparison]:
    results: dict[str, list[Result]] = {}
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for place, (recipe, slower) in enumerate(zip(planned, noise, strict=True)):
        seconds = _SECONDS * float(np.exp(slower - effects.get(recipe.name, 0.0)))
        moment = start + timedelta(seconds=2 * _SECONDS * place)
        results.setdefault(recipe.name, []).append(_result(recipe, seconds, moment))
    baseline = results.pop("base")
    compared = [compare(baseline, results[name]) for name in sorted(results)]
    return judge_together(compared)


def _result(recipe: Recipe, seconds: float, moment: datetime) -> Result:
    """Return a finished run without labels, so that time alone is judged."""
    template = _template(recipe.name)
    times: dict[str, Any] = {"execution_seconds": seconds}
    return template.model_copy(
        update={
            "recipe": recipe,
            "recipe_sha256": f"{recipe.name} {seed_of(recipe)}",
            "run_id": f"{moment:%Y%m%dT%H%M%S%f}-0",
            "times": template.times.model_copy(update=times),
        }
    )


@cache
def _template(name: str) -> Result:
    recipe = next(item for item in recipes_of(12) if item.name == name)
    result = make_result(recipe=recipe, run_id=name)
    metrics = result.metrics.model_copy(update={"test": None, "train": None})
    result = result.model_copy(update={"metrics": metrics})
    result._folder = Path("nowhere")
    return result
