"""Which causes a comparison's sentence names: no technique alone where something else differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfbench.comparison.comparison import Comparison, compare
from hfbench.errors import ComparisonError
from hfbench.results.schema import Switch
from tests.made_up import save_repeats

BF16 = {"training_args": {"bf16": True}}
RIGHT = np.ones((3, 100), dtype=bool)
RIGHT[:, ::10] = False


def against(root: Path, *, recipe: dict[str, Any] | None = None, **changes: Any) -> Comparison:
    """Compare a candidate in bfloat16, twice as fast, that differs in something else too."""
    arguments = BF16["training_args"] | (recipe or {}).get("training_args", {})
    content = (recipe or {}) | {"training_args": arguments}
    switches = {"precision": Switch(requested="bf16", applied="bf16")}
    switches |= changes.pop("switches", {})
    base = {"switches": changes.pop("base_switches", {})}
    base = {"switches": {"precision": Switch(requested="fp32", applied="fp32")} | base["switches"]}
    baseline = save_repeats(root, "base", [100, 101, 99], RIGHT, **base)
    return compare(
        baseline,
        save_repeats(
            root, "cand", [50, 51, 49], RIGHT, recipe=content, switches=switches, **changes
        ),
    )


def test_technique_alone_is_credited(tmp_path: Path) -> None:
    assert against(tmp_path).sentence.endswith("; the gain is mixed precision")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training": {"world_size": 2}}, "the number of processes (2 instead of 1)"),
        ({"training": {"effective_batch_size": 64}}, "the effective batch (64 instead of 8)"),
        ({"training": {"optimizer_steps": 6}}, "the number of optimizer steps (6 instead of 12)"),
        ({"training": {"epochs": 1.0}}, "the number of epochs (1.0 instead of 2.0)"),
        ({"training": {"sessions": 2}}, "the number of resumed runs (3 instead of 0)"),
        ({"model": {"initialization": "timm"}}, "the initial weights (timm instead of pretrained)"),
        ({"model": {"revision": "abc"}}, "the model's revision (abc instead of null)"),
        ({"model": {"parameters": 7}}, "the number of parameters (7 instead of 1000)"),
        ({"environment": {"hfbench_commit": "abc"}}, "hfbench's commit (abc instead of null)"),
        ({"environment": {"platform": "Linux 7 x86_64"}}, "the kernel (Linux 7 x86_64"),
        ({"seeds": [7, 8, 9]}, "the set of seeds (7, 8, 9 instead of 42, 43, 44)"),
        (
            {"recipe": {"model": {"name_or_path": "/home/me/other"}}},
            "model.name_or_path (other instead of test_resnet.r160_in1k)",
        ),
        ({"recipe": {"model": {"pretrained": True}}}, "model.pretrained (true instead of false)"),
        (
            {"recipe": {"preprocessing": {"image_size": 64}}},
            "preprocessing.image_size (64 instead of 32)",
        ),
        ({"recipe": {"preprocessing": {"augmentation": ["cutout"]}}}, "preprocessing.augmentation"),
        (
            {"recipe": {"training_args": {"learning_rate": 0.1}}},
            "training_args.learning_rate (0.1 instead of 0.001)",
        ),
        ({"recipe": {"training_args": {"eval_strategy": "epoch"}}}, "training_args.eval_strategy"),
        ({"recipe": {"training_args": {"max_steps": 6}}}, "training_args.max_steps"),
        ({"recipe": {"training_args": {"data_seed": 1}}}, "training_args.data_seed"),
        ({"recipe": {"training_args": {"optim": "sgd"}}}, "training_args.optim (sgd instead of"),
        ({"recipe": {"dataset": {"max_train_samples": 24}}}, "dataset.max_train_samples"),
    ],
)
def test_whatever_else_differs_is_named_in_the_sentence(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    sentence = against(tmp_path, **changes).sentence
    assert "the gain is not mixed precision alone: " in sentence
    assert named in sentence


def test_several_causes_are_listed_and_no_cause_is_credited(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "training": {"world_size": 2, "effective_batch_size": 16, "optimizer_steps": 6}
    }
    assert against(tmp_path, **changes).sentence.endswith(
        "; the gain is not mixed precision alone: the number of processes (2 instead of 1), the "
        "effective batch (16 instead of 8) and the number of optimizer steps (6 instead of 12) "
        "differ too"
    )


def test_fused_adamw_is_an_implementation(tmp_path: Path) -> None:
    sentence = against(tmp_path, recipe={"training_args": {"optim": "adamw_torch_fused"}}).sentence
    assert sentence.endswith("the gain is mixed precision and optimizer implementation together")


def test_where_the_model_is_pushed_is_no_cause(tmp_path: Path) -> None:
    recipe = {"training_args": {"hub_model_id": "me/it"}}
    assert against(tmp_path, recipe=recipe).sentence.endswith("; the gain is mixed precision")


def test_what_was_applied_without_a_setting_is_named(tmp_path: Path) -> None:
    found = against(
        tmp_path,
        base_switches={"tf32_matmul": Switch(requested=None, applied=False)},
        switches={"tf32_matmul": Switch(requested=None, applied=True)},
    )
    assert found.sentence.endswith("; the gain is mixed precision and TF32 together")


def test_another_mode_of_what_was_on_already_is_applied(tmp_path: Path) -> None:
    compiled = {"torch_compile": Switch(requested=True, applied=True)}
    found = against(
        tmp_path,
        recipe={"training_args": {"torch_compile_mode": "max-autotune"}},
        base_switches=compiled,
        switches=compiled,
    )
    assert found.sentence.endswith("; the gain is mixed precision and torch.compile together")


def test_without_a_gain_everything_that_differs_is_named(tmp_path: Path) -> None:
    baseline = save_repeats(tmp_path, "base", [100, 101, 99], RIGHT)
    steps = {"optimizer_steps": 6}
    found = compare(baseline, save_repeats(tmp_path, "cand", [100, 99, 101], RIGHT, training=steps))
    assert found.sentence.endswith(
        "; what differs is the number of optimizer steps (6 instead of 12)"
    )


def test_gain_of_no_technique_names_what_differs(tmp_path: Path) -> None:
    baseline = save_repeats(tmp_path, "base", [100, 101, 99], RIGHT)
    found = compare(
        baseline,
        save_repeats(tmp_path, "cand", [50, 51, 49], RIGHT, training={"world_size": 2}),
    )
    assert found.sentence.endswith(
        "; no technique that was applied explains the gain: the number of processes "
        "(2 instead of 1) differs"
    )


def test_run_in_which_something_else_was_applied_is_no_repeat(tmp_path: Path) -> None:
    switches = {"tf32_matmul": Switch(requested=None, applied=True)}
    runs = save_repeats(tmp_path / "1", "base", [100, 101], RIGHT[:2])
    odd = save_repeats(tmp_path / "2", "base", [90], RIGHT[:1], seeds=[9], switches=switches)
    plain = save_repeats(
        tmp_path / "3",
        "base",
        [91],
        RIGHT[:1],
        seeds=[10],
        switches={"tf32_matmul": Switch(requested=None, applied=False)},
    )
    assert compare(runs, runs).pairs == 2
    with pytest.raises(ComparisonError, match="no repeats of each other: it ran differently: tf32"):
        compare([*odd, *plain], runs)
