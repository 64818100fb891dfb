"""Run one recipe from beginning to end. Start reading here."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from hfbench import hub, metrics, plots
from hfbench.callbacks import LogFile, StopOnSignal
from hfbench.clock import Clock, reset_memory
from hfbench.data import ImageSplit
from hfbench.environment import (
    check_machine,
    describe_environment,
    is_main_process,
    requested_processes,
)
from hfbench.errors import DeviceError, Interrupted, RecipeError
from hfbench.folders import (
    find_earlier_run,
    hold,
    make_folder,
    newest_checkpoint,
    note_environment,
    save_predictions,
)
from hfbench.inputs import Inputs, assemble, has_labels, load_inputs
from hfbench.models import save_model
from hfbench.recipe import Recipe, local_path
from hfbench.recording import describe_data, describe_model, record
from hfbench.result import (
    CLOCK_FILE,
    CONFUSION_FILE,
    CURVES_FILE,
    Metrics,
    Result,
    load_result,
    save_result,
)
from hfbench.scores import Scores
from hfbench.training import BenchTrainer, build_training_arguments


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
    with ExitStack() as held:
        return _run(recipe, Path(output_dir), resume, rerun, held)


def _run(recipe: Recipe, root: Path, resume: bool, rerun: bool, held: ExitStack) -> Result:
    clock, stop = Clock(), StopOnSignal()
    with clock.measure("setup"):
        args, target = check_run(recipe, root)
        reset_memory(args.device)
        where = (describe_environment(args.device.type), args.world_size)
        earlier = find_earlier_run(recipe, root, *where, resume=resume, rerun=rerun)
        if earlier and earlier.finished:
            return _push(load_result(earlier.folder), earlier.folder, target)
        if earlier and is_main_process():
            held.enter_context(hold(earlier.folder))
        inputs = load_inputs(recipe, args)
        trainer = assemble(recipe, args, inputs, clock, [stop])
        folder = earlier.folder if earlier else make_folder(recipe, root)
        if not earlier and is_main_process():
            held.enter_context(hold(folder))
        if is_main_process():
            note_environment(folder, *where)
        checkpoint = _prepare_folder(folder, trainer, clock)

    with _resumable(folder, stop, trainer):
        train_loss = _train(trainer, clock, stop, checkpoint)
    with _resumable(folder, stop, trainer):
        start = time.perf_counter()
        found, scores = _evaluate(recipe, trainer, inputs)
        evaluated = time.perf_counter()
    trainer.close_loaders()
    if args.should_save:
        _save(trainer, inputs, scores, recipe, folder)
        result = record(
            recipe,
            folder.name,
            trainer,
            clock,
            describe_model(inputs.model, inputs.initialization, inputs.revision),
            describe_data(inputs.train, inputs.test),
            found,
            train_loss,
            final_evaluation_seconds=evaluated - start,
            final_save_seconds=time.perf_counter() - evaluated,
        )
        (folder / "README.md").write_text(hub.model_card(result), "utf-8")
        save_result(result, folder)  # last: its presence means that the run is finished
        shutil.rmtree(str(args.output_dir), ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return _push(load_result(folder), folder, target)


def check_run(recipe: Recipe, root: Path) -> tuple[TrainingArguments, hub.PushTarget | None]:
    """Find what cannot work here before anything is loaded."""
    problems = check_machine(recipe) + find_unwritable(root)
    if problems:
        raise DeviceError.from_problems(recipe.name, problems)
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
    trainer.add_callback(LogFile(folder / "log.jsonl"))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")  # beside checkpoints/, to be kept
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        clock.resume(json.loads((checkpoint / CLOCK_FILE).read_text()))
    return checkpoint


@contextmanager
def _resumable(folder: Path, stop: StopOnSignal, trainer: BenchTrainer) -> Iterator[None]:
    """Turn Ctrl-C, also one caught by `StopOnSignal`, into an error that says how to go on."""
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
    if interrupted or (stop.stopped and trainer.state.global_step < trainer.state.max_steps):
        raise Interrupted(
            f"Stopped; what was done is in {folder}. Go on with the same command and --resume."
        )


def _train(
    trainer: BenchTrainer, clock: Clock, stop: StopOnSignal, checkpoint: Path | None
) -> float | None:
    """Train; the only call of `Trainer.train`.

    Returns:
        The mean training loss, ``None`` if it is not finite.
    """
    clock.start(trainer.args.device)
    try:
        with stop.listen(single_process=trainer.args.world_size == 1):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        size = trainer.args.per_device_train_batch_size
        raise DeviceError(
            f"{trainer.args.device} ran out of memory at per_device_train_batch_size={size}: "
            f"{str(error).splitlines()[0]} Halve it, and double gradient_accumulation_steps to "
            "keep the effective batch."
        ) from error
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
    trainer: BenchTrainer, inputs: Inputs, scores: Scores, recipe: Recipe, folder: Path
) -> None:
    save_model(
        trainer.accelerator.unwrap_model(inputs.model), inputs.image_processor, folder / "model"
    )
    save_predictions(folder / "predictions.npz", inputs.test, scores)
    plots.plot_curves(folder / "log.jsonl", recipe.name, folder / CURVES_FILE)
    if has_labels(recipe):
        labels, names = inputs.test.labels.numpy(), inputs.test.label_names
        plots.plot_confusion(labels, scores.prediction, names, folder / CONFUSION_FILE)


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
