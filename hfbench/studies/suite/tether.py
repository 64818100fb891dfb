"""Tie a process to the one that started it, so that a killed suite leaves no run behind.

``python -m hfbench.studies.suite.tether PARENT_PID COMMAND...`` becomes the command. Only Linux can
do this; elsewhere a command that lost its parent goes on, and the next suite waits for its run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

END_WITH_PARENT = "HFBENCH_END_WITH_PARENT"  # set for what a suite starts
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
HERE = sys.platform == "linux"


def end_with_parent() -> None:
    """Have this process get SIGTERM, on which a run saves a checkpoint, when its parent dies.

    It stays so when the process becomes another program, but its children do not inherit it.
    """
    if HERE:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Become the command that follows the number of the parent process."""
    parent, *command = sys.argv[1:]
    end_with_parent()
    if HERE and os.getppid() != int(parent):  # it died before this one was tied to it
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
