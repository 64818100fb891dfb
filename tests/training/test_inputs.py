"""Model and data are loaded side by side, and say what is wrong as if one came after the other."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from hfbench.cli.options import uncollected
from hfbench.data.sources import load_splits
from hfbench.errors import DataError, HfbenchError, ModelError
from hfbench.models.loading import load_model, open_model
from hfbench.recipe.schema import Recipe, load_recipe
from hfbench.training import inputs
from hfbench.training.inputs import load_inputs
from hfbench.training.trainer import build_training_arguments
from tests.data.test_images import good, quiet, saved, table

__all__ = ["quiet"]


def recipe_of(path: Path, *overrides: str) -> Recipe:
    return load_recipe("quickstart_untuned", [f"dataset.name_or_path={path}", *overrides])


def load(recipe: Recipe, folder: Path) -> inputs.Inputs:
    return load_inputs(recipe, build_training_arguments(recipe, folder / "output"))


def test_model_is_built_while_images_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building = threading.Event()
    open_picture, build = PIL.Image.open, inputs.load_model

    def open_when_building(*args: Any, **kwargs: Any) -> Any:
        if not building.wait(timeout=20):
            raise OSError("no model was being built")
        return open_picture(*args, **kwargs)

    def build_and_tell(*args: Any) -> Any:
        building.set()
        return build(*args)

    monkeypatch.setattr(PIL.Image, "open", open_when_building)
    monkeypatch.setattr(inputs, "load_model", build_and_tell)
    loaded = load(recipe_of(saved(tmp_path, good(), good(2))), tmp_path)
    assert loaded.train.images.shape == (4, 3, 6, 8)


def test_fresh_weights_are_those_of_building_after_decoding(tmp_path: Path) -> None:
    recipe = recipe_of(saved(tmp_path, good(64), good(2)), "training_args.seed=3")

    source = open_model(recipe)
    train, _ = load_splits(recipe.dataset, recipe.preprocessing.image_size, "bilinear")
    torch.manual_seed(3)
    expected, _ = load_model(recipe, source, train.label_names)
    found = load(recipe, tmp_path).model
    assert found.config.id2label == {0: "cat", 1: "dog"}
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


@pytest.mark.parametrize(
    ("damaged", "kind", "said"),
    [(True, DataError, "1 of 2 images cannot be used"), (False, ModelError, "no weights today")],
)
def test_what_is_wrong_with_the_images_is_said_before_what_is_wrong_with_the_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damaged: bool,
    kind: type[HfbenchError],
    said: str,
) -> None:
    def fail(*_: Any) -> Any:
        raise ModelError("no weights today")

    monkeypatch.setattr(inputs, "load_model", fail)
    junk = table([good()[0]["image"], {"bytes": b"junk", "path": None}], [0, 1])
    path = saved(tmp_path, junk if damaged else good(), good(2))
    with pytest.raises(kind, match=said):
        load(recipe_of(path), tmp_path)


def test_garbage_is_collected_again_after_importing() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()

    with pytest.raises(ModelError), uncollected():
        raise ModelError("refused")
    assert gc.isenabled()
