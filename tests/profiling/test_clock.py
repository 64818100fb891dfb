"""Hand-worked times, on a clock that only moves when it is told to."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

import hfbench.profiling.clock
import hfbench.profiling.timeline
from hfbench.machine.nvml import Neighbours
from hfbench.profiling.clock import Clock, measure_memory, reset_memory
from hfbench.profiling.energy import Counter, Meter
from hfbench.results.schema import Conditions
from tests.fake_nvml import Card, FakeNvml

CPU = torch.device("cpu")


class FakeTime:
    """Stand in for the `time` module."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTime]:
    """Replace the clock's time."""
    fake = FakeTime()
    monkeypatch.setattr(hfbench.profiling.clock, "time", fake)
    monkeypatch.setattr(hfbench.profiling.timeline, "time", fake)
    return fake


class Session:
    """Play one training call: steps of 1 s, of which 0.25 s wait for data."""

    def __init__(self, clock: Clock, time: FakeTime, max_steps: int, global_step: int = 0) -> None:
        self.clock, self.time = clock, time
        self.state = TrainerState(max_steps=max_steps, global_step=global_step)
        self.control = TrainerControl()
        self.args: Any = SimpleNamespace(device=CPU)
        clock.start(CPU)

    def begin(self, seconds: float = 0.0) -> None:
        self.time.now += seconds
        self.clock.on_train_begin(self.args, self.state, self.control)

    def step(self, samples: int = 4, seconds: float = 1.0) -> None:
        self.clock.wait_for_data()
        with self.clock.measure("data_wait"):
            self.time.now += 0.25
        self.clock.count_samples(samples)
        self.clock.timeline.enter("forward")
        self.time.now += seconds - 0.25
        self.state.global_step += 1
        self.clock.on_step_end(self.args, self.state, self.control)

    def pause(self, name: str, seconds: float) -> None:
        with self.clock.measure(name, CPU), self.clock.timeline.whole(name):
            self.time.now += seconds

    def end(self, seconds: float = 0.0) -> None:
        self.time.now += seconds
        self.clock.stop(CPU)


def test_pauses_and_warm_up_are_outside_the_steady_state(time: FakeTime) -> None:
    clock = Clock()
    session = Session(clock, time, max_steps=8)
    session.begin(0.5)
    session.step(seconds=6.0)  # a slow first step
    session.step()  # the second of 8 / 4 = 2 warm-up steps
    session.step()
    session.step()
    session.pause("evaluation", 3.0)
    session.step()
    session.step()
    session.pause("save", 2.0)
    session.step()
    session.step(samples=2)  # the ragged last batch
    session.end(0.5)

    times = clock.times
    assert times.execution_seconds == 0.5 + 6 + 7 + 3 + 2 + 0.5
    assert times.evaluation_seconds == 3.0
    assert times.save_seconds == 2.0
    assert times.data_wait_seconds == 8 * 0.25
    assert times.first_step_seconds == 0.5 + 6.0
    throughput = clock.throughput(world_size=1)
    assert throughput.warmup_steps == 2
    assert throughput.measured_samples == 5 * 4 + 2
    assert throughput.measured_seconds == 6.0
    assert throughput.samples_per_second == 22 / 6


def test_pause_right_after_warm_up_is_left_out(time: FakeTime) -> None:
    clock = Clock()
    session = Session(clock, time, max_steps=4)
    session.begin()
    session.step()
    session.pause("evaluation", 5.0)
    session.pause("save", 7.0)
    session.step()
    session.step()
    session.step()
    session.pause("evaluation", 9.0)  # after the last step
    session.end()
    throughput = clock.throughput(1)
    assert (throughput.measured_samples, throughput.measured_seconds) == (12, 3.0)
    assert clock.times.execution_seconds == 4 + 5 + 7 + 9


@pytest.mark.parametrize(
    ("max_steps", "done", "expected"),
    [(1, 0, 1), (7, 0, 1), (8, 0, 2), (40, 0, 10), (4000, 0, 10), (4000, 3992, 2), (40, 39, 1)],
)
def test_warm_up_is_a_quarter_of_what_is_left_and_ten_at_most(
    max_steps: int, done: int, expected: int, time: FakeTime
) -> None:
    clock = Clock()
    Session(clock, time, max_steps, done).begin()
    assert clock.warmup_steps == expected


def test_processes_train_on_equally_many_images(time: FakeTime) -> None:
    clock = Clock()
    session = Session(clock, time, max_steps=4)
    session.begin()
    for _ in range(4):
        session.step(samples=5)
    session.end()
    throughput = clock.throughput(world_size=3)
    assert throughput.measured_samples == 3 * 15
    assert throughput.samples_per_second == 3 * 15 / 3.0


def test_single_step_has_no_steady_state(time: FakeTime) -> None:
    clock = Clock()
    session = Session(clock, time, max_steps=1)
    session.begin()
    session.step()
    session.end()
    throughput = clock.throughput(1)
    assert throughput.samples_per_second is None
    assert (throughput.measured_samples, throughput.measured_seconds) == (0, 0.0)
    assert clock.times.first_step_seconds == 1.0
    assert clock.times.execution_seconds == 1.0


def test_resumed_sessions_add_up(time: FakeTime) -> None:
    first = Clock()
    with first.measure("setup"):
        time.now += 10.0
    session = Session(first, time, max_steps=8)
    session.begin()
    session.step(seconds=3.0)
    for _ in range(3):
        session.step()
    session.pause("save", 2.0)
    kept = json.loads(json.dumps(first.state()))  # what a checkpoint holds
    session.step()  # lost: no checkpoint after it
    session.end()

    time.now += 1000.0  # between the sessions
    second = Clock()
    with second.measure("setup"):
        time.now += 20.0
    with second.measure("setup"):
        second.resume(kept)
    session = Session(second, time, max_steps=8, global_step=4)
    session.begin()
    session.step(seconds=2.0)  # the only warm-up step of the four that are left
    for _ in range(3):
        session.step()
    session.pause("evaluation", 4.0)
    session.end()

    times = second.times
    assert times.sessions == 2
    assert times.execution_seconds == (3 + 3 + 2) + (2 + 3 + 4)
    assert times.save_seconds == 2.0
    assert times.evaluation_seconds == 4.0
    assert times.data_wait_seconds == 8 * 0.25
    assert times.first_step_seconds == 3.0  # of the first session
    throughput = second.throughput(1)
    assert throughput.measured_samples == (2 + 3) * 4
    assert throughput.measured_seconds == 2.0 + 3.0


def test_set_up_of_every_session_counts(time: FakeTime) -> None:
    first = Clock()
    with first.measure("setup"):
        time.now += 10.0
    Session(first, time, max_steps=8)
    kept = first.state()
    second = Clock()
    with second.measure("setup"):
        time.now += 20.0
        second.resume(kept)
        time.now += 1.0
    assert second.times.setup_seconds == 10 + 21


def test_evaluation_before_the_first_step_is_no_part_of_it(time: FakeTime) -> None:
    clock = Clock()
    session = Session(clock, time, max_steps=4)
    session.begin()
    session.pause("evaluation", 5.0)  # eval_on_start
    session.step(seconds=2.0)
    assert clock.times.first_step_seconds == 2.0


def test_time_inside_is_kept_when_it_fails(time: FakeTime) -> None:
    clock = Clock()

    def fail() -> None:
        with clock.measure("save"):
            time.now += 1.5
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert clock.times.save_seconds == 1.5


def test_stopped_clock_stands_still(time: FakeTime) -> None:
    clock = Clock()
    session = Session(clock, time, max_steps=4)
    session.begin()
    session.step()
    session.end()
    time.now += 50.0
    assert clock.state()["execution_seconds"] == 1.0


def test_state_is_up_to_date_while_running(time: FakeTime) -> None:
    clock = Clock()
    Session(clock, time, max_steps=4).begin()
    time.now += 3.0
    assert clock.state()["execution_seconds"] == 3.0
    assert clock.state()["sessions"] == 1


def spent(clock: Clock) -> dict[str, float]:
    """Return the parts of the budget that took time."""
    budget = clock.budget()
    assert budget is not None
    return {name: seconds for name, seconds in budget.model_dump().items() if seconds}


def test_budget_splits_the_training_call(time: FakeTime) -> None:
    clock = Clock()
    with clock.measure("setup"):
        time.now += 10.0
    session = Session(clock, time, max_steps=8)
    session.begin(0.5)
    session.pause("evaluation", 16.0)  # eval_on_start
    session.step(seconds=6.0)
    session.step()
    session.step()
    session.pause("save", 2.0)
    session.step()
    session.end(0.125)

    assert spent(clock) == {
        "start_seconds": 0.5,
        "first_step_seconds": 6.0,
        "data_wait_seconds": 3 * 0.25,
        "forward_seconds": 3 * 0.75,
        "evaluation_seconds": 16.0,
        "save_seconds": 2.0,
        "overhead_seconds": 0.125,
    }
    assert sum(spent(clock).values()) == clock.times.execution_seconds


def test_budgets_of_sessions_add_up(time: FakeTime) -> None:
    first = Clock()
    session = Session(first, time, max_steps=8)
    session.begin(1.0)
    session.step(seconds=3.0)
    session.step()
    session.pause("save", 2.0)
    kept = json.loads(json.dumps(first.state()))
    session.step()  # lost
    second = Clock()
    second.resume(kept)
    session = Session(second, time, max_steps=8, global_step=2)
    session.begin(4.0)
    session.step(seconds=5.0)
    session.step()
    session.end()

    assert spent(second) == {
        "start_seconds": 1.0 + 4.0,
        "first_step_seconds": 3.0 + 5.0,
        "data_wait_seconds": 2 * 0.25,
        "forward_seconds": 2 * 0.75,
        "save_seconds": 2.0,
    }
    assert sum(spent(second).values()) == second.times.execution_seconds == 6 + 1 + 9 + 1


def test_checkpoint_of_an_older_version_leaves_budget_and_energy_unknown(time: FakeTime) -> None:
    old = Clock()
    session = Session(old, time, max_steps=8)
    session.begin()
    session.step()
    kept = old.state()
    del kept["budget"], kept["joules"]
    clock = Clock()
    clock.resume(kept)
    session = Session(clock, time, max_steps=8, global_step=1)
    session.begin()
    session.step()
    session.end()

    assert clock.times.execution_seconds == 2.0
    assert clock.budget() is None
    assert clock.state()["budget"] is None
    energy = clock.energy()
    assert (energy.device_joules, energy.cpu_joules) == (None, None)
    assert energy.note is not None


class Power(Counter):
    """A counter of a package that draws 100 W and wraps around at 10 kJ."""

    def __init__(self, time: FakeTime) -> None:
        super().__init__(lambda: time.now * 100.0 % 10_000.0, 10_000.0)


@pytest.fixture
def power(time: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the machine such a counter."""
    monkeypatch.setattr(hfbench.profiling.clock, "meter_cpu", lambda: Meter([Power(time)]))


@pytest.mark.usefixtures("power")
def test_energy_is_that_of_the_training_call_however_often_the_counter_wraps(
    time: FakeTime,
) -> None:
    clock = Clock()
    time.now += 17.0  # set-up
    session = Session(clock, time, max_steps=8)
    session.begin()
    for _ in range(5):
        session.step(seconds=70.0)
    for _ in range(4):  # an evaluation of four batches
        time.now += 90.0
        clock.on_prediction_step(session.args, session.state, session.control)
    session.end(30.0)
    time.now += 55.0

    energy = clock.energy()
    assert energy.cpu_joules == pytest.approx(100 * (5 * 70 + 4 * 90 + 30))
    assert energy.device_joules is None
    assert energy.note == "device: no NVIDIA GPU was used"


@pytest.mark.usefixtures("power")
def test_energy_of_sessions_adds_up(time: FakeTime) -> None:
    first = Clock()
    session = Session(first, time, max_steps=8)
    session.begin()
    session.step(seconds=20.0)
    kept = json.loads(json.dumps(first.state()))
    session.step(seconds=40.0)  # lost
    second = Clock()
    second.resume(kept)
    session = Session(second, time, max_steps=8, global_step=1)
    session.begin()
    session.step(seconds=10.0)
    session.end()

    assert second.energy().cpu_joules == pytest.approx(100 * (20 + 10))


@pytest.mark.usefixtures("power")
def test_energy_that_one_session_lacks_is_unknown(
    time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hfbench.profiling.clock, "meter_cpu", lambda: Meter([], "no counter there"))
        first = Clock()
        session = Session(first, time, max_steps=8)
        session.begin()
        session.step()
        kept = json.loads(json.dumps(first.state()))
    second = Clock()
    second.resume(kept)
    session = Session(second, time, max_steps=8, global_step=1)
    session.begin()
    session.step()
    session.end()

    assert second.energy().cpu_joules is None
    assert "cpu: an earlier session did not measure it" in str(second.energy().note)


def test_memory_of_a_cpu_run_is_the_process_alone() -> None:
    memory = measure_memory(CPU)
    assert memory.peak_device_memory_mib is None
    assert 50 < memory.peak_process_memory_mib < 1_000_000  # MiB, not KiB or bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_peak_memory_is_one_of_this_run_not_of_earlier_ones() -> None:
    cpu = torch.device("cpu")
    block = bytearray(300 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])  # touch every page
    high = measure_memory(cpu).peak_process_memory_mib
    del block
    reset_memory(cpu)

    assert measure_memory(cpu).peak_process_memory_mib < high - 200


class Device:
    """A device that the host runs ahead of: a step is queued in 10 ms and takes 1 s."""

    def __init__(self, time: FakeTime) -> None:
        self.time, self.busy_until = time, 0.0

    def queue(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.time.now) + seconds

    def synchronize(self, device: torch.device) -> None:
        self.time.now = max(self.time.now, self.busy_until)


@pytest.fixture
def device(time: FakeTime, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Replace the device."""
    simulated = Device(time)
    monkeypatch.setattr(hfbench.profiling.clock, "synchronize", simulated.synchronize)
    return simulated


def queue_steps(session: Session, device: Device, steps: int) -> None:
    for _ in range(steps):
        device.queue(1.0)
        session.step(seconds=0.26)


@pytest.mark.parametrize("border", ["save", "evaluation", "end"])
def test_steps_that_are_only_queued_take_the_time_of_the_device(
    border: str, time: FakeTime, device: Device
) -> None:
    clock = Clock()
    session = Session(clock, time, max_steps=1000)
    session.begin()
    queue_steps(session, device, 30)  # of which ten are warm-up
    if border == "end":  # a stop without a checkpoint
        session.end()
        kept = clock.state()
    else:
        with clock.measure(border, CPU):
            device.queue(5.0)
            kept = json.loads(json.dumps(clock.state()))
    assert (kept["measured_samples"], kept["measured_seconds"]) == (20 * 4, pytest.approx(20.0))
    assert kept["execution_seconds"] == pytest.approx(30.0, abs=0.3)
    if border != "end":
        assert getattr(clock.times, f"{border}_seconds") == pytest.approx(5.0)


def test_throughput_after_a_resume_is_the_devices(time: FakeTime, device: Device) -> None:
    first = Clock()
    session = Session(first, time, max_steps=1000)
    session.begin()
    queue_steps(session, device, 30)
    session.pause("evaluation", 2.0)
    with first.measure("save", CPU):
        kept = json.loads(json.dumps(first.state()))
    second = Clock()
    second.resume(kept)
    session = Session(second, time, max_steps=1000, global_step=30)
    session.begin()
    queue_steps(session, device, 30)
    session.end()
    assert second.throughput(1).samples_per_second == pytest.approx(4.0, rel=0.01)
    assert second.times.execution_seconds == pytest.approx(62.0, rel=0.01)


def test_checkpoint_keeps_the_time_of_its_own_save(time: FakeTime) -> None:
    clock = Clock()
    session = Session(clock, time, max_steps=8)
    session.begin()
    session.step()
    with clock.measure("save", CPU):
        time.now += 3.0  # weights and optimizer
        kept = clock.state()
        time.now += 0.5  # the clock itself
    session.end()
    assert kept["save_seconds"] == 3.0
    assert kept["execution_seconds"] == 1.0 + 3.0
    assert clock.times.save_seconds == 3.5
    assert clock.times.execution_seconds == 4.5


# Conditions


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Return the card that each session looks at, though its steps are made on the CPU."""
    card = Card(computing={os.getpid(): 2**20})
    device = FakeNvml(GPU_a=card).install(monkeypatch, "a")
    monkeypatch.setattr(hfbench.profiling.clock, "Neighbours", lambda _: Neighbours(device))
    return card


def test_most_of_the_other_processes_seen_at_a_time_are_kept(card: Card, time: FakeTime) -> None:
    clock = Clock()
    session = Session(clock, time, max_steps=8)
    session.begin()
    session.step()
    card.computing |= {1: 300 * 2**20, 2: 100 * 2**20}
    session.step(seconds=61.0)
    del card.computing[2]
    session.step(seconds=61.0)
    session.end()
    assert clock.conditions() == Conditions(other_processes=2, other_processes_mib=400.0)

    later = Clock()
    later.resume(json.loads(json.dumps(clock.state())))
    session = Session(later, time, max_steps=8, global_step=3)
    del card.computing[1]
    session.end()
    assert later.conditions() == clock.conditions()


def test_card_that_nobody_else_was_on(card: Card, time: FakeTime) -> None:
    clock = Clock()
    Session(clock, time, max_steps=8).end()
    assert clock.conditions() == Conditions(other_processes=0, other_processes_mib=0.0)


def test_session_that_could_not_look_leaves_only_what_was_seen(card: Card, time: FakeTime) -> None:
    old = {"sessions": 1}  # a checkpoint of an older version
    clock = Clock()
    clock.resume(old)
    Session(clock, time, max_steps=8).end()
    assert clock.conditions() == Conditions(
        other_processes=None, other_processes_mib=None, note="an earlier session did not look"
    )
    card.computing[1] = 2**20
    clock = Clock()
    clock.resume(old)
    Session(clock, time, max_steps=8).end()
    assert clock.conditions() == Conditions(other_processes=1, other_processes_mib=1.0)


def test_run_on_a_cpu_has_no_card_to_share(time: FakeTime) -> None:
    clock = Clock()
    Session(clock, time, max_steps=8).end()
    assert clock.conditions() == Conditions(
        other_processes=None, other_processes_mib=None, note="no NVIDIA GPU was used"
    )
