"""What the recipe asked for against what was seen to happen."""

from __future__ import annotations

from typing import Any

import torch
from transformers.training_args import OptimizerNames

from hfbench.machine.allocator import keeps_freed_memory
from hfbench.machine.devices import why_no_tf32
from hfbench.machine.environment import requested_processes
from hfbench.machine.precision import find_slow_precision
from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import is_compiled
from hfbench.results.schema import Switch
from hfbench.training.trainer import BenchTrainer


def observe_switches(recipe: Recipe, trainer: BenchTrainer) -> dict[str, Switch]:
    """Set what was asked for against what was seen, with the reason where they differ."""
    args, loader = trainer.args, trainer.train_loader
    on_cpu = args.device.type == "cpu"
    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    base = getattr(loader, "base_dataloader", loader)
    on_mps = args.device.type == "mps"  # where torch's loader warns, and goes on without
    pinned = bool(base.pin_memory) and not on_cpu and not on_mps
    non_blocking = bool(getattr(loader, "_non_blocking", False)) and pinned
    accelerator_config = recipe.argument("accelerator_config") or {}
    no_copy = "nothing is copied: the model is on the CPU" if on_cpu else None
    no_pins = no_copy or ("torch's loader pins nothing on MPS" if on_mps else None)
    compiled = (
        "compiled: taken from the accelerator's settings" if trainer.seen_dtype is None else None
    )
    applied_dtype = names[trainer.seen_dtype or trainer.requested_dtype]
    wanted = (name for name in ("fp16", "bf16") if recipe.argument(name))
    tf32, no_tf32 = recipe.argument("tf32"), why_no_tf32(args.device)
    attention = getattr(getattr(trainer.model, "config", None), "_attn_implementation", None)

    def switch(requested: Any, applied: Any, reason: str | None = None) -> Switch:
        return Switch(
            requested=requested, applied=applied, reason=reason if requested != applied else None
        )

    def tf32_switch(name: str) -> Switch:
        active = trainer.seen_tf32[name] and no_tf32 is None
        return switch(tf32, active, no_tf32 or "not set: torch's default")

    return {
        "precision": Switch(
            requested=next(wanted, "fp32"),
            applied=applied_dtype,
            reason=find_slow_precision(recipe) or compiled,
        ),
        "tf32_matmul": tf32_switch("matmul"),
        "tf32_convolution": tf32_switch("convolution"),
        "dataloader_pin_memory": switch(recipe.argument("dataloader_pin_memory"), pinned, no_pins),
        "non_blocking": switch(
            bool(accelerator_config.get("non_blocking", False)),
            non_blocking,
            no_copy or "not pinned",
        ),
        "dataloader_num_workers": switch(
            recipe.argument("dataloader_num_workers"),
            base.num_workers,
            "shared memory is too small for the batches of workers",
        ),
        "gradient_accumulation_steps": switch(
            recipe.argument("gradient_accumulation_steps"), args.gradient_accumulation_steps
        ),
        "preprocessing_location": switch(
            recipe.preprocessing.location,
            _preprocessing_location(trainer.train_dataset, on_cpu),
            "too many to lie in a quarter of the device's free memory, or it does not say",
        ),
        "memory_format": switch(recipe.model.memory_format, _memory_format(trainer.model)),
        "attn_implementation": switch(
            recipe.model.attn_implementation or attention,  # null: the library's own choice
            attention,
        ),
        "cudnn_benchmark": switch(
            recipe.model.cudnn_benchmark,
            torch.backends.cudnn.benchmark and args.device.type == "cuda",
            "there is no cuDNN: the model is not on an NVIDIA GPU",
        ),
        "keep_freed_memory": switch(
            recipe.model.keep_freed_memory, keeps_freed_memory(), "needs Linux with glibc"
        ),
        "torch_compile": switch(is_compiled(recipe), hasattr(trainer.model_wrapped, "_orig_mod")),
        "optim": switch(_optimizer_name(recipe.argument("optim")), _optimizer_name(args.optim)),
        "use_cpu": switch(bool(recipe.argument("use_cpu")), on_cpu, "no accelerator is visible"),
        "world_size": switch(requested_processes(), args.world_size),
    }


def _preprocessing_location(batches: Any, on_cpu: bool) -> str:
    """Say where batches were prepared, and where their images lay if not there."""
    if batches.location == "device" and not on_cpu and batches.device is None:
        return "device, images in host memory"
    return str(batches.location)


def _memory_format(model: Any) -> str:
    """Say how the filters of a model's convolutions lie in memory."""
    filters = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    # A filter of one pixel or one channel lies both ways.
    telling = [f for f in filters if f.shape[1] > 1 and f.shape[2] * f.shape[3] > 1]
    last = [f.is_contiguous(memory_format=torch.channels_last) for f in telling]
    return "channels_last" if last and all(last) else "contiguous"


def _optimizer_name(optim: Any) -> str:
    return str(OptimizerNames(optim).value)
