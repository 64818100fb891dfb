"""Run one recipe from beginning to end. Start reading here."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import EvalPrediction, TrainingArguments, set_seed

from hfbench import hub, metrics
from hfbench.callbacks import LogFile, StopOnSignal
from hfbench.clock import Clock, measure_memory
from hfbench.connection import use_cache_if_unreachable
from hfbench.data import ImageBatches, ImageSplit, load_splits
from hfbench.environment import (
    check_machine,
    describe_environment,
    is_main_process,
    requested_processes,
)
from hfbench.errors import DeviceError, HfbenchError, HubError, Interrupted
from hfbench.models import ModelSource, check_image_processor, load_model, open_model, save_model
from hfbench.preprocessing import Preprocessing
from hfbench.recipe import EMBEDDED_DATASETS, Recipe
from hfbench.result import (
    RECIPE_FILE,
    DataInfo,
    Metrics,
    ModelInfo,
    Result,
    Run,
    Times,
    Training,
    find_runs,
    load_result,
    save_result,
    write_json,
)
from hfbench.training import (
    CLOCK_FILE,
    BenchTrainer,
    build_trainer,
    build_training_arguments,
    observe_switches,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_CHECKED_IMAGES = 4  # on which the saved image processor is compared with ours


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
        HfbenchError: For everything that the user can mend, found before training starts where that is possible.
        Interrupted: After Ctrl-C; `resume` goes on.
    """
    clock, stop = Clock(), StopOnSignal()
    with clock.measure("setup"):
        problems = check_machine(recipe)
        if problems:
            raise DeviceError(str(HfbenchError.from_problems(recipe.name, problems)))
        target = hub.check_push(recipe)
        args = build_training_arguments(recipe, Path(output_dir))
        _check_processes(args)
        earlier = _find_earlier_run(recipe, Path(output_dir), resume, rerun)
        if earlier and earlier.finished:
            return _push_if_wanted(load_result(earlier.folder), earlier.folder, target)
        with args.main_process_first(desc="loading data and model"):
            source, train, test = _load_inputs(recipe)
            set_seed(args.seed)  # the head and fresh weights are drawn now
            model, initialization = load_model(recipe, source, train.label_names)
        preprocessing = Preprocessing(
            source.normalization, recipe.preprocessing.augmentation, args.seed
        )
        check_image_processor(source.image_processor, preprocessing, test.images[:_CHECKED_IMAGES])
        folder = earlier.folder if earlier else _make_folder(recipe, Path(output_dir))
        args.output_dir = str(folder / "checkpoints")
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
        checkpoint = _newest_checkpoint(folder)
        if checkpoint:
            clock.resume(json.loads((checkpoint / CLOCK_FILE).read_text()))
        labelled = recipe.dataset.name_or_path != "synthetic"  # noise has no accuracy
        trainer = build_trainer(
            recipe,
            args,
            model,
            preprocessing,
            ImageBatches(train, preprocessing, recipe.preprocessing.location, augment=True),
            ImageBatches(test, preprocessing, recipe.preprocessing.location, augment=False),
            _compute_metrics(test.label_names) if labelled else None,
            clock,
            [stop, LogFile(folder / "log.jsonl")],
        )

    train_loss = _train(trainer, clock, stop, checkpoint, folder)

    start = time.perf_counter()
    logits = _predict(trainer, test, trainer.eval_dataset)
    found = Metrics(test=None, train=None)
    if labelled:
        part = train.subset(recipe.dataset.max_train_eval_samples, recipe.dataset.subset_seed)
        clean = ImageBatches(part, preprocessing, recipe.preprocessing.location, augment=False)
        found = Metrics(
            test=metrics.score(logits, test.labels.numpy(), test.label_names),
            train=metrics.score(
                _predict(trainer, part, clean), part.labels.numpy(), part.label_names
            ),
        )
    evaluated = time.perf_counter()
    if not args.should_save:  # another process writes
        trainer.accelerator.wait_for_everyone()
        return load_result(folder)
    save_model(trainer.accelerator.unwrap_model(model), source.image_processor, folder / "model")
    _save_predictions(folder / "predictions.npz", test, logits)
    saved = time.perf_counter()

    t = clock.times
    result = Result(
        run_id=folder.name,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=recipe,
        recipe_sha256=recipe.digest(),
        model=_describe_model(model, initialization),
        data=_describe_data(train, test),
        training=_describe_training(trainer, train_loss, t.sessions),
        metrics=found,
        times=Times(
            setup_seconds=t.setup_seconds,
            execution_seconds=t.execution_seconds,
            train_seconds=t.execution_seconds - t.evaluation_seconds - t.save_seconds,
            first_step_seconds=t.first_step_seconds,
            data_wait_seconds=t.data_wait_seconds,
            evaluation_seconds=t.evaluation_seconds,
            save_seconds=t.save_seconds,
            final_evaluation_seconds=evaluated - start,
            final_save_seconds=saved - evaluated,
            total_seconds=t.setup_seconds + t.execution_seconds + saved - start,
        ),
        throughput=clock.throughput(args.world_size),
        memory=measure_memory(args.device),
        switches=observe_switches(recipe, trainer),
        environment=describe_environment(args.device.type),
    )
    (folder / "README.md").write_text(hub.model_card(result), "utf-8")
    save_result(result, folder)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return _push_if_wanted(result, folder, target)


def _check_processes(args: TrainingArguments) -> None:
    wanted = requested_processes()
    if wanted != args.world_size:
        raise DeviceError(
            f"The launcher was asked for {wanted} processes, but training would run in {args.world_size}. On CPUs, and on "
            f"GPUs, this starts {wanted}: accelerate launch --multi_gpu --num_processes {wanted} --num_machines 1 "
            "--mixed_precision no --dynamo_backend no -m hfbench recipe …"
        )


def _find_earlier_run(recipe: Recipe, root: Path, resume: bool, rerun: bool) -> Run | None:
    """Find the finished run to return or the unfinished one to go on with; process 0 decides for all."""
    choice: list[Run | None] = [None]
    if is_main_process():
        named = [run for run in find_runs(root) if run.folder.parent.name == recipe.name]
        same = [run for run in named if run.recipe and run.recipe.digest() == recipe.digest()]
        finished = [run for run in same if run.finished]
        unfinished = [run for run in same if not run.finished]
        if finished and not rerun:
            logger.info(f"Already finished: {finished[-1].folder}; run it again with --rerun.")
            choice = [finished[-1]]
        elif unfinished and resume:
            logger.info(f"Going on with {unfinished[-1].folder}.")
            choice = [unfinished[-1]]
        elif unfinished:
            logger.info(f"Starting anew; --resume would go on with {unfinished[-1].folder}.")
        elif resume:
            others = sum(not run.finished for run in named)
            hint = f" ({others} of that name have other settings)" if others else ""
            logger.info(f"There is no unfinished run of this recipe{hint}; starting anew.")
    broadcast_object_list(choice)
    return choice[0]


def _make_folder(recipe: Recipe, root: Path) -> Path:
    """Make ``root/<name>/<UTC time>-<hash>``: sorted by name is sorted by time."""
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
    choice = [root / recipe.name / f"{moment}-{recipe.digest()[:8]}"]
    if is_main_process():
        choice[0].mkdir(parents=True)
        write_json(recipe.as_json(), choice[0] / RECIPE_FILE)
    broadcast_object_list(choice)
    return choice[0]


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint; a kill while saving leaves one without a readable `trainer_state.json`."""
    numbered = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in (folder / "checkpoints").glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            json.loads((path / CLOCK_FILE).read_text())
        except (OSError, ValueError):
            logger.warning(f"{path} is not whole and is left out.")
            continue
        return path
    return None


def _load_inputs(recipe: Recipe) -> tuple[ModelSource, ImageSplit, ImageSplit]:
    """Read the model's configuration and the data; if the Hub is out of reach, say what is missing of both at once."""
    if _needs_hub(recipe):
        use_cache_if_unreachable()
    source, problems = None, []
    try:
        source = open_model(recipe)
    except HubError as error:
        problems.append(str(error))
    interpolation = source.normalization.interpolation if source else "bilinear"
    try:
        train, test = load_splits(recipe.dataset, recipe.preprocessing.image_size, interpolation)
    except HubError as error:
        problems.append(str(error))
    if problems or source is None:
        raise HubError(str(HfbenchError.from_problems(recipe.name, problems)))
    return source, train, test


def _needs_hub(recipe: Recipe) -> bool:
    def elsewhere(name: str) -> bool:
        return not Path(name).expanduser().exists()

    data = recipe.dataset.name_or_path
    return elsewhere(recipe.model.name_or_path) or (
        data not in EMBEDDED_DATASETS and elsewhere(data)
    )


def _compute_metrics(label_names: list[str]) -> Any:
    def compute(prediction: EvalPrediction) -> dict[str, float]:
        found = metrics.score(
            np.asarray(prediction.predictions), np.asarray(prediction.label_ids), label_names
        )
        values = found.model_dump(include={"accuracy", "f1_macro", "f1_weighted", "top5_accuracy"})
        return {name: value for name, value in values.items() if value is not None}

    return compute


def _train(
    trainer: BenchTrainer, clock: Clock, stop: StopOnSignal, checkpoint: Path | None, folder: Path
) -> float | None:
    """Train; the only call of `Trainer.train`.

    Returns:
        The mean training loss, ``None`` if it is not finite.
    """
    clock.start()
    try:
        with stop.listen(single_process=trainer.args.world_size == 1):
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_resume(folder)) from None
    except torch.OutOfMemoryError as error:
        size = trainer.args.per_device_train_batch_size
        raise DeviceError(
            f"{trainer.args.device} ran out of memory at per_device_train_batch_size={size}: "
            f"{str(error).splitlines()[0]} Halve it, and double gradient_accumulation_steps to keep the effective batch."
        ) from error
    clock.stop(trainer.args.device)
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(_how_to_resume(folder))
    return output.training_loss if np.isfinite(output.training_loss) else None


def _how_to_resume(folder: Path) -> str:
    return f"Stopped; what was done is in {folder}. Go on with the same command and --resume."


def _predict(trainer: BenchTrainer, split: ImageSplit, batches: Any) -> np.ndarray:
    """Return the logits of a split, (N, C), each image once and in order, on every process."""
    last = trainer.last_evaluation
    if (
        batches is trainer.eval_dataset
        and last
        and last[0] == trainer.state.global_step
        and _is_current(trainer)
    ):
        output = last[1]
    else:
        output = trainer.predict(batches)
    logits, labels = np.asarray(output.predictions), np.asarray(output.label_ids)
    if not np.array_equal(labels, split.labels.numpy()):
        raise RuntimeError(
            f"{len(labels)} predictions do not match the {len(split)} images in order; please report this."
        )
    return logits


def _is_current(trainer: BenchTrainer) -> bool:
    """Tell whether the model is still the one that the last evaluation in training saw."""
    return not trainer.args.load_best_model_at_end


def _save_predictions(path: Path, test: ImageSplit, logits: np.ndarray) -> None:
    """Write label, prediction and class probabilities of each test image, in the order of the data set."""
    partial = path.with_name(f".{path.name}")
    probability = metrics.probabilities(logits).astype(np.float32)
    np.savez_compressed(
        partial,
        index=test.index.numpy(),
        label=test.labels.numpy(),
        prediction=logits.argmax(axis=1).astype(np.int64),
        probability=probability,
    )
    partial.replace(path)


def _describe_model(model: PreTrainedModel, initialization: str) -> ModelInfo:
    timm_name = getattr(model.config, "architecture", None)
    kind = type(model).__name__
    return ModelInfo(
        architecture=f"{kind} ({timm_name})" if timm_name else kind,
        initialization=initialization,
        revision=getattr(model.config, "_commit_hash", None),
        parameters=sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        ),
    )


def _describe_data(train: ImageSplit, test: ImageSplit) -> DataInfo:
    return DataInfo(
        revision=test.revision,
        train_samples=len(train),
        eval_samples=len(test),
        label_names=test.label_names,
        image_height=test.images.shape[-2],
        image_width=test.images.shape[-1],
        train_fingerprint=train.fingerprint(),
        eval_fingerprint=test.fingerprint(),
        notes=list(dict.fromkeys(train.notes + test.notes)),
    )


def _describe_training(trainer: BenchTrainer, train_loss: float | None, sessions: int) -> Training:
    args = trainer.args
    return Training(
        optimizer_steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0),
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        world_size=args.world_size,
        effective_batch_size=args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size,
        train_loss=train_loss,
        sessions=sessions,
    )


def _push_if_wanted(result: Result, folder: Path, target: hub.PushTarget | None) -> Result:
    if (
        target is None
        or not is_main_process()
        or (result.hub and result.hub.repo_id == target.repo_id)
    ):
        return result
    pushed = result.model_copy(update={"hub": hub.push(result, folder, target)})
    save_result(pushed, folder)
    return pushed
