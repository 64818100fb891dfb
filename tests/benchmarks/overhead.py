"""Measure what a step of Trainer takes over a plain loop's, in one process.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.overhead [--architecture NAME] [--rounds N]

Windows of both alternate, on copies of the same small model: the smaller it is, the less of the
difference is noise. The plain loop fetches and prepares its batches with the same code as hfbench,
so that the difference is what `Trainer`, accelerate, the loader and the clock add.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from hfbench import load_recipe
from hfbench.comparison.intervals import mean_interval
from hfbench.profiling.clock import Clock
from hfbench.studies.windows import with_arguments, without_files
from hfbench.training.inputs import assemble, load_inputs
from hfbench.training.trainer import BenchTrainer, build_training_arguments

STEPS = 20  # of a window: short, so that both see the same machine
BATCH = 16
# What BenchTrainer leaves out of a step; with --as-trainer it is put back.
LEFT_OUT = ("training_step", "floating_point_ops", "_get_grad_norm")


class PlainLoop:
    """The same steps without a trainer."""

    def __init__(self, model: torch.nn.Module, batches: Any, decayed: list[str]) -> None:
        self.model, self.batches = model, batches
        names = dict(model.named_parameters())
        groups = [
            {"params": [p for n, p in names.items() if n in decayed], "weight_decay": 0.05},
            {"params": [p for n, p in names.items() if n not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-7, fused=True)
        self.samples = list(range(BATCH))

    def run(self, steps: int) -> None:
        self.model.train()
        for _ in range(steps):
            batch = self.batches.__getitems__(self.samples)
            images = self.batches.preprocessing(batch["pixel_values"], batch["sample"])
            logits = self.model(pixel_values=images).logits
            torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


class Alternate(TrainerCallback):
    """Lets the plain loop run after each window of the trainer."""

    def __init__(self, plain: PlainLoop) -> None:
        self.plain = plain
        self.start: float | None = None
        self.trainer_ms: list[float] = []
        self.plain_ms: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % STEPS:
            return
        now = time.perf_counter()
        if self.start is not None:
            self.trainer_ms.append((now - self.start) / STEPS * 1e3)
            self.plain.run(STEPS)
            self.plain_ms.append((time.perf_counter() - now) / STEPS * 1e3)
        self.start = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="test_resnet", help="of timm")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument(
        "--as-trainer", action="store_true", help="with what hfbench leaves out of Trainer's steps"
    )
    options = parser.parse_args()
    if options.as_trainer:
        for name in LEFT_OUT:
            setattr(BenchTrainer, name, getattr(Trainer, name))
    settings = {
        "model.name_or_path": f"timm/{options.architecture}",
        "preprocessing.location": "device",
        "model.keep_freed_memory": "true",  # page faults are no overhead of either
        "training_args.optim": "adamw_torch_fused",
        "training_args.learning_rate": 1e-7,  # noise: a model that fits has denormal gradients
        "training_args.logging_nan_inf_filter": str(options.as_trainer).lower(),
        "training_args.per_device_train_batch_size": BATCH,
    }
    recipe = load_recipe("quickstart_untuned", [f"{k}={v}" for k, v in settings.items()])
    recipe = with_arguments(without_files(recipe), max_steps=STEPS * (options.rounds + 1))
    args = build_training_arguments(recipe, Path(tempfile.gettempdir()))
    inputs = load_inputs(recipe, args)
    model = copy.deepcopy(inputs.model)
    trainer = assemble(recipe, args, inputs, Clock(), [])
    decayed = trainer.get_decay_parameter_names(model)
    alternate = Alternate(PlainLoop(model, trainer.train_dataset, decayed))
    gc.freeze()  # as `hfbench recipe` does: no collection walks over what was imported
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(alternate)
    trainer.clock.start(trainer.args.device)
    trainer.train()
    pairs = zip(alternate.trainer_ms, alternate.plain_ms, strict=True)
    added = [one - other for one, other in pairs]
    found = mean_interval(added)
    modules, parameters = len(list(model.modules())), len(list(model.parameters()))
    print(f"{options.architecture}: {modules} modules, {parameters} parameter tensors")
    print(f"step of the plain loop: {statistics.median(alternate.plain_ms):.3f} ms")
    print(
        f"Trainer adds: median {statistics.median(added):.3f} ms, mean {found.value:.3f} "
        f"[{found.low:.3f}, {found.high:.3f}] ms over {len(added)} pairs of {STEPS} steps"
    )


if __name__ == "__main__":
    main()
