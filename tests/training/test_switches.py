"""What is said to be applied on devices that are not here: they are faked, the model is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hfbench.machine.settings import set_tf32
from hfbench.results.schema import Switch
from hfbench.studies.first_loss import precision_of
from hfbench.training.switches import observe_switches
from tests.builders import make_trainer, tiny_recipe

TF32 = ("tf32_matmul", "tf32_convolution")


@pytest.fixture
def default_tf32() -> Iterator[None]:
    """Put torch's TF32 switches back afterwards."""
    yield
    set_tf32(None)


def switches_on(
    device: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **arguments: object
) -> dict[str, Switch]:
    """Train a step on the CPU, and read the switches as if the device had been another."""
    recipe = tiny_recipe(max_steps=1, **arguments)
    trainer = make_trainer(recipe, folder)
    trainer.train()
    if recipe.argument("dataloader_pin_memory"):  # transformers asks for none on a CPU
        trainer.train_loader.base_dataloader.pin_memory = True
    monkeypatch.setattr(TrainingArguments, "device", torch.device(device))
    return observe_switches(recipe, trainer)


def fake_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None = None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


@pytest.mark.usefixtures("default_tf32")
@pytest.mark.parametrize("tf32", [None, False])
@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((7, 5), None, "no TF32 units: its compute capability is 7.5"),
        ((7, 0), None, "no TF32 units: its compute capability is 7.0"),
        ((9, 4), "6.4", "built for AMD's GPUs"),
    ],
)
def test_no_tf32_is_applied_where_the_gpu_has_none(
    tf32: bool | None,
    capability: tuple[int, int],
    hip: str | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gpu(monkeypatch, capability, hip)
    switches = switches_on("cuda:0", tmp_path, monkeypatch, tf32=tf32)
    for name in TF32:
        assert switches[name].applied is False
        assert (reason in str(switches[name].reason)) == (tf32 is None)
    assert precision_of(tiny_recipe(tf32=tf32), torch.device("cuda:0")) == "fp32"


@pytest.mark.usefixtures("default_tf32")
@pytest.mark.parametrize(("tf32", "applied"), [(None, (False, True)), (False, (False, False))])
def test_tf32_is_what_torch_was_set_to_where_the_gpu_has_it(
    tf32: bool | None,
    applied: tuple[bool, bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gpu(monkeypatch, (8, 0))
    switches = switches_on("cuda:0", tmp_path, monkeypatch, tf32=tf32)
    assert tuple(switches[name].applied for name in TF32) == applied
    assert {switches[name].reason for name in TF32} == (
        {"not set: torch's default"} if tf32 is None else {None}
    )


def test_tf32_that_a_cpu_was_not_asked_for_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches = switches_on("cpu", tmp_path, monkeypatch)
    assert {switches[name].applied for name in TF32} == {False}
    assert {switches[name].reason for name in TF32} == {
        "there is no TF32: the model is not on an NVIDIA GPU"
    }


@pytest.mark.parametrize(
    ("device", "pinned", "reason"),
    [
        ("mps", False, "torch's loader pins nothing on MPS"),
        ("xpu", True, None),
        ("cpu", False, "nothing is copied: the model is on the CPU"),
    ],
)
def test_pins_are_applied_where_the_loader_pins(
    device: str, pinned: bool, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches = switches_on(device, tmp_path, monkeypatch, dataloader_pin_memory=True)
    switch = switches["dataloader_pin_memory"]
    assert (switch.requested, switch.applied, switch.reason) == (True, pinned, reason)
