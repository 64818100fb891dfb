"""Predictions of baseline and candidate on the same images: what tuning cost in accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from hfbench.calibration import BINS, place_in_bins
from hfbench.intervals import LEVEL, Interval, mcnemar, seeds_and_images_interval
from hfbench.predicted import Predictions

RESAMPLES = 10_000  # of accuracy, where it is cheap
_RESAMPLES_OF_SCORES = 1_000
_CHUNK = 100  # resamples at a time: 10,000 images x 100 x 8 bytes
# A score in [0, 1] for each row of image weights, (R, N) -> (R,).
_Score = Callable[[Predictions, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Disagreement:
    """One pair of trainings by exact McNemar test.

    Attributes:
        seed: Of the pair of trainings.
        only_baseline: Images that only the baseline classifies rightly.
        only_candidate: Images that only the candidate does.
        p: Two-sided p-value of equally many errors.
    """

    seed: int
    only_baseline: int
    only_candidate: int
    p: float


@dataclass(frozen=True)
class ClassChange:
    """How the accuracy on the images of one class changed.

    Attributes:
        name: Of the class.
        images: Of it in the test set.
        baseline: Accuracy on them, mean over seeds.
        candidate: The same.
        points: Candidate less baseline in percentage points.
        low: Lower end of an interval that holds for all classes at once (Bonferroni), over the
            images of these models: seeds are too few for so sure a statement about trainings.
        high: Upper end.
    """

    name: str
    images: int
    baseline: float
    candidate: float
    points: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Differences:
    """Candidate less baseline in percentage points, with 95 % intervals over images and seeds.

    Attributes:
        calibration_error: ``None``, as is the next, if the probabilities of a run are no numbers.
        accuracies: Of both sides, as shares, means over their runs; so are the other two.
    """

    accuracy: Interval
    f1_macro: Interval
    calibration_error: Interval | None
    calibration_errors: tuple[float, float] | None
    accuracies: tuple[float, float]
    f1_macros: tuple[float, float]
    disagreements: list[Disagreement]
    classes: list[ClassChange]


def differences(
    baseline: Sequence[Predictions],
    candidate: Sequence[Predictions],
    seeds: Sequence[int],
    label_names: Sequence[str],
) -> Differences:
    """Set pairs of trainings against each other, image by image.

    Args:
        baseline: One of each seed.
        candidate: Same seeds, same images, in the same order.
        seeds: Of the trainings; a seed that stands twice is one seed: its pairs are averaged.
        label_names: Name of each class.
    """
    right = np.stack(
        [
            after.right.astype(np.float64) - before.right
            for before, after in zip(baseline, candidate, strict=True)
        ]
    )
    classes = len(label_names)
    per_seed = np.stack(_means_by_seed(right, seeds))
    once = np.ones((1, len(baseline[0].label)))

    def f1(item: Predictions, weights: np.ndarray) -> np.ndarray:
        return _f1_macro(item, weights, classes)

    scores: list[_Score] = [f1]
    if all(item.calibrated for item in (*baseline, *candidate)):
        scores.append(_calibration)
    intervals = [_in_points(item) for item in _resample(scores, baseline, candidate, seeds)]

    def means(score: Callable[[Predictions], float]) -> tuple[float, float]:
        before, after = (float(np.mean([score(p) for p in side])) for side in (baseline, candidate))
        return before, after

    return Differences(
        accuracy=_in_points(accuracy_interval(per_seed)),
        f1_macro=intervals[0],
        calibration_error=intervals[1] if intervals[1:] else None,
        calibration_errors=means(lambda item: float(_calibration(item, once)[0]))
        if intervals[1:]
        else None,
        accuracies=means(lambda item: float(item.right.mean())),
        f1_macros=means(lambda item: float(f1(item, once)[0])),
        disagreements=[
            _disagreement(seed, before, after)
            for seed, before, after in zip(seeds, baseline, candidate, strict=True)
        ],
        classes=_class_changes(baseline, candidate, seeds, label_names),
    )


def accuracy_interval(differences: np.ndarray, level: float = LEVEL) -> Interval:
    """Return the mean accuracy difference of S seeds on N images.

    The images are resampled (paired bootstrap) from the N that there are and two more, one that
    only the baseline and one that only the candidate gets right, after Bonett and Price
    (Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data, J. Educational and Behavioral Statistics 2012): without them, two models that agree on 20
    images would seem to agree on all. Averaged over S seeds, theirs is a difference of 1 / sqrt(S).

    Args:
        differences: (S, N): right (1) or wrong (0) of the candidate less that of the baseline.
        level: Of the interval.

    Returns:
        A difference of shares, in [-1, 1].
    """
    seeds, images = differences.shape
    extra = np.full((seeds, 1), 1 / np.sqrt(seeds))
    # Images with the same differences are interchangeable: draw how many there are of each kind.
    kinds, counts = np.unique(
        np.concatenate([differences, extra, -extra], axis=1), axis=1, return_counts=True
    )
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(images + 2, counts / (images + 2), size=RESAMPLES)
    resampled = drawn @ kinds.T / (images + 2)
    found = seeds_and_images_interval(differences.mean(axis=1), resampled, level)
    low, high = (
        None if end is None else float(np.clip(end, -1, 1)) for end in (found.low, found.high)
    )
    return Interval(found.value, low, high)


def _means_by_seed(values: np.ndarray, seeds: Sequence[int]) -> list[Any]:
    """Average what belongs to the same seed: a repeat of it is no other training."""
    return [
        values[[i for i, other in enumerate(seeds) if other == seed]].mean(axis=0)
        for seed in dict.fromkeys(seeds)
    ]


def _resample(
    scores: Sequence[_Score],
    baseline: Sequence[Predictions],
    candidate: Sequence[Predictions],
    seeds: Sequence[int],
) -> list[Interval]:
    """Return the intervals of scores, as shares."""
    images = len(baseline[0].label)
    generator = np.random.default_rng(0)
    chunks: list[list[np.ndarray]] = [[] for _ in scores]
    pairs = list(zip(baseline, candidate, strict=True))
    for _ in range(_RESAMPLES_OF_SCORES // _CHUNK):
        weights = generator.multinomial(images, np.full(images, 1 / images), size=_CHUNK)
        for found, score in zip(chunks, scores, strict=True):
            found.append(np.stack([score(b, weights) - score(a, weights) for a, b in pairs]))
    whole = np.ones((1, images))
    intervals = []
    for found, score in zip(chunks, scores, strict=True):
        exact = np.stack([score(b, whole) - score(a, whole) for a, b in pairs])[:, 0]
        resampled = np.stack(_means_by_seed(np.concatenate(found, axis=1), seeds), axis=1)
        by_seed = np.array(_means_by_seed(exact, seeds))
        intervals.append(seeds_and_images_interval(by_seed, resampled))
    return intervals


def _f1_macro(item: Predictions, weights: np.ndarray, classes: int) -> np.ndarray:
    """Return macro F1 for each row of image weights, (R,): 2 TP / (true + predicted), 0 if none."""
    true = _sum_by(item.label, np.ones(len(item.label)), weights, classes)
    predicted = _sum_by(item.prediction, np.ones(len(item.label)), weights, classes)
    hits = _sum_by(item.label, item.right.astype(np.float64), weights, classes)
    score: np.ndarray = (2 * hits / np.maximum(true + predicted, 1)).mean(axis=1)
    return score


def _calibration(item: Predictions, weights: np.ndarray) -> np.ndarray:
    """Return the expected calibration error for each row of image weights, (R,)."""
    confidence = item.probability.astype(np.float64)
    place = place_in_bins(confidence)
    gaps = np.abs(_sum_by(place, item.right - confidence, weights, BINS))
    error: np.ndarray = gaps.sum(axis=1) / weights.sum(axis=1)
    return error


def _sum_by(place: np.ndarray, values: np.ndarray, weights: np.ndarray, places: int) -> np.ndarray:
    """Sum weighted values of the images at each place: weights (R, N) -> (R, places)."""
    images = len(place)
    table = sparse.csr_array((values, (np.arange(images), place)), shape=(images, places))
    summed: np.ndarray = weights @ table
    return summed


def _disagreement(seed: int, before: Predictions, after: Predictions) -> Disagreement:
    only_before = int((before.right & ~after.right).sum())
    only_after = int((~before.right & after.right).sum())
    return Disagreement(seed, only_before, only_after, mcnemar(only_before, only_after))


def _class_changes(
    baseline: Sequence[Predictions],
    candidate: Sequence[Predictions],
    seeds: Sequence[int],
    label_names: Sequence[str],
) -> list[ClassChange]:
    """Return all classes in the test set, the one that changed most first."""
    label = baseline[0].label
    before = np.stack(_means_by_seed(np.stack([item.right for item in baseline]) * 1.0, seeds))
    after = np.stack(_means_by_seed(np.stack([item.right for item in candidate]) * 1.0, seeds))
    present = np.unique(label)
    level = 1 - (1 - LEVEL) / len(present)
    changes = []
    for number in present:
        inside = label == number
        change = (after[:, inside] - before[:, inside]).mean(axis=0, keepdims=True)
        found = _in_points(accuracy_interval(change, level))
        changes.append(
            ClassChange(
                name=label_names[number],
                images=int(inside.sum()),
                baseline=float(before[:, inside].mean()),
                candidate=float(after[:, inside].mean()),
                points=found.value,
                low=found.low,
                high=found.high,
            )
        )
    return sorted(changes, key=lambda change: -abs(change.points))


def _in_points(share: Interval) -> Interval:
    low, high = (None if end is None else 100 * end for end in (share.low, share.high))
    return Interval(100 * share.value, low, high)
