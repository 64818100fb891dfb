"""A partition of time, on a host and on a device whose clocks only move when they are told to."""

from __future__ import annotations

import pickle
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hfbench.profiling.timeline
from hfbench.profiling.timeline import PHASES, Batch, HostStamp, Timeline, stamps_of
from hfbench.results.schema import TimeBudget


class Gpu:
    """A host that gives work, and a device that does it in order, as a CUDA stream does."""

    def __init__(self) -> None:
        self.now = 0.0  # of the host
        self.busy_until = 0.0
        self.events = 0

    def work_on_host(self, seconds: float) -> None:
        self.now += seconds

    def launch(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.now) + seconds

    def synchronize(self) -> None:
        self.now = max(self.now, self.busy_until)

    def event(self) -> Event:
        self.events += 1
        return Event(self)


class Event:
    """An event in the stream of a `Gpu`."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = max(self.gpu.now, self.gpu.busy_until)

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, end: Event) -> float:
        if not (self.query() and end.query()):
            raise RuntimeError("CUDA error: device not ready")
        return (end.at - self.at) * 1e3


def spent(timeline: Timeline) -> dict[str, float]:
    """Return the phases that took time."""
    return {name: seconds for name, seconds in timeline.seconds.items() if seconds}


def step(timeline: Timeline, gpu: Gpu, data: float, forward: float, backward: float) -> None:
    """Load on the host, then launch both passes; launching takes no time."""
    timeline.enter("data_wait")
    gpu.work_on_host(data)
    timeline.enter("forward")
    gpu.launch(forward)
    timeline.enter("backward")
    gpu.launch(backward)
    timeline.enter("overhead")
    timeline.settle()


def test_phases_are_the_fields_of_the_budget() -> None:
    assert [f"{name}_seconds" for name in PHASES] == list(TimeBudget.model_fields)


def test_data_that_comes_while_the_device_computes_costs_nothing() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("start", gpu.event)
    for _ in range(3):
        step(timeline, gpu, data=1.0, forward=2.0, backward=4.0)
    timeline.stop()

    # Only before the first step does the device stand still.
    assert spent(timeline) == {"data_wait": 1.0, "forward": 6.0, "backward": 12.0}
    assert gpu.now == 19.0


def test_device_that_waits_for_data_stands_still_for_the_rest_of_the_loading() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("start", gpu.event)
    for _ in range(3):
        step(timeline, gpu, data=10.0, forward=2.0, backward=4.0)
    timeline.stop()

    assert spent(timeline) == {"data_wait": 10.0 + 2 * (10 - 6), "forward": 6.0, "backward": 12.0}


def test_blocking_copy_counts_what_it_takes_not_what_it_waits_for() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("forward", gpu.event)
    gpu.launch(5.0)
    timeline.enter("copy")
    gpu.launch(1.0)
    gpu.synchronize()  # as a copy from pageable memory does
    timeline.enter("data_wait")
    gpu.work_on_host(2.0)
    timeline.stop()

    assert spent(timeline) == {"forward": 5.0, "copy": 1.0, "data_wait": 2.0}


def test_settling_does_not_wait_and_does_not_read_what_is_unknown() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("start", gpu.event)
    step(timeline, gpu, data=1.0, forward=2.0, backward=4.0)
    assert gpu.now == 1.0
    assert spent(timeline) == {"data_wait": 1.0}
    gpu.work_on_host(2.0)
    timeline.settle()
    assert spent(timeline) == {"data_wait": 1.0, "forward": 2.0}


def test_long_run_uses_its_events_again() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("start", gpu.event)
    for _ in range(1000):
        step(timeline, gpu, data=0.5, forward=1.0, backward=2.0)
        gpu.synchronize()
    timeline.stop()

    assert gpu.events <= 10
    assert spent(timeline) == {"data_wait": 500.0, "forward": 1000.0, "backward": 2000.0}


def test_host_ahead_by_several_steps_keeps_their_events_apart() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("start", gpu.event)
    for forward in (1.0, 2.0, 3.0, 4.0):
        step(timeline, gpu, data=0.0, forward=forward, backward=10.0)
    assert spent(timeline) == {}
    timeline.stop()

    assert spent(timeline) == {"forward": 10.0, "backward": 40.0}


def test_phase_that_counts_as_a_whole_takes_everything_in_it() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("overhead", gpu.event)
    gpu.work_on_host(1.0)
    with timeline.whole("evaluation"):
        step(timeline, gpu, data=1.0, forward=2.0, backward=0.0)
        with timeline.inside("copy"):
            gpu.launch(1.0)
        gpu.synchronize()
    gpu.work_on_host(8.0)
    timeline.stop()

    assert spent(timeline) == {"overhead": 9.0, "evaluation": 4.0}


def test_evaluation_in_a_held_phase_comes_back_to_it() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("start", gpu.event)
    timeline.hold("first_step")
    gpu.work_on_host(1.0)
    with timeline.whole("evaluation"):
        gpu.work_on_host(2.0)
    timeline.enter("forward")
    gpu.work_on_host(4.0)
    timeline.release("overhead")
    gpu.work_on_host(8.0)
    timeline.stop()

    assert spent(timeline) == {"first_step": 5.0, "evaluation": 2.0, "overhead": 8.0}


def test_phase_ends_when_it_fails() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("overhead", gpu.event)

    def fail() -> None:
        with timeline.whole("save"):
            gpu.work_on_host(1.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    timeline.enter("forward")
    gpu.work_on_host(2.0)
    timeline.stop()

    assert spent(timeline) == {"save": 1.0, "forward": 2.0}


def test_reading_goes_on_afterwards() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("forward", gpu.event)
    gpu.launch(3.0)
    assert timeline.read()["forward"] == 3.0
    gpu.launch(4.0)
    timeline.stop()

    assert spent(timeline) == {"forward": 7.0}


def test_nothing_counts_before_start_and_after_stop() -> None:
    gpu, timeline = Gpu(), Timeline()
    step(timeline, gpu, data=1.0, forward=2.0, backward=4.0)
    with timeline.whole("evaluation"), timeline.inside("copy"):
        gpu.work_on_host(1.0)
    assert spent(timeline) == {}
    gpu.synchronize()
    timeline.start("start", gpu.event)
    timeline.stop()
    step(timeline, gpu, data=1.0, forward=2.0, backward=4.0)

    assert spent(timeline) == {}
    assert gpu.events == 2


def test_session_that_broke_off_leaves_nothing_to_the_next() -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("start", gpu.event)
    timeline.hold("first_step")
    gpu.launch(1.0)
    timeline.start("start", gpu.event)  # the device has not even finished
    gpu.synchronize()
    timeline.enter("forward")
    gpu.launch(2.0)
    timeline.stop()

    assert spent(timeline) == {"forward": 2.0}


_ACTIONS = st.one_of(
    st.tuples(st.just("enter"), st.sampled_from(PHASES)),
    st.tuples(st.just("work_on_host"), st.integers(0, 8)),
    st.tuples(st.just("launch"), st.integers(0, 8)),
    st.tuples(st.sampled_from(["settle", "synchronize", "read"]), st.none()),
)


@given(st.lists(_ACTIONS, max_size=40))
def test_phases_add_up_to_the_whole_whatever_happens(actions: list[tuple[str, Any]]) -> None:
    gpu, timeline = Gpu(), Timeline()
    timeline.start("start", gpu.event)
    for name, value in actions:
        owner = timeline if name in ("enter", "settle", "read") else gpu
        getattr(owner, name)(*(() if value is None else (value,)))
    gpu.synchronize()
    timeline.stop()

    assert sum(timeline.seconds.values()) == gpu.now


def test_device_without_timed_events_is_stamped_by_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert stamps_of(torch.device("cpu")) is HostStamp
    assert stamps_of(torch.device("mps")) is HostStamp
    clock = iter([10.0, 11.5, 14.0])
    monkeypatch.setattr(hfbench.profiling.timeline.time, "perf_counter", lambda: next(clock))
    timeline = Timeline()
    timeline.start("forward")
    timeline.enter("backward")
    timeline.stop()

    assert spent(timeline) == {"forward": 1.5, "backward": 2.5}


def test_gpu_is_stamped_by_timed_events(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda *, enable_timing: asked.append(enable_timing))
    stamps_of(torch.device("cuda", 0))()

    assert asked == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_events_of_a_real_gpu_add_up_to_the_time_of_the_host() -> None:
    device, timeline = torch.device("cuda"), Timeline()
    factor = torch.rand(2048, 2048, device=device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    timeline.start("start", stamps_of(device))
    for _ in range(50):
        timeline.enter("data_wait")
        time.sleep(0.002)
        timeline.enter("forward")
        for _ in range(10):
            torch.mm(factor, factor)
        timeline.enter("overhead")
        timeline.settle()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    timeline.stop()

    assert timeline.seconds["forward"] > 0
    assert sum(timeline.seconds.values()) == pytest.approx(seconds, rel=0.02)


# The copy of a batch


def test_batch_is_copied_in_a_phase_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, timeline = Gpu(), Timeline()

    class Copied(Tensor):
        def to(self, device: torch.device, *, non_blocking: bool) -> Any:  # type: ignore[override]
            gpu.launch(1.0)
            return device, non_blocking

    monkeypatch.setattr(Batch, "timeline", timeline)
    timeline.start("data_wait", gpu.event)
    gpu.work_on_host(2.0)
    batch = Batch(pixel_values=torch.zeros(1).as_subclass(Copied))
    moved = batch.to(torch.device("cuda", 3), non_blocking=True)
    gpu.work_on_host(4.0)
    timeline.stop()

    assert moved == {"pixel_values": (torch.device("cuda", 3), True)}
    assert spent(timeline) == {"copy": 1.0, "data_wait": 2.0 + 3.0}


def test_batch_survives_the_way_out_of_a_worker() -> None:
    batch = pickle.loads(pickle.dumps(Batch(labels=torch.tensor([1, 2]))))

    assert isinstance(batch, Batch)
    assert batch["labels"].tolist() == [1, 2]


def test_loader_of_accelerate_copies_through_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the copy would hide in the wait for data.
    from accelerate.utils import send_to_device

    calls: list[bool] = []
    monkeypatch.setattr(
        Batch, "to", lambda self, device, non_blocking=False: calls.append(non_blocking)
    )
    send_to_device(Batch(labels=torch.zeros(1)), torch.device("cpu"), non_blocking=True)

    assert calls == [True]
