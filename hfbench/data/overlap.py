"""What two splits have in common: equal images, and classes that only one of them has."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np

from hfbench.data.images import ImageSplit
from hfbench.errors import listed

_CHUNK = 1024  # images
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Overlap:
    """Images that are equal, pixel by pixel, as they were decoded.

    Attributes:
        test_in_train: Test images that are training images too.
        test_doubles: Test images that are equal to one before them.
        train_doubles: Training images that are equal to one before them.
    """

    test_in_train: int
    test_doubles: int
    train_doubles: int


def find_overlap(train: ImageSplit, test: ImageSplit) -> Overlap:
    """Count equal images; what is decoded is looked at once more, at memory's speed."""
    trained, tested = _digests(train), _digests(test)
    known = set(trained)
    return Overlap(
        test_in_train=sum(digest in known for digest in tested),
        test_doubles=len(tested) - len(set(tested)),
        train_doubles=len(trained) - len(known),
    )


def say_overlap(overlap: Overlap, train_images: int, test_images: int) -> list[str]:
    """Say what is equal, a sentence each, the worst first; nothing where nothing is."""
    said = []
    if overlap.test_in_train:
        said.append(
            f"{overlap.test_in_train:,} of {test_images:,} test images were trained on: equal "
            "images are in the training split."
        )
    for count, total, split in (
        (overlap.test_doubles, test_images, "test"),
        (overlap.train_doubles, train_images, "training"),
    ):
        if count:
            said.append(f"{count:,} of {total:,} {split} images are doubles of others there.")
    return said


def say_classes(train: ImageSplit, test: ImageSplit) -> list[str]:
    """Say which classes only one split has, or none, and which are called almost alike."""
    names = train.label_names
    trained, tested = (
        np.bincount(split.labels.numpy(), minlength=len(names)) for split in (train, test)
    )
    said = []
    for here, there, split, consequence in (
        (tested, trained, "training", "none of them can be right"),
        (trained, tested, "test", "nothing is measured of them"),
    ):
        missing = [name for name, a, b in zip(names, here, there, strict=True) if a and not b]
        if missing:
            other = "test" if split == "training" else "training"
            images = int(here[[names.index(name) for name in missing]].sum())
            said.append(
                f"No {split} image is of {_classes(missing)}, but {images:,} of "
                f"{int(here.sum()):,} {other} images are: {consequence}."
            )
    unused = [n for n, a, b in zip(names, trained, tested, strict=True) if not a and not b]
    if unused:
        said.append(f"No image at all is of {_classes(unused)}; F1 leaves them out.")
    return said + [
        f"The classes {listed(alike)} differ in writing alone; are they one?"
        for alike in _alike(names)
    ]


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {listed(names)}"


def _alike(names: Sequence[str]) -> list[list[str]]:
    """Return names that are equal but for case, blanks and the way that letters are composed."""
    groups: dict[str, list[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        seen = "".join(c for c in plain if unicodedata.category(c) != "Cf")  # marks that none sees
        bare = " ".join(re.sub(r"(?<=\w)[_-]+(?=\w)", " ", seen).split())
        groups.setdefault(bare, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _digests(split: ImageSplit) -> list[bytes]:
    """Return a digest of each image's pixels; hashing leaves the interpreter to other threads."""
    shape = str(tuple(split.images.shape[1:])).encode()  # equal bytes may be another image
    images = split.images.contiguous().numpy().reshape(len(split), -1)

    def digest(start: int) -> list[bytes]:
        rows = images[start : start + _CHUNK]
        return [
            hashlib.blake2b(row.data, digest_size=_DIGEST_BYTES, key=shape).digest() for row in rows
        ]

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return list(chain.from_iterable(threads.map(digest, range(0, len(images), _CHUNK))))
