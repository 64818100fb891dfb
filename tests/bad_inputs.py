"""Makes bad inputs: recipes and overrides with one thing wrong, and what is wrong with them."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from hfbench.recipe.arguments import OWNED
from hfbench.recipe.schema import shipped_recipes

SURROGATE = "a\ud800b"
TOKEN = "hf_" + "a1b2c3d4" * 4
TEXTS: list[Any] = [SURROGATE, "a\x00b", "a\x1b[31mb", "x" * 6000, TOKEN, "https://u:secret@h/x"]
HUGE: list[Any] = [2**63, -(2**63) - 1, 10**30, 1e308, -1e308]
DEEP: Any = {}
for _ in range(50):
    DEEP = {"a": DEEP}

# Values of one argument that are refused although their type is right.
PARTICULAR: dict[str, list[Any]] = {
    "adam_beta1": [-0.1, 1.0, 1.5],
    "adam_beta2": [-0.1, 1.0, 2],
    "adam_epsilon": [-1.0, 0, 1e-300, 2.0],
    "dataloader_num_workers": [-1, 1_000_000, 2**31],
    "dataloader_prefetch_factor": [-1, 0, 10**6],
    "ddp_backend": ["nosuch", "", "NCCL2"],
    "ddp_bucket_cap_mb": [-1, 0],
    "ddp_timeout": [-1, 0, 10**12],
    "eval_accumulation_steps": [0, -3],
    "eval_strategy": ["nosuch", "", "epochs"],
    "gradient_accumulation_steps": [0, -1, 2**40],
    "label_smoothing_factor": [-0.1, 1, 1.5],
    "learning_rate": [-1e-3, 1e300],
    "log_level": ["loud", ""],
    "logging_steps": [0, -1, 1.5],
    "logging_strategy": ["nosuch"],
    "lr_scheduler_kwargs": [
        {"nosuch": 1},
        {"num_cycles": "many"},
        {"num_cycles": 1e308},
        {"num_cycles": None},
        "num_cycles=1",
    ],
    "lr_scheduler_type": ["nosuch", "", "cosine_with_min_lr", "warmup_stable_decay"],
    "max_grad_norm": [-1.0, 1e300],
    "max_steps": [0, -2, 2**40],
    "metric_for_best_model": ["nosuch", "acuracy"],
    "num_train_epochs": [0, -1, 1e300],
    "optim": ["nosuch", "", "adam"],
    "optim_args": ["a", "a=b", "=", "momentum=0.9", "a=b=c", ",", "betas=(0.9,0.99)"],
    "optim_target_modules": ["all-linear", ["a"]],
    "per_device_eval_batch_size": [0, -1, 2**63 - 1],
    "per_device_train_batch_size": [0, -1, 2**63 - 1],
    "report_to": ["nosuch", ["nosuch"], "wanb"],
    "save_steps": [0, -1, 1.5],
    "save_strategy": ["nosuch", ""],
    "save_total_limit": [0, -1],
    "seed": [-1, 2**32],
    "data_seed": [-1, 2**32],
    "torch_compile_backend": ["nosuch", "", "inductor2"],
    "torch_compile_mode": ["nosuch", "", "max_autotune"],
    "torch_empty_cache_steps": [0, -1],
    "warmup_steps": [-1, 1e300],
    "weight_decay": [-0.1, 1e300],
    "accelerator_config": [
        {"nosuch": True},
        {"split_batches": True},
        {"non_blocking": "yes"},
        "file.json",
    ],
    "dataloader_multiprocessing_context": ["nosuch", "forks"],
}
SECTIONS: dict[str, list[Any]] = {
    "name": ["", "a/b", "../x", "a b", "-x", "n" * 300, "ä", 1, None, [], {}],
    "description": [1, None, [], SURROGATE, TOKEN],
    "variant": ["", "nosuch", 1, None],
    "baseline": ["../x", "n" * 300, "", 1, []],
    "model": [1, None, [], "x", {}],
    "model.name_or_path": ["", 1, None, *TEXTS, "/nosuch/place", "./nosuch", "~/nosuch/x/y"],
    "model.revision": [1, [], *TEXTS],
    "model.pretrained": ["true", 1, None],
    "model.memory_format": ["nosuch", 1, None],
    "model.attn_implementation": [1, [], "stranger/kernel", *TEXTS],
    "model.cudnn_benchmark": ["true", 0],
    "model.keep_freed_memory": ["true", 0],
    "model.nosuch": [1],
    "dataset": [1, None, [], "x", {}],
    "dataset.name_or_path": ["", 1, None, *TEXTS, "/nosuch/place", "./nosuch.tar.gz"],
    "dataset.config_name": [1, [], *TEXTS],
    "dataset.train_split": [1, None, "test", *TEXTS],
    "dataset.image_column": [1, None, *TEXTS],
    "dataset.label_column": [1, None, *TEXTS],
    "dataset.max_train_samples": [0, -1, 1.5, "1", True, *HUGE],
    "dataset.max_eval_samples": [0, -1, 1.5, "1", True, *HUGE],
    "dataset.max_train_eval_samples": [0, -1, 1.5, "1", *HUGE],
    "dataset.subset_seed": [-1, 1.5, "1", None, *HUGE],
    "dataset.num_classes": [0, 1, -1, 10**9, "2", 2.5, *HUGE],
    "dataset.label_colum": ["x"],
    "preprocessing": [1, None, [], "x", {}],
    "preprocessing.image_size": [0, 7, 1025, -1, 1.5, "32", None, *HUGE],
    "preprocessing.location": ["nosuch", 1, None],
    "preprocessing.augmentation": ["cutout", ["nosuch"], [1], ["cutout", "cutout"], {}, None],
    "reference": [1, [], "x", {}],
    "training_args": [1, None, [], "x"],
    "training_args.learning_ratee": [1],
    "training_args.evaluation_strategy": ["epoch"],
    "nosuch": [1, None, DEEP],
}
# Settings that exclude each other, or that nothing heeds, and one of the names that must be said.
TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"fp16": True, "bf16": True}, "fp16"),
    ({"dataloader_num_workers": 0, "dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
    ({"load_best_model_at_end": True, "eval_strategy": "no"}, "load_best_model_at_end"),
    (
        {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
        "load_best_model_at_end",
    ),
    ({"save_strategy": "best", "eval_strategy": "no"}, "save_strategy"),
    (
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 6,
        },
        "save_steps",
    ),
    ({"save_strategy": "no", "save_steps": 5}, "save_steps"),
    ({"eval_strategy": "no", "eval_steps": 5}, "eval_steps"),
    ({"eval_strategy": "no", "eval_delay": 2}, "eval_delay"),
    ({"metric_for_best_model": "accuracy"}, "metric_for_best_model"),
    ({"greater_is_better": True}, "greater_is_better"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "gradient_checkpointing_kwargs"),
    ({"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default"},
     "torch_compile_mode"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 10}, "warmup_steps"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}, "warmup_steps": 0},
     "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"}, "lr_scheduler_type"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1.0}},
     "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 9.0}},
     "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}},
     "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "a"}},
     "lr_scheduler_kwargs"),
    ({"optim": "sgd", "optim_args": "momentum=fast"}, "optim_args"),
    ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args"),
    ({"optim": "sgd", "optim_args": "eps=1"}, "optim_args"),
    ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1"),
    ({"optim": "rmsprop", "optim_args": "alpha=-1"}, "optim_args"),
    ({"optim": "adagrad", "optim_args": "lr_decay=x"}, "optim_args"),
    ({"optim": "adafactor", "adam_epsilon": 1e-3}, "adam_epsilon"),
]  # fmt: skip
FILES: list[tuple[bytes, str]] = [
    (b"", "is not valid JSON"),
    (b"{", "is not valid JSON"),
    (b"[]", "expected a JSON object"),
    (b"null", "expected a JSON object"),
    (b"\xff\xfe{}", "cannot be read"),
    (b'{"a": NaN}', "NaN"),
    (b'{"a": -Infinity}', "Infinity"),
    (b'{"name": "a", "name": "b"}', "name stands twice"),
    (b"[" * 200_000, "nested"),
    (b'{"a":' * 200_000, "nested"),
    (b'{"a": ' + b"9" * 10_000 + b"}", "cannot be read"),
    (b" " * (2 * 2**20), "MiB"),
    (b"\x00" * 100, "is not valid JSON"),
    (b'{"a": "\\ud800"}', "a"),
    (b"PK\x03\x04" + b"\x80" * 50, "cannot be read"),
]


@dataclass(frozen=True)
class BadInput:
    """One bad input.

    Attributes:
        content: Of a recipe file; text is written as it is.
        overrides: Given beside it.
        culprit: What the message must name.
    """

    content: Any
    overrides: tuple[str, ...]
    culprit: str


def bad_inputs(count: int, seed: int) -> Iterator[BadInput]:
    """Yield random bad inputs."""
    generator = random.Random(seed)
    recipes = [json.loads(path.read_text("utf-8")) for path in shipped_recipes().values()]
    fields = {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init}
    names = [name for name in fields if name not in OWNED]
    kinds = ("argument", "argument", "argument", "section", "section", "together", "file", "owned")
    for _ in range(count):
        base = copy.deepcopy(generator.choice(recipes))
        kind = generator.choice(kinds)
        if kind == "file":
            content, culprit = generator.choice(FILES)
            yield BadInput(content, (), culprit)
            continue
        if kind == "together":
            values, culprit = generator.choice(TOGETHER)
            base["training_args"] |= values
            yield BadInput(base, (), culprit)
            continue
        if kind == "section":
            dotted = generator.choice(list(SECTIONS))
            value = generator.choice(SECTIONS[dotted])
        elif kind == "owned":
            dotted, value = f"training_args.{generator.choice(list(OWNED))}", 1
        else:
            name = generator.choice(names)
            dotted, value = f"training_args.{name}", generator.choice(_wrong(name))
        culprit = dotted.rsplit(".", 1)[-1]
        text = value if isinstance(value, str) else json.dumps(value)
        as_override = generator.random() < 0.3 and "\x00" not in text and dotted.count(".") == 1
        if as_override and not _reads_otherwise(value):
            yield BadInput(base, (f"{dotted}={text}",), culprit)
        else:
            yield BadInput(_set(base, dotted, value), (), culprit)


def _set(content: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    target, (*keys, last) = content, dotted.split(".")
    for key in keys:
        target = target[key]
    target[last] = value
    return content


def _reads_otherwise(value: Any) -> bool:
    """Tell whether a value is another one on the command line, where 1 may be text."""
    return isinstance(value, str | bool | int | float) or value is None


def _wrong(name: str) -> list[Any]:
    hint = typing.get_type_hints(TrainingArguments)[name]
    options = typing.get_args(hint) or (hint,)
    origins = {typing.get_origin(option) or option for option in options}
    wrong: list[Any] = [DEEP]
    if not origins & {list}:
        wrong += [[], [1]]
    if not origins & {dict}:
        wrong += [{}, {"a": 1}]
    if types.NoneType not in origins:
        wrong.append(None)
    if bool not in origins and typing.Literal not in origins:
        wrong.append(True)
    if str in origins:
        wrong += TEXTS
    else:
        wrong += ["nosuch", "", "1"]
    if origins & {int, float}:
        wrong += HUGE
    else:
        wrong += [1, 1.5]
    return wrong + PARTICULAR.get(name, [])
