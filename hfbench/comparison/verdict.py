"""What a comparison allows to say: the verdicts, and one sentence made of clauses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hfbench.comparison.accuracy import ClassChange, Disagreement
from hfbench.comparison.intervals import Interval
from hfbench.results.formats import MOST_DIGITS, enough_digits, factor, join_words, signed

FASTER = "faster"
SLOWER = "slower"
EQUAL = "equal"
NO_DIFFERENCE = "no difference shown"
NOT_IN_TURN = "order not balanced: the sides were not run in turn"
UNDECIDED = "undecided"
HIGHER = "higher"
NOT_WORSE = "not worse"
LITTLE_LOWER = "lower by less than the margin"
LOWER = "lower"
WORSE = "worse"


@dataclass(frozen=True)
class AccuracyVerdict:
    """What tuning cost on the test images.

    Attributes:
        points: Accuracy of the candidate less that of the baseline, in percentage points.
        low: Lower end of its 95 % interval over images and seeds; with one seed over images alone.
        high: Upper end; ``None`` without predictions, or if a run cannot be judged.
        margin_points: The loss that would be put up with.
        verdict: ``higher``, ``not worse``, ``lower by less than the margin``, ``lower``, ``worse``
            or ``undecided``, from `judge_accuracy`.
        images: In the test set.
        seeds: Different seeds among the pairs.
        mcnemar: Exact test of each pair.
        classes: How each class changed, the largest change first.
        unjudged: Why there is no interval, a clause; ``None`` if there is one.
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
    unjudged: str | None = None


@dataclass(frozen=True)
class TechniqueChange:
    """A technique that the two recipes ask for differently, or that was applied in one alone.

    Attributes:
        name: Of the technique.
        applied: Whether it was seen to make a difference in what ran.
    """

    name: str
    applied: bool


def judge_speed(speedup: Interval) -> str:
    """Return ``faster`` or ``slower`` if the whole interval is on one side of 1.

    If nothing differs, each is said in 2.5 % of cases. Ends are judged as they can be shown, to
    five decimals: no clock tells more. ``equal`` if both are 1.
    """
    if speedup.low is None or speedup.high is None:
        return UNDECIDED
    low, high = (round(end, MOST_DIGITS) for end in (speedup.low, speedup.high))
    if low == high == 1:
        return EQUAL
    if low > 1:
        return FASTER
    return SLOWER if high < 1 else NO_DIFFERENCE


def judge_accuracy(points: Interval, margin_points: float, seeds: int) -> str:
    """Return what the interval shows: a gain, a loss, and whether that is more than the margin.

    The interval against 0 and -margin as in Piaggio et al., Reporting of noninferiority and
    equivalence randomized trials, JAMA 2012, doi:10.1001/jama.2012.87802, figure 1:

    - ``higher``: all of it is above 0.
    - ``not worse``: all of it is above -margin, and it holds 0.
    - ``lower by less than the margin``: all of it is between -margin and 0.
    - ``lower``: all of it is below 0, and it holds -margin: by how much is open.
    - ``worse``: all of it is below -margin.
    - ``undecided``: it holds both 0 and -margin; or there is one seed, which shows two models, not
      what the technique does to trainings.

    Ends are judged as they can be shown, to five decimals; one that is 0 or -margin holds it.
    """
    if points.low is None or points.high is None or seeds < 2:
        return UNDECIDED
    low, high = (round(end, MOST_DIGITS) for end in (points.low, points.high))
    if low > 0:
        return HIGHER
    if high < -margin_points:
        return WORSE
    if high < 0:
        return LITTLE_LOWER if low > -margin_points else LOWER
    return NOT_WORSE if low > -margin_points else UNDECIDED


def write_sentence(clauses: Iterable[str]) -> str:
    """Join the clauses of a verdict to one sentence; empty ones are left out."""
    return "; ".join(clause for clause in clauses if clause)


def say_speed(
    verdict: str, speedup: Interval | None, candidates: int = 1, unjudged: str | None = None
) -> str:
    """Write the clause about the execution time.

    Args:
        verdict: From `judge_speed`.
        speedup: ``None`` if it was not measured.
        candidates: That were judged together, if that is why nothing is shown.
        unjudged: Why there is no interval, if not for a lack of pairs, a clause.
    """
    if speedup is None:
        return "speed was not measured"
    if speedup.low is None or speedup.high is None:
        where = unjudged or "in the one pair there is"
        return f"speed {UNDECIDED}: {factor(speedup.value)}× {where}"
    digits = enough_digits((speedup.low, speedup.high), 1)
    value, low, high = (
        factor(number, digits) for number in (speedup.value, speedup.low, speedup.high)
    )
    if verdict == EQUAL:
        return "equal in speed: 1.00× [1.00, 1.00]"
    if verdict == FASTER:
        return f"{value}× faster [{low}, {high}]"
    if verdict == SLOWER:
        return f"slower: {value}× the speed [{low}, {high}]"
    among = f" among {candidates} candidates" if candidates > 1 else ""
    return f"no difference in speed shown{among}: {value}× [{low}, {high}]"


def say_accuracy(accuracy: AccuracyVerdict | None) -> str:
    """Write the clause about accuracy; ``None`` where labels mean nothing."""
    if accuracy is None:
        return "no accuracy (the labels mean nothing)"
    if accuracy.unjudged:
        return f"accuracy {UNDECIDED}: {signed(accuracy.points)} points, {accuracy.unjudged}"
    if accuracy.low is None or accuracy.high is None:
        return f"accuracy {UNDECIDED}: {signed(accuracy.points)} points, no predictions to judge by"
    margin = f"{accuracy.margin_points:g} points"
    borders = (0, accuracy.margin_points, -accuracy.margin_points)
    digits = enough_digits((accuracy.low, accuracy.high), *borders)
    value, low, high = (
        signed(number, digits) for number in (accuracy.points, accuracy.low, accuracy.high)
    )
    found = f"{value} [{low}, {high}]"
    if accuracy.verdict == UNDECIDED and accuracy.seeds < 2:
        return f"accuracy {UNDECIDED} from one seed: {found} points on these images"
    open_amount = f"whether by more than {margin} is open"
    if accuracy.verdict == HIGHER and accuracy.low < accuracy.margin_points < accuracy.high:
        return f"accuracy higher: {found}, {open_amount}"
    if accuracy.verdict == HIGHER:
        more = "more" if accuracy.low >= accuracy.margin_points else "less"
        return f"accuracy higher by {more} than {margin}: {found}"
    if accuracy.verdict == LOWER:
        return f"accuracy lower: {found}, {open_amount}"
    return {
        NOT_WORSE: f"accuracy not worse than {margin}: {found}",
        LITTLE_LOWER: f"accuracy lower by less than {margin}: {found}",
        WORSE: f"accuracy worse by more than {margin}: {found}",
        UNDECIDED: f"accuracy {UNDECIDED} at a margin of {margin}: {found}",
    }[accuracy.verdict]


def say_cause(speed: str, techniques: Sequence[TechniqueChange], others: Sequence[str]) -> str:
    """Write the clause about what differs: no technique is credited where something else does.

    Args:
        speed: From `judge_speed`.
        techniques: That differ.
        others: Whatever else differs that may change speed or accuracy, in words.
    """
    applied = [item.name for item in techniques if item.applied]
    named, rest = join_words(applied), join_words(others)
    differ = "differ" if others[1:] else "differs"
    change = {FASTER: "gain", SLOWER: "loss"}.get(speed)
    if change is None:
        if named and rest:
            return f"what differs is {named}, and besides {rest}"
        return f"what differs is {named or rest}" if named or rest else ""
    if not named:
        unexplained = f"no technique that was applied explains the {change}"
        return f"{unexplained}: {rest} {differ}" if rest else unexplained
    if rest:
        return f"the {change} is not {named} alone: {rest} {differ} too"
    together = " together" if applied[1:] else ""
    return f"the {change} is {named}{together}"
