"""A checkpoint's meaning, over many families: body, head, channels, sizes, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hfbench.errors import ModelError
from hfbench.recipe.schema import Recipe
from hfbench.training.run import run_recipe
from tests.builders import tiny_recipe, vit_config, write_model

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16]}
FAMILIES: dict[str, Any] = {
    "ViT": SMALL,
    "DeiT": SMALL,
    "Dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"image_size": 32, "patch_size": 8},
    "Swin": {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1]}
    | {"num_heads": [1, 2], "window_size": 4},
    "ConvNext": STAGES | {"image_size": 32},
    "ConvNextV2": STAGES | {"image_size": 32},
    "ResNet": STAGES | {"embedding_size": 8, "layer_type": "basic"},
    "RegNet": STAGES | {"embedding_size": 8, "groups_width": 8},
    "MobileNetV2": {"depth_multiplier": 0.35, "image_size": 32},
    "Bit": STAGES | {"embedding_size": 8, "num_groups": 4},
    "FocalNet": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1]}
    | {"focal_windows": [3, 3], "hidden_sizes": [8, 16]},
    "PoolFormer": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]},
}


def build(family: str, classes: int) -> Any:
    """Build a small classifier of a family."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], num_labels=classes)
    config.architectures = [f"{family}ForImageClassification"]
    return AutoModelForImageClassification.from_config(config)


def save(model: Any, folder: Path, **processor: Any) -> Path:
    """Write a classifier and its image processor."""
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    ViTImageProcessor(size=side, **processor).save_pretrained(folder)
    return folder


def recipe_at(folder: Path, size: int) -> Recipe:
    """Return a recipe of one step."""
    preprocessing = {"image_size": size}
    return tiny_recipe(folder, pretrained=True, preprocessing=preprocessing, max_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_fine_tuned_and_its_model_loads_back(
    family: str, size: int, tmp_path: Path
) -> None:
    folder = save(build(family, 5), tmp_path / "model")
    result = run_recipe(recipe_at(folder, size), tmp_path / "runs")
    assert result.folder is not None
    config = json.loads((result.folder / "model" / "config.json").read_text("utf-8"))
    assert config["problem_type"] == "single_label_classification"
    classify = transformers.pipeline("image-classification", model=str(result.folder / "model"))
    found = classify(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), top_k=10)
    assert len(found) == 10
    assert sum(entry["score"] for entry in found) == pytest.approx(1, abs=1e-4)


def test_checkpoint_of_several_labels_an_image_becomes_one_of_one(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "vit", vit_config(problem_type="multi_label_classification"))
    result = run_recipe(tiny_recipe(folder, pretrained=True, max_steps=1), tmp_path / "runs")
    assert result.folder is not None
    config = json.loads((result.folder / "model" / "config.json").read_text("utf-8"))
    assert config["problem_type"] == "single_label_classification"


@pytest.mark.parametrize("family", ["CLIP", "Siglip", "ViT"])
def test_checkpoint_without_a_body_is_refused(family: str, tmp_path: Path) -> None:
    # CLIP's and SigLIP's prefix of a body is the name of nothing.
    torch.manual_seed(0)
    if family == "ViT":
        config: Any = transformers.ViTConfig(**SMALL, num_labels=5)
    else:
        vision = getattr(transformers, f"{family}VisionConfig")(**SMALL)
        kind = getattr(transformers, f"{family}Config")
        config = kind(vision_config=vision.to_dict(), num_labels=5)
    model = AutoModelForImageClassification.from_config(config)
    folder = save(model, tmp_path / "model")
    assert run_recipe(recipe_at(folder, 32), tmp_path / "whole").metrics.test is not None

    file = folder / "model.safetensors"
    weights = load_file(file)
    kept = {key: value for key, value in weights.items() if "encoder" not in key}
    assert len(kept) < len(weights)
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for .* tensors besides the head"):
        run_recipe(recipe_at(folder, 32), tmp_path / "runs")


@pytest.mark.parametrize(
    ("size", "said"), [(30, "image_size=24 or 32"), (8, None), (12, "image_size=8 or 16")]
)
def test_size_that_patches_do_not_fill_is_refused(
    size: int, said: str | None, tmp_path: Path
) -> None:
    folder = save(build("ViT", 5), tmp_path / "model")
    if said is None:
        run_recipe(recipe_at(folder, size), tmp_path / "runs")
        return
    with pytest.raises(ModelError, match=said):
        run_recipe(recipe_at(folder, size), tmp_path / "runs")


def test_size_may_be_written_as_a_pair(tmp_path: Path) -> None:
    folder = save(build("ViT", 5), tmp_path / "model")
    file = folder / "config.json"
    content = json.loads(file.read_text("utf-8")) | {"image_size": [32, 32]}
    file.write_text(json.dumps(content), "utf-8")
    result = run_recipe(recipe_at(folder, 64), tmp_path / "runs")
    assert result.metrics.test is not None
