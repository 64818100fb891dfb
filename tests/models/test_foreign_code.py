"""Whatever comes with a model or a data set, none of it is run, and nobody is asked to allow it."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, TimmWrapperConfig

from hfbench.cli import app as cli
from hfbench.errors import ModelError
from hfbench.models.configs import check_local_model
from hfbench.models.loading import load_model, open_model
from hfbench.recipe.schema import check_recipe
from tests.builders import make_recipe, tiny_recipe, vit_config, write_model

MARK = "ran.txt"


class Ran:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def add_code(folder: Path, mark: Path) -> None:
    for name in ("configuration_net", "modeling_net", "processing_net", "pipeline_net"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")


def new_architecture(folder: Path) -> None:
    classes = {"AutoConfig": "configuration_net.NetConfig", "AutoModel": "modeling_net.Net"}
    edit(folder / "config.json", model_type="net", auto_map=classes)


def own_class_of_a_known_type(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForImageClassification": "modeling_net.Net"})


def own_processor(folder: Path) -> None:
    classes = {"AutoImageProcessor": "processing_net.NetProcessor"}
    edit(folder / "preprocessor_config.json", auto_map=classes, image_processor_type="NetProcessor")


def own_pipeline(folder: Path) -> None:
    pipelines = {"image-classification": {"impl": "pipeline_net.Net", "pt": ["AutoModel"]}}
    edit(folder / "config.json", custom_pipelines=pipelines)


def kernel_from_the_hub(folder: Path) -> None:
    edit(folder / "config.json", attn_implementation="stranger/attention")


WAYS = (
    new_architecture,
    own_class_of_a_known_type,
    own_processor,
    own_pipeline,
    kernel_from_the_hub,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "model", vit_config())
    add_code(folder, tmp_path / MARK)
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """Run the command with somebody at the keyboard who agrees to everything."""
    monkeypatch.setattr("sys.argv", ["hfbench", *words])
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


@pytest.mark.parametrize("way", WAYS)
def test_predict_neither_asks_nor_runs_code_that_comes_with_a_model(
    way: Callable[[Path], None],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    way(model)
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")

    code = call(monkeypatch, "predict", str(model), str(tmp_path / "image.png"))
    printed = capsys.readouterr()

    assert code == 2
    assert "Do you wish" not in printed.out + printed.err
    assert "trust_remote_code" not in printed.err
    assert f"MODEL: {model}" in printed.err
    assert "code" in printed.err
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_run_refuses_code_that_comes_with_a_model(
    way: Callable[[Path], None], pretrained: bool, model: Path, tmp_path: Path
) -> None:
    way(model)

    with pytest.raises(ModelError, match=r"model\.name_or_path: .* code"):
        open_model(tiny_recipe(model, pretrained=pretrained))

    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("command", ["validate", "recipe", "doctor", "tune", "ablate"])
def test_every_command_that_loads_a_model_refuses_its_code(
    command: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    new_architecture(model)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tiny_recipe(model, pretrained=True).as_json()))

    monkeypatch.chdir(tmp_path)
    code = call(monkeypatch, command, str(recipe))
    said = capsys.readouterr().err

    assert code == 2
    assert "code of its own (auto_map in config.json)" in said
    assert "Traceback" not in said
    assert not (tmp_path / MARK).exists()


def test_code_of_a_tokenizer_is_not_looked_at(model: Path, tmp_path: Path) -> None:
    classes = {"AutoTokenizer": ["processing_net.T", None]}
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes}))
    recipe = tiny_recipe(model, pretrained=True)

    load_model(recipe, open_model(recipe), [str(n) for n in range(10)])

    assert not (tmp_path / MARK).exists()


def test_pickled_weights_run_nothing(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    with (model / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"classifier.weight": Ran(tmp_path / MARK)}, file, protocol=2)
    recipe = tiny_recipe(model, pretrained=True)

    with pytest.raises(ModelError, match="its weights are a pickle"):
        load_model(recipe, open_model(recipe), [str(n) for n in range(10)])

    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_args": {"checkpoint_path": "weights.pth"}},
        {"model_args": {"pretrained": True}},
        {"model_args": {"pretrained_cfg_overlay": {"file": "weights.pth"}}},
        {"architecture": "hf-hub:stranger/net"},
        {"architecture": "local-dir:elsewhere"},
    ],
)
def test_a_timm_model_loads_no_other_file(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = TimmWrapperConfig(architecture="test_resnet")
    config.pretrained_cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    config.save_pretrained(folder)
    torch.save({"weight": Ran(tmp_path / MARK)}, folder / "weights.pth")
    edit(folder / "config.json", **changes)

    with pytest.raises(ModelError, match=r"model\.name_or_path: "):
        open_model(tiny_recipe(folder, pretrained=True))

    assert not (tmp_path / MARK).exists()


def test_a_data_set_of_a_script_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "images.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w').close()\n")
    recipe = tmp_path / "recipe.json"
    content = tiny_recipe(dataset={"name_or_path": str(folder)})
    recipe.write_text(json.dumps(content.as_json()))

    code = call(monkeypatch, "recipe", str(recipe), "-o", str(tmp_path / "runs"))

    assert code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / MARK).exists()


def test_a_recipe_names_no_attention_from_the_hub() -> None:
    content = make_recipe().as_json()
    content["model"]["attn_implementation"] = "stranger/attention"

    _, problems = check_recipe(content)

    assert any(problem.startswith("model.attn_implementation: ") for problem in problems)


@pytest.mark.parametrize("argument", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_of_a_model_without_it_is_refused(argument: str, tmp_path: Path) -> None:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    config.image_size = 32
    recipe = tiny_recipe(write_model(tmp_path / "resnet", config), pretrained=True)
    asked = {**recipe.training_args, argument: True}
    recipe = recipe.model_copy(update={"training_args": asked})
    names = [str(n) for n in range(10)]

    for refuse in (check_local_model, lambda given: load_model(given, open_model(given), names)):
        with pytest.raises(ModelError, match=f"training_args.{argument}: .* no effect"):
            refuse(recipe)


def test_checkpointing_of_a_model_that_has_it_is_let_through(model: Path) -> None:
    recipe = tiny_recipe(model, pretrained=True, gradient_checkpointing=True)
    check_local_model(recipe)
    load_model(recipe, open_model(recipe), [str(n) for n in range(10)])
