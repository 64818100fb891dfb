"""What makes a run that was stopped or killed end like one that was not.

Trainer forgets three things when it goes on from a checkpoint: the part of the loss that was not
logged yet, an evaluation that was due at the checkpoint's step, and the end of an epoch that the
checkpoint was written before. `ResumableTrainer` keeps them in the checkpoint and makes up for
them. It also writes checkpoints of its own, which no recipe asks for and no time of a run counts:
when it is stopped, and after the last step, before anything else can fail.

On a CPU such a run ends with the same weights, bit for bit. On CUDA two equal runs differ already,
since some sums have no fixed order there; a resumed one is meant to be no farther from them.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, rotate_checkpoints

from hfbench.profiling.clock import Clock
from hfbench.results.manifest import replacing, seal
from hfbench.results.schema import write_json
from hfbench.training.callbacks import StopOnSignal

FLOW_FILE = "flow.json"  # in a checkpoint

logger = logging.getLogger(__name__)


class EvaluationStoppedError(Exception):
    """Ends an evaluation inside the training call, which a resumed run makes anew."""


@dataclass(frozen=True)
class Flow:
    """What a checkpoint's step still had before it, and what the next log line needs.

    Attributes:
        evaluate: Whether an evaluation was due at this step.
        save: Whether a checkpoint was, by the recipe.
        epoch_end: Whether the epoch's end was still to come.
        last_logged: Step of the last log line of a loss.
        loss: Summed since then, mean over the processes; ``None`` if it is not finite.
        grad_norm: Of this step; ``None`` if it is not finite, or was not measured. On the device
            until a checkpoint is written, since to read it would wait for the device in each step.
        learning_rate: Of this step.
    """

    evaluate: bool = False
    save: bool = False
    epoch_end: bool = False
    last_logged: int = 0
    loss: float | None = 0.0
    grad_norm: torch.Tensor | float | None = None
    learning_rate: float | None = None


class _Place(TrainerCallback):
    """Knows whether Trainer last came to the end of a step or of an epoch."""

    def __init__(self) -> None:
        self.after_step = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note a step's end."""
        self.after_step = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note an epoch's end."""
        self.after_step = False


class ResumableTrainer(Trainer):
    """A `Trainer` whose checkpoints are whole, and hold what was still to be done."""

    clock: Clock

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        found = (c for c in self.callback_handler.callbacks if isinstance(c, StopOnSignal))
        self._stop = next(found, None)
        self._place = _Place()
        self.add_callback(self._place)
        self._flow = Flow()  # of the step that ended last
        self.stopped = False  # on a signal, with something left to do
        self._earlier: tuple[Path, Flow] | None = None  # what is to be made up for
        self._generators: tempfile.TemporaryDirectory[str] | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; go on from a checkpoint as if there had been no interruption."""
        if resume_from_checkpoint:
            place = Path(resume_from_checkpoint)
            kept = json.loads((place / FLOW_FILE).read_text("utf-8"))
            self._earlier = (place, Flow(**kept))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _signalled(self) -> bool:
        return self._stop is not None and self._stop.stopped

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        def go_on() -> None:
            super(ResumableTrainer, self)._maybe_log_save_evaluate(
                tr_loss,
                grad_norm,
                model,
                trial,
                epoch,
                ignore_keys_for_eval,
                start_time,
                learning_rate=learning_rate,
            )

        if self.stopped:
            return  # Trainer takes a stop for the end of an epoch
        control, state = self.control, self.state
        last = state.global_step >= state.max_steps
        stopping = self._signalled() and not last
        complete = float(state.epoch or 0).is_integer() or (
            control.should_training_stop and not stopping
        )
        self._flow = Flow(
            evaluate=control.should_evaluate,
            save=control.should_save,
            epoch_end=self._place.after_step and complete,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
        )
        if stopping or (last and self._keeps_last() and not self._saves_at_once()):
            control.should_evaluate = control.should_save = False
            go_on()  # the log line comes first, as ever
            self._save_of_our_own(model, trial, needed=stopping)
            if stopping:
                self._halt()
                return
            control.should_evaluate, control.should_save = self._flow.evaluate, self._flow.save
        self._evaluate_or_stop(go_on, model, trial)

    def _halt(self) -> None:
        self.stopped = self.control.should_training_stop = True
        self.control.should_evaluate = self.control.should_save = False

    def _keeps_last(self) -> bool:
        """Tell whether this is the last step's end of a run; a window has nothing to keep."""
        return self._stop is not None and self._place.after_step

    def _saves_at_once(self) -> bool:
        """Tell whether the recipe itself saves after the last step before anything is evaluated."""
        if self._flow.save and not self._flow.evaluate:
            return True
        by_epoch = self.args.save_strategy == SaveStrategy.EPOCH
        evaluated = self._flow.evaluate or self.args.eval_strategy == IntervalStrategy.EPOCH
        return by_epoch and not evaluated

    def _evaluate_or_stop(self, go_on: Any, model: nn.Module, trial: Any) -> None:
        """Log, evaluate and save what is due; where a signal ends the evaluation, keep that it is.

        The generators are put back, since the evaluation will be made again from its beginning.
        """
        if not self.control.should_evaluate or self._stop is None:
            go_on()
            return
        spent = self.clock.times.evaluation_seconds
        with tempfile.TemporaryDirectory() as generators:
            with self.clock.set_aside(self.args.device):
                self._save_rng_state(generators)
            try:
                go_on()
                return
            except EvaluationStoppedError:
                super()._load_rng_state(generators)
        self.clock.take_back("evaluation", self.clock.times.evaluation_seconds - spent)
        if self.state.global_step < self.state.max_steps:  # else it is there already
            self._save_of_our_own(model, trial, needed=True)
        self._halt()

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; a checkpoint that is written afterwards has seen it."""
        found = super()._evaluate(*args, **kwargs)
        self._flow = replace(self._flow, evaluate=False, save=False)
        return found

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """End an evaluation in training when a signal has come."""
        if self.is_in_train and self._signalled():
            raise EvaluationStoppedError
        return super().prediction_step(*args, **kwargs)

    def _save_of_our_own(self, model: nn.Module, trial: Any, *, needed: bool) -> None:
        """Write a checkpoint that the recipe does not ask for; its time is in no part of the run.

        Args:
            model: Trainer's.
            trial: Trainer's.
            needed: Whether it is all that is left. If not, training goes on without.
        """
        with self.clock.set_aside(self.args.device):
            try:
                self._save_checkpoint(model, trial)
            except Exception as error:  # of several libraries; which one, the disk decides
                if needed:
                    raise
                logger.warning(
                    f"The checkpoint after the last step cannot be written: {error} Training is "
                    "done; if evaluating or saving fails, it is lost."
                )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        limit = self.args.save_total_limit
        first = self.args.should_save
        with replacing(folder) if first else nullcontext():
            folder.mkdir(parents=True, exist_ok=True)
            self.args.save_total_limit = None  # an older one goes when the new one is sealed
            try:
                self._write_checkpoint(folder, model, trial)
            finally:
                self.args.save_total_limit = limit
            with self.clock.set_aside(self.args.device):
                self.accelerator.wait_for_everyone()
                if first:
                    seal(folder)
        if first:
            rotate_checkpoints(
                output_dir=str(self.args.output_dir),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        mean = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean")
        if self.args.should_save:
            kept = replace(
                self._flow,
                last_logged=self._globalstep_last_logged,
                loss=_finite(mean),
                grad_norm=_finite(self._flow.grad_norm),
            )
            write_json(asdict(kept), folder / FLOW_FILE)

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        self._make_up_for(kwargs["model"], kwargs["start_time"])
        if not self.stopped:  # once more, in what was made up for
            super()._run_epoch(**kwargs)  # type: ignore[no-untyped-call]

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._make_up_for(self.model_wrapped, start_time)  # where no epoch was left
        return super()._finalize_training(  # type: ignore[no-untyped-call]
            trial, num_train_samples, start_time
        )

    def _make_up_for(self, model: nn.Module, start_time: float) -> None:
        """Do what was due at the checkpoint's step and is missing."""
        if self._earlier is None:
            return
        (place, flow), self._earlier = self._earlier, None
        self._tr_loss += math.nan if flow.loss is None else flow.loss
        self._globalstep_last_logged = flow.last_logged
        if not (flow.evaluate or flow.epoch_end):
            return
        self._load_rng_state(str(place))

        def settle() -> None:
            self._maybe_log_save_evaluate(
                self._tr_loss,
                flow.grad_norm,
                model,
                None,
                float(self.state.epoch or 0),
                None,
                start_time,
                learning_rate=flow.learning_rate,
            )

        if flow.evaluate:
            # A checkpoint that was written before the end of an epoch ended a step.
            self._place.after_step = flow.epoch_end
            self.control.should_evaluate, self.control.should_save = True, flow.save
            settle()
        if flow.epoch_end and not self.stopped:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            settle()
        self._generators = tempfile.TemporaryDirectory()
        self._save_rng_state(self._generators.name)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the generators; what was made up for has taken them past the checkpoint's."""
        if self._generators is None:
            super()._load_rng_state(checkpoint)
            return
        with self._generators as folder:
            super()._load_rng_state(folder)
        self._generators = None


def _finite(value: torch.Tensor | float | None) -> float | None:
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None
