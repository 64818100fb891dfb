"""What the windows of a candidate and of the best so far allow to decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from hfbench.comparison.intervals import ratio_interval
from hfbench.comparison.ratio import Ratio
from hfbench.comparison.verdict import FASTER, SLOWER, judge_speed
from hfbench.results.windows import Window
from hfbench.studies.tune.memory import peak_mib
from hfbench.studies.tune.schema import Measured, Trial


def ratio_of(windows: Sequence[Measured]) -> Ratio | None:
    """Set the candidate's images per second against those of the best so far.

    Windows are paired in the order of measuring, a window of one with the next of the other:
    of A B B A the first two and the last two. See `ratio_interval`.

    Returns:
        The ratio, above 1 if the candidate is faster; ``None`` if there is no pair.
    """
    best, candidate = (_speeds(windows, is_candidate) for is_candidate in (False, True))
    pairs = [b / a for a, b in zip(best, candidate, strict=False)]
    if not pairs:
        return None
    found = ratio_interval(pairs)
    return Ratio(value=found.value, low=found.low, high=found.high, rounds=len(pairs))


def decide(trial: Trial, windows: Sequence[Measured]) -> Trial:
    """Take a candidate if all of the ratio's interval is above 1; else the setting stays."""
    ratio = ratio_of(windows)
    mine = [item.window for item in windows if item.candidate]
    if ratio is None:
        raise ValueError("expected at least one pair of windows")
    one_pair = ratio.low is None  # it is measured again unless it is far behind
    verdict = SLOWER if one_pair and ratio.value < 1 else judge_speed(ratio.interval)
    outcomes = {FASTER: "taken", SLOWER: "slower"}
    return trial.model_copy(
        update={
            "outcome": outcomes.get(verdict, "no gain shown"),
            "reason": "far behind in the first pair" if one_pair else "",
            "ratio": ratio,
            "samples_per_second": mean_speed(mine),
            "peak_memory_mib": max(peak_mib(window) for window in mine),
            "windows": list(windows),
        }
    )


def mean_speed(windows: Sequence[Window]) -> float:
    """Return the geometric mean of images per second."""
    return math.exp(fmean(math.log(window.samples_per_second) for window in windows))


def _speeds(windows: Sequence[Measured], candidate: bool) -> list[float]:
    return [item.window.samples_per_second for item in windows if item.candidate is candidate]
