"""The recipe: one JSON file that says everything about one experiment.

`load_recipe` reads a file or a shipped recipe, applies overrides and reports every problem in one
`RecipeError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hfbench.errors import RecipeError
from hfbench.errors.harmless import holds_credential, shown
from hfbench.recipe.arguments import HUB_ARGUMENTS, check_training_args, shown_name, suggest
from hfbench.recipe.overrides import apply_overrides, section_of

EMBEDDED_DATASETS = ("digits", "synthetic")
Augmentation = Literal["random_crop", "horizontal_flip", "color", "cutout", "mixup", "cutmix"]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
RecipeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]

# What no recipe needs, and what would take more memory or time than it is worth to say no to.
_LARGEST_FILE = 2**20  # bytes
_MOST_ENTRIES = 1000  # of an object or a list
_DEEPEST = 16  # objects and lists inside each other
_LONGEST_TEXT = 4096  # letters, as of a path
_FREE_TEXT = {"description", "reference.source", "reference.note"}  # shown, and nothing else
_LARGEST_NUMBER = 2**63 - 1
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 20  # keys that stand twice

# What does not change the experiment, so that a finished run is recognised without it.
_NOT_IN_HASH = ("schema_", "description", "reference")
_NOT_IN_HASH_ARGS = {
    *HUB_ARGUMENTS,
    *("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node"),
    *("report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
}


class _Section(BaseModel):
    # Strict: "1e-4" is no number and 1 is not true. Unknown keys are refused: a misspelt one must
    # not be ignored.
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelSection(_Section):
    """Which classifier is fine-tuned."""

    name_or_path: Annotated[str, Field(min_length=1)] = Field(
        description="A model on the Hub, as timm/resnet50.a1_in1k, or a folder with config.json."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit on the Hub; null means main."
    )
    pretrained: bool = Field(
        True,
        description="false builds the same architecture with fresh weights, offline if known.",
    )
    memory_format: Literal["contiguous", "channels_last"] = Field(
        "contiguous",
        description="channels_last (NHWC in memory) is what fast convolution kernels work in.",
    )
    attn_implementation: str | None = Field(
        None,
        description="Attention of a transformer: sdpa, eager, …; null: the library's own choice.",
    )
    cudnn_benchmark: bool = Field(
        False,
        description="Let cuDNN time its convolution algorithms on the first step of each shape.",
    )
    keep_freed_memory: bool = Field(
        False,
        description="Keep the memory that a step frees for the next one (glibc): faster on a CPU.",
    )
    float32_if_faster: bool = Field(
        False,
        description="Train in float32 instead of bfloat16 on a CPU that computes it more slowly.",
    )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy; a checkpoint is not named in passing where fresh weights are trained.

        Raises:
            RecipeError: If `update` names another checkpoint, and neither says whether its weights
                are meant.
        """
        copy = super().model_copy(update=update, deep=deep)
        named = (copy.name_or_path, copy.revision) != (self.name_or_path, self.revision)
        problems = _unclear_weights(dict(copy)) if named else []
        if problems and "pretrained" not in (update or {}):
            raise RecipeError.from_problems("the recipe", problems)
        return copy

    @property
    def weights(self) -> str:
        """Say which weights training starts from, in words."""
        return "pretrained" if self.pretrained else "fresh weights"


class DatasetSection(_Section):
    """Which labelled images it is trained and tested on."""

    name_or_path: Annotated[str, Field(min_length=1)] = Field(
        description="A data set on the Hub, a folder, CIFAR's own archive, digits, or synthetic."
    )
    config_name: str | None = Field(
        None, description="The data set's configuration on the Hub; null means its default."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit on the Hub; null means main."
    )
    train_split: str = Field("train", description="Split to train on.")
    eval_split: str = Field("test", description="Split to test on.")
    image_column: str = Field("image", description="Column that holds the images.")
    label_column: str = Field("label", description="Column that holds the classes.")
    max_train_samples: PositiveInt | None = Field(
        None, description="Train on a class-balanced subset of this size."
    )
    max_eval_samples: PositiveInt | None = Field(
        None, description="Test on a class-balanced subset of this size."
    )
    max_train_eval_samples: PositiveInt | None = Field(
        None,
        description="Measure train accuracy on a class-balanced subset of this size; null: all.",
    )
    subset_seed: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Seed of the subsets, apart from the training seed: repeats share their test.",
    )
    num_classes: Annotated[int, Field(ge=2, le=100_000)] | None = Field(
        None,
        description="Classes of the synthetic data set (default 10); null for every other.",
    )


class PreprocessingSection(_Section):
    """How a uint8 image becomes the model's input."""

    image_size: Annotated[int, Field(ge=8, le=1024)] = Field(
        description="Height and width of the model's input."
    )
    location: Literal["host", "device"] = Field(
        "host",
        description="host: in the data loader, on the CPU; device: batched, where the model is.",
    )
    augmentation: list[Augmentation] = Field(
        [],
        description="Applied to training images, in the data set's own resolution, in this order.",
    )


class ReferenceSection(_Section):
    """Somebody else's numbers for the same cell, shown beside ours."""

    accuracy: Fraction | None = Field(None, description="Test accuracy.")
    train_accuracy: Fraction | None = Field(None, description="Train accuracy.")
    f1: Fraction | None = Field(None, description="F1; null if they do not give one.")
    execution_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Execution time in seconds."
    )
    source: str = Field(description="Who measured it, on what hardware.")
    note: str | None = Field(None, description="What a reader has to know about these numbers.")


class Recipe(_Section):
    """One experiment: a model, a data set, how images are prepared, and `TrainingArguments`."""

    schema_: str | None = Field(None, alias="$schema", description="JSON Schema for editors.")
    name: RecipeName = Field(
        description="Names the folder under runs/: letters, digits, dot, dash and underscore."
    )
    description: str = Field("", description="What this experiment is.")
    variant: Literal["untuned", "tuned", "fast"] = Field(
        description="Which set of techniques it uses."
    )
    baseline: RecipeName | None = Field(
        None, description="Name of the recipe that this one is compared with."
    )
    model: ModelSection
    dataset: DatasetSection
    preprocessing: PreprocessingSection
    training_args: dict[str, Any] = Field(
        {}, description="Names and values of transformers.TrainingArguments."
    )
    reference: ReferenceSection | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the recipe as the JSON object that `load_recipe` would read."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=False)

    def digest(self) -> str:
        """Return the SHA-256 (hexadecimal) of everything that makes the experiment what it is.

        The description, the reference's numbers and where the model is pushed do not count.
        """
        content = self.model_dump(mode="json", exclude=set(_NOT_IN_HASH))
        content["training_args"] = {
            k: v for k, v in self.training_args.items() if k not in _NOT_IN_HASH_ARGS
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def digest_but_seed(self) -> str:
        """Return what the repeats of a recipe have in common: its digest without the seed."""
        arguments = {name: v for name, v in self.training_args.items() if name != "seed"}
        return self.model_copy(update={"training_args": arguments}).digest()

    def argument(self, name: str) -> Any:
        """Return a training argument as given, else the installed `TrainingArguments`' default."""
        from hfbench.recipe.arguments import training_argument_fields

        if name in self.training_args:
            return self.training_args[name]
        return training_argument_fields()[name].default


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with hfbench: name -> file."""
    inside = Path(__file__).parent / "shipped"  # in a wheel
    folder = inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, and check all that can be checked without running it.

    Args:
        name_or_path: A JSON file, or the name of a shipped recipe such as ``vit_cifar100_tuned``.
        overrides: ``dotted.name=value`` each; the value is read as JSON, else taken as text.

    Returns:
        The resolved recipe.

    Raises:
        RecipeError: With every problem found: unknown keys, wrong types, unknown or removed
            `TrainingArguments`, contradictions, missing files.
    """
    path = _find(name_or_path)
    content, overrides = _read_json(path), list(overrides)
    named = _checkpoint_named_in(content)
    problems = apply_overrides(content, overrides, Recipe)
    said = {override.partition("=")[0] for override in overrides}
    if "model.pretrained" not in said and _checkpoint_named_in(content) != named:
        problems += _unclear_weights(content["model"])
    recipe, more = check_recipe(content)
    if problems or more or recipe is None:
        raise RecipeError.from_problems(str(name_or_path), problems + more)
    return recipe


def check_recipe(content: Any) -> tuple[Recipe | None, list[str]]:
    """Check a recipe's content.

    Args:
        content: The JSON object.

    Returns:
        The recipe (``None`` if its shape is wrong) and every problem found.
    """
    recipe, problems = None, []
    if not isinstance(content, Mapping):
        return None, [f"expected a JSON object, found {type(content).__name__}."]
    unusable, is_too_deep = _unusable(content)
    if is_too_deep:
        return None, list(unusable.values())
    content = _leave_out(content, unusable)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        problems += [_say(detail) for detail in error.errors()]
    arguments = content.get("training_args")
    if isinstance(arguments, Mapping):
        problems += check_training_args(arguments)
    for section in ("model", "dataset"):
        values = content.get(section)
        if isinstance(values, Mapping) and isinstance(values.get("name_or_path"), str):
            problems += _missing_file(f"{section}.name_or_path", values["name_or_path"])
    if recipe is not None:
        problems += _dataset_problems(recipe.dataset)
        if recipe.model.attn_implementation and re.search("[/:]", recipe.model.attn_implementation):
            problems.append(
                "model.attn_implementation: a kernel from the Hub is code from elsewhere, which "
                "hfbench does not run; expected sdpa, eager, flash_attention_2 or the like."
            )
        if len(set(recipe.preprocessing.augmentation)) < len(recipe.preprocessing.augmentation):
            problems.append("preprocessing.augmentation: an entry stands twice.")
    if unusable:
        missing = tuple(f"{where}: missing;" for where in unusable)
        problems = [*unusable.values(), *(p for p in problems if not p.startswith(missing))]
        return None, problems
    return recipe, problems


def _checkpoint_named_in(content: Mapping[str, Any]) -> tuple[Any, Any]:
    model = content.get("model")
    model = model if isinstance(model, Mapping) else {}
    return model.get("name_or_path"), model.get("revision")


def _unclear_weights(model: Mapping[str, Any]) -> list[str]:
    """Say that a checkpoint is named where fresh weights would be trained under its name."""
    if model.get("pretrained") is not False:
        return []
    name = " at ".join(str(model[key]) for key in ("name_or_path", "revision") if model.get(key))
    return [
        f"model.name_or_path: {name} is named now, but the recipe has model.pretrained=false, "
        "which would train fresh, random weights under that name. Say which: "
        "model.pretrained=true takes the checkpoint's weights, model.pretrained=false its "
        "architecture alone."
    ]


def _unusable(content: Mapping[str, Any]) -> tuple[dict[str, str], bool]:
    """Find what no recipe can hold, whatever it stands for: before anything else looks at it.

    Returns:
        Dotted name -> problem; and whether it is nested too deeply to be looked at any further.
    """
    problems: dict[str, str] = {}
    for where, value, depth in _walk(content):
        if depth > _DEEPEST:
            name = shown_name(where)
            return {where: f"{name}: is nested deeper than {_DEEPEST} objects or lists."}, True
        problem = _unusable_text(where, value) if isinstance(value, str) else None
        if isinstance(value, Mapping | list) and len(value) > _MOST_ENTRIES:
            problem = f"holds {len(value):,} entries; expected at most {_MOST_ENTRIES:,}."
            if not depth:
                return {where: f"{where}: {problem}"}, True
        if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
            problem = f"{shown(value)} is too large; no number here is above 2^63 - 1."
        if problem:
            problems[where] = f"{shown_name(where)}: {problem}"
    return problems, False


def _leave_out(content: Any, places: Collection[str], where: str = "") -> Any:
    """Return a copy without what stands at dotted names; what is in a list stays."""
    if not isinstance(content, Mapping):
        return content
    dot = f"{where}." if where else ""
    return {
        key: _leave_out(value, places, f"{dot}{key}")
        for key, value in content.items()
        if f"{dot}{key}" not in places and _is_text(str(key))
    }


def _is_text(name: str) -> bool:
    """Tell whether a name is short, and of letters alone."""
    return len(name) <= _LONGEST_TEXT and not _CONTROL.search(name) and not _SURROGATE.search(name)


def _walk(content: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield dotted name, value and depth of everything inside, keys as values of their objects."""
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    while waiting:
        where, value, depth = waiting.pop()
        yield where or "recipe", value, depth
        if depth > _DEEPEST:
            continue
        dot = f"{where}." if where else ""
        if isinstance(value, Mapping):
            for key, inner in reversed(list(value.items())):
                name = str(key)
                if _is_text(name):
                    waiting.append((f"{dot}{name}", inner, depth + 1))
                else:
                    yield where or "recipe", name, depth
        elif isinstance(value, list | tuple):
            waiting += [(f"{dot}{n}", v, depth + 1) for n, v in reversed(list(enumerate(value)))]


def _unusable_text(where: str, text: str) -> str | None:
    if _SURROGATE.search(text):
        return f"{shown(text)} holds half of a surrogate pair, which is no letter."
    if where in _FREE_TEXT:
        return _credential_problem(text)
    if len(text) > _LONGEST_TEXT:
        return f"{shown(text)} is too long; expected at most {_LONGEST_TEXT:,} characters."
    if _CONTROL.search(text):
        return f"{shown(text)} holds a control character; leave it out."
    return _credential_problem(text)


def _credential_problem(text: str) -> str | None:
    if not holds_credential(text):
        return None
    return (
        "holds a token or password, and a recipe is published with its results; leave it out. Log "
        'in with "hf auth login", or set HF_TOKEN.'
    )


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    try:
        path = local_path(name_or_path)
    except RecipeError as error:
        raise RecipeError(f"No recipe {error}") from None
    if str(name_or_path) and path.is_file():
        return path
    shipped = shipped_recipes()
    name = str(name_or_path).removesuffix(".json")
    if name in shipped:
        return shipped[name]
    if str(name_or_path) and path.is_dir():
        raise RecipeError(f"{name_or_path} is a folder; expected a recipe file.")
    near = suggest(path.stem, shipped)
    raise RecipeError(
        f"No recipe "
        f"{name_or_path}{near or '; shipped with hfbench are ' + ', '.join(shipped) + '.'}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        twice = [shown_name(key) for key in sorted(counts) if counts[key] > 1][:_SHOWN]
        if twice:
            raise RecipeError(f"{path}: {', '.join(twice)} stands twice in one object; keep one.")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise RecipeError(f"{path}: {constant} is not JSON; write a finite number or null.")

    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise RecipeError(
                f"{path} has {path.stat().st_size / 2**20:,.0f} MiB; a recipe has at most 1."
            )
        content = json.loads(
            path.read_text("utf-8-sig"), object_pairs_hook=unique, parse_constant=refuse
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RecipeError(f"{path} is not valid JSON: {error.msg} at {where}.") from None
    except RecursionError:
        raise RecipeError(f"{path} is nested too deeply for a recipe.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


_IN_WORDS = {
    "model_type": "an object",
    "dict_type": "an object",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores, at most 96",
    "string_too_short": "some text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "list_type": "a list",
    "finite_number": "a finite number",
}


def _say(detail: Any) -> str:
    """Turn one of pydantic's findings into a sentence in the recipe's own words."""
    keys = [str(key) for key in detail["loc"]]
    where = shown_name(".".join(keys))
    if detail["type"] == "extra_forbidden":
        fields = _fields_at(keys[:-1])
        near = suggest(keys[-1], fields) or f"; expected one of {', '.join(fields)}."
        return f"{where}: unknown{near}"
    if detail["type"] == "missing":
        return f"{where}: missing; it is required."
    found = shown(detail["input"])
    if detail["type"] in _IN_WORDS:
        return f"{where}: found {found}, expected {_IN_WORDS[detail['type']]}."
    wanted = re.sub(r"^Input should be (a valid )?", "", detail["msg"])
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        near = suggest(detail["input"], re.findall(r"'([^']+)'", wanted))
        return f"{where}: found {found}, expected {wanted}{near or '.'}"
    return f"{where}: found {found}, expected {wanted}."


def _fields_at(keys: Sequence[str]) -> list[str]:
    fields: Mapping[str, Any] = Recipe.model_fields
    for key in keys:
        section = section_of(fields[key].annotation)
        fields = section.model_fields if section else {}
    return ["$schema" if name == "schema_" else name for name in fields]


def local_path(name: str | os.PathLike[str]) -> Path:
    """Return a name as a path, ``~`` expanded where there is such a home.

    Raises:
        RecipeError: If no file can have that name, or nobody may look whether there is one.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        path = Path(name)
    try:
        path.exists()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"{shown_name(str(name))} cannot be looked for: {why}.") from None
    return path


def looks_like_path(name: str) -> bool:
    """Tell whether a name can only mean a place on disk, not ``owner/name`` on the Hub."""
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or name.endswith((".gz", ".tgz", ".tar", "/", ".zip"))
    )


def _missing_file(where: str, name: str) -> list[str]:
    try:
        if local_path(name).exists() or not looks_like_path(name):
            return []
    except RecipeError as error:
        return [f"{where}: {error}"]
    return [
        f"{where}: {shown(name)} does not exist (looked in {Path.cwd()}); give an existing "
        f"folder or a name on the Hub."
    ]


def _dataset_problems(dataset: DatasetSection) -> list[str]:
    problems = []
    if dataset.num_classes is not None and dataset.name_or_path != "synthetic":
        problems.append("dataset.num_classes: only the synthetic data set has it; write null.")
    if dataset.train_split == dataset.eval_split:
        problems.append(
            f'dataset: train_split and eval_split are both "{dataset.eval_split}"; test on other '
            f"images."
        )
    return problems


def recipe_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, the installed `TrainingArguments` spelt out."""
    import transformers

    from hfbench.recipe.arguments import OWNED, training_argument_fields

    schema = Recipe.model_json_schema(by_alias=True)
    arguments = schema["properties"]["training_args"]
    arguments["properties"] = {
        name: {"description": " ".join(str(field.metadata.get("help", "")).split())}
        for name, field in sorted(training_argument_fields().items())
        if name not in OWNED
    }
    arguments["$comment"] = (
        f"Names of transformers {transformers.__version__}; hfbench checks against the installed "
        f"one."
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hfbench recipe",
        **schema,
    }
