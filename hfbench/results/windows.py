"""What a short window of training leaves behind: its schema, with units in the names."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from hfbench.results.schema import Switch


class Window(BaseModel):
    """What was measured in one window.

    Attributes:
        steps: Optimizer steps that were measured.
        warmup_steps: Optimizer steps before them.
        samples: Images of the measured steps.
        seconds: Wall time of the measured steps.
        data_wait_seconds: The part of it in which batches were waited for, and on a GPU nothing was
            computed.
        phase_seconds: All of it, by `timeline.PHASES`; on a GPU as its own stream of work has them.
        first_loss: Training loss of the first optimizer step, before any update: the mean over its
            images; ``None`` if it is not finite.
        peak_process_memory_mib: Resident memory of this process, from model to last step.
        peak_device_memory_mib: Allocated by torch; ``None`` on a CPU.
        switches: What was asked for and what was seen to happen, as in a run's result.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    warmup_steps: int
    samples: int
    seconds: float
    data_wait_seconds: float
    phase_seconds: dict[str, float]
    first_loss: float | None
    peak_process_memory_mib: float
    peak_device_memory_mib: float | None
    switches: dict[str, Switch]

    @property
    def samples_per_second(self) -> float:
        """Images per second."""
        return self.samples / self.seconds

    @property
    def seconds_per_step(self) -> float:
        """Seconds of one optimizer step."""
        return self.seconds / self.steps

    @property
    def precision(self) -> str:
        """``fp32``, ``fp16`` or ``bf16``, as seen in the forward pass where that can be seen."""
        return str(self.switches["precision"].applied)


class FirstLoss(BaseModel):
    """The first loss of one configuration against what it should be.

    Attributes:
        expected: By a plain loop in fp32 over the same images and micro-batches; ``None`` if it
            cannot be told.
        found: By the trainer; ``None`` if it was not finite.
        tolerance: How far apart they may be, relative, or absolute where `expected` is below 1;
            ``None`` without `expected`.
        problem: A sentence if they are further apart, or if `expected` cannot be told.
        flagged: Whether they are further apart.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    expected: float | None
    found: float | None
    tolerance: float | None
    problem: str | None
    flagged: bool
