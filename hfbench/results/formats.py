"""Numbers as people write them."""

from __future__ import annotations

from collections.abc import Sequence

MOST_DIGITS = 5  # decimals shown, and judged by


def percent(share: float) -> str:
    """Write a share in [0, 1] as per cent with two decimals."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """Write seconds as people say them: 0.031 s, 12.3 s, 4 min 05 s, 1 h 06 min."""
    if round(seconds, 3) < 1:
        return f"{seconds:.3f} s"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def factor(value: float, digits: int = 2) -> str:
    """Write how many times as much: 1.15, 0.004, 12,300, 2e+07."""
    if value >= 1e6:
        return f"{value:.0e}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if round(value, 2) else f"{value:.1g}"


def enough_digits(values: Sequence[float], *borders: float) -> int:
    """Return with how many decimals, at least two, no value reads as a border that it is not."""
    for digits in range(2, MOST_DIGITS):
        if all(
            value == border or round(value, digits) != border
            for value in values
            for border in borders
        ):
            return digits
    return MOST_DIGITS


def join_words(items: Sequence[str]) -> str:
    """Join items as people list them: a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if items[1:] else "".join(items)


def signed(value: float, digits: int = 2) -> str:
    """Write a difference with its sign: +0.12, -0.50, +0.00."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0: -0.0 becomes 0.0
