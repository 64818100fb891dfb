"""Everything that training needs, loaded and checked: model, data, preprocessing, trainer."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hfbench.data.images import ImageBatches, ImageSplit
from hfbench.data.overlap import Overlap, find_overlap, say_overlap
from hfbench.data.sources import open_splits
from hfbench.data.transforms import Preprocessing
from hfbench.errors import DeviceError, HfbenchError, HubError, RecipeError
from hfbench.machine.connection import use_cache_if_unreachable
from hfbench.models.configs import is_known_without_checkpoint
from hfbench.models.loading import (
    ModelSource,
    check_saved_processor,
    check_single_image,
    load_model,
    open_model,
    set_implementation,
)
from hfbench.profiling.clock import Clock
from hfbench.recipe.schema import EMBEDDED_DATASETS, Recipe, local_path
from hfbench.results.scores import Scores
from hfbench.training import metrics
from hfbench.training.trainer import BenchTrainer, build_trainer

logger = logging.getLogger(__name__)

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")  # where torch's workers put batches, on Linux
_CHECKED_IMAGES = 4  # on which the saved image processor is compared with ours


@dataclass(frozen=True)
class Inputs:
    """Everything that training needs, loaded and checked."""

    model: PreTrainedModel
    initialization: str
    revision: str | None
    image_processor: Any
    preprocessing: Preprocessing
    train: ImageSplit
    test: ImageSplit
    overlap: Overlap


def load_inputs(recipe: Recipe, args: TrainingArguments) -> Inputs:
    """Load data and model, process 0 first, so that the others find them in the cache."""
    with args.main_process_first(desc="loading data and model"):
        source, label_names, read_splits = _open_sources(recipe)
        with ThreadPoolExecutor(1) as beside:  # images are decoded while weights are read or drawn
            reading = beside.submit(read_splits)
            set_seed(args.seed)  # the head and fresh weights are drawn now
            try:
                model, initialization = load_model(recipe, source, label_names)
            except HfbenchError:
                reading.result()  # what is wrong with the data is said first
                raise
            train, test = reading.result()
    needed = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train) < needed:
        raise RecipeError(
            f"training_args.dataloader_drop_last: {len(train)} training images do not fill one "
            f"batch of {needed}, so that nothing would be trained; set it to false."
        )
    if (
        args.metric_for_best_model
        and "top5" in args.metric_for_best_model
        and len(train.label_names) < metrics.TOP_K_FROM
    ):
        raise RecipeError(
            f"training_args.metric_for_best_model: top-5 accuracy is measured from "
            f"{metrics.TOP_K_FROM} classes on; there are {len(train.label_names)}. Use accuracy."
        )
    augmentation = recipe.preprocessing.augmentation
    preprocessing = Preprocessing(
        source.normalization, augmentation, args.seed, recipe.model.memory_format
    )
    sample = test.images[:_CHECKED_IMAGES]
    check_saved_processor(model, source.image_processor, preprocessing, sample)
    overlap = find_overlap(train, test)
    for warning in say_overlap(overlap, len(train), len(test)):
        logger.warning(warning)
    left_over = len(train) % needed if args.world_size == 1 and not args.dataloader_drop_last else 0
    batch = args.per_device_train_batch_size
    if batch == 1 or left_over == 1:
        check_single_image(model, recipe.preprocessing.image_size, len(train), batch)
    return Inputs(
        model=model,
        initialization=initialization,
        revision=source.revision,
        image_processor=source.image_processor,
        preprocessing=preprocessing,
        train=train,
        test=test,
        overlap=overlap,
    )


def _open_sources(
    recipe: Recipe,
) -> tuple[ModelSource, list[str], Callable[[], tuple[ImageSplit, ImageSplit]]]:
    """Read the model's configuration, and all of the data but the images.

    If the Hub is out of reach, the error says what is missing of both.
    """
    if _needs_hub(recipe):
        use_cache_if_unreachable()
    source, problems = None, []
    try:
        source = open_model(recipe)
    except HubError as error:
        problems.append(str(error))
    interpolation = source.normalization.interpolation if source else "bilinear"
    try:
        size = recipe.preprocessing.image_size
        label_names, read_splits = open_splits(recipe.dataset, size, interpolation)
    except HubError as error:
        problems.append(str(error))
    if problems or source is None:
        raise HubError.from_problems(recipe.name, problems)
    return source, label_names, read_splits


def _needs_hub(recipe: Recipe) -> bool:
    data = recipe.dataset.name_or_path
    local_data = data in EMBEDDED_DATASETS or local_path(data).exists()
    local_model = local_path(recipe.model.name_or_path).exists()
    return not local_data or not (local_model or is_known_without_checkpoint(recipe))


def assemble(
    recipe: Recipe,
    args: TrainingArguments,
    inputs: Inputs,
    clock: Clock,
    callbacks: Sequence[TrainerCallback],
    *,
    as_asked: bool = False,
) -> BenchTrainer:
    """Put the trainer of a recipe together from its inputs.

    Args:
        recipe: What is trained.
        args: Of the recipe; without workers afterwards, if there is no room for their batches.
        inputs: From `load_inputs`.
        clock: That times it.
        callbacks: Of the trainer.
        as_asked: Whether loader workers that shared memory is too small for are refused, as where
            settings are measured against each other; else it goes on without, which is said.

    Raises:
        DeviceError: If workers are refused.
        RecipeError: If transformers refuses an argument.
    """
    given = inputs.preprocessing
    preprocessing = Preprocessing(  # a window's recipe may have another memory format
        given.normalization, given.augmentation, given.seed, recipe.model.memory_format
    )

    def batches(split: ImageSplit, augment: bool) -> ImageBatches:
        # On the CPU the host's memory is the device's.
        device = None if args.device.type == "cpu" else args.device
        location = recipe.preprocessing.location
        return ImageBatches(split, preprocessing, location, augment, device)

    check_shared_memory(recipe, args, inputs, as_asked=as_asked)
    set_implementation(inputs.model, recipe.model)
    return build_trainer(
        recipe,
        args,
        inputs.model,
        preprocessing,
        batches(inputs.train, augment=True),
        batches(inputs.test, augment=False),
        _compute_metrics(inputs.test.label_names) if has_labels(recipe) else None,
        clock,
        list(callbacks),
    )


def check_shared_memory(
    recipe: Recipe, args: TrainingArguments, inputs: Inputs, *, as_asked: bool
) -> None:
    """Do without loader workers whose batches do not fit into shared memory, or refuse them.

    A worker that finds none there loses its batch, and the run would wait for it for ever.

    Raises:
        DeviceError: If they are refused, with what is needed and what is free, in MiB, and what to
            do.
    """
    workers = args.dataloader_num_workers
    on_device = recipe.preprocessing.location == "device"
    if not workers or not _SHARED_MEMORY.is_dir() or (on_device and args.device.type != "cpu"):
        return  # images that lie on a device are not handed over
    size = recipe.preprocessing.image_size
    splits = {"train": (inputs.train, args.per_device_train_batch_size)}
    splits["test"] = (inputs.test, args.per_device_eval_batch_size)
    batch = {}
    for name, (split, count) in splits.items():
        height, width = split.images.shape[-2:]
        batch[name] = count * (3 * height * width if on_device else 3 * size * size * 4)
    if inputs.preprocessing.mixes and on_device:
        batch["train"] *= 2  # uint8, and partners; on the host float32, mixed already
    # While test images are evaluated between two steps, training's wait.
    between = args.eval_strategy != "no"
    largest = sum(batch.values()) if between else max(batch.values())
    ahead = workers * (args.dataloader_prefetch_factor or 2) + 1  # one more is used meanwhile
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = largest * ahead * here / 2**20
    free = shutil.disk_usage(_SHARED_MEMORY).free / 2**20
    if needed <= free:
        return
    lacking = (
        f"{_SHARED_MEMORY} has {free:.0f} MiB free, but {workers} loader workers hand over up to "
        f"{needed:.0f} MiB there at once."
    )
    more = "Give it more (in a container: --shm-size)"
    if as_asked:
        raise DeviceError(
            f"{lacking} {more}, or train without: training_args.dataloader_num_workers=0, "
            "preprocessing.location=device, or a smaller batch."
        )
    logger.warning(f"{lacking} Going on without workers, which may be slower. {more}.")
    args.dataloader_num_workers = 0
    args.dataloader_prefetch_factor = None
    args.dataloader_persistent_workers = False


def has_labels(recipe: Recipe) -> bool:
    """Tell whether labels mean something: noise has no accuracy."""
    return recipe.dataset.name_or_path != "synthetic"


def _compute_metrics(label_names: list[str]) -> Any:
    def compute(prediction: EvalPrediction) -> dict[str, float]:
        scores, labels = Scores.unpack(prediction.predictions), np.asarray(prediction.label_ids)
        found = metrics.score(scores, labels, label_names)
        names = {"accuracy", "f1_macro", "f1_weighted", "top5_accuracy"}
        values = found.model_dump(include=names)
        return {name: value for name, value in values.items() if value is not None}

    return compute
