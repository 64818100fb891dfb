"""Run hfbench as a user does: a command line in a process of its own.

Two thirds of a short run are imports. So there are two ways: `run_fresh` starts a new interpreter,
and `WarmCommand` forks one that has the libraries imported already and runs the same ``__main__``.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

MODULE = (sys.executable, "-m", "hfbench")

# A run that takes a second: 7 steps on 200 of the digits.
SHORT = ("dataset.max_train_samples=200", "training_args.num_train_epochs=1")

_IMPORTED = (
    "torch",
    "timm",
    "evaluate",
    "transformers",
    "hfbench.training.run",
    "hfbench.report.terminal.run",
)
_INHERITED = ("HF_", "HUGGING", "TRANSFORMERS_", "ACCELERATE_", "TORCHELASTIC_", "WORLD_SIZE")


@dataclass(frozen=True)
class Done:
    """What a finished command left.

    Attributes:
        exit_code: As the shell sees it, but negative after a signal.
        stdout: Everything that it printed there.
        stderr: The same.
        seconds: Wall time by this process's clock.
    """

    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    def check(self) -> Done:
        """Return itself, after asserting that the command succeeded."""
        assert self.exit_code == 0, f"exit code {self.exit_code}\n{self.stdout}\n{self.stderr}"
        return self

    def refused(self) -> str:
        """Return stderr, after asserting that a user's error ended the command as it should."""
        assert self.exit_code == 2, f"exit code {self.exit_code}\n{self.stdout}\n{self.stderr}"
        assert "Traceback" not in self.stderr
        assert self.stdout == ""
        return self.stderr


def build_environment(home: Path | None = None, **variables: str) -> dict[str, str]:
    """Return the variables of a process that sees no GPU, no token and no network.

    Args:
        home: `HF_HOME`; by default that of the tests.
        variables: Added last.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_INHERITED)}
    ours = {
        "HF_HOME": str(home or os.environ["HF_HOME"]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "120",
    }
    return kept | ours | variables


def run_fresh(
    arguments: Sequence[str | Path],
    folder: Path,
    *,
    command: Sequence[str] = MODULE,
    environment: dict[str, str] | None = None,
    timeout: float = 240,
) -> Done:
    """Run a command in a new process and wait for it.

    Args:
        arguments: Of the command.
        folder: To run it in.
        command: What comes before them; ``python -m hfbench`` by default.
        environment: All of its variables.
        timeout: Seconds after which it is killed and the test fails.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        env=environment or build_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr, time.perf_counter() - start)


class WarmCommand:
    """A process that has imported everything and forks for each command; a context manager."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def start(self, arguments: Sequence[str | Path], folder: Path, **variables: str) -> Running:
        """Start ``hfbench ARGUMENTS`` in a folder.

        Args:
            arguments: Of hfbench.
            folder: To run it in.
            variables: Added to the environment; those that libraries read while they are imported
                come too late.
        """
        output = Path(tempfile.mkdtemp(dir=os.environ["HF_HOME"]))
        order = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "variables": variables,
            "output": str(output),
        }
        return Running(self, self._ask(order), output, time.perf_counter())

    def run(
        self,
        arguments: Sequence[str | Path],
        folder: Path,
        *,
        timeout: float = 60,
        **variables: str,
    ) -> Done:
        """Run ``hfbench ARGUMENTS`` in a folder and wait for it; see `start`."""
        return self.start(arguments, folder, **variables).wait(timeout)

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        answer = self._process.stdout.readline()
        assert answer, "the warm process has ended"
        return int(answer)


@dataclass(frozen=True)
class Running:
    """A command that was started."""

    command: WarmCommand
    process_id: int
    output: Path
    started: float

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process_id, number)

    def wait(self, timeout: float = 60) -> Done:
        """Wait for its end; a command that takes longer than `timeout` seconds is killed."""
        code = self.command._ask({"wait": self.process_id, "timeout": timeout})
        seconds = time.perf_counter() - self.started
        stdout, stderr = (
            (self.output / name).read_text("utf-8", errors="replace")
            for name in ("stdout", "stderr")
        )
        return Done(code, stdout, stderr, seconds)


def wait_until_written(folder: Path, pattern: str, timeout: float = 30) -> Path:
    """Wait until a file that matches a glob pattern is there, and return it."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} in {folder} after {timeout} s")


def find_free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def only_run(output_dir: Path) -> Path:
    """Return the folder of the one run under ``OUTPUT_DIR/<recipe name>/``."""
    (run,) = output_dir.glob("*/*/")
    return run


def read_result(run: Path) -> dict[str, Any]:
    """Read a run's ``result.json`` as a reader without hfbench would."""
    content: dict[str, Any] = json.loads((run / "result.json").read_text("utf-8"))
    return content


def _serve() -> None:
    """Fork for each order on stdin; answer with a process id, or with an exit code for "wait"."""
    sys.path.pop(0)  # this file's folder; ``python -m hfbench`` would not have it
    for name in _IMPORTED:
        __import__(name)
    gc.freeze()  # or the children's collector would copy every page
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(_wait(order["wait"], order["timeout"]), flush=True)  # noqa: T201
            continue
        process_id = os.fork()
        if process_id == 0:
            _become_command(order)
        print(process_id, flush=True)  # noqa: T201


def _wait(process_id: int, timeout: float) -> int:
    end = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(process_id, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(process_id, signal.SIGKILL)
        time.sleep(0.01)


def _become_command(order: dict[str, Any]) -> NoReturn:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(order["output"], name), flags), number)
    os.chdir(order["folder"])
    os.environ.update(order["variables"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os._exit(run_main(order["arguments"]))


def run_main(arguments: Sequence[str]) -> int:
    """Run ``python -m hfbench ARGUMENTS`` in this forked process; return its exit code."""
    sys.argv = ["hfbench", *arguments]
    try:
        runpy.run_module("hfbench", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Taking every library down takes 1.5 s; what is registered for the end runs all the same.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
