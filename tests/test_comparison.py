"""A run against its baseline, by hand."""

from __future__ import annotations

import pytest

from hfbench.comparison import Comparison, Difference, Row, compare
from hfbench.errors import ComparisonError
from hfbench.result import Metrics, Result, Switch
from tests.builders import make_recipe, make_result, make_split


def rows(comparison: Comparison) -> dict[str, Row]:
    """Return the rows by name."""
    return {row.name: row for row in comparison.rows}


@pytest.fixture
def faster() -> Result:
    """Return a run that took half the time, with other accuracy and memory."""
    return make_result(
        times={
            "execution_seconds": 50.0,
            "train_seconds": 32.0,
            "first_step_seconds": 8.0,
            "data_wait_seconds": 0.0,
        },
        throughput={"samples_per_second": 125.0},
        memory={"peak_process_memory_mib": 1250.0},
        metrics=Metrics(test=make_split(0.785), train=make_split(0.95)),
    )


def test_speed_ups_are_above_one_where_it_is_better(faster: Result) -> None:
    found = rows(compare(make_result(), faster))
    assert found["execution time"] == Row("execution time", "s", 100.0, 50.0, 2.0, None)
    assert found["train time"].speedup == 2.5  # 80 s against 32 s
    assert found["first step"].speedup == 0.25  # 2 s against 8 s: slower
    assert found["steady-state training"] == Row(
        "steady-state training", "images/s", 50.0, 125.0, 2.5, None
    )
    assert found["peak process memory"].speedup == 0.8  # 1000 MiB against 1250: more


def test_shares_differ_in_points(faster: Result) -> None:
    found = rows(compare(make_result(), faster))
    assert found["test accuracy"].points == pytest.approx(-1.5)
    assert found["test F1 macro"].points == pytest.approx(-1.5)
    assert found["train accuracy"].points == pytest.approx(5.0)
    assert found["train accuracy"].speedup is None
    assert (found["test accuracy"].baseline, found["test accuracy"].candidate) == (0.8, 0.785)


def test_what_was_not_measured_has_no_gain(faster: Result) -> None:
    found = rows(compare(make_result(), faster))
    assert found["data wait"] == Row("data wait", "s", 10.0, 0.0, None, None)
    assert found["peak device memory"] == Row("peak device memory", "MiB", None, None, None, None)
    short = make_result(
        throughput={"samples_per_second": None}, metrics=Metrics(test=None, train=None)
    )
    found = rows(compare(make_result(), short))
    assert found["steady-state training"].speedup is None
    assert found["test accuracy"] == Row("test accuracy", "share", 0.8, None, None, None)


def test_device_memory_is_compared_where_both_have_it() -> None:
    one = make_result(memory={"peak_device_memory_mib": 3000.0})
    two = make_result(memory={"peak_device_memory_mib": 1500.0})
    assert rows(compare(one, two))["peak device memory"].speedup == 2.0


def test_equal_runs_differ_in_nothing() -> None:
    comparison = compare(make_result(), make_result(run_id="later"))
    assert comparison.settings == []
    assert comparison.circumstances == []
    assert {row.speedup for row in comparison.rows} == {1.0, None}
    assert {row.points for row in comparison.rows} == {0.0, None}


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
    comparison = compare(make_result(), make_result(recipe=tuned))
    assert comparison.settings == [
        Difference("preprocessing.location", "host", "device"),
        Difference("training_args.per_device_train_batch_size", 8, 4),
        Difference("training_args.bf16", None, True),
    ]


def test_setting_that_only_the_baseline_has_is_listed() -> None:
    baseline = make_recipe(training_args={"accelerator_config": {"non_blocking": True}})
    comparison = compare(make_result(recipe=baseline), make_result())
    name = "training_args.accelerator_config.non_blocking"
    assert comparison.settings == [Difference(name, True, None)]


def test_circumstances_that_differ_are_listed() -> None:
    other = make_result(
        environment={"device_name": "GPU", "packages": {"torch": "2.16.0"}},
        training={"optimizer_steps": 6, "effective_batch_size": 16},
        data={"train_samples": 40},
        switches={"precision": Switch(requested="bf16", applied="bf16")},
    )
    found = {item.name: item for item in compare(make_result(), other).circumstances}
    assert found == {
        "optimizer_steps": Difference("optimizer_steps", 12, 6),
        "effective_batch_size": Difference("effective_batch_size", 8, 16),
        "train_samples": Difference("train_samples", 48, 40),
        "precision (applied)": Difference("precision (applied)", "fp32", "bf16"),
        "device_name": Difference("device_name", "Some CPU", "GPU"),
        "packages.torch": Difference("packages.torch", "2.15.0", "2.16.0"),
    }


def test_different_eval_images_are_refused() -> None:
    other = make_result(
        data={"eval_fingerprint": "c" * 64, "eval_samples": 10},
        recipe=make_recipe(name="other", dataset={"name_or_path": "synthetic"}),
    )
    expected = (
        r"tiny and other were tested on different images "
        r"\(20 of digits against 10 of synthetic\); run both on the same ones"
    )
    with pytest.raises(ComparisonError, match=expected):
        compare(make_result(), other)
