"""What servers answer, through the real clients against a server of this process."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from hfbench.data.sources import load_splits
from hfbench.errors import DataError, HfbenchError, HubError
from hfbench.machine.answers import say_answer
from hfbench.models.loading import open_model
from hfbench.training import hub
from tests.builders import tiny_recipe

PAGE = b"<!DOCTYPE html><html><body>Welcome to the hotel. Your room, please?</body></html>"
STATUS = {
    "expired": (401, "Invalid credentials in Authorization header", ""),
    "stale": (401, 'User Access Token "mine" is expired', ""),
    "forbidden": (403, "Forbidden", ""),
    "gated": (403, "Access to this resource is restricted.", "GatedRepo"),
    "disabled": (403, "Access to this resource is disabled.", ""),
    "proxied": (407, "", ""),
    "limited": (429, "We had to rate limit you.", ""),
    "broken": (500, "", ""),
    "busy": (503, "overloaded", ""),
    "nowhere": (404, "Repository not found", "RepoNotFound"),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the repository's name, as a server does where something is wrong."""

    def answer(self) -> None:
        if "page" in self.path:
            self.reply(200, {"Content-Type": "text/html"}, PAGE)
        elif "portal" in self.path:
            self.reply(200, {"ETag": '"a"', "X-Repo-Commit": "a" * 40}, PAGE)
        elif "circle" in self.path:
            self.reply(302, {"Location": self.path}, b"")
        elif "short" in self.path:
            headers = {"ETag": '"b"', "X-Repo-Commit": "b" * 40, "Content-Length": "5000"}
            self.reply(200, headers, b"{")
        else:
            name = next((name for name in STATUS if name in self.path), "nowhere")
            status, message, code = STATUS[name]
            headers = {"X-Error-Message": message, "X-Error-Code": code, "Retry-After": "7"}
            self.reply(status, {k: v for k, v in headers.items() if v}, b"{}")

    do_GET = do_HEAD = do_POST = answer  # noqa: N815 - the base class names them

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Serve, point the clients there with a token in HF_TOKEN, and let them not wait."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for module in (constants, datasets.config):
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.chdir(tmp_path)
        yield url
        server.shutdown()


def model_message(name: str) -> str:
    with pytest.raises(HfbenchError) as error:
        open_model(tiny_recipe(f"me/{name}", pretrained=True))
    assert "hf_secret" not in str(error.value)
    return str(error.value)


def data_message(name: str) -> str:
    with pytest.raises(HfbenchError) as error:
        load_splits(tiny_recipe(dataset={"name_or_path": f"me/{name}"}).dataset, 32, "bilinear")
    assert "hf_secret" not in str(error.value)
    return str(error.value)


EXPECTED = {
    "expired": ["answers 401", "the token in HF_TOKEN is not valid", "hf auth login", "unset HF_"],
    "stale": ["answers 401", '"mine" is expired', "the token in HF_TOKEN is not valid"],
    "forbidden": ["answers 403", "the token in HF_TOKEN may not do that", "Ask its owner"],
    "disabled": ["answers 403", "the Hub has disabled it"],
    "proxied": ["The proxy asks for a login (407)"],
    "limited": ["answers 429", "too many requests", "Try again in 7 s", "HF_HUB_OFFLINE=1"],
    "broken": ["answers 500", "out of order or busy", "Try again in 7 s", "HF_HUB_OFFLINE=1"],
    "busy": ['answers 503 "overloaded"', "HF_HUB_OFFLINE=1"],
    "page": ["answers with something else than the Hub", "login first", "HTTPS_PROXY"],
    "circle": ["from address to address without end", "HF_ENDPOINT"],
    "gated": ["is gated: accept its terms on the Hub", "hf auth login"],
    "nowhere": ["there is no folder me/nowhere", "of that name on the Hub"],
}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", [*EXPECTED, "portal", "short"])
def test_answer_for_a_model_says_what_it_is_and_what_to_do(name: str) -> None:
    said = model_message(name)

    special = {
        "portal": ["is damaged, or another page than asked for", "Remove it from the cache"],
        "short": ["The connection to", "broke while me/short was fetched"],
    }
    for part in (EXPECTED | special)[name]:
        assert part in said
    if name != "gated":
        assert said.startswith("model.name_or_path: ")


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", EXPECTED)
def test_answer_for_a_data_set_says_what_it_is_and_what_to_do(name: str) -> None:
    said = data_message(name)

    for part in EXPECTED[name]:
        assert part in said


@pytest.mark.usefixtures("server")
def test_token_of_the_login_is_not_called_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")

    said = model_message("expired")
    assert "the token of the login is not valid" in said
    assert 'log out with "hf auth logout"' in said


@pytest.mark.usefixtures("server")
def test_who_has_no_login_is_told_to_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere/token")

    assert "it wants a login" in model_message("expired")
    assert "A login is allowed more" in model_message("limited")
    assert "who has no login may not do that" in model_message("forbidden")


@pytest.mark.usefixtures("server")
def test_cache_that_cannot_be_written_to_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "hub"))

    monkeypatch.setattr("hfbench.models.loading.load_config", fail)
    said = model_message("anything")
    assert "The cache cannot be written to: Permission denied" in said
    assert "HF_HOME=FOLDER" in said


@pytest.mark.usefixtures("server")
def test_push_says_the_same() -> None:
    recipe = tiny_recipe(push_to_hub=True, hub_model_id="me/limited")

    with pytest.raises(HubError) as error:
        hub.check_push(recipe)
    assert "training_args.push_to_hub: the login cannot be checked" in str(error.value)


def test_other_errors_are_not_explained() -> None:
    assert say_answer(ValueError("something"), "a/b") is None
    assert say_answer(FileNotFoundError(2, "No such file", "x"), "a/b") is None
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert issubclass(DataError, HfbenchError)
