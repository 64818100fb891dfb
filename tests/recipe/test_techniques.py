"""Each technique can be turned on and off in any recipe, and says when it can have no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfbench.models.convolutions import is_convolutional
from hfbench.recipe.schema import Recipe, check_recipe, load_recipe, shipped_recipes
from hfbench.recipe.techniques import TECHNIQUES, Use, change
from hfbench.studies.ablation.plan import plan_ablation
from hfbench.studies.uses import find_uses
from tests.builders import TIMM_VIT, tiny_recipe, vit_config, write_model

ALWAYS = [
    "mixed precision",
    "pinned memory",
    "accumulation, same batch",
    "accumulation, larger batch",
    "memory format",
]
ON_CPU = [*ALWAYS, "kept memory"]


def find(recipe: Recipe, name: str) -> Use:
    """Return the use of one technique."""
    (use,) = (use for use in find_uses(recipe) if use.name == name)
    return use


def turned_on(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return the training arguments of a recipe with a technique turned on."""
    return change(recipe, find(recipe, name).on.items()).training_args


def test_untuned_recipe_has_no_technique_and_six_that_it_could_have() -> None:
    recipe = tiny_recipe()
    assert [use.name for use in find_uses(recipe)] == ON_CPU
    assert not any(use.in_recipe for use in find_uses(recipe))


def test_recipe_that_has_everything_can_turn_off_each() -> None:
    recipe = tiny_recipe(
        preprocessing={"location": "device"},
        bf16=True,
        dataloader_pin_memory=True,
        accelerator_config={"non_blocking": True, "even_batches": True},
        gradient_accumulation_steps=2,
        torch_compile_backend="eager",
        dataloader_num_workers=2,
        dataloader_persistent_workers=True,
        optim="adamw_torch_fused",
    )
    uses = find_uses(recipe)
    assert [use.name for use in uses if use.in_recipe] == [
        "mixed precision",
        "pinned memory",
        "accumulation, larger batch",
        "torch.compile",
        "device preprocessing",
        "loader workers",
        "optimizer implementation",
    ]
    off = change(recipe, [item for use in uses for item in use.off.items()])
    assert not any(use.in_recipe for use in find_uses(off))
    assert off.preprocessing.location == "host"
    # What no technique is made of stays.
    assert off.training_args["accelerator_config"] == {"non_blocking": False, "even_batches": True}
    assert off.training_args["optim"] == "adamw_torch"
    on = change(off, [item for use in uses if use.in_recipe for item in use.on.items()])
    for use in find_uses(on):
        assert use.on == find(recipe, use.name).on
    assert recipe.training_args["bf16"] is True


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_technique_of_every_shipped_recipe_leaves_a_valid_recipe(name: str) -> None:
    recipe = load_recipe(name)
    for use in find_uses(recipe):
        for settings in (use.on, use.off):
            _, problems = check_recipe(change(recipe, settings.items()).as_json())
            assert problems == []
        assert set(use.on) >= set(use.off)
        assert use.technique in TECHNIQUES


def test_mixed_precision_of_a_cpu_is_bfloat16_asked_for_by_name() -> None:
    recipe = tiny_recipe(use_cpu=False)
    on = turned_on(recipe, "mixed precision")
    assert (on["bf16"], on["fp16"], on["use_cpu"]) == (True, False, True)


def test_mixed_precision_is_that_of_the_recipe_where_it_has_one() -> None:
    use = find(tiny_recipe(fp16=True, use_cpu=False), "mixed precision")
    assert (use.in_recipe, use.detail) == (True, "fp16")


@pytest.mark.parametrize(
    ("batch", "steps", "expected"),
    [
        (32, 1, (4, 8)),  # the reference's four micro-batches
        (32, 2, (2, 16)),  # as many as the recipe has
        (70, 4, (2, 35)),  # 4 does not divide 70, 3 neither
        (9, 4, (3, 3)),
        (6, 1, (3, 2)),
        (4, 4, (2, 2)),  # four single images would be none for batch norm
    ],
)
def test_accumulation_at_the_same_batch_splits_it_evenly(
    batch: int, steps: int, expected: tuple[int, int]
) -> None:
    recipe = tiny_recipe(per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    on = turned_on(recipe, "accumulation, same batch")
    found = (on["gradient_accumulation_steps"], on["per_device_train_batch_size"])
    assert found == expected
    assert found[0] * found[1] == batch
    use = find(recipe, "accumulation, same batch")
    assert use.no_effect is None
    assert ("do not make 4" in use.detail) == (expected[0] not in (4, steps))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batch_that_cannot_be_split_is_said(batch: int) -> None:
    use = find(tiny_recipe(per_device_train_batch_size=batch), "accumulation, same batch")
    assert use.no_effect is not None
    assert f"a batch of {batch} cannot be split" in use.no_effect


def test_accumulation_that_enlarges_the_batch_keeps_the_micro_batch() -> None:
    on = turned_on(tiny_recipe(per_device_train_batch_size=7), "accumulation, larger batch")
    assert (on["per_device_train_batch_size"], on["gradient_accumulation_steps"]) == (7, 4)


def test_pinned_memory_has_no_effect_on_a_cpu() -> None:
    use = find(tiny_recipe(dataloader_pin_memory=True), "pinned memory")
    assert use.in_recipe
    assert use.no_effect is not None
    assert "nothing is copied" in use.no_effect


def test_technique_that_is_a_default_of_transformers_counts_as_in_the_recipe() -> None:
    content = tiny_recipe().as_json()
    for name in ("optim", "dataloader_pin_memory"):
        del content["training_args"][name]
    recipe = Recipe.model_validate(content)
    assert find(recipe, "pinned memory").in_recipe
    assert find(recipe, "optimizer implementation").off == {"training_args.optim": "adamw_torch"}


def test_slug_can_stand_in_a_recipe_name() -> None:
    names = [use.slug for use in find_uses(tiny_recipe(torch_compile=True))]
    assert names[2:] == [
        "accumulation-same-batch",
        "accumulation-larger-batch",
        "memory-format",
        "torch-compile",
        "kept-memory",
    ]


# --- how the model computes ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/resnet50.a1_in1k", True),
        ("timm/efficientnet_b0.ra_in1k", True),
        ("google/vit-base-patch16-224-in21k", False),  # one, for its patches
        (TIMM_VIT, False),
        ("microsoft/resnet-50", None),  # known to the Hub alone
        ("timm/no_such_model", None),
    ],
)
def test_whether_a_model_is_convolutional_is_known_without_the_hub(
    name: str, expected: bool | None
) -> None:
    assert is_convolutional(tiny_recipe(name, pretrained=True)) is expected


def test_whether_a_model_in_a_folder_is_convolutional_is_read_from_its_configuration(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path / "vit", vit_config())
    assert is_convolutional(tiny_recipe(folder, pretrained=True)) is False


def test_memory_format_is_tried_on_convolutions_whatever_the_recipe_says() -> None:
    recipe = tiny_recipe()
    use = find(recipe, "memory format")
    assert (use.in_recipe, use.no_effect) == (False, None)
    on = change(recipe, use.on.items())
    assert on.model.memory_format == "channels_last"
    assert change(on, find(on, "memory format").off.items()).digest() == recipe.digest()
    assert find(tiny_recipe("microsoft/resnet-50"), "memory format").no_effect is None
    idle = find(tiny_recipe(TIMM_VIT), "memory format").no_effect
    assert idle is not None
    assert "no convolutions" in idle


def test_cudnn_benchmark_is_told_by_whole_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # ATen's plan cache does not know of the switch: the first window of a process decides for all.
    monkeypatch.setattr("hfbench.studies.uses.accelerator_type", lambda: "cuda")
    monkeypatch.setattr("hfbench.studies.uses._cuda_has_bf16", lambda: False)
    for asked in (False, True):
        recipe = with_model(tiny_recipe(use_cpu=False, fp16=True), cudnn_benchmark=asked)
        short, full = plan_ablation(recipe), plan_ablation(recipe, whole_runs=True)
        (why,) = [item.reason for item in short.not_run if item.technique == "cuDNN benchmark"]
        assert "once in a process" in why
        assert "--full" in why
        assert {item.recipe.model.cudnn_benchmark for item in short.configurations} == {asked}
        assert {item.recipe.model.cudnn_benchmark for item in full.configurations} == {True, False}


def with_model(recipe: Recipe, **values: Any) -> Recipe:
    """Return a recipe whose model computes in another way."""
    return change(recipe, [(f"model.{name}", value) for name, value in values.items()])


def test_cudnn_benchmark_needs_a_gpu_and_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_model(tiny_recipe(), cudnn_benchmark=True)
    on_cpu = find(asked, "cuDNN benchmark")
    assert (on_cpu.in_recipe, on_cpu.off) == (True, {"model.cudnn_benchmark": False})
    assert on_cpu.no_effect is not None
    assert "no cuDNN" in on_cpu.no_effect
    monkeypatch.setattr("hfbench.studies.uses.accelerator_type", lambda: "cuda")
    precision = {"use_cpu": False, "fp16": True}
    assert find(tiny_recipe(**precision), "cuDNN benchmark").no_effect is None
    transformer = with_model(tiny_recipe(TIMM_VIT, **precision), cudnn_benchmark=True)
    idle = find(transformer, "cuDNN benchmark").no_effect
    assert idle is not None
    assert "no convolutions" in idle


def test_kept_memory_can_be_turned_on_and_off_on_a_cpu() -> None:
    recipe = tiny_recipe()
    use = find(recipe, "kept memory")
    assert (use.in_recipe, use.no_effect) == (False, None)
    kept = change(recipe, use.on.items())
    assert kept.model.keep_freed_memory is True
    assert find(kept, "kept memory").in_recipe
    assert change(kept, find(kept, "kept memory").off.items()).digest() == recipe.digest()


def test_kept_memory_needs_a_cpu_and_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"keep_freed_memory": True}
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("hfbench.studies.uses.can_keep_freed_memory", lambda: False)
        assert [use.name for use in find_uses(tiny_recipe())] == ALWAYS
        idle = find(with_model(tiny_recipe(), **kept), "kept memory")
        assert (idle.in_recipe, idle.no_effect) == (True, "needs Linux with glibc")
    monkeypatch.setattr("hfbench.studies.uses.accelerator_type", lambda: "cuda")
    on_gpu = tiny_recipe(use_cpu=False, fp16=True)
    assert all(use.name != "kept memory" for use in find_uses(on_gpu))
    said = find(with_model(on_gpu, **kept), "kept memory").no_effect
    assert said is not None
    assert "the device's" in said


def test_attention_that_a_recipe_names_is_set_against_eager() -> None:
    sdpa = with_model(tiny_recipe(TIMM_VIT), attn_implementation="sdpa")
    use = find(sdpa, "attention implementation")
    assert (use.in_recipe, use.detail) == (True, "sdpa instead of eager")
    off = change(sdpa, use.off.items())
    assert off.model.attn_implementation == "eager"
    for recipe in (off, tiny_recipe(TIMM_VIT)):
        assert all(use.name != "attention implementation" for use in find_uses(recipe))


def test_nan_filter_costs_nothing_where_the_host_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"logging_nan_inf_filter": False}
    use = find(tiny_recipe(**values), "NaN filter")
    assert use.in_recipe
    assert use.no_effect is not None
    monkeypatch.setattr("hfbench.studies.uses.accelerator_type", lambda: "cuda")
    values |= {"use_cpu": False, "fp16": True}
    assert find(tiny_recipe(**values), "NaN filter").no_effect is None


# --- what a fast recipe has more of than its baseline ---


def test_larger_batches_and_missing_checkpoints_are_told_by_the_shipped_baseline() -> None:
    fast = load_recipe("resnet50_cifar10_fast", ["training_args.use_cpu=true"])
    found = {use.name: use for use in find_uses(fast)}
    batch = "training_args.per_device_train_batch_size"
    micro = found["micro-batch"]
    assert (micro.on, micro.off) == ({batch: 256}, {batch: 64})
    assert found["evaluation batch"].detail == "512 instead of 128"
    assert found["checkpoints"].off == {"training_args.save_strategy": "epoch"}
    assert [use.name for use in found.values() if use.whole_runs_only] == [
        "cuDNN benchmark",
        "evaluation batch",
        "checkpoints",
    ]


def test_accumulation_of_a_fast_recipe_is_that_of_its_baselines_micro_batch() -> None:
    fast = load_recipe("vit_cifar100_fast", ["training_args.use_cpu=true"])
    larger, same = (
        turned_on(fast, f"accumulation, {kind}") for kind in ("larger batch", "same batch")
    )
    names = ("gradient_accumulation_steps", "per_device_train_batch_size")
    # 280 in one step, as the fast recipe has them, by the tuned one's way; and 70, split.
    assert [larger[name] for name in names] == [4, 70]
    assert [same[name] for name in names] == [2, 35]
    quick = turned_on(load_recipe("quickstart_fast"), "accumulation, larger batch")
    assert [quick[name] for name in names] == [2, 32]  # 64


@pytest.mark.parametrize(
    "override", ["training_args.per_device_train_batch_size=64", "baseline=mine", "baseline=null"]
)
def test_batch_that_is_not_larger_or_has_no_shipped_baseline_is_no_technique(override: str) -> None:
    fast = load_recipe("resnet50_cifar10_fast", ["training_args.use_cpu=true", override])
    assert all(use.name != "micro-batch" for use in find_uses(fast))
