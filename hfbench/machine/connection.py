"""Whether the Hub can be reached, and what to tell a user when something from it cannot be had."""

from __future__ import annotations

import logging
import os
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from hfbench.errors import DataError, HfbenchError, HubError, ModelError, first_line
from hfbench.machine.answers import chain_of, kinds_of, say_answer

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 5
_switched_off = False  # whether it was hfbench, not the user, that switched the clients offline

_OFFLINE_ADVICE = {
    "dataset": (
        "dataset.name_or_path=FOLDER (parquet, save_to_disk, imagefolder, or CIFAR's own archive), "
        "dataset.name_or_path=digits dataset.image_column=image dataset.label_column=label, or "
        "dataset.name_or_path=synthetic"
    ),
    "model": (
        "model.name_or_path=FOLDER with config.json and weights, or model.pretrained=false for "
        "fresh weights of a timm architecture or of google/vit-base-patch16-224-in21k"
    ),
}


def use_cache_if_unreachable() -> None:
    """Switch the Hub's clients to their caches if its server does not answer.

    They would otherwise retry for 23 s for each of data set, model and processor before they fail.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _server_answers(constants.ENDPOINT):
        return
    logger.warning(f"{constants.ENDPOINT} does not answer; using only what is in the cache.")
    global _switched_off
    _switched_off = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it copied the switch when it was imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def switched_off() -> bool:
    """Tell whether it was hfbench that switched the clients offline."""
    return _switched_off


def note_switched_off(value: bool) -> None:
    """Note whether it is hfbench that has the clients offline."""
    global _switched_off
    _switched_off = value


def explain_hub_failure(
    kind: str, name: str, error: BaseException, option: str | None = None
) -> HfbenchError:
    """Turn what a client raised into one sentence that says what to do.

    Args:
        kind: ``dataset`` or ``model``.
        name: As the recipe has it.
        error: What `datasets` or `transformers` raised.
        option: What the name was given as; by default the recipe's ``<kind>.name_or_path``.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    chain = chain_of(error)
    kinds = kinds_of(chain)
    not_here = f"there is no folder {name} in {Path.cwd()}"
    failure = DataError if kind == "dataset" else ModelError
    if _is_gated(chain):
        folder = "datasets/" if kind == "dataset" else ""
        return HubError(
            f"{name} is gated: accept its terms on the Hub ({constants.ENDPOINT}/{folder}{name}), "
            'then log in with "hf auth login".'
        )
    if any(isinstance(link, hub.RevisionNotFoundError) for link in chain):
        return failure(f"{kind}.revision: {name} has no such revision; leave it null for main.")
    if not constants.HF_HUB_OFFLINE and (said := say_answer(error, name)):
        return HubError(f"{option or kind + '.name_or_path'}: {said}")
    offline = constants.HF_HUB_OFFLINE or kinds & {
        "ConnectionError",
        "ConnectError",
        "TimeoutException",
        "Timeout",
    }
    if offline:
        why = f"the Hub ({constants.ENDPOINT}) is out of reach"
        if constants.HF_HUB_OFFLINE and not _switched_off:
            why = "HF_HUB_OFFLINE forbids to ask the Hub"
        advice = _OFFLINE_ADVICE[kind] if option is None else "a folder"
        return HubError(
            f"{option or kind + '.name_or_path'}: {not_here}, {name} is not in the cache, and "
            f"{why}. Offline works: {advice}."
        )
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}:
        return failure(
            f"{option or kind + '.name_or_path'}: {not_here}, and no {kind} of that name on the "
            f"Hub (or it is private: log in with "
            '"hf auth login").'
        )
    # A StopIteration at the bottom of a JSONDecodeError says only 0.
    telling = [link for link in chain if any(map(str.isalpha, first_line(link)))]
    return failure(f"{kind} {name} cannot be loaded: {first_line([error, *telling][-1])}")


def _is_gated(chain: Sequence[BaseException]) -> bool:
    """Tell whether terms have to be accepted; `datasets` says it in words alone."""
    from huggingface_hub import errors as hub

    return any(
        isinstance(link, hub.GatedRepoError)
        or (type(link).__name__ == "DatasetNotFoundError" and "gated dataset" in str(link))
        for link in chain
    )


def _server_answers(endpoint: str) -> bool:
    """Tell whether the server, or the proxy that leads there, takes a TCP connection."""
    url = urllib.parse.urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=_TIMEOUT_SECONDS).close()
    except (OSError, ValueError):  # ValueError: an address whose port is no number
        return False
    return True
