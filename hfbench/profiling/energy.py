"""Energy that the machine itself counts: GPUs by NVML, CPU packages by RAPL.

NVML: `nvmlDeviceGetTotalEnergyConsumption`, millijoules since the driver was loaded, from Volta on.
RAPL: the kernel's powercap interface, microjoules that wrap around after some hundred kilojoules
(https://docs.kernel.org/power/powercap/powercap.html); AMD's packages appear there too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfbench.machine.nvml import Gpu, NvmlError, find_gpus

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")  # its parts, counted in it, have a second number


@dataclass(frozen=True)
class Counter:
    """A count that only grows, until it wraps around.

    Attributes:
        read: Returns joules; raises `CounterError` if it cannot.
        range_joules: Where it starts again at 0; ``None`` if it does not.
    """

    read: Callable[[], float]
    range_joules: float | None = None


class CounterError(Exception):
    """A counter cannot be read; says why."""


class Meter:
    """Joules of several counters together, from one reading to the next.

    Attributes:
        note: Why there is no count, or what it leaves out.
    """

    def __init__(self, counters: Sequence[Counter], note: str | None = None) -> None:
        self.note = note
        self._counters = list(counters)
        self._last: list[float] = []
        self.update()

    def update(self) -> float | None:
        """Read all counters.

        Must be called more often than any of them can wrap around.

        Returns:
            Joules since the last call, or since the meter was made; ``None`` if they are not known.
        """
        if not self._counters:
            return None
        try:
            now = [counter.read() for counter in self._counters]
            before, self._last = self._last or now, now
            parts = zip(self._counters, before, now, strict=True)
            return sum(_difference(counter.range_joules, a, b) for counter, a, b in parts)
        except CounterError as error:
            self._counters, self.note = [], str(error)
            return None


def _difference(range_joules: float | None, before: float, now: float) -> float:
    if now >= before:
        return now - before
    if range_joules is None:
        raise CounterError("the counter was reset")
    return now - before + range_joules


def meter_cpu(powercap: Path = POWERCAP) -> Meter:
    """Return a meter of all CPU packages.

    Args:
        powercap: Folder of the kernel's powercap interface.
    """
    zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if _PACKAGE.fullmatch(zone.name))
    # Beside packages there may be "psys", the whole board with the packages in it.
    packages = [zone for zone in zones if _read(zone / "name").startswith("package")]
    if not packages:
        return Meter([], "this machine shows no RAPL counter")
    try:
        return Meter([_package_counter(zone) for zone in packages])
    except CounterError as error:
        return Meter([], str(error))


def _package_counter(zone: Path) -> Counter:
    def read(file: Path) -> float:
        text = _read(file)
        if not text:
            raise CounterError(f"{file} cannot be read; most systems let root alone do so")
        return int(text) / 1e6

    return Counter(lambda: read(zone / "energy_uj"), read(zone / "max_energy_range_uj"))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def meter_devices(device: torch.device) -> Meter:
    """Return a meter of the GPUs that the processes of this run use on this machine."""
    try:
        nvml, gpus = find_gpus(device)
    except NvmlError as error:
        return Meter([], str(error))
    meter = meter_gpus(gpus, nvml)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if meter.note is None and len(gpus) < world:
        meter.note = f"{len(gpus)} of {world} GPUs: those that the main process sees"
    return meter


def meter_gpus(gpus: Sequence[Gpu], nvml: Any) -> Meter:
    """Return a meter of some GPUs.

    Args:
        gpus: From `hfbench.machine.nvml.find_gpus`.
        nvml: The module `pynvml`.
    """

    def counter(gpu: Gpu) -> Counter:
        def read() -> float:
            try:
                return float(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)) / 1e3
            except nvml.NVMLError as error:
                raise CounterError(f"NVML keeps no count of this GPU: {error}") from None

        return Counter(read)

    return Meter([counter(gpu) for gpu in gpus])
