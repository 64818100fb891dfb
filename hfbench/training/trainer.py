"""The trainer: `transformers.Trainer` with correct accumulation, complete resume and a clock."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from hfbench.data.images import ImageBatches
from hfbench.data.transforms import Preprocessing
from hfbench.errors import DeviceError, RecipeError
from hfbench.machine.allocator import keep_freed_memory
from hfbench.machine.environment import accelerator_type
from hfbench.machine.failures import say_out_of_memory
from hfbench.machine.precision import takes_float32
from hfbench.machine.settings import read_tf32, set_tf32
from hfbench.models.loading import quiet_progress
from hfbench.profiling.clock import Clock
from hfbench.profiling.timeline import Batch
from hfbench.recipe.arguments import HUB_ARGUMENTS, takes_number
from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import COMPILE_ARGUMENTS, is_compiled, not_compiled
from hfbench.results.schema import CLOCK_FILE, write_json
from hfbench.results.scores import pack
from hfbench.training.loss_scale import LossScale
from hfbench.training.overhead import ask_once_for_lomo, without_walks
from hfbench.training.resuming import ResumableTrainer

logger = logging.getLogger(__name__)

# What accelerate reads beside the backend; transformers sets the mode, and leaves it set.
_DYNAMO_DETAILS = [
    f"ACCELERATE_DYNAMO_{name}"
    for name in ("MODE", "USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION")
]
# Before a variable's name: its value as a run of this process has set it. In the environment too,
# so that windows, which put back what was around them, put back both.
_MARK = "HFBENCH_SET_"


def build_training_arguments(recipe: Recipe, output_dir: Path) -> TrainingArguments:
    """Build `TrainingArguments` that do what the recipe says, whatever the launcher says.

    Args:
        recipe: Checked against this machine already.
        output_dir: Where checkpoints go.

    Raises:
        RecipeError: If transformers refuses a combination that hfbench does not know.
    """
    values = {
        name: value for name, value in recipe.training_args.items() if name not in HUB_ARGUMENTS
    }
    if takes_float32(recipe):
        values["bf16"] = False
    if is_compiled(recipe):
        torch.compiler.reset()  # after eight recompilations torch would silently run uncompiled
    else:
        idle = [f"{name}={values[name]}" for name in COMPILE_ARGUMENTS if values.get(name)]
        if idle:
            logger.warning(f"torch_compile is false, so that {' and '.join(idle)} does nothing.")
        values |= not_compiled(recipe)  # a mode or a backend alone would turn it on again
    if accelerator_type() is None:
        values["use_cpu"] = True  # the same device, and the only way to several processes on it
    if values.get("use_cpu") and isinstance(values.get("accelerator_config"), dict):
        # Nothing is copied; transformers would warn of memory that is not pinned.
        values["accelerator_config"] = values["accelerator_config"] | {"non_blocking": False}
    values |= {
        "output_dir": str(output_dir),
        "remove_unused_columns": False,  # true deletes the image column
        "label_names": ["labels"],
        "push_to_hub": False,  # Trainer would upload training_args.bin, a pickle; hub.py pushes
    }
    for name, value in values.items():
        if takes_number(name) and isinstance(value, int):  # torch wants 0.0 for a beta, not 0
            values[name] = float(value)
    values.setdefault("run_name", recipe.name)
    # Classifiers use all their parameters; looking for unused ones walks the graph in every step.
    values.setdefault("ddp_find_unused_parameters", False)
    # The launcher's own settings would silently turn fp32 into something else.
    precision = "fp16" if values.get("fp16") else "bf16" if values.get("bf16") else "no"
    for variable, value in (
        ("ACCELERATE_MIXED_PRECISION", precision),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
    ):
        said = os.environ.get(variable)
        by_launcher = said is not None and said != os.environ.get(f"{_MARK}{variable}")
        if by_launcher and str(said).lower() != value.lower():
            logger.warning(
                f"{variable}={said} comes from the launcher and is ignored; the recipe decides."
            )
        os.environ[variable] = os.environ[f"{_MARK}{variable}"] = value
    for variable in _DYNAMO_DETAILS:  # another recipe's in this process, or the launcher's
        os.environ.pop(variable, None)
    try:
        args = TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"training_args of {recipe.name} are refused by transformers: {error}"
        ) from None
    # Without a launcher Trainer would split batches over all GPUs by DataParallel: another batch
    # size, another speed.
    args._n_gpu = min(args.n_gpu, 1)
    set_tf32(recipe.training_args.get("tf32"))
    torch.backends.cudnn.benchmark = recipe.model.cudnn_benchmark
    keep_freed_memory(recipe.model.keep_freed_memory)
    return args


def cross_entropy_loss(label_smoothing: float) -> Callable[..., Tensor]:
    """Return the one loss of every model: cross entropy, averaged over the whole accumulated batch.

    Many classifiers drop `num_items_in_batch` and would train on loss x accumulation steps
    (transformers issue 47688); others average micro-batch means, which is wrong when these differ
    in size.

    Labels are classes, (N,), or the probability of each, (N, C), where images were mixed; these are
    smoothed all the same.

    Args:
        label_smoothing: In [0, 1); the Trainer's own is bypassed by a loss function.
    """

    def loss(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        summed = nn.functional.cross_entropy(
            logits.float(), labels, reduction="sum", label_smoothing=label_smoothing
        )
        return summed / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


class EpochSampler(torch.utils.data.Sampler[int]):
    """Shuffle anew each epoch, and number each sample ``epoch * length + index``.

    The order is a function of seed and epoch, the same in every process, so that a resume goes on
    where it stopped.
    """

    def __init__(self, length: int, seed: int, epoch: Callable[[], int]) -> None:
        self.length, self.seed, self.epoch = length, seed, epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.length, generator=generator)
        yield from (order + epoch * self.length).tolist()


class BenchTrainer(ResumableTrainer):
    """A `Trainer` that measures, preprocesses where the recipe says, and resumes completely."""

    def __init__(
        self,
        *,
        preprocessing: Preprocessing,
        clock: Clock,
        requested_dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        ask_once_for_lomo()
        # A copy: the loader's own stays on the host, and gives float32.
        self.preprocessing = copy.deepcopy(preprocessing).to(self.args.device)
        self.preprocessing.dtype = requested_dtype  # the model would round to it at once
        self.clock = clock
        self.requested_dtype = requested_dtype
        self.seen_dtype: torch.dtype | None = None
        self.seen_tf32 = read_tf32()  # again when training begins
        self.train_loader: Any = None
        self._loaders: list[Any] = []
        self._stepped: nn.Module | None = None  # the model that steps are made with
        self._while_training = ExitStack()
        self.last_evaluation: tuple[int, Any] | None = None  # step and output
        self.doing = "training"  # or evaluating, and stays so if that fails
        scaler = self.accelerator.scaler
        self.loss_scale = None if scaler is None else LossScale(scaler)
        self.loss_sum: Tensor | float = 0.0  # of this process, in this session
        if not self.args.torch_compile:  # a hook would break the compiled graph
            _call_once_with_output_dtype(kwargs["model"], self._see_dtype)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; what was changed for it alone is undone afterwards."""
        with self._while_training:
            if self.args.torch_compile:
                self._while_training.enter_context(self.clock.compiling.watch())
            try:
                return super().train(*args, **kwargs)
            finally:
                self._stepped = None

    def get_train_dataloader(self) -> Any:
        """Keep the loader, to see afterwards what it did."""
        Batch.timeline = self.clock.timeline
        self.train_loader = super().get_train_dataloader()
        return self.train_loader

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer would leave out the last batch of an evaluation too.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and bool(kwargs.get("is_training"))
        try:
            loader = super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        self._loaders.append(loader)
        return loader

    def close_loaders(self) -> None:
        """Stop persistent workers.

        Left to the garbage collector, each is waited for 5 s, perhaps in the next run's time.
        """
        for loader in self._loaders:
            base = getattr(loader, "base_dataloader", loader)
            if getattr(base, "_iterator", None) is not None:
                base._iterator._shutdown_workers()
                base._iterator = None

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # At the start of an epoch, resumed or not, its whole part is the number of epochs done.
        length = len(self.train_dataset)  # type: ignore[arg-type]
        return EpochSampler(length, seed, lambda: int(self.state.epoch or 0))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Time the wait for data: here batches are fetched, before any step callback.

        As `Trainer` does it, but the number of items is asked for when they are there: with several
        processes each waits for the others to tell theirs, and not for data.
        """
        self.clock.wait_for_data()
        with self.clock.measure("data_wait"):
            batches = list(islice(epoch_iterator, num_batches))
        self.clock.timeline.enter("overhead")
        self.clock.count_samples(sum(map(find_batch_size, batches)))
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Each image has its label: to look for those to ignore takes a third of fetching a batch,
        # and labels may be on the device alone.
        images = [find_batch_size(batch) for batch in batch_samples]
        if self.args.world_size > 1:
            stand_ins = [{"labels": torch.zeros(count, device=device)} for count in images]
            return super()._get_num_items_in_batch(stand_ins, device)
        return sum(images) if images else None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if "pixel_values" not in prepared:
            self.clock.timeline.enter("preprocessing")
            # Only what is trained on has sample numbers.
            loader: Any = self.callback_handler.eval_dataloader
            source: Any = self.train_dataset if "sample" in prepared else loader.dataset
            (numbers,) = prepared.values()
            prepared = source.gather(numbers, self.preprocessing)
        if prepared["pixel_values"].dtype == torch.uint8:
            self.clock.timeline.enter("preprocessing")
            prepared["pixel_values"] = self.preprocessing(
                prepared["pixel_values"],
                prepared.pop("sample", None),
                prepared.pop("partner_pixel_values", None),
                prepared.pop("partner_sample", None),
            )
        if "mixed_labels" in prepared:
            prepared["labels"] = prepared.pop("mixed_labels")
        return prepared

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Time the forward pass, and what comes after it as the backward pass."""
        self.clock.timeline.enter("forward")
        loss = super().compute_loss(*args, **kwargs)
        self.clock.timeline.enter("backward")
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse to go on in another precision than was asked for."""
        model = args[0]
        if model is not self._stepped:
            self._stepped = model
            self.seen_tf32 = read_tf32()
            self._while_training.enter_context(without_walks(model))
        loss = super().training_step(*args, **kwargs)
        complete = self.accelerator.sync_gradients  # no micro-batch is to follow
        self.clock.timeline.enter("optimizer" if complete else "overhead")
        self.loss_sum = self.loss_sum + loss  # stays on the device
        if self.seen_dtype is not None and self.seen_dtype != self.requested_dtype:
            raise DeviceError(
                f"{self.requested_dtype} was asked for, but the forward pass ran in "
                f"{self.seen_dtype} on {self.args.device}; the result would not be what it says."
            )
        return loss

    def say_out_of_memory(self, error: BaseException) -> str:
        """Say what ran out of memory: training, or evaluating, with its own batch."""
        name = "eval" if self.doing == "evaluating" else "train"
        batch_size = getattr(self.args, f"per_device_{name}_batch_size")
        return say_out_of_memory(error, self.args.device, self.doing, batch_size)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: Trainer walks over all modules to count pixels as tokens.

        That is 764 times too much for ViT-B/16; `flops.py` counts.
        """
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Without clipping, Trainer would scale all gradients by 1 to log their norm.
        if self.args.max_grad_norm == 0:
            return None
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Time evaluations inside the training call apart."""
        with (
            self.clock.measure("evaluation", self.args.device),
            self.clock.timeline.whole("evaluation"),
        ):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Prepare the batch before Trainer looks for labels in it."""
        cudnn, parts = torch.backends.cudnn, self.args.world_size
        whole = self.args.eval_batch_size // (parts if self.accelerator.split_batches else 1)
        benchmark = cudnn.benchmark
        # To time each convolution's algorithms for the one batch of what is left does not pay.
        cudnn.benchmark = benchmark and find_batch_size(inputs) >= whole
        try:
            prepared = self._prepare_inputs(inputs)
            return super().prediction_step(model, prepared, *args, **kwargs)
        finally:
            cudnn.benchmark = benchmark

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the newest predictions: the last evaluation of training is the final one."""
        self.doing = "evaluating"
        self._share_buffers()
        output = super().evaluation_loop(*args, **kwargs)
        self.doing = "training"
        self.last_evaluation = (self.state.global_step, output)
        return output

    def _share_buffers(self) -> None:
        """Give every process the running statistics of process 0, whose model is saved.

        Each has its own after a step, so that they would classify as no model does that is kept.
        """
        if self.args.world_size > 1:
            for buffer in self.accelerator.unwrap_model(self.model).buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        with (
            self.clock.measure("save", self.args.device),
            self.clock.timeline.whole("save"),
            quiet_progress(),
        ):
            super()._write_checkpoint(folder, model, trial)
            self._save_clock(folder)  # last, with the time that this save took

    def _save_clock(self, folder: Path) -> None:
        state = self.clock.state() | {
            "loss_sum": self._loss_sum_of_all_sessions(),
            "skipped_steps": self.skipped_steps() or 0,
        }
        if self.args.should_save:
            write_json(state, folder / CLOCK_FILE)

    def skipped_steps(self) -> int | None:
        """Return how many optimizer steps of all sessions were skipped; ``None`` without scaler."""
        if self.loss_scale is None:
            return None
        return self.clock.times.skipped_steps + self.loss_scale.skipped_steps

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss scale beside each training loss."""
        if self.loss_scale is not None and "loss" in logs:
            skipped = self.skipped_steps()
            logs |= {"loss_scale": self.loss_scale.scale, "skipped_steps": float(skipped or 0)}
        super().log(logs, *args, **kwargs)

    def mean_training_loss(self) -> float | None:
        """Return the mean loss of all optimizer steps, ``None`` if it is not finite.

        Trainer's own mean is one of the last session only, and passes over what is not finite.
        """
        total = self._loss_sum_of_all_sessions()
        return None if total is None else total / max(self.state.global_step, 1)

    def _loss_sum_of_all_sessions(self) -> float | None:
        mine = torch.as_tensor(self.loss_sum, dtype=torch.float32, device=self.args.device)
        total = float(self.accelerator.reduce(mine, reduction="mean"))
        earlier = self.clock.times.loss_sum
        return None if earlier is None or not math.isfinite(total) else earlier + total

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_weights(str(self.state.best_model_checkpoint))

    def _load_weights(self, checkpoint: str) -> None:
        """Load a checkpoint through `from_pretrained`, which knows the names in it.

        Trainer loads the file with ``strict=False``, and of a ViT nothing but the head arrives.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        saved = type(model).from_pretrained(checkpoint)
        model.load_state_dict(saved.state_dict(), strict=True)

    def _see_dtype(self, dtype: torch.dtype) -> None:
        self.seen_dtype = dtype


def build_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    model: PreTrainedModel,
    preprocessing: Preprocessing,
    train: ImageBatches,
    test: ImageBatches,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
    clock: Clock,
    callbacks: list[TrainerCallback],
) -> BenchTrainer:
    """Put the parts of a run together; the caller trains.

    Raises:
        RecipeError: If transformers refuses an argument only now: a missing package, an optimizer's
            option.
    """
    dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
    try:
        trainer = BenchTrainer(
            preprocessing=preprocessing,
            clock=clock,
            requested_dtype=dtype,
            model=model,
            args=args,
            data_collator=Batch,  # collates nothing: `ImageBatches` hands out whole batches
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=pack,
            compute_loss_func=cross_entropy_loss(args.label_smoothing_factor),
            callbacks=[clock, *callbacks],
        )
        set_tf32(recipe.training_args.get("tf32"))  # accelerate turns it on for compiled models
        # Both are made again when training starts; made now, a wrong option is found before data is
        # waited for.
        trainer.create_optimizer_and_scheduler(num_training_steps=1)
    except (ImportError, ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(f"training_args of {recipe.name} are refused: {error}") from error
    trainer.optimizer = trainer.lr_scheduler = None
    return trainer


def _call_once_with_output_dtype(model: nn.Module, see: Callable[[torch.dtype], None]) -> None:
    """Report the dtype in which the first convolution or linear layer computes, once."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if first is None:
        return

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training:
            see(output.dtype)
            handle.remove()

    handle = first.register_forward_hook(hook)
