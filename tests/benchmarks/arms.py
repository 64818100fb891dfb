"""One way to train and evaluate, in a process of its own that measures when it is told to.

Started by `throughput.py`: ``python -m tests.benchmarks.arms SPEC`` with the specification as JSON.
Commands come in and measurements go out as lines; between them the process stands still, so that
the arms of a comparison take turns on one machine.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WARMUP_STEPS = 2  # of each window, not measured: other arms ran in between
ENDLESS = 1_000_000  # steps


@dataclass(frozen=True)
class Spec:
    """What an arm trains.

    Attributes:
        arm: ``standard``, ``host``, ``device`` or ``limit``.
        data: Folder of CIFAR-10, or its name on the Hub.
        model: Folder of a checkpoint, or a timm architecture for fresh weights.
        pretrained: Whether there are weights.
        image_size: Height and width of the model's input.
        batch: Images in a training batch.
        eval_batch: Images in an evaluation batch.
        train_images: Size of the training subset.
        eval_images: Size of the test subset.
        bf16: Autocast to bfloat16.
        channels_last: Memory format of model and images.
        keep_freed_memory: As the recipe's field.
        workers: Processes of the data loader.
        max_grad_norm: For clipping, in every arm.
    """

    arm: str
    data: str
    model: str
    pretrained: bool
    image_size: int
    batch: int
    eval_batch: int
    train_images: int
    eval_images: int
    bf16: bool
    channels_last: bool
    keep_freed_memory: bool = False
    workers: int = 0
    max_grad_norm: float = 1.0

    def recipe(self) -> Any:
        """Return the same as a recipe of hfbench."""
        from hfbench import load_recipe

        overrides = {
            "name": "throughput",
            "model.name_or_path": self.model,
            "model.pretrained": self.pretrained,
            "model.memory_format": "channels_last" if self.channels_last else "contiguous",
            "model.keep_freed_memory": self.keep_freed_memory,
            "dataset.name_or_path": self.data,
            "dataset.max_train_samples": self.train_images,
            "dataset.max_eval_samples": self.eval_images,
            "preprocessing.image_size": self.image_size,
            "preprocessing.location": "host" if self.arm == "host" else "device",
            "training_args.per_device_train_batch_size": self.batch,
            "training_args.per_device_eval_batch_size": self.eval_batch,
            "training_args.dataloader_num_workers": self.workers,
            "training_args.bf16": self.bf16,
            "training_args.optim": "adamw_torch_fused",
            "training_args.max_grad_norm": self.max_grad_norm,
            "training_args.logging_nan_inf_filter": self.arm == "host",
            "training_args.max_steps": ENDLESS,
            "training_args.warmup_steps": 0,
        }
        if not _has_accelerator():
            overrides["training_args.use_cpu"] = True
        words = [f"{name}={json.dumps(value)}" for name, value in overrides.items()]
        return load_recipe("resnet50_cifar10_untuned", words)


@dataclass
class Measurement:
    """What a window took.

    Attributes:
        images: Trained on, or evaluated.
        seconds: Wall time.
        cpu_seconds: Of this process and its loader's workers that have ended.
        data_cpu_seconds: The main thread's for fetching batches; only without workers.
    """

    images: int
    seconds: float
    cpu_seconds: float
    data_cpu_seconds: float | None = None


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _synchronize() -> None:
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Watch:
    """Takes wall and processor time from one moment to another."""

    def __init__(self) -> None:
        _synchronize()
        self.seconds, self.cpu_seconds = time.perf_counter(), time.process_time()

    def measure(self, images: int, data_cpu_seconds: float | None = None) -> Measurement:
        _synchronize()
        return Measurement(
            images,
            time.perf_counter() - self.seconds,
            time.process_time() - self.cpu_seconds,
            data_cpu_seconds,
        )


def say(**content: Any) -> None:
    """Send one line to the process that started this one."""
    sys.__stdout__.write(json.dumps(content) + "\n")
    sys.__stdout__.flush()


def peak_memory_mib() -> float:
    """Return the peak of resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def commands() -> Iterator[tuple[str, int]]:
    """Yield what to measure: ``train`` so many steps, or ``evaluate``."""
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "stop":
            say(peak_memory_mib=peak_memory_mib())
            return
        yield word, int(number or 0)


# (d) The limit: a plain loop over tensors that are there already


def run_limit(spec: Spec, started: float) -> None:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForImageClassification

    from hfbench.machine.allocator import keep_freed_memory

    keep_freed_memory(spec.keep_freed_memory)
    device = torch.accelerator.current_accelerator() if _has_accelerator() else torch.device("cpu")
    torch.manual_seed(0)
    memory_format = torch.channels_last if spec.channels_last else torch.contiguous_format
    if spec.pretrained:
        model = AutoModelForImageClassification.from_pretrained(
            spec.model, num_labels=10, ignore_mismatched_sizes=True
        )
    else:
        import timm

        from hfbench.training.trainer import BenchTrainer  # noqa: F401  (the same imports as the others)

        model = timm.create_model(spec.model, num_classes=10)
    model = model.to(device, memory_format=memory_format)
    pool = [
        torch.randn(spec.batch, 3, spec.image_size, spec.image_size, device=device).to(
            memory_format=memory_format
        )
        for _ in range(8)
    ]
    labels = torch.randint(0, 10, (spec.batch,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def forward(images: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.bf16):
            output = model(images)
        return (output if isinstance(output, torch.Tensor) else output.logits).float()

    def train(steps: int) -> None:
        model.train()
        for step in range(steps):
            cross_entropy(forward(pool[step % len(pool)]), labels).backward()
            if spec.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    eval_pool = torch.cat([pool[0]] * -(-spec.eval_batch // spec.batch))[: spec.eval_batch]

    @torch.no_grad()
    def evaluate(batches: int) -> None:
        model.eval()
        right = torch.zeros((), device=device)
        for _ in range(batches):
            right += (forward(eval_pool).argmax(1) == 0).sum()
        right.item()

    train(1)
    _synchronize()
    say(first_step_seconds=time.time() - started)
    for word, steps in commands():
        if word == "train":
            train(WARMUP_STEPS)
            watch = Watch()
            train(steps)
            say(**asdict(watch.measure(steps * spec.batch)))
        else:
            batches = -(-spec.eval_images // spec.eval_batch)
            evaluate(1)
            watch = Watch()
            evaluate(batches)
            say(**asdict(watch.measure(batches * spec.eval_batch)))


# (a) The standard path: what transformers' example does


def run_standard(spec: Spec, started: float) -> None:
    import datasets
    import numpy as np
    import torch
    from torchvision.transforms import (
        Compose,
        InterpolationMode,
        Normalize,
        RandomCrop,
        RandomHorizontalFlip,
        Resize,
        ToTensor,
    )
    from transformers import (
        AutoConfig,
        AutoModelForImageClassification,
        TimmWrapperConfig,
        Trainer,
        TrainingArguments,
    )

    torch.manual_seed(0)
    loaded = datasets.load_dataset(spec.data)
    if spec.pretrained:
        config = AutoConfig.from_pretrained(spec.model, num_labels=10)
        model = AutoModelForImageClassification.from_pretrained(
            spec.model, config=config, ignore_mismatched_sizes=True
        )
    else:
        config = TimmWrapperConfig(architecture=spec.model, num_labels=10)
        model = AutoModelForImageClassification.from_config(config)
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    resize = Resize((spec.image_size, spec.image_size), InterpolationMode.BICUBIC)
    end = [resize, ToTensor(), normalize] if spec.image_size != 32 else [ToTensor(), normalize]
    for_training = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), *end])
    for_evaluation = Compose(end)

    def transform_with(transforms: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def transform(examples: dict[str, Any]) -> dict[str, Any]:
            pictures = [picture.convert("RGB") for picture in examples.pop("img")]
            examples["pixel_values"] = [transforms(picture) for picture in pictures]
            return examples

        return transform

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["label"] for example in examples]),
        }

    def accuracy(prediction: Any) -> dict[str, float]:
        return {
            "accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))
        }

    train = loaded["train"].select(range(spec.train_images))
    test = loaded["test"].select(range(spec.eval_images))
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=ENDLESS,
        per_device_train_batch_size=spec.batch,
        per_device_eval_batch_size=spec.eval_batch,
        dataloader_num_workers=spec.workers,
        bf16=spec.bf16,
        use_cpu=not _has_accelerator(),
        optim="adamw_torch_fused",
        max_grad_norm=spec.max_grad_norm,
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=train.with_transform(transform_with(for_training)),
        eval_dataset=test.with_transform(transform_with(for_evaluation)),
        compute_metrics=accuracy,
    )
    run_trainer(trainer, spec, started)


# (b) and (c) hfbench


def run_hfbench(spec: Spec, started: float) -> None:
    from hfbench.profiling.clock import Clock
    from hfbench.studies.windows import without_files
    from hfbench.training.inputs import assemble, load_inputs
    from hfbench.training.trainer import build_training_arguments

    recipe = without_files(spec.recipe())
    args = build_training_arguments(recipe, Path(tempfile.gettempdir()))
    trainer = assemble(recipe, args, load_inputs(recipe, args), Clock(), [])
    run_trainer(trainer, spec, started)


def run_trainer(trainer: Any, spec: Spec, started: float) -> None:
    """Train, and do what the commands say between two steps."""
    from transformers import PrinterCallback, TrainerCallback

    fetch = trainer.get_batch_samples
    fetching = 0.0

    def timed_fetch(*args: Any, **kwargs: Any) -> Any:
        nonlocal fetching
        before = time.thread_time()  # threads of torch that spin meanwhile do nothing for it
        try:
            return fetch(*args, **kwargs)
        finally:
            fetching += time.thread_time() - before

    trainer.get_batch_samples = timed_fetch

    class Windows(TrainerCallback):
        """Turns commands into windows of steps."""

        def __init__(self) -> None:
            self.commands = commands()
            self.left = 0
            self.steps = 0
            self.watch: Watch | None = None
            self.fetched = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                _synchronize()
                say(first_step_seconds=time.time() - started)
            self.left -= 1
            if self.left == self.steps and self.watch is None:
                self.watch, self.fetched = Watch(), fetching
            if self.left > 0:
                return
            if self.watch is not None:
                data = fetching - self.fetched if spec.workers == 0 else None
                say(**asdict(self.watch.measure(self.steps * spec.batch, data)))
                self.watch = None
            self.next(control)

        def next(self, control: Any) -> None:
            for word, steps in self.commands:
                if word == "train":
                    self.steps, self.left = steps, steps + WARMUP_STEPS
                    return
                watch = Watch()
                trainer.evaluate()
                say(**asdict(watch.measure(spec.eval_images)))
            control.should_training_stop = True

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Windows())
    trainer.train()


def main() -> None:
    started = float(os.environ["STARTED_AT"])
    spec = Spec(**json.loads(sys.argv[1]))
    sys.stdout = sys.stderr  # what libraries print must not come between the lines
    run = {"limit": run_limit, "standard": run_standard}.get(spec.arm, run_hfbench)
    run(spec, started)


if __name__ == "__main__":
    main()
