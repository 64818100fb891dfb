"""Which weights a run trains is never left to what a recipe happened to say of another model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from hfbench.errors import RecipeError
from hfbench.recipe.schema import load_recipe
from hfbench.report.terminal.run import result_table, run_table
from hfbench.results.schema import find_runs
from hfbench.studies.suite.plan import load_recipes
from hfbench.training.run import run_recipe
from tests.builders import TIMM, tiny_recipe, vit_config, write_model
from tests.report.terminal.test_run import show

OTHER = "google/vit-base-patch16-224"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"model.name_or_path={OTHER}"],
        ["model.revision=main"],
        [f"model.name_or_path={OTHER}", "model.revision=abc123"],
        ["training_args.seed=1", f"model.name_or_path={OTHER}", "preprocessing.image_size=224"],
        ["model.name_or_path=timm/resnet18.a1_in1k"],
    ],
)
def test_checkpoint_named_over_fresh_weights_is_refused_with_both_choices(
    overrides: list[str],
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart_tuned", overrides)
    message = str(caught.value)
    assert message.startswith("quickstart_tuned has 1 problem:\n  model.name_or_path: ")
    assert "model.pretrained=true" in message
    assert "model.pretrained=false" in message
    with pytest.raises(RecipeError, match="fresh, random weights"):
        load_recipes(["quickstart_untuned"], overrides)


@pytest.mark.parametrize("pretrained", [True, False])
def test_either_choice_is_taken(pretrained: bool) -> None:
    choice = f"model.pretrained={json.dumps(pretrained)}"
    for overrides in (
        [choice, f"model.name_or_path={OTHER}"],
        [f"model.name_or_path={OTHER}", choice],
    ):
        recipe = load_recipe("quickstart_tuned", overrides)
        assert (recipe.model.name_or_path, recipe.model.pretrained) == (OTHER, pretrained)


def test_what_changes_no_checkpoint_is_no_matter() -> None:
    same = load_recipe("quickstart_tuned").model.name_or_path
    load_recipe("quickstart_tuned", [f"model.name_or_path={same}", "preprocessing.image_size=64"])
    load_recipe("resnet50_cifar10_untuned", [f"model.name_or_path={OTHER}"])  # pretrained
    load_recipe("resnet50_cifar10_untuned", ["model.pretrained=false"])


def test_copy_in_python_is_refused_alike() -> None:
    recipe = load_recipe("quickstart_tuned")
    for update in ({"name_or_path": OTHER}, {"revision": "main"}):
        with pytest.raises(RecipeError, match=r"model\.pretrained=true"):
            recipe.model.model_copy(update=update)
    copy = recipe.model.model_copy(update={"name_or_path": OTHER, "pretrained": True})
    assert copy.weights == "pretrained"
    assert recipe.model.model_copy(update={"memory_format": "channels_last"}).weights == (
        "fresh weights"
    )


@pytest.mark.parametrize("pretrained", [True, False])
def test_first_line_and_tables_say_which_weights_are_trained(
    pretrained: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = "pretrained" if pretrained else "fresh weights"
    name = str(write_model(tmp_path / "vit", vit_config())) if pretrained else TIMM
    recipe = tiny_recipe(name, pretrained=pretrained, max_steps=1)
    with caplog.at_level(logging.INFO, "hfbench"):
        result = run_recipe(recipe, tmp_path / "runs")
    assert caplog.records[0].getMessage() == f"tiny: {name} ({words}) on digits"
    assert words in show(result_table(result))
    assert words.split()[0] in show(run_table(find_runs(tmp_path / "runs")))
