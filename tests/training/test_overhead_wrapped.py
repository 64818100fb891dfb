"""What is left out of each step must not keep a wrapped model from being told to train."""

from __future__ import annotations

import torch
from torch import nn

from hfbench.training.overhead import without_walks


class Wrapper(nn.Module):
    """Holds a model as `DistributedDataParallel` does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Call the model inside."""
        return self.module(images)  # type: ignore[no-any-return]


def test_wrapped_model_is_told_to_train_at_first_and_after_each_evaluation() -> None:
    inside = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()  # as a checked model is
    model = Wrapper(inside)
    assert model.training  # although nothing inside is
    with without_walks(model):
        for _ in range(2):
            model.train()
            assert inside.training
            assert inside[1].training
            inside.eval()  # evaluation knows the model alone
        model.train(False)
        assert not model.training
        assert not inside.training
