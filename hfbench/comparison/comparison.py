"""Set a candidate's runs against its baseline's: what tuning gained, what it cost, what it allows.

The module is not called `compare`, since it would hide the function of that name in the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hfbench.comparison.accuracy import Differences, differences
from hfbench.comparison.attribution import say_attribution
from hfbench.comparison.balance import say_order
from hfbench.comparison.differences import (
    Difference,
    beyond_techniques,
    changed_techniques,
    circumstances,
    differing_settings,
    refusals,
)
from hfbench.comparison.divergence import find_diverged, say_diverged
from hfbench.comparison.intervals import LEVEL, Interval, holm
from hfbench.comparison.quantities import EXECUTION_TIME, TEST_ACCURACY, Row, build_rows
from hfbench.comparison.repeats import check_repeats, pair_by_seed, seeds_of_pairs
from hfbench.comparison.verdict import (
    FASTER,
    NO_DIFFERENCE,
    NOT_IN_TURN,
    SLOWER,
    UNDECIDED,
    AccuracyVerdict,
    TechniqueChange,
    judge_accuracy,
    judge_speed,
    say_accuracy,
    say_cause,
    say_speed,
    write_sentence,
)
from hfbench.errors import ComparisonError
from hfbench.results.predictions import Predictions, load_predictions
from hfbench.results.schema import Result
from hfbench.results.sharing import say_shared

MARGIN_POINTS = 0.5
_POINTS = 100  # there are no more to lose
_HIGHEST_PRICE = 1e12  # of any currency


@dataclass(frozen=True)
class Comparison:
    """A candidate against its baseline.

    Attributes:
        baseline: Its runs, paired with those of `candidate`.
        candidate: Runs of the same seeds in the same order.
        pairs: How many.
        seeds: Different seeds among them.
        rows: Every quantity of both, with the gain and its interval.
        speed: ``faster``, ``slower``, ``equal``, ``no difference shown`` or ``undecided``, of the
            execution time.
        accuracy: What it cost; ``None`` where labels mean nothing.
        techniques: That differ between the recipes.
        beyond: What differs beyond the techniques and may change speed or accuracy; in `sentence`.
        settings: Every setting of the recipes that differs.
        circumstances: What else differs: what was applied, commit, kernel, sessions.
        notes: What a reader has to know, a sentence each.
        sentence: The verdict.
        order: That the runs of the two sides were not made in turn, a sentence; ``None`` if they
            were. It stands in `sentence` too.
        family: Candidates whose speeds are judged together; see `judge_together`.
        shared: That other processes were on the GPUs, a sentence; ``None`` if none were seen.
        ablation: What an ablation of the candidate found for each technique alone, a sentence;
            ``None`` if none lies beside its runs.
    """

    baseline: list[Result]
    candidate: list[Result]
    pairs: int
    seeds: int
    rows: list[Row]
    speed: str
    accuracy: AccuracyVerdict | None
    techniques: list[TechniqueChange]
    beyond: list[Difference]
    settings: list[Difference]
    circumstances: list[Difference]
    notes: list[str]
    sentence: str
    order: str | None = None
    family: int = 1
    shared: str | None = None
    ablation: str | None = None


def compare(
    baseline: Result | Sequence[Result],
    candidate: Result | Sequence[Result],
    *,
    margin_points: float = MARGIN_POINTS,
    price_per_hour: float | None = None,
) -> Comparison:
    """Set a candidate's runs against its baseline's.

    Args:
        baseline: Repeats of one recipe: the same but for the seed.
        candidate: Repeats of another, best with the same seeds.
        margin_points: The loss of accuracy, in percentage points, that would be put up with.
        price_per_hour: Of the machine, in any currency, for a row of costs.

    Returns:
        Gains with 95 % intervals over the pairs of equal seeds, and the verdict that they allow.

    Raises:
        ComparisonError: If the runs differ in test images, data, hardware or library versions, so
            that tuning would be credited with what it did not do; every difference is listed. If
            the repeats of one side are not of one recipe. If the margin or the price cannot be.
        ResultError: If predictions cannot be read.
    """
    check_margin(margin_points, price_per_hour)
    sides = [[side] if isinstance(side, Result) else list(side) for side in (baseline, candidate)]
    problems = [line for side in sides for line in check_repeats(side)] or refusals(*sides)
    if problems:
        raise ComparisonError.from_problems(_both(*sides), problems)
    before, after, notes = pair_by_seed(*sides)
    seeds = seeds_of_pairs(before, after)
    predicted = [[_predictions_of(run) for run in side] for side in (before, after)]
    diverged = find_diverged([*before, *after], [*predicted[0], *predicted[1]])
    paired, more = _compare_predictions(before, after, predicted, seeds)
    rows = {row.name: row for row in build_rows(before, after, paired, price_per_hour)}
    speedup = _interval(rows[EXECUTION_TIME])
    speed = judge_speed(speedup) if speedup else UNDECIDED
    accuracy = _judge_accuracy(
        rows[TEST_ACCURACY], paired, margin_points, before[0].data.eval_samples, len(set(seeds))
    )
    if diverged and accuracy:
        accuracy = replace(
            accuracy, low=None, high=None, verdict=UNDECIDED, unjudged=say_diverged(diverged)
        )
    if diverged:
        rows = {name: replace(row, low=None, high=None, p=None) for name, row in rows.items()}
        speed = UNDECIDED
    techniques = changed_techniques(before[0], after[0])
    beyond = beyond_techniques(before, after)
    found = Comparison(
        baseline=before,
        candidate=after,
        pairs=len(before),
        seeds=len(set(seeds)),
        rows=list(rows.values()),
        speed=speed,
        accuracy=accuracy,
        techniques=techniques,
        beyond=beyond,
        settings=differing_settings(before[0], after[0]),
        circumstances=circumstances(before[0], after[0]),
        notes=notes
        + more
        + _say_leak([*before, *after])
        + [f"{name}: {why}." for name, why in diverged.items()],
        sentence="",
        order=say_order(before, after),
        shared=say_shared([*before, *after]),
        ablation=say_attribution(after),
    )
    return replace(found, sentence=_write(found))


def _say_leak(runs: Sequence[Result]) -> list[str]:
    """Say that test images were trained on, by both sides: they have the same images."""
    known = (run.data.test_in_train for run in runs if run.data.test_in_train is not None)
    leaked, images = next(known, 0), runs[0].data.eval_samples
    if not leaked:
        return []
    return [f"{leaked:,} of {images:,} test images were trained on, by both sides."]


def judge_together(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Judge candidates that are looked at side by side, so that any false claim of speed is rare.

    Of twelve candidates without any effect one is called faster or slower in more than every third
    report if each is judged by itself. So the p-values of their execution times are adjusted
    (`intervals.holm`); a candidate whose adjusted one is above 0.05 is not called faster or slower.
    Intervals stay what they are: each of one candidate.

    Args:
        comparisons: From `compare`, in any order.

    Returns:
        The same in the same order, with `family`, and `speed` and `sentence` judged anew.
    """
    times = [found.rows[0].p for found in comparisons]
    known = [p for p in times if p is not None]
    adjusted = iter(holm(known))
    judged = []
    for found, p in zip(comparisons, times, strict=True):
        shown = p is None or next(adjusted) <= 1 - LEVEL
        speed = found.speed if shown or found.speed not in (FASTER, SLOWER) else NO_DIFFERENCE
        found = replace(found, speed=speed, family=max(1, len(known)))
        judged.append(replace(found, sentence=_write(found)))
    return judged


def _write(found: Comparison) -> str:
    """Put a comparison into one sentence."""
    speedup = _interval(found.rows[0])
    alone = judge_speed(speedup) if speedup else UNDECIDED
    others = found.family if alone != found.speed else 1
    beyond = [*map(str, found.beyond), *(["when the sides were run"] if found.order else [])]
    unjudged = found.accuracy.unjudged if found.accuracy else None
    return write_sentence(
        [
            say_speed(found.speed, speedup, others, unjudged),
            say_accuracy(found.accuracy),
            say_cause(found.speed, found.techniques, beyond),
            NOT_IN_TURN if found.order else "",
        ]
    )


def _both(baseline: Sequence[Result], candidate: Sequence[Result]) -> str:
    names = " and ".join(side[0].recipe.name for side in (baseline, candidate) if side)
    return f"Comparing {names or 'nothing'}"


def check_margin(margin_points: float, price_per_hour: float | None = None) -> None:
    """Refuse what is no margin or no price.

    Raises:
        ComparisonError: With all that is wrong.
    """
    problems = []
    if not 0 < margin_points <= _POINTS:
        problems.append(f"margin: {margin_points:g}, expected points above 0 and up to {_POINTS}.")
    if price_per_hour is not None and not 0 < price_per_hour < _HIGHEST_PRICE:
        problems.append(f"price per hour: {price_per_hour:g}, expected a number above 0.")
    if problems:
        raise ComparisonError.from_problems("The comparison", problems)


def _interval(row: Row) -> Interval | None:
    value = row.speedup if row.points is None else row.points
    return None if value is None else Interval(value, row.low, row.high)


def _judge_accuracy(
    row: Row, paired: Differences | None, margin_points: float, images: int, seeds: int
) -> AccuracyVerdict | None:
    points = _interval(row)
    if points is None:
        return None
    return AccuracyVerdict(
        points=points.value,
        low=points.low,
        high=points.high,
        margin_points=margin_points,
        verdict=judge_accuracy(points, margin_points, seeds),
        images=images,
        seeds=seeds,
        mcnemar=paired.disagreements if paired else [],
        classes=paired.classes if paired else [],
    )


def _predictions_of(run: Result) -> Predictions | None:
    """Load what a run predicted, where its labels mean something."""
    return load_predictions(run) if run.metrics.test is not None else None


def _compare_predictions(
    before: Sequence[Result],
    after: Sequence[Result],
    loaded: Sequence[Sequence[Predictions | None]],
    seeds: Sequence[int],
) -> tuple[Differences | None, list[str]]:
    """Compare image by image, where both sides kept their predictions.

    Raises:
        ComparisonError: If they are not of the same images in the same order; all are named.
    """
    if any(run.metrics.test is None for run in (*before, *after)):
        return None, []
    found = [[item for item in side if item is not None] for side in loaded]
    if [len(side) for side in found] != [len(before), len(after)]:
        missing = [
            run.run_id
            for side, runs in zip(loaded, (before, after), strict=True)
            for item, run in zip(side, runs, strict=True)
            if item is None
        ]
        return None, [f"No predictions.npz beside {', '.join(missing)}: accuracy has no interval."]
    first, name = found[0][0], f"{before[0].recipe.name}/{before[0].run_id}"
    other = [
        f"{run.recipe.name}/{run.run_id}: the test images in its predictions.npz are not those of "
        f"{name}, or stand in another order; run both on the same ones."
        for item, run in zip((*found[0], *found[1]), (*before, *after), strict=True)
        if not np.array_equal(item.index, first.index)
        or not np.array_equal(item.label, first.label)
    ]
    if other:
        raise ComparisonError.from_problems(_both(before, after), other)
    names = before[0].data.label_names
    return differences(found[0], found[1], seeds, names), []
