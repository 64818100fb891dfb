"""Which sizes a model takes: all that its position table or its windows allow, no others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    ConvNextConfig,
    Dinov2Config,
    EfficientNetConfig,
    LevitConfig,
    MobileNetV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PvtConfig,
    SiglipConfig,
    SwinConfig,
    ViTImageProcessor,
)

from hfbench.errors import ModelError
from hfbench.models.loading import load_model, open_model, save_model
from tests.builders import tiny_recipe, vit_config
from tests.hub_content import write_timm_checkpoint

_VISION = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
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


def _swin(**changes: Any) -> SwinConfig:
    small = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    }
    return SwinConfig(**(small | changes))


def _levit() -> LevitConfig:
    return LevitConfig(
        image_size=64,
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[1, 2, 3],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
    )


def _write(folder: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    config.architectures = []
    config.num_labels = 3
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def _load(folder: Path, size: int, pretrained: bool = True) -> tuple[PreTrainedModel, Any]:
    recipe = tiny_recipe(folder, pretrained=pretrained, preprocessing={"image_size": size})
    source = open_model(recipe)
    return load_model(recipe, source, list("abc"))[0], source.image_processor


def _images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


CONVOLUTIONS = {
    "convnext": lambda: ConvNextConfig(
        image_size=64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]
    ),
    "mobilenet_v2": lambda: MobileNetV2Config(image_size=64, depth_multiplier=0.25),
    "efficientnet": lambda: EfficientNetConfig(
        image_size=64,
        width_coefficient=0.25,
        depth_coefficient=0.1,
        hidden_dim=320,
    ),
    "pair": lambda: ConvNextConfig(
        image_size=[64, 64], hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]
    ),
}


@pytest.mark.parametrize("family", CONVOLUTIONS)
@pytest.mark.parametrize("size", [32, 96])
def test_convolutions_take_any_size(family: str, size: int, tmp_path: Path) -> None:
    folder = _write(tmp_path / family, CONVOLUTIONS[family]())
    expected = AutoModelForImageClassification.from_pretrained(folder).eval()
    model, _ = _load(folder, size)
    with torch.no_grad():
        assert torch.equal(
            model.eval()(_images(size)).logits, expected(pixel_values=_images(size)).logits
        )


TABLES: dict[str, Callable[[], PreTrainedConfig]] = {
    "vit": vit_config,
    "vit of a pair": lambda: vit_config(image_size=[32, 32]),
    "clip": lambda: CLIPConfig(vision_config=_VISION, text_config=_TEXT),
    "siglip": lambda: SiglipConfig(vision_config=_VISION, text_config=_TEXT),
    "dinov2": lambda: Dinov2Config(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    ),
}


@pytest.mark.parametrize("family", TABLES)
def test_position_table_is_interpolated_as_the_model_itself_would(
    family: str, tmp_path: Path
) -> None:
    folder = _write(tmp_path / family, TABLES[family]())
    original = AutoModelForImageClassification.from_pretrained(folder).eval()
    model, processor = _load(folder, 48)
    option = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = original(pixel_values=_images(48), **option).logits
        found = model.eval()(pixel_values=_images(48)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    save_model(model, processor, tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=_images(48)).logits, found)


def test_table_of_a_timm_model_is_interpolated_and_its_size_saved(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    write_timm_checkpoint(tmp_path / "timm", "test_vit3", image_size=160)
    original = AutoModelForImageClassification.from_pretrained(tmp_path / "timm").timm_model
    model, processor = _load(tmp_path / "timm", 64)
    assert model.config.model_args == {"img_size": 64}
    expected = resample_abs_pos_embed(
        original.pos_embed, [4, 4], num_prefix_tokens=1, antialias=False
    )
    torch.testing.assert_close(model.timm_model.pos_embed, expected, atol=1e-6, rtol=1e-5)
    save_model(model, processor, tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(_images(64)).logits, model.eval()(_images(64)).logits)


@pytest.mark.parametrize("build", [lambda: vit_config(patch_size=[8, 8]), _swin])
def test_fresh_model_is_built_for_its_size(
    build: Callable[[], PreTrainedConfig], tmp_path: Path
) -> None:
    model, _ = _load(_write(tmp_path / "model", build()), 64, pretrained=False)
    assert model.config.image_size == 64


@pytest.mark.parametrize("size", [64, 128])
def test_windows_that_divide_take_another_size_in_silence(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _write(tmp_path / "swin", _swin())
    with caplog.at_level(logging.INFO, "hfbench"):
        _load(folder, size)
    assert "windows" not in caplog.text


def test_windows_that_do_not_divide_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _write(tmp_path / "swin", _swin())
    _load(folder, 40)  # 10 patches a side, then 5
    assert "windows of 4 patches of 4 px do not divide 40 px" in caplog.text
    assert "Multiples of 32 need none" in caplog.text


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(
    ("build", "size", "said"),
    [
        (vit_config, 50, r"50 is no multiple .*the last 2 pixels.*image_size=48 or 56$"),
        (lambda: vit_config(patch_size=14, image_size=28), 32, r"last 4 pixels.*=28 or 42$"),
        (lambda: vit_config(patch_size=16), 8, r"not take RGB images of 8 x 8.*image_size=16$"),
        (CONVOLUTIONS["convnext"], 49, r"no multiple .*the last 1 pixels.*=48 or 56$"),
    ],
)
def test_size_that_patches_do_not_divide_names_those_that_they_do(
    build: Callable[[], PreTrainedConfig], size: int, said: str, pretrained: bool, tmp_path: Path
) -> None:
    folder = _write(tmp_path / "model", build())
    with pytest.raises(ModelError, match=said):
        _load(folder, size, pretrained)


@pytest.mark.parametrize(
    ("build", "size", "said"),
    [
        (_levit, 128, r"does not take RGB images of 128 x 128: .*; .*image_size=64$"),
        (_swin, 8, r"does not take RGB images of 8 x 8: .*; .*image_size=32$"),
    ],
)
def test_table_that_cannot_be_interpolated_names_its_own_size(
    build: Callable[[], PreTrainedConfig], size: int, said: str, tmp_path: Path
) -> None:
    folder = _write(tmp_path / "model", build())
    with pytest.raises(ModelError, match=said):
        _load(folder, size)


def test_pyramid_has_a_table_a_stage(tmp_path: Path) -> None:
    config = PvtConfig(
        image_size=32,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2],
    )
    model, _ = _load(_write(tmp_path / "pvt", config), 64)
    shapes = [tuple(v.shape) for key, v in model.state_dict().items() if "position_emb" in key]
    assert shapes == [(1, 256, 8), (1, 64, 16), (1, 16, 16), (1, 5, 16)]
