from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hfbench import ablate, examine, load_result, run_recipe, run_suite, tune, write_report
from hfbench.errors import HfbenchError, RecipeError
from hfbench.recipe.rechecking import output_folder, recheck
from hfbench.recipe.schema import ModelSection, Recipe
from tests.builders import tiny_recipe

RECIPE = tiny_recipe()
DOORS: dict[str, Callable[[Any], Any]] = {
    "run_recipe": run_recipe,
    "run_suite": lambda recipe: run_suite([recipe]),
    "tune": lambda recipe: tune(recipe, "best.json"),
    "ablate": ablate,
    "examine": examine,
}


def edited(**update: Any) -> Recipe:
    return RECIPE.model_copy(update=update)


def with_arguments(**arguments: Any) -> Recipe:
    return edited(training_args=RECIPE.training_args | arguments)


def message(recipe: Any) -> str:
    with pytest.raises(RecipeError) as error:
        recheck(recipe)
    return str(error.value)


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (edited(name="my second try"), 'name: found "my second try", expected letters'),
        (
            edited(dataset=RECIPE.dataset.model_copy(update={"max_train_samples": -5})),
            "dataset.max_train_samples: found -5",
        ),
        (with_arguments(learning_ratee=1), "training_args.learning_ratee: unknown"),
        ("quickstart_untuned", "Expected a recipe from load_recipe, found a value of type str"),
        (RECIPE.as_json(), "Expected a recipe from load_recipe, found a value of type dict"),
    ],
)
def test_every_function_checks_what_it_is_given(
    name: str, recipe: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(RecipeError) as error:
        DOORS[name](recipe)
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "../a", "..", "-o", ".hidden", "mög", "a\n", "a" * 97, 7, None, ["a"]]
)
def test_name_that_a_file_could_not_have_is_refused(name: Any) -> None:
    assert "  name: " in message(edited(name=name))


def test_all_problems_are_said_at_once() -> None:
    recipe = with_arguments(fp16=True, bf16=True, learning_rate="1e-4").model_copy(
        update={"variant": "quick", "speed": 3}
    )

    said = message(recipe)
    assert said.startswith("tiny has 5 problems:")
    for culprit in ("variant", "speed", "training_args.learning_rate", "fp16 and bf16"):
        assert culprit in said


def test_recipe_without_its_parts_is_refused_by_their_names() -> None:
    said = message(Recipe.model_construct(name="half"))

    assert said.startswith("half has ")
    for part in ("variant", "model", "dataset", "preprocessing"):
        assert f"{part}: missing" in said
    assert message(Recipe.model_construct()).startswith("The recipe has ")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "found a value of type object"),
        (torch.optim.AdamW, "found a value of type type"),
        ({1, 2}, "found a value of type set"),
        (np.arange(3), "found a value of type numpy.ndarray"),
        (b"adamw", "found a value of type bytes"),
        (1j, "found a value of type complex"),
    ],
)
def test_what_no_file_could_hold_is_refused(value: Any, said: str) -> None:
    assert f"training_args.optim: {said}, which a recipe cannot hold." in message(
        with_arguments(optim=value)
    )
    assert "training_args.lr_scheduler_kwargs.x[0]:" in message(
        with_arguments(lr_scheduler_kwargs={"x": [value]})
    )


def test_object_that_holds_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop

    assert "lists and objects within each other" in message(
        with_arguments(lr_scheduler_kwargs=loop)
    )


def test_numbers_of_a_sweep_are_those_of_a_file() -> None:
    class Optimizer(enum.Enum):
        PLAIN = "adamw_torch"

    found = recheck(
        edited(
            preprocessing={"image_size": np.int64(32), "augmentation": ("horizontal_flip",)},
            dataset=RECIPE.dataset.model_dump() | {"max_train_samples": np.int32(16)},
            model=ModelSection.model_construct(name_or_path=RECIPE.model.name_or_path),
            training_args={
                "seed": torch.tensor(3),
                "learning_rate": np.float32(0.5),
                "use_cpu": np.bool_(True),
                "optim": Optimizer.PLAIN,
                "weight_decay": np.linspace(0, 1, 5)[1],
            },
        )
    )

    assert found.dataset.max_train_samples == 16
    assert found.preprocessing.augmentation == ["horizontal_flip"]
    assert found.model.memory_format == "contiguous"
    expected = {"seed": 3, "learning_rate": 0.5, "use_cpu": True, "optim": "adamw_torch"}
    assert found.training_args == expected | {"weight_decay": 0.25}
    assert all(type(v) in (int, float, bool, str) for v in found.training_args.values())
    found.digest()


def test_recipe_that_is_right_stays_as_it_is() -> None:
    schema = RECIPE.model_copy(update={"schema_": "x.json"})

    assert recheck(RECIPE) == RECIPE
    assert recheck(schema) == schema


def test_suite_says_what_is_wrong_with_all_of_its_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        run_suite([edited(name="a b"), RECIPE, edited(name="c", variant="d")], tmp_path)
    assert "a b has 1 problem" in str(error.value)
    assert "c has 1 problem" in str(error.value)
    for wrong in (RECIPE, "quickstart_untuned", []):
        with pytest.raises(RecipeError, match="list"):
            run_suite(wrong, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", [None, 7, b"runs", "", " ", "a\0b"])
def test_output_that_is_no_folder_is_refused(folder: Any) -> None:
    with pytest.raises(RecipeError, match="output_dir: "):
        run_recipe(RECIPE, folder)


def test_home_is_expanded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "~"))
    monkeypatch.chdir(tmp_path)

    assert output_folder("~/runs") == tmp_path / "~" / "runs"
    assert output_folder(output_folder("~/runs")) == tmp_path / "~" / "runs"
    assert output_folder("a/~") == Path("a/~")


def test_run_in_the_home_is_written_where_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)

    result = run_recipe(edited(preprocessing={"image_size": np.int64(32)}), "~/runs")
    assert result.folder == home / "runs" / "tiny" / result.run_id
    assert load_result("~/runs/tiny") == result
    page = write_report("~/runs", Path("~/report"))[0]
    assert page.is_relative_to(home / "report")
    assert list(elsewhere.iterdir()) == []
    with pytest.raises(HfbenchError, match="no folder"):  # and not: wrote into a folder called ~
        tune(RECIPE, "~/nowhere/best.json")
