"""The order of runs must not decide a verdict, nor the number of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from hfbench.comparison.balance import is_balanced
from hfbench.comparison.comparison import compare, judge_together
from hfbench.comparison.intervals import mean_interval, mean_p_value
from hfbench.recipe.schema import Recipe
from hfbench.report.sets import collect_runs
from hfbench.studies.suite.plan import repeat_recipes
from tests.drifting import NOISES
from tests.made_up import save_repeats
from tests.suites_on_a_drifting_machine import run_suites

RIGHT = np.ones((3, 40), dtype=bool)


def test_p_value_is_below_five_per_cent_where_the_interval_leaves_nothing_out() -> None:
    # Student's t of 1, 2, 3 is 2 / (1 / sqrt(3)) = sqrt(12); with two degrees of freedom the
    # two-sided p-value is 1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14).
    assert mean_p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - np.sqrt(12 / 14))
    assert mean_p_value([5.0]) is None
    assert mean_p_value([0.0, 0.0]) == 1
    assert mean_p_value([2.0, 2.0]) == 0
    for values in np.random.default_rng(0).normal(0.9, 1, (50, 4)):
        found, p = mean_interval(values), mean_p_value(values)
        assert p is not None
        assert found.low is not None
        assert found.high is not None
        assert (p < 0.05) == (found.low > 0 or found.high < 0)


def in_blocks(recipes: Sequence[Recipe], pairs: int) -> list[Recipe]:
    """Run all of one recipe, then all of the next."""
    runs = repeat_recipes(recipes, pairs)
    return sorted(runs, key=lambda recipe: [item.name for item in recipes].index(recipe.name))


def baseline_first(recipes: Sequence[Recipe], pairs: int) -> list[Recipe]:
    """Run the baseline first in each repeat."""
    runs = repeat_recipes(recipes, pairs)
    step = len(recipes)
    repeats = [runs[start : start + step] for start in range(0, len(runs), step)]
    names = [item.name for item in recipes]
    return [run for row in repeats for run in sorted(row, key=lambda run: names.index(run.name))]


def test_runs_in_turn_are_balanced_and_runs_in_blocks_are_not() -> None:
    assert is_balanced([0, 3, 4], [1, 2, 5])  # A B B A A B
    assert is_balanced([0, 2, 4], [1, 3, 5])  # what chance may draw
    assert is_balanced([0], [9])
    assert not is_balanced([0, 1, 2], [3, 4, 5])
    assert not is_balanced([3, 4, 5], [0, 1, 2])
    assert not is_balanced([0, 1, 2, 3], [14, 15, 16, 17])


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_suites_own_order_is_never_called_unbalanced(pairs: int) -> None:
    said = run_suites(NOISES["independent"], pairs=pairs, candidates=1, experiments=60)
    assert said["order"] == 0


def test_sides_that_were_not_run_in_turn_are_said_in_note_and_sentence(tmp_path: Path) -> None:
    baseline = save_repeats(tmp_path, "slow", [100, 101, 102], RIGHT)
    candidate = save_repeats(tmp_path, "fast", [110, 111, 112], RIGHT)
    start = datetime(2026, 1, 1, tzinfo=UTC)

    def at(run: object, hour: int) -> object:
        moment = start + timedelta(hours=hour)
        return run.model_copy(update={"run_id": f"{moment:%Y%m%dT%H%M%S%f}-0"})  # type: ignore[attr-defined]

    later = [at(run, 5 + n) for n, run in enumerate(candidate)]
    found = compare([at(run, n) for n, run in enumerate(baseline)], later)  # type: ignore[arg-type]
    assert found.sentence.endswith("; order not balanced: the sides were not run in turn")
    assert found.order is not None
    assert "A machine that changed meanwhile looks the same" in found.order
    assert "hfbench suite slow fast --repeats 3" in found.order
    turns = compare(
        [at(run, 2 * n) for n, run in enumerate(baseline)],  # type: ignore[arg-type]
        [at(run, 2 * n + 1) for n, run in enumerate(candidate)],  # type: ignore[arg-type]
    )
    assert turns.order is None
    assert "order" not in turns.sentence


def save_family(root: Path) -> None:
    """Write a baseline and three candidates of which one seems faster, by little."""
    save_repeats(root, "base", [100.0, 100.0, 100.0], RIGHT)
    for name, seconds in {
        "lucky": [96.0, 97.5, 98.0],
        "same": [99.0, 101.0, 100.5],
        "other": [102.0, 98.0, 100.0],
    }.items():
        save_repeats(root, name, seconds, RIGHT, recipe={"baseline": "base"})


def test_one_of_several_candidates_is_not_called_faster_for_what_chance_does(
    tmp_path: Path,
) -> None:
    save_family(tmp_path)
    pairs = {pair.candidate.label: pair for pair in collect_runs(tmp_path).pairs}
    lucky = pairs["lucky"].comparison
    assert lucky is not None
    assert pairs["lucky"].baseline is not None
    alone = compare(pairs["lucky"].baseline.results, pairs["lucky"].candidate.results)
    assert alone.speed == "faster"  # p is 0.04, of three candidates 0.12
    assert (lucky.speed, lucky.family) == ("no difference shown", 3)
    assert lucky.sentence.startswith("no difference in speed shown among 3 candidates: 1.029× [1.0")
    assert lucky.rows == alone.rows  # intervals stay


def test_a_single_comparison_is_not_changed_by_judging_together(tmp_path: Path) -> None:
    save_family(tmp_path)
    (pair,) = (p for p in collect_runs(tmp_path).pairs if p.candidate.label == "lucky")
    assert pair.baseline is not None
    alone = compare(pair.baseline.results, pair.candidate.results)
    assert judge_together([alone]) == [alone]


def test_drift_is_no_gain_in_the_order_of_a_suite() -> None:
    noise, experiments = NOISES["drift +1.0%"], 150
    said = run_suites(noise, pairs=5, candidates=1, experiments=experiments)
    # Each is said in 2.5 %; one such test in a thousand would see more than 10 of 150 by chance.
    assert said["slower"] <= 10
    assert said["faster"] <= 10
    always = run_suites(
        noise, pairs=10, candidates=1, experiments=experiments, order=baseline_first
    )
    assert always["slower"] > 15  # what the order is random for
    family = run_suites(noise, pairs=3, candidates=12, experiments=60)
    assert family["any"] <= 9  # 6 % expected at most
