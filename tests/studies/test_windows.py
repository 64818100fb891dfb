"""Windows measure whole steps of the real trainer, and leave bench and machine as they were."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import EfficientNetConfig

from hfbench.errors import DeviceError
from hfbench.studies.tune.evaluation import measure_evaluation
from hfbench.studies.windows import Bench, turn_off_dropout, with_arguments
from tests.builders import TIMM, TIMM_VIT, tiny_recipe, vit_config, write_model


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Leave imports out of garbage collections, of which there are two a window, 0.4 s each."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Return a bench of 48 digits."""
    return Bench(tiny_recipe(preprocessing={"augmentation": ["random_crop"]}))


def test_window_counts_the_images_of_its_steps_and_not_those_of_warm_up(bench: Bench) -> None:
    window = bench.measure_window(3, 2)
    assert (window.steps, window.warmup_steps, window.samples) == (3, 2, 24)
    assert 0 < window.data_wait_seconds < window.seconds
    assert window.samples_per_second == pytest.approx(24 / window.seconds)
    assert window.seconds_per_step == pytest.approx(window.seconds / 3)
    assert window.peak_process_memory_mib > 100
    assert window.peak_device_memory_mib is None


def test_data_set_smaller_than_a_window_is_repeated_in_whole_batches(bench: Bench) -> None:
    # 48 images are no multiple of 3 x 7, and a window of 9 steps needs 189.
    recipe = with_arguments(
        bench.recipe, per_device_train_batch_size=7, gradient_accumulation_steps=3
    )
    window = bench.measure_window(8, 1, recipe)
    assert window.samples == 8 * 21
    assert window.switches["gradient_accumulation_steps"].applied == 3


def test_every_window_starts_from_the_same_weights(bench: Bench) -> None:
    before = {name: value.clone() for name, value in bench.inputs.model.state_dict().items()}
    losses = {bench.measure_window(2, 1).first_loss for _ in range(2)}
    assert len(losses) == 1
    after = bench.inputs.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_variants_are_measured_as_they_say(bench: Bench) -> None:
    # bf16 first: what one window sets must not stay for the next.
    seen = [
        bench.measure_window(1, 1, with_arguments(bench.recipe, bf16=bf16)).precision
        for bf16 in (True, False)
    ]
    assert seen == ["bf16", "fp32"]
    on_device = bench.recipe.preprocessing.model_copy(update={"location": "device"})
    recipe = bench.recipe.model_copy(update={"preprocessing": on_device})
    assert bench.measure_first_loss(recipe) == pytest.approx(
        bench.measure_first_loss(bench.recipe), rel=1e-6
    )


def test_windows_write_and_print_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    recipe = tiny_recipe(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, logging_steps=1
    )
    bench.measure_window(2, 1, recipe)
    assert capfd.readouterr().out == ""
    assert list(tmp_path.rglob("*")) == []


def test_workers_of_a_window_are_gone_after_it(bench: Bench) -> None:
    children = set(_children())
    window = bench.measure_window(2, 1, with_arguments(bench.recipe, dataloader_num_workers=1))
    assert window.switches["dataloader_num_workers"].applied == 1
    assert set(_children()) == children


def _children() -> list[int]:
    import psutil

    return [process.pid for process in psutil.Process(os.getpid()).children()]


def test_memory_of_a_window_is_its_own(bench: Bench) -> None:
    kept = torch.ones(2**27)  # 512 MiB, written to: a peak from before
    del kept
    first = bench.measure_window(1, 1).peak_process_memory_mib
    kept = torch.ones(2**25)
    assert bench.measure_window(1, 1).peak_process_memory_mib > first + 64
    assert float(kept[0]) == 1


def test_precision_that_the_machine_does_not_have_is_refused_before_training(bench: Bench) -> None:
    with pytest.raises(DeviceError, match="fp16: needs a CUDA device"):
        bench.measure_window(1, 1, with_arguments(bench.recipe, fp16=True, use_cpu=False))


def test_windows_are_refused_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("HFBENCH_LAUNCHED", "1")
    with pytest.raises(DeviceError, match="measured in one process"):
        Bench(tiny_recipe())


def test_dropout_changes_a_window_and_not_the_loss_that_is_compared(tmp_path: Path) -> None:
    config = vit_config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    bench = Bench(tiny_recipe(write_model(tmp_path, config)))
    seeds = [with_arguments(bench.recipe, seed=seed, data_seed=1) for seed in (1, 2)]
    drawn = [bench.measure_window(1, 1, recipe).first_loss for recipe in seeds]
    assert abs(drawn[0] - drawn[1]) > 1e-3
    compared = [bench.measure_first_loss(recipe) for recipe in seeds]
    assert compared[0] == pytest.approx(compared[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["vit", "efficientnet", "timm", "timm vit"])
def test_dropout_is_turned_off_in_every_kind_of_model(kind: str, tmp_path: Path) -> None:
    import timm

    if kind == "vit":
        config = vit_config(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
        model = _load(write_model(tmp_path, config))
    elif kind == "efficientnet":
        sizes = {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}
        config = EfficientNetConfig(
            **sizes, image_size=32, dropout_rate=0.5, drop_connect_rate=0.5, num_labels=10
        )
        model = _load(write_model(tmp_path, config))
    else:
        name = (TIMM if kind == "timm" else TIMM_VIT).removeprefix("timm/")
        model = timm.create_model(name, num_classes=10, drop_rate=0.5, drop_path_rate=0.5)
    model.train()
    for module in model.modules():  # which would make two passes differ too
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    size = 160 if kind.startswith("timm") else 32
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(_logits(model, images), _logits(model, images))
    turn_off_dropout(model)
    assert torch.equal(_logits(model, images), _logits(model, images))


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder)


def _logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits


def test_images_on_a_device_are_given_back_before_a_window_that_takes_them_from_the_host() -> None:
    # Else they count in its peak.
    bench = Bench(tiny_recipe(TIMM))
    for split in (bench.inputs.train, bench.inputs.test):
        split._copies[torch.device("meta")] = split.images.to("meta")
    bench.measure_window(1, 1)
    assert bench.inputs.train._copies == bench.inputs.test._copies == {}


def test_evaluation_windows_keep_no_model_of_an_earlier_one_alive() -> None:
    bench = Bench(tiny_recipe(TIMM))
    kind = type(bench.inputs.model)

    def models() -> int:
        return sum(type(item) is kind for item in gc.get_objects())

    gc.collect()
    before, seen = models(), []
    for _ in range(4):
        measure_evaluation(bench, 8, bench.recipe)
        seen.append(models())
    assert max(seen) <= before + 1  # the newest one's own
