"""What a run leaves behind: its schema, units in the names, and how it is saved and found."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, field_validator

from hfbench.errors import ResultError
from hfbench.machine.bounds import parse_json, read_text
from hfbench.machine.environment import Environment
from hfbench.recipe.schema import Recipe, local_path

# 2 added budget, compute, energy and calibration_error; 3 driver, power limit,
# MIG profile and conditions.
SCHEMA_VERSION = 3
_READABLE_VERSIONS = (1, 2, 3)  # what older ones do not have is None
RESULT_FILE = "result.json"
RECIPE_FILE = "recipe.json"
PREDICTIONS_FILE = "predictions.npz"
LOG_FILE = "log.jsonl"
CLOCK_FILE = "clock.json"  # in a checkpoint
CURVES_FILE = "curves.png"
CONFUSION_FILE = "confusion.png"

TIMED_DEVICES = ("cuda", "xpu")  # whose streams can be given timed events
_LARGEST_NUMBER = 1e300


class Part(BaseModel):
    """A part of a file of results: finite numbers of a sensible size, and nothing unknown."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*")
    @classmethod
    def _is_measured(cls, value: Any) -> Any:
        """Refuse what nothing measures, and what overflows as soon as somebody computes with it."""
        if isinstance(value, int | float) and abs(value) > _LARGEST_NUMBER:
            raise ValueError("no measurement is so large")
        return value


class Switch(Part):
    """One technique: what the recipe says and what was seen to happen.

    Attributes:
        requested: From the recipe, or the library's default.
        applied: Observed while running.
        reason: Why they differ, why `applied` was not seen, or what it costs here; else ``None``.
    """

    requested: Any
    applied: Any
    reason: str | None = None


class SplitMetrics(Part):
    """Measured on one split without augmentation; shares in [0, 1].

    Attributes:
        samples: Number of images.
        loss: Mean cross entropy in nats, without label smoothing; ``None`` if it is not finite.
        f1_macro: Over the classes that are present or predicted, as in scikit-learn.
        f1_per_class: Of these classes alone.
        top5_accuracy: ``None`` with fewer than 20 classes.
        calibration_error: Expected calibration error, `calibration.calibration_error`; ``None`` if
            it was not measured.
    """

    samples: int
    loss: float | None
    accuracy: float
    f1_macro: float
    f1_weighted: float
    f1_per_class: dict[str, float]
    top5_accuracy: float | None
    calibration_error: float | None = None


class Metrics(Part):
    """Both splits; ``None`` where labels mean nothing (synthetic data)."""

    test: SplitMetrics | None
    train: SplitMetrics | None


class Times(Part):
    """Seconds of wall time, summed over the sessions of a resumed run.

    Attributes:
        setup_seconds: Imports aside, from the start to the training call: data, model, trainer.
        execution_seconds: The whole training call, evaluation and checkpoints included.
        train_seconds: `execution_seconds` less the evaluations and checkpoints in it.
        first_step_seconds: The first optimizer step, its data included (compilation, kernel
            selection).
        data_wait_seconds: Inside training, waiting for batches, as the host has it; see
            `Result.waited_seconds`.
        evaluation_seconds: Evaluations inside the training call.
        save_seconds: Checkpoints inside the training call.
        final_evaluation_seconds: After training: test and train split.
        final_save_seconds: After training: model and predictions.
        analysis_seconds: After training: FLOPs, the peak of the device, the environment.
        paused_seconds: For which the process was stopped, or held by a debugger; in no other part.
        keeping_seconds: For what hfbench does to be able to resume: checkpoints after the last step
            and on a stop, checksums; in no other part.
        compile_seconds: Inside the training call: compiling, which is in no steady state; ``None``
            in older results.
        total_seconds: Set-up, execution, what follows it, pauses and keeping.
    """

    setup_seconds: float
    execution_seconds: float
    train_seconds: float
    first_step_seconds: float | None
    data_wait_seconds: float
    evaluation_seconds: float
    save_seconds: float
    final_evaluation_seconds: float
    final_save_seconds: float
    analysis_seconds: float = 0.0
    paused_seconds: float = 0.0
    keeping_seconds: float = 0.0
    compile_seconds: float | None = None
    total_seconds: float


class TimeBudget(Part):
    """Where `execution_seconds` went: a partition of the training call, in seconds.

    On CUDA the steps are timed by events on the device's own timeline, so that what the host did
    meanwhile is not counted twice: `data_wait_seconds` here is how long the device stood still.

    Attributes:
        start_seconds: Before the first batch is asked for: loader, optimizer, a checkpoint's state.
        first_step_seconds: First optimizer step of each session (compilation, kernel selection).
        data_wait_seconds: Waiting for batches.
        copy_seconds: Host to device.
        preprocessing_seconds: Augmenting and resizing on the device; 0 with location "host".
        forward_seconds: Model and loss.
        backward_seconds: Gradients.
        optimizer_seconds: Gradient clipping, optimizer, learning rate, zeroing gradients.
        evaluation_seconds: Evaluations inside the training call.
        save_seconds: Checkpoints inside the training call.
        overhead_seconds: Trainer's bookkeeping between these: callbacks, logging, and with several
            processes the exchange of how many images the batch of each has.
    """

    start_seconds: float
    first_step_seconds: float
    data_wait_seconds: float
    copy_seconds: float
    preprocessing_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    evaluation_seconds: float
    save_seconds: float
    overhead_seconds: float


class Compute(Part):
    """Arithmetic of the training step; a multiplication and an addition are two operations.

    Attributes:
        dtype: In which the model computed: ``fp32``, ``tf32``, ``bf16``, ``fp16``.
        forward_flops_per_image: Of one forward pass, counted by torch.
        train_flops_per_image: Of forward and backward pass.
        achieved_flops_per_second: In the steady state, over all processes.
        peak_flops_per_second: Of one device, by a matrix product in `dtype` on this machine.
        utilization: Achieved over peak of all devices, in [0, 1] but for noise.
        note: Why a value is ``None``.
    """

    dtype: str
    forward_flops_per_image: int | None
    train_flops_per_image: int | None
    achieved_flops_per_second: float | None
    peak_flops_per_second: float | None
    utilization: float | None
    note: str | None = None


class Energy(Part):
    """Energy of the training call, summed over sessions; ``None`` where the machine keeps no count.

    Attributes:
        device_joules: Of the GPUs in use, by NVML's counter.
        cpu_joules: Of all CPU packages, by RAPL, whatever else ran on them included.
        note: Why a value is ``None``.
    """

    device_joules: float | None
    cpu_joules: float | None
    note: str | None = None


class Conditions(Part):
    """What else went on while the training call was measured, over all sessions.

    Attributes:
        other_processes: On the GPUs in use, by NVML: the most that were seen at one time, once a
            minute; ``None`` if nobody could look.
        other_processes_mib: The most device memory that they held.
        note: Why a value is ``None``.
    """

    other_processes: int | None
    other_processes_mib: float | None
    note: str | None = None


class Throughput(Part):
    """Training speed in the steady state.

    Attributes:
        samples_per_second: Over all processes, warm-up steps, evaluations and checkpoints excluded;
            ``None`` if the run was too short to have a steady state.
        warmup_steps: Optimizer steps left out at the start of each session.
        measured_samples: Images that were counted.
        measured_seconds: Wall time that they took.
    """

    samples_per_second: float | None
    warmup_steps: int
    measured_samples: int
    measured_seconds: float


class Memory(Part):
    """Peaks of the main process over the whole run.

    Attributes:
        peak_process_memory_mib: Resident memory; data loader workers not included.
        peak_device_memory_mib: Allocated by torch on the accelerator; ``None`` without one, or
            where torch cannot tell.
    """

    peak_process_memory_mib: float
    peak_device_memory_mib: float | None


class Training(Part):
    """How much was trained.

    Attributes:
        effective_batch_size: Per device x accumulation x devices.
        train_loss: Mean of the training loss as optimised, with label smoothing; ``None`` if not
            finite.
        sessions: 1, and one more for each resume.
        skipped_steps: Optimizer steps that were skipped since gradients overflowed in float16;
            ``None`` without a loss scale, and in older results.
        loss_scale: At the end; ``None`` without one.
        compilations: Graphs that were compiled in training, forward and backward apart; ``None`` in
            older results.
    """

    optimizer_steps: int
    epochs: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    effective_batch_size: int
    train_loss: float | None
    sessions: int
    skipped_steps: int | None = None
    loss_scale: float | None = None
    compilations: int | None = None


class ModelInfo(Part):
    """The classifier that was trained.

    Attributes:
        architecture: Class, and timm's name where there is one.
        initialization: ``pretrained``, ``timm`` or ``transformers`` (their fresh weights).
        revision: Commit on the Hub; ``None`` for a folder or fresh weights.
        parameters: Number of trainable parameters.
    """

    architecture: str
    initialization: str
    revision: str | None
    parameters: int


class DataInfo(Part):
    """The images that were used.

    Attributes:
        revision: Commit of the data set on the Hub; ``None`` for anything else.
        eval_fingerprint: SHA-256 of the test images and labels in order; equal only for the same
            test.
        notes: What was changed when reading, and what is odd about it, a sentence each.
        test_in_train: Test images that are equal to training images; ``None`` in older results.
        test_doubles: Test images that are equal to others of them; the same.
        train_doubles: Training images that are equal to others of them; the same.
    """

    revision: str | None
    train_samples: int
    eval_samples: int
    label_names: list[str]
    image_height: int
    image_width: int
    train_fingerprint: str
    eval_fingerprint: str
    notes: list[str]
    test_in_train: int | None = None
    test_doubles: int | None = None
    train_doubles: int | None = None


class HubInfo(Part):
    """Where the model was pushed."""

    repo_id: str
    revision: str | None
    url: str
    commit: str


class Result(Part):
    """One finished run."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    created_at: str
    recipe: Recipe
    recipe_sha256: str
    model: ModelInfo
    data: DataInfo
    training: Training
    metrics: Metrics
    times: Times
    throughput: Throughput
    memory: Memory
    switches: dict[str, Switch]
    environment: Environment
    hub: HubInfo | None = None
    budget: TimeBudget | None = None
    compute: Compute | None = None
    energy: Energy | None = None
    conditions: Conditions | None = None
    predictions_sha256: str | None = None  # of predictions.npz; None of an older result

    _folder: Path | None = PrivateAttr(None)

    @property
    def folder(self) -> Path | None:
        """Where it was loaded from, with predictions and log; ``None`` if it was not loaded."""
        return self._folder

    @property
    def waited_seconds(self) -> float:
        """Seconds of training in which nothing was computed, since batches were waited for.

        Where a device has a timeline of its own, as that has it: a host that waits in a copy until
        the device is done waits for computing, not for data.
        """
        if self.budget is not None and self.environment.device_type in TIMED_DEVICES:
            return self.budget.data_wait_seconds
        return self.times.data_wait_seconds

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return int(self.recipe.argument("seed"))

    def __eq__(self, other: object) -> bool:
        """Compare what was measured, not where it is kept."""
        return isinstance(other, Result) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Run:
    """A run's folder, finished or not.

    Attributes:
        folder: ``runs/<recipe name>/<run id>``.
        recipe: As resolved; ``None`` if it cannot be read any more.
        finished: Whether the result is there.
    """

    folder: Path
    recipe: Recipe | None
    finished: bool


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file atomically: readers see the old file, or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_result(result: Result, folder: Path) -> Path:
    """Write ``result.json`` into a run's folder; its presence means that the run is finished."""
    path = folder / RESULT_FILE
    write_json(result.model_dump(mode="json", by_alias=True), path)
    return path


def load_result(path: str | os.PathLike[str]) -> Result:
    """Load a result.

    Args:
        path: ``result.json``, a run's folder, or a recipe's folder under ``runs/``, which stands
            for its newest finished run.

    Raises:
        ResultError: If there is none, or it was written by a newer version of the schema.
    """
    return _read(_find_results(local_path(path))[-1])


def load_results(path: str | os.PathLike[str]) -> list[Result]:
    """Load all finished runs of a recipe's folder, oldest first; of a run's folder, this one.

    Args:
        path: As for `load_result`, but ``runs/<recipe name>`` stands for everything in it.

    Raises:
        ResultError: If there is none, or some cannot be read; all of these are listed.
    """
    results, problems = load_readable(path)
    if problems:
        raise ResultError("\n".join(problems))
    return results


def load_readable(path: str | os.PathLike[str]) -> tuple[list[Result], list[str]]:
    """Load as `load_results`, but leave out what cannot be read, unless that is all there is.

    Returns:
        The results, and what is wrong with each of the others.

    Raises:
        ResultError: If there is none, or none can be read.
    """
    results, problems = [], []
    for file in _find_results(local_path(path)):
        try:
            results.append(_read(file))
        except ResultError as error:
            problems.append(str(error))
    if not results:
        raise ResultError("\n".join(problems))
    return results, problems


def _read(file: Path) -> Result:
    try:
        content = parse_json(read_text(file))
    except (OSError, ValueError) as error:
        raise ResultError(f"{file} cannot be read: {error}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in _READABLE_VERSIONS:
        raise ResultError(
            f"{file} has schema_version {version}, expected {SCHEMA_VERSION}; run the recipe again."
        )
    try:
        result = Result.model_validate(content)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ResultError.from_problems(str(file), found) from None
    seed = result.recipe.argument("seed")
    if not isinstance(seed, int):
        raise ResultError(f"{file}: recipe.training_args.seed is {seed!r}, expected a whole number")
    result._folder = file.parent
    return result


def find_runs(root: Path) -> Iterator[Run]:
    """Find the runs in a folder, sorted by recipe name and time."""
    for file in sorted(root.glob(f"*/*/{RECIPE_FILE}")):
        try:
            recipe = Recipe.model_validate(parse_json(read_text(file)))
        except (OSError, ValueError):
            recipe = None
        yield Run(file.parent, recipe, (file.parent / RESULT_FILE).is_file())


def _find_results(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / RESULT_FILE).is_file():
        return [path / RESULT_FILE]
    finished = sorted(path.glob(f"*/{RESULT_FILE}"))
    if finished:
        return finished
    if (path / RECIPE_FILE).is_file():
        raise ResultError(
            f"{path} holds a run that is not finished; go on with it: hfbench recipe … --resume"
        )
    if path.is_dir():
        raise ResultError(
            f"{path} holds no result.json and no finished run; see what there is with: hfbench list"
        )
    raise ResultError(f"{path} does not exist; see what there is with: hfbench list")
