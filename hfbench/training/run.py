"""Run one recipe from beginning to end. Start reading here."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hfbench.data.images import ImageSplit
from hfbench.errors import DeviceError, HfbenchError, Interrupted, RecipeError, first_line
from hfbench.machine.environment import (
    check_machine,
    describe_environment,
    is_main_process,
    requested_processes,
)
from hfbench.machine.failures import WorldError, explain, is_out_of_memory
from hfbench.machine.launched import check_launch, speaks_at_the_end
from hfbench.machine.precision import log_slow_precision
from hfbench.machine.settings import alone
from hfbench.machine.signals import Interruption, told_in_any_state
from hfbench.models.loading import save_model
from hfbench.profiling.clock import Clock, reset_memory
from hfbench.profiling.compiling import say_compilations
from hfbench.recipe.rechecking import output_folder, recheck
from hfbench.recipe.schema import Recipe, local_path
from hfbench.results.folder import (
    find_earlier_run,
    hold,
    make_folder,
    note_environment,
    save_predictions,
)
from hfbench.results.manifest import has_checkpoint, newest_checkpoint
from hfbench.results.schema import (
    CLOCK_FILE,
    CONFUSION_FILE,
    CURVES_FILE,
    PREDICTIONS_FILE,
    Metrics,
    Result,
    digest_of,
    load_result,
    save_result,
)
from hfbench.results.scores import Scores
from hfbench.training import hub, metrics, plots
from hfbench.training.callbacks import LogFile, PatientTracker, StopOnSignal
from hfbench.training.inputs import Inputs, assemble, has_labels, load_inputs
from hfbench.training.loss_scale import say_skipped
from hfbench.training.recording import describe_data, describe_model, record
from hfbench.training.trainer import BenchTrainer, build_training_arguments

logger = logging.getLogger(__name__)


def run_recipe(
    recipe: Recipe,
    output_dir: str | os.PathLike[str] = "runs",
    *,
    resume: bool = False,
    rerun: bool = False,
) -> Result:
    """Train and test what a recipe says, and write everything about it into a folder of its own.

    Args:
        recipe: From `load_recipe`.
        output_dir: The run goes into ``output_dir/<recipe name>/<run id>``.
        resume: Go on with an unfinished run of the same recipe, if there is one.
        rerun: Run even though a finished run of the same recipe is there.

    Returns:
        The result, as saved in ``result.json``; an earlier one if the recipe is finished already.

    Raises:
        HfbenchError: For everything that the user can mend, before training where that is possible.
        Interrupted: After Ctrl-C; `resume` goes on.
    """
    recipe, root = recheck(recipe), output_folder(output_dir)
    place = _Place(resumes=resume)
    interruption = place.interruption
    with alone("run_recipe"), ExitStack() as held:
        if requested_processes() == 1:
            held.enter_context(interruption.listen())
        else:
            held.enter_context(told_in_any_state(partial(_say_ended, place)))
        try:
            return _run(recipe, root, resume, rerun, held, place)
        except KeyboardInterrupt:
            raise Interrupted(place.say_stop()) from None
        except HfbenchError:
            raise
        except Exception as error:
            if interruption.came:
                raise Interrupted(place.say_stop()) from error
            if place.trainer is not None and is_out_of_memory(error):
                lacking = place.trainer.say_out_of_memory(error)
                raise DeviceError(f"{lacking} {place.say_failure()}") from error
            said = explain(error, place.folder)
            if said is None:
                raise
            raise WorldError(f"{said} {place.say_failure()}") from error


@dataclass
class _Place:
    """Where a run is and how far, for what is said if it is stopped."""

    folder: Path | None = None
    new: bool = False
    resumes: bool = False
    trained: bool = False
    finished: bool = False
    trainer: BenchTrainer | None = None
    interruption: Interruption = field(default_factory=Interruption)

    def say_stop(self) -> str:
        """Say what is kept of a stopped run, and how to go on; nothing is left of nothing."""
        if self.finished:
            return f"Stopped; the run is finished, and everything is in {self.folder}."
        if self.folder is None:
            again = " What --resume would go on with is as it was." if self.resumes else ""
            return f"Stopped before anything was trained; nothing is left behind.{again}"
        again = "Go on with the same command and --resume."
        if has_checkpoint(self.folder):
            done = "what was trained" if self.trained else "what was done"
            return f"Stopped; {done} is in {self.folder}. {again}"
        if self.new and not (self.folder / "log.jsonl").exists():
            if is_main_process():
                shutil.rmtree(self.folder, ignore_errors=True)
            return "Stopped before anything was trained; nothing is left behind."
        return (
            f"Stopped before the first checkpoint: {self.folder} holds nothing to go on from. The "
            "same command starts anew."
        )

    def say_failure(self) -> str:
        """Say what is kept of a run that failed, and how to go on."""
        if self.finished:
            return f"The run itself is finished, and in {self.folder}."
        if self.folder is not None and has_checkpoint(self.folder):
            done = "What was trained" if self.trained else "What was done until its checkpoint"
            return f"{done} is in {self.folder}. Go on with the same command and --resume."
        if self.folder is not None and self.folder.exists():
            return f"{self.folder} holds no checkpoint; the same command starts anew."
        return "Nothing was trained."


def _say_ended(place: _Place) -> None:
    if not speaks_at_the_end():
        return
    logger.error(
        "The launcher has ended this process, since another one was lost or it was stopped itself. "
        f"{place.say_failure()}"
    )


def _run(
    recipe: Recipe, root: Path, resume: bool, rerun: bool, held: ExitStack, place: _Place
) -> Result:
    clock, stop = Clock(), StopOnSignal()
    held.enter_context(clock.pauses.watch())
    with clock.measure("setup"):
        logger.info(say_start(recipe))
        args, target = check_run(recipe, root)
        reset_memory(args.device)
        where = (describe_environment(args.device.type), args.world_size)
        earlier = find_earlier_run(recipe, root, *where, resume=resume, rerun=rerun)
        if earlier and earlier.finished:
            return _push(load_result(earlier.folder), earlier.folder, target)
        if earlier:
            place.folder = earlier.folder
        if earlier and is_main_process():
            held.enter_context(hold(earlier.folder))
        inputs = load_inputs(recipe, args)
        trainer = place.trainer = assemble(recipe, args, inputs, clock, [stop])
        folder = earlier.folder if earlier else make_folder(recipe, root, held)
        place.folder, place.new = folder, earlier is None
        if is_main_process():
            note_environment(folder, *where)
        checkpoint = _prepare_folder(folder, trainer, clock)

    train_loss = _train(trainer, clock, stop, checkpoint)
    if trainer.stopped:
        raise KeyboardInterrupt
    place.trained = True
    late, seconds = clock.late_compilations()
    if late:
        logger.warning(say_compilations(late, seconds))
    if skipped := say_skipped(trainer.skipped_steps(), trainer.state.global_step):
        logger.warning(skipped)
    with clock.measure("final_save"):
        if args.should_save:  # first, since nothing can be lost any more once it is there
            model = trainer.accelerator.unwrap_model(inputs.model)
            save_model(model, inputs.image_processor, folder / "model")
    with clock.measure("final_evaluation"):
        found, scores = _evaluate(recipe, trainer, inputs)
    with clock.measure("final_save"):
        trainer.close_loaders()
        if args.should_save:
            _save(inputs, scores, recipe, folder, place.interruption)
    if args.should_save:
        result = record(
            recipe,
            folder.name,
            trainer,
            clock,
            describe_model(inputs.model, inputs.initialization, inputs.revision),
            describe_data(inputs.train, inputs.test, inputs.overlap),
            found,
            train_loss,
            digest_of(folder / PREDICTIONS_FILE),
        )
        (folder / "README.md").write_text(hub.model_card(result), "utf-8")
        save_result(result, folder)  # last: its presence means that the run is finished
        place.finished = True
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return _push(load_result(folder), folder, target)


def say_start(recipe: Recipe) -> str:
    """Return the first line of a run: what is trained, from which weights, on what."""
    model, data = recipe.model, recipe.dataset.name_or_path
    return f"{recipe.name}: {model.name_or_path} ({model.weights}) on {data}"


def check_run(recipe: Recipe, root: Path) -> tuple[TrainingArguments, hub.PushTarget | None]:
    """Find what cannot work here before anything is loaded."""
    check_launch()
    problems = check_machine(recipe) + find_unwritable(root)
    if problems:
        raise DeviceError.from_problems(recipe.name, problems)
    log_slow_precision(recipe)
    target = hub.check_push(recipe)
    # Trainer makes the folder that it is given; the run's own comes when nothing can fail any more.
    args = build_training_arguments(recipe, Path(tempfile.gettempdir()))
    wanted = requested_processes()
    if wanted != args.world_size:
        raise DeviceError(
            f"The launcher was asked for {wanted} processes, but training would run in "
            f"{args.world_size}. On CPUs, and on GPUs, this starts {wanted}: accelerate launch "
            f"--multi_gpu --num_processes {wanted} --num_machines 1 --mixed_precision no "
            "--dynamo_backend no -m hfbench recipe …"
        )
    return args, target


def find_unwritable(root: Path) -> list[str]:
    """Say why nothing can be put into a folder, which may have to be made; a sentence at most."""
    try:
        local_path(root)
    except RecipeError as error:
        return [f"--output-dir: {error}"]
    existing = next(path for path in (root, *root.resolve().parents) if path.exists())
    if not existing.is_dir():
        return [f"--output-dir: {existing} is a file; name a folder."]
    return [] if os.access(existing, os.W_OK) else [f"--output-dir: {existing} is not writable."]


def _prepare_folder(folder: Path, trainer: BenchTrainer, clock: Clock) -> Path | None:
    """Point the trainer to the run's folder; return the checkpoint to go on from, if any."""
    trainer.args.output_dir = str(folder / "checkpoints")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")  # beside checkpoints/, to be kept
    trackers: Any = tuple(INTEGRATION_TO_CALLBACK.values())
    trainer.callback_handler.callbacks = [
        PatientTracker(cast(TrainerCallback, callback))
        if isinstance(callback, trackers)
        else callback
        for callback in trainer.callback_handler.callbacks
    ]
    choice = [newest_checkpoint(folder) if is_main_process() else None]
    broadcast_object_list(choice)
    (checkpoint,) = choice
    if checkpoint:
        clock.resume(json.loads((checkpoint / CLOCK_FILE).read_text()))
        logger.info(f"Going on from {checkpoint}.")
    elif has_checkpoint(folder):
        logger.warning(f"No checkpoint of {folder} is whole; training starts from its first step.")
    trainer.add_callback(LogFile(folder / "log.jsonl", clock.times.execution_seconds))
    return checkpoint


def _train(
    trainer: BenchTrainer, clock: Clock, stop: StopOnSignal, checkpoint: Path | None
) -> float | None:
    """Train; the only call of `Trainer.train`.

    Returns:
        The mean training loss, ``None`` if it is not finite.
    """
    clock.start(trainer.args.device)
    with stop.listen(single_process=trainer.args.world_size == 1):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    clock.stop(trainer.args.device)
    return trainer.mean_training_loss()


def _evaluate(recipe: Recipe, trainer: BenchTrainer, inputs: Inputs) -> tuple[Metrics, Scores]:
    """Measure test and train split without augmentation.

    Returns:
        The metrics, and what the model said about the test images.
    """
    scores = _predict(trainer, inputs.test, trainer.eval_dataset)
    if not has_labels(recipe):
        return Metrics(test=None, train=None), scores
    dataset = recipe.dataset
    part = inputs.train.subset(dataset.max_train_eval_samples, dataset.subset_seed)
    tested: Any = trainer.eval_dataset
    of_train = _predict(trainer, part, tested.for_evaluation(part))
    return Metrics(
        test=metrics.score(scores, inputs.test.labels.numpy(), inputs.test.label_names),
        train=metrics.score(of_train, part.labels.numpy(), part.label_names),
    ), scores


def _predict(trainer: BenchTrainer, split: ImageSplit, batches: Any) -> Scores:
    """Return what the model says about a split, each image once, in order, on every process."""
    last = trainer.last_evaluation
    seen = batches is trainer.eval_dataset and last and last[0] == trainer.state.global_step
    # The last evaluation in training counts, unless another checkpoint was loaded after it, or it
    # kept no predictions (noise has no metrics).
    kept = last and last[1].predictions is not None and not trainer.args.load_best_model_at_end
    output = last[1] if last and seen and kept else trainer.predict(batches)
    labels = np.asarray(output.label_ids)
    if not np.array_equal(labels, split.labels.numpy()):
        raise RuntimeError(
            f"{len(labels)} predictions do not match the {len(split)} images in order; "
            "please report this."
        )
    return Scores.unpack(output.predictions)


def _save(
    inputs: Inputs, scores: Scores, recipe: Recipe, folder: Path, interruption: Interruption
) -> None:
    save_predictions(folder / PREDICTIONS_FILE, inputs.test, scores)
    with _unless_it_cannot_be_drawn(CURVES_FILE, interruption):
        plots.plot_curves(folder / "log.jsonl", recipe.name, folder / CURVES_FILE)
    if has_labels(recipe):
        labels, names = inputs.test.labels.numpy(), inputs.test.label_names
        with _unless_it_cannot_be_drawn(CONFUSION_FILE, interruption):
            plots.plot_confusion(labels, scores.prediction, names, folder / CONFUSION_FILE)


@contextmanager
def _unless_it_cannot_be_drawn(name: str, interruption: Interruption) -> Iterator[None]:
    """Do without a picture that fails, and without a word for each letter that a font lacks."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            yield
    except OSError:
        raise  # of the disk, which the result needs too
    except Exception as error:  # of matplotlib, whose kinds are many
        if interruption.came:  # and which makes one of Ctrl-C
            raise
        logger.warning(f"{name} cannot be drawn, and is left out: {first_line(error)}")


def _push(result: Result, folder: Path, target: hub.PushTarget | None) -> Result:
    """Push a finished run, unless it is there already."""
    if target is None or not is_main_process():
        return result
    place = (target.repo_id, target.revision)
    if result.hub and (result.hub.repo_id, result.hub.revision) == place:
        return result
    pushed = result.model_copy(update={"hub": hub.push(result, folder, target)})
    save_result(pushed, folder)
    return pushed
