"""How many times as fast: a ratio with its interval, and the word for it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from hfbench.comparison.intervals import LEVEL, Interval
from hfbench.comparison.verdict import NO_DIFFERENCE, judge_speed

_LARGE = 100  # an interval that goes farther says nothing


class Ratio(BaseModel):
    """How many times as fast, with its 95 % interval; above 1 is faster.

    Attributes:
        value: Geometric mean over the rounds.
        low: Lower end; ``None`` from a single round.
        high: Upper end.
        rounds: That it was measured in.
        p: That it is 1, two-sided, adjusted for all ratios that were looked at together; ``None``
            from a single round, or if it was looked at by itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float | None
    high: float | None
    rounds: int
    p: float | None = None

    @property
    def interval(self) -> Interval:
        """The same without the number of rounds."""
        return Interval(self.value, self.low, self.high)

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` if that is shown; from a single round ``undecided``."""
        if self.p is not None and self.p > 1 - LEVEL:
            return NO_DIFFERENCE
        return judge_speed(self.interval)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f}×"
        high = f"{self.high:.2f}" if self.high < _LARGE else f">{_LARGE}"
        return f"{self.value:.2f}× [{self.low:.2f}, {high}]"
