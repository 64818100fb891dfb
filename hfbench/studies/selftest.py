"""What only the machine at hand can show, tried in minutes: ``hfbench selftest``.

On a GPU each check runs on it; without one its emulated half runs, and says so. Everything is made
up or embedded: no network, no data, no checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

import hfbench
from hfbench.errors import DeviceError, HfbenchError, Interrupted, first_line
from hfbench.errors.harmless import message
from hfbench.machine.environment import Environment, describe_environment
from hfbench.machine.failures import is_out_of_memory
from hfbench.profiling.clock import reset_memory, synchronize
from hfbench.recipe.schema import Recipe, check_recipe
from hfbench.results.manifest import has_checkpoint
from hfbench.results.schema import Result, find_runs
from hfbench.studies.emulation import float16_on_cpu
from hfbench.studies.suite.processes import last_lines
from hfbench.studies.windows import Bench, with_arguments
from hfbench.training.run import run_recipe
from hfbench.training.trainer import BenchTrainer

SELFTEST_VERSION = 1

_CONVOLUTIONAL = "timm/test_resnet.r160_in1k"  # 0.4 million parameters, with batch norm
_TRANSFORMER = "timm/test_vit.r160_in1k"  # the same without
# A batch that no GPU holds: each image takes two gigabytes of this model's activations.
_LARGE_MODEL, _MANY_IMAGES, _LARGE_SIZE = "timm/resnet50.a1_in1k", 1024, 1024
_UNSEEN_SECONDS = 0.1  # before and after the clock of a run, on a busy machine
_WITHIN = 0.02  # of each other: what the device's events and the host's clock say of a run


class Outcome(BaseModel):
    """What one check found.

    Attributes:
        name: Of the check.
        outcome: ``passed``, ``failed``, or ``not run``, with the reason in `said`.
        said: What was seen, in a sentence.
        seconds: That it took.
        emulated: Whether a CPU stood in for the GPU.
        details: The traceback of a failure.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    outcome: Literal["passed", "failed", "not run"]
    said: str
    seconds: float
    emulated: bool
    details: str | None = None


class SelfTest(BaseModel):
    """All outcomes, and where they were found: what to attach to a report of a fault."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SELFTEST_VERSION
    created_at: str
    hfbench: str
    environment: Environment
    seconds: float
    outcomes: list[Outcome]

    @property
    def failed(self) -> list[Outcome]:
        """The checks that failed."""
        return [outcome for outcome in self.outcomes if outcome.outcome == "failed"]


class BrokenError(Exception):
    """A check found something that is not as it should be."""


class NotHereError(Exception):
    """A check needs what this machine lacks."""


@dataclass(frozen=True)
class Ground:
    """Where checks run.

    Attributes:
        device: That training takes place on.
        folder: For files, a new one for each check.
    """

    device: torch.device
    folder: Path

    @property
    def is_gpu(self) -> bool:
        """Whether it is an accelerator; else it is emulated."""
        return self.device.type != "cpu"


Check = Callable[[Ground], str]
Observer = Callable[[Outcome], None]


def run_selftest(seconds: float = 300.0, observer: Observer | None = None) -> SelfTest:
    """Try everything, one after the other.

    Args:
        seconds: No check begins later.
        observer: Told of each outcome.
    """
    start, outcomes = time.perf_counter(), []
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    for name, check in CHECKS.items():
        if time.perf_counter() - start > seconds:
            left = "no time left; more --seconds"
            outcome = Outcome(name=name, outcome="not run", said=left, seconds=0, emulated=False)
        else:
            outcome = _try(name, check, device)
        outcomes.append(outcome)
        if observer:
            observer(outcome)
    return SelfTest(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        hfbench=hfbench.__version__,
        environment=describe_environment(device.type),
        seconds=time.perf_counter() - start,
        outcomes=outcomes,
    )


def _try(name: str, check: Check, device: torch.device) -> Outcome:
    start, details = time.perf_counter(), None
    found: Literal["passed", "failed", "not run"] = "passed"
    with tempfile.TemporaryDirectory(prefix="hfbench-selftest-") as folder:
        ground = Ground(device, Path(folder))
        printed = io.StringIO()  # what libraries print; it matters where something fails
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                said = check(ground)
        except NotHereError as lack:
            found, said = "not run", str(lack)
        except Exception as error:  # whatever is broken, the other checks are worth their time
            found, said = "failed", first_line(error)
            lines = [*last_lines(printed.getvalue()), traceback.format_exc()]
            details = message("\n".join(lines)).replace(folder, "FOLDER")
    return Outcome(
        name=name,
        outcome=found,
        said=said,
        seconds=time.perf_counter() - start,
        emulated=found != "not run" and not ground.is_gpu,
        details=details,
    )


def require(condition: bool, otherwise: str) -> None:
    """Raise `BrokenError` with what is wrong, unless a condition holds."""
    if not condition:
        raise BrokenError(otherwise)


def small_recipe(ground: Ground, model: str = _CONVOLUTIONAL, **changes: Any) -> Recipe:
    """Return a recipe of a second: fresh weights, embedded digits.

    Args:
        ground: Where it runs.
        model: Known without a checkpoint.
        **changes: `training_args`; ``location`` and ``image_size`` of preprocessing; ``dataset``.
    """
    location, image_size = changes.pop("location", "host"), changes.pop("image_size", 32)
    arguments: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-3,
        "optim": "adamw_torch",
        "dataloader_pin_memory": False,
        "tf32": False if ground.device.type == "cuda" else None,
        "save_strategy": "no",
        "logging_steps": 4,
        "disable_tqdm": True,
        "report_to": "none",
    }
    images = {"name_or_path": "digits", "max_train_samples": 128, "max_eval_samples": 64}
    images |= changes.pop("dataset", {})
    content = {
        "name": "selftest",
        "variant": "untuned",
        "model": {"name_or_path": model, "pretrained": False},
        "dataset": images,
        "preprocessing": {"image_size": image_size, "location": location},
        "training_args": {k: v for k, v in (arguments | changes).items() if v is not None},
    }
    recipe, problems = check_recipe(content)
    if recipe is None or problems:
        raise BrokenError("; ".join(problems))
    return recipe


def _emulated(ground: Ground) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if ground.is_gpu else float16_on_cpu()


def check_precisions(ground: Ground) -> str:
    """Each precision that the machine has is the one that is seen in the forward pass."""
    wanted: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
    if not ground.is_gpu:
        wanted["bf16"] |= {"use_cpu": True}
    said = []
    for name, arguments in wanted.items():
        context = _emulated(ground) if name == "fp16" else contextlib.nullcontext()
        with context:
            try:
                result = _run(ground, name, **arguments)
            except DeviceError as error:  # this device has it not, and says so
                said.append(f"{name} refused: {first_line(error)}")
                continue
        seen = result.switches["precision"].applied
        require(seen == name, f"{name} was asked for, {seen} was seen")
        require(result.training.train_loss is not None, f"the loss in {name} is not finite")
        skipped = result.training.skipped_steps
        said.append(name + (f" ({skipped} steps skipped)" if skipped else ""))
    return "Seen as asked for: " + ", ".join(said) + "."


def check_tf32(ground: Ground) -> str:
    """TF32 changes products as it should, and is off where the recipe says so."""
    if ground.device.type != "cuda":
        raise NotHereError("TF32 is NVIDIA's")
    if torch.cuda.get_device_capability()[0] < 8 or torch.version.hip:
        raise NotHereError("this card has no TF32: Ampere and newer have")
    said = []
    for enabled in (False, True):
        result = _run(ground, f"tf32-{enabled}", tf32=enabled)
        applied = result.switches["tf32_matmul"].applied
        require(applied is enabled, f"tf32={enabled} was asked for, {applied} was in force")
        said.append(f"{enabled} as asked for")
    return "TF32 was " + ", then ".join(said) + "."


def check_pixels(ground: Ground) -> str:
    """Images are resized to the very same pixels on the device and on the CPU."""
    from torchvision.transforms.v2 import functional
    from torchvision.transforms.v2.functional import InterpolationMode

    from hfbench.data.resizing import resize_exactly

    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=drawn)
    for interpolation in ("bilinear", "bicubic"):
        for size in (16, 64, 96, 224):
            mode = InterpolationMode(interpolation)
            expected = functional.resize(images, [size, size], mode, antialias=True)
            found = resize_exactly(images.to(ground.device), (size, size), interpolation).cpu()
            wrong = int((found != expected).sum())
            require(wrong == 0, f"{interpolation} to {size} px: {wrong} values differ")
    return "64 images at four sizes, bilinear and bicubic: every value as on a CPU."


def check_clocks(ground: Ground) -> str:
    """The parts of a run add up to what an outside clock sees, by host and by device."""
    reset_memory(ground.device)
    synchronize(ground.device)
    start = time.perf_counter()
    result = _run(ground, "clocks", eval_strategy="epoch", save_strategy="epoch", location="device")
    outside, times = time.perf_counter() - start, result.times
    require(
        abs(times.total_seconds - outside) < max(_WITHIN * outside, _UNSEEN_SECONDS),
        f"the parts of a run are {times.total_seconds:.2f} s, an outside clock saw {outside:.2f} s",
    )
    require(result.budget is not None, "there is no budget of time")
    spent = sum(result.budget.model_dump().values()) if result.budget else 0.0
    share = spent / times.execution_seconds
    require(
        abs(share - 1) < _WITHIN, f"the phases of the device make {share:.3f} of the execution time"
    )
    return (
        f"{times.total_seconds:.2f} s in parts, {outside:.2f} s outside; the device's phases make "
        f"{share:.3f} of the execution time."
    )


def check_memory(ground: Ground) -> str:
    """The peak of the device's memory grows with the batch, and a window leaves none behind."""
    bench = Bench(small_recipe(ground))
    peaks = []
    for batch in (16, 64, 16):
        recipe = with_arguments(bench.recipe, per_device_train_batch_size=batch)
        window = bench.measure_window(2, 1, recipe)
        peaks.append(window.peak_device_memory_mib)
        gc.collect()
    if None in peaks:
        raise NotHereError(f"torch keeps no peak of {ground.device.type}")
    small, large, again = (float(peak or 0.0) for peak in peaks)
    require(large > small, f"64 images took {large:.1f} MiB, 16 took {small:.1f} MiB")
    require(abs(again / small - 1) < 0.05, f"16 images took {small:.1f}, then {again:.1f} MiB")
    return f"16 images take {small:.1f} MiB, 64 take {large:.1f} MiB, and 16 again {again:.1f}."


def check_energy(ground: Ground) -> str:
    """NVML tells the card's energy."""
    if ground.device.type != "cuda":
        raise NotHereError("NVML is NVIDIA's")
    energy = _run(ground, "energy", num_train_epochs=8).energy
    if energy is None or energy.device_joules is None:
        raise NotHereError(str(energy.note if energy else "nothing was measured"))
    require(energy.device_joules > 0, "the card used no energy")
    return f"{energy.device_joules:.0f} J by the card's own counter."


def check_resume(ground: Ground) -> str:
    """A run that was stopped and resumed differs no more from one left alone than two of these."""
    arguments: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 3}
    one, two = (_probabilities(_run(ground, name, **arguments)) for name in ("one", "two"))
    original = BenchTrainer.training_step

    def stop(self: BenchTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 10:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    recipe, root = small_recipe(ground, **arguments), ground.folder / "stopped"
    BenchTrainer.training_step = stop  # type: ignore[method-assign]
    try:
        run_recipe(recipe, root)
    except Interrupted:
        pass
    else:
        raise BrokenError("the run was not stopped")
    finally:
        BenchTrainer.training_step = original  # type: ignore[method-assign]
    (run,) = find_runs(root)
    require(has_checkpoint(run.folder), "the stopped run left no checkpoint")
    resumed = run_recipe(recipe, root, resume=True)
    require(resumed.training.sessions == 2, "the run was not resumed")
    again, ours = _distance(one, two), _distance(one, _probabilities(resumed))
    require(
        ours <= max(10 * again, 0.0 if not ground.is_gpu else 1e-3),
        f"resumed and whole differ by {ours:.2g}, two whole ones by {again:.2g}",
    )
    return f"Probabilities of resumed and whole differ by {ours:.2g}, of two whole by {again:.2g}."


def check_out_of_memory(ground: Ground) -> str:
    """Too large a batch is said in words, and the next run has the memory again."""
    many: dict[str, Any] = {}
    if ground.is_gpu:
        many = {
            "model": _LARGE_MODEL,
            "per_device_train_batch_size": _MANY_IMAGES,
            "image_size": _LARGE_SIZE,
            "location": "device",
            "dataset": {"max_train_samples": _MANY_IMAGES},
        }
    too_large = small_recipe(ground, **many)
    original = BenchTrainer.training_step

    def lack(self: BenchTrainer, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("emulated")

    if not ground.is_gpu:
        BenchTrainer.training_step = lack  # type: ignore[method-assign]
    try:
        run_recipe(too_large, ground.folder / "large")
    except HfbenchError as error:
        said = first_line(error)
        cause: Any = error.__cause__
        require(is_out_of_memory(cause or error), f"another failure: {said}")
        require("per_device_train_batch_size" in said, f"the batch is not named: {said}")
    else:
        raise BrokenError("it fitted")
    finally:
        BenchTrainer.training_step = original  # type: ignore[method-assign]
    gc.collect()
    _run(ground, "after")
    return "Said in words, and the next run went through."


def check_doctor(ground: Ground) -> str:
    """The doctor finds accumulation in float16 right."""
    from hfbench.studies.doctor.examine import examine

    recipe = small_recipe(ground, _TRANSFORMER, fp16=True, gradient_accumulation_steps=2)
    with _emulated(ground):
        found = examine(recipe, seconds=5)
    require(found.precision == "fp16", f"it ran in {found.precision}")
    require(found.accumulation is not None, "accumulation was not checked")
    if found.accumulation is not None:
        require(found.accumulation.passed, found.accumulation.sentence)
        return found.accumulation.sentence
    return ""


def check_first_losses(ground: Ground) -> str:
    """No technique of a short ablation changes the first loss."""
    from hfbench.studies.ablation.measure import ablate

    recipe = small_recipe(ground, location="device", gradient_accumulation_steps=2)
    found = ablate(recipe, ground.folder, steps=2, rounds=2)
    flagged = [row.label for row in found.rows if row.first_loss and row.first_loss.flagged]
    require(not flagged, f"another first loss with: {', '.join(flagged)}")
    failed = [f"{row.label}: {row.failure}" for row in found.rows if row.failure]
    require(not failed, "; ".join(failed))
    return f"{len(found.rows)} configurations, each with the loss of a plain loop."


def check_compiling(ground: Ground) -> str:
    """A compiled run computes the same, and what compiling took is in no steady state."""
    backend = "inductor" if ground.is_gpu else "eager"
    plain = _run(ground, "plain", per_device_train_batch_size=24)
    compiled = _run(
        ground, "compiled", per_device_train_batch_size=24, torch_compile_backend=backend
    )
    require(bool(compiled.switches["torch_compile"].applied), "it was not compiled")
    graphs, seconds = compiled.training.compilations, compiled.times.compile_seconds
    require(bool(graphs), "no graph was counted")
    losses = [result.training.train_loss for result in (plain, compiled)]
    require(None not in losses, "a loss is not finite")
    one, other = (float(loss or 0.0) for loss in losses)
    require(abs(one / other - 1) < 0.02, f"mean loss {other:.4f} instead of {one:.4f}")
    return f"{graphs} graphs by {backend} in {seconds:.1f} s, same loss."


def check_processes(ground: Ground) -> str:
    """Two processes train one model, and the saved one is the one that was tested."""
    if ground.is_gpu and torch.accelerator.device_count() < 2:
        raise NotHereError("there is one GPU")
    recipe = ground.folder / "selftest.json"
    changes: dict[str, Any] = {} if ground.is_gpu else {"use_cpu": True}
    content = small_recipe(ground, **changes)
    recipe.write_text(json.dumps(content.as_json()), "utf-8")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "hfbench", "recipe", str(recipe), "-o", "runs"],
        cwd=ground.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    require(done.returncode == 0, " ".join(said or last_lines(done.stderr)))
    (run,) = find_runs(ground.folder / "runs")
    from hfbench.results.schema import load_result

    result = load_result(run.folder)
    require(result.training.world_size == 2, f"{result.training.world_size} processes trained")
    return "Two processes, one result."


CHECKS: dict[str, Check] = {
    "precisions": check_precisions,
    "TF32": check_tf32,
    "pixels": check_pixels,
    "clocks": check_clocks,
    "memory": check_memory,
    "energy": check_energy,
    "resume": check_resume,
    "out of memory": check_out_of_memory,
    "doctor in float16": check_doctor,
    "first losses": check_first_losses,
    "several processes": check_processes,
    "torch.compile": check_compiling,
}


def _run(ground: Ground, name: str, **changes: Any) -> Result:
    return run_recipe(small_recipe(ground, **changes), ground.folder / name)


def _probabilities(result: Result) -> np.ndarray:
    folder = result.folder
    if folder is None:
        raise BrokenError("the run has no folder")
    with np.load(folder / "predictions.npz") as found:
        return np.asarray(found["label_probability"])


def _distance(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.abs(one - two).max())
