"""What a server's answer means and what to do about it, in a sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfbench.errors import first_line

CACHED = "What is in the cache works without the Hub: HF_HUB_OFFLINE=1"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def chain_of(error: BaseException) -> list[BaseException]:
    """Return an exception and what it was raised from, outermost first."""
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) and below not in chain:
        chain.append(below)
    return chain


def kinds_of(chain: Sequence[BaseException]) -> set[str]:
    """Return the names of all classes that the exceptions belong to."""
    return {base.__name__ for link in chain for base in type(link).__mro__}


def say_answer(error: BaseException, name: str) -> str | None:
    """Say what a server answered where that is no matter of the name that was asked for.

    Args:
        error: What a client of the Hub raised.
        name: Of the model, data set or repository.

    Returns:
        What it is and what to do; ``None`` if it is something else.
    """
    chain = chain_of(error)
    for link in chain:
        response = getattr(link, "response", None)
        if getattr(response, "status_code", None) and (said := _say_status(response, link, name)):
            return said
    return _say_failure(chain, name)


def _say_status(response: Any, error: BaseException, name: str) -> str | None:
    """Say what a status other than "not found" means."""
    status, where = int(response.status_code), _endpoint()
    said = response.headers.get("X-Error-Message") or ""
    answered = f"{where} answers {status}" + (f' "{first_line(Exception(said))}"' if said else "")
    if status == 401:
        # Without a valid login the Hub says 401 of what does not exist, too.
        unknown = response.headers.get("X-Error-Code") == "RepoNotFound"
        if unknown or (not _token() and "RepositoryNotFoundError" in kinds_of([error])):
            return None
        wanted = 'it wants a login: "hf auth login", or HF_TOKEN'
        return f"{answered} for {name}: {_say_token() if _token() else wanted}"
    if status == 403 and "GatedRepoError" in kinds_of([error]):
        return None
    if status == 403 and "DisabledRepoError" in kinds_of([error]):
        return f"{answered} for {name}: the Hub has disabled it; use another one."
    if status == 403:
        return (
            f"{answered} for {name}: {_token_source() or 'who has no login'} may not do that. "
            'Ask its owner for access, or log in with "hf auth login" and a token that may; a '
            "proxy that forbids the address says the same."
        )
    if status == 407:
        return "The proxy asks for a login (407): write it into HTTPS_PROXY=http://USER:…@HOST:PORT"
    if status == 429:
        wait = _seconds(response.headers.get("Retry-After"))
        when = f"in {wait}" if wait else "in some minutes"
        more = "" if _token() else ' A login is allowed more: "hf auth login".'
        return f"{answered}: too many requests came from here. Try again {when}.{more} {CACHED}"
    if status >= 500:
        wait = _seconds(response.headers.get("Retry-After"))
        when = f"in {wait}" if wait else "later"
        return f"{answered}: the server is out of order or busy. Try again {when}. {CACHED}"
    return None


def _say_failure(chain: Sequence[BaseException], name: str) -> str | None:
    """Say what an answer without a status of its own means."""
    kinds, where = kinds_of(chain), _endpoint()
    texts = " ".join(str(link) for link in chain)
    advice = (
        "A network may want a login first (open any page in a browser), a proxy may be in between "
        "(HTTPS_PROXY), or HF_ENDPOINT may be wrong."
    )
    if "CERTIFICATE_VERIFY_FAILED" in texts:
        return (
            f"The certificate of {where} is not trusted: a proxy may put its own in its place. "
            "Name the file of its authority: SSL_CERT_FILE=FILE"
        )
    if "FileMetadataError" in kinds:
        return f"{where} answers with something else than the Hub for {name}. {advice}"
    if "TooManyRedirects" in kinds:
        return f"{where} sends from address to address without end for {name}. {advice}"
    if "ProxyError" in kinds:
        last = next(link for link in chain if "ProxyError" in kinds_of([link]))
        return (
            f"The proxy before {where} refuses: {first_line(last)}. See HTTPS_PROXY and NO_PROXY."
        )
    if kinds & {"JSONDecodeError", "SafetensorError", "UnicodeDecodeError"}:
        return (
            f"A file of {name} that came from {where} is damaged, or another page than asked for: "
            f"{first_line(chain[0])} Remove it from the cache ({_cache()}) and try again. {advice}"
        )
    broken = {"RemoteProtocolError", "ReadError", "IncompleteRead", "ConnectionResetError"}
    if kinds & broken or "Consistency check failed" in texts or "ChunkedEncodingError" in kinds:
        return (
            f"The connection to {where} broke while {name} was fetched. Try again; what has "
            f"arrived is kept. {CACHED}"
        )
    return say_cache_trouble(chain)


def say_cache_trouble(chain: Sequence[BaseException]) -> str | None:
    """Say that the cache cannot take what was fetched or prepared, if that is what was raised."""
    for link in chain:
        if isinstance(link, OSError) and link.errno in (*_FULL, *_UNWRITABLE) and link.filename:
            trouble = "is full" if link.errno in _FULL else "cannot be written to"
            return (
                f"The cache {trouble}: {link.strerror}: {link.filename}. Another one: "
                "HF_HOME=FOLDER"
            )
    return None


def _say_token() -> str:
    source = _token_source() or "the token"
    variable = source.removeprefix("the token in ")
    again, without = 'log in again with "hf auth login"', 'log out with "hf auth logout"'
    if variable != source:
        again = f"{again} and unset {variable}, which goes before the login"
        without = f"unset {variable}"
    return (
        f"{source} is not valid, or not any more. For what is private, {again}; for what is "
        f"public, {without}. {CACHED}"
    )


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _token_source() -> str | None:
    """Say where the token comes from that the clients send, never what it is."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"the token in {name}"
    return "the token of the login" if _token() else None


def _seconds(text: str | None) -> str | None:
    """Read ``Retry-After``, which may be a date instead."""
    return f"{int(text)} s" if text and text.strip().isdecimal() else None


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
