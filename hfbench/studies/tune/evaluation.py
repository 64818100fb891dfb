"""The batch that evaluates fastest: it changes no result, and may be larger than in training."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from transformers import PrinterCallback

from hfbench.data.images import ImageBatches
from hfbench.errors import first_line
from hfbench.machine.failures import is_out_of_memory
from hfbench.profiling.clock import Clock, measure_memory, reset_memory, synchronize
from hfbench.recipe.schema import Recipe
from hfbench.results.windows import Window
from hfbench.studies.tune.decision import decide
from hfbench.studies.tune.memory import estimate_peak_mib, peak_mib, resident_mib
from hfbench.studies.tune.offers import ROUNDING
from hfbench.studies.tune.schema import EVALUATION, Measured, Trial
from hfbench.studies.tune.search import Search
from hfbench.studies.tune.windows import BLOCK
from hfbench.studies.windows import Bench, release_memory, with_arguments, without_files
from hfbench.training.inputs import assemble
from hfbench.training.trainer import build_training_arguments

Evaluate = Callable[[int, Recipe], Window]  # test images, recipe

EVALUATION_BATCH = "training_args.per_device_eval_batch_size"
_LONGEST_SECONDS = 2.0  # of a window
_FORWARD_SHARE = 1 / 3  # of the time of training: a forward pass, and no backward pass of twice it


def measure_evaluation(bench: Bench, images: int, recipe: Recipe) -> Window:
    """Evaluate test images once, with the kernels of such a batch warm.

    Args:
        bench: Whose model and data are used.
        images: How many.
        recipe: A variant, as for `Bench.measure_window`.

    Raises:
        Exception: That `is_out_of_memory` knows, if it does not fit.
    """
    # A persistent worker would go on with the batch size of its first evaluation.
    recipe = with_arguments(without_files(recipe), dataloader_persistent_workers=False)
    args = build_training_arguments(recipe, Path(tempfile.gettempdir()))
    if recipe.preprocessing.location == "host":
        bench.inputs.train.leave_devices()
    release_memory(args.device)
    reset_memory(args.device)
    inputs = replace(bench.inputs, model=copy.deepcopy(bench.inputs.model))
    trainer = assemble(recipe, args, inputs, Clock(), [], as_asked=True)
    trainer.remove_callback(PrinterCallback)
    trainer.compute_metrics = None
    data = cast("ImageBatches", trainer.eval_dataset)

    def take(count: int) -> ImageBatches:
        return data.for_evaluation(data.split.subset(count, 0))

    batch = args.per_device_eval_batch_size
    trainer.evaluate(take(min(batch, images)))
    part = take(images)
    synchronize(args.device)
    start = time.perf_counter()
    trainer.evaluate(part)
    synchronize(args.device)
    seconds = time.perf_counter() - start
    memory = measure_memory(args.device)
    return Window(
        steps=-(-len(part) // batch),
        warmup_steps=1,
        samples=len(part),
        seconds=seconds,
        data_wait_seconds=0.0,
        phase_seconds={"evaluation": seconds},
        first_loss=None,
        peak_process_memory_mib=memory.peak_process_memory_mib,
        peak_device_memory_mib=memory.peak_device_memory_mib,
        switches={},
    )


def explore_evaluation(search: Search, evaluate: Evaluate, images: int) -> None:
    """Try evaluation batches of twice and half the size, on top of the best recipe.

    Args:
        search: After `Search.confirm`; its best and its trials are updated.
        evaluate: `measure_evaluation` of a bench.
        images: In the test split.
    """
    tried = {_batch_of(search.best)}
    while True:
        size = next((n for n in _neighbours(search.best, images) if n not in tried), None)
        if size is None:
            return
        tried.add(size)
        trial = _try(search, evaluate, size, images)
        if trial.outcome == "taken":
            search.best = _with_batch(search.best, size)
        search.record(trial)


def _try(search: Search, evaluate: Evaluate, size: int, images: int) -> Trial:
    trial = Trial(
        technique=EVALUATION,
        detail=f"{size} images",
        settings={EVALUATION_BATCH: size},
        effect=ROUNDING,
        outcome="not measured",
    )
    best, candidate = search.best, _with_batch(search.best, size)
    speed = search.windows.latest.samples_per_second / _FORWARD_SHARE
    longest = min(search.windows.window_seconds, _LONGEST_SECONDS)
    count = min(images, max(2 * max(size, _batch_of(best)), int(longest * speed)))
    if not search.windows.has_seconds(5 * count / speed):  # the first one chooses nothing
        return trial.model_copy(update={"reason": "no time left; more --seconds"})
    windows: list[Measured] = []
    try:
        now = evaluate(count, best)
        refused = _say_too_large(search, now, _batch_of(best), size)
        if refused:
            return trial.model_copy(update={"outcome": "would not fit", "reason": refused})
        for is_candidate in BLOCK:
            window = evaluate(count, candidate if is_candidate else best)
            windows.append(Measured(candidate=is_candidate, window=window))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return trial.model_copy(update={"outcome": "out of memory", "reason": first_line(error)})
    return decide(trial, windows)


def _say_too_large(search: Search, now: Window, batch: int, wanted: int) -> str | None:
    """Say that a batch would not fit, from what a smaller one took."""
    room = search.memory.room()
    if room is None or wanted <= batch:
        return None
    needed = estimate_peak_mib(resident_mib(), batch, peak_mib(now), wanted)
    return None if needed <= room else f"needs about {needed:.0f} MiB, {room:.0f} are available"


def _neighbours(recipe: Recipe, images: int) -> Iterator[int]:
    now = _batch_of(recipe)
    if 2 * now <= images:
        yield 2 * now
    if now > 1:
        yield now // 2


def _batch_of(recipe: Recipe) -> int:
    return int(recipe.argument("per_device_eval_batch_size"))


def _with_batch(recipe: Recipe, size: int) -> Recipe:
    return with_arguments(recipe, per_device_eval_batch_size=size)
