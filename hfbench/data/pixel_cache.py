"""Decoded images, kept in the cache of `datasets` so that the next run does not decode them again.

A split is one Arrow file, named by a hash of everything that its pixels depend on and memory-mapped
when it is read. It is written beside its place and moved there, so that runs at the same time never
see half of one; at worst both decode.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it when images are decoded in another way, or the file holds something else
_FOLDER = "hfbench-decoded"  # in HF_DATASETS_CACHE
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


def load_decoded(
    identity: Mapping[str, Any], resizing: Mapping[str, Any], decode: Callable[[], Decoded]
) -> Decoded:
    """Read a split from the cache, or decode it and put it there.

    A cache that cannot be written to, or has no room, is said and changes nothing else.
    ``datasets.disable_caching()`` keeps it out.

    Args:
        identity: Everything that the pixels depend on; made of what JSON can hold.
        resizing: What they depend on as well if images have to be resized.
        decode: Raises for images that cannot be used; nothing is kept then.
    """
    import datasets

    if not datasets.is_caching_enabled():
        return decode()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / _FOLDER
    as_stored, resized = (folder / _file_name(key) for key in (identity, {**identity, **resizing}))
    for file in (as_stored, resized):
        if (found := _read(file)) is not None:
            return found
    decoded = decode()
    _write(resized if decoded.is_resized else as_stored, decoded)
    return decoded


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
    return f"{hashlib.sha256(text.encode()).hexdigest()}.arrow"


def _read(file: Path) -> Decoded | None:
    """Map a file of the cache; ``None`` if there is none, or it is damaged."""
    import datasets
    import pyarrow as pa

    if not file.is_file():
        return None
    try:
        if not _is_whole(file):
            raise ValueError("its checksum is wrong")
        row = datasets.Dataset.from_file(str(file)).data  # one row, mapped, nothing is copied
        said = {name: row.column(name)[0].as_py() for name in row.column_names if name != "pixels"}
        buffer = row.column("pixels")[0].as_buffer()
        flat = pa.Array.from_buffers(pa.uint8(), buffer.size, [None, buffer])
        return Decoded(
            # By way of DLPack: from_numpy warns of memory that is read-only.
            torch.utils.dlpack.from_dlpack(flat).view(said["shape"]),
            said["notes"],
            said["is_resized"],
            torch.tensor(said["labels"], dtype=torch.int64),
            said["label_names"],
        )
    except (OSError, ValueError) as error:
        logger.info(f"Images are decoded again, since {file} cannot be read: {error}")
        return None


def _write(file: Path, decoded: Decoded) -> None:
    import pyarrow as pa

    pixels = decoded.images.numpy().reshape(-1)
    offsets = np.array([0, pixels.nbytes], dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(pixels)]
    columns = {
        "pixels": pa.Array.from_buffers(pa.large_binary(), 1, buffers),
        "shape": pa.array([list(decoded.images.shape)], pa.list_(pa.int64())),
        "notes": pa.array([decoded.notes], pa.list_(pa.string())),
        "is_resized": pa.array([decoded.is_resized]),
        "labels": pa.array([decoded.labels.numpy()], pa.list_(pa.int64())),
        "label_names": pa.array([decoded.label_names], pa.list_(pa.string())),
    }
    table = pa.table(columns)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as sink:
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                sink.flush()
                # Behind the end of the stream, where readers of Arrow do not look.
                sink.write(_CHECKSUM.pack(_checksum(temporary, sink.tell())))
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        logger.warning(f"Decoded images are not kept for the next run: {error}")


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
