"""The techniques of performance tuning: their settings, and a recipe with each on and off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hfbench.environment import accelerator_type
from hfbench.recipe import Recipe


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
    ("training_args.fp16", "training_args.bf16"),
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
DEVICE_PREPROCESSING = Technique("device preprocessing", ("preprocessing.location",), ())
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

TECHNIQUES = (
    MIXED_PRECISION,
    PINNED_MEMORY,
    ACCUMULATION,
    COMPILE,
    DEVICE_PREPROCESSING,
    WORKERS,
    OPTIMIZER,
    TF32,
)

ACCUMULATION_STEPS = 4  # where the recipe has none: the reference's
_BF16, _FP16 = "training_args.bf16", "training_args.fp16"
_STEPS = "training_args.gradient_accumulation_steps"
_BATCH = "training_args.per_device_train_batch_size"
_PLAIN_OPTIMIZER = {"adamw_torch_fused": "adamw_torch", "adamw_apex_fused": "adamw_torch"}


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
    """

    technique: Technique
    name: str
    detail: str
    on: Mapping[str, Any]
    off: Mapping[str, Any]
    in_recipe: bool
    no_effect: str | None = None

    @property
    def slug(self) -> str:
        """The name as a part of file and recipe names."""
        words = "".join(c if c.isalnum() else " " for c in self.name.lower()).split()
        return "-".join(words)


def find_uses(recipe: Recipe) -> list[Use]:
    """Find the techniques that a recipe has or could have on this machine.

    Returns:
        Always mixed precision, pinned memory, and both kinds of accumulation; where the recipe has
        them, torch.compile, device preprocessing, loader workers, optimizer implementation, TF32.
    """
    device = "cpu" if recipe.argument("use_cpu") else accelerator_type() or "cpu"
    optional = (
        _compile(recipe),
        _device_preprocessing(recipe),
        _workers(recipe),
        _optimizer(recipe),
        _tf32(recipe),
    )
    return [
        _mixed_precision(recipe, device),
        _pinned_memory(recipe, device),
        _accumulation_same_batch(recipe),
        _accumulation_larger_batch(recipe),
        *(use for use in optional if use is not None),
    ]


def change(recipe: Recipe, settings: Iterable[tuple[str, Any]]) -> Recipe:
    """Return a recipe with other values.

    Args:
        recipe: Stays as it is.
        settings: Dotted names in `training_args` or `preprocessing`, and their values.
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


def _mixed_precision(recipe: Recipe, device: str) -> Use:
    off = {_FP16: False, _BF16: False}
    if recipe.argument("fp16") or recipe.argument("bf16"):
        fp16, bf16 = bool(recipe.argument("fp16")), bool(recipe.argument("bf16"))
    else:
        fp16 = device == "cuda" and not _cuda_has_bf16()
        bf16 = not fp16
    on = {_FP16: fp16, _BF16: bf16}
    if bf16 and device == "cpu":  # transformers wants to be asked for it
        on["training_args.use_cpu"] = True
    in_recipe = bool(recipe.argument("fp16") or recipe.argument("bf16"))
    return Use(
        MIXED_PRECISION, MIXED_PRECISION.name, "fp16" if fp16 else "bf16", on, off, in_recipe
    )


def _cuda_has_bf16() -> bool:
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _pinned_memory(recipe: Recipe, device: str) -> Use:
    pinned = bool(recipe.argument("dataloader_pin_memory"))
    accelerator_config = recipe.argument("accelerator_config") or {}
    non_blocking = bool(accelerator_config.get("non_blocking", False))
    pin, overlap = PINNED_MEMORY.settings
    return Use(
        PINNED_MEMORY,
        PINNED_MEMORY.name,
        "non-blocking" if non_blocking or not pinned else "blocking",
        {pin: True, overlap: non_blocking or not pinned},
        {pin: False, overlap: False},
        pinned,
        "nothing is copied: model and data are in the same memory"
        if device in ("cpu", "mps")
        else None,
    )


def _accumulation_same_batch(recipe: Recipe) -> Use:
    batch, wanted = _batch_and_steps(recipe)
    # At least two images in a micro-batch: batch norm cannot train on a single one.
    steps = max(k for k in range(1, wanted + 1) if batch % k == 0 and (k == 1 or batch // k > 1))
    detail = f"{steps} micro-batches of {batch // steps} instead of {batch}"
    if steps not in (1, wanted):
        detail += f", since {batch} images do not make {wanted} micro-batches"
    return Use(
        ACCUMULATION,
        "accumulation, same batch",
        detail,
        {_STEPS: steps, _BATCH: batch // steps},
        {_STEPS: 1, _BATCH: batch},
        False,
        f"a batch of {batch} cannot be split into up to {wanted} equal micro-batches of at least 2"
        if steps == 1
        else None,
    )


def _accumulation_larger_batch(recipe: Recipe) -> Use:
    batch, steps = _batch_and_steps(recipe)
    return Use(
        ACCUMULATION,
        "accumulation, larger batch",
        f"{steps} micro-batches of {batch}: {batch * steps} instead of {batch}",
        {_STEPS: steps, _BATCH: batch},
        {_STEPS: 1, _BATCH: batch},
        int(recipe.argument("gradient_accumulation_steps")) > 1,
    )


def _batch_and_steps(recipe: Recipe) -> tuple[int, int]:
    steps = int(recipe.argument("gradient_accumulation_steps"))
    batch = int(recipe.argument("per_device_train_batch_size"))
    return batch, steps if steps > 1 else ACCUMULATION_STEPS


def _compile(recipe: Recipe) -> Use | None:
    enabled, backend, mode = COMPILE.settings
    values = {name: recipe.argument(name.partition(".")[2]) for name in COMPILE.settings}
    if not any(values.values()):
        return None
    detail = ", ".join(str(values[name]) for name in (backend, mode) if values[name]) or "inductor"
    # A backend or a mode alone turns it on as well.
    off = {enabled: False, backend: None, mode: None}
    return Use(COMPILE, COMPILE.name, detail, values, off, True)


def _device_preprocessing(recipe: Recipe) -> Use | None:
    if recipe.preprocessing.location == "host":
        return None
    (location,) = DEVICE_PREPROCESSING.settings
    technique = DEVICE_PREPROCESSING
    return Use(technique, technique.name, "batched", {location: "device"}, {location: "host"}, True)


def _workers(recipe: Recipe) -> Use | None:
    count, persistent, prefetch = WORKERS.settings
    values = {name: recipe.argument(name.partition(".")[2]) for name in WORKERS.settings}
    if not values[count]:
        return None
    off = {count: 0, persistent: False, prefetch: None}
    detail = "1 process" if values[count] == 1 else f"{values[count]} processes"
    return Use(WORKERS, WORKERS.name, detail, values, off, True)


def _optimizer(recipe: Recipe) -> Use | None:
    name = getattr(recipe.argument("optim"), "value", recipe.argument("optim"))
    if name not in _PLAIN_OPTIMIZER:
        return None
    (optim,) = OPTIMIZER.settings
    plain = _PLAIN_OPTIMIZER[name]
    detail = f"{name} instead of {plain}"
    return Use(OPTIMIZER, OPTIMIZER.name, detail, {optim: name}, {optim: plain}, True)


def _tf32(recipe: Recipe) -> Use | None:
    if not recipe.argument("tf32"):
        return None
    (tf32,) = TF32.settings
    return Use(
        TF32, TF32.name, "matrix products and convolutions", {tf32: True}, {tf32: False}, True
    )
