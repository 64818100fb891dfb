"""What asks a process to end: Ctrl-C, SIGTERM and SIGHUP, caught in one way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_DONE = b"\0"


def ending_signals() -> list[int]:
    """Return what ends a command; a hang-up that is ignored, as under nohup, stays ignored."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    heard = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([hangup] if hangup is not None and heard else [])]


@contextmanager
def caught(handle: Callable[[], None]) -> Iterator[None]:
    """Call a function for each of these signals, while inside and in this process alone.

    A process that was forked inside, such as a data loader's worker, ends on SIGTERM and SIGHUP as
    if nothing were caught. In a thread other than the main one nothing can be.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            handle()
        elif number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, on_signal) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Interruption:
    """Lets SIGTERM and SIGHUP do what Ctrl-C does.

    Attributes:
        came: Whether one of them, or Ctrl-C, came: libraries in C may make something else of the
            `KeyboardInterrupt` that it raises.
    """

    def __init__(self) -> None:
        self.came = False

    def listen(self) -> contextlib.AbstractContextManager[None]:
        """Raise `KeyboardInterrupt` on each of them, while inside."""
        return caught(self._interrupt)

    def _interrupt(self) -> None:
        self.came = True
        raise KeyboardInterrupt


@contextmanager
def told_in_any_state(tell: Callable[[], None]) -> Iterator[None]:
    """Call a function on SIGTERM, then end with exit code 143, whatever the main thread waits for.

    For one process of several: when another is lost, the launcher sends SIGTERM to those that wait
    for it in C, where Python's own handlers never get their turn.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or not hasattr(signal, "set_wakeup_fd") or os.name == "nt":
        yield
        return
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)

    def wait() -> None:
        while (number := os.read(receiver, 1)) != _DONE:  # others, such as SIGCHLD, come here too
            if number == bytes([signal.SIGTERM]):
                tell()
                os._exit(128 + signal.SIGTERM)

    process = os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a loader's worker, which has inherited this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, name="hfbench-launcher", daemon=True)
    before = signal.signal(signal.SIGTERM, on_signal)
    earlier = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    _awake.append(sender)
    thread.start()
    try:
        yield
    finally:
        _awake.remove(sender)
        signal.set_wakeup_fd(earlier)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        os.write(sender, _DONE)
        thread.join()
        os.close(sender)
        os.close(receiver)


_awake: list[int] = []


def _sleep_in_child() -> None:
    """Keep the signals of a forked process from being taken for its parent's."""
    if _awake:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_sleep_in_child)
