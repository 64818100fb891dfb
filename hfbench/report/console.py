"""A terminal that is shown what it would obey, instead of being given it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

from hfbench.errors.harmless import for_terminal


class HarmlessConsole(Console):
    """A console of rich whose texts hold no escape sequences of their own."""

    def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
        """Yield the pieces of what is printed; only rich's own control anything."""
        for piece in super().render(*args, **kwargs):
            if piece.control is not None:
                yield piece
            else:
                yield Segment(for_terminal(piece.text), piece.style)
