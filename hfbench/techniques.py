"""The techniques of performance tuning: which settings of a recipe each is made of."""

from __future__ import annotations

from dataclasses import dataclass


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
