"""An ablation measures what it plans, interleaved, and says what its windows allow."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hfbench.errors import DeviceError, Interrupted, RecipeError, ResultError
from hfbench.recipe.schema import Recipe, load_recipe
from hfbench.results.schema import Result, Switch, find_runs
from hfbench.results.windows import FirstLoss, Window
from hfbench.studies.ablation.analysis import describe_rows, say_findings, say_verdict
from hfbench.studies.ablation.gains import Gains, speeds_of
from hfbench.studies.ablation.measure import (
    Observer,
    ablate,
    choose_steps,
    steps_of,
    warmup_steps_of,
)
from hfbench.studies.ablation.plan import Configuration, Plan, full_recipes, plan_ablation
from hfbench.studies.ablation.schema import Ablation, Measured, load_ablation
from hfbench.studies.ablation.whole_runs import record_full_runs
from hfbench.studies.windows import with_arguments
from hfbench.training import trainer as training
from tests.builders import make_recipe, make_result, make_split, tiny_recipe

TUNED = {"bf16": True, "gradient_accumulation_steps": 2}


def names(recipe: Recipe) -> list[str]:
    """Return the configurations of a recipe."""
    return [item.name for item in plan_ablation(recipe).configurations]


def test_untuned_recipe_is_measured_with_the_basic_techniques_and_says_so() -> None:
    plan = plan_ablation(tiny_recipe())
    assert names(tiny_recipe()) == [
        "none",
        "mixed-precision",
        "accumulation-same-batch",
        "accumulation-larger-batch",
        "memory-format",
        "kept-memory",
        "all",
    ]
    assert plan.find("all").techniques == ("mixed precision", "accumulation, larger batch")
    assert plan.notes == [
        "tiny has none of the three basic techniques; here "
        '"all" is mixed precision, accumulation, larger batch.'
    ]
    (idle,) = plan.not_run
    assert idle.technique == "pinned memory"
    assert "nothing is copied" in idle.reason


def test_none_is_the_recipe_without_its_techniques_and_all_is_the_recipe() -> None:
    recipe = tiny_recipe(preprocessing={"location": "device"}, optim="adamw_torch_fused", **TUNED)
    plan = plan_ablation(recipe)
    none, everything = plan.find("none").recipe, plan.find("all").recipe
    assert none.preprocessing.location == "host"
    found = [none.training_args[name] for name in ("bf16", "gradient_accumulation_steps", "optim")]
    assert found == [False, 1, "adamw_torch"]
    for name in ("bf16", "gradient_accumulation_steps", "optim", "learning_rate"):
        assert everything.training_args[name] == recipe.training_args[name]
    assert everything.preprocessing.location == "device"
    assert plan.notes == []


def test_all_but_one_lacks_that_one_alone() -> None:
    plan = plan_ablation(tiny_recipe(preprocessing={"location": "device"}, **TUNED))
    assert set(plan.find("all").techniques) == {
        "mixed precision",
        "accumulation, larger batch",
        "device preprocessing",
    }
    for item in plan.attributions:
        assert plan.find(item.alone).techniques == (item.technique,)
        if item.technique in ("accumulation, same batch", "memory format", "kept memory"):
            # The first excludes the accumulation that enlarges the batch; the recipe lacks both
            # others.
            assert item.all_but is None
            continue
        assert item.all_but is not None
        left = set(plan.find(item.all_but).techniques)
        assert left == set(plan.find("all").techniques) - {item.technique}


def test_configurations_that_come_to_the_same_are_measured_once() -> None:
    plan = plan_ablation(tiny_recipe(**TUNED))
    assert plan.find("mixed-precision").also == ("all but accumulation, larger batch",)
    assert len({item.recipe.digest() for item in plan.configurations}) == 7
    one = plan_ablation(tiny_recipe(bf16=True))
    assert one.find("mixed-precision").also == ("all",)
    assert one.find("none").also == ("all but mixed precision",)


def test_recipes_of_full_runs_are_valid_and_name_their_baseline() -> None:
    recipes = full_recipes(plan_ablation(tiny_recipe(**TUNED)))
    assert [recipe.name for recipe in recipes][:2] == ["tiny.none", "tiny.mixed-precision"]
    assert [recipe.baseline for recipe in recipes] == [None, *["tiny.none"] * 6]
    assert len({recipe.digest() for recipe in recipes}) == 7
    with pytest.raises(RecipeError, match="at most 96"):
        full_recipes(plan_ablation(make_recipe(name="x" * 90)))


def test_fast_recipe_is_taken_apart_into_what_it_has() -> None:
    plan = plan_ablation(load_recipe("resnet50_cifar10_fast", ["training_args.use_cpu=true"]))
    has = {
        "mixed precision",
        "micro-batch",
        "memory format",
        "kept memory",
        "device preprocessing",
        "optimizer implementation",
    }
    assert set(plan.find("all").techniques) == has
    assert {item.technique for item in plan.attributions if item.all_but} == has
    assert {item.technique for item in plan.not_run} == {
        "pinned memory",
        "cuDNN benchmark",
        "NaN filter",
        "evaluation batch",
        "checkpoints",
    }
    # Without any of it, it is the baseline, but for what only whole runs show or has no effect.
    none, baseline = plan.find("none").recipe, load_recipe("resnet50_cifar10_untuned")
    assert none.preprocessing == baseline.preprocessing
    assert none.model.memory_format == baseline.model.memory_format
    assert none.model.keep_freed_memory is baseline.model.keep_freed_memory is False
    assert plan.find("all-but-kept-memory").recipe.model.keep_freed_memory is False
    assert plan.find("all").recipe.model.keep_freed_memory is True
    for name in ("bf16", "optim", "per_device_train_batch_size", "gradient_accumulation_steps"):
        assert none.argument(name) == baseline.argument(name)


def test_what_acts_outside_of_steps_is_ablated_by_whole_runs() -> None:
    recipe = load_recipe("quickstart_fast")
    (idle,) = (i for i in plan_ablation(recipe).not_run if i.technique == "checkpoints")
    assert idle.reason == "short windows neither evaluate nor save; --full runs do"
    plan = plan_ablation(recipe, whole_runs=True)
    assert plan.find("checkpoints").recipe.argument("save_strategy") == "no"
    assert plan.find("all-but-checkpoints").recipe.argument("save_strategy") == "epoch"
    variants = {recipe.name: recipe.variant for recipe in full_recipes(plan)}
    assert variants.pop("quickstart_fast.none") == "untuned"
    assert set(variants.values()) == {"fast"}


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (0.001, 2000),  # 2 s
        (0.05, 40),
        (1.0, 10),  # at least ten
        (4.0, 5),  # at most 20 s
        (60.0, 3),  # but three
    ],
)
def test_windows_are_long_enough_and_not_too_long(seconds: float, steps: int) -> None:
    assert choose_steps(seconds) == steps


def test_windows_of_all_configurations_see_as_many_images() -> None:
    none = tiny_recipe()
    assert steps_of(none, none, 10) == 10
    assert steps_of(with_arguments(none, gradient_accumulation_steps=4), none, 10) == 3
    split = with_arguments(none, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    assert steps_of(split, none, 10) == 10
    assert warmup_steps_of(tiny_recipe(torch_compile_mode="default")) > warmup_steps_of(none) >= 2


def window(samples_per_second: float, **changes: Any) -> Window:
    """Return a window of 100 images."""
    values: dict[str, Any] = {
        "steps": 10,
        "warmup_steps": 2,
        "samples": 100,
        "seconds": 100 / samples_per_second,
        "data_wait_seconds": 10 / samples_per_second,
        "first_loss": 2.3,
        "peak_process_memory_mib": 1000.0,
        "peak_device_memory_mib": None,
        "phase_seconds": {},
        "switches": {"precision": Switch(requested="fp32", applied="fp32")},
    }
    return Window(**(values | changes))


def measure(*rounds: dict[str, float]) -> list[Measured]:
    """Return windows from images per second of each configuration, round by round."""
    return [
        Measured(configuration=name, round=number, position=position, window=window(speed))
        for number, speeds in enumerate(rounds, 1)
        for position, (name, speed) in enumerate(speeds.items(), 1)
    ]


# Two techniques of a factor 1.5 and 2; together 3.6 in round 1 and 3.6 in round 2, where the whole
# machine is half as fast. "All" is without the third, which gains 1.25 alone.
SPEEDS = {
    "none": 100.0,
    "mixed-precision": 150.0,
    "accumulation-larger-batch": 200.0,
    "kept-memory": 125.0,
    "all": 360.0,
}
DRIFT = {name: speed / 2 for name, speed in SPEEDS.items()}


def gains_of(*rounds: dict[str, float]) -> Gains:
    """Return what made-up speeds allow to say."""
    return Gains(plan_ablation(tiny_recipe(**TUNED)), speeds_of(measure(*rounds)))


def test_speed_up_is_a_ratio_within_the_round_so_that_drift_does_not_count() -> None:
    found = gains_of(SPEEDS, DRIFT).rows["all"]
    assert found is not None
    assert (found.value, found.rounds) == (pytest.approx(3.6), 2)
    assert found.low == pytest.approx(3.6)
    assert found.high == pytest.approx(3.6)


def test_interval_of_a_speed_up_is_students_on_the_logarithms() -> None:
    found = gains_of({"none": 100, "all": 100}, {"none": 100, "all": 400}).rows["all"]
    assert found is not None
    # Logarithms 0 and log 4: mean log 2, standard error log 2, t(0.975, 1) = 12.706.
    assert found.value == pytest.approx(2)
    assert found.low == pytest.approx(math.exp(math.log(2) * (1 - 12.7062)), rel=1e-4)
    assert found.verdict == "no difference shown"


def test_scatter_is_pooled_over_all_windows_and_p_values_are_adjusted() -> None:
    a = 0.03
    x = a * math.sqrt(12)
    first, second = (
        {
            "none": math.exp(a * sign),
            "mixed-precision": math.exp(x - a * sign),
            "accumulation-larger-batch": 1.0,
        }
        for sign in (1, -1)
    )
    found = gains_of(first, second).rows["mixed-precision"]
    assert found is not None
    assert found.value == pytest.approx(math.exp(x))
    # Residuals a, -a, 0 and their opposites: 4 a^2 with (2 - 1)(3 - 1) = 2 degrees of freedom, so
    # that a ratio of two over 2 rounds has the standard error a sqrt(2), and t is sqrt(6). With 2
    # degrees of freedom the two-sided p-value is 1 - sqrt(t^2 / (t^2 + 2)); it is the smaller of 2.
    assert found.p == pytest.approx(2 * (1 - math.sqrt(6 / 8)))
    assert found.low == pytest.approx(math.exp(x - 4.302653 * a * math.sqrt(2)), rel=1e-6)
    larger = gains_of(first, second).rows["accumulation-larger-batch"]
    assert larger is not None
    assert (larger.value, larger.p) == (pytest.approx(1), pytest.approx(1))


def test_configurations_that_scatter_differently_are_judged_by_their_own_scatter() -> None:
    a, x = 0.03, 0.06
    rounds = [
        {
            "none": 1.0,
            "mixed-precision": math.exp(x - a * sign),
            "accumulation-larger-batch": math.exp(a * sign),
            "all": 1.0,
        }
        for sign in (1, 0, -1)
    ]
    found = gains_of(*rounds).rows["mixed-precision"]
    assert found is not None
    # Two do not scatter at all. Alone: mean x, standard error a / sqrt(3), 2 degrees of freedom.
    half = 4.302653 * a / math.sqrt(3)
    assert found.low == pytest.approx(math.exp(x - half), rel=1e-6)
    assert found.high == pytest.approx(math.exp(x + half), rel=1e-6)


def test_one_of_many_is_not_called_faster_for_what_chance_does() -> None:
    noise = np.random.default_rng(3).normal(0, 0.02, (3, 4))
    names = ["none", "mixed-precision", "accumulation-larger-batch", "all"]
    noise[:, 1] += 0.09
    gains = gains_of(*({n: math.exp(v) for n, v in zip(names, row, strict=True)} for row in noise))
    found = gains.rows["mixed-precision"]
    assert found is not None
    assert found.low is not None
    assert found.low > 1  # by itself it would be said
    assert found.verdict == "no difference shown"


def test_rounds_that_lack_a_configuration_do_not_count() -> None:
    found = gains_of(SPEEDS, {"all": 50.0, "mixed-precision": 10.0}).rows["all"]
    assert found is not None
    assert (found.value, found.low, found.rounds) == (pytest.approx(3.6), None, 1)
    assert gains_of({"all": 1.0}).rows["all"] is None


def test_contribution_is_told_alone_with_the_others_and_by_their_ratio() -> None:
    precision, same, larger, _, kept = gains_of(SPEEDS, DRIFT).contributions()
    for item, alone, with_others in ((precision, 1.5, 1.8), (larger, 2.0, 2.4)):
        assert item.alone is not None
        assert item.with_others is not None
        assert item.interaction is not None
        assert item.alone.value == pytest.approx(alone)
        assert item.with_others.value == pytest.approx(with_others)  # 360 / 200, 360 / 150
        assert item.interaction.value == pytest.approx(1.2)
    assert (same.alone, same.with_others, same.interaction) == (None, None, None)
    assert kept.alone is not None
    assert kept.alone.value == pytest.approx(1.25)
    assert (kept.with_others, kept.interaction) == (None, None)


def say(plan: Plan, *rounds: dict[str, float], **checks: FirstLoss) -> tuple[str, list[str]]:
    """Return verdict and findings of made-up speeds."""
    windows = measure(*rounds)
    first_losses = {name.replace("_", "-"): check for name, check in checks.items()}
    gains = Gains(plan, speeds_of(windows))
    rows = describe_rows(plan, windows, gains, first_losses, {})
    contributions = gains.contributions()
    return say_verdict(rows, contributions), say_findings(rows, contributions)


def test_verdict_names_what_gains_most_and_which_techniques_interact() -> None:
    verdict, findings = say(plan_ablation(tiny_recipe(**TUNED)), SPEEDS, DRIFT)
    assert verdict == (
        "Accumulation, larger batch gains most: 2.00× [2.00, 2.00]; all together "
        "3.60× [3.60, 3.60]; first losses were not checked."
    )
    assert findings == [
        "Interacts: with the others, mixed precision gains 1.80× [1.80, 1.80] instead of "
        "1.50× [1.50, 1.50] alone."
    ]


def test_noise_is_no_gain() -> None:
    one = {"none": 100.0, "mixed-precision": 110.0, "accumulation-larger-batch": 95.0, "all": 101}
    two = {"none": 100.0, "mixed-precision": 95.0, "accumulation-larger-batch": 104.0, "all": 99}
    verdict, findings = say(plan_ablation(tiny_recipe(**TUNED)), one, two)
    assert verdict.startswith("No difference shown: no technique is faster than none;")
    assert findings == ["No interaction shown."]


def test_gain_of_all_alone_and_a_loss_are_said() -> None:
    one = {"none": 100.0, "mixed-precision": 104.0, "accumulation-larger-batch": 50.0, "all": 150}
    two = {"none": 100.0, "mixed-precision": 99.0, "accumulation-larger-batch": 50.1, "all": 151}
    verdict, findings = say(plan_ablation(tiny_recipe(**TUNED)), one, two)
    assert verdict.startswith("All together gain 1.50×")
    assert "no technique alone is shown to" in verdict
    assert findings[0].startswith("Slower: accumulation, larger batch alone runs at 0.50×")


def test_loss_without_a_gain_is_not_called_no_difference() -> None:
    speeds = {"none": 100.0, "mixed-precision": 50.0, "accumulation-larger-batch": 99.0, "all": 50}
    verdict, _ = say(plan_ablation(tiny_recipe(**TUNED)), speeds, speeds | {"all": 50.1})
    assert verdict.startswith("No gain shown: no technique is faster than none;")


def test_one_round_decides_nothing() -> None:
    verdict, findings = say(plan_ablation(tiny_recipe(**TUNED)), SPEEDS)
    assert verdict.startswith("Undecided from one round: accumulation, larger batch is the fastest")
    assert not any("Slower" in line or line.startswith("Interacts") for line in findings)


def test_row_puts_together_what_was_measured() -> None:
    plan = plan_ablation(tiny_recipe(**TUNED))
    windows = measure({"none": 100.0, "all": 100.0}, {"none": 400.0, "all": 400.0})
    asked = {"bf16": Switch(requested=True, applied=False, reason="none here")}
    windows[-1] = windows[-1].model_copy(
        update={"window": window(400.0, peak_process_memory_mib=2000.0, switches=asked)}
    )
    failures = {"mixed-precision": "out of memory: 1 GiB"}
    gains = Gains(plan, speeds_of(windows))
    rows = {row.name: row for row in describe_rows(plan, windows, gains, {}, failures)}
    row = rows["all"]
    assert (row.verdict, rows["none"].verdict) == ("no difference shown", "baseline")
    assert row.samples_per_second == pytest.approx(200)  # geometric mean of 100 and 400
    assert row.seconds_per_step == pytest.approx(0.05)  # of 0.1 and 0.025
    assert row.data_wait_share == pytest.approx(0.1)
    assert row.peak_process_memory_mib == 1500.0
    assert row.effective_batch_size == 16
    assert row.settings == {
        "training_args.bf16": True,
        "training_args.gradient_accumulation_steps": 2,
    }
    assert row.not_applied == ["bf16: True was asked for, False was seen (none here)"]
    failed = rows["mixed-precision"]
    assert (failed.verdict, failed.speedup, failed.failure) == (
        "failed",
        None,
        "out of memory: 1 GiB",
    )
    assert "Not measured: mixed precision: out of memory: 1 GiB" in say_findings(
        list(rows.values()), []
    )


class Notes(Observer):
    """Remembers the order of what was measured, and may stop."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.order: list[tuple[int, str]] = []
        self.plans: list[tuple[Plan, int, int, float]] = []

    def planned(self, plan: Plan, steps: int, rounds: int, seconds: float) -> None:
        """Remember the plan."""
        assert self.order == []
        self.plans.append((plan, steps, rounds, seconds))

    def measured(self, configuration: Configuration, round_number: int, window: Window) -> None:
        """Remember it, and press Ctrl-C."""
        self.order.append((round_number, configuration.name))
        if len(self.order) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ablation, Notes, Path]:
    """Return an ablation of a tiny recipe in two rounds, and where its folder is."""
    root = tmp_path_factory.mktemp("ablation")
    notes = Notes()
    dataset = {"max_train_samples": 7}
    recipe = tiny_recipe(dataset=dataset, **TUNED)
    found = ablate(recipe, root, steps=2, rounds=2, observer=notes)
    return found, notes, root


def test_each_round_measures_every_configuration_once_in_random_order(
    measured: tuple[Ablation, Notes, Path],
) -> None:
    found, notes, _ = measured
    names = sorted(row.name for row in found.rows)
    first, second = notes.order[: len(names)], notes.order[len(names) :]
    assert sorted(first) == [(1, name) for name in names]
    assert sorted(second) == [(2, name) for name in names]
    assert [(item.round, item.configuration) for item in found.windows] == notes.order
    ((_, steps, rounds, seconds),) = notes.plans
    assert (steps, rounds) == (2, 2)
    assert seconds > 0
    # Two steps of 8 images, or one of 16.
    assert {item.window.samples for item in found.windows} == {16}


def test_batches_that_are_never_full_in_a_run_are_said(
    measured: tuple[Ablation, Notes, Path],
) -> None:
    assert any("7 training images do not fill a batch of 8" in note for note in measured[0].notes)


def test_techniques_are_seen_to_be_applied(measured: tuple[Ablation, Notes, Path]) -> None:
    seen = {item.configuration: item.window.switches for item in measured[0].windows}
    assert [
        (seen[name]["precision"].applied, seen[name]["gradient_accumulation_steps"].applied)
        for name in ("none", "mixed-precision", "accumulation-larger-batch", "all")
    ] == [("fp32", 1), ("bf16", 1), ("fp32", 2), ("bf16", 2)]
    formats = {name: switches["memory_format"].applied for name, switches in seen.items()}
    assert [name for name in formats if formats[name] == "channels_last"] == ["memory-format"]
    settings = measured[0].row("memory-format").settings
    assert settings == {"model.memory_format": "channels_last"}
    kept = {name: switches["keep_freed_memory"].applied for name, switches in seen.items()}
    assert [name for name in kept if kept[name]] == ["kept-memory"]
    assert measured[0].row("kept-memory").settings == {"model.keep_freed_memory": True}


def test_right_losses_are_not_flagged(measured: tuple[Ablation, Notes, Path]) -> None:
    found = measured[0]
    assert found.flagged == []
    assert all(row.first_loss and row.first_loss.problem is None for row in found.rows)
    assert found.verdict.endswith("no first loss is changed.")


def test_files_hold_what_was_returned_and_are_no_run(
    measured: tuple[Ablation, Notes, Path],
) -> None:
    found, _, root = measured
    folder = found.folder
    assert folder is not None
    assert folder.parent == root / "ablations" / "tiny"
    assert {path.name for path in folder.iterdir()} == {
        "ablation.json",
        "ablation.csv",
        "ablation.png",
    }
    assert load_ablation(folder) == load_ablation(folder.parent) == found
    assert list(find_runs(root)) == []
    with (folder / "ablation.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["configuration"] for line in lines] == [row.name for row in found.rows]
    everything = found.row("all")
    assert everything.speedup is not None
    assert float(lines[-1]["speedup"]) == everything.speedup.value
    assert float(lines[-1]["peak_process_memory_mib"]) == everything.peak_process_memory_mib
    with Image.open(folder / "ablation.png") as picture:
        assert min(picture.size) > 300
    content = json.loads((folder / "ablation.json").read_text())
    assert content["schema_version"] == 1
    assert content["finished_rounds"] == 2
    assert content["recipe"]["name"] == "tiny"


def test_stopping_keeps_what_was_measured(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="Stopped after 1 of 9 rounds; what was measured is in"):
        ablate(tiny_recipe(**TUNED), tmp_path, steps=1, rounds=9, observer=Notes(stop_after=8))
    found = load_ablation(tmp_path / "ablations" / "tiny")
    assert (len(found.windows), found.rounds, found.finished_rounds) == (8, 9, 1)
    assert "Stopped after 1 of 9 rounds." in found.notes
    assert found.folder is not None
    assert (found.folder / "ablation.png").is_file()


def test_stopping_before_the_first_window_keeps_the_first_losses(tmp_path: Path) -> None:
    class Impatient(Observer):
        def checked(self, configuration: Configuration, first_loss: FirstLoss | None) -> None:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="Stopped after 0 of 5 rounds"):
        ablate(tiny_recipe(**TUNED), tmp_path, steps=1, observer=Impatient())
    found = load_ablation(tmp_path / "ablations" / "tiny")
    assert found.verdict == "Nothing was measured."
    assert found.row("none").first_loss is not None


def test_loss_that_grows_with_accumulation_is_flagged_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug of transformers issue 47688: micro-batch means are not divided by their number."""
    monkeypatch.setattr(
        training,
        "cross_entropy_loss",
        lambda smoothing: (
            lambda outputs, labels, num_items_in_batch=None: nn.functional.cross_entropy(
                outputs["logits"].float(), labels
            )
        ),
    )
    found = ablate(tiny_recipe(**TUNED), tmp_path, steps=1, rounds=1)
    accumulating = ["accumulation-same-batch", "accumulation-larger-batch", "all"]
    assert [row.name for row in found.flagged] == accumulating
    assert "3 of 7 configurations have a wrong first loss" in found.verdict
    flags = [line for line in found.findings if line.startswith("FLAGGED")]
    assert len(flags) == 3
    assert all("2 times too high" in line and "47688" in line for line in flags)
    assert found.folder is not None
    with (found.folder / "ablation.csv").open(newline="") as file:
        wrong = [
            line["configuration"] for line in csv.DictReader(file) if line["flagged"] == "True"
        ]
    assert wrong == accumulating


def test_configuration_that_does_not_fit_is_recorded_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.BenchTrainer.training_step

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.bf16:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB\nmore")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(training.BenchTrainer, "training_step", full)
    found = ablate(tiny_recipe(bf16=True), tmp_path, steps=1, rounds=1)
    row = found.row("mixed-precision")
    assert (row.verdict, row.failure) == ("failed", "out of memory: tried to allocate 9 GiB")
    assert found.finished_rounds == 1
    assert "Not measured: mixed precision: out of memory: tried to allocate 9 GiB" in found.findings
    assert found.row("accumulation-larger-batch").speedup is not None


def test_folder_that_is_a_file_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbench.studies.ablation.measure.Bench", None)
    (tmp_path / "runs").write_text("")
    with pytest.raises(DeviceError, match="runs is a file; name a folder"):
        ablate(tiny_recipe(), tmp_path / "runs")


def test_baseline_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(training.BenchTrainer, "training_step", full)
    with pytest.raises(DeviceError, match="per_device_train_batch_size=8"):
        ablate(tiny_recipe(bf16=True), tmp_path, steps=1, rounds=1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_ablation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="hfbench ablate RECIPE"):
        load_ablation(tmp_path)
    (tmp_path / "ablation.json").write_text('{"schema_version": 1}')
    with pytest.raises(ResultError, match="recipe: Field required"):
        load_ablation(tmp_path)
    (tmp_path / "ablation.json").write_text('{"schema_version": 2}')
    with pytest.raises(ResultError, match="has schema_version 2, expected 1"):
        load_ablation(tmp_path)
    (tmp_path / "ablation.json").write_text("{")
    with pytest.raises(ResultError, match="cannot be read"):
        load_ablation(tmp_path)


def full_runs(plan: Plan, seconds: dict[str, tuple[float, ...]]) -> dict[str, list[Result]]:
    """Return made-up runs of each configuration: one a seed, of these execution times."""
    recipes = dict(
        zip([item.name for item in plan.configurations], full_recipes(plan), strict=True)
    )
    found: dict[str, list[Result]] = {}
    for name, times in seconds.items():
        for seed, taken in enumerate(times):
            recipe = with_arguments(recipes[name], seed=seed)
            found.setdefault(name, []).append(
                make_result(
                    run_id=f"{name}-{seed}",
                    recipe=recipe,
                    recipe_sha256=recipe.digest(),
                    times={"execution_seconds": taken},
                    metrics={"test": make_split(0.80 if name == "none" else 0.81)},
                )
            )
    return found


def test_whole_runs_are_compared_by_execution_time_and_accuracy(tmp_path: Path) -> None:
    plan = plan_ablation(tiny_recipe(**TUNED))
    seconds = {
        "none": (100.0, 200.0),
        "mixed-precision": (50.0, 100.0),
        "accumulation-larger-batch": (100.0, 200.0),
        "kept-memory": (80.0, 160.0),
        "all": (25.0, 50.0),
    }
    failures = {"accumulation-same-batch": "a run failed; its output is in x.log"}
    runs = full_runs(plan, seconds)
    found = record_full_runs(plan, runs, tmp_path, repeats=2, seconds=9.0, failures=failures)
    assert (found.full, found.rounds, found.finished_rounds, found.steps) == (True, 2, 0, None)
    precision, _, larger, _, kept = found.contributions
    for item, alone, with_others in ((precision, 2.0, 4.0), (larger, 1.0, 2.0)):
        assert item.alone is not None
        assert item.with_others is not None
        assert item.alone.value == pytest.approx(alone)
        assert item.with_others.value == pytest.approx(with_others)
    assert kept.alone is not None
    assert kept.alone.value == pytest.approx(1.25)
    assert kept.with_others is None
    accuracy = found.row("all").accuracy
    assert accuracy is not None
    assert (accuracy.value, accuracy.points) == (pytest.approx(0.81), pytest.approx(1.0))
    none = found.row("none").accuracy
    assert none is not None
    assert (none.value, none.points) == (pytest.approx(0.8), None)
    assert found.row("accumulation-same-batch").failure == failures["accumulation-same-batch"]
    assert {(run.configuration, run.seed, run.run_id) for run in found.runs} >= {
        ("all", 1, "all-1")
    }
    assert found.folder is not None
    assert {path.name for path in found.folder.iterdir()} == {
        "ablation.json",
        "ablation.csv",
        "ablation.png",
    }


def test_whole_runs_without_a_baseline_say_nothing(tmp_path: Path) -> None:
    plan = plan_ablation(tiny_recipe(**TUNED))
    with pytest.raises(ResultError, match=r"No run of tiny.none is finished"):
        record_full_runs(plan, full_runs(plan, {"all": (1.0,)}), tmp_path, repeats=1, seconds=1.0)
