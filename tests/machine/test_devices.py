"""What devices are called that are not here: torch's questions to their drivers are faked."""

from __future__ import annotations

import platform
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hfbench.machine.environment import describe_environment


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)


def test_xpu_has_a_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda: "Intel Arc B580 Graphics")
    properties = SimpleNamespace(total_memory=12 * 2**30)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda: properties)

    found = describe_environment("xpu")
    assert found.device_name == "Intel Arc B580 Graphics"
    assert found.device_memory_mib == 12288.0
    assert found.cuda is None


def test_mps_is_named_after_its_chip_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2 Max")
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: 38)

    found = describe_environment("mps")
    assert found.device_name == "Apple M2 Max, 38 GPU cores"
    assert found.device_memory_mib is None  # the host's


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
def test_device_without_a_name_is_called_by_its_type(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise error

    monkeypatch.setattr(torch.backends.mps, "get_name", fail)
    assert describe_environment("mps").device_name == "mps"


@pytest.mark.parametrize(
    ("printed", "expected"), [("Apple M2 Max\n", "Apple M2 Max"), (None, "arm")]
)
def test_cpu_of_a_mac_is_named_after_its_chip(
    printed: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: tuple[str, ...], **_: Any) -> Any:
        if command[0] != "sysctl" or printed is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, stdout=printed)

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    monkeypatch.setattr(subprocess, "run", answer)
    assert describe_environment("cpu").cpu == expected
