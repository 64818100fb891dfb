"""Whether a technique leaves the first loss what it should be.

A technique may change how fast a step is, and rounding; what is minimised it must not change. The
first loss, before any update, shows it in one step: with the accumulation bug of transformers issue
47688 it is k times too high.
"""

from __future__ import annotations

import copy
import math
from statistics import fmean
from typing import Any

import torch
from torch import nn

from hfbench.data.images import ImageBatches
from hfbench.machine.devices import why_no_tf32
from hfbench.machine.settings import tf32_set
from hfbench.recipe.schema import Recipe
from hfbench.results.windows import FirstLoss
from hfbench.studies.windows import Bench, turn_off_dropout
from hfbench.training.trainer import EpochSampler

# Half the distance from 1 to the next number: IEEE 754 (2019); NVIDIA A100 whitepaper for TF32;
# Intel, bfloat16 hardware numerics definition, 338302-001 (2018).
_UNIT_ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
# Different algorithms for the same convolution, and batch norm's sums, in any order.
_FLOOR = 1e-5
_LARGEST = 0.7  # two micro-batches that are not averaged are off by 1
_DRAWS = 8
CHECK_STEPS = 1 + (2 + _DRAWS) / 3  # what a check takes in steps; a forward pass is a third
_SAFETY = 8.0  # Student's t with as many degrees of freedom exceeds it once in 20,000 times


def check_first_loss(bench: Bench, recipe: Recipe, precision: str) -> FirstLoss:
    """Set the first loss of a variant against that of a plain loop.

    Both without dropout and drop path. The plain loop sees the same micro-batches, since batch norm
    makes the loss depend on them.

    Args:
        bench: Of the recipe.
        recipe: The variant.
        precision: In which the variant computes: ``fp32``, ``tf32``, ``fp16`` or ``bf16``.

    Raises:
        Exception: That `is_out_of_memory` knows, if one of both does not fit.
    """
    found = bench.measure_first_loss(recipe)
    expected, again = (plain_first_loss(bench, recipe, seed) for seed in (0, 1))
    if not math.isfinite(expected):
        return _unknown(found, "the loss is not finite without any technique either")
    if abs(again - expected) > _FLOOR * max(1.0, expected):
        return _unknown(found, "the model draws random numbers that are not dropout")
    allowed = _tolerance(bench, recipe, precision, expected)
    if allowed > _LARGEST:
        return _unknown(found, f"rounding to {precision} alone changes this model's first loss")
    steps = int(recipe.argument("gradient_accumulation_steps"))
    problem = _problem(expected, found, allowed, steps)
    return FirstLoss(
        expected=expected,
        found=found,
        tolerance=allowed,
        problem=problem,
        flagged=problem is not None,
    )


def _unknown(found: float | None, reason: str) -> FirstLoss:
    return FirstLoss(
        expected=None, found=found, tolerance=None, problem=f"not checked: {reason}.", flagged=False
    )


def _tolerance(bench: Bench, recipe: Recipe, precision: str, expected: float) -> float:
    """Return how far a first loss may be from the exact one by rounding alone.

    How much a model amplifies rounding depends on its weights and on the size of its micro-batches:
    batch norm over few values amplifies it a thousandfold. So it is measured, by Monte Carlo
    arithmetic (Parker, Monte Carlo Arithmetic, UCLA CSD-970002, 1997): weights and the result of
    each layer are changed at random by up to the unit roundoff, a few times, and the loss is looked
    at. The loss in question is one more such draw: over their root mean square, it has Student's
    distribution.
    """
    roundoff = _UNIT_ROUNDOFF[precision]
    found = [plain_first_loss(bench, recipe, seed, roundoff) for seed in range(_DRAWS)]
    spread = math.sqrt(fmean((loss - expected) ** 2 for loss in found)) / max(1.0, abs(expected))
    return max(_FLOOR, _SAFETY * spread)


def plain_first_loss(bench: Bench, recipe: Recipe, seed: int = 0, roundoff: float = 0.0) -> float:
    """Return the mean loss of a variant's first optimizer step, by a loop in fp32 without Trainer.

    Args:
        bench: Of the recipe.
        recipe: The variant; of it only batch size, accumulation, seeds and label smoothing count.
        seed: For what is left to chance.
        roundoff: Weights and the result of each layer are changed at random by up to this share.
    """
    batch = int(recipe.argument("per_device_train_batch_size"))
    steps = int(recipe.argument("gradient_accumulation_steps"))
    inputs = bench.inputs
    images = ImageBatches(inputs.train, inputs.preprocessing, "host", augment=True)
    seeds = [recipe.argument(name) for name in ("data_seed", "seed")]
    length = max(len(images), batch * steps)
    order = list(EpochSampler(length, next(s for s in seeds if s is not None), lambda: 0))
    model: nn.Module = copy.deepcopy(inputs.model)
    model.to(bench.device).train()
    turn_off_dropout(model)
    torch.manual_seed(seed)
    if roundoff:
        _round_at_random(model, roundoff)
    total = 0.0
    with torch.no_grad(), tf32_set(False):
        for start in range(0, batch * steps, batch):
            served = images.__getitems__(order[start : start + batch])
            logits = model(pixel_values=served["pixel_values"].to(bench.device)).logits
            loss = nn.functional.cross_entropy(
                logits.float(),
                served.get("mixed_labels", served["labels"]).to(bench.device),
                label_smoothing=float(recipe.argument("label_smoothing_factor")),
            )
            total += float(loss)
    return total / steps


def _problem(expected: float, found: float | None, allowed: float, steps: int) -> str | None:
    if found is None:
        return f"first loss not finite instead of {expected:.4g}."
    scale = max(1.0, abs(expected))
    if abs(found - expected) <= allowed * scale:
        return None
    said = f"first loss {found:.4g} instead of {expected:.4g}"
    if steps > 1 and abs(found - steps * expected) <= allowed * steps * scale:
        return (
            f"{said}: {steps} times too high, as if the mean of each micro-batch were not divided "
            f"by the {steps} of them (transformers issue 47688)."
        )
    return f"{said}: more than rounding explains ({allowed:.1g})."


def _round_at_random(model: nn.Module, roundoff: float) -> None:
    def change(value: torch.Tensor) -> torch.Tensor:
        return value * (1 + roundoff * (2 * torch.rand_like(value) - 1))

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            return change(output)
        return output

    with torch.no_grad():
        for parameter in model.parameters():  # the same for all images, so that nothing averages
            parameter.copy_(change(parameter))
    for module in model.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(hook)


def precision_of(recipe: Recipe, device: torch.device) -> str:
    """Return the lowest precision that a recipe computes in on a device.

    Where a device has TF32 it counts if the recipe leaves it to torch too, which has it on for
    convolutions.
    """
    for name in ("fp16", "bf16"):
        if recipe.argument(name):
            return name
    tf32 = why_no_tf32(device) is None and recipe.argument("tf32") is not False
    return "tf32" if tf32 else "fp32"
