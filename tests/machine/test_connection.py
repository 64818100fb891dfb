from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub import errors as hub

from hfbench.errors import DataError, HfbenchError, HubError, ModelError
from hfbench.machine.connection import explain_hub_failure, use_cache_if_unreachable

# The HTTP library of the installed huggingface-hub: httpx before version 2, httpx2 from then on.
http: Any = sys.modules[hub.Response.__module__.partition(".")[0]]
RESPONSE = http.Response(404, request=http.Request("GET", "https://huggingface.co"))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def listening() -> Iterator[int]:
    """Yield a port at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """Return a port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def wrapped(cause: BaseException) -> OSError:
    """Return an error as the libraries raise it: about something else, with the reason beneath."""
    try:
        try:
            raise cause
        except BaseException as error:
            raise OSError("Something cannot be loaded.\nSecond line.") from error
    except OSError as error:
        return error


def is_offline() -> bool:
    return constants.HF_HUB_OFFLINE


# --- is the Hub there ---


@pytest.mark.usefixtures("online")
def test_clients_use_their_caches_when_nothing_listens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, closed: int
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    use_cache_if_unreachable()

    assert is_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert datasets.config.HF_HUB_OFFLINE
    assert f"http://127.0.0.1:{closed} does not answer" in caplog.text


@pytest.mark.usefixtures("online")
def test_clients_go_on_line_when_something_listens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, listening: int
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening}")
    use_cache_if_unreachable()

    assert not is_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert not datasets.config.HF_HUB_OFFLINE
    assert caplog.text == ""


def test_nothing_is_asked_when_already_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("asked"))

    use_cache_if_unreachable()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("endpoint", "proxy", "asked"),
    [
        ("https://huggingface.co", None, ("huggingface.co", 443)),
        ("http://hub.example", None, ("hub.example", 80)),
        ("http://hub.example:8080/path", None, ("hub.example", 8080)),
        ("https://huggingface.co", "http://proxy.example:3128", ("proxy.example", 3128)),
        ("https://huggingface.co", "proxy.example:3128", ("proxy.example", 3128)),
    ],
)
def test_server_or_the_proxy_before_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, proxy: str | None, asked: tuple[str, int]
) -> None:
    calls: list[Any] = []

    def connect(address: tuple[str, int], timeout: float) -> Any:
        calls.append(address)
        raise OSError

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(socket, "create_connection", connect)
    if proxy:
        monkeypatch.setenv("https_proxy", proxy)
    use_cache_if_unreachable()

    assert calls == [asked]


@pytest.mark.usefixtures("online")
def test_proxy_is_left_out_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, listening: int
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    use_cache_if_unreachable()

    assert not is_offline()


@pytest.mark.usefixtures("online")
def test_endpoint_that_is_no_address_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:port")
    use_cache_if_unreachable()

    assert is_offline()


# --- what went wrong ---


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(("kind", "expected"), [("dataset", DataError), ("model", ModelError)])
@pytest.mark.parametrize(
    "error",
    [
        hub.RepositoryNotFoundError("404", response=RESPONSE),
        wrapped(hub.RepositoryNotFoundError("404", response=RESPONSE)),
        hub.HFValidationError("Repo id must be in the form"),
        DatasetNotFoundError("Dataset 'a/b' doesn't exist"),
    ],
)
def test_name_that_is_nowhere_says_where_was_looked(
    kind: str, expected: type[HfbenchError], error: Exception
) -> None:
    failure = explain_hub_failure(kind, "nobody/nothing", error)

    assert type(failure) is expected
    assert str(failure) == (
        f"{kind}.name_or_path: there is no folder nobody/nothing in {Path.cwd()}, and no {kind} of "
        'that name on the Hub (or it is private: log in with "hf auth login").'
    )


@pytest.mark.parametrize(("kind", "expected"), [("dataset", DataError), ("model", ModelError)])
@pytest.mark.usefixtures("online")
def test_missing_revision_says_what_to_write(kind: str, expected: type[HfbenchError]) -> None:
    failure = explain_hub_failure(
        kind, "a/b", wrapped(hub.RevisionNotFoundError("404", response=RESPONSE))
    )

    assert type(failure) is expected
    assert str(failure) == f"{kind}.revision: a/b has no such revision; leave it null for main."


@pytest.mark.usefixtures("online")
def test_gated_repository_says_to_accept_its_terms() -> None:
    # A gated repository counts as one that is not found; the more particular reason has to win.
    failure = explain_hub_failure(
        "model", "a/b", wrapped(hub.GatedRepoError("403", response=RESPONSE))
    )

    assert type(failure) is HubError
    assert "a/b is gated: accept its terms" in str(failure)
    assert "hf auth login" in str(failure)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    "cause",
    [
        ConnectionRefusedError("no"),
        http.ConnectError("no"),
        http.ConnectTimeout("late"),
        http.ReadTimeout("late"),
        hub.OfflineModeIsEnabled("offline"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "advice"),
    [("dataset", "dataset.name_or_path=digits"), ("model", "model.pretrained=false")],
)
def test_hub_out_of_reach_says_what_works_offline(kind: str, advice: str, cause: Exception) -> None:
    failure = explain_hub_failure(kind, "a/b", wrapped(cause))

    assert type(failure) is HubError
    message = str(failure)
    assert message.startswith(f"{kind}.name_or_path: there is no folder a/b in {Path.cwd()}, ")
    assert f"the Hub ({constants.ENDPOINT}) is out of reach" in message
    assert advice in message


def test_offline_mode_is_out_of_reach_whatever_was_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    failure = explain_hub_failure("model", "a/b", OSError("We couldn't connect"))
    assert type(failure) is HubError


@pytest.mark.usefixtures("online")
def test_anything_else_is_told_in_its_own_first_line() -> None:
    failure = explain_hub_failure("dataset", "a/b", wrapped(ValueError("Broken.\nMuch more.")))

    assert type(failure) is DataError
    assert str(failure) == "dataset a/b cannot be loaded: Broken."


@pytest.mark.usefixtures("online")
def test_error_without_words_is_told_by_its_kind() -> None:
    failure = explain_hub_failure("model", "a/b", KeyError())

    assert type(failure) is ModelError
    assert str(failure) == "model a/b cannot be loaded: KeyError"


@pytest.mark.usefixtures("online")
def test_errors_that_name_each_other_end() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first

    assert "second" in str(explain_hub_failure("model", "a/b", first))
