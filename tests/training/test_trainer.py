"""The trainer: one loss, complete resume, the same result on the host and on the device."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import accelerate.optimizer
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    Swinv2Config,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import hfbench.profiling.clock
import hfbench.profiling.timeline
from hfbench.data.images import ImageBatches
from hfbench.errors import DeviceError, RecipeError
from hfbench.machine.settings import set_tf32
from hfbench.recipe.schema import Recipe
from hfbench.studies.windows import with_arguments
from hfbench.training.run import run_recipe
from hfbench.training.switches import observe_switches
from hfbench.training.trainer import (
    BenchTrainer,
    EpochSampler,
    build_training_arguments,
    cross_entropy_loss,
)
from tests.builders import TIMM, TIMM_VIT, make_trainer, tiny_recipe, vit_config, write_model


def weights(trainer: BenchTrainer) -> dict[str, Tensor]:
    """Return a copy of the model's state."""
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal_weights(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Compare bit for bit, as only a CPU repeats itself."""
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """Return the folder of a tiny ViT for ten classes."""
    return write_model(tmp_path / "vit", vit_config())


@pytest.fixture
def tf32() -> Iterator[None]:
    """Put torch's TF32 switches back afterwards."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.fp32_precision = value


# The loss


def test_loss_is_the_mean_cross_entropy_of_the_batch() -> None:
    # ln(1 + e^-2) and ln(1 + e^2): a right and a wrong answer, two apart.
    outputs = {"logits": torch.tensor([[2.0, 0.0], [2.0, 0.0]])}
    loss = cross_entropy_loss(0.0)(outputs, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((0.126928 + 2.126928) / 2, abs=1e-6)


def test_loss_divides_by_the_items_of_the_accumulated_batch() -> None:
    outputs = {"logits": torch.tensor([[2.0, 0.0], [2.0, 0.0]])}
    loss = cross_entropy_loss(0.0)(outputs, torch.tensor([0, 1]), num_items_in_batch=8)
    assert loss.item() == pytest.approx((0.126928 + 2.126928) / 8, abs=1e-6)


def test_loss_takes_the_first_output_of_a_tuple() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    loss = cross_entropy_loss(0.0)
    assert torch.equal(loss((logits,), labels), loss({"logits": logits}, labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_equals_torch(smoothing: float) -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy_loss(smoothing)({"logits": logits}, labels), expected)


def test_trainer_uses_label_smoothing(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True, label_smoothing_factor=0.3, max_steps=1)
    trainer = make_trainer(recipe, tmp_path)
    batch = trainer.train_dataset.__getitems__(list(range(8)))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(pixel_values=batch["pixel_values"]).logits
    expected = nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.3)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("model", ["vit", TIMM])
def test_ragged_micro_batches_give_the_gradient_of_the_whole_batch(
    model: str, vit: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(vit if model == "vit" else model, pretrained=model == "vit")
    trainer = make_trainer(recipe, tmp_path)
    classifier, loss = trainer.model.eval(), cross_entropy_loss(0.0)  # batch norm sees no batch
    batch = trainer.train_dataset.__getitems__(list(range(14)))

    def gradients(sizes: Sequence[int]) -> list[Tensor]:
        classifier.zero_grad()
        pairs = zip(batch["pixel_values"].split(sizes), batch["labels"].split(sizes), strict=True)
        for pixel_values, labels in pairs:
            loss(classifier(pixel_values=pixel_values), labels, 14).backward()
        return [p.grad.clone() for p in classifier.parameters() if p.grad is not None]

    whole, parts = gradients([14]), gradients([4, 4, 4, 2])
    assert len(whole) > 10
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", ["vit", TIMM_VIT])
def test_ragged_accumulation_takes_the_step_of_the_whole_batch(
    model: str, vit: Path, tmp_path: Path
) -> None:
    # 14 images make micro-batches of 4, 4, 4 and 2; plain SGD with rate 1 adds the gradient itself.
    def step(size: int, accumulation: int) -> dict[str, Tensor]:
        recipe = tiny_recipe(
            vit if model == "vit" else model,
            pretrained=model == "vit",
            dataset={"max_train_samples": 14},
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            num_train_epochs=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer = make_trainer(recipe, tmp_path)
        before = weights(trainer)
        trainer.train()
        assert trainer.state.global_step == 1
        return {name: value - before[name] for name, value in weights(trainer).items()}

    whole, parts = step(14, 1), step(4, 4)
    assert max(value.abs().max().item() for value in whole.values()) > 1e-3
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        vit_config(),
        Swinv2Config(  # takes num_items_in_batch and drops it: transformers issue 47688
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1],
            num_heads=[2],
            window_size=4,
            drop_path_rate=0.0,
            num_labels=10,
        ),
    ],
    ids=["vit", "swinv2"],
)
def test_first_loss_is_the_same_for_every_accumulation(
    config: PreTrainedConfig, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", config)
    losses = []
    for accumulation in (1, 2, 4):
        recipe = tiny_recipe(
            folder,
            pretrained=True,
            max_steps=1,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer = make_trainer(recipe, tmp_path / str(accumulation))
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    assert losses[0] == pytest.approx(2.3026, abs=0.3)  # ln 10: nothing is known yet


# The sampler


def test_each_epoch_is_another_permutation_numbered_by_epoch() -> None:
    epoch = 0
    sampler = EpochSampler(10, 3, lambda: epoch)
    orders = []
    for epoch in range(3):
        numbers = list(sampler)
        assert sorted(numbers) == list(range(10 * epoch, 10 * epoch + 10))
        orders.append([number % 10 for number in numbers])
    assert len(sampler) == 10
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return list(EpochSampler(50, seed, lambda: epoch))

    assert order(1, 4) == order(1, 4)
    assert order(1, 4) != order(2, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_sees_each_image_once_an_epoch(workers: int, tmp_path: Path) -> None:
    seen: list[int] = []

    class Spy(BenchTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.extend(args[1]["sample"].tolist())
            return super().training_step(*args, **kwargs)

    recipe = tiny_recipe(preprocessing={"location": "device"}, dataloader_num_workers=workers)
    trainer = make_trainer(recipe, tmp_path)
    trainer.__class__ = Spy
    trainer.train()
    assert sorted(seen) == list(range(96))
    assert sorted(seen[:48]) == list(range(48))
    assert seen[48:] != [number + 48 for number in seen[:48]]


# TrainingArguments


def test_launcher_cannot_change_the_precision(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):  # of earlier tests
        monkeypatch.delenv(f"HFBENCH_SET_{name}", raising=False)
    trainer = make_trainer(tiny_recipe(vit, pretrained=True, max_steps=1), tmp_path)
    trainer.train()
    assert trainer.seen_dtype == torch.float32
    assert trainer.accelerator.mixed_precision == "no"
    assert "ACCELERATE_MIXED_PRECISION=bf16 comes from the launcher and is ignored" in caplog.text
    assert "ACCELERATE_DYNAMO_BACKEND=INDUCTOR" in caplog.text


def test_launcher_that_agrees_is_not_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    build_training_arguments(tiny_recipe(bf16=True), tmp_path)
    assert "launcher" not in caplog.text


def test_second_run_in_a_process_does_not_blame_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    build_training_arguments(tiny_recipe(bf16=True), tmp_path)
    build_training_arguments(tiny_recipe(), tmp_path)
    assert "launcher" not in caplog.text


def test_hub_arguments_do_not_reach_the_trainer(tmp_path: Path) -> None:
    recipe = tiny_recipe(push_to_hub=True, hub_model_id="me/model")
    args = build_training_arguments(recipe, tmp_path)
    assert (args.push_to_hub, args.hub_model_id) == (False, None)


def test_batches_keep_their_columns(tmp_path: Path) -> None:
    args = build_training_arguments(tiny_recipe(), tmp_path)
    assert args.remove_unused_columns is False
    assert args.label_names == ["labels"]


def test_run_is_named_after_the_recipe(tmp_path: Path) -> None:
    assert build_training_arguments(tiny_recipe(), tmp_path).run_name == "tiny"
    assert build_training_arguments(tiny_recipe(run_name="mine"), tmp_path).run_name == "mine"


def test_refusal_of_transformers_is_a_recipe_error(tmp_path: Path) -> None:
    # transformers wants a multiple here, as `check_recipe` does: which this recipe has not seen.
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 6}
    asked = tiny_recipe().training_args | {"load_best_model_at_end": True} | steps
    recipe = tiny_recipe().model_copy(update={"training_args": asked})
    with pytest.raises(RecipeError, match=r"tiny are refused by transformers: .*multiple"):
        build_training_arguments(recipe, tmp_path)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("enabled", [None, False])
def test_tf32_is_what_the_recipe_says_whatever_accelerate_sets(
    enabled: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As it does on a GPU where a model is compiled and computes in fp32.
    original = Accelerator.__init__

    def build(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        torch.backends.cuda.matmul.allow_tf32 = True

    monkeypatch.setattr(Accelerator, "__init__", build)
    recipe = with_arguments(tiny_recipe(max_steps=1), tf32=enabled)
    trainer = make_trainer(recipe, tmp_path)
    torch.get_float32_matmul_precision()  # Inductor asks, and torch refuses what contradicts
    trainer.train()
    assert trainer.seen_tf32 == {"matmul": bool(enabled), "convolution": enabled is not False}
    set_tf32(not enabled)
    seen = observe_switches(recipe, trainer)["tf32_matmul"]
    assert seen.applied is False  # on a CPU


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(("enabled", "mode"), [(True, "tf32"), (False, "ieee")])
def test_tf32_is_switched_for_matmul_and_convolution(enabled: bool, mode: str) -> None:
    set_tf32(enabled)
    assert torch.backends.cuda.matmul.fp32_precision == mode
    assert torch.backends.cudnn.conv.fp32_precision == mode
    set_tf32(None)
    assert torch.backends.cuda.matmul.fp32_precision == "none"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # torch's defaults


@pytest.mark.usefixtures("tf32")
def test_recipe_switches_tf32_off_everywhere(tmp_path: Path) -> None:
    set_tf32(True)
    build_training_arguments(tiny_recipe(tf32=False), tmp_path)
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


# What was seen


def test_another_precision_than_requested_stops_training(vit: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe(vit, pretrained=True), tmp_path)
    trainer.requested_dtype = torch.float16
    expected = r"torch.float16 was asked for, but the forward pass ran in torch.float32 on cpu"
    with pytest.raises(DeviceError, match=expected):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("model", ["vit", TIMM])
def test_bf16_is_seen_in_the_forward_pass(model: str, vit: Path, tmp_path: Path) -> None:
    path = vit if model == "vit" else model
    recipe = tiny_recipe(path, pretrained=model == "vit", bf16=True, max_steps=1)
    trainer = make_trainer(recipe, tmp_path)
    trainer.train()
    assert trainer.seen_dtype == torch.bfloat16
    precision = observe_switches(recipe, trainer)["precision"]
    assert (precision.requested, precision.applied, precision.reason) == ("bf16", "bf16", None)
    assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}


@pytest.mark.usefixtures("tf32")
def test_switches_on_a_cpu_say_why_they_differ(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        vit,
        pretrained=True,
        max_steps=1,
        dataloader_pin_memory=True,
        accelerator_config={"non_blocking": True},
        tf32=False,
    )
    trainer = make_trainer(recipe, tmp_path)
    trainer.train()
    switches = observe_switches(recipe, trainer)
    reason = "nothing is copied: the model is on the CPU"
    for name in ("dataloader_pin_memory", "non_blocking"):
        switch = switches[name]
        assert (switch.requested, switch.applied, switch.reason) == (True, False, reason)
    differing = {name for name, s in switches.items() if s.requested != s.applied}
    assert differing == {"dataloader_pin_memory", "non_blocking"}
    assert {name for name, switch in switches.items() if switch.reason} == differing
    assert switches["use_cpu"].applied is True
    assert switches["world_size"].applied == 1
    assert switches["optim"].applied == "adamw_torch"


def test_switches_of_an_untuned_run_are_as_asked(tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=1, gradient_accumulation_steps=2, dataloader_num_workers=1)
    trainer = make_trainer(recipe, tmp_path)
    trainer.train()
    switches = observe_switches(recipe, trainer)
    assert switches["precision"].applied == "fp32"
    assert switches["dataloader_pin_memory"].applied is False
    assert switches["dataloader_num_workers"].applied == 1
    assert switches["gradient_accumulation_steps"].applied == 2
    assert switches["torch_compile"].applied is False


# Where the time goes


class FakeTime:
    """Stand in for the `time` module; `spend` is all that moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> Callable[..., None]:
        def do(*_: Any, **__: Any) -> None:
            self.now += seconds

        return do


def make_each_part_take_its_time(trainer: BenchTrainer, time: FakeTime) -> None:
    """Let each part of the work take another power of two of seconds."""

    class Copied(Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            time.now += 2.0
            return self.as_subclass(Tensor).to(*args, **kwargs)

    class Slow(ImageBatches):
        def __getitems__(self, samples: list[int]) -> dict[str, Tensor]:
            time.now += 1.0
            batch = super().__getitems__(samples)
            return batch | {"labels": batch["labels"].as_subclass(Copied)}

    class Callbacks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            time.now += 256.0

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            time.now += 32.0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            time.now += 64.0

    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        dataset.__class__ = Slow
    trainer.preprocessing.register_forward_hook(time.spend(4.0))
    trainer.model.register_forward_hook(time.spend(8.0))
    trainer.model.classifier.bias.register_hook(time.spend(16.0))
    trainer.save_model = time.spend(128.0)
    trainer.add_callback(Callbacks())


def test_each_part_of_the_work_is_in_its_place_of_the_budget(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = FakeTime()
    for module in (hfbench.profiling.clock, hfbench.profiling.timeline):
        monkeypatch.setattr(module, "time", time)
    recipe = tiny_recipe(
        vit,
        pretrained=True,
        preprocessing={"location": "device"},
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    trainer = make_trainer(recipe, tmp_path)
    make_each_part_take_its_time(trainer, time)
    trainer.clock.start(trainer.args.device)
    trainer.train()
    trainer.clock.stop(trainer.args.device)

    # Two epochs of six batches, of which accelerate fetches one ahead; two to an optimizer step.
    first_step = 3 * 1 + 2 * (2 + 4 + 8 + 16) + 32
    budget = trainer.clock.budget()
    assert budget is not None
    assert budget.model_dump() == {
        "start_seconds": 256,
        "first_step_seconds": first_step,
        "data_wait_seconds": 12 - 3,
        "copy_seconds": 2 * (12 - 2),
        "preprocessing_seconds": 4 * (12 - 2),
        "forward_seconds": 8 * (12 - 2),
        "backward_seconds": 16 * (12 - 2),
        "optimizer_seconds": 32 * (6 - 1),
        "evaluation_seconds": 2 * (1 + 2 + 4 + 8),
        "save_seconds": 2 * 128,
        "overhead_seconds": 64 * 6,
    }
    assert trainer.clock.times.execution_seconds == sum(budget.model_dump().values())


def test_processes_that_wait_for_each_other_do_not_wait_for_data(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer gathers the number of items of all processes where it fetches batches."""
    time = FakeTime()
    for module in (hfbench.profiling.clock, hfbench.profiling.timeline):
        monkeypatch.setattr(module, "time", time)
    trainer = make_trainer(tiny_recipe(vit, pretrained=True), tmp_path)
    make_each_part_take_its_time(trainer, time)
    batches = iter(trainer.get_train_dataloader())

    def gather(mine: Tensor) -> Tensor:
        time.now += 512.0
        return torch.stack([mine, mine + 3])

    monkeypatch.setattr(trainer.accelerator, "gather", gather)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    clock = trainer.clock
    clock.start(trainer.args.device)
    clock.timeline.enter("forward")  # the first step is behind
    fetched, items = trainer.get_batch_samples(batches, 2, trainer.args.device)
    clock.stop(trainer.args.device)

    assert (len(fetched), int(items)) == (2, 8 + 8 + (8 + 8 + 3))
    budget = clock.budget()
    assert budget is not None
    # Three batches are fetched, one ahead, and two of them copied.
    assert clock.times.data_wait_seconds == 3 * 1 + 2 * 2
    assert (budget.data_wait_seconds, budget.copy_seconds) == (3, 2 * 2)
    assert (budget.overhead_seconds, clock.times.execution_seconds) == (512, 512 + 7)


def test_training_is_the_same_whether_it_is_timed_or_not(vit: Path, tmp_path: Path) -> None:
    def train(timed: bool) -> dict[str, Tensor]:
        trainer = make_trainer(tiny_recipe(vit, pretrained=True), tmp_path)
        if timed:
            trainer.clock.start(trainer.args.device)
        trainer.train()
        return weights(trainer)

    assert_equal_weights(train(True), train(False))


# Resume

_AUGMENTATION = ["random_crop", "horizontal_flip", "color", "cutout", "mixup", "cutmix"]


class StopAt(TrainerCallback):
    """Save at a step and stop there, as a run that was killed after its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize("model", ["vit", TIMM])
@pytest.mark.parametrize(
    ("workers", "step", "location"), [(0, 4, "host"), (2, 8, "host"), (0, 6, "device")]
)
def test_resume_on_a_cpu_is_bit_exact(
    model: str, workers: int, step: int, location: str, vit: Path, tmp_path: Path
) -> None:
    # Steps 4 and 8 lie inside the first and the second epoch, step 6 is the border between them.
    recipe = tiny_recipe(
        vit if model == "vit" else model,
        pretrained=model == "vit",
        preprocessing={"augmentation": _AUGMENTATION, "location": location},
        dataloader_num_workers=workers,
        save_strategy="steps",
        save_steps=step,
    )
    whole = make_trainer(recipe, tmp_path / "whole")
    whole.train()
    stopped = make_trainer(recipe, tmp_path / "parts", [StopAt(step)])
    stopped.train()
    assert stopped.state.global_step == step
    set_seed(999)  # nothing may hang on what the new process drew before
    resumed = make_trainer(recipe, tmp_path / "parts")
    nn.init.zeros_(next(p for p in resumed.model.parameters() if p.ndim > 1))  # must be loaded
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{step}"))
    assert resumed.state.global_step == whole.state.global_step == 12
    assert_equal_weights(weights(whole), weights(resumed))


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Return by how much two models differ, relative to the weights of the first."""
    difference, norm = (
        sum(float(value.double().square().sum()) for value in values)
        for values in ([one[name].double() - two[name] for name in one], one.values())
    )
    return math.sqrt(difference / norm)


def assert_as_near_as_equal_runs(other: dict[str, Tensor], equal: list[dict[str, Tensor]]) -> None:
    """Compare with the spread of equal runs, where the device itself repeats nothing bit for bit.

    Twice the spread of three is allowed, and rounding, should they agree.
    """
    spread = max(distance(one, two) for one, two in combinations(equal, 2))
    assert min(distance(one, other) for one in equal) <= 2 * spread + 1e-7


def make_noisy(trainer: BenchTrainer, run: int) -> BenchTrainer:
    """Let gradients vary in their last bits from run to run, as sums in changing order do."""
    generator = torch.Generator().manual_seed(run)

    def vary(gradient: Tensor) -> Tensor:
        return gradient * (1 + 1e-6 * torch.randn(gradient.shape, generator=generator))

    for parameter in trainer.model.parameters():
        parameter.register_hook(vary)
    return trainer


def train_four_times(recipe: Recipe, folder: Path, on_cpu: bool, forgets: str = "") -> None:
    """Train three equal runs and one that is stopped in the midst, and compare its weights.

    Args:
        recipe: That saves after four of twelve steps.
        folder: For checkpoints.
        on_cpu: Whether the runs are to be given noise, since the device has none.
        forgets: A file of the checkpoint that the resumed run does not find.
    """

    def build(run: int, *callbacks: TrainerCallback) -> BenchTrainer:
        trainer = make_trainer(recipe, folder / str(run), callbacks)
        return make_noisy(trainer, run) if on_cpu else trainer

    equal = []
    for run in range(3):
        whole = build(run)
        whole.train()
        equal.append(weights(whole))
    build(3, StopAt(4)).train()
    checkpoint = folder / "3" / "checkpoint-4"
    if forgets:
        (checkpoint / forgets).unlink()
    resumed = build(3)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert distance(equal[0], equal[1]) > 0 or not on_cpu
    assert_as_near_as_equal_runs(weights(resumed), equal)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
            ],
        ),
    ],
)
def test_resume_is_as_near_as_equal_runs_are(device: str, vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        vit, pretrained=True, use_cpu=device == "cpu", save_strategy="steps", save_steps=4
    )
    train_four_times(recipe, tmp_path, device == "cpu")


def test_resume_that_forgets_the_optimizer_is_farther_away(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True, save_strategy="steps", save_steps=4)
    with pytest.raises(AssertionError):
        train_four_times(recipe, tmp_path, on_cpu=True, forgets="optimizer.pt")


@pytest.mark.parametrize("model", ["vit", TIMM])
def test_best_checkpoint_is_the_one_that_is_evaluated(
    model: str, vit: Path, tmp_path: Path
) -> None:
    # A rate that grows from 0 to 3 trains a little in the first epoch and wrecks the model later.
    recipe = tiny_recipe(
        vit if model == "vit" else model,
        pretrained=model == "vit",
        num_train_epochs=3,
        learning_rate=3.0,
        optim="sgd",
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=18,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    result = run_recipe(recipe, tmp_path)
    log = (tmp_path / "tiny" / result.run_id / "log.jsonl").read_text("utf-8").splitlines()
    losses = [entry["eval_loss"] for entry in map(json.loads, log) if "eval_loss" in entry]
    assert len(losses) == 3
    assert result.metrics.test is not None
    assert min(losses) < losses[-1] - 0.05  # else the test says nothing
    assert result.metrics.test.loss == pytest.approx(min(losses), abs=1e-5)


def test_checkpoint_of_another_model_is_refused(vit: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe(vit, pretrained=True), tmp_path)
    other = write_model(tmp_path / "checkpoint-1", vit_config(hidden_size=16))
    trainer.state.best_model_checkpoint = str(other)
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer._load_best_model()


# Where images are prepared


@pytest.mark.parametrize("model", ["vit", TIMM])
def test_host_and_device_preprocessing_train_the_same_model(
    model: str, vit: Path, tmp_path: Path
) -> None:
    def train(location: str) -> dict[str, Tensor]:
        recipe = tiny_recipe(
            vit if model == "vit" else model,
            pretrained=model == "vit",
            preprocessing={"location": location, "augmentation": _AUGMENTATION},
        )
        trainer = make_trainer(recipe, tmp_path)
        trainer.train()
        return weights(trainer)

    assert_equal_weights(train("host"), train("device"))


def test_workers_do_not_change_the_model(vit: Path, tmp_path: Path) -> None:
    def train(**arguments: Any) -> dict[str, Tensor]:
        preprocessing = {"augmentation": _AUGMENTATION}
        recipe = tiny_recipe(vit, pretrained=True, preprocessing=preprocessing, **arguments)
        trainer = make_trainer(recipe, tmp_path)
        trainer.train()
        # Left to the garbage collector, torch waits 5 s for each persistent worker.
        trainer.train_loader.base_dataloader._iterator = None
        return weights(trainer)

    persistent = train(dataloader_num_workers=2, dataloader_persistent_workers=True)
    assert_equal_weights(train(), persistent)


def test_augmentation_changes_what_is_trained_on(vit: Path, tmp_path: Path) -> None:
    def batch(augmentation: list[str], read: Callable[[BenchTrainer], ImageBatches]) -> Tensor:
        recipe = tiny_recipe(vit, pretrained=True, preprocessing={"augmentation": augmentation})
        return read(make_trainer(recipe, tmp_path)).__getitems__(list(range(16)))["pixel_values"]

    def training(trainer: BenchTrainer) -> ImageBatches:
        return trainer.train_dataset

    def testing(trainer: BenchTrainer) -> ImageBatches:
        return trainer.eval_dataset

    assert not torch.equal(batch([], training), batch(_AUGMENTATION, training))
    assert torch.equal(batch([], testing), batch(_AUGMENTATION, testing))


def test_checkpoint_holds_the_model_alone(vit: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    recipe = tiny_recipe(
        vit, pretrained=True, preprocessing={"location": "device"}, save_strategy="epoch"
    )
    trainer = make_trainer(recipe, tmp_path / "run")
    trainer.train()
    with (
        safe_open(tmp_path / "run" / "checkpoint-12" / "model.safetensors", "pt") as saved,
        safe_open(vit / "model.safetensors", "pt") as original,
    ):
        assert set(saved.keys()) == set(original.keys())
    kept = json.loads((tmp_path / "run" / "checkpoint-12" / "clock.json").read_text("utf-8"))
    assert kept["save_seconds"] > 0


# What is left out of each step


def count_train_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note each time that a module inside the model is told to train or not."""
    inner = next(model.children())
    calls: list[bool] = []
    original = type(inner).train

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if self is inner:
            calls.append(mode)
        return original(self, mode)

    monkeypatch.setattr(type(inner), "train", train)
    return calls


def test_modules_are_not_walked_in_each_step(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_recipe(vit, pretrained=True, max_steps=6), tmp_path)
    calls = count_train_calls(trainer.model, monkeypatch)
    trainer.train()
    assert len(calls) <= 2
    assert trainer.model.training
    trainer.evaluate()
    assert not any(module.training for module in trainer.model.modules())


def test_model_is_as_it_was_after_training(vit: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_recipe(vit, pretrained=True, max_steps=2), tmp_path)
    trainer.train()
    assert {"train", "zero_grad", "parameters"}.isdisjoint(vars(trainer.model))
    copy.deepcopy(trainer.model).eval()
    assert trainer.model.training


def test_evaluation_between_steps_turns_training_off_and_on(vit: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(vit, pretrained=True, max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer = make_trainer(recipe, tmp_path)
    seen: list[bool] = []
    trainer.model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    trainer.train()
    assert seen[:2] == [True, True]
    assert seen.count(True) == 4
    assert False in seen[2:-2]


def test_gradients_are_left_alone_without_clipping(vit: Path, tmp_path: Path) -> None:
    def logged(norm: float) -> list[str]:
        recipe = tiny_recipe(vit, pretrained=True, max_steps=1, max_grad_norm=norm, logging_steps=1)
        trainer = make_trainer(recipe, tmp_path)
        trainer.train()
        return [name for entry in trainer.state.log_history for name in entry]

    assert "grad_norm" in logged(1.0)
    assert "grad_norm" not in logged(0.0)


def test_accelerate_looks_for_a_package_once(vit: Path, tmp_path: Path) -> None:
    make_trainer(tiny_recipe(vit, pretrained=True, max_steps=1), tmp_path)
    accelerate.optimizer.is_lomo_available()
    asked = accelerate.optimizer.is_lomo_available.cache_info().misses
    accelerate.optimizer.is_lomo_available()
    assert accelerate.optimizer.is_lomo_available.cache_info().misses == asked == 1


def test_evaluation_times_no_algorithms_for_the_rest_of_the_images(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(vit, pretrained=True, dataset={"max_eval_samples": 50})
    trainer = make_trainer(recipe, tmp_path)
    seen = []

    def see(module: Any, arguments: Any, named: Any) -> None:
        seen.append((len(named["pixel_values"]), torch.backends.cudnn.benchmark))

    trainer.model.register_forward_pre_hook(see, with_kwargs=True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    trainer.evaluate()
    assert torch.backends.cudnn.benchmark
    assert seen == [(20, True), (20, True), (10, False)]
