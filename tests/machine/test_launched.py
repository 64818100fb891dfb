from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hfbench import ablate, examine, run_recipe, run_suite, tune
from hfbench.errors import DeviceError
from hfbench.machine import environment, launched
from hfbench.machine.environment import check_machine
from hfbench.machine.launched import check_alone, check_launch, is_first
from hfbench.recipe.schema import load_recipe
from tests.builders import tiny_recipe

TORCHRUN = "/usr/bin/python3 /env/bin/torchrun --nproc_per_node 2 -m hfbench suite a --repeats 1"
ACCELERATE = "python3 /env/bin/accelerate launch --multi_gpu --num_processes 2 -m hfbench recipe a"
MODULE = "/env/bin/python -m torch.distributed.run --nproc_per_node 2 -m hfbench suite a"
FOUR = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
ELASTIC = FOUR | {"TORCHELASTIC_RUN_ID": "none"}
Shell = Callable[..., None]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Return a function that sets what started this process, and its environment."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PMI_", "OMPI_", "MV2_", "MASTER_", "ACCELERATE_", "LOCAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(launched.multiprocessing, "parent_process", lambda: None)

    def start(*commands: str, **variables: str) -> None:
        words = tuple(tuple(command.split()) for command in commands)
        monkeypatch.setattr(launched, "_ancestors", lambda _: words)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    start()
    return start


def refusal() -> str:
    with pytest.raises(DeviceError) as error:
        check_launch()
    return str(error.value)


@pytest.mark.parametrize(
    ("variables", "unset"),
    [
        ({"RANK": "1"}, "RANK"),
        ({"RANK": ""}, "RANK"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_RANK PMI_SIZE"),
        (
            {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            "OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK",
        ),
        (FOUR, "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT"),
        # Those of a notebook or container that a launcher started, long ago.
        (ELASTIC, "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID"),
    ],
)
@pytest.mark.parametrize("parents", [(), ("-bash", "sshd"), ("slurmstepd:",)])
def test_ranks_without_a_launcher_are_named_with_what_to_unset(
    shell: Shell, variables: dict[str, str], unset: str, parents: tuple[str, ...]
) -> None:
    shell(*parents, **variables)

    said = refusal()
    assert f"For one process: unset {unset}. " in said
    assert "start it with a launcher: accelerate launch" in said
    assert is_first()


@pytest.mark.parametrize(
    ("commands", "variables"),
    [
        ((), {}),
        ((), {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}),
        ((), {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "SLURM_NTASKS": "4"}),
        ((), {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}
            | {"MASTER_PORT": "1"}),
        ((), FOUR | {"HFBENCH_LAUNCHED": "1"}),
        ((TORCHRUN,), ELASTIC),
        (("sh job.sh", ACCELERATE, "bash"), ELASTIC),
        ((MODULE,), ELASTIC),
        (("mpirun -n 2 hfbench recipe a",), {"OMPI_COMM_WORLD_SIZE": "2"}),
        (("/usr/bin/python3 -u -m deepspeed.launcher.launch --module hfbench",), FOUR),
        (("slurmstepd:",), FOUR | {"SLURM_STEP_NUM_TASKS": "2"}),
    ],
)  # fmt: skip
def test_launcher_at_work_is_believed(
    shell: Shell, commands: tuple[str, ...], variables: dict[str, str]
) -> None:
    shell(*commands, **variables)
    check_launch()


def test_first_rank_speaks_for_all(shell: Shell) -> None:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK"):
        shell(TORCHRUN, "mpirun", **(ELASTIC | {"RANK": "0"}))
        assert is_first()
        shell(TORCHRUN, "mpirun", **(ELASTIC | {"RANK": "1"}))
        assert not is_first(), name


def test_copies_of_srun_are_refused(shell: Shell) -> None:
    shell("slurmstepd:", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="2")

    assert "srun started 4 copies of this command" in refusal()


def test_every_function_refuses_a_rank_that_was_left(shell: Shell, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    shell(RANK="1")

    for call in (
        lambda: run_recipe(recipe, tmp_path),
        lambda: run_suite([recipe], tmp_path),
        lambda: ablate(recipe, tmp_path),
        lambda: tune(recipe, tmp_path / "best.json"),
        lambda: examine(recipe),
    ):
        with pytest.raises(DeviceError, match="unset RANK"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "launcher"),
    [
        (TORCHRUN, "'torchrun --nproc_per_node 2'"),
        (MODULE, "'python -m torch.distributed.run --nproc_per_node 2'"),
        (ACCELERATE, "'accelerate launch --multi_gpu --num_processes 2'"),
        ("mpirun -n 2 hfbench suite a", "'accelerate launch --multi_gpu --num_processes 2'"),
    ],
)
def test_suite_under_a_launcher_says_the_line_to_write(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, command: str, launcher: str
) -> None:
    shell(command, **ELASTIC)
    monkeypatch.setattr(sys, "argv", ["hfbench", "suite", "a", "--repeats", "1"])

    with pytest.raises(DeviceError) as error:
        check_alone("suite")
    assert f"Write: hfbench suite --launcher {launcher} a --repeats 1" in str(error.value)
    with pytest.raises(DeviceError, match="hfbench tune measures in one process"):
        check_alone("tune")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP (ACCELERATE_USE_FSDP=true)"),
        ({"ACCELERATE_USE_FSDP": "1"}, "FSDP (ACCELERATE_USE_FSDP=1)"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism configuration"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, "the device meta"),
    ],
)
def test_way_of_training_of_the_launcher_is_refused(
    shell: Shell, variables: dict[str, str], said: str
) -> None:
    shell(ACCELERATE, **(ELASTIC | variables))

    message = refusal()
    assert f"asks accelerate for {said}" in message
    assert f"unset {next(iter(variables))}" in message


def test_way_of_training_that_is_off_is_none(shell: Shell) -> None:
    shell(ACCELERATE, **ELASTIC, ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="")
    check_launch()


def test_what_the_launcher_says_in_vain_is_said(
    shell: Shell, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hfbench"), "propagate", True)
    shell(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4", CUDA_LAUNCH_BLOCKING="1")
    launched._warn_of_ignored.cache_clear()

    check_launch()
    check_launch()
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 comes from the" in caplog.text
    assert "CUDA_LAUNCH_BLOCKING=1 makes the CPU wait" in caplog.text
    caplog.clear()
    check_launch()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_DYNAMO_MODE": "max-autotune"}, "ACCELERATE_DYNAMO_MODE=max-autotune"),
        ({"ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"}, "ACCELERATE_DYNAMO_USE_FULLGRAPH"),
        ({"TORCH_COMPILE_DISABLE": "1"}, "switches compiling off"),
        ({"TORCHDYNAMO_DISABLE": "1"}, "switches compiling off"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache"}, "cannot be written to"),
    ],
)
def test_variable_that_would_change_compiling_is_refused_where_it_matters(
    shell: Shell, variables: dict[str, str], named: str
) -> None:
    compiled = load_recipe("quickstart_untuned", ["training_args.torch_compile=true"])
    shell(ACCELERATE_DYNAMO_MODE="default", ACCELERATE_DYNAMO_USE_FULLGRAPH="False")
    assert check_machine(compiled) == []

    shell(**variables)
    (problem,) = check_machine(compiled)
    assert problem.startswith("training_args.torch_compile: ")
    assert named in problem
    assert check_machine(load_recipe("quickstart_untuned")) == []


def test_variable_that_decides_over_a_gpu_is_refused(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("quickstart_untuned", ["training_args.use_cpu=false"])
    shell(NVIDIA_TF32_OVERRIDE="1", ACCELERATE_USE_CPU="true")
    monkeypatch.setattr(environment, "accelerator_type", lambda: None)
    assert check_machine(recipe) == []

    monkeypatch.setattr(environment, "accelerator_type", lambda: "cuda")
    problems = check_machine(recipe)
    assert [problem.split(":")[0] for problem in problems] == [
        "training_args.tf32",
        "training_args.use_cpu",
    ]


def test_folder_that_was_removed_is_said(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shell()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    assert "has been removed; change to another one" in refusal()
    with pytest.raises(DeviceError, match="has been removed"):
        run_recipe(tiny_recipe(), tmp_path)


def test_missing_folder_for_temporary_files_is_said(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    shell()
    monkeypatch.setattr(launched.tempfile, "gettempdir", fail)

    assert "TMPDIR=FOLDER" in refusal()
