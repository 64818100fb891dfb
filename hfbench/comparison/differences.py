"""In what two runs differ: settings, techniques, circumstances, and what forbids a comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfbench.comparison.verdict import TechniqueChange
from hfbench.machine.environment import environment_differences
from hfbench.recipe.arguments import HUB_ARGUMENTS
from hfbench.recipe.techniques import OPTIMIZER, TECHNIQUES, Technique
from hfbench.results.schema import Result

# Names and texts, not settings; the seed pairs the repeats.
_NOT_SETTINGS = ("$schema", "name", "description", "variant", "baseline", "reference")
_ARGUMENT = "training_args."
_SEED = "training_args.seed"
# Of no account for speed and test accuracy, or stated elsewhere.
_NO_CAUSE = {f"training_args.{name}" for name in (*HUB_ARGUMENTS, "use_cpu", "run_name", "project")}
_NO_CAUSE |= {"dataset.max_train_eval_samples"}  # evaluated after the training call
# What no switch shows: that something else of the same technique did not change says nothing.
_UNSEEN = {
    "training_args.torch_compile_backend",
    "training_args.torch_compile_mode",
    "training_args.dataloader_persistent_workers",
    "training_args.dataloader_prefetch_factor",
}
# Implementations of one algorithm; any other two optimizers learn differently.
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
_OPTIM = "training_args.optim"
_TRAINED = ("world_size", "effective_batch_size", "optimizer_steps", "epochs")
_WORDS = {
    "world_size": "the number of processes",
    "effective_batch_size": "the effective batch",
    "optimizer_steps": "the number of optimizer steps",
    "epochs": "the number of epochs",
    "resumed_runs": "the number of resumed runs",
    "seeds": "the set of seeds",
    "architecture": "the model",
    "parameters": "the number of parameters",
    "initialization": "the initial weights",
    "revision": "the model's revision",
    "platform": "the kernel",
    "hfbench_commit": "hfbench's commit",
}
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ."""

    name: str
    baseline: Any
    candidate: Any

    def __str__(self) -> str:
        """Write it with both values, as in ``the effective batch (64 instead of 32)``."""
        before, after = (_brief(self.name, value) for value in (self.baseline, self.candidate))
        name = _WORDS.get(self.name, self.name)
        shown = len(before) + len(after) <= _LONGEST_VALUE
        return f"{name} ({after} instead of {before})" if shown else name


def differing_settings(baseline: Result, candidate: Result) -> list[Difference]:
    """List every setting of the two recipes that differs, but for equal defaults and the seed."""
    found = _differences(_settings(baseline), _settings(candidate))
    return [
        item for item in found if item.name != _SEED and not _is_default(baseline, candidate, item)
    ]


def changed_techniques(baseline: Result, candidate: Result) -> list[TechniqueChange]:
    """List the techniques that differ, and whether that was seen to change anything.

    Either their settings differ, or what was applied does without a setting that says so: torch
    turns TF32 on where it compiles.
    """
    names = {item.name for item in differing_settings(baseline, candidate)}
    return [
        TechniqueChange(technique.name, _is_applied(technique, asked, baseline, candidate))
        for technique in TECHNIQUES
        if _is_technique(technique, baseline, candidate)
        and ((asked := names & set(technique.settings)) or _seen(technique, baseline, candidate))
    ]


def beyond_techniques(baseline: Sequence[Result], candidate: Sequence[Result]) -> list[Difference]:
    """List what differs beyond the techniques and may change speed or accuracy.

    How much was trained comes first, then the model and every other setting, then what else was
    not the same. A verdict that credits a technique has to name all of it.

    Args:
        baseline: Repeats of each other, paired with `candidate`.
        candidate: The same.
    """
    a, b = baseline[0], candidate[0]
    of_techniques = {
        name
        for technique in TECHNIQUES
        if _is_technique(technique, a, b)
        for name in technique.settings
    }
    settings = [
        item
        for item in differing_settings(a, b)
        if item.name not in of_techniques and item.name not in _NO_CAUSE
    ]
    named = {item.name for item in settings}
    found = _differences(_trained(a), _trained(b))
    if "training_args.num_train_epochs" in named:
        found = [item for item in found if item.name != "epochs"]
    if not named & {"model.name_or_path", "model.revision", "model.pretrained"}:
        found += _differences(_model(a), _model(b))
    sides = (_of_all_runs(side) for side in (baseline, candidate))
    return found + settings + _differences(*sides)


def ran_differently(one: Result, other: Result) -> list[Difference]:
    """List in what two runs of one recipe are no repeats: what was trained, seen to be applied."""

    def facts(run: Result) -> dict[str, Any]:
        return _trained(run) | _model(run) | _applied(run)

    mine, theirs = facts(one), facts(other)
    both = [name for name in mine if name in theirs]  # an older result has fewer switches
    return _differences({name: mine[name] for name in both}, {name: theirs[name] for name in both})


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


def _brief(name: str, value: Any) -> str:
    if isinstance(value, str) and name.endswith("name_or_path"):
        value = value.rstrip("/").rsplit("/", 1)[-1]  # sentences are published, folders are not
    return value if isinstance(value, str) else json.dumps(value)


def _is_technique(technique: Technique, baseline: Result, candidate: Result) -> bool:
    """Tell whether two runs differ by a technique; AdamW against SGD are two algorithms."""
    if technique is not OPTIMIZER:
        return True
    names = {str(run.recipe.argument("optim")) for run in (baseline, candidate)}
    return len(names) == 1 or names <= set(_ADAMW)


def _switches(technique: Technique, baseline: Result, candidate: Result) -> list[str]:
    return [
        name
        for name in technique.switches
        if name in baseline.switches and name in candidate.switches
    ]


def _seen(technique: Technique, baseline: Result, candidate: Result) -> bool:
    """Tell whether a technique was seen to be applied in one run alone."""
    return any(
        baseline.switches[name].applied != candidate.switches[name].applied
        for name in _switches(technique, baseline, candidate)
    )


def _is_applied(technique: Technique, asked: set[str], baseline: Result, candidate: Result) -> bool:
    switches = _switches(technique, baseline, candidate)
    if not switches or _seen(technique, baseline, candidate):
        return True
    return bool(asked & _UNSEEN) and all(baseline.switches[name].applied for name in switches)


def _trained(run: Result) -> dict[str, Any]:
    return {name: getattr(run.training, name) for name in _TRAINED}


def _model(run: Result) -> dict[str, Any]:
    return run.model.model_dump()


def _applied(run: Result) -> dict[str, Any]:
    return {f"{name} (applied)": switch.applied for name, switch in run.switches.items()}


def _of_all_runs(runs: Sequence[Result]) -> dict[str, Any]:
    seeds = ", ".join(str(run.seed) for run in runs)
    environment = runs[0].environment
    return {
        "resumed_runs": sum(run.training.sessions > 1 for run in runs),
        "seeds": seeds,
        "platform": environment.platform,
        "hfbench_commit": environment.hfbench_commit,
    }


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
    machine = dict(flatten(result.environment.model_dump(mode="json")))
    training = result.training.model_dump(include={"per_device_train_batch_size", "sessions"})
    model = result.model.model_dump(include={"architecture", "initialization", "revision"})
    return training | model | _applied(result) | machine


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
