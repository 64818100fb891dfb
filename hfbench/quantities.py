"""Numbers as people write them."""

from __future__ import annotations


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
