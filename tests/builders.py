"""Small recipes, models, trainers and results that several test modules build on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    TrainerCallback,
    ViTConfig,
    ViTImageProcessor,
    set_seed,
)

from hfbench.data.images import ImageBatches
from hfbench.data.sources import load_splits
from hfbench.data.transforms import Preprocessing
from hfbench.machine.environment import Environment
from hfbench.models.loading import load_model, open_model
from hfbench.profiling.clock import Clock
from hfbench.recipe.schema import Recipe, check_recipe
from hfbench.results.schema import (
    Compute,
    DataInfo,
    Energy,
    Memory,
    Metrics,
    ModelInfo,
    Result,
    SplitMetrics,
    Switch,
    Throughput,
    TimeBudget,
    Times,
    Training,
    save_result,
    write_json,
)
from hfbench.training.trainer import BenchTrainer, build_trainer, build_training_arguments

TIMM = "timm/test_resnet.r160_in1k"  # 0.4 million parameters, with batch norm
TIMM_VIT = "timm/test_vit.r160_in1k"  # the same without


def tiny_recipe(
    model: str | Path = TIMM,
    *,
    pretrained: bool = False,
    dataset: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
    **training_args: Any,
) -> Recipe:
    """Return a recipe that trains in half a second: two epochs of 48 digits, six steps each."""
    arguments = {
        "use_cpu": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 20,
        "learning_rate": 1e-3,
        "optim": "adamw_torch",
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
    }
    images = {"name_or_path": "digits", "max_train_samples": 48, "max_eval_samples": 20}
    content = {
        "name": "tiny",
        "variant": "untuned",
        "model": {"name_or_path": str(model), "pretrained": pretrained},
        "dataset": images | (dataset or {}),
        "preprocessing": {"image_size": 32} | (preprocessing or {}),
        "training_args": arguments | training_args,
    }
    recipe, problems = check_recipe(content)
    assert recipe is not None
    assert problems == []
    return recipe


def vit_config(**changes: Any) -> ViTConfig:
    """Return the configuration of a ViT with two layers; its dropout is 0."""
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 10,
    }
    return ViTConfig(**(small | changes))


def write_model(folder: Path, config: PreTrainedConfig) -> Path:
    """Write a classifier with random weights, and an image processor."""
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    size = config.image_size
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def make_trainer(
    recipe: Recipe, folder: Path, callbacks: Sequence[TrainerCallback] = ()
) -> BenchTrainer:
    """Put a trainer together from the parts that a run uses."""
    args = build_training_arguments(recipe, folder)
    source = open_model(recipe)
    train, test = load_splits(recipe.dataset, recipe.preprocessing.image_size, "bilinear")
    set_seed(args.seed)
    model, _ = load_model(recipe, source, train.label_names)
    preprocessing = Preprocessing(
        source.normalization,
        recipe.preprocessing.augmentation,
        args.seed,
        recipe.model.memory_format,
    )
    location = recipe.preprocessing.location
    return build_trainer(
        recipe,
        args,
        model,
        preprocessing,
        ImageBatches(train, preprocessing, location, augment=True),
        ImageBatches(test, preprocessing, location, augment=False),
        None,
        Clock(),
        list(callbacks),
    )


def make_recipe(**changes: Any) -> Recipe:
    """Return a recipe; a change to a section is merged into it."""
    content = tiny_recipe().as_json()
    for name, value in changes.items():
        merge = isinstance(value, dict) and isinstance(content[name], dict)
        content[name] = content[name] | value if merge else value
    return Recipe.model_validate(content)


def make_split(accuracy: float, **changes: Any) -> SplitMetrics:
    """Return what was measured on a split of 20 images of two classes."""
    values: dict[str, Any] = {
        "samples": 20,
        "loss": 0.5,
        "accuracy": accuracy,
        "f1_macro": accuracy - 0.01,
        "f1_weighted": accuracy - 0.02,
        "f1_per_class": {"cat": accuracy, "dog": accuracy - 0.02},
        "top5_accuracy": None,
        "calibration_error": 0.05,
    }
    return SplitMetrics(**(values | changes))


def make_result(**changes: Any) -> Result:
    """Return a result of round numbers; a change to a part is merged into it."""
    environment = Environment(
        device_type="cpu",
        device_name="Some CPU",
        device_count=1,
        device_memory_mib=None,
        cpu="Some CPU",
        cpu_cores=2,
        memory_mib=8000.0,
        torch_threads=1,
        platform="Linux 6 x86_64",
        python="3.12.0",
        cuda=None,
        packages={"torch": "2.15.0"},
        hfbench_commit=None,
    )
    recipe = make_recipe()
    parts: dict[str, Any] = {
        "run_id": "20260101T000000000-abcdef01",
        "created_at": "2026-01-01T00:00:00+00:00",
        "recipe": recipe,
        "recipe_sha256": recipe.digest(),
        "model": ModelInfo(
            architecture="ViTForImageClassification",
            initialization="pretrained",
            revision=None,
            parameters=1000,
        ),
        "data": DataInfo(
            revision=None,
            train_samples=48,
            eval_samples=20,
            label_names=["cat", "dog"],
            image_height=32,
            image_width=32,
            train_fingerprint="a" * 64,
            eval_fingerprint="b" * 64,
            notes=[],
        ),
        "training": Training(
            optimizer_steps=12,
            epochs=2.0,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            world_size=1,
            effective_batch_size=8,
            train_loss=1.0,
            sessions=1,
        ),
        "metrics": Metrics(test=make_split(0.80), train=make_split(0.90)),
        "times": Times(
            setup_seconds=5.0,
            execution_seconds=100.0,
            train_seconds=80.0,
            first_step_seconds=2.0,
            data_wait_seconds=10.0,
            evaluation_seconds=15.0,
            save_seconds=5.0,
            final_evaluation_seconds=3.0,
            final_save_seconds=1.0,
            total_seconds=109.0,
        ),
        "throughput": Throughput(
            samples_per_second=50.0, warmup_steps=3, measured_samples=4000, measured_seconds=80.0
        ),
        "memory": Memory(peak_process_memory_mib=1000.0, peak_device_memory_mib=None),
        "switches": {"precision": Switch(requested="fp32", applied="fp32")},
        "environment": environment,
        "budget": TimeBudget(  # adds up to execution_seconds
            start_seconds=1.0,
            first_step_seconds=1.0,
            data_wait_seconds=10.0,
            copy_seconds=2.0,
            preprocessing_seconds=0.0,
            forward_seconds=20.0,
            backward_seconds=40.0,
            optimizer_seconds=5.0,
            evaluation_seconds=15.0,
            save_seconds=5.0,
            overhead_seconds=1.0,
        ),
        "compute": Compute(  # 50 images per second
            dtype="fp32",
            forward_flops_per_image=1_000_000_000,
            train_flops_per_image=3_000_000_000,
            achieved_flops_per_second=150e9,
            peak_flops_per_second=600e9,
            utilization=0.25,
        ),
        "energy": Energy(
            device_joules=None, cpu_joules=2000.0, note="device: no NVIDIA GPU was used"
        ),
    }
    for name, value in changes.items():
        part = parts.get(name)
        merge = isinstance(value, dict) and hasattr(part, "model_copy")
        parts[name] = part.model_copy(update=value) if merge and part is not None else value
    return Result(**parts)


def save_run(root: Path, name: str, run_id: str, *, finished: bool = True) -> Path:
    """Write the folder of a run."""
    folder = root / name / run_id
    folder.mkdir(parents=True)
    recipe = make_recipe(name=name)
    write_json(recipe.as_json(), folder / "recipe.json")
    if finished:
        save_result(make_result(recipe=recipe, run_id=run_id), folder)
    return folder
