"""Whether the runs compared were made in turn, or a change of the machine alone may explain it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
from scipy import stats

from hfbench.comparison.intervals import LEVEL, mean_p_value
from hfbench.results.schema import Result

_TIME_FORMAT = "%Y%m%dT%H%M%S%f"


def say_order(baseline: Sequence[Result], candidate: Sequence[Result]) -> str | None:
    """Say that runs were not made in turn.

    Args:
        baseline: Paired with `candidate`, run by run.
        candidate: As many.

    Returns:
        A sentence with what to do; ``None`` if their order is balanced (`is_balanced`), or was not
        recorded.
    """
    starts = [[_start(run) for run in side] for side in (baseline, candidate)]
    sides = [[moment for moment in side if moment] for side in starts]
    moments = [[moment.timestamp() for moment in side] for side in sides]
    if sides != starts or is_balanced(*moments):
        return None
    names = [side[0].recipe.name for side in (baseline, candidate)]
    spans = [
        f"{name} from {min(side):%Y-%m-%d %H:%M} to {max(side):%Y-%m-%d %H:%M}"
        for name, side in zip(names, sides, strict=True)
    ]
    late = names[int(np.mean(moments[1]) > np.mean(moments[0]))]
    return (
        f"Order not balanced: the runs were not made in turn, those of {late} later (UTC: "
        f"{'; '.join(spans)}). A machine that changed meanwhile looks the same. Run both in turn, "
        f"in another folder: hfbench suite {' '.join(names)} --repeats {len(baseline)} "
        "--output-dir FOLDER"
    )


def is_balanced(baseline: Sequence[float], candidate: Sequence[float]) -> bool:
    """Tell whether a change of the machine alone could not pass for a difference of the sides.

    Two changes are tried on the order of the runs, with nothing else between the sides. If the
    machine changes once, a pair whose runs are on both sides of that moment seems to differ; if it
    drifts, every pair by as much as its runs are places apart. The order is not balanced if what
    the pairs would show has a 95 % interval without 0: for a single change at any moment, or for a
    drift where the sides are more than one place apart on average. One place is as near as two
    runs can be; that it is not always the same one that comes first is left to chance, since who
    draws an order cannot be blamed for what was drawn.

    Args:
        baseline: When each run began, in any unit.
        candidate: The same of each one's partner.
    """
    if len(baseline) < 2:
        return True  # one pair gives no interval that could be wrong
    before, after = np.asarray(baseline), np.asarray(candidate)
    places = stats.rankdata([*before, *after])
    apart = places[len(before) :] - places[: len(before)]
    if abs(apart.mean()) > 1 and _is_shown(apart):
        return False
    moments = np.unique([*before, *after])
    changes = [(after >= moment).astype(int) - (before >= moment) for moment in moments]
    return not any(map(_is_shown, changes))


def _is_shown(values: np.ndarray) -> bool:
    p = mean_p_value(values)
    return p is not None and p < 1 - LEVEL


def _start(run: Result) -> datetime | None:
    """Return when a run began: its id says so, else when its result was written less its time."""
    try:
        return datetime.strptime(run.run_id.partition("-")[0], _TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        pass
    try:
        ended = datetime.fromisoformat(run.created_at)
        return ended.astimezone(UTC) - timedelta(seconds=run.times.total_seconds)
    except (ValueError, OverflowError):
        return None
