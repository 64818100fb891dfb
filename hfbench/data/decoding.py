"""From encoded images to one uint8 tensor: RGB, one size."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from hfbench.machine.bounds import require_memory

if TYPE_CHECKING:
    from PIL import Image

_LONGEST_MESSAGE = 1000
_SHARE = 0.8  # of the free memory, for decoded images
_ELSEWHERE = re.compile(r"(^|::)(?!zip:|gzip:|tar:|file:)[A-Za-z][A-Za-z0-9+.\-]*://")
_CHUNK = 256  # images that a thread decodes at a time: handing over each would cost as much again


def decode_images(encoded: Sequence[dict[str, Any] | None]) -> list[Image.Image | str]:
    """Decode images as `datasets` does.

    Args:
        encoded: As `datasets.Image(decode=False)` gives them: bytes, or where they lie.

    Returns:
        Each image, or what is wrong with it.
    """
    room = _Room()
    chunks = [encoded[start : start + _CHUNK] for start in range(0, len(encoded), _CHUNK)]
    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
        return list(chain.from_iterable(pool.map(lambda chunk: _decode_chunk(chunk, room), chunks)))


class _Room:
    """Counts the bytes of decoded images, of which the free memory must hold all."""

    def __init__(self) -> None:
        import psutil

        self.left = int(_SHARE * psutil.virtual_memory().available)

    def take(self, picture: Image.Image) -> None:
        # Threads may lose an update to each other, of the few images that they hold.
        self.left -= picture.width * picture.height * len(picture.getbands())


def _decode_chunk(encoded: Sequence[dict[str, Any] | None], room: _Room) -> list[Image.Image | str]:
    import datasets

    feature = datasets.Image()
    return [_decode(feature, entry, room) for entry in encoded]


def _decode(feature: Any, entry: dict[str, Any] | None, room: _Room) -> Image.Image | str:
    if entry is None:
        return "there is no image"
    if room.left <= 0:
        return "the images before it fill the memory; train on fewer or smaller ones"
    path = entry.get("path")
    if entry.get("bytes") is None and path:
        if _ELSEWHERE.search(path):
            return "it lies on another machine; download it first"
        if os.path.exists(path) and not os.path.isfile(path):
            return "it is no file"  # a pipe would be waited for
    try:
        picture: Image.Image = feature.decode_example(entry)
        picture.load()
    except Exception as error:  # PIL raises whatever the damaged bytes lead to
        said = str(error)[:_LONGEST_MESSAGE]
        return re.sub(r" <_io\.[^>]*>", "", said) or type(error).__name__
    room.take(picture)
    if picture.mode[0] in "IF":
        return "it has more than 8 bits a channel; convert it to 8 bits"
    return picture


def stack_images(
    pictures: Sequence[Image.Image], where: Sequence[str], image_size: int, interpolation: str
) -> tuple[Tensor, list[str]]:
    """Bring decoded images to RGB and one size.

    If more than half have one size, the others are resized to it; if no size prevails, all are
    resized to `image_size`.

    Returns:
        uint8, (N, 3, H, W), and what was changed, a sentence each.
    """
    notes = []
    grey = [name for name, picture in zip(where, pictures, strict=True) if picture.mode != "RGB"]
    if grey:
        notes.append(
            f"{len(grey)} of {len(pictures)} images are not RGB and were converted; the first is "
            f"{grey[0]}."
        )
    size, count = Counter(picture.size for picture in pictures).most_common(1)[0]
    if count < len(pictures):
        if 2 * count <= len(pictures):
            size = (image_size, image_size)
        odd = [name for name, picture in zip(where, pictures, strict=True) if picture.size != size]
        notes.append(
            f"{len(odd)} of {len(pictures)} images were resized to {size[0]} x {size[1]}, since "
            f"sizes are mixed; the first is {odd[0]}."
        )
    require_memory(
        len(pictures) * 3 * size[0] * size[1],
        f"dataset: {len(pictures):,} images of {size[0]} x {size[1]}",
        "train on fewer, with dataset.max_train_samples and dataset.max_eval_samples, or smaller "
        "ones",
    )
    images = torch.empty((len(pictures), 3, size[1], size[0]), dtype=torch.uint8)
    mode = InterpolationMode(interpolation)
    for position, picture in enumerate(pictures):
        image = torch.from_numpy(np.array(_to_rgb(picture))).permute(2, 0, 1)
        # The same resize as in `Preprocessing`: if no size prevails, the model sees what `pipeline`
        # would show it.
        images[position] = (
            image
            if picture.size == size
            else F.resize(image, [size[1], size[0]], mode, antialias=True)
        )
    return images, notes


def _to_rgb(picture: Image.Image) -> Image.Image:
    # By way of RGBA, else PIL warns of a palette with transparency; the colours are the same.
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # convert copies
