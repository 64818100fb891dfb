"""Families of image classifiers, each with its own processor: what was measured is what is saved.

A checkpoint of five classes is fine-tuned on ten; then the folder is loaded as anybody would.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torchvision.transforms.v2 import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    pipeline,
)

from hfbench.data.sources import load_splits
from hfbench.training.run import run_recipe
from tests.builders import tiny_recipe
from tests.hub_content import write_timm_checkpoint

_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "vocab_size": 100,
    "max_position_embeddings": 16,
}
_TWO = {"vision_config": _VIT, "text_config": _TEXT}
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_PYRAMID = _STAGES | {"image_size": 32, "num_attention_heads": [1, 2, 3, 4]}
_HGNET = {
    "stem_channels": [3, 4, 4],
    "stage_in_channels": [4, 8],
    "stage_mid_channels": [4, 4],
    "stage_out_channels": [8, 16],
    "stage_num_blocks": [1, 1],
    "stage_downsample": [False, True],
    "stage_light_block": [False, False],
    "stage_kernel_size": [3, 3],
    "stage_numb_of_layers": [2, 2],
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "embedding_size": 4,
}
_EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}
_LEVIT = {
    "image_size": 32,
    "hidden_sizes": [16, 32, 48],
    "num_attention_heads": [1, 2, 3],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
    "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
}
_MOBILEVIT = {
    "image_size": 32,
    "hidden_sizes": [16, 20, 24],
    "neck_hidden_sizes": [4, 8, 8, 8, 12, 12, 64],
    "num_attention_heads": 2,
}
# Configuration, its arguments, the size that is asked for, and the processor.
_CROP = {"crop_size": {"height": 32, "width": 32}}
_SHORTEST = {"size": {"shortest_edge": 36}} | _CROP
_SQUARE = {"size": {"height": 32, "width": 32}}
FAMILIES: dict[str, tuple[str, dict[str, Any], int, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", _VIT, 32, "ViT", _SQUARE),
    "vit-48": ("ViTConfig", _VIT, 48, "ViT", _SQUARE),
    "deit": ("DeiTConfig", _VIT, 32, "DeiT", _SQUARE | _CROP),
    "beit": ("BeitConfig", _VIT | {"use_relative_position_bias": True}, 48, "Beit", _SQUARE),
    "data2vec": ("Data2VecVisionConfig", _VIT, 32, "Beit", _SQUARE),
    "vit_msn": ("ViTMSNConfig", _VIT, 40, "ViT", _SQUARE),
    "ijepa": ("IJepaConfig", _VIT, 32, "ViT", _SQUARE),
    "dinov2": ("Dinov2Config", _VIT, 40, "Bit", _SHORTEST),
    "registers": ("Dinov2WithRegistersConfig", _VIT, 32, "Bit", _SHORTEST),
    "clip": ("CLIPConfig", _TWO, 48, "CLIP", _SHORTEST),
    "siglip": ("SiglipConfig", _TWO, 48, "Siglip", _SQUARE),
    "metaclip_2": ("MetaClip2Config", _TWO, 32, "CLIP", _SHORTEST),
    "swin": ("SwinConfig", _SWIN, 64, "ViT", _SQUARE),
    "swinv2": ("Swinv2Config", _SWIN, 64, "ViT", _SQUARE),
    "convnext": ("ConvNextConfig", _STAGES, 32, "ConvNext", {"size": {"shortest_edge": 32}}),
    "convnextv2": ("ConvNextV2Config", _STAGES, 32, "ConvNext", {"size": {"shortest_edge": 32}}),
    "resnet": ("ResNetConfig", _STAGES | {"embedding_size": 8}, 32, "ConvNext", {}),
    "regnet": ("RegNetConfig", _STAGES | {"embedding_size": 8, "groups_width": 8}, 32, "Bit", {}),
    "bit": ("BitConfig", _STAGES | {"embedding_size": 8, "num_groups": 4}, 32, "Bit", {}),
    "mobilenet_v1": ("MobileNetV1Config", {"depth_multiplier": 0.25}, 32, "MobileNetV1", {}),
    "mobilenet_v2": ("MobileNetV2Config", {"depth_multiplier": 0.25}, 32, "MobileNetV2", {}),
    "efficientnet": ("EfficientNetConfig", _EFFICIENT, 32, "EfficientNet", _SQUARE),
    "hgnet_v2": ("HGNetV2Config", _HGNET, 32, "ViT", _SQUARE),
    "pvt": ("PvtConfig", _PYRAMID, 64, "Pvt", _SQUARE),
    "pvt_v2": ("PvtV2Config", _PYRAMID, 64, "Pvt", _SQUARE),
    "poolformer": ("PoolFormerConfig", _STAGES, 32, "PoolFormer", _SHORTEST),
    "levit": ("LevitConfig", _LEVIT, 32, "Levit", _SHORTEST),
    "mobilevit": ("MobileViTConfig", _MOBILEVIT, 32, "MobileViT", _SHORTEST),
    "mobilevitv2": ("MobileViTV2Config", {"width_multiplier": 0.25}, 64, "MobileViT", _SHORTEST),
    "focalnet": (
        "FocalNetConfig",
        {
            "image_size": 32,
            "embed_dim": 8,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        64,
        "Bit",
        _SHORTEST,
    ),
    "segformer": (
        "SegformerConfig",
        {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4]},
        64,
        "Segformer",
        _SQUARE,
    ),
}


def _config(family: str) -> PreTrainedConfig:
    name, arguments, *_ = FAMILIES[family]
    build: Callable[..., PreTrainedConfig] = getattr(transformers, name)
    config = build(**arguments)
    config.num_labels = 5
    config.architectures = []
    return config


def _assert_same_outside(folder: Path, size: int, pretrained: bool, runs: Path) -> None:
    recipe = tiny_recipe(
        folder, pretrained=pretrained, preprocessing={"image_size": size}, max_steps=2
    )
    result = run_recipe(recipe, runs)
    run = runs / recipe.name / result.run_id
    saved = np.load(run / "predictions.npz")
    _, test = load_splits(recipe.dataset, size, "bilinear")
    pictures = [F.to_pil_image(image) for image in test.images]
    model = AutoModelForImageClassification.from_pretrained(run / "model").eval()
    assert model.config.num_labels == 10
    assert model.config.problem_type == "single_label_classification"
    processor = AutoImageProcessor.from_pretrained(run / "model")
    with torch.no_grad():
        logits = model(**processor(pictures, return_tensors="pt")).logits
    assert logits.topk(5, dim=1).indices.tolist() == saved["top"].tolist()
    answers = pipeline("image-classification", model=str(run / "model"))(pictures, top_k=1)
    scores = [answer[0]["score"] for answer in answers]
    np.testing.assert_allclose(scores, saved["probability"].astype(np.float64), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_gives_the_same_outside(family: str, pretrained: bool, tmp_path: Path) -> None:
    *_, size, processor, arguments = FAMILIES[family]
    folder = tmp_path / family
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(_config(family)).save_pretrained(folder)
    getattr(transformers, f"{processor}ImageProcessor")(**arguments).save_pretrained(folder)
    _assert_same_outside(folder, size, pretrained, tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(
    ("architecture", "trained", "size"),
    [
        ("test_resnet", 160, 32),
        ("test_efficientnet", 160, 48),
        ("test_vit", 160, 64),
        ("test_vit3", 160, 160),
        ("test_convnext", 160, 64),
        ("test_nfnet", 96, 64),
        ("test_mambaout", 160, 64),
        ("test_byobnet", 160, 32),
    ],
)
def test_family_of_timm_gives_the_same_outside(
    architecture: str, trained: int, size: int, pretrained: bool, tmp_path: Path
) -> None:
    folder = tmp_path / architecture
    write_timm_checkpoint(folder, architecture, image_size=trained)
    _assert_same_outside(folder, size, pretrained, tmp_path / "runs")
