"""What NVML, the interface of NVIDIA's driver, says of the GPUs that a run uses.

Its package, nvidia-ml-py, is optional. Where it is absent, or does not answer, that is said.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_MIG = " MIG "  # between the name of a GPU and the profile of an instance


class NvmlError(Exception):
    """NVML cannot be asked; says why."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or an instance of one.

    Attributes:
        handle: NVML's, of what computes.
        card: NVML's, of the whole GPU.
    """

    handle: Any
    card: Any


@dataclass(frozen=True)
class GpuSettings:
    """How the GPUs of a run are set up; `Environment` has the same fields."""

    driver: str | None = None
    power_limit_watts: float | None = None
    mig_profile: str | None = None
    device_note: str | None = None


def find_gpus(device: torch.device) -> tuple[Any, list[Gpu]]:
    """Find the GPUs that the processes of a run use on this machine, as far as this one sees them.

    Returns:
        The module `pynvml`, initialised, and the GPUs.

    Raises:
        NvmlError: If NVML cannot be asked.
    """
    if device.type != "cuda":
        raise NvmlError("no NVIDIA GPU was used")
    try:
        import pynvml
    except ImportError:
        raise NvmlError(
            "NVML needs the package nvidia-ml-py: pip install 'hfbench[energy]'"
        ) from None
    numbers = _numbers_in_use(device)
    uuids = [str(torch.cuda.get_device_properties(number).uuid) for number in numbers]
    try:
        pynvml.nvmlInit()
        return pynvml, [_find(pynvml, uuid) for uuid in uuids]
    except pynvml.NVMLError as error:
        raise NvmlError(f"NVML does not answer: {error}") from None


def _numbers_in_use(device: torch.device) -> list[int]:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    # Process i of a machine has the i-th visible GPU, unless each was shown its own alone.
    shared = 1 < here <= torch.cuda.device_count()
    return list(range(here)) if shared else [device.index or 0]


def _find(nvml: Any, uuid: str) -> Gpu:
    """Find what CUDA and torch name by a UUID, whatever `CUDA_VISIBLE_DEVICES` made of its number.

    torch leaves out the first letters, which tell GPUs from instances.
    """
    uuid = uuid.removeprefix("GPU-")
    if not uuid.startswith("MIG-"):
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            return Gpu(handle, handle)
        except nvml.NVMLError:
            uuid = f"MIG-{uuid}"
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    return Gpu(handle, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))


def describe_settings(device: torch.device) -> GpuSettings:
    """Return driver, power limit and MIG profile of a run's GPUs; never fails."""
    if device.type != "cuda":
        return GpuSettings()
    profile = torch.cuda.get_device_name(device).partition(_MIG)[2] or None
    try:
        nvml, gpus = find_gpus(device)
    except NvmlError as error:
        what = "driver and power limit" if profile else "driver, power limit and MIG profile"
        return GpuSettings(mig_profile=profile, device_note=f"{what} not known: {error}")
    notes = []

    def ask(what: str, question: Callable[..., Any], *about: Any) -> Any:
        try:
            return question(*about)
        except nvml.NVMLError as error:
            notes.append(f"{what} not known: {error}")
            return None

    limits = [ask("power limit", nvml.nvmlDeviceGetPowerManagementLimit, gpu.card) for gpu in gpus]
    known = [milliwatts / 1e3 for milliwatts in limits if milliwatts is not None]
    if profile is None:
        name = ask("MIG profile", nvml.nvmlDeviceGetName, gpus[0].handle)
        profile = None if name is None else name.partition(_MIG)[2] or "off"
    return GpuSettings(
        driver=ask("driver", nvml.nvmlSystemGetDriverVersion),
        power_limit_watts=min(known) if known else None,  # the slowest one sets the pace
        mig_profile=profile,
        device_note="; ".join(dict.fromkeys(notes)) or None,
    )


class Neighbours:
    """Other processes on the GPUs of a run.

    Attributes:
        note: Why they, or their memory, are not known.
    """

    def __init__(self, device: torch.device) -> None:
        """Ask for nothing yet."""
        self.note: str | None = None
        self._nvml: Any = None
        self._gpus: list[Gpu] = []
        try:
            self._nvml, self._gpus = find_gpus(device)
        except NvmlError as error:
            self.note = str(error)

    def count(self) -> tuple[int | None, float | None]:
        """Count them now; this process must have used its GPU.

        Returns:
            How many there are, and the device memory in MiB that they hold together; ``None`` for
            what is not known.
        """
        if not self._gpus:
            return None, None
        ours = _processes_of_this_run()
        held: list[int | None] = []
        try:
            for gpu in self._gpus:
                found = _processes_on(self._nvml, gpu)
                others = [memory for pid, memory in found.items() if pid not in ours]
                if len(others) == len(found):  # the host's numbers: any one of them may be ours
                    others = [None] * (len(found) - 1)
                held += others
        except NvmlError as error:
            self.note = str(error)
            return None, None
        known = [memory for memory in held if memory is not None]
        if len(known) < len(held):
            self.note = "NVML does not tell the memory of each process"
            return len(held), None
        return len(held), sum(known) / 2**20


def _processes_on(nvml: Any, gpu: Gpu) -> dict[int, int | None]:
    """Return the bytes that each process holds on a GPU, by its number."""
    try:
        found = list(nvml.nvmlDeviceGetComputeRunningProcesses(gpu.handle))
    except nvml.NVMLError as error:
        raise NvmlError(f"NVML does not list processes: {error}") from None
    with contextlib.suppress(nvml.NVMLError):  # instances draw nothing
        found += nvml.nvmlDeviceGetGraphicsRunningProcesses(gpu.handle)
    if not found:  # not even this one
        raise NvmlError("NVML shows no processes here, as in some containers")
    return {process.pid: process.usedGpuMemory for process in found}


def _processes_of_this_run() -> set[int]:
    """Return the numbers of this process, its workers, and the others of one launcher."""
    import psutil

    here = psutil.Process()
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        root = (here.parent() or here) if launched else here
        return {here.pid, *(process.pid for process in root.children(recursive=True))}
    except psutil.Error:
        return {here.pid}
