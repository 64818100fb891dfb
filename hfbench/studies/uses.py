"""A recipe with each technique turned on and off: what ``hfbench ablate`` chooses from."""

from __future__ import annotations

from dataclasses import replace

from hfbench.machine.allocator import can_keep_freed_memory
from hfbench.machine.environment import accelerator_type
from hfbench.machine.precision import find_slow_precision, takes_float32
from hfbench.models.convolutions import is_convolutional
from hfbench.recipe.schema import Recipe, load_recipe, shipped_recipes
from hfbench.recipe.techniques import (
    ACCUMULATION,
    ATTENTION,
    CHECKPOINTS,
    COMPILE,
    CUDNN_BENCHMARK,
    DEVICE_PREPROCESSING,
    EVALUATION_BATCH,
    KEPT_MEMORY,
    MEMORY_FORMAT,
    MICRO_BATCH,
    MIXED_PRECISION,
    NAN_FILTER,
    ONE_CHOICE_A_PROCESS,
    OPTIMIZER,
    PINNED_MEMORY,
    TF32,
    WORKERS,
    Technique,
    Use,
    change,
    is_compiled,
)

ACCUMULATION_STEPS = 4  # where the recipe has none: the reference's
_BF16, _FP16 = "training_args.bf16", "training_args.fp16"
_STEPS = "training_args.gradient_accumulation_steps"
_BATCH = "training_args.per_device_train_batch_size"
_EAGER = "eager"  # attention written out, as every transformer has it
_OUTSIDE_OF_STEPS = "short windows neither evaluate nor save; --full runs do"
_PLAIN_OPTIMIZER = {"adamw_torch_fused": "adamw_torch", "adamw_apex_fused": "adamw_torch"}


def find_uses(recipe: Recipe) -> list[Use]:
    """Find the techniques that a recipe has or could have on this machine.

    Returns:
        Always mixed precision, pinned memory, both kinds of accumulation, and memory format; cuDNN
        benchmark on NVIDIA GPUs; kept memory on CPUs; the others where the recipe has them. Batch
        sizes and checkpoints are those of a fast recipe against its baseline's, if that is one of
        the shipped ones.
    """
    device = "cpu" if recipe.argument("use_cpu") else accelerator_type() or "cpu"
    convolutional = is_convolutional(recipe) is not False
    baseline = _shipped_baseline(recipe)
    micro_batch = _micro_batch(recipe, baseline)
    batch = int(recipe.argument("per_device_train_batch_size"))
    steps = int(recipe.argument("gradient_accumulation_steps"))
    usual = ACCUMULATION_STEPS
    if micro_batch:  # accumulation reaches its batch by the other way
        batch, usual = int(micro_batch.off[_BATCH]), max(batch // int(micro_batch.off[_BATCH]), 2)
    accumulated = (recipe, batch, steps if steps > 1 else usual)
    optional = (
        micro_batch,
        _compile(recipe),
        _device_preprocessing(recipe),
        _workers(recipe),
        _optimizer(recipe),
        _tf32(recipe),
        _cudnn_benchmark(recipe, device, convolutional),
        _attention(recipe),
        _kept_memory(recipe, device),
        _nan_filter(recipe, device),
        _evaluation_batch(recipe, baseline),
        _checkpoints(recipe, baseline),
    )
    return [
        _mixed_precision(recipe, device),
        _pinned_memory(recipe, device),
        _accumulation_same_batch(*accumulated),
        _accumulation_larger_batch(*accumulated),
        _memory_format(recipe, convolutional),
        *(use for use in optional if use is not None),
    ]


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
    turned_on = change(recipe, on.items())
    return Use(
        MIXED_PRECISION,
        MIXED_PRECISION.name,
        "fp16" if fp16 else "bf16",
        on,
        off,
        in_recipe,
        f"{find_slow_precision(turned_on)}, and the recipe takes what is faster"
        if takes_float32(turned_on)
        else None,
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


def _accumulation_same_batch(recipe: Recipe, batch: int, wanted: int) -> Use:
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


def _accumulation_larger_batch(recipe: Recipe, batch: int, steps: int) -> Use:
    return Use(
        ACCUMULATION,
        "accumulation, larger batch",
        f"{steps} micro-batches of {batch}: {batch * steps} instead of {batch}",
        {_STEPS: steps, _BATCH: batch},
        {_STEPS: 1, _BATCH: batch},
        int(recipe.argument("gradient_accumulation_steps")) > 1,
    )


def _compile(recipe: Recipe) -> Use | None:
    enabled, backend, mode = COMPILE.settings
    values = {name: recipe.argument(name.partition(".")[2]) for name in COMPILE.settings}
    if not is_compiled(recipe):
        return None
    detail = ", ".join(str(values[name]) for name in (backend, mode) if values[name]) or "inductor"
    values[enabled] = True
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


def _memory_format(recipe: Recipe, convolutional: bool) -> Use:
    (setting,) = MEMORY_FORMAT.settings
    return Use(
        MEMORY_FORMAT,
        MEMORY_FORMAT.name,
        "channels_last instead of contiguous",
        {setting: "channels_last"},
        {setting: "contiguous"},
        recipe.model.memory_format == "channels_last",
        None
        if convolutional
        else "the model has no convolutions, but to cut an image into patches",
    )


def _cudnn_benchmark(recipe: Recipe, device: str, convolutional: bool) -> Use | None:
    in_recipe = recipe.model.cudnn_benchmark
    if device != "cuda":
        no_effect: str | None = "there is no cuDNN: the model is not on an NVIDIA GPU"
    else:
        no_effect = None if convolutional else "the model has no convolutions to choose for"
    use = _switched(CUDNN_BENCHMARK, "algorithms chosen by time", in_recipe, no_effect)
    return replace(use, whole_runs_only=ONE_CHOICE_A_PROCESS) if use else None


def _attention(recipe: Recipe) -> Use | None:
    chosen = recipe.model.attn_implementation
    if chosen in (None, _EAGER):  # the library's own choice may be the same, and may not be one
        return None
    (setting,) = ATTENTION.settings
    detail = f"{chosen} instead of {_EAGER}"
    return Use(ATTENTION, ATTENTION.name, detail, {setting: chosen}, {setting: _EAGER}, True)


def _kept_memory(recipe: Recipe, device: str) -> Use | None:
    in_recipe = recipe.model.keep_freed_memory
    if device != "cpu":
        no_effect: str | None = "a step's memory is the device's, which torch keeps anyway"
    else:
        no_effect = None if can_keep_freed_memory() else "needs Linux with glibc"
    return _switched(KEPT_MEMORY, "of a step for the next one", in_recipe, no_effect)


def _switched(
    technique: Technique, detail: str, in_recipe: bool, no_effect: str | None
) -> Use | None:
    """Return what is only on or off; ``None`` if it is neither asked for nor has an effect."""
    if no_effect and not in_recipe:
        return None
    (setting,) = technique.settings
    on, off = {setting: True}, {setting: False}
    return Use(technique, technique.name, detail, on, off, in_recipe, no_effect)


def _nan_filter(recipe: Recipe, device: str) -> Use | None:
    if recipe.argument("logging_nan_inf_filter"):
        return None
    (setting,) = NAN_FILTER.settings
    return Use(
        NAN_FILTER,
        NAN_FILTER.name,
        "off: the loss stays on the device",
        {setting: False},
        {setting: True},
        True,
        "no step runs ahead of the host that would have to be waited for"
        if device == "cpu"
        else None,
    )


def _shipped_baseline(recipe: Recipe) -> Recipe | None:
    path = shipped_recipes().get(recipe.baseline or "")
    return load_recipe(path) if path else None


def _micro_batch(recipe: Recipe, baseline: Recipe | None) -> Use | None:
    return _larger(MICRO_BATCH, recipe, baseline)


def _evaluation_batch(recipe: Recipe, baseline: Recipe | None) -> Use | None:
    use = _larger(EVALUATION_BATCH, recipe, baseline)
    return replace(use, whole_runs_only=_OUTSIDE_OF_STEPS) if use else None


def _larger(technique: Technique, recipe: Recipe, baseline: Recipe | None) -> Use | None:
    """Return a batch size as a technique, if it is larger than the baseline's."""
    (setting,) = technique.settings
    name = setting.partition(".")[2]
    if baseline is None or recipe.argument(name) <= baseline.argument(name):
        return None
    ours, theirs = recipe.argument(name), baseline.argument(name)
    detail = f"{ours} instead of {theirs}"
    return Use(technique, technique.name, detail, {setting: ours}, {setting: theirs}, True)


def _checkpoints(recipe: Recipe, baseline: Recipe | None) -> Use | None:
    (setting,) = CHECKPOINTS.settings
    name = setting.partition(".")[2]
    if baseline is None or recipe.argument(name) != "no" or baseline.argument(name) == "no":
        return None
    theirs = str(getattr(baseline.argument(name), "value", baseline.argument(name)))
    detail = f"none instead of one every {theirs}"
    return Use(
        CHECKPOINTS,
        CHECKPOINTS.name,
        detail,
        {setting: "no"},
        {setting: theirs},
        True,
        whole_runs_only=_OUTSIDE_OF_STEPS,
    )
