"""What is kept of the logits of each image: memory must not grow with the number of classes.

Trainer holds what an evaluation has seen until its end. These are a handful of numbers an image,
taken on the device batch by batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOP_K = 5


@dataclass(frozen=True)
class Scores:
    """What a model said about some images.

    Attributes:
        prediction: int64, (N,): the most probable class.
        probability: float32, (N,): of the predicted class; not finite if the training diverged.
        log_probability: float32, (N,): natural logarithm of the true class's probability.
        top: int64, (N, K): the most probable classes, best first; K is five, or all classes.
    """

    prediction: np.ndarray
    probability: np.ndarray
    log_probability: np.ndarray
    top: np.ndarray

    @classmethod
    def unpack(cls, packed: Any) -> Scores:
        """Read what `pack` wrote, (N, 3 + K)."""
        packed = np.asarray(packed)
        return cls(
            prediction=packed[:, 0].astype(np.int64),
            probability=packed[:, 1].astype(np.float32),
            log_probability=packed[:, 2].astype(np.float32),
            top=packed[:, 3:].astype(np.int64),
        )


def pack(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Reduce a batch's logits, as ``preprocess_logits_for_metrics`` of `Trainer`.

    Args:
        logits: float, (N, C).
        labels: int, (N,).

    Returns:
        float32, (N, 3 + K), what `Scores` says side by side: one tensor is gathered at once, and
        float32 holds class numbers up to 16,777,216.
    """
    values = (logits[0] if isinstance(logits, tuple) else logits).float()
    log_probabilities = values.log_softmax(dim=1)
    # Of equal logits argmax and topk may choose different ones.
    prediction = values.argmax(dim=1, keepdim=True)
    parts = [
        prediction.float(),
        log_probabilities.gather(1, prediction).exp(),
        log_probabilities.gather(1, labels.long()[:, None]),
        values.topk(min(TOP_K, values.shape[1]), dim=1).indices.float(),
    ]
    return torch.cat(parts, dim=1)
