"""What Trainer and accelerate do in every step for nothing, left out.

On two cores a step of `Trainer` takes 0.6 to 1.4 ms more than a plain loop's, the more modules a
model has; most of it are walks over all modules (`python -m tests.benchmarks.overhead`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import accelerate.optimizer
from torch import nn


def ask_once_for_lomo() -> None:
    """Let accelerate look for a package once, not twice in each optimizer step.

    Its `AcceleratedOptimizer.step` has no hook around ``find_spec``, which reads folders.
    """
    asked = getattr(accelerate.optimizer, "is_lomo_available", None)
    if asked is not None and not hasattr(asked, "cache_info"):
        accelerate.optimizer.is_lomo_available = functools.cache(asked)


@contextmanager
def without_walks(model: nn.Module) -> Iterator[None]:
    """Spare a model that is training the walks that change nothing, while inside.

    Trainer calls ``model.train()`` in each micro-batch, ``model.zero_grad()`` and, to clip,
    ``model.parameters()`` in each step; all visit every module.

    Args:
        model: As the training loop calls it, wrapped; its parameters stay the same objects.
    """
    parameters = list(model.parameters())

    # A wrapper for several processes begins with `training` true around a model that was not told
    # to train, and evaluation tells the model inside alone.
    inside = getattr(model, "module", model)

    def train(mode: bool = True) -> nn.Module:
        told = model.training == mode == inside.training
        return model if told else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        if not set_to_none:
            type(model).zero_grad(model, set_to_none=False)
            return
        for parameter in parameters:
            parameter.grad = None

    def list_parameters(recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(parameters) if recurse else type(model).parameters(model, recurse)

    shadows = {"train": train, "zero_grad": zero_grad, "parameters": list_parameters}
    vars(model).update(shadows)
    try:
        yield
    finally:
        for name in shadows:
            vars(model).pop(name, None)
