"""What asks a process to end is heard in every state, and by that process alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfbench.machine.signals import Interruption, caught
from tests.integration.commands import MODULE, build_environment

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")

ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# The main thread waits in C, as for another process that was lost.
WAITING = """
import ctypes, os, signal, sys, time
from hfbench.machine.signals import told_in_any_state
signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch does for its loaders
with told_in_any_state(lambda: print("told", flush=True)):
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(say, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)  # Python forgets what comes while it forks
    os.kill(child, signal.SIGTERM)
    print("child", os.waitpid(child, 0)[1], flush=True)
    if sys.argv[1] == "ends":
        sys.exit(0)
    while True:
        ctypes.CDLL(None).pause()  # a Python handler runs only between two of these
"""


@pytest.mark.parametrize("number", ENDING)
def test_each_signal_is_an_interruption(number: signal.Signals) -> None:
    interruption = Interruption()
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruption.listen():
        signal.raise_signal(number)
    assert interruption.came
    assert signal.getsignal(number) is before


def test_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with caught(lambda: pytest.fail("heard")):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_forked_process_ends_as_if_nothing_were_caught() -> None:
    with caught(lambda: os._exit(7)):
        ready, say = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(say, b"1")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)  # Python forgets what comes while it forks
        os.kill(child, signal.SIGTERM)
        ended = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(ended) == -signal.SIGTERM


def start_waiting(how: str) -> subprocess.Popen[str]:
    """Start a process that waits in C, and has lost a process that it had forked."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"child {signal.SIGTERM:d}\n"
    return process


def test_process_that_waits_in_c_is_told_that_its_launcher_ends_it() -> None:
    process = start_waiting("waits")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "told\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_end_of_a_forked_process_is_not_taken_for_its_parents() -> None:
    process = start_waiting("ends")
    assert process.communicate(timeout=20)[0] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("number", ENDING)
def test_command_that_is_stopped_while_it_imports_says_so(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [*MODULE, "recipe", "quickstart_untuned", "-o", str(tmp_path / "runs")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=build_environment(),
    )
    wait_until_handled(process.pid)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert said.strip() == "Stopped."
    assert process.returncode == 130
    assert not (tmp_path / "runs").exists()


def wait_until_handled(process_id: int) -> None:
    """Wait until a process catches SIGTERM; Linux tells."""
    status = Path(f"/proc/{process_id}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    while True:
        line = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        if int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)
