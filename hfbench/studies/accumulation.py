"""One batch against the same images in several: the check of gradient accumulation.

The first loss and gradient of (B, 1) and of (B/k, k) must be equal within precision, unless the
model normalises over the batch. Three ways go wrong in practice: the loss is summed instead of
averaged (transformers issue 47688), divided twice, or averaged over unequal micro-batches.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hfbench.profiling.clock import Clock
from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import not_compiled
from hfbench.studies.doctor.schema import AccumulationCheck
from hfbench.studies.windows import Bench, turn_off_dropout, with_arguments, without_files
from hfbench.training.inputs import assemble
from hfbench.training.trainer import BenchTrainer, build_training_arguments

# Relative. Rounding errors of sums over a batch grow with the unit roundoff: 2**-24 in fp32, 2**-11
# in fp16 and TF32, 2**-8 in bf16; a factor of 16 stays far below the 1 / k of a wrong scaling.
TOLERANCES = {"fp32": 1e-3, "tf32": 16 * 2**-11, "fp16": 16 * 2**-11, "bf16": 16 * 2**-8}

_LARGEST_SCALE = 2.0**16  # of a loss in float16; torch begins there


@dataclass(frozen=True)
class _First:
    """Loss and gradient of the first optimizer step; the gradient is float32, flat, on the host."""

    loss: float
    gradient: Tensor

    @property
    def norm(self) -> float:
        return float(self.gradient.norm())


def check_accumulation(
    bench: Bench, micro_batches: int, micro_batch_size: int, precision: str, folder: Path
) -> AccumulationCheck | None:
    """Compare one batch with the same images in several.

    In float16 the loss scale is halved until all gradients are finite, as in training.

    Args:
        bench: Whose recipe, model and data are used.
        micro_batches: k.
        micro_batch_size: B / k.
        precision: ``fp32``, ``tf32``, ``fp16`` or ``bf16``.
        folder: That `Trainer` may have.

    Returns:
        What was found; nothing is raised for a wrong gradient. ``None`` if gradients are not finite
        at any scale.
    """
    images = micro_batches * micro_batch_size
    scale = _LARGEST_SCALE
    while True:
        steps = _three_steps(bench, micro_batches, micro_batch_size, scale, folder)
        if all(math.isfinite(step.norm) for step in steps):
            break
        if precision != "fp16" or scale <= 1:
            return None
        scale /= 2
    whole, accumulated, expected = steps
    tolerance = TOLERANCES[precision]
    difference = float((accumulated.gradient - expected.gradient).norm()) / expected.norm
    statistics = has_batch_statistics(bench.inputs.model)
    references = [expected] if statistics else [expected, whole]
    passed = difference <= tolerance and all(
        abs(accumulated.loss / other.loss - 1) <= tolerance
        and abs(accumulated.norm / other.norm - 1) <= tolerance
        for other in references
    )
    return AccumulationCheck(
        samples=images,
        micro_batches=micro_batches,
        loss_of_one_batch=whole.loss,
        loss_accumulated=accumulated.loss,
        loss_expected=expected.loss,
        gradient_norm_of_one_batch=whole.norm,
        gradient_norm_accumulated=accumulated.norm,
        gradient_norm_expected=expected.norm,
        gradient_difference=difference,
        tolerance=tolerance,
        batch_statistics=statistics,
        passed=passed,
        sentence=_say(whole, accumulated, expected, micro_batches, statistics, passed),
    )


def _three_steps(
    bench: Bench, micro_batches: int, micro_batch_size: int, scale: float, folder: Path
) -> tuple[_First, _First, _First]:
    """Return the first steps of one batch, of micro-batches, and of these by hand."""
    recipe = _with_batch(bench.recipe, micro_batches * micro_batch_size, 1)
    whole, _ = _first_step(recipe, bench, scale, folder)
    recipe = _with_batch(bench.recipe, micro_batch_size, micro_batches)
    accumulated, trainer = _first_step(recipe, bench, scale, folder)
    return whole, accumulated, _first_step_by_hand(trainer, bench, micro_batches, scale)


def has_batch_statistics(model: nn.Module) -> bool:
    """Tell whether a model normalises over the batch in training."""
    kinds = nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, kinds) for module in model.modules())


def _with_batch(recipe: Recipe, batch_size: int, accumulation: int) -> Recipe:
    return with_arguments(
        without_files(recipe),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        **not_compiled(recipe),  # a minute or two, for the same numbers
        dataloader_num_workers=0,
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None,
        max_grad_norm=1e30,  # not clipped, but fp16's scale is taken out
    )


class _KeepGradient(TrainerCallback):
    def __init__(self) -> None:
        self.gradient = torch.empty(0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.gradient = _flat_gradient(kwargs["model"])


def _flat_gradient(model: nn.Module) -> Tensor:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([gradient.detach().float().flatten().cpu() for gradient in gradients])


def _first_step(
    recipe: Recipe, bench: Bench, scale: float, folder: Path
) -> tuple[_First, BenchTrainer]:
    keep = _KeepGradient()
    args = build_training_arguments(recipe, folder)
    model = copy.deepcopy(bench.inputs.model)
    turn_off_dropout(model)
    trainer = assemble(
        recipe, args, replace(bench.inputs, model=model), Clock(), [keep], as_asked=True
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.loss_scale:
        trainer.loss_scale.start_at(scale)
    trainer.train()
    trainer.close_loaders()
    return _First(float(trainer.loss_sum), keep.gradient), trainer


def _first_step_by_hand(
    trainer: BenchTrainer, bench: Bench, micro_batches: int, scale: float
) -> _First:
    """Compute the mean over the micro-batches in plain torch, with the batches of the trainer."""
    model: Any = copy.deepcopy(bench.inputs.model)
    model.to(trainer.args.device)
    turn_off_dropout(model)
    model.train()
    loader: Any = getattr(trainer.train_loader, "base_dataloader", trainer.train_loader)
    trainer.state.epoch = 0.0  # the same order and augmentation as in its first step
    batches = iter(loader)
    dtype, total = trainer.requested_dtype, 0.0
    factor = scale if trainer.loss_scale else 1.0
    for _ in range(micro_batches):
        batch = trainer._prepare_inputs(next(batches))
        pixels = batch["pixel_values"]
        reduced = dtype != torch.float32
        with torch.autocast(trainer.args.device.type, dtype if reduced else None, enabled=reduced):
            logits = model(pixel_values=pixels).logits
        loss = nn.functional.cross_entropy(
            logits.float(),
            batch["labels"],
            label_smoothing=trainer.args.label_smoothing_factor,
        )
        (loss * factor / micro_batches).backward()
        total += float(loss.detach()) / micro_batches
    return _First(total, _flat_gradient(model) / factor)


def _say(
    whole: _First,
    accumulated: _First,
    expected: _First,
    micro_batches: int,
    statistics: bool,
    passed: bool,
) -> str:
    found = (
        f"{micro_batches} micro-batches: first loss {accumulated.loss:.4f}, gradient norm "
        f"{accumulated.norm:.4g}"
    )
    if passed and statistics:
        return (
            f"Accumulation is right. {found}, as the mean over the micro-batches should be. One "
            f"batch of the same images gives {whole.loss:.4f} and {whole.norm:.4g}, because "
            "batch norm then has the statistics of all of them: with this model accumulation is "
            "never quite neutral."
        )
    if passed:
        return f"Accumulation is right. {found}; one batch of the same images gives the same."
    factor = accumulated.norm / expected.norm
    guess = (
        f" This is {micro_batches} times too much: each micro-batch's loss is its own mean, and "
        "nothing divides by their number (transformers issue 47688)."
        if abs(factor / micro_batches - 1) < 0.05
        else ""
    )
    return (
        f"ACCUMULATION IS WRONG. {found}, instead of {expected.loss:.4f} and "
        f"{expected.norm:.4g}: gradients are {factor:.3g} times as large as they should be.{guess}"
        " Do not trust a result of this recipe with accumulation."
    )
