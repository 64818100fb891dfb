"""Where a run's time and memory go.

`Trainer` reports one number, `train_runtime`, that counts callbacks, evaluations and checkpoints,
and after a resume only the last call. Here each is measured apart, and what a checkpoint was
written after is added up over the sessions.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfbench.machine.nvml import Neighbours
from hfbench.profiling.compiling import CompileWatch
from hfbench.profiling.energy import Meter, meter_cpu, meter_devices
from hfbench.profiling.pauses import PauseWatch
from hfbench.profiling.timeline import Timeline, stamps_of
from hfbench.results.schema import Conditions, Energy, Memory, Throughput, TimeBudget, Times

MAX_WARMUP_STEPS = 10
_ENERGY_SECONDS = 60.0  # between readings: a package's counter wraps around within minutes


@dataclass
class TrainingTimes:
    """Seconds and counts that add up over the sessions of a run; what a checkpoint keeps."""

    sessions: int = 0
    setup_seconds: float = 0.0
    execution_seconds: float = 0.0
    first_step_seconds: float | None = None
    data_wait_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    save_seconds: float = 0.0
    final_evaluation_seconds: float = 0.0
    final_save_seconds: float = 0.0
    analysis_seconds: float = 0.0
    paused_seconds: float = 0.0
    keeping_seconds: float = 0.0
    measured_samples: int = 0
    measured_seconds: float = 0.0
    loss_sum: float | None = 0.0  # of all optimizer steps; None if it is not finite
    skipped_steps: int = 0  # optimizer steps, in earlier sessions
    compile_seconds: float = 0.0
    compilations: int = 0
    budget: dict[str, float] | None = None  # seconds of each phase; None if a session lacks them
    # None if a session lacks them
    joules: dict[str, float | None] = field(default_factory=lambda: {"device": 0.0, "cpu": 0.0})
    # The most at one time; None if nothing was seen, and a session could not look.
    other_processes: float | None = 0
    other_processes_mib: float | None = 0.0


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a no-op on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class _Moment:
    """A time, and the seconds of all pauses before it."""

    time: float
    paused: float

    def __sub__(self, earlier: _Moment) -> float:
        return (self.time - earlier.time) - (self.paused - earlier.paused)


class Clock(TrainerCallback):
    """Measure one training call; `BenchTrainer` tells it what it does, `Trainer` when steps end.

    The device is waited for only at the borders of what is measured: once after warm-up, before and
    after each evaluation and checkpoint, and at the end. Pauses that `pauses` notices, and what
    hfbench does only to be able to resume, are taken out of every part and counted apart.
    """

    def __init__(self) -> None:
        self.times = TrainingTimes()
        self.pauses = PauseWatch()
        self.timeline = Timeline(self._outside)
        self.compiling = CompileWatch(lambda: not self._is_interlude())
        self.warmup_steps = 0
        self._open: list[tuple[str, _Moment]] = []  # what is measured now, and since when
        self._started: _Moment | None = None
        self._aside = 0.0  # seconds of this session that are set aside
        self._aside_from: tuple[float, float] | None = None  # time and pauses, while it goes on
        self._paused_before = 0.0  # paused_seconds of earlier sessions
        self._kept_before = 0.0  # keeping_seconds of earlier sessions
        self._compiled_before = (0, 0.0)  # compilations of earlier sessions, and their seconds
        self._has_budget = True  # of earlier sessions too
        self._before = 0.0  # execution_seconds of earlier sessions
        self._samples = 0  # of this process, in this session
        self._steps = 0
        self._warm_compilations = (0, 0.0)  # until warm-up ended
        # When warm-up ended, and the interludes and samples until then.
        self._steady_from: tuple[_Moment, float, int] | None = None
        self._unsettled = False  # steps were made since whose end the device has not reached
        self._steady_before = (0, 0.0)  # measured samples and seconds of earlier sessions
        self._meters: dict[str, Meter] = {}
        self._neighbours: Neighbours | None = None
        self._energy_read = 0.0  # time of the last reading

    def resume(self, earlier: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept; one of an older version lacks some of it."""
        unknown: dict[str, Any] = {"budget": None, "joules": {"device": None, "cpu": None}}
        unknown |= {"other_processes": None, "other_processes_mib": None}
        self.times = TrainingTimes(**unknown | earlier)
        self._has_budget = self.times.budget is not None
        self.timeline.seconds |= self.times.budget or {}
        self._before = self.times.execution_seconds
        self._paused_before = self.times.paused_seconds
        self._kept_before = self.times.keeping_seconds
        self._compiled_before = (self.times.compilations, self.times.compile_seconds)
        self._steady_before = (self.times.measured_samples, self.times.measured_seconds)

    def state(self) -> dict[str, Any]:
        """Return what to keep in a checkpoint."""
        self._update()
        return asdict(self.times)

    def start(self, device: torch.device) -> None:
        """Start the execution clock: the training call begins."""
        self.times.sessions += 1
        self._meters = {"device": meter_devices(device), "cpu": meter_cpu()}
        synchronize(device)
        self._neighbours = Neighbours(device)
        self._look_around()
        self._started, self._energy_read = self._now(), time.perf_counter()
        self.timeline.start("start", stamps_of(device))

    def stop(self, device: torch.device) -> None:
        """Stop the execution clock: the training call has returned."""
        self._reach(device)
        self._update()
        self.timeline.stop()
        self._started = None

    @contextmanager
    def measure(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Add the time spent inside to ``times.<name>_seconds``.

        Args:
            name: A field of `TrainingTimes` without its unit.
            device: Waited for before, so that work queued earlier is not counted here, and after.
        """
        if self._aside_from is not None:
            yield
            return
        if device is not None:
            self._reach(device)
        self._open.append((name, self._now()))
        try:
            yield
            if device is not None:
                synchronize(device)
        finally:
            self._charge()
            self._open.pop()

    @contextmanager
    def set_aside(self, device: torch.device) -> Iterator[None]:
        """Take the time spent inside out of every part and count it as ``keeping_seconds``.

        Args:
            device: Waited for before and after.
        """
        if self._aside_from is not None:  # in the midst of it
            yield
            return
        self._reach(device)
        self._aside_from = (time.perf_counter(), self.pauses.read())
        try:
            yield
            synchronize(device)
        finally:
            self._aside, self._aside_from = self._set_aside_so_far(), None

    def take_back(self, name: str, seconds: float) -> None:
        """Set aside what was counted for an attempt that has to be made again.

        Args:
            name: A phase of the timeline and, without its unit, a field of `TrainingTimes`.
            seconds: That were spent on it, up to now.
        """
        field = f"{name}_seconds"
        setattr(self.times, field, getattr(self.times, field) - seconds)
        self.timeline.take_back(name, seconds)
        self._aside += seconds
        self.timeline.forget_pauses()

    def count_samples(self, samples: int) -> None:
        """Tell how many images this process is about to train on."""
        self._samples += samples

    def wait_for_data(self) -> None:
        """Tell that batches are asked for; the first time, that the first step begins."""
        if self.timeline.phase == "start":
            self.timeline.hold("first_step")
        else:
            self.timeline.enter("data_wait")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the warm-up: ten steps; in a short run a quarter of them, at least one."""
        self.warmup_steps = max(
            1, min(MAX_WARMUP_STEPS, (state.max_steps - state.global_step) // 4)
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the end of the first step, of warm-up, and of training."""
        self._steps += 1
        last = state.global_step >= state.max_steps or control.should_training_stop
        waited = self._steps in (1, self.warmup_steps) or last
        if waited:
            synchronize(args.device)
        now = self._now()
        if self._steps == 1 and self.times.first_step_seconds is None and self._started is not None:
            self.times.first_step_seconds = now - self._started - self._interludes()
        self._unsettled = not waited
        self._measure_steady(now)
        if self._steps == self.warmup_steps:
            self._warm_compilations = (self.compiling.count, self.compiling.seconds)
            self._steady_from = (now, self._not_steady(), self._samples)
        if self.timeline.phase == "first_step":
            self.timeline.release("overhead")
        else:
            self.timeline.enter("overhead")
        self.timeline.settle()
        self._read_energy(now.time)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the energy during long evaluations."""
        self._read_energy(time.perf_counter())

    def late_compilations(self) -> tuple[int, float]:
        """Return how many graphs of this session were compiled after warm-up, and the seconds."""
        count, seconds = self._warm_compilations
        if self._steady_from is None:
            return 0, 0.0
        return self.compiling.count - count, self.compiling.seconds - seconds

    def throughput(self, world_size: int) -> Throughput:
        """Return the steady state of all sessions; processes train on equally many images."""
        samples, seconds = self.times.measured_samples * world_size, self.times.measured_seconds
        return Throughput(
            samples_per_second=samples / seconds if samples else None,
            warmup_steps=self.warmup_steps,
            measured_samples=samples,
            measured_seconds=seconds,
        )

    def summary(self) -> Times:
        """Return the parts of all sessions up to now, and their sum."""
        self._update()
        times = self.times
        parts = (
            times.setup_seconds,
            times.execution_seconds,
            times.final_evaluation_seconds,
            times.final_save_seconds,
            times.analysis_seconds,
            times.paused_seconds,
            times.keeping_seconds,
        )
        return Times(
            setup_seconds=times.setup_seconds,
            execution_seconds=times.execution_seconds,
            train_seconds=times.execution_seconds - self._interludes(),
            first_step_seconds=times.first_step_seconds,
            data_wait_seconds=times.data_wait_seconds,
            evaluation_seconds=times.evaluation_seconds,
            save_seconds=times.save_seconds,
            final_evaluation_seconds=times.final_evaluation_seconds,
            final_save_seconds=times.final_save_seconds,
            analysis_seconds=times.analysis_seconds,
            paused_seconds=times.paused_seconds,
            keeping_seconds=times.keeping_seconds,
            compile_seconds=times.compile_seconds,
            total_seconds=sum(parts),
        )

    def budget(self) -> TimeBudget | None:
        """Return where the time of all sessions went; ``None`` if one of them did not say."""
        seconds = self.times.budget
        if seconds is None:
            return None
        return TimeBudget(**{f"{name}_seconds": value for name, value in seconds.items()})

    def energy(self) -> Energy:
        """Return the energy of all sessions."""
        notes = {name: meter.note for name, meter in self._meters.items()}
        for name, joules in self.times.joules.items():
            if joules is None and not notes.get(name):
                notes[name] = "an earlier session did not measure it"
        return Energy(
            device_joules=self.times.joules["device"],
            cpu_joules=self.times.joules["cpu"],
            note="; ".join(f"{name}: {note}" for name, note in notes.items() if note) or None,
        )

    def conditions(self) -> Conditions:
        """Return what else went on, over all sessions."""
        number, mib = self.times.other_processes, self.times.other_processes_mib
        note = self._neighbours.note if self._neighbours else None
        if None in (number, mib) and note is None:
            note = "an earlier session did not look"
        return Conditions(
            other_processes=None if number is None else int(number),
            other_processes_mib=mib,
            note=note,
        )

    def _now(self) -> _Moment:
        return _Moment(time.perf_counter(), self._outside())

    def _outside(self) -> float:
        """Return the seconds of this session that are in no part of it."""
        return self.pauses.read() + self._set_aside_so_far()

    def _set_aside_so_far(self) -> float:
        if self._aside_from is None:
            return self._aside
        since, paused = self._aside_from
        return self._aside + (time.perf_counter() - since) - (self.pauses.read() - paused)

    def _reach(self, device: torch.device) -> None:
        """Wait for the device, and count the steps that it has only now done."""
        synchronize(device)
        if self._unsettled:
            self._unsettled = False
            self._measure_steady(self._now())

    def _charge(self) -> None:
        """Add what is being measured up to now."""
        now = self._now()
        for position, (name, since) in enumerate(self._open):
            field = f"{name}_seconds"
            setattr(self.times, field, getattr(self.times, field) + (now - since))
            self._open[position] = (name, now)

    def _interludes(self) -> float:
        return self.times.evaluation_seconds + self.times.save_seconds

    def _is_interlude(self) -> bool:
        return any(name in ("evaluation", "save") for name, _ in self._open)

    def _not_steady(self) -> float:
        """Return the seconds so far that are in no steady state, whenever they come."""
        return self._interludes() + self.compiling.aside_seconds

    def _measure_steady(self, now: _Moment) -> None:
        if self._steady_from is None:
            return
        start, interludes, samples = self._steady_from
        self.times.measured_samples = self._steady_before[0] + self._samples - samples
        self.times.measured_seconds = (
            self._steady_before[1] + (now - start) - (self._not_steady() - interludes)
        )

    def _update(self) -> None:
        self._charge()
        self.times.paused_seconds = self._paused_before + self.pauses.read()
        self.times.keeping_seconds = self._kept_before + self._set_aside_so_far()
        self.times.compilations = self._compiled_before[0] + self.compiling.count
        self.times.compile_seconds = self._compiled_before[1] + self.compiling.seconds
        if self._started is not None:
            self.times.execution_seconds = self._before + (self._now() - self._started)
            self.times.budget = self.timeline.read() if self._has_budget else None
            self._read_energy(math.inf)

    def _read_energy(self, now: float) -> None:
        if self._started is None or now - self._energy_read < _ENERGY_SECONDS:
            return
        self._energy_read = time.perf_counter()
        for name, meter in self._meters.items():
            joules, before = meter.update(), self.times.joules[name]
            self.times.joules[name] = None if joules is None or before is None else before + joules
        self._look_around()

    def _look_around(self) -> None:
        if self._neighbours is None:
            return
        number, mib = self._neighbours.count()
        self.times.other_processes = _most(self.times.other_processes, number)
        self.times.other_processes_mib = _most(self.times.other_processes_mib, mib)


def _most(before: float | None, now: float | None) -> float | None:
    """Return the larger one; ``None`` if one is not known and the other is nothing."""
    known = [value for value in (before, now) if value is not None]
    most = max(known, default=0)
    return most if most or len(known) == 2 else None


def reset_memory(device: torch.device) -> None:
    """Forget the peaks of earlier runs in this process; Linux alone can for resident memory."""
    if device.type not in ("cpu", "mps"):
        torch.accelerator.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return


def measure_memory(device: torch.device) -> Memory:
    """Return the peaks of this process so far."""
    peak = None
    if device.type != "cpu" and device.type != "mps":  # MPS keeps no peak
        peak = torch.accelerator.max_memory_allocated() / 2**20
    return Memory(peak_process_memory_mib=_peak_resident_mib(), peak_device_memory_mib=peak)


def _peak_resident_mib() -> float:
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**10
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    )  # macOS counts bytes, Linux KiB
