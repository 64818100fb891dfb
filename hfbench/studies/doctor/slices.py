"""Rounds of slices: the parts of training and training itself, measured in turn.

In turn, so that a machine that slows down meanwhile slows all of them down.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from hfbench.studies.doctor.parts import Sides
from hfbench.studies.doctor.schema import Side, Step
from hfbench.studies.windows import Bench

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 12
_WINDOW_SHARE, _SLICE_SHARE = 0.05, 0.03  # of the time that there is
_MOST_STEPS = 100


@dataclass
class Slices:
    """Seconds of one batch in each slice, in the order in which they were measured.

    Attributes:
        training: In training, as a whole.
        phases: Of training, by `timeline.PHASES`: shares of the window.
        epoch_start: Until a loader gives its first batch.
        other_model: The model in the other precision; empty if that could not be run.
        optimizer: One optimizer step, not shared among batches.
        fused_optimizer: The same of torch's fused AdamW; empty where the recipe's is another kind.
    """

    training: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    loader: list[float] = field(default_factory=list)
    epoch_start: list[float] = field(default_factory=list)
    preprocessing: list[float] = field(default_factory=list)
    model: list[float] = field(default_factory=list)
    other_model: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    fused_optimizer: list[float] = field(default_factory=list)
    pageable_copy: list[float] = field(default_factory=list)
    pinned_copy: list[float] = field(default_factory=list)


def measure_slices(
    bench: Bench,
    sides: Sides,
    other: Sides | None,
    seconds: float,
    tell: Callable[[str], None],
) -> Slices:
    """Measure rounds until the time is used up; at least three.

    Args:
        bench: Of the measured recipe.
        sides: The same recipe's parts.
        other: In the other precision, if it can be run.
        seconds: For all rounds.
        tell: Told about each round.
    """
    k = bench.recipe.argument("gradient_accumulation_steps")
    update = sides.time_model(1) * k
    steps = _count(seconds * _WINDOW_SHARE / update, least=2)
    updates = _count(seconds * _SLICE_SHARE / update, least=1)
    batches = _count(seconds * _SLICE_SHARE / max(sides.time_loader(1)[1], 1e-6), least=2)
    warmup = 2 if steps > 2 else 1
    found, start, number = Slices(), time.perf_counter(), 0
    while number < _FEWEST_ROUNDS or (
        number < _MOST_ROUNDS
        and (time.perf_counter() - start) * (number + 1) / number < seconds  # one more fits
    ):
        number += 1
        tell(f"round {number}: training, loader, model")
        window = bench.measure_window(steps, warmup)
        found.training.append(window.seconds / steps / k)
        found.phases.append(
            {phase: part / window.seconds for phase, part in window.phase_seconds.items()}
        )
        _measure_parts(sides, found, batches, updates)
        if other is not None:
            other.time_model(1)
            found.other_model.append(other.time_model(updates))
    return found


def _measure_parts(sides: Sides, found: Slices, batches: int, updates: int) -> None:
    first, loader = sides.time_loader(batches)
    found.loader.append(loader)
    found.epoch_start.append(max(first - loader, 0.0))
    found.preprocessing.append(sides.time_preprocessing(min(batches, 10)))
    sides.time_model(1)  # caches, and what a window made torch forget, like compiled code
    found.model.append(sides.time_model(updates))
    found.optimizer.append(sides.time_optimizer(updates))
    if sides.could_fuse:
        found.fused_optimizer.append(sides.time_optimizer(updates, fused=True))
    if sides.device.type != "cpu":
        found.pageable_copy.append(sides.time_copy(10, pinned=False))
    if sides.device.type == "cuda":
        found.pinned_copy.append(sides.time_copy(10, pinned=True))


def divide_step(slices: Slices, *, on_device: bool) -> Step:
    """Divide the time of a batch in training among loader, copy, model and the rest.

    Args:
        slices: Measured.
        on_device: Whether batches are prepared where the model is.
    """
    batch = median(slices.training)

    def seconds(*phases: str) -> float:
        return batch * median(sum(shares[phase] for phase in phases) for shares in slices.phases)

    loader, copy = seconds("data_wait"), seconds("copy")
    model = min(seconds("preprocessing", "forward", "backward", "optimizer"), batch - loader - copy)
    return Step(
        batch_seconds=batch,
        loader_seconds=loader,
        copy_seconds=copy,
        model_seconds=model,
        rest_seconds=batch - loader - copy - model,
        optimizer_seconds=min(seconds("optimizer"), model),
        preprocessing_seconds=seconds("preprocessing")
        if on_device
        else median(slices.preprocessing),
        epoch_start_seconds=median(slices.epoch_start),
    )


def describe_sides(slices: Slices, batch_size: int) -> list[Side]:
    """Return what was measured of each side alone, and of all together."""
    named = {
        "loader": slices.loader,
        "copy from pageable memory": slices.pageable_copy,
        "copy from pinned memory": slices.pinned_copy,
        "model": slices.model,
        "training": slices.training,
    }
    return [
        Side(
            name=name,
            seconds_per_batch=median(seconds),
            lowest_seconds_per_batch=min(seconds),
            highest_seconds_per_batch=max(seconds),
            samples_per_second=batch_size / median(seconds),
            slices=len(seconds),
        )
        for name, seconds in named.items()
        if seconds
    ]


def _count(wanted: float, least: int) -> int:
    return max(least, min(int(wanted), _MOST_STEPS))


def median_of(seconds: list[float], batches: float = 1) -> float | None:
    """Return the median, shared among batches; ``None`` where nothing was measured."""
    return median(seconds) / batches if seconds else None
