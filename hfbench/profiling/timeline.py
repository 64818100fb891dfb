"""The wall time of a training call, split into phases without waiting for the device.

On a GPU the borders are events in the stream of work: what the host does meanwhile does not count,
and a phase that waits for the host counts as long as the device stands still. They are read when
the device has passed them anyway.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hfbench.results.schema import TIMED_DEVICES, TimeBudget

PHASES = tuple(name.removesuffix("_seconds") for name in TimeBudget.model_fields)


class Stamp(Protocol):
    """A point in time on the host or in a device's stream; the interface of `torch.cuda.Event`."""

    def record(self) -> None:
        """Take the time, now or as soon as the device has done what it was given."""

    def query(self) -> bool:
        """Tell whether the time is known."""

    def synchronize(self) -> None:
        """Wait until it is."""

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds from this stamp to a later one."""


class HostStamp:
    """A point in the host's time."""

    def __init__(self) -> None:
        self.at = 0.0

    def record(self) -> None:
        """Take the time."""
        self.at = time.perf_counter()

    def query(self) -> bool:
        """Tell that the time is known."""
        return True

    def synchronize(self) -> None:
        """Wait for nothing."""

    def elapsed_time(self, end: HostStamp) -> float:
        """Return the milliseconds from this stamp to a later one."""
        return (end.at - self.at) * 1e3


def stamps_of(device: torch.device) -> Callable[[], Stamp]:
    """Return what makes the stamps of a device: timed events where it has them."""
    if device.type in TIMED_DEVICES:
        event: Callable[..., Stamp] = getattr(torch, device.type).Event
        return lambda: event(enable_timing=True)
    return HostStamp


class Timeline:
    """Attribute all time from `start` to `stop` to one phase each; a no-op outside.

    Attributes:
        seconds: Of each phase so far, earlier sessions included; complete after `stop`.
    """

    def __init__(self, paused: Callable[[], float] = lambda: 0.0) -> None:
        """Begin with nothing.

        Args:
            paused: Returns the seconds for which the process stood still so far; they are left out.
        """
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._paused, self._paused_before = paused, 0.0
        self.phase: str | None = None
        self._held = 0
        self._new_stamp: Callable[[], Stamp] = HostStamp
        self._pool: list[Stamp] = []  # to be used again: a long run makes few
        self._last: Stamp = HostStamp()
        # Of each phase its start, its end, and the pauses in it.
        self._pending: deque[tuple[str, Stamp, Stamp, float]] = deque()

    def start(self, phase: str, new_stamp: Callable[[], Stamp] = HostStamp) -> None:
        """Begin with a phase; the device must stand still."""
        self._new_stamp, self._pool, self._held, self.phase = new_stamp, [], 0, phase
        self._pending.clear()
        self._last, self._paused_before = self._take(), self._paused()

    def enter(self, phase: str) -> None:
        """Go over to another phase, unless a whole one goes on."""
        if not self._held:
            self._turn_to(phase)

    def hold(self, phase: str) -> None:
        """Go over to a phase that counts as a whole, whatever is entered before `release`."""
        self._turn_to(phase)
        self._held += 1

    def release(self, phase: str) -> None:
        """End what `hold` began; go over to another phase."""
        self._held -= 1
        self._turn_to(phase)

    @contextmanager
    def whole(self, phase: str) -> Iterator[None]:
        """Attribute everything inside to a phase, and come back to the one before."""
        before = self.phase or phase
        self.hold(phase)
        try:
            yield
        finally:
            self.release(before)

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """Go over to a phase, unless a whole one goes on, and come back to the one before."""
        before = self.phase or phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def settle(self) -> None:
        """Add up what the device has passed; never wait."""
        while self._pending and self._pending[0][2].query():
            self._add(*self._pending.popleft())

    def take_back(self, phase: str, seconds: float) -> None:
        """Leave out seconds that were attributed to a phase."""
        if self.phase is not None:
            self.read()
            self.seconds[phase] -= seconds

    def forget_pauses(self) -> None:
        """Tell that what is paused has grown by what `take_back` left out already."""
        self._paused_before = self._paused()

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase up to now; waits for the device."""
        if self.phase is not None:
            self._turn_to(self.phase)
            self._last.synchronize()
            while self._pending:
                self._add(*self._pending.popleft())
        return dict(self.seconds)

    def stop(self) -> None:
        """End the last phase; waits for the device."""
        self.read()
        self.phase = None

    def _turn_to(self, phase: str) -> None:
        if self.phase is None:
            return
        stamp, paused = self._take(), self._paused()
        self._pending.append((self.phase, self._last, stamp, paused - self._paused_before))
        self._last, self.phase, self._paused_before = stamp, phase, paused

    def _take(self) -> Stamp:
        stamp = self._pool.pop() if self._pool else self._new_stamp()
        stamp.record()
        return stamp

    def _add(self, phase: str, start: Stamp, end: Stamp, paused: float) -> None:
        seconds = start.elapsed_time(end) / 1e3
        # A device may have computed on while its host stood still.
        self.seconds[phase] += seconds - min(paused, seconds)
        self._pool.append(start)  # its end is the start of the next


class Batch(dict[str, Tensor]):
    """A batch whose copy to the device is a phase of its own.

    accelerate's loader copies it inside ``next``, before it fetches the one after: only the batch
    itself is there to see it. To copy later instead would let the host prepare images while the
    device computes, which Trainer does not do for a user, and so flatter the baseline.

    Attributes:
        timeline: Of the training call that goes on in this process; batches come out of workers,
            which cannot bring it along.
    """

    timeline: ClassVar[Timeline] = Timeline()

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Copy every tensor; `accelerate.utils.send_to_device` calls it."""
        with Batch.timeline.inside("copy"):
            return Batch(
                {name: value.to(device, non_blocking=non_blocking) for name, value in self.items()}
            )
