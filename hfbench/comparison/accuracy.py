"""Predictions of baseline and candidate on the same images: what tuning cost in accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from hfbench.comparison.intervals import LEVEL, Interval, mcnemar, seeds_and_images_interval
from hfbench.results.calibration import calibration_error
from hfbench.results.predictions import Predictions

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
        brier: Mean squared difference between the probability of the prediction and whether it is
            right; ``None``, as are the next two, if the probabilities of a run are no numbers.
        calibration_errors: Of both sides; without an interval, since an estimate of it is too high
            by chance, and a resampled one twice.
        accuracies: Of both sides, as shares, means over their runs; so are all pairs of numbers.
    """

    accuracy: Interval
    f1_macro: Interval
    brier: Interval | None
    briers: tuple[float, float] | None
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
    classes = len(label_names)
    sides = (baseline, candidate)
    right = np.stack([_by_seed([item.right for item in side], seeds) for side in sides])
    paired = share_a_lot(*right)
    once = np.ones((1, len(baseline[0].label)))

    def f1(item: Predictions, weights: np.ndarray) -> np.ndarray:
        return _f1_macro(item, weights, classes)

    scores: list[_Score] = [f1]
    if all(item.calibrated for item in (*baseline, *candidate)):
        scores.append(_brier)

    def means(score: Callable[[Predictions], float]) -> tuple[float, float]:
        before, after = (float(np.mean([score(p) for p in side])) for side in sides)
        return before, after

    accuracies = means(lambda item: float(item.right.mean()))
    f1_macros = means(lambda item: float(f1(item, once)[0]))
    briers = means(lambda item: float(_brier(item, once)[0])) if scores[1:] else None
    found = _resample(scores, baseline, candidate, seeds, paired)
    return Differences(
        accuracy=_in_points(within_reach(accuracy_interval(right, paired=paired), accuracies[0])),
        f1_macro=_in_points(within_reach(found[0], f1_macros[0])),
        brier=_in_points(within_reach(found[1], briers[0])) if briers else None,
        briers=briers,
        calibration_errors=means(lambda item: calibration_error(item.probability, item.right))
        if briers
        else None,
        accuracies=accuracies,
        f1_macros=f1_macros,
        disagreements=[
            _disagreement(seed, before, after)
            for seed, before, after in zip(seeds, baseline, candidate, strict=True)
        ],
        classes=_class_changes(baseline, candidate, seeds, label_names),
    )


def share_a_lot(baseline: np.ndarray, candidate: np.ndarray) -> bool:
    """Tell whether trainings of one seed have more in common than trainings of different seeds.

    If two models of one seed disagree on less than half as many images as models of different
    seeds, their seed decides most of what they do, as where a technique changes no arithmetic. The
    number of images on which they disagree says so much more surely than a few seeds' scatter, and
    does not depend on how large the difference is.

    Args:
        baseline: (S, N): right (1) or wrong (0).
        candidate: The same, seed by seed.
    """
    seeds = len(baseline)
    if seeds < 2:
        return True
    disagreement = np.abs(baseline[:, None] - candidate[None]).mean(axis=2)
    within = float(np.trace(disagreement)) / seeds
    across = float(disagreement.sum() - np.trace(disagreement)) / (seeds * (seeds - 1))
    return within < across / 2 or across == 0


def within_reach(found: Interval, baseline: float) -> Interval:
    """Cut an interval of a difference of shares at what is possible from the baseline's share."""
    low, high = (
        None if end is None else float(np.clip(end, -baseline, 1 - baseline))
        for end in (found.low, found.high)
    )
    return Interval(found.value, low, high)


def accuracy_interval(sides: np.ndarray, *, paired: bool = True, level: float = LEVEL) -> Interval:
    """Return the mean accuracy difference of S seeds on N images.

    The images are resampled (paired bootstrap) from the N that there are and two more, one that
    only the baseline and one that only the candidate gets right, after Bonett and Price
    (Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data, J. Educational and Behavioral Statistics 2012): without them, two models that agree on 20
    images would seem to agree on all. Averaged over S seeds, theirs is a difference of 1 / sqrt(S).

    Args:
        sides: (2, S, N): right (1) or wrong (0), of the baseline and of the candidate.
        paired: Whether trainings of one seed share what it does, as `share_a_lot` says.
        level: Of the interval.

    Returns:
        A difference of shares, in [-1, 1].
    """
    _, seeds, images = sides.shape
    none, all_ = np.zeros((seeds, 1)), np.full((seeds, 1), 1 / np.sqrt(seeds))
    extra = np.stack([np.hstack([none, all_]), np.hstack([all_, none])])
    # Images with the same outcomes are interchangeable: draw how many there are of each kind.
    outcomes = np.concatenate([sides, extra], axis=2).reshape(2 * seeds, images + 2)
    kinds, counts = np.unique(outcomes, axis=1, return_counts=True)
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(images + 2, counts / (images + 2), size=RESAMPLES)
    resampled = (drawn @ kinds.T / (images + 2)).reshape(RESAMPLES, 2, seeds).swapaxes(0, 1)
    found = seeds_and_images_interval(sides.mean(axis=2), resampled, paired=paired, level=level)
    low, high = (
        None if end is None else float(np.clip(end, -1, 1)) for end in (found.low, found.high)
    )
    return Interval(found.value, low, high)


def _by_seed(values: Sequence[np.ndarray], seeds: Sequence[int]) -> np.ndarray:
    """Average what belongs to the same seed: a repeat of it is no other training."""
    found = np.stack(list(values)).astype(np.float64)
    places = [
        [i for i, other in enumerate(seeds) if other == seed] for seed in dict.fromkeys(seeds)
    ]
    return np.stack([found[place].mean(axis=0) for place in places])


def _resample(
    scores: Sequence[_Score],
    baseline: Sequence[Predictions],
    candidate: Sequence[Predictions],
    seeds: Sequence[int],
    paired: bool,
) -> list[Interval]:
    """Return the intervals of scores, as shares."""
    images = len(baseline[0].label)
    generator = np.random.default_rng(0)
    whole = np.ones((1, images))
    drawn = [
        whole,
        *(
            generator.multinomial(images, np.full(images, 1 / images), size=_CHUNK)
            for _ in range(_RESAMPLES_OF_SCORES // _CHUNK)
        ),
    ]
    intervals = []
    for score in scores:
        found = np.stack(
            [
                _by_seed(
                    [np.concatenate([score(item, weights) for weights in drawn]) for item in side],
                    seeds,
                )
                for side in (baseline, candidate)
            ]
        )  # (2, S, 1 + R)
        resampled = found[:, :, 1:].swapaxes(1, 2)
        intervals.append(seeds_and_images_interval(found[:, :, 0], resampled, paired=paired))
    return intervals


def _f1_macro(item: Predictions, weights: np.ndarray, classes: int) -> np.ndarray:
    """Return macro F1 for each row of image weights, (R,): the mean of 2 TP / (true + predicted).

    Over the classes that are present or predicted, as scikit-learn takes it.
    """
    true = _sum_by(item.label, np.ones(len(item.label)), weights, classes)
    predicted = _sum_by(item.prediction, np.ones(len(item.label)), weights, classes)
    hits = _sum_by(item.label, item.right.astype(np.float64), weights, classes)
    either = true + predicted
    of_each = 2 * hits / np.where(either > 0, either, 1)
    score: np.ndarray = of_each.sum(axis=1) / np.maximum((either > 0).sum(axis=1), 1)
    return score


def _brier(item: Predictions, weights: np.ndarray) -> np.ndarray:
    """Return the Brier score of "the prediction is right" for each row of image weights, (R,).

    Brier, Verification of forecasts expressed in terms of probability, Monthly Weather Review 1950,
    doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2: a mean over images, so that its difference
    has an interval as accuracy has.
    """
    squared = (item.probability.astype(np.float64) - item.right) ** 2
    score: np.ndarray = weights @ squared / weights.sum(axis=1)
    return score


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
    before, after = (
        _by_seed([item.right for item in side], seeds) for side in (baseline, candidate)
    )
    present = np.unique(label)
    level = 1 - (1 - LEVEL) / len(present)
    changes = []
    for number in present:
        inside = label == number
        both = np.stack([side[:, inside].mean(axis=0, keepdims=True) for side in (before, after)])
        share = float(before[:, inside].mean())
        found = _in_points(within_reach(accuracy_interval(both, level=level), share))
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
