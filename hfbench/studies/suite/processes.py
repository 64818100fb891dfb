"""Start hfbench in a process of its own, by itself or through a launcher, and end it again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hfbench.errors import DeviceError
from hfbench.machine.environment import Environment
from hfbench.machine.signals import caught
from hfbench.studies.suite import tether

# Launchers take a Python module to start; every other prefix (nice, numactl) takes a program.
_MODULE_LAUNCHERS = (
    *("accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
)
_PYTHON = re.compile(r"python[\d.]*")
_SHOWN_LINES = 8
_LEFTOVER_SECONDS = 60


def build_command(launcher: str = "") -> list[str]:
    """Return the words that come before hfbench's own arguments.

    Args:
        launcher: As typed, such as ``accelerate launch --num_processes 2`` or ``nice -n 5``.

    Raises:
        DeviceError: If there is no such program, or it cannot start a module.
    """
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise DeviceError(f"--launcher: {launcher!r} cannot be split into words: {error}") from None
    if not words:
        return [sys.executable, "-m", "hfbench"]
    if shutil.which(words[0]) is None:
        raise DeviceError(
            f'--launcher: there is no program "{words[0]}" on this machine; give its full path, or '
            f"install it."
        )
    names = [Path(word).name.removesuffix(".exe") for word in words]
    if words[-2:] == ["-m", "hfbench"]:
        return words
    if "accelerate" in names and "launch" not in names[names.index("accelerate") :]:
        raise DeviceError(f"--launcher: {launcher!r} starts nothing; write: accelerate launch …")
    if "deepspeed" in names:
        return [*words, "--module", "hfbench"]
    launches = "accelerate" in names or any(name in _MODULE_LAUNCHERS for name in names)
    if launches or _PYTHON.fullmatch(names[-1]):
        return [*words, "-m", "hfbench"]
    return [*words, sys.executable, "-m", "hfbench"]


def probe_environment(command: Sequence[str]) -> tuple[Environment, int]:
    """Ask hfbench, started as a run would be, what it runs on.

    Args:
        command: From `build_command`.

    Returns:
        The environment, and the number of processes.

    Raises:
        DeviceError: If it does not start.
    """
    done = subprocess.run(
        [*command, "env", "--json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    try:
        content = find_json(done.stdout) or {}
        world_size = int(content.pop("world_size"))
        return Environment.model_validate(content), world_size
    except (KeyError, ValueError, ValidationError):
        said = last_lines(done.stderr or done.stdout)
        raise DeviceError(
            "\n  ".join(
                [
                    f"hfbench does not start with: {shlex.join(command)} env --json "
                    f"({say_ending(done.returncode)})",
                    *said,
                ]
            )
        ) from None


def find_json(text: str) -> dict[str, Any] | None:
    """Return the indented JSON object in what hfbench and its launcher have printed."""
    found = re.search(r"^\{$.*?^\}$", text, re.M | re.S)
    try:
        content: dict[str, Any] | None = json.loads(found[0]) if found else None
    except ValueError:
        return None
    return content


def last_lines(text: str) -> list[str]:
    """Return the last lines with something in them; of a progress bar only how it stood last."""
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-_SHOWN_LINES:]


def tied_to_this_process(command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a process that ends when this one dies, on Linux."""
    tied = (
        [sys.executable, "-m", "hfbench.studies.suite.tether", str(os.getpid())]
        if tether.HERE
        else []
    )
    return [*tied, *command], os.environ | {tether.END_WITH_PARENT: "1"}


class RunProcess:
    """A process group that runs hfbench, its output in a file; it ends when this process does."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        """Start it.

        Args:
            command: With all arguments.
            log: Output is appended.
        """
        self.log = log
        self._started = time.monotonic()
        with log.open("ab") as output:
            output.write(os.fsencode(f"$ {shlex.join(command)}\n"))
            output.flush()
            self._log_start = output.tell()
            tied, environment = tied_to_this_process(command)
            self._process = subprocess.Popen(
                tied,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,  # so that Ctrl-C reaches it through the suite alone, and once
            )

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.monotonic() - self._started

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal; ``None`` while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """Ask it to save a checkpoint and end; a second time, to end at once.

        Only the first process is told: a launcher passes it on, or dies and its children with it,
        and two signals would be one too many.
        """
        self._signal(signal.SIGTERM, self._process.pid)

    def kill(self) -> None:
        """End everything that it started."""
        self._signal(signal.SIGKILL, -self._process.pid)
        self._process.wait()

    def settle(self, patience: float = _LEFTOVER_SECONDS) -> None:
        """Wait until nothing of it runs any more, so that the next run has the machine to itself.

        Args:
            patience: Seconds after which what is left is killed.
        """
        end = time.monotonic() + patience
        if not tether.HERE and self._group():
            self._signal(signal.SIGTERM, -self._process.pid)
        while self._group():
            if time.monotonic() > end:
                self._signal(signal.SIGKILL, -self._process.pid)
                return
            time.sleep(0.1)

    def output(self) -> str:
        """Return what it has printed so far."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def _group(self) -> bool:
        """Tell whether processes of the group are left; a dead one that nobody reaps is none."""
        import psutil

        try:
            os.killpg(self._process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        for process in psutil.process_iter(["status"]):
            try:
                ours = os.getpgid(process.pid) == self._process.pid
            except ProcessLookupError:
                continue
            if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        return False

    def _signal(self, number: signal.Signals, process_id: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, number)


class StopRequests:
    """Counts Ctrl-C, SIGTERM and SIGHUP in the main thread; in another one nothing can be caught.

    Attributes:
        asked: How often it was asked to stop.
    """

    def __init__(self) -> None:
        self.asked = 0

    @contextmanager
    def listen(self) -> Iterator[StopRequests]:
        """Count while inside."""
        with caught(self._count):
            yield self

    def _count(self) -> None:
        self.asked += 1


def say_ending(code: int) -> str:
    """Say how a process ended, as in ``exit code 1`` or ``killed by SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
