"""Whether a model is made of convolutions, before its weights are read and without the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfbench.recipe.schema import Recipe, local_path

if TYPE_CHECKING:
    from torch import nn


def is_convolutional(recipe: Recipe) -> bool | None:
    """Tell whether a model has more convolutions than the one that cuts a transformer's patches.

    Returns:
        ``None`` if it cannot be told: a name that only the Hub knows, or no model at all.
    """
    import torch
    from transformers import AutoModelForImageClassification

    from hfbench.models.configs import is_known_without_checkpoint, load_config

    section = recipe.model.model_copy(update={"pretrained": False, "revision": None})
    fresh = recipe.model_copy(update={"model": section})
    folder = local_path(section.name_or_path)
    if not folder.exists() and not is_known_without_checkpoint(fresh):
        return None
    try:
        config = load_config(fresh, str(folder if folder.exists() else section.name_or_path), None)
        with torch.device("meta"):  # no memory, and nothing drawn
            model = AutoModelForImageClassification.from_config(config)
    except Exception:  # each library raises its own kinds; loading the model says what is wrong
        return None
    return has_convolutions(model)


def has_convolutions(model: nn.Module) -> bool:
    """Tell whether a model has more of them than the one that cuts patches."""
    from torch import nn

    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1
