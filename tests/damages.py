"""Ways to damage a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "changed": flip,
    "removed": lambda path: path.unlink(),
}
