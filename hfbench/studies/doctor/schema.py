"""What `hfbench doctor` found: a schema with units in its names. A batch is one micro-batch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from hfbench.machine.environment import Environment

SCHEMA_VERSION = 1
Limit = Literal["loader", "copy", "model", "rest"]
Helps = Literal["yes", "perhaps", "no"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Side(_Part):
    """One part of training, measured alone, or all of it together.

    Attributes:
        name: ``loader``, ``model``, ``copy from pageable memory``, ``copy from pinned memory``,
            ``training``.
        seconds_per_batch: Median of the slices.
        lowest_seconds_per_batch: Of the fastest slice.
        highest_seconds_per_batch: Of the slowest slice.
        samples_per_second: Images, by the median.
        slices: How often it was measured, in turn with the others.
    """

    name: str
    seconds_per_batch: float
    lowest_seconds_per_batch: float
    highest_seconds_per_batch: float
    samples_per_second: float
    slices: int


class Step(_Part):
    """Where the time of one batch in training goes; the four parts add up to `batch_seconds`.

    Attributes:
        batch_seconds: One batch of the recipe.
        loader_seconds: Of it, waiting for the loader; on a GPU, how long it stands still meanwhile.
        copy_seconds: Of it, host to device; 0 on a CPU.
        model_seconds: Of it, forward, backward and optimizer, and preparing on the device.
        rest_seconds: What is left: Trainer's own work.
        optimizer_seconds: The part of `model_seconds` that the optimizer takes, with gradient
            clipping, shared among the batches of one optimizer step.
        preprocessing_seconds: Augmenting, resizing and normalising: a part of `model_seconds` on
            the device; on the host, measured alone, the loader's work.
        epoch_start_seconds: Once an epoch, until the loader has its first batch, less one batch.
    """

    batch_seconds: float
    loader_seconds: float
    copy_seconds: float
    model_seconds: float
    rest_seconds: float
    optimizer_seconds: float
    preprocessing_seconds: float
    epoch_start_seconds: float

    def seconds(self, part: Limit) -> float:
        """Return the seconds of one of the four parts."""
        return float(getattr(self, f"{part}_seconds"))

    def scaled(self, images: float, optimizer_steps: float) -> Step:
        """Return the step of another batch, as far as it can be told without measuring it.

        Loader, copy and model grow with the batch; the optimizer and `Trainer`'s own work do not.

        Args:
            images: How many times as many images the other batch has.
            optimizer_steps: How many times as many optimizer steps it has its share in.
        """
        optimizer = self.optimizer_seconds * optimizer_steps
        loader, copy = self.loader_seconds * images, self.copy_seconds * images
        model = (self.model_seconds - self.optimizer_seconds) * images + optimizer
        return self.model_copy(
            update={
                "batch_seconds": loader + copy + model + self.rest_seconds,
                "loader_seconds": loader,
                "copy_seconds": copy,
                "model_seconds": model,
                "optimizer_seconds": optimizer,
                "preprocessing_seconds": self.preprocessing_seconds * images,
            }
        )

    def speedup_without(self, seconds: float) -> float:
        """Return how many times as fast training were if a part of the batch's time went away.

        Amdahl's law (Validity of the single processor approach, AFIPS 1967,
        doi:10.1145/1465482.1465560).
        """
        left = max(self.batch_seconds - seconds, 1e-3 * self.batch_seconds)
        return self.batch_seconds / left


class Forecast(_Part):
    """What the whole run will take.

    Attributes:
        samples_per_second: Training in the steady state.
        lowest_samples_per_second: Lower end of the range.
        highest_samples_per_second: Upper end.
        optimizer_steps: Of the whole run.
        train_seconds: All steps, the first one and the epochs' beginnings included.
        evaluation_seconds: All evaluations inside the training call.
        save_seconds: All checkpoints.
        final_evaluation_seconds: After training: the train split, and the test split unless the
            last step was evaluated.
        execution_seconds: Of training, evaluations and checkpoints, as `Times.execution_seconds`
            of a run; the final evaluation comes after it.
        lowest_execution_seconds: Lower end of the range.
        highest_execution_seconds: Upper end.
        note: How far the range can be trusted.
    """

    samples_per_second: float
    lowest_samples_per_second: float
    highest_samples_per_second: float
    optimizer_steps: int
    train_seconds: float
    evaluation_seconds: float
    save_seconds: float
    final_evaluation_seconds: float
    execution_seconds: float
    lowest_execution_seconds: float
    highest_execution_seconds: float
    note: str


class Advice(_Part):
    """Whether one technique can make this recipe faster on this machine.

    Attributes:
        technique: Its name in `techniques.TECHNIQUES`.
        in_recipe: Whether the recipe has it already.
        helps: ``yes`` if what was measured says so, ``perhaps`` if there is room, else ``no``.
        speedup_at_most: Upper bound by what was measured; ``None`` if nothing bounds it.
        speedup_measured: Where it was tried; ``None`` if not.
        sentence: The reason, with the numbers.
    """

    technique: str
    in_recipe: bool
    helps: Helps
    speedup_at_most: float | None
    speedup_measured: float | None
    sentence: str


class MatrixProduct(_Part):
    """Speed of square matrix products in one dtype on this device.

    Attributes:
        dtype: ``fp32``, ``tf32``, ``bf16``, ``fp16``.
        flops_per_second: A multiplication and an addition are two operations.
        ratio_to_fp32: Against fp32 without TF32.
    """

    dtype: str
    flops_per_second: float
    ratio_to_fp32: float


class Machine(_Part):
    """What this machine has for training, and what it lacks.

    Attributes:
        threads: That torch uses for one operation.
        physical_cores: That this process may use.
        free_memory_mib: Of the host.
        free_device_memory_mib: Of the accelerator; ``None`` without one.
        compiler: That torch.compile needs; ``None`` if it is missing.
        matrix_products: One dtype each.
        lacks: What it lacks and what is set wrongly, a sentence each.
    """

    threads: int
    physical_cores: int
    free_memory_mib: float
    free_device_memory_mib: float | None
    compiler: str | None
    matrix_products: list[MatrixProduct]
    lacks: list[str]

    def ratio(self, dtype: str) -> float | None:
        """Return how many times as fast as fp32 matrix products are; ``None`` if not measured."""
        found = [item.ratio_to_fp32 for item in self.matrix_products if item.dtype == dtype]
        return found[0] if found else None


class AccumulationCheck(_Part):
    """The same images in one batch and in several: gradients must be the same.

    Attributes:
        samples: Images of the one batch.
        micro_batches: That they were split into.
        loss_of_one_batch: First loss with batch (samples, 1).
        loss_accumulated: First loss with (samples / micro_batches, micro_batches).
        loss_expected: Mean over the micro-batches, computed without `Trainer`.
        gradient_norm_of_one_batch: Euclidean norm over all parameters.
        gradient_norm_accumulated: The same, accumulated by `Trainer`.
        gradient_norm_expected: The same, of the mean loss, computed without `Trainer`.
        gradient_difference: Norm of (accumulated - expected) / norm of expected.
        tolerance: Allowed relative difference, by precision.
        batch_statistics: Whether the model normalises over the batch: then one batch and several
            differ by right, and only the expected values count.
        passed: Whether the accumulated loss and gradient are what they should be.
        sentence: What was found.
    """

    samples: int
    micro_batches: int
    loss_of_one_batch: float
    loss_accumulated: float
    loss_expected: float
    gradient_norm_of_one_batch: float
    gradient_norm_accumulated: float
    gradient_norm_expected: float
    gradient_difference: float
    tolerance: float
    batch_statistics: bool
    passed: bool
    sentence: str


class Diagnosis(_Part):
    """Everything that `hfbench doctor` found about one recipe on this machine.

    Attributes:
        verdict: Best first: the answer in two or three sentences.
        limited_by: The part of a step whose end would make training fastest; ``rest`` is Trainer's
            own work.
        measured_batch_size: Micro-batch that was measured; smaller than the recipe's where the
            machine is too slow for it. `sides` are of this one, `step` is scaled to the recipe's.
        precision: In which the model computed.
        sides: Each alone, and training as a whole.
        advice: One for each technique, most helpful first.
        accumulation: ``None`` for recipes without.
        notes: What limits these findings, a sentence each.
        loading_seconds: Of model and data; a part of `seconds`.
        seconds: That the examination took, imports aside.
    """

    schema_version: int = SCHEMA_VERSION
    recipe: str
    recipe_sha256: str
    verdict: str
    limited_by: Limit
    batch_size: int
    measured_batch_size: int
    gradient_accumulation_steps: int
    precision: str
    sides: list[Side]
    step: Step
    forecast: Forecast
    advice: list[Advice]
    machine: Machine
    accumulation: AccumulationCheck | None
    notes: list[str]
    environment: Environment
    loading_seconds: float
    seconds: float
