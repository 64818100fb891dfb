"""Check a recipe's `training_args` against `transformers.TrainingArguments` without building one.

Building one starts the device and the process group and reports a single problem; a recipe should
be checked on any machine and say everything at once. Names, types, choices, ranges and
contradictions are checked here, what this machine can do in `environment.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hfbench.errors.harmless import shown
from hfbench.recipe.trial import try_optimizer_and_schedule

# Where a model is pushed; hub.py reads them, Trainer does not get them.
HUB_ARGUMENTS = (
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
)

# Names that transformers 5 removed, each with what to write instead.
REMOVED = {
    "adafactor": 'write optim="adafactor"',
    "evaluation_strategy": "write eval_strategy",
    "fp16_backend": "leave it out: torch's autocast is always used",
    "fp16_opt_level": "leave it out: Apex is gone",
    "group_by_length": "leave it out: images have no length",
    "half_precision_backend": "leave it out: torch's autocast is always used",
    "jit_mode_eval": "leave it out",
    "logging_dir": "leave it out: logs go into the run's folder",
    "mp_parameters": "leave it out",
    "no_cuda": "write use_cpu",
    "overwrite_output_dir": "leave it out: each run has a folder of its own",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "per_gpu_train_batch_size": "write per_device_train_batch_size",
    "push_to_hub_model_id": "write hub_model_id",
    "push_to_hub_organization": "write hub_model_id as organization/name",
    "push_to_hub_token": 'leave it out and log in with "hf auth login"',
    "ray_scope": "leave it out",
    "save_safetensors": "leave it out: safetensors is the only format",
    "tpu_num_cores": "leave it out",
    "use_ipex": "leave it out",
    "use_legacy_prediction_loop": "leave it out",
    "use_mps_device": "leave it out: MPS is used where it is present",
    "warmup_ratio": "write warmup_steps; below 1 it is a ratio",
}

# Names that exist, but that a run of hfbench decides itself, with the reason or the way to say it.
_UNSUPPORTED = "hfbench does not support it"
OWNED = {
    "auto_find_batch_size": "a benchmark must keep its batch size; set per_device_train_batch_size",
    "bf16_full_eval": "it would change the saved weights; evaluation has training's precision",
    "batch_eval_metrics": "metrics are computed once, over the whole split",
    "debug": _UNSUPPORTED,
    "deepspeed": _UNSUPPORTED,
    "do_eval": "the test split is always evaluated",
    "do_predict": "the test split is always evaluated",
    "do_train": "a run always trains",
    "enable_jit_checkpoint": "Ctrl-C, SIGTERM and SIGHUP save a checkpoint anyway",
    "eval_do_concat_batches": "metrics are computed once, over the whole split",
    "fp16_full_eval": "it would change the saved weights; evaluation has training's precision",
    "fsdp": _UNSUPPORTED,
    "fsdp_config": _UNSUPPORTED,
    "hub_token": 'a token would end up in files; log in with "hf auth login" or set HF_TOKEN',
    "ignore_data_skip": "a resume must see the images that an undisturbed run sees",
    "include_for_metrics": "hfbench computes the metrics",
    "include_num_input_tokens_seen": "images have no tokens",
    "label_names": "hfbench builds the batches",
    "length_column_name": "images have no length",
    "liger_kernel_config": _UNSUPPORTED,
    "local_rank": "the launcher sets it",
    "neftune_noise_alpha": _UNSUPPORTED,
    "output_dir": "use --output-dir; a run goes into OUTPUT_DIR/<recipe name>/<run id>",
    "parallelism_config": _UNSUPPORTED,
    "prediction_loss_only": "accuracy needs the predictions",
    "remove_unused_columns": "hfbench builds the batches",
    "restore_callback_states_from_checkpoint": "a resume restores what it needs",
    "resume_from_checkpoint": "use --resume",
    "save_only_model": "a resume needs the optimizer too",
    "train_sampling_strategy": "training images are shuffled anew each epoch",
    "use_cache": "a classifier of images keeps no cache",
    "use_liger_kernel": _UNSUPPORTED,
}

_MOST_STEPS = 2**31 - 1
# Inclusive bounds: values below cannot train; values above overflow a number of torch, or cannot
# be meant.
_BOUNDS: dict[str, tuple[float, float]] = {
    "adam_epsilon": (1e-38, 1),  # below, float32 rounds to 0, and 0 / 0 is no number
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, 10_000),
    "ddp_bucket_cap_mb": (1, 2**20),
    "ddp_timeout": (1, 10_000_000),
    "eval_accumulation_steps": (1, _MOST_STEPS),
    "eval_delay": (0, _MOST_STEPS),
    "gradient_accumulation_steps": (1, 2**24),
    "learning_rate": (0, 10_000),
    "max_grad_norm": (0, 1e38),  # float32 holds no more
    "max_steps": (-math.inf, _MOST_STEPS),
    "per_device_eval_batch_size": (1, 2**24),
    "per_device_train_batch_size": (1, 2**24),
    "save_total_limit": (1, _MOST_STEPS),
    "seed": (0, math.inf),
    "torch_empty_cache_steps": (1, _MOST_STEPS),
    "warmup_steps": (0, _MOST_STEPS),
    "weight_decay": (0, 1000),
}
# The same, where the lower bound itself is too small.
_ABOVE_ZERO: dict[str, float] = {
    "eval_steps": _MOST_STEPS,
    "logging_steps": _MOST_STEPS,
    "num_train_epochs": 1_000_000,
    "save_steps": _MOST_STEPS,
}
# Of `torch.compile`: the backends of torch itself that train (others need packages that hfbench
# does not know), and inductor's modes.
_CHOICES = {
    "torch_compile_backend": ("inductor", "eager", "aot_eager", "cudagraphs"),
    "torch_compile_mode": (
        "default",
        "reduce-overhead",
        "max-autotune",
        "max-autotune-no-cudagraphs",
    ),
}
_LONGEST_NAME = 96  # letters of a name that is compared with others: takes their product in time
_DEFAULT_STEPS = 500  # of TrainingArguments
_STEPS = ("eval_steps", "logging_steps", "save_steps")
_METRICS = ("loss", "accuracy", "f1_macro", "f1_weighted", "top5_accuracy")
_SEED_LIMIT = 2**32  # numpy's seeds are unsigned 32-bit integers


def shown_name(name: str) -> str:
    """Return a dotted name for a message; a long one is cut."""
    return name if len(name) <= 2 * _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean x?"`` for the nearest known name, or an empty string."""
    if len(name) > _LONGEST_NAME:
        return ""
    names = list(known)
    longer = sorted((other for other in names if other.startswith(name)), key=len)
    near = longer[:1] if len(name) > 2 else []  # adamw means adamw_torch, not grokadamw
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


@functools.cache
def training_argument_fields() -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of the installed `TrainingArguments` by name; the import takes 2.4 s."""
    from transformers import TrainingArguments

    return {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


@functools.cache
def _type_hints() -> dict[str, Any]:
    from transformers import TrainingArguments

    return typing.get_type_hints(TrainingArguments)


def check_training_args(values: Mapping[str, Any]) -> list[str]:
    """Find everything wrong with `training_args`, whatever the machine.

    Args:
        values: Names and values as the recipe has them.

    Returns:
        One sentence a problem, each starting with the dotted name; empty if there is none.
    """
    fields = training_argument_fields()
    problems: list[str] = []
    for name, value in values.items():
        where = f"training_args.{name}"
        if name in OWNED:
            itself = "" if OWNED[name] == _UNSUPPORTED else "hfbench sets this itself; "
            problems.append(f"{where}: {itself}{OWNED[name]}.")
        elif name not in fields:
            gone = f"removed in transformers 5; {REMOVED[name]}." if name in REMOVED else None
            unknown = f"unknown{suggest(name, fields) or '; it is no name of TrainingArguments.'}"
            problems.append(f"{shown_name(where)}: {gone or unknown}")
        elif (
            problem := _type_problem(name, value)
            or _choice_problem(name, value)
            or _range_problem(name, value)
        ):
            problems.append(f"{where}: {problem}")
    problems += _contradictions(values)
    return problems or try_optimizer_and_schedule(values)


def _type_problem(name: str, value: Any) -> str | None:
    hint = _type_hints()[name]
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(
            hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True)
        )
        adapter.validate_python(value)
    except ValidationError:
        fix = ""
        if isinstance(value, str) and _is_json_number(value):
            fix = f"; write {value} without quotes"
        return f"found {shown(value)}, expected {_describe(hint)}{fix}."
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number."
    return None


def _choice_problem(name: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    hint = _type_hints()[name]
    enums = [
        arg
        for arg in (hint, *typing.get_args(hint))
        if isinstance(arg, type) and issubclass(arg, enum.Enum)
    ]
    choices = [str(member.value) for kind in enums for member in kind]
    choices = (
        choices
        or list(_CHOICES.get(name, ()))
        or [
            str(choice) for choice in training_argument_fields()[name].metadata.get("choices") or []
        ]
    )
    if not choices or value in choices:
        return None
    near = suggest(value, choices)
    return (
        f"{shown(value)} is no choice{near}"
        if near
        else f"{shown(value)} is no choice; it may be {', '.join(choices)}."
    )


def _range_problem(name: str, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    low, high = _BOUNDS.get(name, (-math.inf, _ABOVE_ZERO.get(name, math.inf)))
    if value < low:
        return f"{value} is too small; it must be at least {low:g}."
    if name in _ABOVE_ZERO and value <= 0:
        return f"{value} is too small; it must be above 0."
    if value > high:
        return f"{shown(value)} is too large; it must be at most {high:,.12g}."
    if name == "max_steps" and value != -1 and value < 1:
        return f"{value} is no number of steps; write -1 to train for num_train_epochs."
    if name == "label_smoothing_factor" and not 0 <= value < 1:
        return f"{value} is out of range; it must be at least 0 and below 1."
    if name in _STEPS and value > 1 and value != int(value):
        return f"{value} is no number of steps; a share of all steps is below 1."
    if name in ("adam_beta1", "adam_beta2") and not 0 <= value < 1:
        return f"{value} is out of range; it must be at least 0 and below 1."
    if name in ("seed", "data_seed") and not 0 <= value < _SEED_LIMIT:
        return f"{value} is out of range; a seed is between 0 and {_SEED_LIMIT - 1}."
    return None


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Find settings that exclude each other."""

    def on(name: str) -> bool:
        return values.get(name) is True

    problems = []
    if on("fp16") and on("bf16"):
        problems.append(
            "training_args: fp16 and bf16 exclude each other; set one of them to false."
        )
    if on("fp16") and on("use_cpu"):
        problems.append(
            "training_args: fp16 needs a GPU and use_cpu forbids it; set use_cpu=false, or "
            "fp16=false bf16=true."
        )
    workers = values.get("dataloader_num_workers", 0)
    problems += [
        f"training_args.{name}: needs worker processes; set dataloader_num_workers to 1 or more."
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers")
        if workers == 0 and values.get(name)
    ]
    evaluates, saves = values.get("eval_strategy", "no"), values.get("save_strategy", "steps")
    if on("load_best_model_at_end") and evaluates == saves == "no":
        problems.append(
            "training_args.load_best_model_at_end: there is no evaluation to find the best by, and "
            'no checkpoint to load; set eval_strategy and save_strategy to "epoch".'
        )
    if on("load_best_model_at_end") and evaluates == saves == "steps":
        every = values.get("eval_steps") or values.get("logging_steps", _DEFAULT_STEPS)
        kept = values.get("save_steps", _DEFAULT_STEPS)
        if not _is_multiple(kept, every):
            problems.append(
                f"training_args.save_steps: load_best_model_at_end needs checkpoints at "
                f"evaluations, but {kept:g} is no multiple of eval_steps={every:g}."
            )
    if saves == "best" and evaluates == "no":
        problems.append(
            'training_args.save_strategy: "best" needs evaluations; set eval_strategy to "epoch".'
        )
    if on("load_best_model_at_end") and saves != "best" and evaluates != saves:
        problems.append(
            f"training_args: load_best_model_at_end needs equal strategies, found "
            f'eval_strategy="{evaluates}" and save_strategy="{saves}"; set both to "epoch".'
        )
    if values.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy") and evaluates == "no":
        problems.append(
            'training_args: this lr_scheduler_type needs evaluations; set eval_strategy to "epoch".'
        )
    problems += _without_effect(values)
    problems += _unknown_trackers(values.get("report_to"))
    accelerator = values.get("accelerator_config")
    problems += [
        f"training_args.{name}: write the object itself, not a file or text."
        for name in _OBJECTS
        if isinstance(values.get(name), str)
    ]
    if isinstance(accelerator, Mapping):
        problems += _accelerator_config_problems(accelerator)
    metric = str(values.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if metric not in _METRICS:
        problems.append(
            f'training_args.metric_for_best_model: "{metric}" is not measured'
            f"{suggest(metric, _METRICS) or '; it may be ' + ', '.join(_METRICS) + '.'}"
        )
    if values.get("hub_strategy") not in (None, "end"):
        problems.append(
            'training_args.hub_strategy: hfbench pushes once, at the end; write "end" or leave it '
            "out."
        )
    return problems


_OBJECTS = (
    "accelerator_config",
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
)


def _without_effect(values: Mapping[str, Any]) -> list[str]:
    """Find settings that nothing would heed."""
    problems = []
    for what, default in (("eval", "no"), ("save", "steps")):
        strategy = values.get(f"{what}_strategy", default)
        if values.get(f"{what}_steps") is not None and strategy != "steps":
            problems.append(
                f'training_args.{what}_steps: has no effect with {what}_strategy="{strategy}"; '
                f'leave it out, or set {what}_strategy to "steps".'
            )
    if values.get("eval_delay") and values.get("eval_strategy", "no") == "no":
        problems.append(
            "training_args.eval_delay: there are no evaluations to delay; leave it out, or set "
            'eval_strategy to "epoch".'
        )
    uses_metric = (
        values.get("load_best_model_at_end") is True
        or values.get("save_strategy") == "best"
        or values.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    )
    problems += [
        f"training_args.{name}: has no effect, since neither load_best_model_at_end nor the "
        f"learning rate's schedule asks for the best; leave it out."
        for name in ("metric_for_best_model", "greater_is_better")
        if values.get(name) is not None and not uses_metric
    ]
    for kind in ("activation_checkpointing", "gradient_checkpointing"):
        if values.get(f"{kind}_kwargs") and not (
            values.get("activation_checkpointing") or values.get("gradient_checkpointing")
        ):
            problems.append(
                f"training_args.{kind}_kwargs: has no effect without {kind}; set it to true, or "
                f"leave this out."
            )
    backend = values.get("torch_compile_backend") or "inductor"
    if values.get("torch_compile_mode") and backend != "inductor":
        problems.append(
            f"training_args.torch_compile_mode: only inductor has modes, not {backend}; leave it "
            f"out."
        )
    if values.get("dataloader_multiprocessing_context") and not values.get(
        "dataloader_num_workers"
    ):
        problems.append(
            "training_args.dataloader_multiprocessing_context: needs worker processes; set "
            "dataloader_num_workers to 1 or more, or leave it out."
        )
    return problems


def _is_multiple(steps: Any, every: Any) -> bool:
    """Tell whether one number of steps is a multiple of another; shares of all steps are below 1.

    What is no number is said elsewhere.
    """
    if not all(isinstance(value, int | float) and value > 0 for value in (steps, every)):
        return True
    ratio = steps / every
    return bool((steps < 1) == (every < 1) and ratio > 0.5 and math.isclose(ratio, round(ratio)))


def _unknown_trackers(report_to: Any) -> list[str]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = ("none", "all", *INTEGRATION_TO_CALLBACK)
    wanted = report_to if isinstance(report_to, list) else [report_to]
    return [
        f'training_args.report_to: "{name}" is no tracker'
        f"{suggest(name, known) or '; it may be ' + ', '.join(known) + '.'}"
        for name in wanted
        if isinstance(name, str) and name not in known
    ]


def _accelerator_config_problems(values: Mapping[str, Any]) -> list[str]:
    from transformers.trainer_pt_utils import AcceleratorConfig

    known = [field.name for field in dataclasses.fields(AcceleratorConfig)]
    where = "training_args.accelerator_config"
    problems = [
        f"{where}.{name}: unknown{suggest(name, known) or '; it may be ' + ', '.join(known) + '.'}"
        for name in values
        if name not in known
    ]
    problems += [
        f"{where}.{name}: {json.dumps(values[name])} is not true or false."
        for name in ("non_blocking", "split_batches", "even_batches", "use_seedable_sampler")
        if name in values and not isinstance(values[name], bool)
    ]
    if values.get("split_batches") is True:
        problems.append(f"{where}.split_batches: true would change the batch size; leave it out.")
    if values.get("gradient_accumulation_kwargs"):
        problems.append(f"{where}.gradient_accumulation_kwargs: write gradient_accumulation_steps.")
    if values.get("even_batches") is False:
        problems.append(
            f"{where}.even_batches: false would let processes wait for each other forever; leave "
            f"it out."
        )
    return problems


def takes_number(name: str) -> bool:
    """Tell whether a training argument is a number that need not be whole."""
    return _type_hints().get(name) is float


def takes_text_only(name: str) -> bool:
    """Tell whether a training argument takes text, but neither number nor truth value."""
    hint = _type_hints().get(name)
    options = typing.get_args(hint) or (hint,)
    return str in options and not {int, float, bool} & set(options)


def _is_json_number(text: str) -> bool:
    try:
        value = json.loads(text, parse_constant=lambda constant: constant)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, int | float) and not isinstance(value, bool)


def _describe(hint: Any) -> str:
    """Say a type hint in words, as in "a number or null"."""
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        types.NoneType: "null",
    }
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (types.UnionType, typing.Union)
        else (hint,)
    )
    origins = [typing.get_origin(option) or option for option in options]
    said = [words[origin] for origin in origins if origin in words]
    said += [
        "text" for origin in origins if isinstance(origin, type) and issubclass(origin, enum.Enum)
    ]
    return " or ".join(dict.fromkeys(said)) or str(hint)
