"""What `hfbench tune` may change in a recipe on one machine, each technique's next settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfbench.machine.allocator import can_keep_freed_memory
from hfbench.machine.environment import accelerator_type, check_machine
from hfbench.machine.precision import find_slow_precision
from hfbench.models.convolutions import has_convolutions
from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import CUDNN_BENCHMARK, ONE_CHOICE_A_PROCESS, change, is_compiled

if TYPE_CHECKING:
    from hfbench.studies.windows import Bench

MICRO_BATCH = "micro-batch"
LARGER_BATCH = "larger batch"

BATCH = "training_args.per_device_train_batch_size"
STEPS = "training_args.gradient_accumulation_steps"
_NEIGHBOUR = 1.5  # a micro-batch that is nearer than this factor is hardly another one

SAME_ARITHMETIC = "same arithmetic"  # on CUDA two equal runs differ all the same
ROUNDING = "same but for rounding"
CHECK_PRECISION = "other precision: check accuracy"
CHECK_BATCH_NORM = "batch norm sees other batches: check accuracy"
CHECK_BATCH = "another effective batch at the same learning rate: check accuracy"


@dataclass(frozen=True)
class Subject:
    """What decides which settings make sense: the model, the data and the machine.

    Attributes:
        device_type: That training runs on.
        cores: Of the CPU, that this process may use.
        images: To train on.
        convolutional: Whether the model has more convolutions than a patch embedding.
        batch_norm: Whether it has layers whose result depends on the rest of the micro-batch.
        attention: What it computes attention with if that can be chosen; else ``None``.
    """

    device_type: str
    cores: int
    images: int
    convolutional: bool
    batch_norm: bool
    attention: str | None


@dataclass(frozen=True)
class Candidate:
    """One change to the best recipe so far.

    Attributes:
        technique: What kind of change it is.
        detail: The new setting in words.
        settings: Dotted names of the recipe and their new values.
        effect: What it does to the results of training.
    """

    technique: str
    detail: str
    settings: Mapping[str, Any]
    effect: str

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with this change."""
        return change(recipe, self.settings.items())


Offers = Callable[[Recipe, Subject], Iterator[Candidate]]


def describe_subject(bench: Bench) -> Subject:
    """Look at what a bench has loaded."""
    from torch.nn.modules.batchnorm import _BatchNorm

    model, modules = bench.inputs.model, list(bench.inputs.model.modules())
    selectable = model.config.model_type != "timm_wrapper" and getattr(
        model, "_supports_sdpa", False
    )
    return Subject(
        device_type=bench.device.type,
        cores=_usable_cores(),
        images=len(bench.inputs.train),
        convolutional=has_convolutions(model),
        batch_norm=any(isinstance(module, _BatchNorm) for module in modules),
        attention=model.config._attn_implementation if selectable else None,
    )


def list_techniques(larger_batch: bool) -> dict[str, Offers]:
    """Return what is tried, in this order: what usually matters most comes first.

    Each function gives the neighbours of the best recipe so far, and is asked again after a
    neighbour was taken. It gives none where the technique can have no effect.
    """
    techniques: dict[str, Offers] = {
        "preprocessing": _locations,
        "precision": _precisions,
        "memory format": _memory_formats,
        "kept memory": _kept_memory,
        "optimizer": _optimizers,
        "NaN filter": _nan_filters,
        "attention": _attentions,
        "loader workers": _workers,
        "pinned memory": _pinned_memory,
        MICRO_BATCH: _micro_batches,
    }
    return techniques | ({LARGER_BATCH: _larger_batches} if larger_batch else {})


def say_inapplicable(recipe: Recipe, subject: Subject, larger_batch: bool) -> dict[str, str]:
    """Say of each technique that has no neighbour in this recipe why that is so."""
    reasons = {
        "precision": "this machine has no other, or computes it more slowly",
        "memory format": "the model is not convolutional",
        "kept memory": "for a CPU, with glibc",
        "optimizer": "only AdamW has a fused twin here",
        "NaN filter": "off already",
        "attention": "nothing to choose, or sdpa already",
        "loader workers": "preprocessing is on the device: a batch is one gather",
        "pinned memory": "nothing is copied: model and data are in the same memory",
        MICRO_BATCH: "the batch has no other equal parts of at least 2 images",
        LARGER_BATCH: f"twice the batch is more than the {subject.images} training images",
    }
    found = {
        name: reasons[name]
        for name, offers in list_techniques(larger_batch).items()
        if next(offers(recipe, subject), None) is None
    }
    if subject.convolutional and subject.device_type == "cuda":
        found[CUDNN_BENCHMARK.name] = ONE_CHOICE_A_PROCESS
    if is_compiled(recipe):
        return found
    why = "compiling takes minutes, so that only whole runs can tell: hfbench ablate --full"
    return found | {"torch.compile": why}


def setting_of(recipe: Recipe, name: str) -> Any:
    """Return the value that a recipe gives to a dotted name, or its default."""
    section, _, rest = name.partition(".")
    if section != "training_args":
        return getattr(getattr(recipe, section), rest)
    argument, _, key = rest.partition(".")
    value = recipe.argument(argument)
    value = getattr(value, "value", value)
    return (value or {}).get(key, False) if key else value


def micro_batch_of(recipe: Recipe) -> int:
    """Return the images of one forward pass."""
    return int(recipe.argument("per_device_train_batch_size"))


def accumulation_of(recipe: Recipe) -> int:
    """Return the micro-batches of one optimizer step."""
    return int(recipe.argument("gradient_accumulation_steps"))


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1


def _locations(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    other = "host" if recipe.preprocessing.location == "device" else "device"
    settings = {"preprocessing.location": other}
    effect = SAME_ARITHMETIC if subject.device_type == "cpu" else ROUNDING
    yield Candidate("preprocessing", f"on the {other}", settings, effect)


def _precisions(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    mixed = bool(recipe.argument("bf16") or recipe.argument("fp16"))
    kinds = {"bf16": (True, False), "fp16": (False, True), "fp32": (False, False)}
    for name, (bf16, fp16) in kinds.items():
        settings = {"training_args.bf16": bf16, "training_args.fp16": fp16}
        if bf16 and accelerator_type() is None:  # transformers wants to be asked for it
            settings["training_args.use_cpu"] = True
        candidate = Candidate("precision", name, settings, CHECK_PRECISION)
        if fp16 and subject.device_type == "cpu":
            continue
        if _runs_here(candidate, recipe) and not find_slow_precision(candidate.apply(recipe)):
            yield candidate
    if not mixed and subject.device_type == "cuda":
        tf32 = not recipe.argument("tf32")
        name = "fp32 with TF32" if tf32 else "fp32 without TF32"
        candidate = Candidate("precision", name, {"training_args.tf32": tf32}, CHECK_PRECISION)
        if _runs_here(candidate, recipe):
            yield candidate


def _runs_here(candidate: Candidate, recipe: Recipe) -> bool:
    if all(setting_of(recipe, name) == value for name, value in candidate.settings.items()):
        return False
    return not check_machine(candidate.apply(recipe))


def _memory_formats(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    last = recipe.model.memory_format == "channels_last"
    if subject.convolutional or last:
        other = "contiguous" if last else "channels_last"
        yield Candidate("memory format", other, {"model.memory_format": other}, ROUNDING)


def _kept_memory(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    if subject.device_type == "cpu" and can_keep_freed_memory():
        on = not recipe.model.keep_freed_memory
        word = "on" if on else "off"
        yield Candidate("kept memory", word, {"model.keep_freed_memory": on}, SAME_ARITHMETIC)


def _optimizers(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    twins = {"adamw_torch": "adamw_torch_fused", "adamw_torch_fused": "adamw_torch"}
    other = twins.get(str(setting_of(recipe, "training_args.optim")))
    if other:
        yield Candidate("optimizer", other, {"training_args.optim": other}, ROUNDING)


def _nan_filters(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    if recipe.argument("logging_nan_inf_filter"):
        settings = {"training_args.logging_nan_inf_filter": False}
        yield Candidate("NaN filter", "off", settings, SAME_ARITHMETIC)


def _attentions(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    used = recipe.model.attn_implementation or subject.attention
    if subject.attention is not None and used != "sdpa":
        settings = {"model.attn_implementation": "sdpa"}
        yield Candidate("attention", "sdpa", settings, ROUNDING)


def _workers(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    used = int(recipe.argument("dataloader_num_workers"))
    on_host = recipe.preprocessing.location == "host"
    prefetch = recipe.argument("dataloader_prefetch_factor")
    near = [used // 2] if used else [1]
    near += [max(2 * used, 2)] if on_host else []
    for count in near if on_host or used else []:
        settings = {
            "training_args.dataloader_num_workers": count,
            "training_args.dataloader_persistent_workers": count > 0,
            "training_args.dataloader_prefetch_factor": prefetch if count else None,
        }
        if count <= subject.cores:
            word = "1 process" if count == 1 else f"{count or 'no'} processes"
            yield Candidate("loader workers", word, settings, SAME_ARITHMETIC)


def _pinned_memory(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    names = (
        "training_args.dataloader_pin_memory",
        "training_args.accelerator_config.non_blocking",
    )
    if subject.device_type not in ("cpu", "mps"):
        on = not all(setting_of(recipe, name) for name in names)
        word = "with non-blocking copies" if on else "off"
        yield Candidate("pinned memory", word, dict.fromkeys(names, on), SAME_ARITHMETIC)


def _micro_batches(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    """Give the next smaller and the next larger part of the same effective batch."""
    now, k = micro_batch_of(recipe), accumulation_of(recipe)
    parts = [n for n in range(2, now * k + 1) if now * k % n == 0]
    smaller = [n for n in parts if n * _NEIGHBOUR <= now][-1:]
    larger = [n for n in parts if n >= now * _NEIGHBOUR][:1]
    # Large batches fill an accelerator; small ones stay in a CPU's cache.
    order = smaller + larger if subject.device_type == "cpu" else larger + smaller
    effect = CHECK_BATCH_NORM if subject.batch_norm else ROUNDING
    for size in order:
        steps = now * k // size
        if _fits_data(recipe, subject, size):
            detail = f"{size} images, {steps} of them a step"
            yield Candidate(MICRO_BATCH, detail, {BATCH: size, STEPS: steps}, effect)


def _larger_batches(recipe: Recipe, subject: Subject) -> Iterator[Candidate]:
    now, k = micro_batch_of(recipe), accumulation_of(recipe)
    if 2 * now * k <= subject.images and _fits_data(recipe, subject, 2 * now):
        detail = f"{2 * now * k} images a step instead of {now * k}"
        yield Candidate(LARGER_BATCH, detail, {BATCH: 2 * now, STEPS: k}, CHECK_BATCH)


def _fits_data(recipe: Recipe, subject: Subject, size: int) -> bool:
    """Tell whether an epoch can be cut so: batch norm cannot train on one image left over."""
    if recipe.argument("dataloader_drop_last"):
        return size <= subject.images
    return not subject.batch_norm or subject.images % size != 1
