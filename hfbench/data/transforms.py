"""From uint8 images to a model's input: one module for training and testing, host and device.

Randomness is a function of (seed, epoch, index of the image) alone, so that neither the number of
workers nor a resume nor the place where it runs changes what a model sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from hfbench.data.augmentation import (
    cutmix_box,
    cutout,
    draw,
    mix_labels,
    mix_pixels,
    mixup_share,
    on_cpu,
    random_color,
    random_crop,
    random_horizontal_flip,
    stream_offsets,
)
from hfbench.data.resizing import resize_exactly

_MIXING = ("mixup", "cutmix")
# Streams of mixing, far behind the two that each entry of the list has at its place.
_PARTNER, _CHOICE, _SHARE, _ROW, _COLUMN = range(1000, 1005)


@dataclass(frozen=True)
class Normalization:
    """What a checkpoint expects of its input.

    Attributes:
        image_size: Height and width.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``.
        mean: Of each channel as the model takes them, in [0, 1].
        std: Of each channel, in [0, 1].
        bgr: Whether the model takes blue first.
    """

    image_size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False


class Preprocessing(nn.Module):
    """Augment, resize and normalise a batch.

    It belongs to the trainer, not to the model, so that checkpoints hold the model alone.

    Attributes:
        dtype: Of the output.
        mixes: Whether training images are mixed with partners, and so have labels of several
            classes.
    """

    # What does not depend on the batch; moves with the module.
    offsets: Tensor  # of the streams of the augmentation, two an entry
    mixing_offsets: Tensor
    partner_offsets: Tensor
    grey: Tensor  # uint8, (1, C, 1, 1): the mean in grey levels, red first
    mean: Tensor  # (1, C, 1, 1), of 255
    scale: Tensor
    mean_of_row: Tensor  # (image_size * C,), of the pixels of a row one after the other
    scale_of_row: Tensor

    def __init__(
        self,
        normalization: Normalization,
        augmentation: Sequence[str],
        seed: int,
        memory_format: Literal["contiguous", "channels_last"] = "contiguous",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Fix what all batches have in common.

        Args:
            normalization: What the checkpoint expects.
            augmentation: As in a recipe: what is done to training images, in this order; mixing
                comes last wherever it stands.
            seed: Of the run.
            memory_format: In which the output lies in memory; its values are the same.
            dtype: Of the output; float32 is computed and then rounded, as autocast would do.
        """
        super().__init__()
        self.normalization = normalization
        self.augmentation = tuple(augmentation)
        self.seed = seed
        self.memory_format = memory_format
        self.dtype = dtype
        self.mixes = any(name in _MIXING for name in augmentation)
        self._steps = [(n, name) for n, name in enumerate(augmentation) if name not in _MIXING]
        streams = [2 * place + which for place, _ in self._steps for which in (0, 1)]
        mean = torch.tensor(normalization.mean) * 255
        scale = 1 / (torch.tensor(normalization.std) * 255)
        size = normalization.image_size
        for name, value in {
            "offsets": stream_offsets(seed, streams),
            "mixing_offsets": stream_offsets(seed, [_CHOICE, _SHARE, _ROW, _COLUMN]),
            "partner_offsets": stream_offsets(seed, [_PARTNER]),
            "grey": (mean.flip(0) if normalization.bgr else mean)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
            .view(1, -1, 1, 1),
            "mean": mean.view(1, -1, 1, 1),
            "scale": scale.view(1, -1, 1, 1),
            "mean_of_row": mean.repeat(size),
            "scale_of_row": scale.repeat(size),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(
        self,
        images: Tensor,
        sample: Tensor | None = None,
        partner: Tensor | None = None,
        partner_sample: Tensor | None = None,
    ) -> Tensor:
        """Prepare a batch.

        Args:
            images: uint8, (N, 3, H, W).
            sample: int64, (N,), unique to each epoch and image; ``None`` at test time, for no
                augmentation.
            partner: uint8, (N, 3, H, W): what the images are mixed with, where they are.
            partner_sample: int64, (N,), of the partners, from `partners`.

        Returns:
            (N, 3, image_size, image_size), of the module's `dtype`.
        """
        if sample is not None:
            images = self._augment(images, sample)
        if sample is not None and partner is not None and partner_sample is not None:
            # In whole grey levels and before they are resized: one resize instead of two.
            partner = self._augment(partner, partner_sample)
            images = mix_pixels(images, partner, self._weights(sample, *images.shape[-2:]))
        if self.normalization.bgr:
            images = images.flip(1)  # the last step in grey levels; augmentation is of RGB
        return self._normalize(self._resize(images))

    def partners(self, sample: Tensor, length: int) -> Tensor:
        """Draw what each training image is mixed with, of the whole split.

        Args:
            sample: int64, (N,), ``epoch * length + index``.
            length: Images of the split.

        Returns:
            int64, (N,): sample numbers of the same epoch, so that a partner is augmented as it is
            by itself.
        """
        # In whole numbers, exact for any length: not every device has float64.
        number = (draw(sample, self.partner_offsets)[0] * 2**24).long()
        return sample - sample % length + ((number * length) >> 24)

    def mixed_labels(
        self,
        labels: Tensor,
        partner_labels: Tensor,
        sample: Tensor,
        size: tuple[int, int],
        num_classes: int,
    ) -> Tensor:
        """Return the probability of each class after mixing, float32, (N, num_classes).

        Args:
            labels: int64, (N,), of the images.
            partner_labels: int64, (N,).
            sample: int64, (N,), of the images.
            size: Height and width of the images before they are resized.
            num_classes: Of the data set.
        """
        choice, share, row, column = draw(sample, self.mixing_offsets)
        own = mixup_share(share)
        if "cutmix" in self.augmentation:
            rows, columns = cutmix_box(share, row, column, *size)
            pixels = size[0] * size[1]
            left = (pixels - rows.sum(1) * columns.sum(1)) / pixels
            own = torch.where(self._is_mixup(choice), own, left)
        return mix_labels(labels, partner_labels, own, num_classes)

    def _augment(self, images: Tensor, sample: Tensor) -> Tensor:
        if not self._steps:
            return images
        draws = draw(sample, self.offsets).unbind()
        for (_, name), first, second in zip(self._steps, draws[::2], draws[1::2], strict=True):
            if name == "random_crop":
                images = random_crop(images, first, second)
            elif name == "horizontal_flip":
                images = random_horizontal_flip(images, first)
            elif name == "color":
                images = random_color(images, first, second)
            else:
                images = cutout(images, first, second, self.grey)
        return images

    def _weights(self, sample: Tensor, height: int, width: int) -> Tensor:
        """Return how much of each pixel is the image's own."""
        choice, share, row, column = draw(sample, self.mixing_offsets)
        own = mixup_share(share).view(-1, 1, 1, 1)
        if "cutmix" not in self.augmentation:
            return own
        rows, columns = cutmix_box(share, row, column, height, width)
        box = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(self._is_mixup(choice).view(-1, 1, 1, 1), own, (~box).float())

    def _is_mixup(self, choice: Tensor) -> Tensor:
        """Tell which images get mixup rather than CutMix: half of them if both are listed."""
        return choice < (0.5 if "mixup" in self.augmentation else 0.0)

    def _resize(self, images: Tensor) -> Tensor:
        size = self.normalization.image_size
        interpolation = self.normalization.interpolation
        if images.shape[-2:] == (size, size):
            return images
        # On uint8, as PIL and the image processors do; on floats the result differs by up to
        # 0.0067.
        if not on_cpu(images) and interpolation != "nearest":
            # torchvision's pixels are those of a CPU on a CPU alone.
            last = self.memory_format == "channels_last"
            return resize_exactly(images, (size, size), interpolation, channels_last=last)
        if on_cpu(images):
            # Channel by channel torch is 5 times as slow (32 to 224 px, one thread).
            images = _channels_last(images)
        mode = InterpolationMode(interpolation)
        resized: Tensor = F.resize(images, [size, size], interpolation=mode, antialias=True)
        return resized

    def _normalize(self, images: Tensor) -> Tensor:
        last = self.memory_format == "channels_last"
        if last:
            images = _channels_last(images)
        if not on_cpu(images):
            # Two passes, which convert on the way: one reads a byte a value.
            values = torch.sub(images, self.mean)
            return torch.mul(values, self.scale, out=torch.empty_like(values, dtype=self.dtype))
        # In place: new memory for each step is 3.3 times as slow (64 images, 224 px, one thread),
        # and a table of 256 levels 3.5 times.
        if last:
            values = images.to(torch.float32)
            # Row by row, since a loop over three channels is no loop for a vector unit.
            rows = values.permute(0, 2, 3, 1).flatten(2)
            rows.sub_(self.mean_of_row).mul_(self.scale_of_row)
        else:
            values = images.to(torch.float32, memory_format=torch.contiguous_format)
            values.sub_(self.mean).mul_(self.scale)
        return values.to(self.dtype)


def _channels_last(images: Tensor) -> Tensor:
    if images.is_contiguous(memory_format=torch.channels_last):
        return images
    return torch.stack(images.unbind(1), dim=-1).permute(0, 3, 1, 2)
