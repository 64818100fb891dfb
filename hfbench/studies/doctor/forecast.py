"""How long a whole run will take, from what one batch of it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import TrainingArguments

from hfbench.studies.doctor.schema import Forecast, Step

_LEAST_SPREAD = 1.15  # a machine drifts by more in a run than within half a minute
_OTHER_BATCH_SPREAD = 1.5  # where a smaller batch than the recipe's was measured
_ESTIMATE_SPREAD = 1.5  # of evaluations and checkpoints, each measured once


@dataclass(frozen=True)
class Schedule:
    """How often a run does what, as `Trainer` counts it, in one process.

    Attributes:
        samples: Images trained on, over all epochs.
        batches: Micro-batches.
        optimizer_steps: Updates.
        epochs: Begun.
        evaluations: Inside the training call.
        saves: Checkpoints; with save_strategy "best" at most so many.
        evaluates_last: Whether the last step is evaluated inside the training call.
    """

    samples: int
    batches: int
    optimizer_steps: int
    epochs: int
    evaluations: int
    saves: int
    evaluates_last: bool


def plan_schedule(args: TrainingArguments, train_samples: int) -> Schedule:
    """Count what a run does (`Trainer.set_initial_training_values`, `DefaultFlowCallback`)."""
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    a_epoch = train_samples // size if args.dataloader_drop_last else -(-train_samples // size)
    samples = a_epoch * size if args.dataloader_drop_last else train_samples
    updates = max(-(-a_epoch // accumulation), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    whole, rest = divmod(steps, updates)
    epochs = whole + (rest > 0)
    evaluations = _count_evaluations(args, steps, updates, epochs)
    return Schedule(
        samples=whole * samples + rest * size * accumulation,
        batches=whole * a_epoch + rest * accumulation,
        optimizer_steps=steps,
        epochs=epochs,
        evaluations=evaluations,
        saves=_count_saves(args, steps, epochs, evaluations),
        # If any is, the last one is: there is one after the last step with either strategy.
        evaluates_last=evaluations > int(bool(args.eval_on_start)),
    )


def _count_evaluations(args: TrainingArguments, steps: int, updates: int, epochs: int) -> int:
    at_start = int(bool(args.eval_on_start))
    if args.eval_strategy == "epoch":
        ends = [min(epoch * updates, steps) / updates for epoch in range(1, epochs + 1)]
        return at_start + sum(1 for end in ends if end >= args.eval_delay)
    if args.eval_strategy == "steps":
        at = {*range(0, steps + 1, _every(args.eval_steps, steps)), steps} - {0}
        return at_start + sum(1 for step in at if step >= args.eval_delay)
    return at_start


def _count_saves(args: TrainingArguments, steps: int, epochs: int, evaluations: int) -> int:
    if args.save_strategy == "epoch":
        return epochs
    if args.save_strategy == "steps":
        return -(-steps // _every(args.save_steps, steps))
    return evaluations if args.save_strategy == "best" else 0


def _every(given: float | None, steps: int) -> int:
    """Return an interval in steps; below 1 it is a share of the run."""
    value = given or 1
    return max(1, math.ceil(value * steps) if value < 1 else int(value))


def predict_duration(
    schedule: Schedule,
    step: Step,
    *,
    batch_size: int,
    measured_batch_size: int,
    first_step_seconds: float,
    evaluation_seconds: float,
    save_seconds: float,
    final_evaluation_seconds: float,
    windows: Sequence[float],
) -> Forecast:
    """Predict a whole run.

    Args:
        schedule: What it does.
        step: What one batch takes.
        batch_size: Micro-batch of the recipe.
        measured_batch_size: Another one, if the step was scaled from it.
        first_step_seconds: What the first step takes longer than others.
        evaluation_seconds: Of one evaluation.
        save_seconds: Of one checkpoint.
        final_evaluation_seconds: After training.
        windows: Seconds of a batch in each window, for the range.
    """
    once = step.optimizer_seconds + step.rest_seconds
    grows = (step.batch_seconds - once) / batch_size
    steady = grows * schedule.samples + once * schedule.batches
    steady += step.epoch_start_seconds * schedule.epochs
    train = steady + first_step_seconds
    evaluation = schedule.evaluations * evaluation_seconds
    save = schedule.saves * save_seconds
    speed, spread = schedule.samples / steady, _spread(windows, batch_size != measured_batch_size)
    beside = evaluation + save
    note = (
        f"The range is a factor of {spread:.2f} for training ("
        + (
            f"measured on batches of {measured_batch_size} instead of {batch_size}"
            if batch_size != measured_batch_size
            else f"twice the standard deviation of {len(windows)} windows, at least "
            f"{_LEAST_SPREAD}: machines drift"
        )
        + f") and of {_ESTIMATE_SPREAD} for evaluations and checkpoints."
    )
    return Forecast(
        samples_per_second=speed,
        lowest_samples_per_second=speed / spread,
        highest_samples_per_second=speed * spread,
        optimizer_steps=schedule.optimizer_steps,
        train_seconds=train,
        evaluation_seconds=evaluation,
        save_seconds=save,
        final_evaluation_seconds=final_evaluation_seconds,
        execution_seconds=train + beside,
        lowest_execution_seconds=train / spread + beside / _ESTIMATE_SPREAD,
        highest_execution_seconds=train * spread + beside * _ESTIMATE_SPREAD,
        note=note,
    )


def _spread(windows: Sequence[float], other_batch: bool) -> float:
    """Return the factor of two standard deviations of the logarithms, at least 1.15."""
    deviation = float(np.std(np.log(windows), ddof=1)) if len(windows) > 1 else 0.0
    least = _OTHER_BATCH_SPREAD if other_batch else _LEAST_SPREAD
    return max(math.exp(2 * deviation), least)
