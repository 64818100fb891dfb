"""A launcher whose runs need not import anything: a server forks them, ready to train.

``python forking.py serve SOCKET`` is the server, ``python forking.py SOCKET`` the launcher. A run
is as if it were the launcher's child: it is in its process group, writes to its output, gets its
SIGTERM, and gets one when the launcher dies.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn


def launch(path: str, words: list[str]) -> NoReturn:
    """Have ``python -m hfbench ARGUMENTS`` run by the server; end as it ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    order = {"arguments": words[3:], "folder": str(Path.cwd()), "group": os.getpgrp()}
    socket.send_fds(connection, [json.dumps(order).encode()], [1, 2])
    process_id = int(connection.recv(32))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(process_id, signal.SIGTERM))
    code = connection.recv(32)
    sys.exit(int(code) if code else 128 + signal.SIGKILL)


def serve(path: str) -> NoReturn:
    """Fork for each connection."""
    sys.path[0] = str(Path(__file__).parents[2])  # instead of this file's folder
    from tests.integration.commands import _IMPORTED

    for name in _IMPORTED:
        __import__(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # what has ended is gone
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}.new")
    server.listen()
    Path(f"{path}.new").rename(path)
    while True:
        connection, _ = server.accept()
        text, files, *_ = socket.recv_fds(connection, 65536, 2)
        if os.fork() == 0:
            _run(connection, json.loads(text), files)
        connection.close()
        for file in files:
            os.close(file)


def _run(connection: socket.socket, order: dict[str, str], files: list[int]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, int(order["group"]))
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["folder"])
    connection.send(str(os.getpid()).encode())

    def end_with_launcher() -> None:
        connection.recv(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_launcher, daemon=True).start()
    from tests.integration.commands import run_main

    connection.send(str(run_main(order["arguments"])).encode())
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    launch(sys.argv[1], sys.argv[2:])
