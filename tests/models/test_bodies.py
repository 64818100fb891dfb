"""A checkpoint without its body, or a part of it, is refused, whatever the body is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPConfig,
    HGNetV2Config,
    MetaClip2Config,
    PreTrainedConfig,
    SiglipConfig,
    SwinConfig,
    ViTImageProcessor,
)

from hfbench.errors import ModelError
from hfbench.models.loading import load_model, open_model
from tests.builders import tiny_recipe, vit_config

_SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
_VISION = _SMALL | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
_TEXT = _SMALL | {
    "num_hidden_layers": 1,
    "vocab_size": 100,
    "max_position_embeddings": 16,
    "projection_dim": 16,
}
CONFIGS: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "vit": (vit_config, ".layer"),
    "clip": (lambda: CLIPConfig(vision_config=_VISION, text_config=_TEXT), "layers"),
    "siglip": (lambda: SiglipConfig(vision_config=_VISION, text_config=_TEXT), "layers"),
    "metaclip_2": (lambda: MetaClip2Config(vision_config=_VISION, text_config=_TEXT), "layers"),
    "hgnet_v2": (
        lambda: HGNetV2Config(
            stem_channels=[3, 4, 4],
            stage_in_channels=[4, 8],
            stage_mid_channels=[4, 4],
            stage_out_channels=[8, 16],
            stage_num_blocks=[1, 1],
            stage_downsample=[False, True],
            stage_light_block=[False, False],
            stage_kernel_size=[3, 3],
            stage_numb_of_layers=[2, 2],
            hidden_sizes=[8, 16],
            depths=[1, 1],
            embedding_size=4,
        ),
        "stages",
    ),
    "swin": (
        lambda: SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4
        ),
        "blocks",
    ),
}


def _write(folder: Path, config: Any, save: str = "model.safetensors") -> Path:
    torch.manual_seed(0)
    config.num_labels = 3
    model = AutoModelForImageClassification.from_config(config)
    model.save_pretrained(folder, max_shard_size="20KB" if save == "sharded" else "5GB")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def _edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def _load(folder: Path, classes: str = "abcd") -> Any:
    recipe = tiny_recipe(folder, pretrained=True)
    return load_model(recipe, open_model(recipe), list(classes))[0]


@pytest.mark.parametrize("family", CONFIGS)
def test_checkpoint_without_layers_is_refused(family: str, tmp_path: Path) -> None:
    build, layers = CONFIGS[family]
    folder = _write(tmp_path / family, build())
    whole = load_file(folder / "model.safetensors")
    for classes in ("abc", "abcdef"):  # with its own head and with another
        model = _load(folder, classes)
        assert model.config.num_labels == len(classes)
    body = {key for key in whole if layers in key}
    assert 0 < len(body) < len(whole)
    _edit(
        folder / "model.safetensors",
        lambda tensors: {key: value for key, value in tensors.items() if key not in body},
    )
    for classes in ("abc", "abcdef"):
        with pytest.raises(ModelError, match=r"of its values\).*model\.pretrained=false"):
            _load(folder, classes)
    fresh = tiny_recipe(folder, pretrained=False)
    load_model(fresh, open_model(fresh), list("abc"))


@pytest.mark.parametrize("family", CONFIGS)
def test_body_without_a_head_gets_one(family: str, tmp_path: Path) -> None:
    if family == "hgnet_v2":
        pytest.skip("transformers has no body of it by itself")
    folder = _write(tmp_path / family, CONFIGS[family][0]())
    config = AutoModelForImageClassification.from_pretrained(folder).config
    torch.manual_seed(1)
    body = AutoModel.from_config(config)
    body.save_pretrained(folder)
    model = _load(folder)
    found = {key.partition(".")[2]: value for key, value in model.state_dict().items()}
    expected = {key.removeprefix("vision_model."): v for key, v in body.state_dict().items()}
    shared = found.keys() & expected.keys()
    assert len(shared) > 20
    assert all(torch.equal(found[key], expected[key]) for key in shared)


def _as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _without_prefix(folder: Path) -> None:
    _edit(
        folder / "model.safetensors",
        lambda tensors: {key.removeprefix("vit."): value for key, value in tensors.items()},
    )


def _with_a_wrapper(folder: Path) -> None:
    _edit(
        folder / "model.safetensors",
        lambda tensors: {f"module.{key}": value for key, value in tensors.items()},
    )


@pytest.mark.parametrize("change", [_as_bin, _without_prefix])
def test_whole_checkpoint_of_another_kind_loads(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = _write(tmp_path / "vit", vit_config())
    expected = AutoModelForImageClassification.from_pretrained(folder).vit.state_dict()
    change(folder)
    found = _load(folder).vit.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_names_that_match_nothing_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "vit", vit_config())
    _with_a_wrapper(folder)
    with pytest.raises(ModelError, match=r"100\.0% of its values"):
        _load(folder)


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_lost_shard_is_refused(family: str, tmp_path: Path) -> None:
    folder = _write(tmp_path / family, CONFIGS[family][0](), "sharded")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    _load(folder)
    _edit(shards[1], lambda tensors: {"unknown": torch.zeros(1)})
    with pytest.raises(ModelError, match="besides the head"):
        _load(folder)
