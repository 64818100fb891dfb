"""The techniques of performance tuning: the settings of each, and how one recipe uses it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hfbench.recipe.schema import Recipe


@dataclass(frozen=True)
class Technique:
    """One technique.

    Attributes:
        name: As people say it.
        settings: Dotted names of the recipe that turn it on and say how.
        switches: Names in `Result.switches` by which one sees whether it was applied.
    """

    name: str
    settings: tuple[str, ...]
    switches: tuple[str, ...]


MIXED_PRECISION = Technique(
    "mixed precision",
    ("training_args.fp16", "training_args.bf16", "model.float32_if_faster"),
    ("precision",),
)
PINNED_MEMORY = Technique(
    "pinned memory",
    ("training_args.dataloader_pin_memory", "training_args.accelerator_config.non_blocking"),
    ("dataloader_pin_memory", "non_blocking"),
)
ACCUMULATION = Technique(
    "gradient accumulation",
    ("training_args.gradient_accumulation_steps",),
    ("gradient_accumulation_steps",),
)
COMPILE = Technique(
    "torch.compile",
    (
        "training_args.torch_compile",
        "training_args.torch_compile_backend",
        "training_args.torch_compile_mode",
    ),
    ("torch_compile",),
)
DEVICE_PREPROCESSING = Technique(
    "device preprocessing", ("preprocessing.location",), ("preprocessing_location",)
)
WORKERS = Technique(
    "loader workers",
    (
        "training_args.dataloader_num_workers",
        "training_args.dataloader_persistent_workers",
        "training_args.dataloader_prefetch_factor",
    ),
    ("dataloader_num_workers",),
)
OPTIMIZER = Technique("optimizer implementation", ("training_args.optim",), ("optim",))
TF32 = Technique("TF32", ("training_args.tf32",), ("tf32_matmul", "tf32_convolution"))
MEMORY_FORMAT = Technique("memory format", ("model.memory_format",), ("memory_format",))
# ATen looks a shape up among the algorithms it has chosen before it looks at the switch.
ONE_CHOICE_A_PROCESS = (
    "cuDNN's algorithms are chosen once in a process, so that all its windows have the same; only "
    "whole runs can tell: hfbench ablate --full"
)
CUDNN_BENCHMARK = Technique("cuDNN benchmark", ("model.cudnn_benchmark",), ("cudnn_benchmark",))
ATTENTION = Technique(
    "attention implementation", ("model.attn_implementation",), ("attn_implementation",)
)
KEPT_MEMORY = Technique("kept memory", ("model.keep_freed_memory",), ("keep_freed_memory",))
NAN_FILTER = Technique("NaN filter", ("training_args.logging_nan_inf_filter",), ())
MICRO_BATCH = Technique("micro-batch", ("training_args.per_device_train_batch_size",), ())
EVALUATION_BATCH = Technique("evaluation batch", ("training_args.per_device_eval_batch_size",), ())
CHECKPOINTS = Technique("checkpoints", ("training_args.save_strategy",), ())

TECHNIQUES = (
    MIXED_PRECISION,
    PINNED_MEMORY,
    ACCUMULATION,
    COMPILE,
    DEVICE_PREPROCESSING,
    WORKERS,
    OPTIMIZER,
    TF32,
    MEMORY_FORMAT,
    CUDNN_BENCHMARK,
    ATTENTION,
    KEPT_MEMORY,
    NAN_FILTER,
    MICRO_BATCH,
    EVALUATION_BATCH,
    CHECKPOINTS,
)


@dataclass(frozen=True)
class Use:
    """A technique as one recipe would use it: how to turn it on, and how to turn it off.

    Attributes:
        technique: Which one.
        name: As people say it; the two kinds of accumulation have the same technique.
        detail: What exactly is turned on, as in ``bf16``.
        on: Dotted names of the recipe and their values.
        off: The same without the technique.
        in_recipe: Whether the recipe has it.
        no_effect: Why it can have no effect on this machine or recipe; ``None`` if it can.
        whole_runs_only: Why short windows of one process cannot show it; ``None`` if they can.
    """

    technique: Technique
    name: str
    detail: str
    on: Mapping[str, Any]
    off: Mapping[str, Any]
    in_recipe: bool
    no_effect: str | None = None
    whole_runs_only: str | None = None

    @property
    def slug(self) -> str:
        """The name as a part of file and recipe names."""
        words = "".join(c if c.isalnum() else " " for c in self.name.lower()).split()
        return "-".join(words)


COMPILE_ARGUMENTS = tuple(name.partition(".")[2] for name in COMPILE.settings)


def is_compiled(recipe: Recipe) -> bool:
    """Tell whether a recipe compiles its model.

    A backend or a mode alone is enough, as in transformers; where ``torch_compile`` is said to be
    false it is not, unlike in transformers, which turns it on again.
    """
    said = recipe.training_args.get(COMPILE_ARGUMENTS[0])
    return bool(said) or (said is None and any(recipe.argument(n) for n in COMPILE_ARGUMENTS))


def not_compiled(recipe: Recipe) -> dict[str, Any]:
    """Return the `training_args` that turn compiling off, all that are needed for this recipe."""
    idle = {name: None for name in COMPILE_ARGUMENTS[1:] if recipe.argument(name)}
    return {COMPILE_ARGUMENTS[0]: False} | idle


def change(recipe: Recipe, settings: Iterable[tuple[str, Any]]) -> Recipe:
    """Return a recipe with other values.

    Args:
        recipe: Stays as it is.
        settings: Dotted names in `model`, `preprocessing` or `training_args`, and their values.
    """
    content = recipe.as_json()
    for name, value in settings:
        *sections, last = name.split(".")
        place = content
        for section in sections:
            place[section] = dict(place.get(section) or {})
            place = place[section]
        place[last] = value
    return Recipe.model_validate(content)
