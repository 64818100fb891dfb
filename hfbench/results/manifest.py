"""Which checkpoint of a run is whole: each is sealed by a list of its files, written last."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfbench.results.schema import digest_of, write_json

MANIFEST_FILE = "manifest.json"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_BEFORE = "before-"  # a checkpoint of the same step while it is written anew

logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Write ``manifest.json``: name, size in bytes and SHA-256 of every file of a checkpoint.

    All of them are on the disk before it, and it is before this returns.

    Raises:
        OSError: If something cannot be written.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_FILE:
            _sync(path)
            name = str(path.relative_to(folder))
            files[name] = {"size": path.stat().st_size, "sha256": digest_of(path)}
    _sync(folder)
    write_json({"files": files}, folder / MANIFEST_FILE)
    _sync(folder)


def find_damage(folder: Path) -> str | None:
    """Say why a checkpoint is not whole, as part of a sentence; ``None`` if it is."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_bytes())
        listed = {str(name): (entry["size"], entry["sha256"]) for name, entry in _items(content)}
    except FileNotFoundError:
        return f"{MANIFEST_FILE}, which is written last, is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST_FILE} is damaged"
    for name, (size, digest) in listed.items():
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if digest_of(folder / name) != digest:
                return f"{name} has been changed or damaged"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest whole checkpoint of a run's folder; what is not whole is said."""
    numbered = sorted(_checkpoints_of(run), key=lambda item: (item[0], item[1].name))
    for _, path in reversed(numbered):
        damage = find_damage(path)
        if damage is None:
            return _in_its_place(path)
        logger.warning(f"{path} is not whole and is left out. There, {damage}.")
    return None


def has_checkpoint(run: Path) -> bool:
    """Tell whether a run's folder holds a sealed checkpoint, whole or not; quick."""
    return any((path / MANIFEST_FILE).exists() for _, path in _checkpoints_of(run))


@contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Keep a checkpoint of the same step until the new one, written inside, is sealed."""
    before = folder.with_name(_BEFORE + folder.name)
    if folder.is_dir():
        shutil.rmtree(before, ignore_errors=True)
        folder.replace(before)
    yield
    shutil.rmtree(before, ignore_errors=True)


def _checkpoints_of(run: Path) -> Iterator[tuple[int, Path]]:
    with contextlib.suppress(OSError):
        for path in (run / "checkpoints").iterdir():
            found = _CHECKPOINT.fullmatch(path.name.removeprefix(_BEFORE))
            if found and path.is_dir():
                yield int(found[1]), path


def _in_its_place(path: Path) -> Path:
    """Give a checkpoint that was to be replaced its name back."""
    place = path.with_name(path.name.removeprefix(_BEFORE))
    if place != path:
        shutil.rmtree(place, ignore_errors=True)
        path.replace(place)
    return place


def _items(content: dict[str, dict[str, dict[str, object]]]) -> list[tuple[str, dict[str, object]]]:
    if not content["files"]:
        raise ValueError("no files")
    return list(content["files"].items())


def _sync(place: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    if os.name == "nt":  # Windows opens no folders, and syncs no file that is only read
        return
    number = os.open(place, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
