"""A process that is stopped is noticed; one that is merely busy is not."""

from __future__ import annotations

import bdb
import cmd
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hfbench.profiling import pauses
from hfbench.profiling.pauses import PauseWatch
from hfbench.profiling.timeline import Timeline

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals that stop are POSIX's")
WORK = {
    "computing": "sum(range(1000))",
    "waiting": "time.sleep(0.005)",
    "holding the interpreter's lock": "pow(3, 2_000_000)",
}
PROGRAM = """
import sys, time
from hfbench.profiling.pauses import PauseWatch
watch, end = PauseWatch(), time.monotonic() + 3.5
with watch.watch():
    print("begun", flush=True)
    while time.monotonic() < end:
        {work}
        watch.read()
print(watch.seconds)
"""


def pause_of(work: str, stop_seconds: float) -> float:
    """Return the pause that a process noticed which was stopped while it did something."""
    command = [sys.executable, "-c", PROGRAM.format(work=WORK[work])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if stop_seconds:
            time.sleep(0.5)
            process.send_signal(signal.SIGSTOP)
            time.sleep(stop_seconds)
            process.send_signal(signal.SIGCONT)
        said = process.stdout.read()
    return float(said)


@pytest.mark.parametrize("work", WORK)
def test_stopped_process_knows_for_how_long(work: str) -> None:
    assert pause_of(work, 2.0) == pytest.approx(2.0, abs=0.4)


def test_one_that_was_not_stopped_makes_no_pause() -> None:
    assert pause_of("holding the interpreter's lock", 0.0) == 0.0


def test_suspended_machine_is_said_and_in_no_clock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = 5.0
    monkeypatch.setattr(pauses, "_ahead", lambda: ahead)
    watch = PauseWatch()
    with watch.watch():
        ahead += 40.0
        wait_for(lambda: watch.suspended_seconds > 0)
    assert watch.suspended_seconds == 40.0
    assert watch.seconds == 0.0
    assert "The machine slept for 40.0 s" in caplog.text


def test_prompt_of_a_debugger_is_a_pause() -> None:
    class Prompt(cmd.Cmd):
        use_rawinput = False

        def default(self, line: str) -> bool:  # type: ignore[override]
            time.sleep(0.6)
            return True

    assert bdb.Bdb is not None
    watch = PauseWatch()
    with watch.watch():
        Prompt(stdin=io.StringIO("continue\n"), stdout=io.StringIO()).cmdloop()
    assert watch.read() == pytest.approx(0.6, abs=0.3)


def test_nothing_is_left_running() -> None:
    watch = PauseWatch()
    with watch.watch():
        names = {thread.name for thread in threading.enumerate()}
        assert "hfbench-pauses" in names
    assert "hfbench-pauses" not in {thread.name for thread in threading.enumerate()}
    time.sleep(1.1)
    assert watch.read() == 0.0  # nobody watches


def test_pause_is_taken_out_of_the_phase_in_which_it_was() -> None:
    paused = 0.0
    timeline = Timeline(lambda: paused)
    timeline.start("start")
    time.sleep(0.05)
    timeline.enter("forward")
    time.sleep(0.1)
    paused = 0.1
    timeline.enter("backward")
    time.sleep(0.05)
    timeline.stop()
    assert timeline.seconds["forward"] < 0.05
    assert timeline.seconds["backward"] >= 0.05
    assert timeline.seconds["start"] >= 0.05


def wait_for(happened: object) -> None:
    """Wait until a function says yes."""
    end = time.monotonic() + 10
    while not happened() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.02)
