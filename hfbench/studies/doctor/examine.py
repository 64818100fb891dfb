"""Half a minute with one recipe on this machine: what limits it, and what could help."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from hfbench.errors import DeviceError, HfbenchError, first_line
from hfbench.machine.environment import describe_environment
from hfbench.machine.failures import is_out_of_memory, say_out_of_memory
from hfbench.machine.precision import say_slow_precision
from hfbench.machine.settings import alone, quick_collections
from hfbench.recipe.rechecking import recheck
from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import MIXED_PRECISION, Use, change, not_compiled
from hfbench.results.formats import duration
from hfbench.studies.accumulation import check_accumulation
from hfbench.studies.doctor.advice import Evidence, advise
from hfbench.studies.doctor.forecast import Schedule, plan_schedule, predict_duration
from hfbench.studies.doctor.limits import find_limit, say_verdict
from hfbench.studies.doctor.machine import examine_machine
from hfbench.studies.doctor.parts import Sides
from hfbench.studies.doctor.schema import AccumulationCheck, Diagnosis, Forecast, Step
from hfbench.studies.doctor.slices import (
    Slices,
    describe_sides,
    divide_step,
    measure_slices,
    median_of,
)
from hfbench.studies.uses import find_uses
from hfbench.studies.windows import Bench, release_memory, with_arguments
from hfbench.training.inputs import has_labels
from hfbench.training.trainer import build_training_arguments

Observer = Callable[[str], None]

_STEPS = "gradient_accumulation_steps"
_PILOT_BATCH = 4
_UPDATE_SHARE = 0.05  # of the time, for one optimizer step: some fifteen have to be made
_ROUNDS_SHARE = 0.7
_CHECK_SHARE = 0.15
_EVALUATION_SHARE = 0.05
_LARGE_CHECKPOINT = 256 * 2**20  # bytes; larger ones are scaled up from a part


@dataclass
class _Examination:
    """One recipe under examination; `measured` has the batch size that there is time for."""

    recipe: Recipe
    seconds: float
    tell: Observer
    folder: Path
    bench: Bench
    loading_seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        """Images of a batch; there may be fewer than the recipe asks for."""
        wanted = int(self.recipe.argument("per_device_train_batch_size"))
        return min(wanted, len(self.bench.inputs.train))

    @property
    def accumulation(self) -> int:
        return int(self.recipe.argument(_STEPS))


def examine(recipe: Recipe, seconds: float = 30.0, observer: Observer | None = None) -> Diagnosis:
    """Find what limits a recipe on this machine, and which techniques could help.

    Nothing is written but into a temporary folder, and nothing is printed.

    Args:
        recipe: From `load_recipe`.
        seconds: For measuring; loading the model and the data comes on top. A machine that cannot
            make some fifteen optimizer steps in it takes longer.
        observer: Told what is done now, a line each.

    Raises:
        HfbenchError: For everything that the user can mend, as `run_recipe`.
    """
    recipe = recheck(recipe)
    start, tell = time.perf_counter(), observer or (lambda _: None)
    tell(f"loading data and {recipe.model.name_or_path} ({recipe.model.weights})")
    with (
        alone("doctor"),
        quick_collections(),
        tempfile.TemporaryDirectory(prefix="hfbench-doctor-") as folder,
    ):
        bench = Bench(recipe)
        loading = time.perf_counter() - start
        examination = _Examination(recipe, seconds, tell, Path(folder), bench, loading)
        try:
            return _examine(examination, start)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = say_out_of_memory(error, bench.device, "training", examination.batch_size)
            raise DeviceError(said) from error


def _examine(examination: _Examination, start: float) -> Diagnosis:
    recipe, bench, k = examination.recipe, examination.bench, examination.accumulation
    seconds_per_image = _fit_batch_to_time(examination)
    measured = int(bench.recipe.argument("per_device_train_batch_size"))
    if slow := say_slow_precision(recipe):
        examination.notes.append(slow)
    use = next(use for use in find_uses(bench.recipe) if use.technique is MIXED_PRECISION)
    found = _measure(examination, use)
    slices, step, forecast = found.slices, found.step, found.forecast
    factor = examination.batch_size / measured
    release_memory(bench.device)  # the trainers of the sides are not needed any more
    examination.tell("the machine")
    machine = examine_machine(bench.device)
    check = _check(examination, found.precision, seconds_per_image) if k > 1 else None
    advice = advise(
        Evidence(
            recipe=recipe,
            device_type=bench.device.type,
            step=step,
            machine=machine,
            precision=use,
            model_seconds=median(slices.model),
            other_model_seconds=median_of(slices.other_model),
            fused_optimizer_seconds=median_of(slices.fused_optimizer, k),
            pageable_copy_seconds=median_of(slices.pageable_copy, 1 / factor),
            pinned_copy_seconds=median_of(slices.pinned_copy, 1 / factor),
        )
    )
    limit = find_limit(step)
    return Diagnosis(
        recipe=recipe.name,
        recipe_sha256=recipe.digest(),
        verdict=say_verdict(recipe.name, limit, step, forecast, advice, check),
        limited_by=limit,
        batch_size=examination.batch_size,
        measured_batch_size=measured,
        gradient_accumulation_steps=k,
        precision=found.precision,
        sides=describe_sides(slices, measured),
        step=step,
        forecast=forecast,
        advice=advice,
        machine=machine,
        accumulation=check,
        notes=examination.notes,
        environment=describe_environment(bench.device.type),
        loading_seconds=examination.loading_seconds,
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class _Measurements:
    """What the trainers of both precisions were needed for."""

    slices: Slices
    step: Step
    forecast: Forecast
    precision: str


def _measure(examination: _Examination, use: Use) -> _Measurements:
    """Build the recipe's trainer, and one of the other precision, and measure both in turn."""
    bench, recipe = examination.bench, examination.recipe
    examination.tell("building trainers")
    sides = Sides(bench, bench.recipe, examination.folder)
    other = _build_other(examination, use)
    seconds = examination.seconds * _ROUNDS_SHARE
    try:
        try:
            slices = measure_slices(bench, sides, other, seconds, examination.tell)
        except Exception as error:
            if other is None or not is_out_of_memory(error):
                raise
            # Beside each other they do not fit; the recipe alone is what was asked about.
            _note_other(examination, error)
            other.close()
            other = None
            slices = None
        if slices is None:
            release_memory(bench.device)
            slices = measure_slices(bench, sides, None, seconds, examination.tell)
        step = divide_step(slices, on_device=recipe.preprocessing.location == "device")
        factor = examination.batch_size / sides.batch_size
        steps = int(bench.recipe.argument(_STEPS)) / examination.accumulation
        step = step.scaled(factor, steps)
        examination.tell("an evaluation and a checkpoint")
        forecast = _predict(examination, sides, slices, step)
        return _Measurements(slices, step, forecast, sides.precision)
    finally:
        for side in (sides, other):
            if side is not None:
                side.close()


def _note_other(examination: _Examination, error: Exception) -> None:
    examination.notes.append(
        f"The model in the other precision could not be run: {first_line(error)}"
    )


def _fit_batch_to_time(examination: _Examination) -> float:
    """Choose the batch to measure: the recipe's, or a smaller one on a machine too slow for it.

    Returns:
        Seconds of an image, in a small batch.
    """
    bench, batch = examination.bench, examination.batch_size
    affordable = examination.seconds * _UPDATE_SHARE
    k = examination.accumulation
    examination.tell("small batches first")
    size, fits = 0, min(batch, _PILOT_BATCH)
    while size < fits and (size == 0 or 1.5 * size < fits < batch):
        size = fits  # the optimizer's share falls as batches grow, so that larger ones may fit
        small = with_arguments(
            bench.recipe,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=1,
            **not_compiled(bench.recipe),
        )
        per_image = bench.measure_window(1, 1, small).seconds / size
        fits = min(batch, max(int(affordable / per_image), 2))
    if k > 1 and per_image * batch * k > affordable:  # the optimizer's share is known all the same
        bench.recipe = with_arguments(bench.recipe, **{_STEPS: 1})
        examination.notes.append("Measured without accumulation, to save time.")
    bench.recipe = with_arguments(bench.recipe, per_device_train_batch_size=fits)
    if fits < batch:
        examination.notes.append(
            f"Measured on batches of {fits} images instead of {batch}: one of {batch} would take "
            f"about {duration(per_image * batch)} here. Loader, copy and model are taken to grow "
            "with the batch."
        )
    return per_image


def _build_other(examination: _Examination, use: Use) -> Sides | None:
    """Build the recipe with mixed precision turned on, if it has none, or off, if it has."""
    if use.no_effect:
        return None
    recipe = change(examination.bench.recipe, (use.off if use.in_recipe else use.on).items())
    try:
        return Sides(examination.bench, recipe, examination.folder)
    except Exception as error:
        if not (is_out_of_memory(error) or isinstance(error, HfbenchError)):
            raise
        _note_other(examination, error)
    release_memory(examination.bench.device)
    return None


def _predict(examination: _Examination, sides: Sides, slices: Slices, step: Step) -> Forecast:
    args = build_training_arguments(examination.recipe, examination.folder)
    schedule = plan_schedule(args, len(examination.bench.inputs.train))
    evaluation = sides.time_evaluation(examination.seconds * _EVALUATION_SHARE)
    size = sides.checkpoint_bytes()
    part = min(size, _LARGE_CHECKPOINT)
    save = sides.time_checkpoint() if part == size else sides.time_writing(part) * size / part
    return predict_duration(
        schedule,
        step,
        batch_size=examination.batch_size,
        measured_batch_size=sides.batch_size,
        first_step_seconds=max(
            sides.first_step_seconds - step.batch_seconds * examination.accumulation, 0.0
        ),
        evaluation_seconds=evaluation,
        save_seconds=save,
        final_evaluation_seconds=_final_evaluation(examination, schedule, evaluation),
        windows=slices.training,
    )


def _final_evaluation(examination: _Examination, schedule: Schedule, evaluation: float) -> float:
    """Return the seconds after training, from those of one evaluation of the test split."""
    recipe, inputs = examination.recipe, examination.bench.inputs
    counts = has_labels(recipe)  # noise: the test split is predicted, and nothing is measured
    kept = schedule.evaluates_last and counts and not recipe.argument("load_best_model_at_end")
    most = recipe.dataset.max_train_eval_samples or len(inputs.train)
    images = (0 if kept else len(inputs.test)) + (min(most, len(inputs.train)) if counts else 0)
    return evaluation * images / len(inputs.test)


def _check(
    examination: _Examination, precision: str, seconds_per_image: float
) -> AccumulationCheck | None:
    """Check accumulation on the images of one batch, fewer where time or images are short."""
    k, images = examination.accumulation, len(examination.bench.inputs.train)
    affordable = int(examination.seconds * _CHECK_SHARE / (3 * k * seconds_per_image))
    # Batch norm cannot train on a single image.
    size = max(2, min(examination.batch_size // k, affordable, images // k))
    if size * k > images:
        examination.notes.append(
            f"Accumulation was not checked: {images} training images do not fill {k} micro-batches "
            "of 2."
        )
        return None
    examination.tell(f"accumulation: {size * k} images at once, and in {k} micro-batches")
    found = check_accumulation(examination.bench, k, size, precision, examination.folder)
    if found is None:
        examination.notes.append("Accumulation was not checked: gradients are not finite.")
    return found
