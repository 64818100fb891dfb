"""Short measured windows of training: a run's own trainer, without evaluation, files and output.

A window starts when warm-up ends and ends with its last step. All windows of a bench start from the
same weights and see whole micro-batches only, in one epoch: what an epoch's end costs is not in it.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hfbench.data.images import ImageBatches
from hfbench.errors import DeviceError
from hfbench.machine.environment import check_machine, requested_processes
from hfbench.machine.launched import check_launch
from hfbench.machine.precision import log_slow_precision
from hfbench.machine.settings import restored
from hfbench.profiling.clock import Clock, measure_memory, reset_memory, synchronize
from hfbench.profiling.timeline import PHASES, stamps_of
from hfbench.recipe.arguments import HUB_ARGUMENTS
from hfbench.recipe.schema import Recipe
from hfbench.results.windows import Window
from hfbench.training.inputs import assemble, load_inputs
from hfbench.training.loss_scale import SETTLING_STEPS
from hfbench.training.switches import observe_switches
from hfbench.training.trainer import BenchTrainer, build_training_arguments

# What belongs to a run, not to its steps.
_WITHOUT = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "logging_strategy": "no",
    "logging_first_step": False,
    "report_to": "none",
    "disable_tqdm": True,
}
_NEED_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedulers


class Bench:
    """The inputs of a recipe, loaded once, and windows of it and of its variants.

    Attributes:
        recipe: As it is measured: without pushing, evaluating and saving.
        inputs: Model, data and preprocessing.
        device: That everything runs on.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Check and load everything.

        Raises:
            HfbenchError: For everything that the user can mend.
        """
        self.recipe = without_files(recipe)
        args = _check(self.recipe)
        log_slow_precision(self.recipe)
        self.inputs = load_inputs(self.recipe, args)
        self.device = args.device

    @restored()
    def measure_window(
        self, steps: int, warmup_steps: int = 2, recipe: Recipe | None = None
    ) -> Window:
        """Train a fresh copy of the model for ``warmup_steps + steps`` optimizer steps.

        Args:
            steps: To measure, at least 1.
            warmup_steps: Before them, at least 1; more until float16's loss scale has settled.
            recipe: A variant that differs in `training_args`, `preprocessing.location` and how the
                model computes (`memory_format`, `attn_implementation`, `cudnn_benchmark`,
                `keep_freed_memory`) alone;
                by default the bench's own recipe.

        Raises:
            DeviceError: If this machine cannot do what the variant asks for.
            Exception: That `is_out_of_memory` knows, if it does not fit.
        """
        recipe = without_files(recipe or self.recipe)
        timer = _Timer(warmup_steps, steps)
        trainer, args = self._build(recipe, warmup_steps + steps, timer)
        timeline = trainer.clock.timeline
        timeline.start("start", stamps_of(args.device))
        try:
            with trainer.clock.pauses.watch():
                trainer.train()
            memory = measure_memory(args.device)
            switches = observe_switches(recipe, trainer)
        finally:
            trainer.close_loaders()
            timeline.stop()
        start, end = timer.borders
        phases = {name: end.phase_seconds[name] - start.phase_seconds[name] for name in PHASES}
        return Window(
            steps=steps,
            warmup_steps=timer.warmup_steps,
            samples=steps * args.per_device_train_batch_size * args.gradient_accumulation_steps,
            seconds=end.seconds - start.seconds,
            data_wait_seconds=phases["data_wait"],
            phase_seconds=phases,
            first_loss=timer.first_loss,
            peak_process_memory_mib=memory.peak_process_memory_mib,
            peak_device_memory_mib=memory.peak_device_memory_mib,
            switches=switches,
        )

    @restored()
    def measure_first_loss(self, recipe: Recipe) -> float | None:
        """Return the training loss of the first optimizer step, dropout and drop path turned off.

        Args:
            recipe: A variant, as for `measure_window`.

        Returns:
            As `Window.first_loss`.
        """
        timer = _Timer(1, 0)
        trainer, _ = self._build(without_files(recipe), 1, timer, turn_off_dropout)
        try:
            trainer.train()
        finally:
            trainer.close_loaders()
        return timer.first_loss

    def _build(
        self, recipe: Recipe, max_steps: int, timer: _Timer, prepare: Any = None
    ) -> tuple[BenchTrainer, TrainingArguments]:
        if recipe.argument("fp16"):
            max_steps += SETTLING_STEPS
        recipe = with_arguments(recipe, max_steps=max_steps)
        args = _check(recipe)
        if recipe.preprocessing.location == "host":
            # Images that lie on the device for other windows would count in this one's peak.
            for split in (self.inputs.train, self.inputs.test):
                split.leave_devices()
        release_memory(args.device)
        reset_memory(args.device)
        model: PreTrainedModel = copy.deepcopy(self.inputs.model)
        if prepare is not None:
            prepare(model)
        trainer = assemble(
            recipe, args, replace(self.inputs, model=model), Clock(), [timer], as_asked=True
        )
        trainer.remove_callback(PrinterCallback)
        needed = max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
        trainer.train_dataset = _OneEpoch(trainer.train_dataset, needed)
        timer.trainer = trainer
        return trainer, args


def with_arguments(recipe: Recipe, **training_args: Any) -> Recipe:
    """Return the recipe with other `training_args`; unlike `load_recipe` it checks nothing."""
    return recipe.model_copy(update={"training_args": recipe.training_args | training_args})


def without_files(recipe: Recipe) -> Recipe:
    """Return the recipe as a window runs it: nothing is evaluated, saved, logged or pushed."""
    kept = {name: v for name, v in recipe.training_args.items() if name not in HUB_ARGUMENTS}
    recipe = recipe.model_copy(update={"training_args": kept | _WITHOUT})
    if recipe.argument("lr_scheduler_type") in _NEED_EVALUATIONS:
        recipe = with_arguments(recipe, lr_scheduler_type="constant", lr_scheduler_kwargs=None)
    return recipe


def turn_off_dropout(model: nn.Module) -> None:
    """Turn off everything that drops at random, so that two losses can be compared.

    Libraries keep the rates as `p` of a dropout layer, as numbers with "drop" in their names
    (`drop_prob`, `attention_dropout`, `drop_rate`), and in a model's configuration.
    """
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


class _Border:
    """A moment at which everything given to the device is done."""

    def __init__(self, trainer: BenchTrainer) -> None:
        synchronize(trainer.args.device)
        clock = trainer.clock
        self.seconds = time.perf_counter() - clock.pauses.read() - clock.compiling.aside_seconds
        self.phase_seconds = trainer.clock.timeline.read()


class _Timer(TrainerCallback):
    """Notes both borders of a window, and the loss of the first step."""

    def __init__(self, warmup_steps: int, steps: int) -> None:
        self.warmup_steps, self.steps = warmup_steps, steps
        self.trainer: BenchTrainer  # set when there is one
        self.borders: list[_Border] = []
        self.first_loss: float | None = None
        self._skipped = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 1:
            loss = float(self.trainer.loss_sum)
            self.first_loss = loss if math.isfinite(loss) else None
        if not self.borders and state.global_step >= self.warmup_steps:
            if not self._has_settled(state):
                return
            self.warmup_steps = state.global_step
            self.borders.append(_Border(self.trainer))
        if state.global_step == self.warmup_steps + self.steps:
            self.borders.append(_Border(self.trainer))
            control.should_training_stop = True

    def _has_settled(self, state: TrainerState) -> bool:
        """Tell whether the optimizer made this step: a step that is skipped is a quick one."""
        if self.trainer.loss_scale is None:
            return True
        before, self._skipped = self._skipped, self.trainer.loss_scale.skipped_steps
        return self._skipped == before or state.max_steps - state.global_step <= self.steps


class _OneEpoch(ImageBatches):
    """The same images, repeated until one epoch is enough for a window."""

    def __init__(self, batches: Any, samples: int) -> None:
        super().__init__(
            batches.split,
            batches.preprocessing,
            batches.location,
            batches.augment,
            batches.device,
        )
        self.samples = max(samples, len(batches.split))

    def __len__(self) -> int:
        return self.samples


def _check(recipe: Recipe) -> TrainingArguments:
    check_launch()
    problems = check_machine(recipe)
    if problems:
        raise DeviceError.from_problems(recipe.name, problems)
    if requested_processes() > 1:
        raise DeviceError(
            f"Short windows are measured in one process, but the launcher was asked for "
            f"{requested_processes()}; run the same command without a launcher."
        )
    # Trainer makes the folder that it is given, and nothing is written into it.
    return build_training_arguments(recipe, Path(tempfile.gettempdir()))


def release_memory(device: torch.device) -> None:
    """Give back what earlier windows used, so that it is not counted as this one's."""
    torch.compiler.reset()  # after eight recompilations torch would silently run uncompiled
    gc.collect()
    if device.type not in ("cpu", "mps"):
        torch.accelerator.empty_cache()
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library
            return
