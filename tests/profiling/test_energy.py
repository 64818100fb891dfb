"""Joules from counters that a test turns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hfbench.profiling.energy import meter_cpu, meter_devices, meter_gpus
from tests.fake_nvml import Card, FakeNvml


class Powercap:
    """A folder as the kernel shows it; energies in microjoules."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def zone(self, number: str, name: str, energy: int, wraps_at: int = 1_000_000_000) -> Path:
        folder = self.root / f"intel-rapl:{number}"
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
        return folder / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    """Return an empty folder."""
    (tmp_path / "intel-rapl").mkdir()
    return Powercap(tmp_path)


# CPU packages


def test_packages_are_summed_and_their_parts_are_not(powercap: Powercap) -> None:
    first = powercap.zone("0", "package-0", 1_000_000)
    second = powercap.zone("1", "package-1", 5_000_000)
    part = powercap.zone("0:0", "core", 0)
    board = powercap.zone("2", "psys", 0)
    meter = meter_cpu(powercap.root)
    for file, energy in (
        (first, 3_500_000),
        (second, 6_000_000),
        (part, 9_000_000),
        (board, 9_000_000),
    ):
        file.write_text(str(energy))

    assert meter.update() == 2.5 + 1.0
    assert meter.update() == 0.0
    assert meter.note is None


def test_counter_that_wrapped_around_goes_on(powercap: Powercap) -> None:
    file = powercap.zone("0", "package-0", 262_000_000_000, wraps_at=262_143_000_000)
    meter = meter_cpu(powercap.root)
    file.write_text("57000000")
    assert meter.update() == pytest.approx(143 + 57)


def test_machine_without_counters_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        meter = meter_cpu(folder)
        assert meter.update() is None
        assert meter.note == "this machine shows no RAPL counter"


def test_counter_for_root_alone_is_said(powercap: Powercap) -> None:
    file = powercap.zone("0", "package-0", 0)
    file.unlink()
    file.mkdir()  # cannot be read, not even by root
    meter = meter_cpu(powercap.root)
    assert meter.update() is None
    assert str(meter.note) == f"{file} cannot be read; most systems let root alone do so"


def test_counter_that_disappears_makes_the_rest_unknown(powercap: Powercap) -> None:
    file = powercap.zone("0", "package-0", 0)
    meter = meter_cpu(powercap.root)
    assert meter.update() == 0.0
    file.unlink()
    assert meter.update() is None
    file.write_text("1000000")
    assert meter.update() is None
    assert "cannot be read" in str(meter.note)


# GPUs


def test_gpus_of_the_run_are_summed_and_others_are_not() -> None:
    nvml = FakeNvml(GPU_a=Card(), GPU_b=Card(), GPU_c=Card())
    meter = meter_gpus(nvml.gpus()[:2], nvml)
    for uuid, energy in (("GPU-a", 3000), ("GPU-b", 500), ("GPU-c", 9000)):
        nvml.cards[uuid].millijoules = energy
    assert meter.update() == 3.0 + 0.5
    assert meter.note is None


def test_gpu_without_a_counter_is_said() -> None:
    nvml = FakeNvml(GPU_a=Card())
    nvml.broken.add("GPU-a")
    meter = meter_gpus(nvml.gpus(), nvml)
    assert meter.update() is None
    assert meter.note == "NVML keeps no count of this GPU: Not Supported"


@pytest.mark.parametrize(("broken", "uuid"), [("nvmlInit", "a"), ("", "b")])
def test_nvml_that_does_not_answer_is_said(
    broken: str, uuid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml(GPU_a=Card())
    nvml.broken.add(broken)
    meter = meter_devices(nvml.install(monkeypatch, uuid))
    assert meter.update() is None
    assert str(meter.note).startswith("NVML does not answer: ")


def test_counter_that_starts_anew_is_no_saving() -> None:
    nvml = FakeNvml(GPU_a=Card(millijoules=5000))
    meter = meter_gpus(nvml.gpus(), nvml)
    nvml.cards["GPU-a"].millijoules = 10
    assert meter.update() is None
    assert meter.note == "the counter was reset"


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_run_without_an_nvidia_gpu_says_so(kind: str) -> None:
    meter = meter_devices(torch.device(kind))
    assert meter.update() is None
    assert meter.note == "no NVIDIA GPU was used"


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "hfbench[energy]" in str(meter_devices(torch.device("cuda", 0)).note)


@pytest.mark.parametrize(
    ("world", "here", "visible", "device", "expected", "note"),
    [
        (1, 1, 4, 2, 4.0, None),
        (4, 4, 4, 0, 1 + 2 + 4 + 8, None),
        (4, 2, 4, 0, 1 + 2, "2 of 4 GPUs"),  # two machines
        (4, 4, 1, 0, 1.0, "1 of 4 GPUs"),  # each process is shown its own
    ],
)
def test_main_process_counts_for_all_that_it_can_see(
    world: int,
    here: int,
    visible: int,
    device: int,
    expected: float,
    note: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The driver's number of a GPU is not that which the process sees; its identity is.
    nvml = FakeNvml(GPU_3=Card(), GPU_2=Card(), GPU_1=Card(), GPU_0=Card())
    nvml.install(monkeypatch, *map(str, range(4)))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    meter = meter_devices(torch.device("cuda", device))
    for number in range(4):
        nvml.cards[f"GPU-{number}"].millijoules = 1000 * 2**number

    assert meter.update() == expected
    assert meter.note == note or str(meter.note).startswith(str(note))
