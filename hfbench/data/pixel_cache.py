"""Decoded images, kept in the cache of `datasets` so that the next run does not decode them again.

A split is one file, named by a hash of everything that its pixels depend on, decoded into part by
part and memory-mapped when it is read. It is written beside its place and moved there, so that runs
at the same time never see half of one; at worst both decode.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_FORMAT = 2  # raise it when images are decoded in another way, or the file holds something else
_FOLDER = "hfbench-decoded"  # in HF_DATASETS_CACHE
_LENGTH = struct.Struct("<Q")  # before it: of the JSON that follows the pixels
_CHECKSUM = struct.Struct("<I")  # the last bytes of a file: CRC-32 of those before


@dataclass(frozen=True)
class Decoded:
    """What decoding a split gives; never to be written to, since it may be a file of the cache.

    Attributes:
        images: uint8, (N, 3, H, W).
        notes: What was changed on the way in, a sentence each.
        is_resized: Whether the pixels depend on the size and interpolation that were asked for.
        labels: int64, (N,), if they are stored with the images.
        label_names: Name of each class, if they are stored with the images.
    """

    images: Tensor
    notes: list[str] = field(default_factory=list)
    is_resized: bool = False
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    label_names: list[str] = field(default_factory=list)


class ShapeChangedError(Exception):
    """Images turned out to have another size than those before them: decode from the start."""


class Encoded(Protocol):
    """Images that are yet to be decoded, a part at a time; the last three hold after the last."""

    def parts(self) -> Iterator[np.ndarray]:
        """Yield uint8, (n, 3, H, W); after `ShapeChangedError` it is called again."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return that of the pixels, (N, 3, H, W)."""

    notes: list[str]
    is_resized: bool


def load_decoded(
    identity: Mapping[str, Any],
    resizing: Mapping[str, Any],
    decode: Callable[[], Decoded | Encoded],
    largest_kept: int | None = None,
) -> Decoded:
    """Read a split from the cache, or decode it and put it there.

    What is decoded in parts goes straight into its file, which is then mapped: of the pixels, no
    more than some parts are in the process's own memory.

    A cache that cannot be written to, or has no room, is said and changes nothing else.
    ``datasets.disable_caching()`` keeps it out.

    Args:
        identity: Everything that the pixels depend on; made of what JSON can hold.
        resizing: What they depend on as well if images have to be resized.
        decode: Raises, or its parts do, for images that cannot be used; nothing is kept then.
        largest_kept: How many pixels images may have that are not resized; ``None``: any number.
    """
    import datasets

    if not datasets.is_caching_enabled():
        return _in_memory(decode())
    folder = Path(datasets.config.HF_DATASETS_CACHE) / _FOLDER
    as_stored, resized = (folder / _file_name(key) for key in (identity, {**identity, **resizing}))
    for file in (as_stored, resized):
        found = _read(file)
        if found is None:
            continue
        # Of a run whose model saw larger images.
        if found.is_resized or math.prod(found.images.shape[2:]) <= (largest_kept or math.inf):
            return found
    content = decode()
    try:
        return _keep(content, as_stored, resized)
    except OSError as error:  # of the disk: one of an image is not raised as such
        logger.warning(f"Decoded images are not kept for the next run: {error}")
    return _in_memory(content)


def describe_file(path: str | os.PathLike[str]) -> list[str | int]:
    """Return what changes when a file does: its place, size in bytes and time of change."""
    try:
        found = os.stat(path)
    except OSError:  # decoding says what is wrong with it
        return [str(path)]
    return [str(path), found.st_size, found.st_mtime_ns]


def _file_name(identity: Mapping[str, Any]) -> str:
    import datasets
    import PIL
    import torchvision

    # Decoders and resizes differ between versions, by a grey level at most, but not in silence.
    versions = [_FORMAT, datasets.__version__, PIL.__version__, torchvision.__version__]
    text = json.dumps([versions, identity], sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()}.pixels"


def _in_memory(content: Decoded | Encoded) -> Decoded:
    """Decode into the process's own memory."""
    if isinstance(content, Decoded):
        return content

    def fill() -> np.ndarray:
        pixels, start = np.empty(content.shape, dtype=np.uint8), 0
        for part in content.parts():
            pixels[start : start + len(part)] = part
            start += len(part)
        return pixels

    pixels = _until_shaped(fill)
    return Decoded(torch.from_numpy(pixels), content.notes, content.is_resized)


def _until_shaped(decode: Callable[[], _Result]) -> _Result:
    try:
        return decode()
    except ShapeChangedError:  # to a shape that all images can have
        return decode()


def _keep(content: Decoded | Encoded, as_stored: Path, resized: Path) -> Decoded:
    """Write a split to the cache, and map it if it was decoded on the way.

    Raises:
        OSError: If it cannot be written.
    """
    temporary = as_stored.with_name(f"{as_stored.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        _until_shaped(lambda: _write(temporary, content))
        file = resized if content.is_resized else as_stored
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return content if isinstance(content, Decoded) else _map(file)


def _write(file: Path, content: Decoded | Encoded) -> None:
    """Write the pixels, what is said of them as JSON, and the length and checksum of all."""
    shape = tuple(content.images.shape) if isinstance(content, Decoded) else content.shape
    size, free = math.prod(shape), shutil.disk_usage(file.parent).free
    if size > free:
        raise OSError(
            f"they take {size / 2**30:,.1f} GiB, and {file.parent} has {free / 2**30:,.1f} GiB free"
        )
    with file.open("wb") as sink:
        checksum = 0
        parts = (content.images.numpy(),) if isinstance(content, Decoded) else content.parts()
        for part in parts:
            pixels = np.ascontiguousarray(part).data
            sink.write(pixels)
            checksum = zlib.crc32(pixels, checksum)
        said: dict[str, Any] = {
            "shape": shape,
            "notes": content.notes,
            "is_resized": content.is_resized,
        }
        if isinstance(content, Decoded):
            said |= {"labels": content.labels.tolist(), "label_names": content.label_names}
        text = json.dumps(said).encode()
        sink.write(text)
        ending = _LENGTH.pack(len(text))
        sink.write(ending)
        sink.write(_CHECKSUM.pack(zlib.crc32(ending, zlib.crc32(text, checksum))))


def _read(file: Path) -> Decoded | None:
    """Map a file of the cache; ``None`` if there is none, or it is damaged."""
    if not file.is_file():
        return None
    try:
        if not _is_whole(file):
            raise ValueError("its checksum is wrong")
        return _map(file)
    except (OSError, ValueError) as error:
        logger.info(f"Images are decoded again, since {file} cannot be read: {error}")
        return None


def _map(file: Path) -> Decoded:
    """Map the pixels of a file: the system reads them when they are used, and may drop them."""
    import pyarrow as pa

    with file.open("rb") as source:
        behind = source.seek(-_LENGTH.size - _CHECKSUM.size, os.SEEK_END)
        (length,) = _LENGTH.unpack(source.read(_LENGTH.size))
        source.seek(behind - length)
        said = json.loads(source.read(length))
    size = math.prod(said["shape"])
    pixels = np.memmap(file, np.uint8, "r", shape=(size,)) if size else np.empty(0, np.uint8)
    flat = pa.Array.from_buffers(pa.uint8(), size, [None, pa.py_buffer(pixels)])
    return Decoded(
        # By way of DLPack: from_numpy warns of memory that is read-only.
        torch.utils.dlpack.from_dlpack(flat).view(said["shape"]),
        said["notes"],
        said["is_resized"],
        torch.tensor(said.get("labels", []), dtype=torch.int64),
        said.get("label_names", []),
    )


def _is_whole(file: Path) -> bool:
    """Compare a file with its checksum, since Arrow may crash on a damaged one.

    This reads it through, at some gigabytes a second, so that the first epoch does not wait for the
    disk, and is as fast as that of the run that decoded.
    """
    end = file.stat().st_size - _CHECKSUM.size
    with file.open("rb") as source:
        source.seek(max(0, end))
        return end > 0 and source.read() == _CHECKSUM.pack(_checksum(file, end))


def _checksum(file: Path, size: int) -> int:
    """Return the CRC-32 of the first bytes of a file."""
    with (
        file.open("rb") as source,
        mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as whole,
        memoryview(whole) as content,
        content[:size] as part,
    ):
        return zlib.crc32(part)
