"""Accuracy, F1 and top-5 as `evaluate.Metric` classes over scikit-learn.

``evaluate.load("accuracy")`` asks the network even offline; these classes do the same arithmetic
without it, and without a folder: whether a run can be scored must not depend on caches. `import
evaluate` costs 6 s, so that this module is imported only when a run is about to start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score

from hfbench.results.calibration import calibration_error
from hfbench.results.schema import SplitMetrics
from hfbench.results.scores import Scores

TOP_K_FROM = 20  # with fewer classes the top five say little


class _InMemory(evaluate.Metric):  # type: ignore[misc]
    """A metric that keeps what it is given as it is.

    The library's own makes a folder in its cache even with ``keep_in_memory``, and a data set of
    the predictions, whose fingerprint pickles whatever modules lie outside of site-packages.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._batches: list[tuple[Any, Any]] = []

    def _build_data_dir(self) -> str:
        return ""

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Keep predictions and references of some images for `compute`."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        self._batches.append((np.asarray(predictions), np.asarray(references)))

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Keep prediction and reference of one image."""
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> Any:
        """Compute the metric of what is given, and of what was added before; then forget it."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        batches, self._batches = self._batches, []
        predictions, references = map(np.concatenate, zip(*batches, strict=True))
        return self._compute(predictions=predictions, references=references, **options)


class Accuracy(_InMemory):
    """Share of images whose class was predicted."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__, predictions=datasets.Value("int64"))

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(_InMemory):
    """Harmonic mean of precision and recall.

    Per class, their plain mean (macro), and their mean weighted by class size: over the classes
    that are present or predicted, as scikit-learn has it where it is told nothing else.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__, predictions=datasets.Value("int64"))

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
        classes = np.union1d(references, predictions)

        def score(average: str | None) -> Any:
            return f1_score(
                references, predictions, labels=classes, average=average, zero_division=0
            )

        return {
            "f1_macro": float(score("macro")),
            "f1_weighted": float(score("weighted")),
            "f1_per_class": dict(zip(classes.tolist(), map(float, score(None)), strict=True)),
        }


class TopK(_InMemory):
    """Share of images whose class is among the five most probable."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__, predictions=datasets.Sequence(datasets.Value("int64")))

    def _compute(
        self, predictions: Sequence[Sequence[int]], references: Sequence[int]
    ) -> dict[str, float]:
        hits = (np.asarray(predictions) == np.asarray(references)[:, None]).any(axis=1)
        return {"top5_accuracy": float(hits.mean())}


def score(scores: Scores, labels: np.ndarray, label_names: Sequence[str]) -> SplitMetrics:
    """Compute every metric of one split.

    Args:
        scores: Of N images.
        labels: int, (N,).
        label_names: Name of each class, C of them.

    Returns:
        Shares in [0, 1] and the mean cross entropy in nats.
    """
    predictions, probability = scores.prediction, scores.probability
    classes = len(label_names)
    found = Accuracy().compute(predictions=predictions, references=labels)
    found |= F1().compute(predictions=predictions, references=labels)
    if classes >= TOP_K_FROM:
        found |= TopK().compute(predictions=scores.top, references=labels)
    loss = -float(scores.log_probability.mean(dtype=np.float64))
    believable = bool(np.isfinite(probability).all())  # not a diverged model's
    return SplitMetrics(
        samples=len(labels),
        loss=loss if np.isfinite(loss) else None,
        accuracy=found["accuracy"],
        f1_macro=found["f1_macro"],
        f1_weighted=found["f1_weighted"],
        f1_per_class={label_names[n]: value for n, value in found["f1_per_class"].items()},
        top5_accuracy=found.get("top5_accuracy"),
        calibration_error=calibration_error(probability, predictions == labels)
        if believable
        else None,
    )


def _info(description: str | None, predictions: Any) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description or "",
        citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011",
        features=datasets.Features(
            {"predictions": predictions, "references": datasets.Value("int64")}
        ),
    )
