"""What a comparison allows to say: the verdicts, and one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hfbench.intervals import Interval
from hfbench.paired import ClassChange, Disagreement
from hfbench.quantities import enough_digits, factor, signed

FASTER = "faster"
SLOWER = "slower"
NO_DIFFERENCE = "no difference shown"
UNDECIDED = "undecided"
NOT_WORSE = "not worse"
WORSE = "worse"


@dataclass(frozen=True)
class AccuracyVerdict:
    """What tuning cost on the test images.

    Attributes:
        points: Accuracy of the candidate less that of the baseline, in percentage points.
        low: Lower end of its 95 % interval over images and seeds; with one seed over images alone.
        high: Upper end; ``None`` without predictions.
        margin_points: The loss that would be put up with.
        verdict: ``not worse``, ``worse`` or ``undecided``, each against the margin.
        images: In the test set.
        seeds: Different seeds among the pairs.
        mcnemar: Exact test of each pair.
        classes: How each class changed, the largest change first.
    """

    points: float
    low: float | None
    high: float | None
    margin_points: float
    verdict: str
    images: int
    seeds: int
    mcnemar: list[Disagreement]
    classes: list[ClassChange]


@dataclass(frozen=True)
class TechniqueChange:
    """A technique that only one of the two recipes asks for, or asks for in another way.

    Attributes:
        name: Of the technique.
        applied: Whether it was seen to make a difference in what ran.
    """

    name: str
    applied: bool


def judge_speed(speedup: Interval) -> str:
    """Return ``faster`` or ``slower`` if the whole interval is on one side of 1.

    If nothing differs, each is said in 2.5 % of cases.
    """
    if speedup.low is None or speedup.high is None:
        return UNDECIDED
    if speedup.low > 1:
        return FASTER
    return SLOWER if speedup.high < 1 else NO_DIFFERENCE


def judge_accuracy(points: Interval, margin_points: float, seeds: int) -> str:
    """Return whether the candidate is worse by more than the margin.

    The interval against the margin as in Piaggio et al., Reporting of noninferiority and
    equivalence randomized trials, JAMA 2012, doi:10.1001/jama.2012.87802, figure 1: ``not worse``
    if all of it is above -margin, ``worse`` if all is below. One seed shows two models, not what
    the technique does to trainings: ``undecided``.
    """
    if points.low is None or points.high is None or seeds < 2:
        return UNDECIDED
    if points.low > -margin_points:
        return NOT_WORSE
    return WORSE if points.high < -margin_points else UNDECIDED


def write_sentence(
    speed: str,
    speedup: Interval | None,
    accuracy: AccuracyVerdict | None,
    techniques: Sequence[TechniqueChange],
    others: Sequence[str],
) -> str:
    """Put the verdict into one sentence.

    Args:
        speed: From `judge_speed`.
        speedup: Of the execution time; ``None`` if it was not measured.
        accuracy: ``None`` where labels mean nothing.
        techniques: That differ.
        others: Settings beyond the techniques that differ and may explain a gain too.
    """
    parts = [_say_speed(speed, speedup), _say_accuracy(accuracy)]
    parts.append(_say_cause(speed, techniques, others))
    return "; ".join(part for part in parts if part)


def _say_speed(speed: str, speedup: Interval | None) -> str:
    if speedup is None:
        return "speed was not measured"
    if speedup.low is None or speedup.high is None:
        return f"speed {UNDECIDED}: {factor(speedup.value)}× in the one pair there is"
    digits = enough_digits((speedup.low, speedup.high), 1)
    value, low, high = (
        factor(number, digits) for number in (speedup.value, speedup.low, speedup.high)
    )
    if speed == FASTER:
        return f"{value}× faster [{low}, {high}]"
    if speed == SLOWER:
        return f"slower: {value}× the speed [{low}, {high}]"
    return f"no difference in speed shown: {value}× [{low}, {high}]"


def _say_accuracy(accuracy: AccuracyVerdict | None) -> str:
    if accuracy is None:
        return "no accuracy (the labels mean nothing)"
    margin = f"{accuracy.margin_points:g} points"
    if accuracy.low is None or accuracy.high is None:
        return f"accuracy {UNDECIDED}: {signed(accuracy.points)} points, no predictions to judge by"
    digits = enough_digits((accuracy.low, accuracy.high), -accuracy.margin_points)
    value, low, high = (
        signed(number, digits) for number in (accuracy.points, accuracy.low, accuracy.high)
    )
    found = f"{value} [{low}, {high}]"
    if accuracy.verdict == NOT_WORSE:
        return f"accuracy not worse than {margin}: {found}"
    if accuracy.verdict == WORSE:
        return f"accuracy worse by more than {margin}: {found}"
    if accuracy.seeds < 2:
        return f"accuracy {UNDECIDED} from one seed: {found} points on these images"
    return f"accuracy {UNDECIDED} at a margin of {margin}: {found}"


def _say_cause(speed: str, techniques: Sequence[TechniqueChange], others: Sequence[str]) -> str:
    applied = [item.name for item in techniques if item.applied]
    named = (
        " and ".join([", ".join(applied[:-1]), applied[-1]]) if applied[1:] else "".join(applied)
    )
    change = {FASTER: "gain", SLOWER: "loss"}.get(speed)
    if change is None:
        return f"what differs is {named}" if named else ""
    if others:
        return f"the {change} is not {named or 'tuning'} alone: {', '.join(others)} differ too"
    if not named:
        return f"no technique that was applied explains the {change}"
    together = " together" if applied[1:] else ""
    return f"the {change} is {named}{together}"
