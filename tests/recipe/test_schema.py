from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hfbench.recipe.schema as recipe_module
from hfbench.comparison.differences import flatten
from hfbench.errors import RecipeError
from hfbench.recipe.schema import (
    Recipe,
    check_recipe,
    load_recipe,
    looks_like_path,
    recipe_json_schema,
    shipped_recipes,
)

MODELS = ("resnet50", "efficientnet_b0", "vit")
CELLS = [f"{model}_{data}" for model in MODELS for data in ("cifar10", "cifar100")]
PAIRS = [*CELLS, "quickstart"]
TECHNIQUES = ("fp16", "dataloader_pin_memory", "accelerator_config", "gradient_accumulation_steps")

# Accuracy, train accuracy and execution time in seconds, as the reference's README gives them.
REFERENCE: dict[str, tuple[float | None, float | None, int]] = {
    "efficientnet_b0_cifar10": (0.96, None, 3600),
    "vit_cifar10": (0.97, None, 7200),
    "resnet50_cifar10": (0.92, None, 2760),
    "efficientnet_b0_cifar100": (0.90, 0.81, 3960),
    "resnet50_cifar100": (0.752, None, 1080),
    "vit_cifar100": (0.84, 0.84, 9000),
}

# A value unlike quickstart_untuned's for everything that makes an experiment what it is.
COUNTED = {
    "name": "other",
    "variant": "fast",
    "baseline": "quickstart_tuned",
    "model.name_or_path": "timm/resnet50.a1_in1k",
    "model.revision": "v1",
    "model.float32_if_faster": False,
    "model.pretrained": True,
    "model.memory_format": "channels_last",
    "model.attn_implementation": "eager",
    "model.cudnn_benchmark": True,
    "model.keep_freed_memory": True,
    "dataset.name_or_path": "synthetic",
    "dataset.config_name": "plain_text",
    "dataset.revision": "v1",
    "dataset.train_split": "validation",
    "dataset.eval_split": "validation",
    "dataset.image_column": "img",
    "dataset.label_column": "fine_label",
    "dataset.max_train_samples": 7,
    "dataset.max_eval_samples": 7,
    "dataset.max_train_eval_samples": 7,
    "dataset.subset_seed": 7,
    "preprocessing.image_size": 64,
    "preprocessing.location": "device",
    "preprocessing.augmentation": ["horizontal_flip"],
    "training_args.seed": 7,
    "training_args.learning_rate": 0.5,
    "training_args.accelerator_config.non_blocking": True,
    "training_args.max_steps": 7,
}
UNCOUNTED = {
    "description": "Something else.",
    "reference.source": "Nobody",
    "training_args.push_to_hub": True,
    "training_args.hub_model_id": "someone/something",
    "training_args.hub_private_repo": True,
    "training_args.hub_revision": "draft",
    "training_args.hub_strategy": "end",
    "training_args.disable_tqdm": True,
    "training_args.log_level": "error",
    "training_args.report_to": "tensorboard",
    "training_args.run_name": "mine",
}


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def error_of(*overrides: str, recipe: str | Path = "quickstart_untuned") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


def problems_of(*overrides: str) -> str:
    """Return what is wrong, or nothing if the recipe loads."""
    try:
        load_recipe("quickstart_untuned", overrides)
    except RecipeError as error:
        return str(error)
    return ""


def content(name: str = "quickstart_untuned") -> dict[str, Any]:
    value: dict[str, Any] = json.loads(shipped_recipes()[name].read_text("utf-8"))
    return value


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps({**content(), **changes}), "utf-8")
    return path


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from leaves(item, f"{prefix}{name}.")
        else:
            yield prefix + name


# --- the recipes that are shipped ---


def test_shipped_recipes_are_six_cells_and_the_quickstart_in_three_variants() -> None:
    variants = ("untuned", "tuned", "fast")
    assert set(shipped_recipes()) == {f"{pair}_{v}" for pair in PAIRS for v in variants}
    assert len(CELLS) == 6


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe_loads_and_bears_its_file_name(name: str) -> None:
    recipe = load_recipe(name)

    assert recipe.name == name
    assert recipe.variant == name.rpartition("_")[2]
    baseline = f"{name.rpartition('_')[0]}_untuned"
    assert recipe.baseline == (None if recipe.variant == "untuned" else baseline)


@pytest.mark.parametrize("pair", PAIRS)
def test_untuned_and_tuned_differ_in_the_techniques_only(pair: str) -> None:
    untuned, tuned = content(f"{pair}_untuned"), content(f"{pair}_tuned")
    precision = "bf16" if pair == "quickstart" else "fp16"
    free = {"name", "description", "variant", "baseline", "reference", "training_args"}

    assert untuned.keys() == tuned.keys()
    assert [key for key in untuned if key not in free and untuned[key] != tuned[key]] == []
    before, after = untuned["training_args"], tuned["training_args"]
    assert list(before) == list(after)
    assert {key for key in before if before[key] != after[key]} == {precision, *TECHNIQUES[1:]}


@pytest.mark.parametrize("cell", CELLS)
def test_cell_states_every_technique_in_both_arms(cell: str) -> None:
    untuned = content(f"{cell}_untuned")["training_args"]
    tuned = content(f"{cell}_tuned")["training_args"]

    assert {name: untuned[name] for name in (*TECHNIQUES, "tf32")} == {
        "fp16": False,
        "dataloader_pin_memory": False,
        "accelerator_config": {"non_blocking": False},
        "gradient_accumulation_steps": 1,
        "tf32": False,
    }
    assert {name: tuned[name] for name in (*TECHNIQUES, "tf32")} == {
        "fp16": True,
        "dataloader_pin_memory": True,
        "accelerator_config": {"non_blocking": True},
        "gradient_accumulation_steps": 4,
        "tf32": False,
    }
    # Trainer's own default, the fused one, is itself a tuning.
    assert untuned["optim"] == tuned["optim"] == "adamw_torch"


# What each fast variant sets otherwise than untuned, but for the batch of training.
FAST = {
    "model.keep_freed_memory": True,
    "preprocessing.location": "device",
    "training_args.bf16": True,
    "training_args.optim": "adamw_torch_fused",
    "training_args.save_strategy": "no",
}
FAST_ON_GPU = FAST | {
    "training_args.logging_nan_inf_filter": False,
    "training_args.dataloader_pin_memory": True,
    "training_args.accelerator_config.non_blocking": True,
    "training_args.dataloader_num_workers": 0,
    "training_args.per_device_eval_batch_size": 512,
}
CONVOLUTIONS = {"model.memory_format": "channels_last", "model.cudnn_benchmark": True}
FAST_BY_MODEL = {
    "resnet50": FAST_ON_GPU | CONVOLUTIONS,
    "efficientnet_b0": FAST_ON_GPU | CONVOLUTIONS,
    "vit": FAST_ON_GPU | {"model.attn_implementation": "sdpa"},
    "quickstart": FAST,
}
TEXTS = {"name", "description", "variant", "baseline", "reference"}


@pytest.mark.parametrize("pair", PAIRS)
def test_fast_differs_from_untuned_in_what_the_variant_names_alone(pair: str) -> None:
    untuned, fast = (load_recipe(f"{pair}_{variant}") for variant in ("untuned", "fast"))
    before, after = (
        dict(flatten({k: v for k, v in recipe.as_json().items() if k not in TEXTS}))
        for recipe in (untuned, fast)
    )
    found = {name: after.get(name) for name in before | after if before.get(name) != after[name]}
    batch = found.pop("training_args.per_device_train_batch_size")
    assert found == FAST_BY_MODEL[pair.partition("_cifar")[0]]
    # The same recipe of learning as tuned's: as many images in an optimizer step.
    tuned = load_recipe(f"{pair}_tuned").training_args
    assert batch == (tuned["per_device_train_batch_size"] * tuned["gradient_accumulation_steps"])


@pytest.mark.parametrize("pair", PAIRS)
def test_fast_alone_keeps_freed_memory(pair: str) -> None:
    kept = {
        v: load_recipe(f"{pair}_{v}").model.keep_freed_memory for v in ("untuned", "tuned", "fast")
    }
    assert kept == {"untuned": False, "tuned": False, "fast": True}


@pytest.mark.parametrize("cell", CELLS)
def test_fast_carries_the_numbers_of_the_reference_and_says_that_they_are_tuned_ones(
    cell: str,
) -> None:
    tuned, fast = (load_recipe(f"{cell}_{variant}").reference for variant in ("tuned", "fast"))
    assert tuned is not None
    assert fast is not None
    assert fast.model_dump(exclude={"note"}) == tuned.model_dump(exclude={"note"})
    assert fast.note is not None
    assert "of its tuned run" in fast.note


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
@pytest.mark.parametrize("variant", ["untuned", "tuned"])
def test_vit_trains_with_the_batch_size_of_the_reference(data: str, variant: str) -> None:
    assert content(f"vit_{data}_{variant}")["training_args"]["per_device_train_batch_size"] == 70


@pytest.mark.parametrize("cell", CELLS)
def test_tuned_recipe_carries_the_numbers_of_the_reference(cell: str) -> None:
    reference = load_recipe(f"{cell}_tuned").reference

    assert reference is not None
    found = (reference.accuracy, reference.train_accuracy, reference.execution_seconds)
    assert found == REFERENCE[cell]
    assert "2312.10024" in reference.source


@pytest.mark.parametrize("name", [f"{cell}_untuned" for cell in CELLS])
def test_untuned_recipe_carries_no_reference(name: str) -> None:
    assert load_recipe(name).reference is None


@pytest.mark.parametrize(
    ("data", "hub", "label"),
    [
        ("cifar10", "uoft-cs/cifar10", "label"),
        ("cifar100", "uoft-cs/cifar100", "fine_label"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_cell_names_the_hub_copy_and_its_columns(
    model: str, data: str, hub: str, label: str
) -> None:
    dataset = load_recipe(f"{model}_{data}_tuned").dataset

    assert dataset.name_or_path == hub
    assert (dataset.image_column, dataset.label_column) == ("img", label)
    assert (dataset.train_split, dataset.eval_split) == ("train", "test")
    assert dataset.max_train_samples is None
    assert dataset.max_eval_samples is None


# --- finding a recipe ---


def test_shipped_recipe_is_found_by_name_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert load_recipe("vit_cifar100_tuned").name == "vit_cifar100_tuned"
    assert load_recipe("vit_cifar100_tuned.json").name == "vit_cifar100_tuned"
    assert load_recipe(Path("vit_cifar100_tuned")).name == "vit_cifar100_tuned"


def test_recipes_inside_the_package_win_as_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "hfbench" / "recipe" / "shipped"
    inside.mkdir(parents=True)
    (inside / "only_one.json").write_text(json.dumps({**content(), "name": "only_one"}))
    monkeypatch.setattr(
        recipe_module, "__file__", str(tmp_path / "hfbench" / "recipe" / "schema.py")
    )

    assert list(shipped_recipes()) == ["only_one"]
    assert load_recipe("only_one").name == "only_one"


def test_file_in_the_working_folder_wins_over_a_shipped_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart_tuned.json").write_text(json.dumps({**content(), "name": "mine"}))

    assert load_recipe("quickstart_tuned.json").name == "mine"


@pytest.mark.parametrize("name", ["quickstart_tund", "quickstart-tuned", "a/quickstart_tund.json"])
def test_missing_recipe_suggests_the_nearest(name: str) -> None:
    assert error_of(recipe=name) == f"No recipe {name}; did you mean quickstart_tuned?"


def test_missing_recipe_unlike_any_lists_the_shipped() -> None:
    message = error_of(recipe="zzz")

    assert message.startswith("No recipe zzz; shipped with hfbench are ")
    assert all(name in message for name in shipped_recipes())


def test_folder_is_refused_as_a_recipe(tmp_path: Path) -> None:
    assert error_of(recipe=tmp_path) == f"{tmp_path} is a folder; expected a recipe file."


@pytest.mark.parametrize("name", ["a" * 300, "~no-such-user/recipe.json"])
def test_name_that_no_file_can_have_is_a_missing_recipe(name: str) -> None:
    assert error_of(recipe=name).startswith(f"No recipe {name[:90]}")


# --- reading the file ---


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content()).encode())

    assert load_recipe(path).digest() == load_recipe("quickstart_untuned").digest()


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "line 1, column 1"),
        ('{\n  "name": "x"\n  "variant": "tuned"\n}', "line 3, column 3"),
        ("{\"name\": 'x'}", "line 1, column 10"),
    ],
)
def test_invalid_json_is_located(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)

    message = error_of(recipe=path)
    assert message.startswith(f"{path} is not valid JSON: ")
    assert message.endswith(f" at {where}.")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a", "name": "b"}', "name stands twice in one object; keep one."),
        (
            '{"training_args": {"seed": 1, "fp16": true, "seed": 2}}',
            "seed stands twice in one object; keep one.",
        ),
        ('{"a": NaN}', "NaN is not JSON; write a finite number or null."),
        ('{"a": -Infinity}', "-Infinity is not JSON; write a finite number or null."),
        ("[1]", "expected a JSON object, found list."),
        ("3", "expected a JSON object, found int."),
    ],
)
def test_json_that_is_no_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)

    assert error_of(recipe=path) == f"{path}: {said}"


def test_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "utf16.json"
    path.write_bytes(json.dumps(content()).encode("utf-16"))

    assert error_of(recipe=path).startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "huge.json"
    path.write_text(text)

    assert str(path) in error_of(recipe=path)


# --- checking ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nmae": 1}, "nmae: unknown; did you mean name?"),
        (
            {"model": {"name_or_path": "a/b", "pretraind": True}},
            "model.pretraind: unknown; did you mean pretrained?",
        ),
        (
            {"model": {"name_or_path": "a/b", "zzz": True}},
            "model.zzz: unknown; expected one of name_or_path, revision, pretrained, "
            "memory_format, attn_implementation, cudnn_benchmark, keep_freed_memory, "
            "float32_if_faster.",
        ),
        (
            {"dataset": {"name_or_path": "digits", "eval_splitt": "test"}},
            "dataset.eval_splitt: unknown; did you mean eval_split?",
        ),
        (
            {"preprocessing": {"image_size": 32, "imagesize": 32}},
            "preprocessing.imagesize: unknown; did you mean image_size?",
        ),
        (
            {"reference": {"source": "x", "acuracy": 0.5}},
            "reference.acuracy: unknown; did you mean accuracy?",
        ),
        (
            {"training_args": {"learning_ratee": 0.1}},
            "training_args.learning_ratee: unknown; did you mean learning_rate?",
        ),
        ({"schema_": "x"}, "schema_: unknown; did you mean $schema?"),
    ],
)
def test_unknown_key_is_named_at_every_level(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = write(tmp_path, **changes)

    assert error_of(recipe=path) == f"{path} has 1 problem:\n  {said}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.pretrained=1", "model.pretrained: found 1, expected true or false."),
        ("dataset.max_train_samples=1.5", "found 1.5, expected a whole number."),
        ("dataset.max_train_samples=true", "found true, expected a whole number."),
        ('dataset.max_train_samples="100"', 'found "100", expected a whole number.'),
        ("dataset.max_train_samples=0", "found 0, expected greater than or equal to 1."),
        ("preprocessing.image_size=2000", "found 2000, expected less than or equal to 1024."),
        ("preprocessing.augmentation=random_crop", 'found "random_crop", expected a list.'),
        ('preprocessing.augmentation=["flip"]', 'preprocessing.augmentation.0: found "flip"'),
        ("preprocessing.location=gpu", "expected 'host' or 'device'"),
        ("variant=tund", "did you mean tuned?"),
        ("dataset.subset_seed=1e999", "expected a whole number."),
    ],
)
def test_wrong_type_says_what_was_found_and_expected(override: str, said: str) -> None:
    assert said in error_of(override)


@pytest.mark.parametrize("field", ["accuracy", "execution_seconds"])
@pytest.mark.parametrize("value", ["NaN", "1e999", "true", '"0.5"', "-1"])
def test_reference_number_has_to_be_one(field: str, value: str) -> None:
    assert f"reference.{field}: found" in error_of(f"reference.{field}={value}")


@pytest.mark.parametrize(
    ("section", "value"),
    [
        *product(["model", "dataset", "preprocessing"], [3, None, [], "x"]),
        *product(["reference"], [3, [], "x"]),
    ],
)
def test_section_that_is_no_object_is_explained_in_the_words_of_json(
    tmp_path: Path, section: str, value: Any
) -> None:
    message = error_of(recipe=write(tmp_path, **{section: value}))

    assert f"{section}: found {json.dumps(value)}, expected " in message
    assert "Section" not in message  # a name from hfbench's source tells a user nothing


@pytest.mark.parametrize("name", ["", "a b", "../x", ".hidden", "a/b", "x" * 97])
def test_name_that_makes_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    message = error_of(recipe=write(tmp_path, name=name))

    assert f"name: found {json.dumps(name)}, expected " in message


@pytest.mark.parametrize(
    "missing", ["name", "variant", "model", "dataset", "preprocessing", "model.name_or_path"]
)
def test_missing_key_is_named(tmp_path: Path, missing: str) -> None:
    values = content()
    *section, key = missing.split(".")
    del (values[section[0]] if section else values)[key]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(values))

    assert error_of(recipe=path).splitlines()[1:] == [f"  {missing}: missing; it is required."]


def test_every_problem_is_reported_in_one_error(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        variant="tund",
        model={"name_or_path": "./nowhere", "pretrained": 1},
        dataset={"name_or_path": "/no/such/folder", "trainsplit": "x"},
        training_args={"fp16": True, "bf16": True, "learning_rate": "1e-4", "warmup_ratio": 0.1},
    )
    lines = error_of("zzz=1", "noequals", recipe=path).splitlines()

    assert lines[0] == f"{path} has 10 problems:"
    starts = [line.strip().split(":")[0] for line in lines[1:]]
    assert sorted(starts) == sorted(
        [
            'override "zzz=1"',
            'override "noequals"',
            "variant",
            "model.pretrained",
            "model.name_or_path",
            "dataset.trainsplit",
            "dataset.name_or_path",
            "training_args",
            "training_args.learning_rate",
            "training_args.warmup_ratio",
        ]
    )


def test_source_of_the_error_is_the_name_that_was_given() -> None:
    assert error_of("variant=x").startswith("quickstart_untuned has 1 problem:\n")


@pytest.mark.parametrize("section", ["model", "dataset"])
@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./nowhere", "../nowhere/x", "~/no-such-folder", "data.tar.gz"]
)
def test_path_that_does_not_exist_is_refused_before_the_hub_is_asked(
    section: str, path: str
) -> None:
    message = error_of(f"{section}.name_or_path={path}")

    assert f'{section}.name_or_path: "{path}" does not exist (looked in {Path.cwd()})' in message


@pytest.mark.parametrize("section", ["model", "dataset"])
def test_path_of_an_unknown_user_is_a_problem_like_any_other(section: str) -> None:
    assert f"{section}.name_or_path: " in error_of(f"{section}.name_or_path=~no-such-user/x")


def test_existing_folder_is_accepted(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart_untuned", [f"dataset.name_or_path={tmp_path}"])

    assert recipe.dataset.name_or_path == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("uoft-cs/cifar10", False),
        ("digits", False),
        ("timm/resnet50.a1_in1k", False),
        ("./cifar10", True),
        ("../cifar10", True),
        ("/data", True),
        ("~/data", True),
        ("a/b/c", True),
        ("cifar-10-python.tar.gz", True),
        ("folder/", True),
    ],
)
def test_looks_like_path_tells_places_from_hub_names(name: str, is_path: bool) -> None:
    assert looks_like_path(name) is is_path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dataset.eval_split=train", 'train_split and eval_split are both "train"'),
        ("dataset.num_classes=3", "only the synthetic data set has it; write null."),
        (
            'preprocessing.augmentation=["random_crop", "random_crop"]',
            "preprocessing.augmentation: an entry stands twice.",
        ),
    ],
)
def test_contradiction_between_keys_is_refused(override: str, said: str) -> None:
    assert said in error_of(override)


def test_synthetic_data_may_name_its_number_of_classes() -> None:
    recipe = load_recipe(
        "quickstart_untuned", ["dataset.name_or_path=synthetic", "dataset.num_classes=3"]
    )

    assert recipe.dataset.num_classes == 3


def test_check_recipe_returns_the_recipe_beside_problems_that_leave_its_shape_whole() -> None:
    recipe, problems = check_recipe({**content(), "training_args": {"fp16": 1}})

    assert isinstance(recipe, Recipe)
    assert len(problems) == 1


# --- overrides ---


def test_override_value_is_read_as_json_else_as_text() -> None:
    recipe = load_recipe(
        "quickstart_untuned",
        [
            "training_args.learning_rate=1e-4",
            "training_args.optim=sgd",
            "training_args.save_total_limit=null",
            "training_args.logging_first_step=true",
            'preprocessing.augmentation=["horizontal_flip"]',
            "description=a=b, c",
            'model.revision="5"',
            "model.pretrained=false",
        ],
    )

    assert recipe.training_args["learning_rate"] == 1e-4
    assert recipe.training_args["optim"] == "sgd"
    assert recipe.training_args["save_total_limit"] is None
    assert recipe.training_args["logging_first_step"] is True
    assert recipe.preprocessing.augmentation == ["horizontal_flip"]
    assert recipe.description == "a=b, c"
    assert recipe.model.revision == "5"


@pytest.mark.parametrize("value", ["5", "12e4567", "true", "null"])
@pytest.mark.parametrize("name", ["model.revision", "description", "training_args.run_name"])
def test_text_that_looks_like_json_is_taken_or_asked_for_in_quotes(name: str, value: str) -> None:
    message = problems_of(f"{name}={value}", "model.pretrained=false")

    assert message == "" or "quotes" in message


def test_override_leaves_everything_else_as_it_was() -> None:
    before, after = (load_recipe("quickstart_untuned", o) for o in ([], ["training_args.seed=7"]))

    assert after.as_json() == {
        **before.as_json(),
        "training_args": {**before.training_args, "seed": 7},
    }


def test_last_override_of_a_name_wins() -> None:
    recipe = load_recipe("quickstart_untuned", ["training_args.seed=1", "training_args.seed=2"])

    assert recipe.training_args["seed"] == 2


def test_nested_override_keeps_its_siblings(tmp_path: Path) -> None:
    config = {"even_batches": True, "non_blocking": False}
    path = write(tmp_path, training_args={"accelerator_config": config})
    recipe = load_recipe(path, ["training_args.accelerator_config.non_blocking=true"])

    assert recipe.training_args["accelerator_config"] == {
        "even_batches": True,
        "non_blocking": True,
    }


def test_nested_override_makes_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, training_args={})
    recipe = load_recipe(path, ["training_args.accelerator_config.non_blocking=true"])

    assert recipe.training_args == {"accelerator_config": {"non_blocking": True}}


def test_override_of_a_nested_misspelling_is_named() -> None:
    message = error_of("training_args.accelerator_config.nonblocking=true")

    assert "accelerator_config.nonblocking: unknown; did you mean non_blocking?" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("modle.pretrained=false", "modle is unknown in a recipe; did you mean model?"),
        ("dataset.evalsplit=x", "evalsplit is unknown in dataset; did you mean eval_split?"),
        (
            "model.zzz=1",
            "zzz is unknown in model; it has name_or_path, revision, pretrained, memory_format, "
            "attn_implementation, cudnn_benchmark, keep_freed_memory, float32_if_faster.",
        ),
        ("dataset.train_split.x=1", "dataset.train_split has no parts."),
        ("name.x=1", "name has no parts."),
    ],
)
def test_override_of_an_unknown_path_is_refused(override: str, said: str) -> None:
    assert error_of(override).splitlines()[1:] == [f'  override "{override}": {said}']


@pytest.mark.parametrize("override", ["nope", "=3", "a..b=1", "training_args.=1", ".=1", ""])
def test_override_that_is_no_assignment_is_refused(override: str) -> None:
    assert f'override "{override}": expected name=value' in error_of(override)


@pytest.mark.parametrize(
    "override",
    ["model={}", "dataset=digits", "preprocessing=5", "reference={}", 'training_args={"seed": 1}'],
)
def test_override_of_a_whole_section_is_refused(override: str) -> None:
    section = override.partition("=")[0]

    assert f"{section} is a whole section; set its parts" in error_of(override)


@pytest.mark.parametrize("override", ["$schema=x", "schema=x"])
def test_override_of_the_schema_speaks_of_the_name_in_the_file(override: str) -> None:
    assert "schema_" not in problems_of(override)


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])
def test_override_that_python_cannot_hold_is_refused(value: str) -> None:
    assert "training_args.seed" in error_of(f"training_args.seed={value}")


def test_removed_training_argument_names_its_replacement() -> None:
    message = error_of("training_args.evaluation_strategy=epoch")

    assert message.endswith(
        "training_args.evaluation_strategy: removed in transformers 5; write eval_strategy."
    )


# --- the digest ---


def test_digest_is_a_sha256_and_stable_between_loads() -> None:
    first, second = load_recipe("vit_cifar10_tuned"), load_recipe("vit_cifar10_tuned")

    assert first.digest() == second.digest()
    assert re.fullmatch("[0-9a-f]{64}", first.digest())


def test_digests_of_shipped_recipes_differ() -> None:
    digests = {load_recipe(name).digest() for name in shipped_recipes()}

    assert len(digests) == len(shipped_recipes())


@pytest.mark.parametrize("name", UNCOUNTED)
def test_digest_ignores_what_does_not_change_the_experiment(name: str) -> None:
    changed = load_recipe("quickstart_untuned", as_overrides({name: UNCOUNTED[name]}))

    assert changed.as_json() != load_recipe("quickstart_untuned").as_json()
    assert changed.digest() == load_recipe("quickstart_untuned").digest()


@pytest.mark.parametrize("name", COUNTED)
def test_digest_counts_everything_else(name: str) -> None:
    more = ["dataset.name_or_path=synthetic"] if name == "dataset.num_classes" else []
    if name in ("model.name_or_path", "model.revision"):  # whose weights is asked then
        more = ["model.pretrained=false"]
    values = {name: COUNTED[name]}
    if COUNTED[name] == "validation":
        other = "dataset.eval_split" if name.endswith("train_split") else "dataset.train_split"
        values |= {other: load_recipe("quickstart_untuned").as_json()["dataset"][other[8:]]}

    changed = load_recipe("quickstart_untuned", [*more, *as_overrides(values)])
    assert changed.digest() != load_recipe("quickstart_untuned", more).digest()


def test_digest_counts_the_number_of_synthetic_classes() -> None:
    synthetic = ["dataset.name_or_path=synthetic"]
    before = load_recipe("quickstart_untuned", synthetic)

    assert before.digest() != (
        load_recipe("quickstart_untuned", [*synthetic, "dataset.num_classes=3"]).digest()
    )


def test_no_key_of_a_recipe_is_left_out_of_the_two_lists_above() -> None:
    known = {
        name
        for name in leaves(load_recipe("quickstart_untuned").as_json())
        if not name.startswith("training_args.")
    }

    listed = {n for n in (*COUNTED, *UNCOUNTED) if not n.startswith("training_args.")}
    assert known - listed == {"$schema", "reference", "dataset.num_classes"}


def test_digest_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    values = {key: content()[key] for key in sorted(content(), reverse=True)}
    values["training_args"] = dict(reversed(values["training_args"].items()))
    path.write_text(json.dumps(values))

    assert load_recipe(path).digest() == load_recipe("quickstart_untuned").digest()


text = st.text(string.printable + "äß–ж", min_size=1, max_size=12)
line = st.text(string.ascii_letters + string.punctuation + " äß–ж", min_size=1, max_size=12)
settable = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(string.ascii_letters + string.digits, min_size=1, max_size=20),
        "description": text,
        "variant": st.sampled_from(["untuned", "tuned", "fast"]),
        "model.revision": st.none() | line,
        "model.pretrained": st.booleans(),
        "dataset.max_train_samples": st.none() | st.integers(1, 10**12),
        "dataset.subset_seed": st.integers(0, 10**12),
        "preprocessing.image_size": st.integers(8, 1024),
        "preprocessing.augmentation": st.lists(
            st.sampled_from(["random_crop", "horizontal_flip"]), unique=True
        ),
        "training_args.learning_rate": st.floats(0, 1e3) | st.integers(0, 9),
        "training_args.weight_decay": st.floats(0, 1, allow_subnormal=True),
        "training_args.seed": st.integers(0, 2**32 - 1),
        "training_args.full_determinism": st.booleans(),
        "training_args.run_name": line,
        "training_args.accelerator_config.non_blocking": st.booleans(),
    },
)


@given(values=settable)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_recipe_survives_being_written_and_read(values: dict[str, Any]) -> None:
    values = {"model.pretrained": False} | values
    recipe = load_recipe("quickstart_untuned", as_overrides(values))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "written.json"
        path.write_text(json.dumps(recipe.as_json(), ensure_ascii=False), "utf-8")
        again = load_recipe(path)

    assert again.as_json() == recipe.as_json()
    assert again.digest() == recipe.digest()


@given(overrides=st.lists(st.text(max_size=30), max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_override_ends_in_a_recipe_or_a_recipe_error(overrides: list[str]) -> None:
    message = problems_of(*overrides)

    assert message == "" or message.startswith("quickstart_untuned has ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


@given(
    name=st.sampled_from(
        [
            *("name", "variant", "model", "dataset", "preprocessing", "training_args"),
            *("reference", "model.name_or_path", "dataset.num_classes"),
            *("preprocessing.augmentation", "training_args.report_to", "training_args.optim"),
            *("training_args.accelerator_config", "training_args.learning_rate"),
            "training_args.lr_scheduler_kwargs",
        ]
    ),
    value=json_values,
)
@settings(max_examples=200, deadline=None)
def test_any_value_ends_in_a_recipe_or_in_problems(name: str, value: Any) -> None:
    values = content()
    *section, key = name.split(".")
    (values[section[0]] if section else values)[key] = value

    recipe, problems = check_recipe(values)
    assert recipe is not None or problems
    assert all(isinstance(problem, str) and problem for problem in problems)


# --- arguments and the schema ---


def test_argument_is_the_given_value_or_the_default_of_the_library() -> None:
    recipe = load_recipe("quickstart_untuned")

    assert recipe.argument("dataloader_pin_memory") is False
    assert recipe.argument("max_steps") == -1


def accepts(schema: Mapping[str, Any], value: Any, root: Mapping[str, Any]) -> bool:
    """Judge a value by the few keywords of JSON Schema that a recipe's schema uses."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in schema:
        return any(accepts(option, value, root) for option in schema["anyOf"])
    kinds: dict[str, tuple[type, ...]] = {
        "object": (dict,),
        "array": (list,),
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "null": (type(None),),
    }
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (kind != "boolean" and value in (True,))):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    if "minimum" in schema and value < schema["minimum"]:
        return False
    if isinstance(value, list) and "items" in schema:
        return all(accepts(schema["items"], item, root) for item in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if not set(schema.get("required", ())) <= set(value):
            return False
        if schema.get("additionalProperties") is False and not set(value) <= set(known):
            return False
        return all(
            accepts(known[name], item, root) for name, item in value.items() if name in known
        )
    return True


def committed_schema() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "docs" / "recipe.schema.json"
    schema: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return schema


@pytest.mark.parametrize("schema", [recipe_json_schema(), committed_schema()], ids=["now", "docs"])
def test_json_schema_accepts_every_shipped_recipe(schema: dict[str, Any]) -> None:
    for name in shipped_recipes():
        assert accepts(schema, content(name), schema), name
        assert content(name)["training_args"].keys() <= (
            schema["properties"]["training_args"]["properties"].keys()
        )


@pytest.mark.parametrize(
    "change",
    [
        {"nmae": "x"},
        {"model": {"name_or_path": "a", "pretraind": True}},
        {"model": {}},
        {"variant": "tund"},
        {"name": "a b"},
        {"preprocessing": {"image_size": 4}},
        {"preprocessing": {"image_size": 32, "augmentation": ["flip"]}},
        {"training_args": 3},
    ],
)
def test_json_schema_refuses_what_the_loader_refuses(change: dict[str, Any]) -> None:
    schema = recipe_json_schema()

    assert check_recipe({**content(), **change})[1]
    assert not accepts(schema, {**content(), **change}, schema)


def test_json_schema_offers_no_argument_that_hfbench_sets_itself() -> None:
    names = recipe_json_schema()["properties"]["training_args"]["properties"]

    assert "learning_rate" in names
    assert names["learning_rate"]["description"]
    assert not {"output_dir", "hub_token", "remove_unused_columns"} & set(names)


def test_committed_schema_has_the_sections_of_the_current_one() -> None:
    now = recipe_json_schema()

    assert committed_schema()["$defs"] == now["$defs"]
    assert committed_schema()["properties"].keys() == now["properties"].keys()
    assert committed_schema()["required"] == now["required"]
