"""What disk, memory and other processes do to a run is said; nothing that was trained is lost."""

from __future__ import annotations

import errno
import io
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import hfbench.training.run
from hfbench.errors import DeviceError, HfbenchError
from hfbench.machine.environment import check_machine
from hfbench.machine.failures import PatientStream, WorldError, explain, is_out_of_memory
from hfbench.results.manifest import has_checkpoint
from hfbench.results.schema import find_runs
from hfbench.studies.windows import Bench
from hfbench.training.run import run_recipe
from tests.builders import tiny_recipe, vit_config, write_model


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "vit", vit_config())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: the disk is full"),
        (OSError(errno.EFBIG, "File too large"), "larger than the system allows"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (OSError(errno.EIO, "Input/output error"), "the disk, or the connection to it, fails"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: it may not be written"),
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open"),
        (MemoryError("Unable to allocate 9 GiB"), "no memory left"),
        (torch.OutOfMemoryError("CUDA out of memory."), "no memory left"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "no memory"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), "The disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
            "disk",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "loader worker died",
        ),
        (RuntimeError("unable to write to file </torch_7_1>: No space left (28)"), "shared memory"),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), "was lost"),
    ],
)
def test_failures_of_the_world_are_explained(error: Exception, said: str) -> None:
    assert said in str(explain(error))
    led_to = ValueError("while saving")
    led_to.__cause__ = error
    assert said in str(explain(led_to))


@pytest.mark.parametrize(
    "error", [ValueError("bad"), KeyError("x"), RuntimeError("shapes differ"), TypeError("None")]
)
def test_bugs_keep_their_traceback(error: Exception) -> None:
    assert explain(error) is None


def test_bug_in_handling_a_failure_is_a_bug(tmp_path: Path) -> None:
    bug = KeyError("x")
    bug.__context__ = PermissionError(errno.EACCES, "Permission denied", "/a")
    assert explain(bug) is None
    assert explain(ZeroDivisionError(), tmp_path / "gone") is None
    assert explain(RuntimeError("loss of shared memory layout mismatch")) is None
    many = "unable to open shared memory object </torch_1> in read-write mode: Too many open files"
    assert "ulimit -n" in str(explain(RuntimeError(many)))
    assert "loader worker" in str(explain(RuntimeError("DataLoader timed out after 5 seconds")))


def test_letter_that_a_stream_lacks_is_replaced() -> None:
    place = io.BytesIO()
    stream = PatientStream(io.TextIOWrapper(place, encoding="ascii"))
    stream.write("größer\n")
    stream.write("more\n")
    stream.flush()
    assert place.getvalue() == b"gr??er\nmore\n"


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "keeps"),
    [
        ("hfbench.training.run.save_model", True),
        ("hfbench.training.run.metrics.score", True),
        ("hfbench.training.run.save_predictions", True),
        ("hfbench.training.run.plots.plot_curves", True),
        ("hfbench.training.run.hub.model_card", True),
        ("hfbench.training.run.save_result", True),
        ("hfbench.training.run.note_environment", False),
        ("hfbench.results.folder.write_json", False),
        ("hfbench.training.trainer.BenchTrainer.training_step", False),
        ("hfbench.training.callbacks.LogFile.on_train_begin", False),
    ],
)
def test_full_disk_anywhere_is_said_and_loses_nothing(
    place: str, keeps: bool, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(vit, pretrained=True, num_train_epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(HfbenchError) as caught:
            run_recipe(recipe, tmp_path)
    assert (caught.value.exit_code, isinstance(caught.value, WorldError)) == (1, True)
    assert "the disk is full" in str(caught.value)
    assert ("--resume" in str(caught.value)) == keeps
    if keeps:
        (run,) = find_runs(tmp_path)
        assert has_checkpoint(run.folder)
        assert run_recipe(recipe, tmp_path, resume=True).training.sessions == 2


def test_full_disk_at_a_checkpoint_keeps_the_one_before(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(vit, pretrained=True, save_strategy="steps", save_steps=2)
    original: Callable[..., Any] = torch.save

    def save(what: Any, place: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-6" in str(place):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0")
        original(what, place, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(WorldError, match=r"disk is full.*until its checkpoint is in.*--resume"):
            run_recipe(recipe, tmp_path)
    result = run_recipe(recipe, tmp_path, resume=True)
    assert (result.training.sessions, result.training.optimizer_steps) == (2, 12)


def test_log_line_that_cannot_be_written_costs_no_run(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbench.training.callbacks._append", full)
    assert run_recipe(tiny_recipe(vit, pretrained=True), tmp_path).training.optimizer_steps == 12


def test_folder_that_is_gone_is_named(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    def vanish(*args: Any, **kwargs: Any) -> Any:
        shutil.rmtree(tmp_path / "runs")
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "somewhere")

    monkeypatch.setattr("hfbench.training.run.save_predictions", vanish)
    with pytest.raises(WorldError, match=r"is gone: it was moved or removed"):
        run_recipe(tiny_recipe(vit, pretrained=True), tmp_path / "runs")


@pytest.fixture
def small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("hfbench.training.inputs.shutil.disk_usage", lambda path: usage)


@pytest.mark.usefixtures("small_shared_memory")
def test_run_goes_on_without_workers_whose_batches_do_not_fit_into_shared_memory(
    vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # 20 images of 3 x 32 x 32 float32 are 0.234 MiB; two workers two ahead, and one in use: five.
    recipe = tiny_recipe(
        vit,
        pretrained=True,
        dataloader_num_workers=2,
        dataloader_prefetch_factor=2,
        dataloader_persistent_workers=True,
    )
    result = run_recipe(recipe, tmp_path / "runs")
    switch = result.switches["dataloader_num_workers"]
    assert (switch.requested, switch.applied) == (2, 0)
    assert switch.reason == "shared memory is too small for the batches of workers"
    assert "1 MiB free, but 2 loader workers hand over up to 1 MiB" in caplog.text
    assert "Going on without workers" in caplog.text


@pytest.mark.usefixtures("small_shared_memory")
def test_window_with_workers_is_refused_rather_than_measured_without(vit: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True, dataloader_num_workers=2)
    with pytest.raises(HfbenchError, match=r"1 MiB free, but 2 loader workers .* 1 MiB .*shm-size"):
        Bench(recipe).measure_window(1, 1)


def test_stream_without_a_reader_goes_silent() -> None:
    read, write = os.pipe()
    stream = PatientStream(os.fdopen(write, "w"))
    os.close(read)
    for _ in range(3):
        stream.write("x" * 100_000)
        stream.flush()
    closed = io.StringIO()
    closed.close()
    assert PatientStream(closed).write("x") == 1


def test_command_goes_on_when_nobody_reads_it() -> None:
    code = (
        "import sys; from hfbench.machine.failures import write_patiently; write_patiently()\n"
        "for _ in range(5000): print('x' * 100)\n"
        "sys.stdout.flush(); print('done', file=sys.stderr)"
    )
    shell = f'{sys.executable} -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == "done\n"


# Trackers


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Let wandb and mlflow seem to be installed, without a login or a setting."""
    monkeypatch.setattr(
        "transformers.integrations.get_available_reporting_integrations",
        lambda: ["wandb", "mlflow"],
    )
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


def test_tracker_without_a_login_is_refused_before_training(
    installed: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = tiny_recipe(report_to="wandb")
    (problem,) = check_machine(recipe)
    assert 'report_to: "wandb" has no login. Log in with "wandb login"' in problem
    assert "training_args.report_to=none" in problem
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret")
    assert check_machine(recipe) == []
    (tmp_path / "netrc").unlink()
    installed.setenv("WANDB_MODE", "offline")
    assert check_machine(recipe) == []


def test_tracker_whose_server_does_not_answer_is_refused(installed: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"http://127.0.0.1:{free.getsockname()[1]}"
    installed.setenv("MLFLOW_TRACKING_URI", place)
    (problem,) = check_machine(tiny_recipe(report_to="mlflow"))
    assert f'"mlflow" cannot reach {place}' in problem
    installed.setenv("MLFLOW_TRACKING_URI", "file:///somewhere")
    assert check_machine(tiny_recipe(report_to="mlflow")) == []


def test_tracker_that_fails_later_is_left_out(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[int] = []

    class Tracker(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            called.append(1)
            raise ConnectionError("503 from the server")

    monkeypatch.setattr(logging.getLogger("hfbench"), "propagate", True)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tracker", Tracker)
    original = hfbench.training.run.assemble

    def assemble(*args: Any) -> Any:
        trainer = original(*args)
        trainer.add_callback(Tracker())
        return trainer

    monkeypatch.setattr("hfbench.training.run.assemble", assemble)
    result = run_recipe(tiny_recipe(vit, pretrained=True), tmp_path)
    assert result.training.optimizer_steps == 12
    assert "Tracker failed and is left out from here on" in caplog.text
    assert len(called) == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate"),
    ],
)
def test_memory_that_is_out_is_known_under_every_name(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert "no memory left" in str(explain(error))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        RuntimeError("unable to mmap 64 bytes from file </torch_1>: Cannot allocate memory (12)"),
        ValueError("out of memory"),
    ],
)
def test_other_failures_are_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("training_step", "per_device_train_batch_size=8: .*Halve it"),
        ("prediction_step", "per_device_eval_batch_size=20: .*changes no result"),
    ],
)
def test_memory_that_is_out_is_blamed_on_what_was_running(
    place: str, said: str, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(f"hfbench.training.trainer.BenchTrainer.{place}", fail)
    recipe = tiny_recipe(vit, pretrained=True)
    with pytest.raises(DeviceError, match=said) as caught:
        run_recipe(recipe, tmp_path / "runs")
    kept = place == "prediction_step"  # all is trained by then
    assert ("--resume" in str(caught.value)) == kept
