"""From encoded images to one uint8 tensor: RGB, one size."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 256  # images that a thread decodes at a time: handing over each would cost as much again


def decode_images(encoded: Sequence[dict[str, Any] | None]) -> list[Image.Image | str]:
    """Decode images as `datasets` does.

    Args:
        encoded: As `datasets.Image(decode=False)` gives them: bytes, or where they lie.

    Returns:
        Each image, or what is wrong with it.
    """
    chunks = [encoded[start : start + _CHUNK] for start in range(0, len(encoded), _CHUNK)]
    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
        return list(chain.from_iterable(pool.map(_decode_chunk, chunks)))


def _decode_chunk(encoded: Sequence[dict[str, Any] | None]) -> list[Image.Image | str]:
    import datasets

    feature = datasets.Image()
    return [_decode(feature, entry) for entry in encoded]


def _decode(feature: Any, entry: dict[str, Any] | None) -> Image.Image | str:
    if entry is None:
        return "there is no image"
    try:
        picture: Image.Image = feature.decode_example(entry)
        picture.load()
    except Exception as error:  # PIL raises whatever the damaged bytes lead to
        return re.sub(r" <_io\.[^>]*>", "", str(error)) or type(error).__name__
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
