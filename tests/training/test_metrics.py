from __future__ import annotations

import math
import os
import pickle
import tempfile

import datasets
import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss, top_k_accuracy_score

from hfbench.results.schema import SplitMetrics
from hfbench.results.scores import Scores, pack
from hfbench.training.metrics import F1, Accuracy, TopK
from hfbench.training.metrics import score as score_of


def certain(predictions: list[int], classes: int) -> np.ndarray:
    """Return logits whose largest is the prediction's."""
    logits = np.zeros((len(predictions), classes), np.float32)
    logits[np.arange(len(predictions)), predictions] = 1
    return logits


def score(logits: np.ndarray, labels: np.ndarray, label_names: list[str]) -> SplitMetrics:
    """Score what is kept of logits, as an evaluation does."""
    packed = pack(torch.from_numpy(logits), torch.from_numpy(labels))
    return score_of(Scores.unpack(packed.numpy()), labels, label_names)


def names(classes: int) -> list[str]:
    return [f"class {n}" for n in range(classes)]


def test_scores_of_five_images_by_hand() -> None:
    labels, predictions = np.array([0, 0, 1, 1, 2]), [0, 1, 1, 1, 0]

    found = score(certain(predictions, 4), labels, ["a", "b", "c", "d"])
    assert found.samples == 5
    assert found.accuracy == pytest.approx(3 / 5)
    # a: 1 right, 1 too many, 1 missed: 2 / 4. b: 2 right, 1 too many: 4 / 5. c: none right.
    # d is neither present nor predicted, and counts nowhere.
    assert found.f1_per_class == pytest.approx({"a": 0.5, "b": 0.8, "c": 0.0})
    assert found.f1_macro == pytest.approx((0.5 + 0.8 + 0) / 3)
    assert found.f1_weighted == pytest.approx((2 * 0.5 + 2 * 0.8 + 1 * 0) / 5)
    assert found.top5_accuracy is None


def test_perfect_predictions_score_one() -> None:
    found = score(certain([0, 1, 2], 3), np.array([0, 1, 2]), names(3))

    assert (found.accuracy, found.f1_macro, found.f1_weighted) == (1, 1, 1)


def test_loss_is_the_mean_cross_entropy_in_nats() -> None:
    logits = np.log(np.array([[3, 1], [1, 1], [1, 7]], np.float32))

    found = score(logits, np.array([0, 1, 0]), names(2))
    assert found.loss == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 8)) / 3)


def test_calibration_error_is_that_of_the_softmax() -> None:
    # Sure at 3/4 and right, at 7/8 and wrong: each alone in its bin.
    logits = np.log(np.array([[3, 1], [1, 7]], np.float32))

    found = score(logits, np.array([0, 0]), names(2))
    assert found.calibration_error == pytest.approx((1 / 4 + 7 / 8) / 2)


def test_loss_does_not_overflow() -> None:
    logits = np.array([[1e4, 0], [1e4, 0]], np.float32)

    assert score(logits, np.array([0, 1]), names(2)).loss == pytest.approx(5000)


def test_top_5_counts_the_five_largest() -> None:
    logits = np.tile(np.arange(20, dtype=np.float32), (4, 1))  # the top five are 15 to 19

    found = score(logits, np.array([19, 15, 14, 0]), names(20))
    assert found.accuracy == pytest.approx(1 / 4)
    assert found.top5_accuracy == pytest.approx(2 / 4)


@pytest.mark.parametrize(("classes", "given_"), [(10, False), (19, False), (20, True), (100, True)])
def test_top_5_is_given_from_twenty_classes(classes: int, given_: bool) -> None:
    found = score(certain([0, 1], classes), np.array([0, 1]), names(classes))

    assert (found.top5_accuracy is not None) is given_


@given(
    seed=st.integers(0, 10**6),
    classes=st.sampled_from([2, 3, 10, 20, 30]),
    count=st.integers(1, 60),
)
@settings(deadline=None, max_examples=30)
def test_scores_are_those_of_scikit_learn(seed: int, classes: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, classes)).astype(np.float32)
    labels = generator.integers(0, classes, count)
    predictions, every = logits.argmax(1), range(classes)

    def f1(average: str | None) -> np.ndarray:
        return f1_score(labels, predictions, average=average, zero_division=0)

    found = score(logits, labels, names(classes))
    assert found.accuracy == pytest.approx(accuracy_score(labels, predictions))
    assert found.f1_macro == pytest.approx(f1("macro"))
    assert found.f1_weighted == pytest.approx(f1("weighted"))
    assert list(found.f1_per_class.values()) == pytest.approx(f1(None).tolist())
    shares = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    assert found.loss == pytest.approx(log_loss(labels, shares, labels=every))
    if classes >= 20:
        assert found.top5_accuracy == pytest.approx(
            top_k_accuracy_score(labels, logits, k=5, labels=every)
        )


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_logits_may_have_any_precision(kind: type[np.floating]) -> None:
    found = score(certain([0, 1, 1], 25).astype(kind), np.array([0, 1, 0]), names(25))

    assert found.accuracy == pytest.approx(2 / 3)
    assert found.top5_accuracy is not None


def test_labels_may_be_of_a_narrow_type() -> None:
    assert score(certain([0, 1], 3), np.array([0, 1], np.int32), names(3)).accuracy == 1


@pytest.mark.parametrize("classes", [3, 25])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_diverged_model_is_scored_without_a_loss(classes: int, value: float) -> None:
    logits = certain([0, 1, 2], classes)
    logits[1] = value

    found = score(logits, np.array([0, 1, 2]), names(classes))
    assert (found.loss, found.calibration_error) == (None, None)
    assert 2 / 3 <= found.accuracy <= 1
    assert (found.top5_accuracy is None) is (classes < 20)


def test_infinite_loss_of_one_image_is_no_number() -> None:
    logits = np.array([[-np.inf, 0], [1, 0]], np.float32)

    assert score(logits, np.array([0, 0]), names(2)).loss is None


@pytest.mark.parametrize("metric", [Accuracy, F1, TopK])
def test_metric_describes_itself(metric: type[evaluate.Metric]) -> None:
    info = metric()

    assert info.description
    assert "Scikit-learn" in info.citation


def test_metrics_combine_as_those_of_the_library() -> None:
    both = evaluate.combine([Accuracy(), Accuracy()])
    found = both.compute(predictions=[0, 1, 1], references=[0, 1, 0])

    assert set(found.values()) == {2 / 3}


def test_metrics_need_no_folder_and_no_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise pickle.PicklingError("a module outside of site-packages")

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/dev/null/metrics")
    monkeypatch.setattr("evaluate.module.config.HF_METRICS_CACHE", "/dev/null/metrics")
    monkeypatch.setattr(datasets.fingerprint.Hasher, "hash", fail)
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/temporary")

    found = score(certain([0, 1, 1], 25), np.array([0, 1, 0]), names(25))
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.top5_accuracy is not None


def test_batches_that_were_added_are_computed_together_and_forgotten() -> None:
    metric = Accuracy()
    metric.add(prediction=1, reference=1)
    metric.add_batch(predictions=[0, 1], references=np.array([0, 0]))

    assert metric.compute() == {"accuracy": 2 / 3}
    assert metric.compute(predictions=[1], references=[1]) == {"accuracy": 1}
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        metric.compute(predictions=[1], references=[1, 0])


def test_metrics_need_no_network() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert Accuracy().compute(predictions=[0, 1], references=[0, 0]) == {"accuracy": 0.5}


def test_what_is_kept_of_logits_by_hand() -> None:
    logits = torch.tensor([[1.0, 3, 4], [2, 1, 1]]).log()

    found = Scores.unpack(pack(logits, torch.tensor([1, 0])).numpy())
    assert found.prediction.tolist() == [2, 0]
    assert found.probability == pytest.approx([0.5, 0.5])
    assert found.log_probability == pytest.approx([math.log(3 / 8), math.log(1 / 2)])
    assert found.top[0].tolist() == [2, 1, 0]
    assert found.top.shape == (2, 3)


def test_what_is_kept_does_not_grow_with_the_number_of_classes() -> None:
    labels = torch.tensor([0, 1])

    assert pack(torch.zeros(2, 100), labels).shape == pack(torch.zeros(2, 1000), labels).shape
