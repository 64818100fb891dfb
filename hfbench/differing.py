"""In what two runs differ: settings, techniques, circumstances, and what forbids a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfbench.environment import environment_differences
from hfbench.result import Result
from hfbench.techniques import TECHNIQUES, Technique
from hfbench.verdict import TechniqueChange

# Names and texts, not settings; the seed pairs the repeats.
_NOT_SETTINGS = ("$schema", "name", "description", "variant", "baseline", "reference")
_ARGUMENT = "training_args."
_SEED = "training_args.seed"
# Where it runs, how it talks: of no account, or stated elsewhere.
_STATED_ELSEWHERE = ("training_args.use_cpu",)


@dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ."""

    name: str
    baseline: Any
    candidate: Any


def differing_settings(baseline: Result, candidate: Result) -> list[Difference]:
    """List every setting of the two recipes that differs, but for equal defaults and the seed."""
    found = _differences(_settings(baseline), _settings(candidate))
    return [
        item for item in found if item.name != _SEED and not _is_default(baseline, candidate, item)
    ]


def changed_techniques(baseline: Result, candidate: Result) -> list[TechniqueChange]:
    """List the techniques whose settings differ, and whether that was seen to change anything."""
    names = {item.name for item in differing_settings(baseline, candidate)}
    return [
        TechniqueChange(technique.name, _is_applied(technique, baseline, candidate))
        for technique in TECHNIQUES
        if names & set(technique.settings)
    ]


def beyond_techniques(baseline: Result, candidate: Result) -> list[Difference]:
    """List what differs beyond the techniques, effective batch and optimizer steps first."""
    of_techniques = {name for technique in TECHNIQUES for name in technique.settings}
    fields = ("effective_batch_size", "optimizer_steps", "world_size")
    before, after = (run.training.model_dump(include=set(fields)) for run in (baseline, candidate))
    first = _differences(*({name: side[name] for name in fields} for side in (before, after)))
    return first + [
        item
        for item in differing_settings(baseline, candidate)
        if item.name not in of_techniques and item.name not in _STATED_ELSEWHERE
    ]


def circumstances(baseline: Result, candidate: Result) -> list[Difference]:
    """List in what else two runs differ: what was applied, commit, kernel, sessions."""
    return _differences(_circumstances(baseline), _circumstances(candidate))


def refusals(baseline: Sequence[Result], candidate: Sequence[Result]) -> list[str]:
    """Say what forbids a comparison: other test images, data, hardware or library versions.

    Args:
        baseline: Repeats of each other.
        candidate: The same.

    Returns:
        A sentence for each difference, naming it; empty if there is none.
    """
    a, b = baseline[0], candidate[0]
    problems = []
    for what, name in (("test", "eval"), ("training", "train")):
        if len({getattr(run.data, f"{name}_fingerprint") for run in (a, b)}) > 1:
            counts = [getattr(run.data, f"{name}_samples") for run in (a, b)]
            sources = [run.recipe.dataset.name_or_path for run in (a, b)]
            problems.append(
                f"{what} images: {counts[0]} of {sources[0]} against {counts[1]} of {sources[1]}, "
                f"which are not the same; run both on the same ones."
            )
    problems += _differing_classes(a.data.label_names, b.data.label_names)
    problems += [
        f"{name}: {before} against {after}; run both on one machine with the same libraries."
        for name, before, after in environment_differences(a.environment, b.environment)
    ]
    return problems


def _differing_classes(one: Sequence[str], two: Sequence[str]) -> Iterator[str]:
    if len(one) != len(two):
        yield f"classes: {len(one)} against {len(two)}; run both on the same data."
        return
    differing = [(x, y) for x, y in zip(one, two, strict=True) if x != y]
    if differing:
        first, second = differing[0]
        yield (
            f'class names: {len(differing)} of {len(one)} differ, the first of them "{first}" '
            f'against "{second}"; run both on the same data.'
        )


def _is_applied(technique: Technique, baseline: Result, candidate: Result) -> bool:
    seen = [name for name in technique.switches if name in baseline.switches]
    seen = [name for name in seen if name in candidate.switches]
    return not seen or any(
        baseline.switches[name].applied != candidate.switches[name].applied for name in seen
    )


def _is_default(baseline: Result, candidate: Result, item: Difference) -> bool:
    """Tell whether one side writes out what the other leaves to the default."""
    argument = item.name.removeprefix(_ARGUMENT)
    if argument == item.name or None not in (item.baseline, item.candidate):
        return False
    if "." in argument:  # an option of an argument; those that hfbench knows are off by default
        return not item.baseline and not item.candidate
    return bool(baseline.recipe.argument(argument) == candidate.recipe.argument(argument))


def _settings(result: Result) -> dict[str, Any]:
    content = result.recipe.as_json()
    return dict(flatten({key: value for key, value in content.items() if key not in _NOT_SETTINGS}))


def _circumstances(result: Result) -> dict[str, Any]:
    seen = {f"{name} (applied)": switch.applied for name, switch in result.switches.items()}
    machine = dict(flatten(result.environment.model_dump(mode="json")))
    training = result.training.model_dump(include={"per_device_train_batch_size", "sessions"})
    model = result.model.model_dump(include={"architecture", "initialization", "revision"})
    return training | model | seen | machine


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List nested values under dotted names."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[Difference]:
    names = [*one, *(name for name in two if name not in one)]
    return [
        Difference(name, one.get(name), two.get(name))
        for name in names
        if one.get(name) != two.get(name)
    ]
