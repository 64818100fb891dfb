"""Set one run against its baseline: what it gained, what it cost, and what else differs.

The module is not called `compare`, since it would hide the function of that name in the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hfbench.errors import ComparisonError
from hfbench.result import Result

# Names and texts, not settings.
_NOT_SETTINGS = ("$schema", "name", "description", "variant", "baseline", "reference")


@dataclass(frozen=True)
class Row:
    """One quantity of both runs.

    Attributes:
        name: What it is.
        unit: ``s``, ``images/s``, ``MiB``, or ``share`` in [0, 1].
        baseline: Its value, ``None`` if it was not measured.
        candidate: Its value, ``None`` if it was not measured.
        speedup: How many times better in time, throughput or memory, above 1 is better; ``None``
            for shares.
        points: Candidate less baseline in percentage points; ``None`` for everything but shares.
    """

    name: str
    unit: str
    baseline: float | None
    candidate: float | None
    speedup: float | None
    points: float | None


@dataclass(frozen=True)
class Difference:
    """One setting in which two runs differ."""

    name: str
    baseline: Any
    candidate: Any


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side; one pair, so no interval and no verdict."""

    baseline: Result
    candidate: Result
    rows: list[Row]
    settings: list[Difference]
    circumstances: list[Difference]


def compare(baseline: Result, candidate: Result) -> Comparison:
    """Set a candidate's run against its baseline's.

    Args:
        baseline: Result of the run without tuning.
        candidate: Result of the run with it.

    Returns:
        Times, throughput, memory, accuracy and F1 side by side; `settings` of the recipes that
        differ, and `circumstances` (hardware, versions, number of images, what was seen to be
        applied) that differ.

    Raises:
        ComparisonError: If they were not tested on the same images: accuracy and evaluation time
            would not compare.
    """
    if baseline.data.eval_fingerprint != candidate.data.eval_fingerprint:
        raise ComparisonError(
            f"{baseline.recipe.name} and {candidate.recipe.name} were tested on different images "
            f"({baseline.data.eval_samples} of {baseline.recipe.dataset.name_or_path} against "
            f"{candidate.data.eval_samples} of {candidate.recipe.dataset.name_or_path}); run both "
            f"on the same ones."
        )
    return Comparison(
        baseline=baseline,
        candidate=candidate,
        rows=list(_rows(baseline, candidate)),
        settings=_differences(_settings(baseline), _settings(candidate)),
        circumstances=_differences(_circumstances(baseline), _circumstances(candidate)),
    )


def _rows(a: Result, b: Result) -> Iterator[Row]:
    for name, seconds in (
        ("execution time", [r.times.execution_seconds for r in (a, b)]),
        ("train time", [r.times.train_seconds for r in (a, b)]),
        ("first step", [r.times.first_step_seconds for r in (a, b)]),
        ("data wait", [r.times.data_wait_seconds for r in (a, b)]),
    ):
        yield _lower_is_better(name, "s", *seconds)
    one, two = a.throughput.samples_per_second, b.throughput.samples_per_second
    yield Row(
        "steady-state training", "images/s", one, two, two / one if one and two else None, None
    )
    yield _lower_is_better(
        "peak device memory",
        "MiB",
        a.memory.peak_device_memory_mib,
        b.memory.peak_device_memory_mib,
    )
    yield _lower_is_better(
        "peak process memory",
        "MiB",
        a.memory.peak_process_memory_mib,
        b.memory.peak_process_memory_mib,
    )
    for split in ("test", "train"):
        for name, field in (
            ("accuracy", "accuracy"),
            ("F1 macro", "f1_macro"),
            ("F1 weighted", "f1_weighted"),
        ):
            before, after = (getattr(getattr(r.metrics, split), field, None) for r in (a, b))
            points = None if before is None or after is None else 100 * (after - before)
            yield Row(f"{split} {name}", "share", before, after, None, points)


def _lower_is_better(name: str, unit: str, before: float | None, after: float | None) -> Row:
    return Row(name, unit, before, after, before / after if before and after else None, None)


def _settings(result: Result) -> dict[str, Any]:
    content = result.recipe.as_json()
    return dict(
        _flatten({key: value for key, value in content.items() if key not in _NOT_SETTINGS})
    )


def _circumstances(result: Result) -> dict[str, Any]:
    seen = {f"{name} (applied)": switch.applied for name, switch in result.switches.items()}
    machine = dict(_flatten(result.environment.model_dump(mode="json")))
    training = result.training.model_dump(
        include={
            "optimizer_steps",
            "effective_batch_size",
            "per_device_train_batch_size",
            "sessions",
        }
    )
    data = result.data.model_dump(include={"train_samples", "train_fingerprint", "eval_samples"})
    return training | data | seen | machine


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[Difference]:
    names = [*one, *(name for name in two if name not in one)]
    return [
        Difference(name, one.get(name), two.get(name))
        for name in names
        if one.get(name) != two.get(name)
    ]
