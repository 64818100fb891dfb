"""How much is read and held, whatever a file says of its size."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import IO, Any

from hfbench.errors import DataError, HfbenchError

LARGEST_JSON = 64 * 2**20  # bytes; the result of 21,843 classes takes 3 MiB
_SHARE = 0.9  # of the free memory, for one thing
_CGROUP = Path("/sys/fs/cgroup")
_CACHED = ("inactive_file ", "active_file ")


def read_text(file: Path, limit: int = LARGEST_JSON) -> str:
    """Read a text file, but no larger one than is sensible.

    Raises:
        ValueError: If it is larger, or not UTF-8.
        OSError: If it cannot be read.
    """
    if not file.is_file() and file.exists():
        raise ValueError("it is no file")
    size = file.stat().st_size
    if size > limit:
        raise ValueError(f"it has {size / 2**20:,.0f} MiB; expected at most {limit // 2**20} MiB")
    return file.read_text("utf-8")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that may have been edited or cut off.

    Raises:
        ValueError: If it is none, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def free_memory() -> int:
    """Return how many bytes are free on the machine, or in its container if that has fewer.

    The container's limit is Linux's (cgroup v2); what is cached of files counts as free, as in the
    machine's. A limit on address space (``ulimit -v``) is none on memory, and shows itself as a
    `MemoryError`.
    """
    import psutil

    free = [int(psutil.virtual_memory().available)]
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith(_CACHED))
        free.append(int(limit) - int(used) + cached)
    except (OSError, ValueError):  # no such group, or no limit: "max"
        pass
    return max(0, min(free))


def require_memory(
    size: float, what: str, advice: str, error: type[HfbenchError] = DataError
) -> None:
    """Refuse what does not fit into the free memory, before it is taken.

    Args:
        size: In bytes.
        what: The beginning of the sentence, as in "dataset: 5 images".
        advice: What to do.
        error: What to raise.

    Raises:
        HfbenchError: Of the kind that was asked for.
    """
    free = free_memory()
    if size > _SHARE * free:
        raise error(
            f"{what} would take {size / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are "
            f"free; {advice}."
        )


def check_unpacked_size(file: Path, limit: int) -> None:
    """Refuse a zip file, such as numpy's .npz, that unpacks to more than a limit.

    Raises:
        ValueError: If it does.
        zipfile.BadZipFile: If it is none.
        OSError: If it cannot be read.
    """
    with zipfile.ZipFile(file) as content:
        size = sum(member.file_size for member in content.infolist())
    if size > limit:
        raise ValueError(
            f"it unpacks to {size / 2**20:,.0f} MiB; expected at most {limit / 2**20:,.0f} MiB"
        )


class BoundedReader(io.RawIOBase):
    """A stream that ends in an error after so many bytes: of what it unpacks to, nobody knows."""

    def __init__(self, source: IO[bytes] | Any, limit: int) -> None:
        self.source, self.left, self.limit = source, limit, limit

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read some bytes; raises OSError beyond the limit."""
        if size < 0 or size > self.left:
            size = self.left + 1
        content: bytes = self.source.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise OSError(f"it unpacks to more than {self.limit // 2**20} MiB")
        return content
