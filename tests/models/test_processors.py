"""What a checkpoint's own processor does to colours is what training does, or it is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DonutImageProcessor,
    EfficientNetImageProcessor,
    ImageGPTImageProcessor,
    MobileViTImageProcessor,
    PPLCNetImageProcessor,
    Siglip2ImageProcessor,
    ViTImageProcessor,
    pipeline,
)

from hfbench.data.sources import load_splits
from hfbench.data.transforms import Preprocessing
from hfbench.errors import ModelError
from hfbench.models.loading import check_saved_processor, load_model, open_model
from hfbench.training.run import run_recipe
from tests.builders import tiny_recipe, vit_config, write_model

SQUARE = {"height": 32, "width": 32}
PLAIN = {"size": SQUARE, "do_center_crop": False, "resample": 2}


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """Return the folder of a tiny ViT for ten classes at 32 px."""
    return write_model(tmp_path / "vit", vit_config())


def _write(processor: Any, folder: Path) -> Any:
    (folder / "preprocessor_config.json").unlink()
    processor.save_pretrained(folder)
    return AutoImageProcessor.from_pretrained(folder)


PROCESSORS = {
    "flips": MobileViTImageProcessor(**PLAIN),
    "flips, with a mean that it does not use": MobileViTImageProcessor(**PLAIN, do_normalize=True),
    "does not flip": MobileViTImageProcessor(**PLAIN, do_flip_channel_order=False),
    "flips and normalises": PPLCNetImageProcessor(**PLAIN, resize_short=32),
    "normalises twice": EfficientNetImageProcessor(
        **PLAIN, image_mean=[0.48, 0.45, 0.4], image_std=[0.478, 0.473, 0.474], include_top=True
    ),
    "other for each channel": ViTImageProcessor(
        size=SQUARE, image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.3, 0.4]
    ),
    "does not normalise": ViTImageProcessor(size=SQUARE, do_normalize=False),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_training_and_saved_model_see_what_the_own_processor_makes(
    processor: Any, vit: Path
) -> None:
    own = _write(processor, vit)
    recipe = tiny_recipe(vit, pretrained=True)
    source = open_model(recipe)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    expected = own([F.to_pil_image(image) for image in images], return_tensors="pt")
    for memory_format in ("contiguous", "channels_last"):
        preprocessing = Preprocessing(source.normalization, [], 0, memory_format)
        found = preprocessing(images)
        torch.testing.assert_close(found, expected["pixel_values"], atol=1e-5, rtol=1e-5)
    smaller = images[..., :20, :20].contiguous()
    model, _ = load_model(recipe, source, list("abc"))
    check_saved_processor(model, source.image_processor, preprocessing, smaller)


REFUSED = {
    "do_pad": ViTImageProcessor(size=SQUARE, do_pad=True, pad_size={"height": 40, "width": 40}),
    "do_center_crop": ViTImageProcessor(
        size=SQUARE, do_center_crop=True, crop_size={"height": 40, "width": 40}
    ),
    "do_thumbnail": DonutImageProcessor(size={"height": 64, "width": 64}),
    "rescale_offset": EfficientNetImageProcessor(**PLAIN, rescale_offset=True),
    "rescale_factor": ViTImageProcessor(size=SQUARE, rescale_factor=1 / 127.5),
    "do_rescale": ViTImageProcessor(size=SQUARE, do_rescale=False, do_normalize=False),
    "do_threshold": ViTImageProcessor(size=SQUARE, do_threshold=True),
    "ViTImageProcessor does not do": ViTImageProcessor(size=SQUARE, do_flip_channel_order=True),
    "no pictures of three channels": Siglip2ImageProcessor(),
    "pixel_values": ImageGPTImageProcessor(
        clusters=np.zeros((4, 3)).tolist(), size={"height": 8, "width": 8}
    ),
}


@pytest.mark.parametrize("step", REFUSED)
@pytest.mark.parametrize("pretrained", [True, False])
def test_step_that_training_would_drop_is_refused_by_its_name(
    step: str, pretrained: bool, vit: Path
) -> None:
    file = vit / "preprocessor_config.json"
    REFUSED[step].save_pretrained(vit)
    content = json.loads(file.read_text("utf-8"))
    for name in ("do_threshold", "do_flip_channel_order"):  # what a class drops when it is saved
        if hasattr(REFUSED[step], name):
            content[name] = getattr(REFUSED[step], name)
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ModelError, match=f"its image processor is not supported: .*{step}"):
        open_model(tiny_recipe(vit, pretrained=pretrained))


@pytest.mark.parametrize(
    ("processor", "cuts"),
    [
        (ViTImageProcessor(size=SQUARE), False),
        (CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE), True),
        (ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875), True),
        (ConvNextImageProcessor(size={"shortest_edge": 384}), False),
    ],
)
def test_crop_that_becomes_a_resize_is_said(
    processor: Any, cuts: bool, vit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(processor, vit)
    with caplog.at_level(logging.INFO, "hfbench"):
        open_model(tiny_recipe(vit, pretrained=True))
    assert ("cuts the sides off; training, testing and the saved model" in caplog.text) == cuts


def test_processor_in_the_file_of_a_whole_processor_is_read(vit: Path) -> None:
    file = vit / "preprocessor_config.json"
    ViTImageProcessor(size=SQUARE, image_mean=[0.1, 0.2, 0.3]).save_pretrained(vit)
    nested = {"image_processor": json.loads(file.read_text("utf-8")), "processor_class": "Other"}
    (vit / "processor_config.json").write_text(json.dumps(nested), "utf-8")
    file.unlink()
    for pretrained in (True, False):
        source = open_model(tiny_recipe(vit, pretrained=pretrained))
        assert source.normalization.mean == (0.1, 0.2, 0.3)


def test_cutout_of_a_model_that_takes_bgr_is_of_the_mean_colour(vit: Path) -> None:
    mean = [0.1, 0.2, 0.9]  # of red, green and blue
    _write(PPLCNetImageProcessor(**PLAIN, image_mean=mean, image_std=[1.0] * 3), vit)
    normalization = open_model(tiny_recipe(vit, pretrained=True)).normalization
    assert normalization.bgr
    assert normalization.mean == pytest.approx((0.9, 0.2, 0.1))
    grey = Preprocessing(normalization, ["cutout"], 0).grey.flatten().tolist()
    assert grey == [26, 51, 230]  # 0.1, 0.2 and 0.9 of 255


def test_run_of_a_model_that_takes_bgr_gives_the_same_outside(vit: Path, tmp_path: Path) -> None:
    _write(MobileViTImageProcessor(**PLAIN), vit)
    recipe = tiny_recipe(vit, pretrained=True)
    result = run_recipe(recipe, tmp_path / "runs")
    folder = tmp_path / "runs" / recipe.name / result.run_id
    saved = np.load(folder / "predictions.npz")
    _, test = load_splits(recipe.dataset, 32, "bilinear")
    classify = pipeline("image-classification", model=str(folder / "model"))
    answers = classify([F.to_pil_image(image) for image in test.images], top_k=1)
    found = [answer[0]["score"] for answer in answers]
    np.testing.assert_allclose(found, saved["probability"].astype(np.float64), atol=1e-3)
    colours = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    red, blue = processor(colours, return_tensors="pt")["pixel_values"]
    assert red[:, 0, 0].tolist() == [0, 0, 1]
    assert blue[:, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("was", ["multi_label_classification", "regression", None])
def test_former_head_decides_neither_loss_nor_answers(
    was: str | None, vit: Path, tmp_path: Path
) -> None:
    config = vit / "config.json"
    left = {"problem_type": was, "function_to_apply": "sigmoid"}
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | left), "utf-8")
    recipe = tiny_recipe(vit, pretrained=True)
    result = run_recipe(recipe, tmp_path / "runs")
    model = tmp_path / "runs" / recipe.name / result.run_id / "model"
    written = json.loads((model / "config.json").read_text("utf-8"))
    assert written["problem_type"] == "single_label_classification"
    assert "function_to_apply" not in written
    assert AutoModelForImageClassification.from_pretrained(model).config.num_labels == 10
    answer = pipeline("image-classification", model=str(model))(
        Image.new("RGB", (32, 32), "red"), top_k=10
    )
    assert sum(item["score"] for item in answer) == pytest.approx(1, abs=1e-5)
