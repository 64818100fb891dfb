"""What the windows of an ablation allow to say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Any

from hfbench.comparison.ratio import Ratio
from hfbench.comparison.verdict import FASTER, SLOWER, UNDECIDED
from hfbench.recipe.schema import Recipe
from hfbench.results.windows import FirstLoss, Window
from hfbench.studies.ablation.gains import Gains
from hfbench.studies.ablation.plan import ALL, NONE, Configuration, Plan
from hfbench.studies.ablation.schema import Contribution, Measured, Row

BASELINE = "baseline"
FAILED = "failed"


def describe_rows(
    plan: Plan,
    windows: Sequence[Measured],
    gains: Gains,
    first_losses: dict[str, FirstLoss],
    failures: dict[str, str],
) -> list[Row]:
    """Put together what was measured of each configuration.

    Args:
        plan: What was to be measured.
        windows: What was measured.
        gains: What they allow to say.
        first_losses: Of configurations, by name.
        failures: Why configurations were not measured, by name.
    """
    return [
        _describe(item, plan, windows, gains, first_losses.get(item.name), failures.get(item.name))
        for item in plan.configurations
    ]


def _describe(
    configuration: Configuration,
    plan: Plan,
    windows: Sequence[Measured],
    gains: Gains,
    first_loss: FirstLoss | None,
    failure: str | None,
) -> Row:
    name, recipe = configuration.name, configuration.recipe
    own = [item.window for item in windows if item.configuration == name]
    speedup = gains.rows[name]
    device = [w.peak_device_memory_mib for w in own if w.peak_device_memory_mib is not None]
    return Row(
        name=name,
        label=configuration.label,
        also=list(configuration.also),
        techniques=list(configuration.techniques),
        settings=settings_of(plan.configurations[0].recipe, recipe),
        effective_batch_size=batch_size_of(recipe),
        speedup=speedup,
        verdict=judge_row(name, speedup, failure),
        samples_per_second=geometric_mean([w.samples_per_second for w in own]),
        seconds_per_step=geometric_mean([w.seconds_per_step for w in own]),
        data_wait_share=fmean(w.data_wait_seconds / w.seconds for w in own) if own else None,
        peak_process_memory_mib=median(w.peak_process_memory_mib for w in own) if own else None,
        peak_device_memory_mib=median(device) if device else None,
        first_loss=first_loss,
        not_applied=_not_applied(own[-1]) if own else [],
        failure=failure,
    )


def judge_row(name: str, speedup: Ratio | None, failure: str | None) -> str:
    """Return the verdict on one configuration."""
    if failure:
        return FAILED
    if name == NONE:
        return BASELINE
    return speedup.verdict if speedup else UNDECIDED


def batch_size_of(recipe: Recipe) -> int:
    """Return the images of an optimizer step on one device."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    return math.prod(int(recipe.argument(name)) for name in names)


def settings_of(none: Recipe, recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe that differ from ``none``, by dotted name."""
    before, after = none.as_json(), recipe.as_json()
    return {
        f"{section}.{name}": value
        for section in ("training_args", "model", "preprocessing")
        for name, value in after[section].items()
        if value != before[section].get(name)
    }


def _not_applied(window: Window) -> list[str]:
    return [
        f"{name}: {switch.requested} was asked for, {switch.applied} was seen"
        + (f" ({switch.reason})" if switch.reason else "")
        for name, switch in window.switches.items()
        if switch.requested not in (None, switch.applied) and name != "use_cpu"
    ]


def geometric_mean(values: Sequence[float]) -> float | None:
    """Return the geometric mean; ``None`` of nothing."""
    return math.exp(fmean(math.log(value) for value in values)) if values else None


def say_verdict(rows: Sequence[Row], contributions: Sequence[Contribution]) -> str:
    """Return the sentence on top: what gains most, what all gain, and whether anything is wrong."""
    measured = [(item.technique, item.alone) for item in contributions if item.alone is not None]
    if not measured:
        return "Nothing was measured."
    together = next((row.speedup for row in rows if row.name == ALL), None)
    flagged = sum(row.flagged for row in rows)
    checked = any(row.first_loss is not None for row in rows)
    wrong = f"{flagged} of {len(rows)} configurations have a wrong first loss"
    right = "no first loss is changed" if checked else "first losses were not checked"
    gain = _say_gain(measured, together)
    return f"{wrong}; {gain[0].lower()}{gain[1:]}." if flagged else f"{gain}; {right}."


def _say_gain(measured: Sequence[tuple[str, Ratio]], together: Ratio | None) -> str:
    faster = [item for item in measured if item[1].verdict == FASTER]
    name, gain = max(faster or measured, key=lambda item: item[1].value)
    and_all = f"; all together {together}" if together else ""
    if gain.low is None:
        return f"Undecided from one round: {name} is the fastest alone, {gain}{and_all}"
    if faster:
        return f"{name[0].upper()}{name[1:]} gains most: {gain}{and_all}"
    if together and together.verdict == FASTER:
        return (
            f"All together gain {together}, but no technique alone is shown to; the fastest is "
            f"{name}, {gain}"
        )
    ratios = [*(item[1] for item in measured), *([together] if together else [])]
    slower = any(ratio.verdict == SLOWER for ratio in ratios)
    said = "No gain shown" if slower else "No difference shown"
    return f"{said}: no technique is faster than none; {name} is {gain}{and_all}"


def say_findings(rows: Sequence[Row], contributions: Sequence[Contribution]) -> list[str]:
    """Return further sentences: wrong losses first, then what slows, interactions, failures."""
    return [
        *(f"FLAGGED: {row.label}: {_problem(row)}" for row in rows if row.flagged),
        *_say_slower(contributions),
        *_say_interactions(contributions),
        *(f"Not measured: {row.label}: {row.failure}" for row in rows if row.failure),
        *(
            f"First loss of {row.label} {_problem(row)}"
            for row in rows
            if _problem(row) and not row.flagged
        ),
    ]


def _problem(row: Row) -> str | None:
    return row.first_loss.problem if row.first_loss else None


def _say_slower(contributions: Sequence[Contribution]) -> Iterator[str]:
    for item in contributions:
        if item.alone is not None and item.alone.verdict == SLOWER:
            yield f"Slower: {item.technique} alone runs at {item.alone} of the speed."


def _say_interactions(contributions: Sequence[Contribution]) -> Iterator[str]:
    said = set()
    known = any(item.interaction and item.interaction.low is not None for item in contributions)
    for item in contributions:
        if item.interaction is None or item.alone is None or item.with_others is None:
            continue
        # Of two techniques each interacts with the other by the same ratio.
        if item.interaction.verdict not in (FASTER, SLOWER) or item.interaction in said:
            continue
        said.add(item.interaction)
        yield (
            f"Interacts: with the others, {item.technique} gains {item.with_others} instead of "
            f"{item.alone} alone."
        )
    if known and not said:
        yield "No interaction shown."
