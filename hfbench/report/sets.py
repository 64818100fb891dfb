"""Which runs belong together: repeats of one recipe, candidates with their baselines, machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfbench.comparison.comparison import (
    MARGIN_POINTS,
    Comparison,
    check_margin,
    compare,
    judge_together,
)
from hfbench.comparison.differences import flatten
from hfbench.comparison.repeats import select_repeats
from hfbench.errors import ComparisonError, ResultError
from hfbench.machine.environment import Environment, environment_differences
from hfbench.recipe.schema import Recipe
from hfbench.report.loading import load_runs, nothing_in
from hfbench.results.schema import Result


@dataclass(frozen=True)
class Summary:
    """A quantity over the repeats of a set.

    Attributes:
        mean: Arithmetic for shares, geometric for times and rates, as in `comparison`.
        low: Lowest of the repeats.
        high: Highest of the repeats.
        n: Repeats in which it was measured.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class RunSet:
    """Repeats of one recipe, with the same settings but for the seed, on the same machine.

    Attributes:
        label: Unique in a report: the recipe's name, numbered where there are several such sets.
        machine: Letter of the machine and versions.
        results: Oldest first.
    """

    label: str
    machine: str
    results: Sequence[Result]

    @property
    def newest(self) -> Result:
        """The last of its runs; settings are the same in all."""
        return self.results[-1]

    @property
    def recipe(self) -> Recipe:
        """The recipe, with the newest run's seed."""
        return self.newest.recipe

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.results)

    @property
    def model(self) -> str:
        """The model's name without owner or folder."""
        return last_part(self.recipe.model.name_or_path)

    @property
    def dataset(self) -> str:
        """The data set's name without owner or folder."""
        return last_part(self.recipe.dataset.name_or_path)

    def share(self, read: Callable[[Result], float | None]) -> Summary | None:
        """Return the arithmetic mean of what can be read; ``None`` if nothing was measured."""
        values = [value for value in map(read, self.results) if value is not None]
        if not values:
            return None
        return Summary(sum(values) / len(values), min(values), max(values), len(values))

    def amount(self, read: Callable[[Result], float | None]) -> Summary | None:
        """Return the geometric mean of what can be read; ``None`` if nothing was measured."""
        values = [value for value in map(read, self.results) if value is not None]
        if not values:
            return None
        low, high = min(values), max(values)
        if low == high or low <= 0:  # of equal values exactly this one, without rounding
            return Summary(low, low, high, len(values))
        mean = math.exp(sum(map(math.log, values)) / len(values))
        return Summary(mean, low, high, len(values))


@dataclass(frozen=True)
class Pair:
    """A candidate and the baseline that its recipe names.

    Attributes:
        baseline: ``None`` if it was not run.
        comparison: ``None`` if it was refused, or there is no baseline.
        refusal: Why there is no comparison.
    """

    candidate: RunSet
    baseline: RunSet | None
    comparison: Comparison | None
    refusal: str | None


@dataclass(frozen=True)
class Collection:
    """All finished runs of a folder, and what was left out.

    Attributes:
        sets: By data set and model, untuned first.
        pairs: One for each set whose recipe names a baseline.
        machines: Letter -> machine and versions.
        left_out: A sentence each.
        margin_points: The loss of accuracy, in percentage points, that is put up with.
    """

    sets: Sequence[RunSet]
    pairs: Sequence[Pair]
    machines: dict[str, Environment]
    left_out: Sequence[str]
    margin_points: float = MARGIN_POINTS


def collect_runs(folder: Path, margin_points: float = MARGIN_POINTS) -> Collection:
    """Load all finished runs of a folder and sort them into sets and pairs.

    Args:
        folder: Of ``<recipe name>/<run id>/``.
        margin_points: Passed to `compare`.

    Raises:
        ResultError: If the folder holds no finished run that can be read.
        ComparisonError: If the margin cannot be.
    """
    check_margin(margin_points)
    if not folder.is_dir():
        raise ResultError(f"{folder} is not a folder; give the one that holds the runs, as runs/.")
    by_recipe, left_out = load_runs(folder)
    if not by_recipe:
        raise ResultError(nothing_in(folder, left_out))
    machines: dict[str, Environment] = {}
    sets = []
    for _, results in sorted(by_recipe.items()):
        sets += _sets_of(results, machines)
    sets.sort(key=_place)
    pairs = _judged(list(_pairs(sets, margin_points)))
    return Collection(sets, pairs, machines, left_out, margin_points)


def _judged(pairs: Sequence[Pair]) -> list[Pair]:
    """Judge the speeds of all candidates of a report together."""
    found = iter(judge_together([pair.comparison for pair in pairs if pair.comparison]))
    return [replace(pair, comparison=next(found)) if pair.comparison else pair for pair in pairs]


def _place(found: RunSet) -> tuple[str, str, int, str]:
    """Return where a set stands: the same work together, the baseline first."""
    variant = ("untuned", "tuned", "fast").index(found.recipe.variant)
    return found.dataset, found.model, variant, found.label


def last_part(name: str) -> str:
    """Cut a model's or data set's name to what readers know it by; folders are not published."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def with_n(sets: Iterable[RunSet]) -> str:
    """Name sets with their number of runs, as every caption does."""
    return say_n([(found.label, found.n) for found in sets])


def say_n(counts: Sequence[tuple[str, int]]) -> str:
    """Name what was counted with its number, or all at once if there is one number for all."""
    if len(counts) > 1 and len({n for _, n in counts}) == 1:
        return f"n = {counts[0][1]} each"
    return ", ".join(f"{label} n = {n}" for label, n in counts)


def grouped(sets: Iterable[RunSet], key: Callable[[RunSet], Any]) -> dict[Any, list[RunSet]]:
    """Sort sets into groups of the same key, in order of first appearance."""
    groups: dict[Any, list[RunSet]] = {}
    for found in sets:
        groups.setdefault(key(found), []).append(found)
    return groups


def same_test(found: RunSet) -> tuple[str, str, str]:
    """Return what sets must share for their accuracies and times to be set side by side."""
    return found.dataset, found.newest.data.eval_fingerprint, found.machine


def same_work(found: RunSet) -> tuple[str, ...]:
    """Return what sets share that fine-tune one model for the same test on the same machine."""
    return (found.model, *same_test(found))


def _sets_of(results: Sequence[Result], machines: dict[str, Environment]) -> list[RunSet]:
    found: list[RunSet] = []
    rest = sorted(results, key=lambda result: result.run_id)
    while rest:
        chosen, _ = select_repeats(rest)
        number = f" #{len(found) + 1}" if found else ""
        label = chosen[-1].recipe.name + number
        found.append(RunSet(label, _letter(chosen[-1].environment, machines), chosen))
        rest = [result for result in rest if not any(result is other for other in chosen)]
    return found


def _letter(environment: Environment, machines: dict[str, Environment]) -> str:
    """Return the letter of a machine and its versions, a new one if it was not seen before."""
    for letter, known in machines.items():
        if not environment_differences(known, environment):
            return letter
    number = len(machines)
    letter = f"{chr(ord('A') + number)}" if number < 26 else f"A{number}"
    machines[letter] = environment
    return letter


def _pairs(sets: Sequence[RunSet], margin_points: float) -> Iterable[Pair]:
    for candidate in sets:
        name = candidate.recipe.baseline
        if name is None:
            continue
        named = [found for found in sets if found.recipe.name == name]
        if not named:
            yield Pair(candidate, None, None, f"Its baseline {name} was not run.")
            continue
        baseline = min(named, key=lambda found: _distance(found, candidate))
        try:
            comparison = compare(baseline.results, candidate.results, margin_points=margin_points)
        except (ComparisonError, ResultError) as error:
            yield Pair(candidate, baseline, None, str(error))
        else:
            yield Pair(candidate, baseline, comparison, None)


def _distance(baseline: RunSet, candidate: RunSet) -> tuple[bool, int]:
    """Return how unlike two sets are: another machine counts most, then each other setting."""
    one, two = (dict(flatten(found.recipe.as_json())) for found in (baseline, candidate))
    differing = sum(one.get(key) != two.get(key) for key in one.keys() | two.keys())
    return baseline.machine != candidate.machine, differing
