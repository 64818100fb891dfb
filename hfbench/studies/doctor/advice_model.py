"""What to say of a model's memory format: whether it has convolutions that could gain."""

from __future__ import annotations

from hfbench.models.convolutions import is_convolutional
from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import MEMORY_FORMAT
from hfbench.studies.doctor.schema import Advice


def advise_memory_format(recipe: Recipe) -> Advice:
    """Say whether channels_last may help; it is not measured here, and has no bound."""
    on = recipe.model.memory_format == "channels_last"
    idle = is_convolutional(recipe) is False
    if idle:
        sentence = "The model has no convolutions, but to cut an image into patches."
    elif on:
        sentence = "channels_last is on; whether it gains, hfbench ablate tells."
    else:
        sentence = (
            "Convolutions may run faster in model.memory_format=channels_last, or slower, by their "
            "sizes and the machine: hfbench ablate measures it."
        )
    return Advice(
        technique=MEMORY_FORMAT.name,
        in_recipe=on,
        helps="no" if on or idle else "perhaps",
        speedup_at_most=None,
        speedup_measured=None,
        sentence=sentence,
    )
