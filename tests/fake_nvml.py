"""A driver that is not here: stands in for the module `pynvml`, and torch's view of its GPUs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hfbench.machine.nvml import Gpu


@dataclass
class Card:
    """What the driver knows of a GPU, or of an instance of one."""

    name: str = "Some GPU"
    millijoules: int = 0
    milliwatts: int | None = 400_000
    parent: str | None = None  # of an instance
    # Memory in bytes by process number; None where the driver does not tell.
    computing: dict[int, int | None] = field(default_factory=dict)
    drawing: dict[int, int | None] = field(default_factory=dict)


class FakeNvml:
    """Stand in for `pynvml`; a handle is the UUID."""

    class NVMLError(Exception):
        pass

    def __init__(self, **cards: Card) -> None:
        """Make cards, named as `GPU_a` for ``GPU-a``."""
        self.cards = {name.replace("_", "-"): card for name, card in cards.items()}
        self.broken: set[str] = set()  # names of functions, and UUIDs whose counters are

    def _check(self, name: str) -> None:
        if name in self.broken:
            raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None:  # noqa: N802
        if "nvmlInit" in self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        self._check("nvmlSystemGetDriverVersion")
        return "580.65.06"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.cards:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:  # noqa: N802
        parent = self.cards[handle].parent
        if parent is None:
            raise self.NVMLError("Invalid Argument")
        return parent

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        self._check("nvmlDeviceGetName")
        return self.cards[handle].name

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:  # noqa: N802
        limit = self.cards[handle].milliwatts
        if limit is None or self.cards[handle].parent:
            raise self.NVMLError("Not Supported")
        return limit

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self._check(handle)
        return self.cards[handle].millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        self._check("nvmlDeviceGetComputeRunningProcesses")
        return _list(self.cards[handle].computing)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        self._check("nvmlDeviceGetGraphicsRunningProcesses")
        return _list(self.cards[handle].drawing)

    def gpus(self) -> list[Gpu]:
        """Return all cards as `hfbench.machine.nvml.find_gpus` does."""
        return [Gpu(uuid, card.parent or uuid) for uuid, card in self.cards.items()]

    def install(
        self, monkeypatch: pytest.MonkeyPatch, *uuids: str, name: str = "Some GPU"
    ) -> torch.device:
        """Let this process see GPUs of these UUIDs in torch's spelling; return the first."""
        monkeypatch.setitem(sys.modules, "pynvml", self)  # type: ignore[arg-type]
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(uuids))
        cuda = {
            "device_count": lambda: len(uuids),
            "get_device_name": lambda device=None: name,
            "get_device_properties": lambda device=None: SimpleNamespace(
                total_memory=80 * 2**30, uuid=uuids[_number(device)]
            ),
        }
        for function, answer in cuda.items():
            monkeypatch.setattr(torch.cuda, function, answer)
        return torch.device("cuda", 0)


def _number(device: Any) -> int:
    if isinstance(device, torch.device):
        return device.index or 0
    return device or 0


def _list(processes: dict[int, int | None]) -> list[Any]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes.items()]
