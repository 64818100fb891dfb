"""From a recipe's model to a classifier and back from disk, for ViT and timm alike."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    PPLCNetConfig,
    PreTrainedModel,
    ViTImageProcessor,
    pipeline,
    set_seed,
)

from hfbench.data.sources import load_splits
from hfbench.data.transforms import Normalization, Preprocessing
from hfbench.errors import HubError, ModelError
from hfbench.models.loading import (
    ModelSource,
    check_image_processor,
    load_model,
    open_model,
    save_model,
)
from hfbench.recipe.schema import Recipe
from hfbench.training.run import run_recipe
from tests.builders import TIMM, TIMM_VIT, tiny_recipe, vit_config, write_model
from tests.hub_content import write_timm_checkpoint, write_vit_checkpoint

DIGITS = [str(number) for number in range(10)]


def load(
    recipe: Recipe, label_names: list[str] = DIGITS
) -> tuple[PreTrainedModel, str, ModelSource]:
    """Load a recipe's model and what it came from."""
    source = open_model(recipe)
    model, initialization = load_model(recipe, source, label_names)
    return model, initialization, source


def edit_json(file: Path, **changes: Any) -> None:
    """Change some keys of a JSON file; ``None`` removes one."""
    content = json.loads(file.read_text("utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept), "utf-8")


@cache
def _images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """Return the folder of a tiny ViT for ten classes at 32 px."""
    return write_model(tmp_path / "vit", vit_config())


# Fresh weights


@pytest.mark.parametrize("name", [TIMM, TIMM_VIT])
def test_fresh_timm_model_keeps_its_own_initialisation(name: str) -> None:
    recipe = tiny_recipe(name, preprocessing={"image_size": 160})
    set_seed(3)
    model, initialization, _ = load(recipe)
    assert initialization == "timm"
    spread = {
        key: value.std().item() for key, value in model.state_dict().items() if value.ndim == 4
    }
    set_seed(3)
    original = timm.create_model(name.removeprefix("timm/").partition(".")[0], num_classes=10)
    expected = {
        f"timm_model.{key}": value.std().item()
        for key, value in original.state_dict().items()
        if value.ndim == 4
    }
    assert spread == pytest.approx(expected, rel=0.25)
    set_seed(4)
    assert not torch.equal(
        next(model.parameters()), next(load(recipe)[0].parameters())
    )  # the seed counts


def test_fresh_convolutions_are_not_drawn_by_transformers() -> None:
    # transformers draws every weight from N(0, 0.02); timm's He initialisation of a 3 x 3
    # convolution with 32 outputs has a deviation of sqrt(2 / (9 * 32)) = 0.083.
    model, _, _ = load(tiny_recipe())
    spreads = [
        (module, module.weight.std().item())
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.groups == 1
    ]
    assert len(spreads) > 3
    for module, spread in spreads:
        assert spread == pytest.approx((2 / (9 * module.out_channels)) ** 0.5, rel=0.15)


def test_vit_b16_is_known_without_its_checkpoint() -> None:
    recipe = tiny_recipe("google/vit-base-patch16-224-in21k", preprocessing={"image_size": 224})
    source = open_model(recipe)
    config = source.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("vit", 768, 12)
    assert (config.patch_size, config.image_size) == (16, 224)
    assert source.normalization == Normalization(224, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert source.image_processor.size == {"height": 224, "width": 224}


def test_fresh_model_from_a_folder_takes_its_architecture_only(vit: Path) -> None:
    (vit / "model.safetensors").unlink()
    (vit / "preprocessor_config.json").unlink()
    model, initialization, source = load(tiny_recipe(vit, preprocessing={"image_size": 48}))
    assert initialization == "transformers"
    assert model.config.image_size == 48
    assert source.normalization.mean == (0.5, 0.5, 0.5)


def test_timm_normalisation_comes_from_its_own_configuration() -> None:
    source = open_model(tiny_recipe("timm/resnet10t.c3_in1k"))
    assert source.normalization == Normalization(
        32, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    written = source.config.pretrained_cfg
    assert written["input_size"] == [3, 32, 32]
    assert written["crop_pct"] == 1.0
    assert "test_input_size" not in written


def test_unknown_timm_name_suggests_a_near_one() -> None:
    expected = r"timm \S+ does not know resnet10tt\.c3_in1k; did you mean resnet10t\?"
    with pytest.raises(ModelError, match=expected):
        open_model(tiny_recipe("timm/resnet10tt.c3_in1k"))


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("hf-hub:timm/resnet10t.c3_in1k", "timm/resnet10t.c3_in1k"),
        ("hf_hub:timm/resnet10t.c3_in1k", "timm/resnet10t.c3_in1k"),
        ("hf-hub:me/mine@abc123", "me/mine and model.revision=abc123"),
        ("local-dir:folder", "folder"),
        ("resnet10t", "timm/resnet10t.c3_in1k"),
        ("resnet10t.c3_in1k", "timm/resnet10t.c3_in1k"),
    ],
)
def test_ways_of_timm_to_write_a_name_are_answered_with_the_right_one(
    name: str, right: str, pretrained: bool
) -> None:
    with pytest.raises(ModelError, match=f"Write model.name_or_path={right}$"):
        open_model(tiny_recipe(name, pretrained=pretrained))


def test_architecture_without_a_tag_is_enough_for_fresh_weights_only() -> None:
    assert open_model(tiny_recipe("timm/resnet10t")).config.architecture == "resnet10t"
    with pytest.raises(ModelError, match=r"Write model\.name_or_path=timm/resnet10t\.c3_in1k$"):
        open_model(tiny_recipe("timm/resnet10t", pretrained=True))


def test_unknown_timm_tag_is_no_matter_of_the_network() -> None:
    with pytest.raises(ModelError, match=r"resnet10t\.c9_in1k"):
        open_model(tiny_recipe("timm/resnet10t.c9_in1k"))


def test_model_that_is_not_in_the_cache_names_ways_that_work_offline() -> None:
    with pytest.raises(HubError, match=r"model\.name_or_path: .*model\.pretrained=false"):
        open_model(tiny_recipe("timm/resnet10t.c3_in1k", pretrained=True))


# Label names and the head


@pytest.mark.parametrize("pretrained", [False, True])
def test_label_names_are_in_the_configuration(pretrained: bool, vit: Path) -> None:
    names = ["cat", "dog", "frog"]
    for recipe in (tiny_recipe(vit, pretrained=pretrained), tiny_recipe()):
        model, _, _ = load(recipe, names)
        assert model.config.num_labels == 3
        assert model.config.id2label == {0: "cat", 1: "dog", 2: "frog"}
        assert model.config.label2id == {"cat": 0, "dog": 1, "frog": 2}


def test_head_of_another_number_of_classes_is_replaced_and_the_body_kept(vit: Path) -> None:
    model, initialization, _ = load(tiny_recipe(vit, pretrained=True), ["a", "b", "c"])
    original = AutoModelForImageClassification.from_pretrained(vit)
    assert initialization == "pretrained"
    kept, was = model.state_dict(), original.state_dict()
    different = [key for key in kept if kept[key].shape != was[key].shape]
    assert different == ["classifier.weight", "classifier.bias"]
    assert all(torch.equal(kept[key], was[key]) for key in kept if key not in different)


def test_checkpoint_without_a_head_gets_one(tmp_path: Path) -> None:
    write_vit_checkpoint(tmp_path / "vit", image_size=32, patch_size=8)
    model, _, _ = load(tiny_recipe(tmp_path / "vit", pretrained=True))
    assert model.classifier.weight.shape == (10, 32)


def test_timm_checkpoint_as_on_the_hub_keeps_its_body(tmp_path: Path) -> None:
    write_timm_checkpoint(tmp_path / "timm", "test_resnet")
    model, initialization, _ = load(tiny_recipe(tmp_path / "timm", pretrained=True))
    assert initialization == "pretrained"
    saved = load_file(tmp_path / "timm" / "model.safetensors")
    body = {
        key: value
        for key, value in model.timm_model.state_dict().items()
        if not key.startswith("fc.")
    }
    assert len(body) > 20
    assert all(torch.equal(value, saved[key]) for key, value in body.items())
    assert model.timm_model.fc.weight.shape == (10, saved["fc.weight"].shape[1])


def test_pretrained_mobilenet_keeps_its_body(shared: Path) -> None:
    folder = shared / "models" / "mobilenetv2_100"
    recipe = tiny_recipe(folder, pretrained=True, preprocessing={"image_size": 96})
    model, initialization, source = load(recipe)
    assert initialization == "pretrained"
    assert source.normalization == Normalization(
        96, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    saved = load_file(folder / "model.safetensors")
    state = model.state_dict()
    head = {key for key in state if "classifier" in key}
    assert len(head) == 2
    assert all(
        torch.equal(state[key], saved[key if key in saved else key.removeprefix("timm_model.")])
        for key in state.keys() - head
    )


def test_model_is_float32_even_if_its_checkpoint_is_not(vit: Path) -> None:
    half = {key: value.half() for key, value in load_file(vit / "model.safetensors").items()}
    save_file(half, vit / "model.safetensors", metadata={"format": "pt"})
    edit_json(vit / "config.json", dtype="float16")
    model, _, _ = load(tiny_recipe(vit, pretrained=True))
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_folder_of_timm_save_for_hf_loads(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    original = timm.create_model("test_resnet", num_classes=10)
    save_for_hf(original, tmp_path / "timm", model_args={"num_classes": 10})
    config = json.loads((tmp_path / "timm" / "config.json").read_text("utf-8"))
    assert config["model_args"]["num_classes"] == 10  # what transformers alone trips over
    model, _, _ = load(tiny_recipe(tmp_path / "timm", pretrained=True))
    original.eval()
    with torch.no_grad():
        expected, found = original(_images(32)), model(pixel_values=_images(32)).logits
    torch.testing.assert_close(found, expected)


def test_other_timm_arguments_are_kept(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    original = timm.create_model("test_resnet", num_classes=10, output_stride=16)
    arguments = {"num_classes": 10, "output_stride": 16}
    save_for_hf(original, tmp_path / "timm", model_args=arguments)
    for pretrained in (True, False):
        model, _, _ = load(tiny_recipe(tmp_path / "timm", pretrained=pretrained))
        features = model.timm_model.forward_features(_images(32))
        assert features.shape[-1] == 2  # 32 / 16; it would be 1 without


# Checkpoints and folders that are refused


def test_checkpoint_without_body_weights_is_refused(vit: Path) -> None:
    saved = load_file(vit / "model.safetensors")
    gone = [key for key in saved if "encoder.layer.1." in key]
    assert len(gone) == 16
    kept = {key: value for key, value in saved.items() if key not in gone}
    save_file(kept, vit / "model.safetensors", metadata={"format": "pt"})
    expected = r"no weights for 16 of 40 tensors besides the head.*model\.pretrained=false"
    with pytest.raises(ModelError, match=expected):
        load(tiny_recipe(vit, pretrained=True))


def test_checkpoint_with_a_body_of_other_shapes_is_refused(vit: Path) -> None:
    saved = load_file(vit / "model.safetensors")
    key = next(key for key in saved if "intermediate.dense.weight" in key)
    save_file(
        saved | {key: torch.zeros(60, 32)}, vit / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ModelError, match="no weights for 1 of 40 tensors besides the head"):
        load(tiny_recipe(vit, pretrained=True))


def test_missing_body_is_seen_when_its_width_is_the_number_of_classes(vit: Path) -> None:
    saved = load_file(vit / "model.safetensors")
    gone = [key for key in saved if key.endswith("layernorm.weight")]
    assert gone
    kept = {key: value for key, value in saved.items() if key not in gone}
    save_file(kept, vit / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="besides the head"):
        load(tiny_recipe(vit, pretrained=True), [str(number) for number in range(32)])


def test_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty holds no config\.json; give a folder written by"):
        open_model(tiny_recipe(tmp_path / "empty", pretrained=True))


def test_file_instead_of_a_folder_is_refused(vit: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json holds no config\.json|is a file"):
        open_model(tiny_recipe(vit / "config.json", pretrained=True))


def test_damaged_configuration_is_refused(vit: Path) -> None:
    (vit / "config.json").write_text("{", "utf-8")
    with pytest.raises(ModelError, match="vit cannot be loaded: Expecting property name"):
        open_model(tiny_recipe(vit, pretrained=True))


def test_folder_without_weights_is_refused(vit: Path) -> None:
    (vit / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded: .*model\.safetensors"):
        load(tiny_recipe(vit, pretrained=True))


def test_truncated_weights_are_refused(vit: Path) -> None:
    weights = vit / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="vit cannot be loaded"):
        load(tiny_recipe(vit, pretrained=True))


def test_folder_without_image_processor_is_refused(vit: Path) -> None:
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no preprocessor_config\.json; save the image"):
        open_model(tiny_recipe(vit, pretrained=True))


def test_timm_folder_without_normalisation_is_refused(tmp_path: Path) -> None:
    write_timm_checkpoint(tmp_path / "timm")
    config = tmp_path / "timm" / "config.json"
    edit_json(config, pretrained_cfg=None, model_type="timm_wrapper")
    with pytest.raises(ModelError, match="no pretrained_cfg, so mean and deviation are unknown"):
        open_model(tiny_recipe(tmp_path / "timm", pretrained=True))


@pytest.mark.parametrize("with_processor", [True, False])
def test_model_for_text_is_refused_as_no_image_classifier(
    with_processor: bool, tmp_path: Path
) -> None:
    small = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=30,
    )
    BertModel(small).save_pretrained(tmp_path / "bert")
    if with_processor:
        ViTImageProcessor().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"BertConfig|bert.* image classif"):
        load(tiny_recipe(tmp_path / "bert", pretrained=True))


# Image sizes


def test_position_table_is_interpolated_for_another_size(vit: Path) -> None:
    original = AutoModelForImageClassification.from_pretrained(vit).eval()
    model, _, source = load(tiny_recipe(vit, pretrained=True, preprocessing={"image_size": 48}))
    assert model.config.image_size == 48
    assert source.image_processor.size == {"height": 48, "width": 48}
    table = model.vit.embeddings.position_embeddings
    before = original.vit.embeddings.position_embeddings
    assert table.shape == (1, 1 + 6 * 6, 32)
    assert torch.equal(table[:, 0], before[:, 0])  # the class token has no place
    with torch.no_grad():
        expected = original(_images(48), interpolate_pos_encoding=True).logits
        found = model(_images(48)).logits
    torch.testing.assert_close(found, expected)


def test_vit_keeps_every_weight_but_the_table_at_another_size(vit: Path) -> None:
    model, _, _ = load(tiny_recipe(vit, pretrained=True, preprocessing={"image_size": 48}))
    was = AutoModelForImageClassification.from_pretrained(vit).state_dict()
    now = model.state_dict()
    assert [key for key in now if now[key].shape != was[key].shape] == [
        "vit.embeddings.position_embeddings"
    ]
    same = [torch.equal(now[key], was[key]) for key in now if "position" not in key]
    assert len(same) == 39
    assert all(same)


def test_saved_model_of_another_size_reloads(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True, preprocessing={"image_size": 48})
    model, _, source = load(recipe)
    save_model(model, source.image_processor, tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(_images(48)).logits, model.eval()(_images(48)).logits)


# The image processor


def test_processor_that_does_more_is_refused() -> None:
    normalization = Normalization(32, "bilinear", (0.5,) * 3, (0.5,) * 3)
    preprocessing = Preprocessing(normalization, [], 0)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    same = ViTImageProcessor(size={"height": 32, "width": 32}, resample=2)
    check_image_processor(same, preprocessing, images)
    for change, found in (
        ({"image_mean": [0.4, 0.5, 0.5]}, "values that differ by up to 0.2"),
        ({"resample": 3}, "values that differ by up to"),
        ({"size": {"height": 40, "width": 40}}, r"shapes \(3, 40, 40\) and \(3, 32, 32\)"),
    ):
        other = ViTImageProcessor(**({"size": {"height": 32, "width": 32}} | change))
        with pytest.raises(ModelError, match=f"ViTImageProcessor does more .*{found}"):
            check_image_processor(other, preprocessing, images)


def test_processor_without_an_interpolation_is_refused(vit: Path) -> None:
    file = vit / "preprocessor_config.json"
    content = json.loads(file.read_text("utf-8")) | {"resample": None}
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ModelError, match="its image processor is not supported"):
        open_model(tiny_recipe(vit, pretrained=True))


@pytest.mark.parametrize("resample", [1, 4])
def test_lanczos_and_box_are_replaced_by_bicubic(resample: int, vit: Path) -> None:
    # torchvision before 0.27 has neither; what trains is what is saved.
    edit_json(vit / "preprocessor_config.json", resample=resample)
    source = open_model(tiny_recipe(vit, pretrained=True))
    assert source.normalization.interpolation == "bicubic"
    assert source.image_processor.resample == 3


@pytest.mark.parametrize("model", ["vit", "timm"])
def test_saved_processor_gives_the_pixels_of_training(
    model: str, vit: Path, tmp_path: Path
) -> None:
    # transformers reads a timm model's processor from config.json if the folder is on disk.
    if model == "vit":
        recipe = tiny_recipe(vit, pretrained=True)
    else:
        recipe = tiny_recipe("timm/resnet10t.c3_in1k")
    classifier, _, source = load(recipe)
    save_model(classifier, source.image_processor, tmp_path / "saved")
    preprocessing = Preprocessing(source.normalization, [], 0)
    train, _ = load_splits(recipe.dataset, 32, "bilinear")
    saved = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    check_image_processor(saved, preprocessing, train.images)


# A finished run's model


def _assert_same_outside(recipe: Recipe, output_dir: Path) -> None:
    """Compare a run's own predictions with what `from_pretrained` and `pipeline` give."""
    result = run_recipe(recipe, output_dir)
    folder = output_dir / recipe.name / result.run_id
    saved = np.load(folder / "predictions.npz")
    _, test = load_splits(recipe.dataset, recipe.preprocessing.image_size, "bilinear")
    pictures = [F.to_pil_image(image) for image in test.images]

    model = AutoModelForImageClassification.from_pretrained(folder / "model").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    with torch.no_grad():
        logits = model(**processor(pictures, return_tensors="pt")).logits
    # Softmax forgets a constant; what is left of the logits are the log-probabilities.
    found = logits.double().log_softmax(1).numpy()
    for classes, name in (("prediction", "probability"), ("label", "label_probability")):
        ours = np.log(saved[name].astype(np.float64))
        theirs = np.take_along_axis(found, saved[classes][:, None], axis=1)[:, 0]
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.array_equal(logits.topk(5, dim=1).indices.numpy(), saved["top"])
    assert logits.argmax(1).tolist() == saved["prediction"].tolist()

    classify = pipeline("image-classification", model=str(folder / "model"))
    names = test.label_names
    answers = classify(pictures, top_k=len(names), function_to_apply="none")
    assert len(answers) == len(test)
    for number, answer in enumerate(answers):
        scores = {item["label"]: item["score"] for item in answer}
        found = torch.tensor([scores[name] for name in names])
        torch.testing.assert_close(found, logits[number], atol=1e-4, rtol=0)
        assert answer[0]["label"] == names[saved["prediction"][number]]
    assert sorted(path.name for path in (folder / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_run_of_a_vit_gives_the_same_outside(vit: Path, tmp_path: Path) -> None:
    _assert_same_outside(tiny_recipe(vit, pretrained=True), tmp_path)


def test_run_of_fresh_weights_from_a_folder_gives_the_same_outside(
    vit: Path, tmp_path: Path
) -> None:
    _assert_same_outside(tiny_recipe(vit, pretrained=False), tmp_path)


def test_model_without_logits_is_refused(tmp_path: Path) -> None:
    config = PPLCNetConfig(scale=0.25, num_labels=3)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"PPLCNetForImageClassification, which gives no logits"):
        load(tiny_recipe(tmp_path / "model", pretrained=True))


def test_run_of_a_timm_model_gives_the_same_outside(tmp_path: Path) -> None:
    _assert_same_outside(tiny_recipe("timm/resnet10t.c3_in1k"), tmp_path)


def test_run_of_a_timm_vit_gives_the_same_outside(tmp_path: Path) -> None:
    _assert_same_outside(tiny_recipe(TIMM_VIT), tmp_path)


def test_run_on_the_device_gives_the_same_outside(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True, preprocessing={"location": "device"})
    _assert_same_outside(recipe, tmp_path)


def test_run_of_mobilenet_on_cifar_gives_the_same_outside(shared: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        shared / "models" / "mobilenetv2_100",
        pretrained=True,
        dataset={
            "name_or_path": str(shared / "data" / "cifar10"),
            "image_column": "img",
            "max_train_samples": 20,
            "max_eval_samples": 60,
        },
        preprocessing={"image_size": 96},
        num_train_epochs=1,
    )
    _assert_same_outside(recipe, tmp_path)


def test_saved_model_is_a_starting_point_for_another_run(vit: Path, tmp_path: Path) -> None:
    first = run_recipe(tiny_recipe(vit, pretrained=True), tmp_path / "runs")
    model_folder = tmp_path / "runs" / "tiny" / first.run_id / "model"
    shutil.copytree(model_folder, tmp_path / "copy")
    before = AutoModelForImageClassification.from_pretrained(tmp_path / "copy").state_dict()
    model, initialization, _ = load(tiny_recipe(tmp_path / "copy", pretrained=True))
    assert initialization == "pretrained"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
