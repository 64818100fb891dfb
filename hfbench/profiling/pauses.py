"""Pauses that are not the program's: a stopped process, a debugger, a suspended machine.

A thread that wakes five times a second knows that the process lives; so does whoever reads a clock.
Where no sign of life came for a second, the kernel's own counts tell a pause from a machine that is
merely busy: a thread that computes or waits for a processor is counted, one that waits for the
interpreter's lock gives way every few milliseconds, and one that is stopped does none of it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2  # a tick reads three small files, a third of a millisecond
_NOTICED_SECONDS = 1.0  # a shorter pause is one that a busy machine may make too
_EXPLAINED = 0.5  # of a gap: less than that by waiting for processor or lock, and it was a pause
_LOCK_SECONDS = 0.005  # between two attempts at the interpreter's lock: `sys.getswitchinterval`
_SWAPPED = 10  # page faults from which on the machine was looking for memory


@dataclass(frozen=True)
class _Counts:
    """What the kernel counts since threads and process began.

    Attributes:
        waited: Seconds for which the watching thread waited for a processor or for the lock.
        worked: Seconds for which the watched thread computed or waited for a processor.
        computed: Seconds for which all threads computed.
        swapped: Page faults that went to the disk.
    """

    waited: float
    worked: float
    computed: float
    swapped: int

    def pause_in(self, gap: float, since: _Counts) -> float:
        """Return how much of a gap without a sign of life was a pause, in seconds."""
        explained = max(
            self.waited - since.waited,
            self.worked - since.worked,
            self.computed - since.computed,
        )
        if self.swapped - since.swapped >= _SWAPPED or explained >= _EXPLAINED * gap:
            return 0.0
        return gap - max(explained, _TICK_SECONDS)


class PauseWatch:
    """Notices pauses between `watch` and its end.

    Attributes:
        seconds: Of all pauses so far that the process's clock counted.
        suspended_seconds: For which the machine slept; `time.perf_counter` stands still then.
    """

    def __init__(self) -> None:
        self.seconds = self.suspended_seconds = 0.0
        self._lock = threading.Lock()
        self._alive: float | None = None  # time of the last sign of life; None if nobody watches
        self._tasks = (0, 0)  # the kernel's numbers of the watching thread and the watched one
        self._counts = _Counts(0.0, 0.0, 0.0, 0)
        self._ahead = 0.0  # of the clock that goes on while the machine sleeps

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Notice pauses while inside."""
        begun, end = threading.Event(), threading.Event()
        watched = (threading.get_ident(), threading.get_native_id())
        thread = threading.Thread(
            target=self._tick, args=(begun, end, *watched), name="hfbench-pauses", daemon=True
        )
        thread.start()
        begun.wait()
        try:
            yield
        finally:
            end.set()
            thread.join()
            self._alive = None

    def read(self) -> float:
        """Return the seconds of all pauses so far; cheap, since it is asked at every border."""
        now, alive = time.perf_counter(), self._alive
        if alive is not None:
            if now - alive >= _NOTICED_SECONDS:
                self._look()
            else:
                self._alive = now
        return self.seconds

    def _tick(self, begun: threading.Event, end: threading.Event, watched: int, task: int) -> None:
        self._tasks = (threading.get_native_id(), task)
        self._counts, self._alive, self._ahead = self._count(), time.perf_counter(), _ahead()
        begun.set()
        while not end.wait(_TICK_SECONDS):
            self._look(at_prompt=_is_at_prompt(sys._current_frames().get(watched)))

    def _look(self, at_prompt: bool = False) -> None:
        with self._lock:
            now, counts, ahead = time.perf_counter(), self._count(), _ahead()
            gap = now - (self._alive or now)
            noticed = gap >= _NOTICED_SECONDS
            stopped = counts.pause_in(gap, self._counts) if noticed else 0.0
            slept = ahead - self._ahead
            self._alive, self._counts, self._ahead = now, counts, ahead
            self.seconds += gap if at_prompt and not stopped else stopped
            if slept >= _NOTICED_SECONDS:
                self.suspended_seconds += slept
        if stopped:
            _say(f"The process stood still for {stopped:.1f} s (stopped, or held by a debugger)")
        if slept >= _NOTICED_SECONDS:
            _say(f"The machine slept for {slept:.1f} s")

    def _count(self) -> _Counts:
        computed = time.process_time()
        if sys.platform != "linux":
            return _Counts(0.0, 0.0, computed, 0)
        import resource

        swapped = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        try:
            watching, watched = (Path(f"/proc/self/task/{task}") for task in self._tasks)
            delayed = _read_schedstat(watching)[1]
            status = (watching / "status").read_text()
            waits = int(status.rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])
            worked = sum(_read_schedstat(watched))
        except (OSError, ValueError, IndexError):  # a kernel that does not count
            return _Counts(0.0, 0.0, computed, swapped)
        return _Counts(delayed + waits * _LOCK_SECONDS, worked, computed, swapped)


def _read_schedstat(task: Path) -> list[float]:
    """Return the seconds for which a thread computed, and for which it waited for a processor."""
    return [int(word) / 1e9 for word in (task / "schedstat").read_text().split()[:2]]


def _say(what: str) -> None:
    logger.warning(f"{what}; this is not counted as the model's time.")


def _ahead() -> float:
    """Return by how much the clock is ahead that goes on while the machine sleeps (Linux)."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.perf_counter()


def _is_at_prompt(frame: FrameType | None) -> bool:
    """Tell whether a thread waits at pdb's prompt."""
    while frame is not None:
        if frame.f_code.co_name == "cmdloop" and os.path.basename(frame.f_code.co_filename) in (
            "cmd.py",
            "pdb.py",
        ):
            return True
        frame = frame.f_back
    return False
