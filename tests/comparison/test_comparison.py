"""The verdict on runs made up with known effects, and what is refused or stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfbench.comparison.comparison import Comparison, compare
from hfbench.comparison.differences import Difference
from hfbench.comparison.quantities import Row
from hfbench.comparison.repeats import select_repeats
from hfbench.comparison.verdict import TechniqueChange
from hfbench.errors import ComparisonError, ResultError
from hfbench.results.schema import Metrics, Result, Switch, digest_of
from tests.builders import make_recipe, make_result, make_split
from tests.made_up import change_right, draw_right, save_repeats

BF16 = {
    "recipe": {"baseline": "base", "training_args": {"bf16": True}},
    "switches": {"precision": Switch(requested="bf16", applied="bf16")},
}
NOISE = np.array([1.0, 1.01, 0.99, 1.005, 0.995])
OTHER_NOISE = np.array([0.99, 1.0, 1.01, 1.0, 0.99])


def rows(comparison: Comparison) -> dict[str, Row]:
    """Return the rows by name."""
    return {row.name: row for row in comparison.rows}


def make_up(
    root: Path, speedup: float, loss: float, pairs: int, **changes: Any
) -> tuple[list[Result], list[Result]]:
    """Write both sides: candidate `speedup` times as fast, `loss` (a share) less accurate."""
    generator = np.random.default_rng(0)
    right = draw_right(generator, pairs, 10_000, 0.9)
    other = change_right(generator, right, loss, churn=0.02)
    baseline = save_repeats(root, "base", 100 * NOISE[:pairs], right)
    seconds = 100 / speedup * OTHER_NOISE[:pairs]
    return baseline, save_repeats(root, "cand", seconds, other, **(BF16 | changes))


def change_predictions(run: Result, **arrays: np.ndarray) -> None:
    assert run.folder is not None
    path = run.folder / "predictions.npz"
    with np.load(path) as file:
        content = dict(file) | arrays
    np.savez(path, **content)


# Verdicts


@pytest.mark.parametrize(
    ("speedup", "loss", "pairs", "speed", "accuracy"),
    [
        (1.0, 0.0, 3, "no difference shown", "not worse"),
        (1.15, 0.0, 3, "faster", "not worse"),
        (1.15, 0.003, 5, "faster", "lower by less than the margin"),
        (1.15, 0.01, 3, "faster", "worse"),
        (1.15, 0.005, 3, "faster", "lower"),
        (0.8, -0.01, 3, "slower", "higher"),
        (1.15, 0.01, 1, "undecided", "undecided"),
    ],
)
def test_known_effects_get_the_right_verdict(
    speedup: float, loss: float, pairs: int, speed: str, accuracy: str, tmp_path: Path
) -> None:
    found = compare(*make_up(tmp_path, speedup, loss, pairs))
    assert found.speed == speed
    assert found.accuracy is not None
    assert found.accuracy.verdict == accuracy
    assert found.accuracy.points == pytest.approx(-100 * loss)
    row = rows(found)["execution time"]
    assert row.speedup == pytest.approx(speedup, rel=0.02)
    assert (row.low is None) == (pairs == 1)


def test_sentence_says_gain_cost_and_cause(tmp_path: Path) -> None:
    found = compare(*make_up(tmp_path, 2.0, 0.0, 5))
    row = rows(found)["execution time"]
    assert found.accuracy is not None
    assert found.sentence == (
        f"{row.speedup:.2f}× faster [{row.low:.2f}, {row.high:.2f}]; accuracy not worse than 0.5 "
        f"points: +0.00 [{found.accuracy.low:+.2f}, {found.accuracy.high:+.2f}]; the gain is mixed "
        f"precision"
    )


def test_one_pair_is_undecided_in_words(tmp_path: Path) -> None:
    sentence = compare(*make_up(tmp_path, 1.15, 0.0, 1)).sentence
    assert sentence.startswith(
        "speed undecided: 1.16× in the one pair there is; accuracy undecided"
    )


def test_speed_up_is_the_ratio_of_geometric_means_over_pairs(tmp_path: Path) -> None:
    right = draw_right(np.random.default_rng(0), 2, 100, 0.9)
    baseline = save_repeats(tmp_path, "base", [100.0, 400.0], right)
    candidate = save_repeats(tmp_path, "cand", [50.0, 100.0], right)
    row = rows(compare(baseline, candidate))["execution time"]
    assert (row.baseline, row.candidate) == (pytest.approx(200.0), pytest.approx(70.710678))
    assert row.speedup == pytest.approx(8**0.5)  # of 2 and 4
    # t(1) at 97.5 % is 12.7062; log2 of the ratios is 1 and 2: deviation 0.5 x sqrt 2, error 0.5.
    assert row.low == pytest.approx(2 ** (1.5 - 12.7062 * 0.5), rel=1e-4)
    assert rows(compare(baseline, candidate))["train time"].speedup == pytest.approx(8**0.5)


def test_margin_decides(tmp_path: Path) -> None:
    sides = make_up(tmp_path, 1.0, 0.01, 5)
    verdicts = [compare(*sides, margin_points=margin).accuracy for margin in (0.5, 2.0)]
    assert [item.verdict for item in verdicts if item] == ["worse", "lower by less than the margin"]


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf")])
def test_no_margin_and_no_price_are_refused_together(number: float) -> None:
    with pytest.raises(ComparisonError, match="2 problems") as caught:
        compare(make_result(), make_result(), margin_points=number, price_per_hour=number)
    assert f"margin: {number:g}, expected points above 0 and up to 100" in str(caught.value)
    assert f"price per hour: {number:g}, expected" in str(caught.value)


def test_same_seed_again_is_a_pair_for_speed_and_no_other_seed(tmp_path: Path) -> None:
    right = np.repeat(draw_right(np.random.default_rng(0), 1, 1000, 0.9), 3, axis=0)
    baseline = save_repeats(tmp_path, "base", [100, 101, 99], right, seeds=[42, 42, 42])
    candidate = save_repeats(tmp_path, "cand", [50, 50, 51], right, seeds=[42, 42, 42])
    found = compare(baseline, candidate)
    assert (found.pairs, found.seeds, found.speed) == (3, 1, "faster")
    assert found.accuracy is not None
    assert found.accuracy.verdict == "undecided"


def test_runs_are_paired_by_seed_and_others_are_named(tmp_path: Path) -> None:
    right = draw_right(np.random.default_rng(0), 3, 100, 0.9)
    baseline = save_repeats(tmp_path, "base", [100, 200, 300], right, seeds=[1, 2, 3])
    candidate = save_repeats(tmp_path, "cand", [150, 100, 50], right, seeds=[3, 2, 9])
    found = compare(baseline, candidate)
    assert [run.seed for run in found.baseline] == [run.seed for run in found.candidate] == [2, 3]
    assert rows(found)["execution time"].speedup == pytest.approx(2.0)
    assert any("(seed 1)" in note for note in found.notes)
    assert any("(seed 9)" in note for note in found.notes)


def test_copy_of_a_run_is_no_repeat(tmp_path: Path) -> None:
    baseline, candidate = make_up(tmp_path, 1.5, 0.0, 1)
    found = compare(baseline * 2, candidate * 3)
    assert (found.pairs, found.speed) == (1, "undecided")
    assert found.notes == [
        "base: 1 run left out, copies of others.",
        "cand: 2 runs left out, copies of others.",
    ]


def test_runs_against_themselves_are_named(tmp_path: Path) -> None:
    baseline, _ = make_up(tmp_path, 1.0, 0.0, 2)
    assert "2 of 2 pairs are of a run with itself." in compare(baseline, baseline).notes


@pytest.mark.parametrize("seeds", [([1, 2, 3], [7, 7, 7]), ([7, 7, 7], [1, 2, 3])])
def test_one_training_seed_on_either_side_decides_no_accuracy(
    seeds: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    right = np.ones((3, 5000), dtype=bool)
    sides = [
        save_repeats(tmp_path, name, [100, 101, 102], right, seeds=of_side)
        for name, of_side in zip(("base", "cand"), seeds, strict=True)
    ]
    found = compare(*sides)
    assert (found.pairs, found.seeds) == (3, 1)
    assert found.accuracy is not None
    assert found.accuracy.verdict == "undecided"


def test_no_rounded_end_contradicts_the_verdict(tmp_path: Path) -> None:
    right = np.ones((3, 100), dtype=bool)
    baseline = save_repeats(tmp_path, "base", [100.0, 100.1, 99.9], right)
    found = compare(baseline, save_repeats(tmp_path, "cand", [100.3, 100.5, 100.3], right))
    # Ratios 0.99701, 0.99602, 0.99601; t(2) is 4.303, the error of the mean log 0.000334.
    assert found.sentence.startswith("slower: 0.996× the speed [0.995, 0.998]")


def test_orders_of_magnitude_stay_numbers_that_can_be_read(tmp_path: Path) -> None:
    right = np.ones((2, 100), dtype=bool)
    baseline = save_repeats(tmp_path, "base", [100.0, 100.0], right)
    found = compare(baseline, save_repeats(tmp_path, "cand", [1e-200, 100.0], right))
    row = rows(found)["execution time"]
    assert row.low is not None
    assert row.high is not None
    assert 0 < row.low < row.high < float("inf")
    assert found.sentence.startswith("no difference in speed shown: 1e+101× [1e-304, 1e+304];")


# Accuracy, image by image


def test_discordant_images_and_classes_are_counted(tmp_path: Path) -> None:
    right = np.ones((1, 200), dtype=bool)
    right[0, [1, 11, 21]] = False  # of class 1
    other = np.ones((1, 200), dtype=bool)
    other[0, [2, 12, 22, 32, 42, 52, 62]] = False  # of class 2
    baseline = save_repeats(tmp_path, "base", [100], right)
    found = compare(baseline, save_repeats(tmp_path, "cand", [100], other)).accuracy
    assert found is not None
    (pair,) = found.mcnemar
    assert (pair.only_baseline, pair.only_candidate) == (7, 3)
    assert pair.p == pytest.approx(2 * (1 + 10 + 45 + 120) / 1024)
    first, second = found.classes[:2]
    assert (first.name, first.images, first.points) == ("class 2", 20, pytest.approx(-35.0))
    assert (second.name, second.points) == ("class 1", pytest.approx(15.0))
    assert found.points == pytest.approx(-2.0)


def test_two_models_that_agree_on_few_images_are_not_sure_to_agree(tmp_path: Path) -> None:
    right = draw_right(np.random.default_rng(0), 1, 20, 0.9)
    baseline = save_repeats(tmp_path, "base", [100], right)
    found = compare(baseline, save_repeats(tmp_path, "cand", [100], right)).accuracy
    assert found is not None
    assert found.low is not None
    assert found.low < -1


def test_f1_and_calibration_follow_from_the_predictions(tmp_path: Path) -> None:
    right = np.ones((1, 100), dtype=bool)
    other = right.copy()
    other[0, :10] = False  # one of each class, taken for the next class
    baseline = save_repeats(tmp_path, "base", [100], right)
    found = rows(compare(baseline, save_repeats(tmp_path, "cand", [100], other)))
    # Each class: 9 hits, 10 true, 10 predicted.
    assert found["test F1 macro"].candidate == pytest.approx(0.9)
    assert found["test F1 macro"].points == pytest.approx(-10.0)
    # Confidence is 0.72 everywhere; accuracy 1 against 0.9.
    assert found["test calibration error"].baseline == pytest.approx(0.28, abs=1e-6)
    assert found["test calibration error"].candidate == pytest.approx(0.18, abs=1e-6)


def test_without_predictions_there_is_no_interval_and_it_is_said(tmp_path: Path) -> None:
    baseline, candidate = make_up(tmp_path, 1.5, 0.0, 2)
    assert candidate[1].folder is not None
    (candidate[1].folder / "predictions.npz").unlink()
    found = compare(baseline, candidate)
    assert found.accuracy is not None
    assert (found.accuracy.low, found.accuracy.verdict) == (None, "undecided")
    assert any(candidate[1].run_id in note for note in found.notes)


def test_damaged_predictions_are_a_clear_error(tmp_path: Path) -> None:
    baseline, candidate = make_up(tmp_path, 1.5, 0.0, 1)
    assert candidate[0].folder is not None
    (candidate[0].folder / "predictions.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ResultError, match=r"predictions\.npz"):
        compare(baseline, candidate)


def test_training_that_diverged_is_said_and_judged_by_no_interval(tmp_path: Path) -> None:
    baseline, candidate = make_up(tmp_path, 1.5, 0.0, 2)
    change_predictions(candidate[0], probability=np.full((10_000, 10), np.nan, np.float32))
    found = compare(baseline, candidate)
    assert rows(found)["test calibration error"].points is None
    assert_unjudged(found, candidate[0], "its probabilities for test images are no numbers")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"train_loss": None}}, "its training loss became infinite or no number"),
        ({"metrics": {"loss": None}}, "the model's outputs for test images are infinite"),
    ],
)
def test_loss_that_is_no_number_is_a_divergence(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    baseline, candidate = make_up(tmp_path, 1.5, 0.0, 2)
    run = candidate[1]
    assert run.metrics.test is not None
    test = run.metrics.test.model_copy(update=changes.get("metrics", {}))
    changed = run.model_copy(
        update={
            "metrics": run.metrics.model_copy(update={"test": test}),
            "training": run.training.model_copy(update=changes.get("training", {})),
        }
    )
    changed._folder = run.folder
    assert_unjudged(compare(baseline, [candidate[0], changed]), run, said)


def test_model_that_says_one_class_of_everything_has_diverged(tmp_path: Path) -> None:
    right = np.arange(200)[None] % 10 == 3
    other = draw_right(np.random.default_rng(0), 1, 200, 0.8)
    baseline = save_repeats(tmp_path, "base", [100], other)
    candidate = save_repeats(tmp_path, "one", [50], right)
    change_predictions(candidate[0], prediction=np.full(200, 3))
    said = "it says class 3 of all 200 test images"
    assert_unjudged(compare(baseline, candidate), candidate[0], said)


def assert_unjudged(found: Comparison, run: Result, said: str) -> None:
    """Assert that a comparison names a training that diverged, and has no interval."""
    name = f"{run.recipe.name}/{run.run_id}"
    assert f"since the training of {name} diverged" in found.sentence
    assert any(note.startswith(f"{name}: {said}") for note in found.notes)
    assert all(row.low is None and row.high is None for row in found.rows)
    assert found.accuracy is not None
    assert (found.speed, found.accuracy.verdict) == ("undecided", "undecided")
    assert "[" not in found.sentence


def test_result_and_predictions_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    baseline, candidate = make_up(tmp_path, 1.5, 0.0, 1)
    changed = candidate[0].model_copy(update={"metrics": Metrics(test=make_split(0.5), train=None)})
    changed._folder = candidate[0].folder
    with pytest.raises(ResultError, match=rf"{changed.run_id}.predictions\.npz and result\.json"):
        compare(baseline, changed)


def test_predictions_of_another_run_are_refused_by_name(tmp_path: Path) -> None:
    baseline, candidate = make_up(tmp_path, 1.5, 0.0, 2)
    files = [run.folder / "predictions.npz" for run in candidate if run.folder]
    sealed = [
        run.model_copy(update={"predictions_sha256": digest_of(file)})
        for run, file in zip(candidate, files, strict=True)
    ]
    for run, original in zip(sealed, candidate, strict=True):
        run._folder = original.folder
    assert compare(baseline, sealed).accuracy is not None
    content = [file.read_bytes() for file in files]
    for file, other in zip(files, content[::-1], strict=True):
        file.write_bytes(other)
    with pytest.raises(ResultError, match=r"is not the file that this run wrote"):
        compare(baseline, sealed)


def test_noise_has_no_accuracy() -> None:
    one = make_result(metrics=Metrics(test=None, train=None))
    found = compare(one, one)
    assert found.accuracy is None
    assert "labels mean nothing" in found.sentence


# Other quantities


def test_one_pair_has_gains_without_intervals() -> None:
    faster = make_result(
        times={"execution_seconds": 50.0, "train_seconds": 32.0, "first_step_seconds": 8.0},
        throughput={"samples_per_second": 125.0},
        memory={"peak_process_memory_mib": 1250.0},
        metrics=Metrics(test=make_split(0.785), train=make_split(0.95)),
    )
    found = rows(compare(make_result(), faster))
    assert found["execution time"] == Row("execution time", "s", 100.0, 50.0, 2.0, None)
    assert found["train time"].speedup == 2.5  # 80 s against 32 s
    assert found["first step"].speedup == 0.25  # 2 s against 8 s: slower
    assert found["steady-state training"].speedup == 2.5
    assert found["peak process memory"].speedup == 0.8  # 1000 MiB against 1250: more
    assert found["test accuracy"].points == pytest.approx(-1.5)
    assert found["train accuracy"].points == pytest.approx(5.0)
    assert found["train accuracy"].speedup is None


def test_what_was_not_measured_has_no_gain() -> None:
    other = make_result(
        times={"data_wait_seconds": 0.0},
        throughput={"samples_per_second": None},
        memory={"peak_device_memory_mib": 3000.0},
    )
    found = rows(compare(make_result(), other))
    for name in ("data wait", "steady-state training", "peak device memory", "device energy"):
        assert found[name].speedup is None


def test_cost_follows_from_the_price_of_an_hour() -> None:
    found = rows(compare(make_result(), make_result(), price_per_hour=3.6))
    assert found["cost"].baseline == pytest.approx(0.1)  # 100 s
    assert "cost" not in rows(compare(make_result(), make_result()))


# What differs


def test_equal_runs_differ_in_nothing() -> None:
    found = compare(make_result(), make_result(run_id="later"))
    assert found.settings == found.circumstances == found.beyond == found.techniques == []


def test_every_setting_that_differs_is_listed() -> None:
    tuned = make_recipe(
        name="tiny_tuned",
        description="another",
        variant="tuned",
        baseline="tiny",
        training_args={"bf16": True, "per_device_train_batch_size": 4},
        preprocessing={"location": "device"},
        reference={"accuracy": 0.9, "source": "somebody"},
    )
    found = compare(make_result(), make_result(recipe=tuned))
    assert found.settings == [
        Difference("preprocessing.location", "host", "device"),
        Difference("training_args.per_device_train_batch_size", 8, 4),
        Difference("training_args.bf16", None, True),
    ]
    assert found.techniques == [
        TechniqueChange("mixed precision", False),  # the results say fp32 for both
        TechniqueChange("device preprocessing", True),
        TechniqueChange("micro-batch", True),
    ]
    assert found.beyond == []


def test_writing_out_a_default_is_no_difference() -> None:
    spelt = make_recipe(
        training_args={"bf16": False, "accelerator_config": {"non_blocking": False}}
    )
    assert compare(make_result(), make_result(recipe=spelt)).settings == []
    changed = make_recipe(training_args={"accelerator_config": {"non_blocking": True}})
    name = "training_args.accelerator_config.non_blocking"
    found = compare(make_result(recipe=changed), make_result())
    assert found.settings == [Difference(name, True, None)]


def test_effective_batch_and_optimizer_steps_come_first(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "recipe": {"training_args": {"bf16": True, "num_train_epochs": 1}},
        "training": {"optimizer_steps": 6, "effective_batch_size": 16},
    }
    found = compare(*make_up(tmp_path, 2.0, 0.0, 3, **changes))
    assert [item.name for item in found.beyond] == [
        "effective_batch_size",
        "optimizer_steps",
        "training_args.num_train_epochs",
    ]
    assert found.sentence.endswith(
        "the gain is not mixed precision alone: the effective batch (16 instead of 8), the number "
        "of optimizer steps (6 instead of 12) and training_args.num_train_epochs (1 instead of 2) "
        "differ too"
    )


def test_technique_that_was_not_applied_explains_nothing(tmp_path: Path) -> None:
    idle = {"switches": {"precision": Switch(requested="bf16", applied="fp32", reason="why")}}
    found = compare(*make_up(tmp_path, 2.0, 0.0, 3, **idle))
    assert found.techniques == [TechniqueChange("mixed precision", False)]
    assert found.sentence.endswith("no technique that was applied explains the gain")


# Refusals


def test_every_reason_to_refuse_is_named() -> None:
    other = make_result(
        recipe=make_recipe(name="other", dataset={"name_or_path": "synthetic"}),
        data={"eval_fingerprint": "c" * 64, "eval_samples": 10, "train_fingerprint": "d" * 64},
        environment={"device_name": "GPU", "packages": {"torch": "2.16.0"}},
    )
    with pytest.raises(ComparisonError) as caught:
        compare(make_result(), other)
    said = str(caught.value)
    assert "tiny and other has 4 problems" in said
    assert "test images: 20 of digits against 10 of synthetic" in said
    assert "training images: 48 of digits against 48 of synthetic" in said
    assert "device_name: Some CPU against GPU" in said
    assert "packages.torch: 2.15.0 against 2.16.0" in said


def test_classes_in_another_order_are_refused() -> None:
    names = make_result().data.label_names
    other = make_result(data={"label_names": names[::-1]})
    said = f'class names: {len(names)} of {len(names)} differ, the first of them "{names[0]}"'
    with pytest.raises(ComparisonError, match=said):
        compare(make_result(), other)


def test_repeats_on_other_images_are_no_repeats(tmp_path: Path) -> None:
    right = draw_right(np.random.default_rng(0), 1, 100, 0.9)
    other = {"data": {"eval_fingerprint": "c" * 64}}
    old = save_repeats(tmp_path / "1", "a", [9], right, **other)
    new = save_repeats(tmp_path / "2", "a", [100], right)
    with pytest.raises(ComparisonError, match="no repeats of each other: other test images"):
        compare([*old, *new], new)
    chosen, notes = select_repeats([*old, *new])
    assert chosen == new
    assert notes == ["a: 1 run left out, other test images."]


def test_kernel_and_commit_are_stated_and_not_refused() -> None:
    other = make_result(environment={"platform": "Linux 7 x86_64", "hfbench_commit": "abc"})
    found = [item.name for item in compare(make_result(), other).circumstances]
    assert found == ["platform", "hfbench_commit"]


def test_devices_that_no_run_used_are_stated_and_those_in_use_are_named() -> None:
    """`CUDA_VISIBLE_DEVICES` shows one GPU or eight: a run in one process uses one."""
    gpu = {"device_type": "cuda", "device_name": "Some GPU"}
    seen = [make_result(environment=gpu | {"device_count": count}) for count in (1, 8)]
    found = compare(*seen)
    assert [(item.name, item.baseline, item.candidate) for item in found.circumstances] == [
        ("device_count", 1, 8)
    ]
    assert found.beyond == []
    several = make_result(environment=seen[1].environment.model_dump(), training={"world_size": 8})
    assert "the number of processes (8 instead of 1)" in compare(seen[1], several).sentence


def test_other_images_in_the_predictions_are_refused(tmp_path: Path) -> None:
    baseline, candidate = make_up(tmp_path, 1.5, 0.0, 2)
    for run in candidate:
        assert run.folder is not None
        with np.load(run.folder / "predictions.npz") as file:
            moved = (file["prediction"] + 1) % 10
        change_predictions(run, label=np.arange(1, 10_001) % 10, prediction=moved)
    with pytest.raises(ComparisonError, match="base and cand has 2 problems") as caught:
        compare(baseline, candidate)
    for run in candidate:
        assert (
            f"cand/{run.run_id}: the test images in its predictions.npz are not those of base/"
            in str(caught.value)
        )


def test_runs_of_different_recipes_are_no_repeats(tmp_path: Path) -> None:
    right = draw_right(np.random.default_rng(0), 1, 100, 0.9)
    one = save_repeats(tmp_path, "base", [100], right)
    two = save_repeats(
        tmp_path / "b", "base", [100], right, recipe={"training_args": {"bf16": True}}
    )
    with pytest.raises(ComparisonError, match=r"no repeats of each other: other settings .*bf16"):
        compare(one + two, one)


def test_newest_run_decides_which_are_its_repeats(tmp_path: Path) -> None:
    right = draw_right(np.random.default_rng(0), 2, 100, 0.9)
    old_torch = {"packages": {"torch": "2.13.0"}}
    short = {"training_args": {"num_train_epochs": 1}}
    results = [
        *save_repeats(tmp_path / "1", "a", [9], right[:1], recipe=short),
        *save_repeats(tmp_path / "2", "a", [8], right[:1], environment=old_torch),
        *save_repeats(tmp_path / "3", "a", [100, 101], right),
    ]
    chosen, notes = select_repeats(results)
    assert [run.times.execution_seconds for run in chosen] == [100, 101]
    assert notes == [
        "a: 1 run left out, other settings (training_args.num_train_epochs).",
        "a: 1 run left out, another environment (packages.torch 2.13.0 instead of 2.15.0).",
    ]
