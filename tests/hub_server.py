"""A local stand-in for the Hugging Face Hub, for the real and unmodified clients.

It speaks as much of the Hub's HTTP protocol as `huggingface_hub`, `transformers`, `datasets` and
`timm` need to resolve, download, cache and push, all over Git LFS (Xet is switched off). Reads are
public; writes need the token and go only to the user's own namespace. Not served: pull requests,
discussions, lists of commits and refs, deleting repositories or refs, gated and private
repositories, listings in pages, and the dataset viewer.

The clients read `HF_ENDPOINT` when they are imported, so run them in a process of their own:

    with HubServer(tmp_path / "hub") as server:
        server.add_repo("uoft-cs/cifar10", "dataset", folder)
        environment = os.environ | server.env() | {"HF_HOME": str(tmp_path / "cache")}
        subprocess.run([sys.executable, "-c", script], env=environment, check=True)
"""

import json
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from tests.hub_api import HubApi, Refusal, Reply, Request
from tests.hub_repos import CHUNK_BYTES, Repo, RepoStore, RepoType, read_chunks


class HubServer:
    """The server as a context manager; it listens on a free port of 127.0.0.1 while entered.

    Attributes:
        url: Address of the server, without a slash at the end; empty before entering.
        requests: Method, path without the query, and status of every request so far, in order.
        token: The one token that may write.
        user: The token's owner, the only namespace that can be written to.
    """

    def __init__(self, root: Path, token: str = "hf_test_token", user: str = "tester") -> None:
        """Prepare the server.

        Args:
            root: Folder for the content of all repositories; created if missing.
            token: The token that may write.
            user: The token's owner.
        """
        self.url, self.token, self.user = "", token, user
        self.requests: list[tuple[str, str, int]] = []
        self._store = RepoStore(root)
        self._api = HubApi(self._store, token, user)

    def __enter__(self) -> Self:
        """Bind a port and start to serve in a thread."""
        self._http = _HttpServer(self._api, self.requests)
        self.url = self._api.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving and free the port."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def add_repo(self, repo_id: str, repo_type: RepoType, folder: Path) -> None:
        """Serve a copy of a folder as a repository with one commit on `main`.

        A repository of that type and name that is already there is replaced.
        """
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
        blobs = {
            name: self._store.add(name, path) for name, path in paths.items() if path.is_file()
        }
        repo = Repo(repo_type, repo_id)
        repo.commit("Add files", blobs)
        with self._store.lock:
            self._store.repos[repo_type, repo_id] = repo

    def files(
        self, repo_id: str, repo_type: RepoType = "model", revision: str = "main"
    ) -> dict[str, bytes]:
        """Return the content of every file of a repository, by path.

        A repository that a client created also holds the `.gitattributes` that the Hub puts there.

        Raises:
            KeyError: If there is no such repository or revision.
        """
        commit = self._store.repos[repo_type, repo_id].find(revision)
        if commit is None:
            raise KeyError(revision)
        return {
            path: self._store.path(blob.sha256).read_bytes() for path, blob in commit.files.items()
        }

    def env(self) -> dict[str, str]:
        """Return the variables that point the clients here, to be added to a process's own.

        Left to the caller: `HF_HOME`, and `HF_TOKEN` for a process that pushes.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class _HttpServer(ThreadingHTTPServer):
    """The listening socket, with what its handlers share."""

    daemon_threads = True

    def __init__(self, api: HubApi, requests: list[tuple[str, str, int]]) -> None:
        """Listen on a free port of 127.0.0.1."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.api, self.requests = api, requests

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong, except that a client hung up: they do after partial reads."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Carries requests from one connection to the `HubApi` and its replies back."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a reply in two packets can wait 40 ms for an ACK
    server: _HttpServer

    def _answer(self) -> None:
        address, body = urlsplit(self.path), self._body()
        request = Request(self.command, address.path, address.query, self.headers, body)
        try:
            reply = self.server.api.answer(request)
        except Refusal as refusal:
            reply = Reply({"error": str(refusal)}, refusal.status, refusal.headers)
        except Exception as error:
            traceback.print_exc()
            reply = Reply({"error": repr(error)}, 500, {"Connection": "close"})
        for _ in body:  # what is left unread would be taken for the next request
            pass
        self.server.requests.append((self.command, address.path, reply.status))
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 - the base class names them

    def _body(self) -> Iterator[bytes]:
        """Yield the request's body, whether it came with a length or chunked."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        rest = int(self.headers.get("Content-Length") or 0)
        while rest and (chunk := self.rfile.read(min(CHUNK_BYTES, rest))):
            rest -= len(chunk)
            yield chunk

    def _send(self, reply: Reply) -> None:
        data = json.dumps(reply.value).encode()
        kind, length = ("octet-stream", reply.length) if reply.file else ("json", len(data))
        self.send_response(reply.status)
        self.send_header("Content-Type", f"application/{kind}")
        self.send_header("Content-Length", str(length))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        chunks = read_chunks(reply.file, reply.start, reply.length) if reply.file else [data]
        for chunk in chunks:
            self.wfile.write(chunk)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        """Keep the terminal clean; `HubServer.requests` has it all."""
