"""The parts of training one at a time: the loader alone, the model alone, the copy alone.

All of it is done by the objects that a run uses: a real trainer makes its first step, and then its
loader, its model and its optimizer are run apart.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import find_batch_size
from torch import Tensor
from transformers import PrinterCallback

from hfbench.data.images import ImageBatches
from hfbench.profiling.clock import Clock, synchronize
from hfbench.recipe.schema import Recipe
from hfbench.studies.windows import Bench, with_arguments, without_files
from hfbench.training.inputs import assemble
from hfbench.training.loss_scale import SETTLING_STEPS
from hfbench.training.switches import observe_switches
from hfbench.training.trainer import BenchTrainer, build_training_arguments

Batch = dict[str, Tensor]
_FEW = 2  # images, the fewest that metrics are defined for


class Sides:
    """The trainer of a recipe after its first step, and its parts, each by itself.

    Attributes:
        first_step_seconds: Loader and optimizer set-up, and whatever is compiled, included.
    """

    def __init__(self, bench: Bench, recipe: Recipe, folder: Path) -> None:
        """Build a trainer and let it make one step.

        Args:
            bench: Whose model and data are used.
            recipe: The bench's or a variant, as for `Bench.measure_window`.
            folder: For a checkpoint.

        Raises:
            Exception: That `is_out_of_memory` knows, if it does not fit.
        """
        recipe = with_arguments(without_files(recipe), max_steps=1)
        args = build_training_arguments(recipe, folder)
        inputs = replace(bench.inputs, model=copy.deepcopy(bench.inputs.model))
        self.trainer: BenchTrainer = assemble(recipe, args, inputs, Clock(), [], as_asked=True)
        self.trainer.remove_callback(PrinterCallback)
        self.device = args.device
        self._recipe = recipe
        self._train = inputs.train
        self._preprocessing = inputs.preprocessing
        self._state = dict(AcceleratorState._shared_state)
        start = time.perf_counter()
        self.trainer.train()
        synchronize(self.device)
        self.first_step_seconds = time.perf_counter() - start
        optimizer: Any = self.trainer.optimizer
        self._optimizer = optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the same step again and again must not diverge
        self._loader = getattr(
            self.trainer.train_loader, "base_dataloader", self.trainer.train_loader
        )
        batches = self._batches()
        host = [next(batches) for _ in range(args.gradient_accumulation_steps)]
        self._host = host[0]
        self._device = [{k: v.to(self.device) for k, v in batch.items()} for batch in host]
        self._settle()

    @property
    def batch_size(self) -> int:
        """Images of a batch."""
        return int(find_batch_size(self._host))

    @property
    def could_fuse(self) -> bool:
        """Whether the recipe's optimizer has a fused twin in torch that it does not use."""
        return str(getattr(self.trainer.args.optim, "value", "")) == "adamw_torch"

    @property
    def precision(self) -> str:
        """``fp32``, ``tf32``, ``bf16`` or ``fp16``, as seen in the forward pass."""
        found = observe_switches(self._recipe, self.trainer)
        tf32 = found["tf32_matmul"].applied or found["tf32_convolution"].applied
        seen = str(found["precision"].applied)
        return "tf32" if seen == "fp32" and tf32 else seen

    def time_loader(self, batches: int) -> tuple[float, float]:
        """Take batches from the loader, on the host, as fast as it gives them.

        Batches that workers have ready at once do not count, if an epoch is long enough.

        Returns:
            Seconds until the first batch, and seconds of a batch after that.
        """
        start = time.perf_counter()
        iterator = iter(self._loader)
        next(iterator)
        first = time.perf_counter()
        ready = self._loader.num_workers * (self._loader.prefetch_factor or 0)
        left = len(self._loader) - 1
        if left <= ready:  # a short epoch: all of it counts, as it does in training
            count = sum(1 for _ in iterator) + 1
            return first - start, (time.perf_counter() - start) / count
        for _ in itertools.islice(iterator, ready):
            pass
        begun = time.perf_counter()
        count = sum(1 for _ in itertools.islice(iterator, batches))
        return first - start, (time.perf_counter() - begun) / count

    def time_preprocessing(self, batches: int) -> float:
        """Return the seconds that a batch's augmenting, resizing and normalising take on the host.

        Measured in this process, whoever does it in training.
        """
        data: Any = self.trainer.train_dataset
        if data.location == "device":
            return 0.0
        bare = ImageBatches(self._train, self._preprocessing, "device", augment=True)
        samples = list(range(self.batch_size))
        seconds = []
        for source in (data, bare):
            begun = time.perf_counter()
            for _ in range(batches):
                source.__getitems__(samples)
            seconds.append((time.perf_counter() - begun) / batches)
        return max(seconds[0] - seconds[1], 0.0)

    def time_model(self, updates: int) -> float:
        """Run forward, backward and optimizer on batches that are on the device already.

        Returns:
            Seconds of a batch.
        """
        self._resume()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(updates):
            self._update()
        synchronize(self.device)
        return (time.perf_counter() - start) / (updates * len(self._device))

    def time_optimizer(self, updates: int, *, fused: bool = False) -> float:
        """Return the seconds of one optimizer step, with gradient clipping.

        Args:
            updates: How many are timed.
            fused: Of torch's fused AdamW instead of the recipe's optimizer.
        """
        optimizer = self._fused if fused else self._optimizer
        self._resume()
        self._accumulate()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(updates):
            self._step(optimizer)
        synchronize(self.device)
        seconds = (time.perf_counter() - start) / updates
        self.trainer.model_wrapped.zero_grad()
        return seconds

    def time_copy(self, copies: int, *, pinned: bool) -> float:
        """Copy a batch from the host to the device, and wait for it.

        Returns:
            Seconds of a batch.
        """
        batch = {k: v.pin_memory() if pinned else v.clone() for k, v in self._host.items()}
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(copies):
            for value in batch.values():
                value.to(self.device, non_blocking=pinned)
        synchronize(self.device)
        return (time.perf_counter() - start) / copies

    def time_evaluation(self, seconds: float) -> float:
        """Evaluate test images, all of them or as many as there is time for.

        Args:
            seconds: About how long it may take.

        Returns:
            Seconds for the whole test split.
        """
        self._resume()
        data: Any = self.trainer.eval_dataset
        affordable = int(seconds * self.batch_size / self.time_model(1)) + 2 * _FEW
        if affordable >= len(data):
            return self._evaluate(len(data))
        self._evaluate(affordable)  # the kernels of this batch
        few, many = self._evaluate(_FEW), self._evaluate(affordable)
        # A run starts its workers and counts its metrics once, however many images there are.
        return few + max(many - few, 0.0) * (len(data) - _FEW) / (affordable - _FEW)

    def _evaluate(self, count: int) -> float:
        data: Any = self.trainer.eval_dataset
        part = data.split.subset(count, 0)
        start = time.perf_counter()
        self.trainer.evaluate(data.for_evaluation(part))
        synchronize(self.device)
        return time.perf_counter() - start

    def time_checkpoint(self) -> float:
        """Write one checkpoint, as a run does, and return the seconds."""
        self._resume()
        start = time.perf_counter()
        self.trainer._save_checkpoint(self.trainer.model_wrapped, None)
        return time.perf_counter() - start

    def time_writing(self, size: int) -> float:
        """Return the seconds that it takes to write as many bytes as a part of a checkpoint."""
        path = Path(str(self.trainer.args.output_dir)) / "part"
        start = time.perf_counter()
        torch.save(torch.zeros(size, dtype=torch.uint8), path)
        return time.perf_counter() - start

    def checkpoint_bytes(self) -> int:
        """Return the size of a checkpoint: weights and the optimizer's state."""
        model: Any = self.trainer.model
        tensors = [*model.state_dict().values()]
        for state in self._optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(value.numel() * value.element_size() for value in tensors)

    def close(self) -> None:
        """Stop the loader's workers."""
        self.trainer.close_loaders()

    def _resume(self) -> None:
        """Be the current trainer again: accelerate keeps one state for all, the newest one's."""
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(self._state)

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield from self._loader

    def _update(self) -> None:
        self._accumulate()
        self._step(self._optimizer)
        self.trainer.model_wrapped.zero_grad()

    def _settle(self) -> None:
        """Make steps until float16's loss scale has settled: a skipped one is a quick one."""
        watch = self.trainer.loss_scale
        for _ in range(SETTLING_STEPS if watch else 0):
            before = watch.skipped_steps if watch else 0
            self._update()
            if watch and watch.skipped_steps == before:
                return

    def _accumulate(self) -> None:
        trainer = self.trainer
        items = sum(map(find_batch_size, self._device))
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        for batch in self._device:
            trainer.training_step(
                trainer.model_wrapped, batch, torch.tensor(items, device=self.device)
            )

    @cached_property
    def _fused(self) -> AcceleratedOptimizer:
        groups = [{"params": group["params"]} for group in self._optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        return AcceleratedOptimizer(optimizer, scaler=self.trainer.accelerator.scaler)

    def _step(self, optimizer: Any) -> None:
        trainer = self.trainer
        # Before gradients are clipped, float16's scale is taken out of those of each optimizer that
        # accelerate knows: of this one alone, and once.
        trainer.accelerator._optimizers = [optimizer]
        if trainer.args.max_grad_norm > 0:
            clip: Any = trainer._clip_grad_norm
            clip(trainer.model_wrapped)
        optimizer.step()
