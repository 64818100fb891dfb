"""Every quantity of two sides, pair by pair, with what was gained and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hfbench.comparison.accuracy import Differences
from hfbench.comparison.intervals import Interval, mean_p_value, ratio_interval
from hfbench.results.schema import Result

EXECUTION_TIME = "execution time"
TEST_ACCURACY = "test accuracy"
BRIER_SCORE = "test Brier score of the prediction"
CALIBRATION_ERROR = "test calibration error"
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Row:
    """One quantity of both sides.

    Attributes:
        name: What it is.
        unit: ``s``, ``images/s``, ``MiB``, ``J``, ``FLOP``, ``FLOP/s``, ``share`` in [0, 1], or
            ``price``.
        baseline: Geometric mean over its runs, arithmetic for shares; ``None`` if not measured.
        candidate: The same of the candidate.
        speedup: How many times better: geometric mean over pairs, above 1 is better; ``None`` for
            shares.
        points: Candidate less baseline in percentage points; ``None`` for everything but shares.
        low: Lower end of the 95 % interval of `speedup` or `points`; ``None`` if there is none.
        high: Upper end.
        p: Two-sided p-value of a `speedup` of 1, by Student's t; ``None`` if there is none.
    """

    name: str
    unit: str
    baseline: float | None
    candidate: float | None
    speedup: float | None
    points: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class _Quantity:
    name: str
    unit: str
    read: Callable[[Result], float | None]
    more_is_better: bool = False


def _part(name: str, field: str) -> Callable[[Result], float | None]:
    def read(run: Result) -> float | None:
        return getattr(getattr(run, name), field, None)  # an old result has no such part

    return read


def _share(split: str, field: str) -> Callable[[Result], float | None]:
    def read(run: Result) -> float | None:
        return getattr(getattr(run.metrics, split), field, None)  # noise has no metrics

    return read


_RATIOS = (
    _Quantity(EXECUTION_TIME, "s", _part("times", "execution_seconds")),
    _Quantity("train time", "s", _part("times", "train_seconds")),
    _Quantity("steady-state training", "images/s", _part("throughput", "samples_per_second"), True),
    _Quantity("first step", "s", _part("times", "first_step_seconds")),
    _Quantity("data wait", "s", lambda run: run.waited_seconds),
    _Quantity("peak device memory", "MiB", _part("memory", "peak_device_memory_mib")),
    _Quantity("peak process memory", "MiB", _part("memory", "peak_process_memory_mib")),
    _Quantity("device energy", "J", _part("energy", "device_joules")),
    _Quantity("CPU energy", "J", _part("energy", "cpu_joules")),
    _Quantity("training FLOPs per image", "FLOP", _part("compute", "train_flops_per_image")),
    _Quantity("achieved arithmetic", "FLOP/s", _part("compute", "achieved_flops_per_second"), True),
)
_SHARES = (
    (TEST_ACCURACY, _share("test", "accuracy")),
    ("test F1 macro", _share("test", "f1_macro")),
    ("test F1 weighted", _share("test", "f1_weighted")),
    (BRIER_SCORE, lambda _: None),
    (CALIBRATION_ERROR, _share("test", "calibration_error")),
    ("train accuracy", _share("train", "accuracy")),
    ("train F1 macro", _share("train", "f1_macro")),
    ("train F1 weighted", _share("train", "f1_weighted")),
    ("share of the matmul peak", _part("compute", "utilization")),
)


def build_rows(
    baseline: Sequence[Result],
    candidate: Sequence[Result],
    paired: Differences | None,
    price_per_hour: float | None,
) -> list[Row]:
    """Build all rows; the execution time comes first.

    Args:
        baseline: Paired with `candidate`, run by run.
        candidate: As many.
        paired: What predictions say; it comes before what results say.
        price_per_hour: Of the machine; ``None`` for no row of costs.
    """
    rows = [_ratio_row(quantity, baseline, candidate) for quantity in _RATIOS]
    if price_per_hour is not None:
        price = price_per_hour / SECONDS_PER_HOUR
        cost = _Quantity("cost", "price", lambda run: run.times.execution_seconds * price)
        rows.append(_ratio_row(cost, baseline, candidate))
    return rows + list(_share_rows(baseline, candidate, paired))


def _ratio_row(quantity: _Quantity, baseline: Sequence[Result], candidate: Sequence[Result]) -> Row:
    before, after = ([quantity.read(run) for run in side] for side in (baseline, candidate))
    ratios = [
        (b / a if quantity.more_is_better else a / b)
        for a, b in zip(before, after, strict=True)
        if a and b and a > 0 and b > 0
    ]
    ratios = [ratio for ratio in ratios if 0 < ratio < math.inf]
    whole = len(ratios) == len(before)  # a mean over other pairs would be one of other runs
    gain = ratio_interval(ratios) if ratios and whole else Interval(float("nan"), None, None)
    return Row(
        quantity.name,
        quantity.unit,
        _mean(before, geometric=True),
        _mean(after, geometric=True),
        gain.value if ratios and whole else None,
        None,
        gain.low,
        gain.high,
        mean_p_value(np.log(ratios)) if ratios and whole else None,
    )


def _share_rows(
    baseline: Sequence[Result], candidate: Sequence[Result], paired: Differences | None
) -> Iterator[Row]:
    judged = {}
    if paired:
        judged = {
            TEST_ACCURACY: (*paired.accuracies, paired.accuracy),
            "test F1 macro": (*paired.f1_macros, paired.f1_macro),
        }
        if paired.brier and paired.briers and paired.calibration_errors:
            errors = paired.calibration_errors
            difference = Interval(100 * (errors[1] - errors[0]), None, None)
            judged[BRIER_SCORE] = (*paired.briers, paired.brier)
            judged[CALIBRATION_ERROR] = (*errors, difference)
    for name, read in _SHARES:
        if paired and name == CALIBRATION_ERROR and name not in judged:
            yield Row(name, "share", None, None, None, None)  # a training diverged
            continue
        if name in judged:
            before, after, points = judged[name]
            yield Row(name, "share", before, after, None, points.value, points.low, points.high)
            continue
        mine = _mean([read(run) for run in baseline], geometric=False)
        theirs = _mean([read(run) for run in candidate], geometric=False)
        change = None if mine is None or theirs is None else 100 * (theirs - mine)
        yield Row(name, "share", mine, theirs, None, change)


def _mean(values: Sequence[float | None], geometric: bool) -> float | None:
    found = [value for value in values if value is not None]
    if not found or len(found) < len(values):
        return None
    if len(found) > 1 and geometric and min(found) > 0:
        return float(np.exp(np.mean(np.log(found))))
    return float(np.mean(found))
