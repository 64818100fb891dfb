"""The machine: what it is, what it can do, and whether it can run a recipe as written."""

from __future__ import annotations

import contextlib
import netrc
import os
import platform
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from hfbench.machine.launched import SIZES, is_first
from hfbench.recipe.trial import missing_optimizer

if TYPE_CHECKING:
    import psutil

    from hfbench.recipe.schema import Recipe

PACKAGES = (
    "hfbench",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "timm",
    "scikit-learn",
    "huggingface-hub",
    "numpy",
    "pillow",
)

_SERVER_SECONDS = 3.0  # for a tracker's server to answer


# How a command line may name accelerate's command and its launcher.
_ACCELERATE = ("accelerate", "accelerate.exe", "accelerate.commands.accelerate_cli")
_ACCELERATE_LAUNCH = ("accelerate-launch", "accelerate.commands.launch")


# What transformers passes on to torch.compile beside the recipe's backend, and how it is alone.
_COMPILING = {
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
}

_NOT_DECISIVE = {"platform", "hfbench_commit", "packages", "device_count", "device_note"}
_OFTEN_UNKNOWN = ("driver", "power_limit_watts", "mig_profile")  # without NVML, or of older results


class Environment(BaseModel):
    """What a run ran on. Names no host, user or path, since it is published with a model.

    Attributes:
        device_type: ``cpu``, ``cuda``, ``xpu``, ``mps``, ….
        device_name: Of the device that the main process used.
        device_count: Devices that this process saw, 1 on a CPU. How many a run used is its
            ``training.world_size``, one a process.
        device_memory_mib: ``None`` where the device has none of its own.
        cpu: Name of the processor.
        cpu_cores: Logical ones of the machine.
        torch_threads: That torch computed with on the CPU.
        platform: System, release of the kernel, architecture.
        cuda: Version that torch was built for; ``None`` without an NVIDIA GPU.
        packages: Versions.
        hfbench_commit: ``None`` if hfbench was not run from a checkout.
        driver: Version of NVIDIA's driver; ``None`` of another device, or where it is not known.
        power_limit_watts: That the GPU was set to, the lowest of several; ``None`` as before.
        mig_profile: Of the instance of a GPU, such as ``1g.10gb``; ``off`` of a whole one; ``None``
            as before.
        device_note: Why something of the device is not known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    device_type: str
    device_name: str
    device_count: int
    device_memory_mib: float | None
    cpu: str
    cpu_cores: int
    memory_mib: float
    torch_threads: int
    platform: str
    python: str
    cuda: str | None
    packages: dict[str, str]
    hfbench_commit: str | None
    # Results of schema version 2 and older have none of these.
    driver: str | None = None
    power_limit_watts: float | None = None
    mig_profile: str | None = None
    device_note: str | None = None

    def on_cpu(self) -> Environment:
        """Return the same machine as a run sees it that leaves its accelerator alone."""
        return self.model_copy(
            update={
                "device_type": "cpu",
                "device_name": self.cpu,
                "device_count": 1,
                "device_memory_mib": None,
                "cuda": None,
                "driver": None,
                "power_limit_watts": None,
                "mig_profile": None,
                "device_note": None,
            }
        )


def environment_differences(a: Environment, b: Environment) -> list[tuple[str, Any, Any]]:
    """List in what hardware or versions two runs differ, so that their times do not compare.

    The kernel's release, hfbench's commit and how many devices could be seen are of another kind:
    stated, but not decisive. What a run used is one device a process, and processes are compared
    beside this. Nor is it a difference that driver, power limit or MIG profile are known of one
    run alone.

    Returns:
        Name and both values of each difference.
    """
    one, two = (_decisive(environment) for environment in (a, b))
    names = [*one, *(name for name in two if name not in one)]
    return [
        (name, one.get(name), two.get(name))
        for name in names
        if one.get(name) != two.get(name)
        and not (name in _OFTEN_UNKNOWN and None in (one.get(name), two.get(name)))
    ]


def _decisive(environment: Environment) -> dict[str, Any]:
    content = environment.model_dump(exclude=_NOT_DECISIVE)
    for name in ("memory", "device_memory"):  # a kernel may keep some for itself
        mib = content.pop(f"{name}_mib")
        content[f"{name}_gib"] = None if mib is None else round(mib / 1024)
    watts = environment.power_limit_watts
    content["power_limit_watts"] = None if watts is None else round(watts)
    words = environment.platform.split(" ")
    content["platform"] = " ".join([words[0], *words[1:][-1:]])  # system and architecture
    return content | {f"packages.{name}": v for name, v in environment.packages.items()}


def describe_environment(device_type: str | None = None) -> Environment:
    """Describe this machine and the installed libraries.

    Args:
        device_type: The device a run uses (``cpu``, ``cuda``, …); by default the one that `Trainer`
            would pick.
    """
    import psutil
    import torch

    from hfbench.machine.devices import memory_mib_of, name_of
    from hfbench.machine.nvml import describe_settings

    kind = device_type or accelerator_type() or "cpu"
    return Environment(
        device_type=kind,
        device_name=_cpu_name() if kind == "cpu" else name_of(kind),
        device_count=1 if kind == "cpu" else torch.accelerator.device_count(),
        device_memory_mib=memory_mib_of(kind),
        cpu=_cpu_name(),
        cpu_cores=os.cpu_count() or 1,
        memory_mib=psutil.virtual_memory().total / 2**20,
        torch_threads=torch.get_num_threads(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cuda=torch.version.cuda if kind == "cuda" else None,
        packages={name: _version(name) for name in PACKAGES},
        hfbench_commit=_commit(),
        **asdict(describe_settings(torch.device(kind))),
    )


def accelerator_type() -> str | None:
    """Return the type of the accelerator that torch sees, such as ``cuda``; ``None`` if none."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device.type if device is not None else None


def check_machine(recipe: Recipe) -> list[str]:
    """Find what the recipe asks of this machine that it cannot do.

    Returns:
        One sentence a problem, each with the override that would run here; empty if there is none.
    """
    import torch
    from transformers.utils import is_torch_tf32_available

    problems = []
    args = recipe.training_args
    accelerator = None if args.get("use_cpu") else accelerator_type()
    if args.get("fp16") and accelerator is None:
        problems.append(
            "training_args.fp16: needs a CUDA device and none is visible; training would silently "
            "run in fp32. Use a GPU, or run bfloat16 on this CPU with: training_args.fp16=false "
            "training_args.bf16=true training_args.use_cpu=true"
        )
    if args.get("bf16") and not args.get("use_cpu"):
        if accelerator is None:
            problems.append(
                "training_args.bf16: no accelerator is visible, and bfloat16 on a CPU has to be "
                "asked for: training_args.use_cpu=true"
            )
        elif accelerator == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            problems.append(
                f"training_args.bf16: {torch.cuda.get_device_name()} has no bfloat16 units (Ampere "
                f"and newer have). Run float16 with: training_args.bf16=false "
                f"training_args.fp16=true"
            )
    if args.get("tf32") and (args.get("use_cpu") or not is_torch_tf32_available()):
        problems.append(
            "training_args.tf32: needs an NVIDIA GPU of the Ampere generation or newer. Run "
            "without it: training_args.tf32=false"
        )
    if problem := missing_optimizer(args):
        problems.append(problem)
    problems += _overruled(args, accelerator)
    return problems + _missing_trackers(args.get("report_to"))


def _missing_trackers(report_to: object) -> list[str]:
    from transformers.integrations import get_available_reporting_integrations

    available = ("none", "all", *get_available_reporting_integrations())
    wanted = report_to if isinstance(report_to, list) else [report_to or "none"]
    missing = [str(name) for name in wanted if name not in available]
    unusable = {
        name: problem
        for name, find in (("wandb", _no_wandb_login), ("mlflow", _no_mlflow_server))
        if (name in wanted or "all" in wanted) and name in available and (problem := find())
    }
    return [
        f"training_args.report_to: {problem}, or run without it: training_args.report_to=none"
        for problem in unusable.values()
    ] + [
        f'training_args.report_to: "{name}" is not installed; install it (tensorboard and trackio '
        f"come with "
        "pip install 'hfbench[tracking]'), or run without it: training_args.report_to=none"
        for name in missing
    ]


def _no_wandb_login() -> str | None:
    """Say that wandb would ask for a login in the middle of a run, or fail."""
    settings = {name: os.environ.get(name, "").lower() for name in ("WANDB_MODE", "WANDB_DISABLED")}
    off = settings["WANDB_MODE"] in ("offline", "disabled", "dryrun")
    if off or settings["WANDB_DISABLED"] in ("1", "true", "yes") or os.environ.get("WANDB_API_KEY"):
        return None
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC")).authenticators(host):
            return None
    return (
        '"wandb" has no login. Log in with "wandb login", or keep it here with WANDB_MODE=offline'
    )


def _no_mlflow_server() -> str | None:
    """Say that the server that MLflow was told of does not answer."""
    place = os.environ.get("MLFLOW_TRACKING_URI", "")
    address = urlsplit(place)
    if address.scheme not in ("http", "https") or not address.hostname:
        return None
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=_SERVER_SECONDS).close()
    except OSError as error:
        return (
            f'"mlflow" cannot reach {place} (MLFLOW_TRACKING_URI): {error}. Start the server, or '
            "unset the variable"
        )
    return None


def _overruled(args: dict[str, Any], accelerator: str | None) -> list[str]:
    """Say which variables of the environment would decide over a setting of the recipe."""
    problems = []
    if args.get("torch_compile"):
        for name, alone in _COMPILING.items():
            said = os.environ.get(name, alone)
            if said.lower() not in (alone.lower(), args.get("torch_compile_mode")):
                problems.append(
                    f"training_args.torch_compile: {name}={said} comes from the launcher or the "
                    f"shell and would change what is compiled; unset {name}, or launch with "
                    f"the default, {alone}."
                )
        problems += [
            f"training_args.torch_compile: {name}={os.environ[name]} switches compiling off; unset "
            f"{name}, or run without it: training_args.torch_compile=false"
            for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
            if os.environ.get(name, "0") not in ("", "0")
        ]
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        if cache and not _can_be_written(Path(cache)):
            problems.append(
                f"training_args.torch_compile: what is compiled goes to TORCHINDUCTOR_CACHE_DIR="
                f"{cache}, which cannot be written to; name another folder, or unset it."
            )
    if accelerator == "cuda":
        problems += [
            f"training_args.tf32: {name}={os.environ[name]} decides on TF32 whatever the recipe "
            f"says; unset {name}."
            for name in ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
            if os.environ.get(name)
        ]
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if use_cpu and accelerator is not None:
        problems.append(
            f"training_args.use_cpu: the launcher asks for the CPU (ACCELERATE_USE_CPU) and the "
            f"recipe for {accelerator}; launch without --cpu, or add training_args.use_cpu=true"
        )
    return problems


def _can_be_written(folder: Path) -> bool:
    """Tell whether files can be put into a folder, which may have to be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def requested_processes() -> int:
    """Return how many processes the launcher was asked for, 1 without a launcher.

    ``accelerate launch --cpu --num_processes 2`` starts one process and tells it nothing, so its
    own command line is read too.
    """
    said = [int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdigit()]
    return max([1, *said, _accelerate_launch_processes()])


def is_main_process() -> bool:
    """Tell whether this is the process that speaks and writes for all (rank 0)."""
    return is_first()


def _accelerate_launch_processes() -> int:
    import psutil

    try:
        parent: psutil.Process | None = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:
        return 1
    for position, word in enumerate(command[:-1]):
        if Path(word).name in _ACCELERATE and command[position + 1] == "launch":
            return _parse_accelerate_launch(command[position + 2 :])
        if Path(word).name in _ACCELERATE_LAUNCH:
            return _parse_accelerate_launch(command[position + 1 :])
    return 1


def _parse_accelerate_launch(words: Sequence[str]) -> int:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    launch, _ = launch_command_parser().parse_known_args(list(words))
    if launch.num_processes is not None:
        return int(launch.num_processes)
    if launch.config_file or os.path.isfile(default_config_file):
        return int(getattr(load_config_from_file(launch.config_file), "num_processes", 1) or 1)
    return 1


def _cpu_name() -> str:
    if platform.system() == "Darwin":  # Python calls all of its processors "arm"
        names = [_output_of("sysctl", "-n", "machdep.cpu.brand_string")]
    else:
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names and names[0]) or platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """Return the commit of the checkout that hfbench runs from, ``-dirty`` if it was changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    return _output_of(
        "git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"
    )


def _output_of(*command: str) -> str | None:
    """Return what a command prints; ``None`` if there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def missing_capabilities() -> list[str]:
    """Return what recipes can ask for and this machine does not have, a sentence each."""
    from transformers.utils import is_torch_tf32_available

    accelerator = accelerator_type()
    if accelerator is None:
        from hfbench.machine.precision import say_slow_bfloat16

        return [
            "No accelerator is visible: fp16, TF32 and pinned memory have no effect here.",
            "bfloat16 runs on this CPU with training_args.bf16=true training_args.use_cpu=true; it "
            "is faster than fp32 only with AVX512-BF16 or AMX."
            + (f" {slow[0].upper()}{slow[1:]}." if (slow := say_slow_bfloat16()) else ""),
        ]
    if accelerator == "cuda" and not is_torch_tf32_available():
        return ["TF32 and bfloat16 need an NVIDIA GPU of the Ampere generation or newer."]
    return []
