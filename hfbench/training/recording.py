"""Turn what happened in a run into its `Result`."""

from __future__ import annotations

from datetime import UTC, datetime

from transformers import PreTrainedModel

from hfbench.data.images import ImageSplit
from hfbench.data.overlap import Overlap, say_overlap
from hfbench.machine.environment import describe_environment
from hfbench.profiling.clock import Clock, measure_memory
from hfbench.profiling.flops import describe_compute
from hfbench.recipe.schema import Recipe
from hfbench.results.schema import DataInfo, Metrics, ModelInfo, Result, Training
from hfbench.training.switches import observe_switches
from hfbench.training.trainer import BenchTrainer


def record(
    recipe: Recipe,
    run_id: str,
    trainer: BenchTrainer,
    clock: Clock,
    model: ModelInfo,
    data: DataInfo,
    metrics: Metrics,
    train_loss: float | None,
    predictions_sha256: str,
) -> Result:
    """Put the parts of a finished run together.

    Args:
        recipe: As resolved.
        run_id: Name of the run's folder.
        trainer: After training.
        clock: After training.
        model: From `describe_model`.
        data: From `describe_data`.
        metrics: Of both splits.
        train_loss: Mean training loss, ``None`` if it is not finite.
        predictions_sha256: Of the file of predictions.
    """
    throughput = clock.throughput(trainer.args.world_size)
    with clock.measure("analysis"):
        memory = measure_memory(trainer.args.device)
        environment = describe_environment(trainer.args.device.type)
        compute = describe_compute(
            trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False),
            recipe.preprocessing.image_size,
            trainer.seen_dtype or trainer.requested_dtype,
            trainer.args.device,
            throughput.samples_per_second,
            trainer.args.world_size,
        )
    return Result(
        run_id=run_id,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=recipe,
        recipe_sha256=recipe.digest(),
        model=model,
        data=data,
        training=_describe_training(trainer, train_loss, clock),
        metrics=metrics,
        times=clock.summary(),
        throughput=throughput,
        memory=memory,
        switches=observe_switches(recipe, trainer),
        environment=environment,
        budget=clock.budget(),
        compute=compute,
        energy=clock.energy(),
        conditions=clock.conditions(),
        predictions_sha256=predictions_sha256,
    )


def describe_model(model: PreTrainedModel, initialization: str, revision: str | None) -> ModelInfo:
    """Describe the classifier that was trained."""
    timm_name = getattr(model.config, "architecture", None)
    kind = type(model).__name__
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return ModelInfo(
        architecture=f"{kind} ({timm_name})" if timm_name else kind,
        initialization=initialization,
        revision=revision,
        parameters=sum(parameter.numel() for parameter in trainable),
    )


def describe_data(train: ImageSplit, test: ImageSplit, overlap: Overlap) -> DataInfo:
    """Describe the images that were used, with fingerprints."""
    notes = say_overlap(overlap, len(train), len(test)) + train.notes + test.notes
    return DataInfo(
        revision=test.revision,
        train_samples=len(train),
        eval_samples=len(test),
        label_names=test.label_names,
        image_height=test.images.shape[-2],
        image_width=test.images.shape[-1],
        train_fingerprint=train.fingerprint(),
        eval_fingerprint=test.fingerprint(),
        notes=list(dict.fromkeys(notes)),
        test_in_train=overlap.test_in_train,
        test_doubles=overlap.test_doubles,
        train_doubles=overlap.train_doubles,
    )


def _describe_training(trainer: BenchTrainer, train_loss: float | None, clock: Clock) -> Training:
    args = trainer.args
    accumulated = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return Training(
        optimizer_steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0),
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        world_size=args.world_size,
        effective_batch_size=accumulated * args.world_size,
        train_loss=train_loss,
        sessions=clock.times.sessions,
        skipped_steps=trainer.skipped_steps(),
        loss_scale=trainer.loss_scale.scale if trainer.loss_scale else None,
        compilations=clock.times.compilations,
    )
