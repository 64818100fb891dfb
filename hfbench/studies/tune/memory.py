"""Whether a larger micro-batch would fit: on a CPU trying it would be the end of the process."""

from __future__ import annotations

from pathlib import Path

import psutil

from hfbench.results.windows import Window

_RESERVE = 0.1  # of the memory that is free, for everything else on the machine
_MARGIN = 1.2  # on the growth: allocators do not grow evenly
_CGROUP = Path("/sys/fs/cgroup")


class MemoryForecast:
    """Estimates the peak of a larger micro-batch from the peaks of smaller ones.

    Weights, gradients and the optimizer's state are there at any size; the rest grows with the
    images.
    """

    def __init__(self, base_mib: float, limit_mib: float | None, on_accelerator: bool) -> None:
        """Begin with what is there before any window.

        Args:
            base_mib: That training takes at least; 0 if unknown, which overestimates the growth.
            limit_mib: That training may take; by default what is free, on an accelerator all.
            on_accelerator: Whether torch itself says when memory is out.
        """
        self._base, self._limit, self._on_accelerator = base_mib, limit_mib, on_accelerator

    def learn(self, small: tuple[int, float], large: tuple[int, float]) -> None:
        """Take the part that does not grow from two windows: images and peak (MiB) of each."""
        growth = (large[1] - small[1]) / (large[0] - small[0])
        if growth > 0:
            self._base = max(self._base, small[1] - growth * small[0])

    def estimate(self, images: int, peak_mib: float, wanted: int) -> float:
        """Return the peak (MiB) to expect.

        Args:
            images: Of a micro-batch that was measured.
            peak_mib: What it took.
            wanted: Images of the micro-batch in question.
        """
        return estimate_peak_mib(self._base, images, peak_mib, wanted)

    def room(self) -> float | None:
        """Return the memory (MiB) that training may take; ``None`` if torch will say it."""
        if self._limit is not None or self._on_accelerator:
            return self._limit
        return resident_mib() + (1 - _RESERVE) * available_mib()


def estimate_peak_mib(base_mib: float, images: int, peak_mib: float, wanted: int) -> float:
    """Return the peak (MiB) of so many images, if what `images` took over the base grows evenly."""
    growth = max(peak_mib - base_mib, 0.0) / images
    return peak_mib + _MARGIN * growth * (wanted - images)


def peak_mib(window: Window) -> float:
    """Return the peak of a window: of the device, on a CPU of the process."""
    on_device = window.peak_device_memory_mib
    return window.peak_process_memory_mib if on_device is None else on_device


def resident_mib() -> float:
    """Return the memory that this process has."""
    return float(psutil.Process().memory_info().rss) / 2**20


def available_mib(cgroup: Path = _CGROUP) -> float:
    """Return the memory (MiB) that this process can still get: of the machine, or its container.

    Args:
        cgroup: Folder of the container's limits, of Linux's control groups version 2. What files
            it has cached there can be dropped.
    """
    machine = float(psutil.virtual_memory().available) / 2**20
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" if there is none
        used = int((cgroup / "memory.current").read_text())
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return machine
    cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return max(min(machine, (limit - used + cached) / 2**20), 0.0)
