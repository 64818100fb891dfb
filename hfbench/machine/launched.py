"""Whether a launcher started this process as one of several, and what a shell only seems to say.

Libraries believe ``RANK`` and ``WORLD_SIZE`` wherever they come from: an interactive job, the entry
point of a container, a notebook that a launcher started. Then one process waits for others that
nobody started, or leaves all writing to them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hfbench.errors import DeviceError

logger = logging.getLogger(__name__)

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL = (
    *("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
    *("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_ELASTIC = "TORCHELASTIC_RUN_ID"  # what torch.distributed.run, and accelerate with it, sets
BY_HAND = "HFBENCH_LAUNCHED"  # says that the user started every process

_ELASTIC_LAUNCHERS = (
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate"),
    *("accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"),
)
_OTHER_LAUNCHERS = (
    *("deepspeed", "deepspeed.launcher.launch", "horovodrun", "colossalai"),
    *("mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "orterun", "orted", "prted"),
    *("prterun", "jsrun", "ibrun"),
)
_STRATEGIES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}
_DEVICE = "ACCELERATE_TORCH_DEVICE"
# Trainer gives accelerate its own values of these; others than the second ones are said.
_IGNORED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("", "1"),
    "ACCELERATE_GRADIENT_CLIPPING": ("",),
}
_SLOWER = {
    "CUDA_LAUNCH_BLOCKING": "makes the CPU wait for every kernel of a GPU",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "makes torch ask the driver for each tensor's memory",
    "TORCH_DISTRIBUTED_DEBUG": "makes torch check every exchange between processes",
}
_SLURM_STEP = "slurmstepd"  # of srun, and of every job's own shell too
_MAX_ANCESTORS = 20


def is_first() -> bool:
    """Tell whether this is the process that speaks and writes for all (rank 0)."""
    number = next((_number(name) for name in RANKS if name in os.environ), 0)
    return number == 0 or not _is_launched()


def speaks_at_the_end() -> bool:
    """Tell whether this process speaks for all when the launcher ends them.

    That is the first, or the second beside it where the first is the one that was lost.
    """
    if is_first():
        return True
    if os.environ.get("RANK") != "1" or os.environ.get("LOCAL_RANK") != "1":
        return False
    import psutil

    for process in psutil.Process(os.getppid()).children():
        with contextlib.suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get("RANK") == "0":
                return False
    return True


def check_launch() -> None:
    """Refuse what launcher or shell say, if it would change or hinder what is measured.

    Raises:
        DeviceError: If there is no folder to work in, if the launcher asks for another way of
            training, or if the environment says that this is one of several processes, but no
            launcher is at work.
    """
    _check_folders()
    _check_strategy()
    _check_leftovers()
    _warn_of_ignored()


def _check_folders() -> None:
    """Refuse to begin where libraries fail at the first temporary file, or relative path."""
    try:
        os.getcwd()
    except OSError:
        raise DeviceError(
            "The folder that this was started in has been removed; change to another one: cd …"
        ) from None
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise DeviceError(
            "No folder for temporary files can be written to: neither TMPDIR nor /tmp, /var/tmp, "
            "/usr/tmp and this folder. Name one that can: TMPDIR=FOLDER"
        ) from None


def _check_strategy() -> None:
    """Refuse ways of training that accelerate would take up without a word to the recipe."""
    found = {
        name: what
        for name, what in _STRATEGIES.items()
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t")
    }
    if os.environ.get(_DEVICE):
        found[_DEVICE] = f"the device {os.environ[_DEVICE]}"
    if found:
        said = ", ".join(f"{what} ({name}={os.environ[name]})" for name, what in found.items())
        raise DeviceError(
            f"The launcher or the shell asks accelerate for {said}, which hfbench does not "
            "support: the result would not say what was measured. Start it without, as in: "
            "accelerate launch --multi_gpu --num_processes 2 --mixed_precision no --dynamo_backend "
            "no -m hfbench recipe … (another accelerate configuration: --config_file; in the "
            f"shell: unset {' '.join(found)})"
        )


@functools.cache
def _warn_of_ignored() -> None:
    for name, alone in _IGNORED.items():
        said = os.environ.get(name)
        if said is not None and said not in alone:
            logger.warning(
                f"{name}={said} comes from the launcher and is ignored; the recipe decides."
            )
    for name, what in _SLOWER.items():
        if os.environ.get(name, "0") not in ("", "0"):
            logger.warning(f"{name}={os.environ[name]} {what}; unset it to measure.")


def _check_leftovers() -> None:
    """Refuse to run as one of several processes that no launcher started."""
    _check_copies()
    told = _telling()
    if not told or _is_launched():
        return
    said = [f'{name}="{os.environ[name]}"' for name in told]
    every = (*RANKS, *SIZES, *_LOCAL, *_ADDRESS, _ELASTIC)
    names = " ".join(name for name in every if name in os.environ)
    processes = max([2, *(_number(name) or 0 for name in SIZES)])
    raise DeviceError(
        f"The environment says that this is one of several processes ({', '.join(said)}), but no "
        "launcher that set this is at work: it would wait for the others for ever, or leave "
        f"writing to them. For one process: unset {names}. For several, start it with a launcher: "
        f"accelerate launch --multi_gpu --num_processes {processes} -m hfbench recipe … If you "
        f"started a process for each rank yourself, set {BY_HAND}=1."
    )


def check_alone(command: str) -> None:
    """Refuse a launcher for what starts processes itself, or measures in a single one.

    Args:
        command: Such as ``suite``.

    Raises:
        DeviceError: With what to write instead, or as `check_launch`.
    """
    from hfbench.machine.environment import requested_processes

    check_launch()
    processes = requested_processes()
    if processes < 2:
        return
    if command != "suite":
        raise DeviceError(
            f"hfbench {command} measures in one process, but the launcher was asked for "
            f"{processes}; run the same command without a launcher."
        )
    words = sys.argv[2:] if sys.argv[1:2] == [command] else []
    launcher = _launcher_line() or f"accelerate launch --multi_gpu --num_processes {processes}"
    raise DeviceError(
        f"A suite starts each of its runs with the launcher itself, but here the launcher was to "
        f"start {processes} suites. Write: hfbench suite --launcher {shlex.quote(launcher)} "
        f"{shlex.join(words) if words else 'RECIPE …'}"
    )


def _check_copies() -> None:
    """Refuse several tasks of srun that know nothing of each other."""
    tasks = _number("SLURM_STEP_NUM_TASKS") or 1
    told = any(name in os.environ for name in (*SIZES, BY_HAND))
    if tasks > 1 and not told and _is_step():
        raise DeviceError(
            f"srun started {tasks} copies of this command, and none knows of the others. For one "
            "process: srun --ntasks=1. For several: srun --ntasks-per-node=1 accelerate launch "
            "--multi_gpu --num_processes … -m hfbench recipe …"
        )


def _telling() -> list[str]:
    """Return the variables of which one process without others would have none, or another."""
    found = []
    for name in (*RANKS, *SIZES, *_LOCAL):
        if name not in os.environ:
            continue
        alone = (1,) if name in SIZES or name.endswith(("SIZE", "NRANKS")) else (0, -1)
        if _number(name) not in alone:
            found.append(name)
    # On a GPU a local rank alone makes accelerate look for the others' address.
    complete = all(name in os.environ for name in ("RANK", "WORLD_SIZE", *_ADDRESS))
    if not found and (_number("LOCAL_RANK") or 0) >= 0 and "LOCAL_RANK" in os.environ:
        found = [] if complete else ["LOCAL_RANK"]
    return found


def _number(name: str) -> int | None:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return None


def _is_launched() -> bool:
    """Tell whether what set the variables of a launcher is at work above this process."""
    if os.environ.get(BY_HAND) == "1" or multiprocessing.parent_process() is not None:
        return True
    names = {name for command in _ancestors(os.getpid()) for name in _names(command)}
    if _ELASTIC in os.environ and names.intersection(_ELASTIC_LAUNCHERS):
        return True
    if names.intersection(_OTHER_LAUNCHERS):
        return True
    tasks = _number("SLURM_STEP_NUM_TASKS")  # a job's own shell has ranks of nobody
    return tasks is not None and tasks in map(_number, SIZES) and _is_step()


def _is_step() -> bool:
    return any(_SLURM_STEP in " ".join(command[:1]) for command in _ancestors(os.getpid()))


@functools.cache
def _ancestors(process_id: int) -> tuple[tuple[str, ...], ...]:
    """Return the command lines of a process's parent, of its parent, and so on."""
    import psutil

    found: list[tuple[str, ...]] = []
    try:
        process = psutil.Process(process_id).parent()
        while process is not None and len(found) < _MAX_ANCESTORS:
            found.append(tuple(process.cmdline()))
            process = process.parent()
    except psutil.Error:
        pass
    return tuple(found)


def _names(command: Sequence[str]) -> list[str]:
    """Return what a command line starts: the program, or the script or module of Python."""
    python = bool(command) and Path(command[0]).name.startswith("python")
    words = [word for word in command[1:4] if word != "-m"] if python else command[:1]
    return [Path(word).name.removesuffix(".exe").removesuffix(".py") for word in words]


def _launcher_line() -> str | None:
    """Return how the launcher above was called, as ``--launcher`` takes it."""
    for command in _ancestors(os.getpid()):
        if "hfbench" not in command or not {*_names(command)} & {*_ELASTIC_LAUNCHERS}:
            continue
        words = list(command[: command.index("hfbench")])
        while words and words[-1] in ("-m", "--module"):
            words.pop()
        if len(words) > 1 and words[1] != "-m" and Path(words[0]).name.startswith("python"):
            words = [Path(words[1]).name, *words[2:]]  # a script, such as torchrun
        elif words[1:2] == ["-m"]:
            words[0] = "python"
        return shlex.join(words)
    return None
