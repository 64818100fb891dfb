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
    from hfbench.data.transforms import Preprocessing


_LARGEST_SHARE = 0.25  # of a device's free memory


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
    _copies: dict[torch.device, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _label_copies: dict[torch.device, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, object]:
        # A worker that is started anew gets no memory of an accelerator.
        return {**self.__dict__, "_copies": {}, "_label_copies": {}}

    def images_on(self, device: torch.device) -> Tensor | None:
        """Return the images in a device's memory, copied once; ``None`` if they are too many.

        They may take up a quarter of what is free, so that a model has room to be trained in.
        """
        if device == self.images.device:
            return self.images
        if device not in self._copies:
            if self.images.nbytes > _free_memory(device) * _LARGEST_SHARE:
                return None
            self._copies[device] = self.images.to(device)
        return self._copies[device]

    def labels_on(self, device: torch.device) -> Tensor:
        """Return the labels in a device's memory, copied once."""
        if device == self.labels.device:
            return self.labels
        if device not in self._label_copies:
            self._label_copies[device] = self.labels.to(device)
        return self._label_copies[device]

    def leave_devices(self) -> None:
        """Give back the memory that the images and labels take up on accelerators."""
        self._copies.clear()
        self._label_copies.clear()

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

    Attributes:
        device: Where the images lie and batches are gathered; ``None``: in the loader, on the host.
    """

    def __init__(
        self,
        split: ImageSplit,
        preprocessing: Preprocessing,
        location: str,
        augment: bool,
        device: torch.device | None = None,
    ) -> None:
        """Decide where batches are put together.

        Args:
            split: The images.
            preprocessing: What is done to them; on the device it is the trainer's to do.
            location: ``host`` or ``device``, as in a recipe.
            augment: Whether they are trained on.
            device: With the location ``device``: in whose memory the images are to lie, if they
                fit.
        """
        self.split = split
        self.preprocessing = preprocessing
        self.location = location
        self.augment = augment
        resident = location == "device" and device and split.images_on(device) is not None
        self.device = device if resident else None

    def __len__(self) -> int:
        return len(self.split)

    def for_evaluation(self, split: ImageSplit) -> ImageBatches:
        """Serve other images from the same place, without augmentation."""
        return ImageBatches(split, self.preprocessing, self.location, False, self.device)

    def __getitems__(self, samples: list[int]) -> dict[str, Tensor]:
        """Return a batch.

        Of images that lie on the device, the numbers alone, int64 (N,), which `gather` takes:
        ``sample`` of those that are trained on, else ``index``. Otherwise ``labels``, int64 (N,),
        and, where images are mixed, ``mixed_labels``, float32 (N, C); on the host,
        ``pixel_values`` ready for the model; for the device, uint8 ``pixel_values``, to augment,
        ``sample`` too, and to mix, ``partner_sample`` and ``partner_pixel_values``.
        """
        sample = torch.tensor(samples, dtype=torch.int64)
        if self.device is not None:
            return {"sample" if self.augment else "index": sample}
        batch = self._gather(sample, self.preprocessing, self.split.images, self.split.labels)
        if self.location == "host":
            batch["pixel_values"] = self.preprocessing(
                batch["pixel_values"],
                batch.pop("sample", None),
                batch.pop("partner_pixel_values", None),
                batch.pop("partner_sample", None),
            )
        return batch

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([sample]).items()}

    def gather(self, sample: Tensor, preprocessing: Preprocessing) -> dict[str, Tensor]:
        """Take a batch out of the device's memory: all of it but the numbers is there already.

        Args:
            sample: int64, (N,), as in a batch, on the device.
            preprocessing: The trainer's, which is there too.

        Returns:
            What `__getitems__` serves for the device of images that do not lie there.
        """
        images = self.split.images_on(sample.device)
        if images is None:
            raise RuntimeError(f"The images do not lie on {sample.device}.")
        return self._gather(sample, preprocessing, images, self.split.labels_on(sample.device))

    def _gather(
        self, sample: Tensor, preprocessing: Preprocessing, images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        length = len(self.split)
        index = sample % length
        own = labels.index_select(0, index)
        # Not by indexing, which is 15 times as slow (32 images of 32 px, one thread).
        batch = {"pixel_values": images.index_select(0, index), "labels": own}
        if not self.augment:
            return batch
        batch["sample"] = sample
        if preprocessing.mixes:
            partner = preprocessing.partners(sample, length)
            other = partner % length
            batch["partner_sample"] = partner
            batch["partner_pixel_values"] = images.index_select(0, other)
            batch["mixed_labels"] = preprocessing.mixed_labels(
                own,
                labels.index_select(0, other),
                sample,
                (images.shape[2], images.shape[3]),
                len(self.split.label_names),
            )
        return batch


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


def _free_memory(device: torch.device) -> int:
    """Return how many bytes are free on an accelerator; 0 if it does not say.

    What torch has taken from the driver and does not use now is free too: after training, that is
    most of the memory.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return 0
    cached = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0]) + int(cached)
