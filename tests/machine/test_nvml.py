"""What a driver that is not here says of its GPUs, and what becomes of it in an environment."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from hfbench.machine.environment import Environment, describe_environment, environment_differences
from hfbench.machine.nvml import GpuSettings, Neighbours, describe_settings
from tests.fake_nvml import Card, FakeNvml

INSTANCE = "Some GPU MIG 1g.10gb"


def described(environment: Environment) -> GpuSettings:
    """Return the part of an environment that NVML gave."""
    return GpuSettings(
        driver=environment.driver,
        power_limit_watts=environment.power_limit_watts,
        mig_profile=environment.mig_profile,
        device_note=environment.device_note,
    )


def test_whole_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(GPU_a=Card(milliwatts=350_000)).install(monkeypatch, "a")
    environment = describe_environment("cuda")
    assert described(environment) == GpuSettings("580.65.06", 350.0, "off", None)
    assert Environment.model_validate_json(environment.model_dump_json()) == environment
    assert described(environment.on_cpu()) == GpuSettings()


def test_lowest_limit_of_several_gpus_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {f"GPU_{i}": Card(milliwatts=watts * 1000) for i, watts in enumerate((400, 300, 200))}
    FakeNvml(**cards).install(monkeypatch, "0", "1", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert describe_environment("cuda").power_limit_watts == 300.0  # the third is not in use


@pytest.mark.parametrize(
    ("cards", "seen", "name"),
    [
        # CUDA names the instance, or, as older versions do, the GPU that it is of.
        ({"GPU_a": Card(), "MIG_b": Card(INSTANCE, parent="GPU-a")}, "b", INSTANCE),
        ({"GPU_a": Card(), "MIG_b": Card(INSTANCE, parent="GPU-a")}, "MIG-b", INSTANCE),
        ({"GPU_a": Card()}, "a", INSTANCE),
        ({"GPU_a": Card(), "MIG_b": Card(INSTANCE, parent="GPU-a")}, "b", "Some GPU"),
    ],
)
def test_instance_of_a_gpu_has_its_profile_and_the_limit_of_the_whole(
    cards: dict[str, Card], seen: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeNvml(**cards).install(monkeypatch, seen, name=name)
    assert described(describe_environment("cuda")) == GpuSettings(
        "580.65.06", 400.0, "1g.10gb", None
    )


def test_missing_package_is_said_and_a_profile_in_the_name_is_still_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeNvml().install(monkeypatch, "a")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    why = "NVML needs the package nvidia-ml-py: pip install 'hfbench[energy]'"
    note = f"driver, power limit and MIG profile not known: {why}"
    assert described(describe_environment("cuda")) == GpuSettings(device_note=note)
    FakeNvml().install(monkeypatch, "a", name=INSTANCE)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert described(describe_environment("cuda")) == GpuSettings(
        mig_profile="1g.10gb", device_note=f"driver and power limit not known: {why}"
    )


def test_driver_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(GPU_a=Card())
    nvml.broken.add("nvmlInit")
    nvml.install(monkeypatch, "a")
    said = describe_environment("cuda").device_note
    assert str(said).endswith("not known: NVML does not answer: Driver Not Loaded")


def test_what_one_question_does_not_tell_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(GPU_a=Card(milliwatts=None))
    nvml.install(monkeypatch, "a")
    assert described(describe_environment("cuda")) == GpuSettings(
        "580.65.06", None, "off", "power limit not known: Not Supported"
    )
    nvml.broken |= {"nvmlSystemGetDriverVersion", "nvmlDeviceGetName"}
    assert described(describe_environment("cuda")) == GpuSettings(
        device_note="power limit not known: Not Supported; MIG profile not known: Not Supported; "
        "driver not known: Not Supported"
    )


@pytest.mark.parametrize("kind", ["cpu", "xpu", "mps"])
def test_other_devices_have_no_such_settings(kind: str) -> None:
    assert describe_settings(torch.device(kind)) == GpuSettings()


# --- whether runs compare ---


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"driver": "570.1"}, ("driver", "580.65.06", "570.1")),
        ({"power_limit_watts": 300.0}, ("power_limit_watts", 400, 300)),
        ({"mig_profile": "1g.10gb"}, ("mig_profile", "off", "1g.10gb")),
        ({"power_limit_watts": 400.2}, None),
        ({"driver": None, "power_limit_watts": None, "device_note": "no NVML"}, None),
        ({"mig_profile": None}, None),
    ],
)
def test_settings_that_differ_are_named_and_unknown_ones_are_not(
    change: dict[str, Any],
    difference: tuple[str, Any, Any] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeNvml(GPU_a=Card()).install(monkeypatch, "a")
    some = describe_environment("cuda")
    other = some.model_copy(update=change)
    assert environment_differences(some, other) == ([difference] if difference else [])
    assert len(environment_differences(other, some)) == (difference is not None)


# --- other processes ---

MIB = 2**20


def count(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, *uuids: str) -> tuple[Any, ...]:
    """Return how many others there are, their memory in MiB, and why it is not known."""
    neighbours = Neighbours(nvml.install(monkeypatch, *uuids))
    return (*neighbours.count(), neighbours.note)


def test_other_processes_are_counted_and_this_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(computing={os.getpid(): 900 * MIB})
    nvml = FakeNvml(GPU_a=card, GPU_b=Card(computing={77: 999 * MIB}))
    assert count(nvml, monkeypatch, "a", "b") == (0, 0.0, None)  # the second is not in use
    card.computing |= {1: 300 * MIB}
    card.drawing |= {1: 300 * MIB, 2: 12 * MIB}  # the first is one process that does both
    assert count(nvml, monkeypatch, "a", "b") == (2, 312.0, None)


def test_workers_of_this_process_are_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        card = Card(computing={os.getpid(): MIB, worker.pid: MIB})
        assert count(FakeNvml(GPU_a=card), monkeypatch, "a") == (0, 0.0, None)
        worker.communicate(b"\n")


def test_processes_of_one_launcher_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        # The parent of this process stands for the launcher: it has started the other one too.
        monkeypatch.setattr("psutil.Process.parent", lambda self: self)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        nvml = FakeNvml(
            GPU_a=Card(computing={os.getpid(): MIB}),
            GPU_b=Card(computing={other.pid: MIB, 1: 5 * MIB}),
        )
        assert count(nvml, monkeypatch, "a", "b") == (1, 5.0, None)
        other.communicate(b"\n")


@pytest.mark.parametrize(
    ("computing", "expected"),
    [
        ({1: MIB}, (0, 0.0, None)),
        ({1: MIB, 2: MIB}, (1, None, "NVML does not tell the memory of each process")),
        ({}, (None, None, "NVML shows no processes here, as in some containers")),
    ],
)
def test_container_in_which_the_numbers_are_the_hosts(
    computing: dict[int, int | None],
    expected: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert count(FakeNvml(GPU_a=Card(computing=computing)), monkeypatch, "a") == expected


def test_memory_that_the_driver_does_not_tell_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(computing={os.getpid(): None, 1: None})  # as on Windows
    said = "NVML does not tell the memory of each process"
    assert count(FakeNvml(GPU_a=card), monkeypatch, "a") == (1, None, said)


def test_driver_that_lists_no_processes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(GPU_a=Card(computing={os.getpid(): MIB}))
    nvml.broken.add("nvmlDeviceGetGraphicsRunningProcesses")  # an instance draws nothing
    assert count(nvml, monkeypatch, "a") == (0, 0.0, None)
    nvml.broken.add("nvmlDeviceGetComputeRunningProcesses")
    said = "NVML does not list processes: Not Supported"
    assert count(nvml, monkeypatch, "a") == (None, None, said)


def test_nobody_looks_where_there_is_no_nvidia_gpu_or_no_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Neighbours(torch.device("cpu")).count() == (None, None)
    FakeNvml().install(monkeypatch, "a")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    neighbours = Neighbours(torch.device("cuda", 0))
    assert neighbours.count() == (None, None)
    assert "hfbench[energy]" in str(neighbours.note)
