"""Labelled images in memory, and the batches that a loader is served.

Images are decoded once to uint8; `sources.py` reads them from wherever they are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hfbench.preprocessing import Preprocessing


@dataclass(frozen=True)
class ImageSplit:
    """Labelled images in memory.

    Attributes:
        images: uint8, (N, 3, H, W).
        labels: int64, (N,).
        label_names: Name of each class.
        index: int64, (N,): each image's position in the split that it was taken from.
        notes: What was changed on the way in, a sentence each.
        revision: Commit of the data set on the Hub, if it came from there.
    """

    images: Tensor
    labels: Tensor
    label_names: list[str]
    index: Tensor
    notes: list[str] = field(default_factory=list)
    revision: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, count: int | None, seed: int) -> ImageSplit:
        """Take a class-balanced subset; all of it if `count` is ``None`` or larger."""
        chosen = torch.from_numpy(balanced_subset(self.labels.numpy(), count, seed))
        if len(chosen) == len(self):
            return self
        return replace(
            self, images=self.images[chosen], labels=self.labels[chosen], index=self.index[chosen]
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of shape, pixels and labels, in order."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


class ImageBatches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Serve whole batches of an `ImageSplit` to a `DataLoader`, asked by sample number.

    A sample number is ``epoch * len + index``: the epoch travels with the request, so that a worker
    that outlives an epoch cannot draw the augmentation of the last one.
    """

    def __init__(
        self, split: ImageSplit, preprocessing: Preprocessing, location: str, augment: bool
    ) -> None:
        self.split = split
        self.preprocessing = preprocessing
        self.location = location
        self.augment = augment

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, samples: list[int]) -> dict[str, Tensor]:
        """Return ``pixel_values`` and ``labels``; to augment on the device, ``sample`` too."""
        sample = torch.tensor(samples, dtype=torch.int64)
        index = sample % len(self.split)
        images, labels = self.split.images[index], self.split.labels[index]
        if self.location == "device":
            batch = {"pixel_values": images, "labels": labels}
            return batch | {"sample": sample} if self.augment else batch
        return {
            "pixel_values": self.preprocessing(images, sample if self.augment else None),
            "labels": labels,
        }

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([sample]).items()}


def balanced_subset(labels: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Choose images so that classes are as equally represented as they can be.

    Args:
        labels: int64, (N,).
        count: How many to take; all if ``None`` or at least N.
        seed: Of the choice.

    Returns:
        int64, (count,): ascending positions.
    """
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    # How many of its own class stand before each image, in shuffled order; taking the lowest ranks
    # first takes one of each class, then a second of each, and so on: no two classes differ by more
    # than one while both have images left.
    rank = np.empty(len(labels), dtype=np.int64)
    seen: Counter[int] = Counter()
    for position in order:
        label = int(labels[position])
        rank[position] = seen[label]
        seen[label] += 1
    chosen = order[np.argsort(rank[order], kind="stable")][:count]
    return np.sort(chosen)
