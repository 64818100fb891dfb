from __future__ import annotations

import getpass
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hfbench.machine import environment
from hfbench.machine.environment import (
    PACKAGES,
    Environment,
    accelerator_type,
    check_machine,
    describe_environment,
    environment_differences,
    missing_capabilities,
    requested_processes,
)
from hfbench.recipe.schema import load_recipe

Parent = Callable[[str], None]


def problems(*overrides: str) -> list[str]:
    return check_machine(load_recipe("quickstart_untuned", overrides))


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "accelerator_type", lambda: None)
    monkeypatch.setattr("transformers.utils.is_torch_tf32_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr("transformers.utils.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Something")


# --- what a machine cannot do ---


@pytest.mark.usefixtures("cpu_only")
def test_quickstart_runs_on_a_cpu() -> None:
    for name in ("quickstart_untuned", "quickstart_tuned"):
        assert check_machine(load_recipe(name)) == []


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("name", ["vit_cifar10_untuned", "resnet50_cifar100_untuned"])
def test_untuned_cell_runs_on_a_cpu(name: str) -> None:
    assert check_machine(load_recipe(name)) == []


@pytest.mark.usefixtures("cpu_only")
def test_fp16_on_a_cpu_says_what_runs_there() -> None:
    (problem,) = check_machine(load_recipe("vit_cifar100_tuned"))

    assert problem.startswith("training_args.fp16: needs a CUDA device and none is visible;")
    assert "silently run in fp32" in problem
    advice = "training_args.fp16=false training_args.bf16=true training_args.use_cpu=true"
    assert problem.endswith(advice)
    assert check_machine(load_recipe("vit_cifar100_tuned", advice.split())) == []


@pytest.mark.usefixtures("cpu_only")
def test_bf16_on_a_cpu_has_to_be_asked_for() -> None:
    overrides = ("training_args.bf16=true", "training_args.use_cpu=false")

    (problem,) = problems(*overrides)
    assert problem.startswith("training_args.bf16: no accelerator is visible")
    assert problem.endswith("training_args.use_cpu=true")
    assert problems(overrides[0], "training_args.use_cpu=true") == []


@pytest.mark.usefixtures("cpu_only")
def test_tf32_on_a_cpu_says_how_to_run_without() -> None:
    (problem,) = problems("training_args.tf32=true")

    assert problem.startswith("training_args.tf32: needs an NVIDIA GPU of the Ampere generation")
    assert problem.endswith("training_args.tf32=false")


@pytest.mark.usefixtures("gpu")
def test_tf32_is_refused_when_the_gpu_is_left_unused() -> None:
    assert len(problems("training_args.tf32=true", "training_args.use_cpu=true")) == 1
    assert problems("training_args.tf32=true", "training_args.use_cpu=false") == []


@pytest.mark.usefixtures("gpu")
def test_tuned_cell_runs_on_a_gpu() -> None:
    assert check_machine(load_recipe("vit_cifar100_tuned")) == []


@pytest.mark.usefixtures("gpu")
def test_bf16_on_an_old_gpu_names_the_gpu_and_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)

    (problem,) = problems("training_args.bf16=true", "training_args.use_cpu=false")
    assert "NVIDIA Something has no bfloat16 units" in problem
    assert problem.endswith("training_args.bf16=false training_args.fp16=true")


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("value", ["wandb", '["wandb"]'])
def test_tracker_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    available = "transformers.integrations.get_available_reporting_integrations"
    monkeypatch.setattr(available, lambda: ["tensorboard"])

    (problem,) = problems(f"training_args.report_to={value}")
    assert problem.startswith('training_args.report_to: "wandb" is not installed; install it')
    assert problem.endswith("training_args.report_to=none")
    assert problems("training_args.report_to=tensorboard") == []


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("value", ["none", "all", "[]"])
def test_no_tracker_is_no_problem(value: str) -> None:
    assert problems(f"training_args.report_to={value}") == []


@pytest.mark.usefixtures("cpu_only")
def test_all_that_a_machine_lacks_is_said_at_once() -> None:
    found = problems(
        "training_args.use_cpu=false",
        "training_args.fp16=true",
        "training_args.tf32=true",
        'training_args.report_to=["wandb", "clearml"]',
    )

    assert [problem.split(":")[0] for problem in found] == [
        "training_args.fp16",
        "training_args.tf32",
        "training_args.report_to",
        "training_args.report_to",
    ]


@pytest.mark.usefixtures("cpu_only")
def test_cpu_says_what_has_no_effect_on_it() -> None:
    said = " ".join(missing_capabilities())

    assert "No accelerator is visible" in said
    assert "training_args.bf16=true training_args.use_cpu=true" in said


@pytest.mark.usefixtures("gpu")
def test_new_gpu_lacks_nothing() -> None:
    assert missing_capabilities() == []


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_accelerator_of_a_plain_cpu_is_none() -> None:
    assert accelerator_type() is None


# --- how many processes were asked for ---


@pytest.fixture
def started_by(monkeypatch: pytest.MonkeyPatch) -> Parent:
    """Return a function that sets the command line of the process that started this one."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def set_parent(command: str) -> None:
        class Fake:
            def parent(self) -> Fake | None:
                return self if command else None

            def cmdline(self) -> list[str]:
                return command.split()

        monkeypatch.setattr(psutil, "Process", Fake)

    return set_parent


@pytest.mark.parametrize("command", ["", "-bash", "python -m pytest", "make test", "accelerate"])
def test_one_process_without_a_launcher(started_by: Parent, command: str) -> None:
    started_by(command)

    assert requested_processes() == 1


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_world_size_of_a_launcher_is_believed(
    started_by: Parent, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    started_by("")
    monkeypatch.setenv(name, "4")

    assert requested_processes() == 4


@pytest.mark.parametrize("value", ["", "many", "-1", "0"])
def test_world_size_that_is_no_number_is_left_out(
    started_by: Parent, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    started_by("")
    monkeypatch.setenv("WORLD_SIZE", value)

    assert requested_processes() == 1


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch --cpu --num_processes 2 -m hfbench recipe x",
        "python /somewhere/bin/accelerate launch --cpu --num_processes 2 -m hfbench list --json",
        "python /somewhere/bin/accelerate launch --num_processes=2 --cpu -m hfbench recipe x a.b=c",
        "python -m accelerate.commands.launch --cpu --num_processes 2 -m hfbench recipe x",
        "python /somewhere/bin/accelerate-launch --cpu --num_processes 2 -m hfbench recipe x",
        "python -m accelerate.commands.accelerate_cli launch --cpu --num_processes 2 -m hfbench",
    ],
)
def test_command_line_of_accelerate_launch_is_read(started_by: Parent, command: str) -> None:
    started_by(command)

    assert requested_processes() == 2


def test_accelerate_launch_without_a_number_asks_for_one(started_by: Parent) -> None:
    started_by("accelerate launch --cpu -m hfbench recipe x")

    assert requested_processes() == 1


def test_number_after_the_module_is_not_the_launchers(started_by: Parent) -> None:
    started_by("accelerate launch --cpu -m hfbench recipe x --num_processes 7")

    assert requested_processes() == 1


def test_configuration_of_accelerate_is_read(started_by: Parent, tmp_path: Path) -> None:
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: 'no'\n"
        "machine_rank: 0\nnum_machines: 1\nnum_processes: 3\nuse_cpu: true\n"
    )
    started_by(f"accelerate launch --config_file {config} -m hfbench recipe x")

    assert requested_processes() == 3


def test_parent_that_cannot_be_seen_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def parent(self) -> Gone:
            return self

        def cmdline(self) -> list[str]:
            raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "Process", Gone)
    assert requested_processes() == 1


# --- what is written down ---


def test_description_names_machine_and_libraries() -> None:
    found = describe_environment("cpu")

    assert found.device_type == "cpu"
    assert found.device_name == found.cpu
    assert found.device_count == 1
    assert found.device_memory_mib is None
    assert found.cuda is None
    assert found.cpu_cores == os.cpu_count()
    assert found.memory_mib == pytest.approx(psutil.virtual_memory().total / 2**20)
    assert found.torch_threads == torch.get_num_threads()
    assert found.python == platform.python_version()
    assert set(found.packages) == set(PACKAGES)
    assert found.packages["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_description_names_no_host_user_or_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module, name in ((platform, "node"), (socket, "gethostname"), (getpass, "getuser")):
        monkeypatch.setattr(module, name, lambda: "unmistakable")
    for variable in ("USER", "LOGNAME", "HOSTNAME"):
        monkeypatch.setenv(variable, "unmistakable")
    monkeypatch.setenv("HOME", str(tmp_path / "unmistakable"))

    text = describe_environment("cpu").model_dump_json()
    assert "unmistakable" not in text
    for place in (sys.prefix, str(Path(__file__).parents[2]), str(Path.cwd()), str(tmp_path)):
        assert place not in text


def test_description_survives_being_written_and_read() -> None:
    found = describe_environment("cpu")

    assert Environment.model_validate_json(found.model_dump_json()) == found


def test_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))

    assert describe_environment("cpu").packages == {"no-such-package": "not installed"}


def test_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("no checkout")
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert describe_environment("cpu").hfbench_commit in (head, f"{head}-dirty")


@pytest.mark.parametrize("failure", [OSError, subprocess.TimeoutExpired("git", 10)])
def test_commit_is_left_out_where_git_does_not_work(
    monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    assert describe_environment("cpu").hfbench_commit is None


# --- what makes numbers incomparable ---


SOME = Environment(
    device_type="cuda",
    device_name="Some GPU",
    device_count=2,
    device_memory_mib=81920.0,
    cpu="Some CPU",
    cpu_cores=16,
    memory_mib=131072.0,
    torch_threads=8,
    platform="Linux 6.1.0-13-generic x86_64",
    python="3.12.1",
    cuda="13.0",
    packages={"torch": "2.15.0", "timm": "1.0.31"},
    hfbench_commit="abc",
)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"device_name": "Other GPU"}, ("device_name", "Some GPU", "Other GPU")),
        ({"device_memory_mib": 40960.0}, ("device_memory_gib", 80, 40)),
        ({"cpu": "Other CPU"}, ("cpu", "Some CPU", "Other CPU")),
        ({"cpu_cores": 8}, ("cpu_cores", 16, 8)),
        ({"memory_mib": 65536.0}, ("memory_gib", 128, 64)),
        ({"torch_threads": 1}, ("torch_threads", 8, 1)),
        ({"platform": "Darwin 24.1 arm64"}, ("platform", "Linux x86_64", "Darwin arm64")),
        ({"python": "3.13.0"}, ("python", "3.12.1", "3.13.0")),
        ({"cuda": "12.8"}, ("cuda", "13.0", "12.8")),
        (
            {"packages": {"torch": "2.16.0", "timm": "1.0.31"}},
            ("packages.torch", "2.15.0", "2.16.0"),
        ),
    ],
)
def test_hardware_and_versions_make_another_environment(
    change: dict[str, Any], difference: tuple[str, Any, Any]
) -> None:
    assert environment_differences(SOME, SOME.model_copy(update=change)) == [difference]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"platform": "Linux 6.12.3 x86_64"},
        {"memory_mib": 131072.0 - 300, "device_memory_mib": 81920.0 + 90},
        {"hfbench_commit": "def-dirty"},
        {"device_count": 8},  # with another CUDA_VISIBLE_DEVICES
    ],
)
def test_kernel_and_commit_a_few_mib_and_idle_devices_do_not(change: dict[str, Any]) -> None:
    assert environment_differences(SOME, SOME.model_copy(update=change)) == []


def test_system_without_a_release_is_compared_too() -> None:
    plain = SOME.model_copy(update={"platform": "Plan9"})
    assert environment_differences(plain, plain) == []
    assert environment_differences(SOME, plain) == [("platform", "Linux x86_64", "Plan9")]


def test_environment_of_a_run_that_leaves_the_gpu_alone() -> None:
    on_cpu = describe_environment("cpu")
    gpu = {"device_type": "cuda", "device_name": "Some GPU", "device_count": 4, "cuda": "13.0"}
    with_gpu = on_cpu.model_copy(update=gpu | {"device_memory_mib": 80000.0})

    assert with_gpu.on_cpu() == on_cpu
