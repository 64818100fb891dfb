"""What a search found, as the recipe and the measurements that `hfbench tune` writes."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from hfbench.comparison.verdict import FASTER, judge_speed
from hfbench.machine.environment import Environment
from hfbench.recipe.schema import Recipe
from hfbench.studies.tune.decision import mean_speed
from hfbench.studies.tune.offers import (
    CHECK_BATCH,
    LARGER_BATCH,
    ROUNDING,
    SAME_ARITHMETIC,
    accumulation_of,
    micro_batch_of,
)
from hfbench.studies.tune.schema import BEST, EVALUATION, Tuning
from hfbench.studies.tune.search import Search


def describe_search(
    search: Search,
    recipe: Recipe,
    environment: Environment,
    *,
    budget_seconds: float,
    seconds: float,
    not_applicable: dict[str, str],
    stopped: bool = False,
) -> Tuning:
    """Put down what a search found.

    Args:
        search: As far as it came.
        recipe: As given.
        environment: It was measured in.
        budget_seconds: It might take.
        seconds: It took.
        not_applicable: Techniques without a candidate, and why.
        stopped: Whether Ctrl-C ended it.
    """
    sides = [
        [item.window for item in search.final if item.candidate is candidate]
        for candidate in (False, True)
    ]
    start = mean_speed(sides[0] or [search.windows.first])
    best = mean_speed(sides[1] or [search.windows.latest])
    return Tuning(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=recipe,
        recipe_sha256=recipe.digest(),
        best=name_best(search, recipe, environment),
        environment=environment,
        seconds=seconds,
        budget_seconds=budget_seconds,
        window_seconds=search.windows.window_seconds,
        speedup=search.speedup,
        start_samples_per_second=start,
        best_samples_per_second=best if _list_taken(search, evaluation=False) else start,
        trials=search.trials,
        not_applicable=not_applicable,
        final_windows=search.final,
        sentence=_say_sentence(search, recipe),
        notes=_say_notes(search, recipe, stopped),
        stopped=stopped,
    )


def name_best(search: Search, recipe: Recipe, environment: Environment) -> Recipe:
    """Return the best as a recipe of its own, whose baseline is the one that was given."""
    changes = "; ".join(filter(None, (_list_taken(search, which) for which in (False, True))))
    if changes:
        gained = f"; training {search.speedup} as fast" if search.speedup else ""
        said = f"{recipe.name} with what hfbench tune found to pay: {changes}{gained}"
    else:
        said = f"{recipe.name} as it is: hfbench tune found nothing that pays"
    # Two recipes must not be pushed to one place.
    arguments = {k: v for k, v in search.best.training_args.items() if k != "hub_model_id"}
    return search.best.model_copy(
        update={
            "training_args": arguments,
            "schema_": None,
            "name": recipe.name + BEST,
            "variant": "fast",
            "baseline": recipe.name,
            "description": f"{said}. Measured on {environment.device_name}, "
            f"{environment.cpu_cores} CPU cores.",
            "reference": None,  # its times are those of other settings
        }
    )


def _list_taken(search: Search, evaluation: bool) -> str:
    """Write what was taken, of a technique the last: of training, or of evaluation."""
    last = {t.technique: t.detail for t in search.trials if t.outcome == "taken"}
    names = [name for name in last if (name == EVALUATION) == evaluation]
    return "; ".join(f"{name} {last[name]}" for name in names)


def _say_sentence(search: Search, recipe: Recipe) -> str:
    said = _say_training(search, recipe)
    gained = math.prod(
        trial.ratio.value
        for trial in search.trials
        if trial.technique == EVALUATION and trial.outcome == "taken" and trial.ratio
    )
    changes = _list_taken(search, evaluation=True)
    return f"{said} Evaluation: {gained:.2f}× with {changes}." if changes else said


def _say_training(search: Search, recipe: Recipe) -> str:
    name, changes, speedup = recipe.name, _list_taken(search, evaluation=False), search.speedup
    if not changes and speedup is not None:
        return f"Nothing pays: what was taken at first gained nothing all together ({speedup})."
    if not changes and any(trial.windows for trial in search.trials):
        return f"Nothing that was tried is faster beyond noise than {name} as it is."
    if not changes:
        return "No candidate could be measured."
    if speedup is None:
        return f"Faster one by one, not measured together: {changes}."
    undecided = "" if judge_speed(speedup.interval) == FASTER else "Undecided: "
    return f"{undecided}{speedup} images per second of {name}, with {changes}."


def _say_notes(search: Search, recipe: Recipe, stopped: bool) -> list[str]:
    notes = []
    if search.start != recipe:
        sizes = micro_batch_of(recipe), micro_batch_of(search.start)
        notes.append(
            f"{recipe.name} itself does not fit into memory in micro-batches of {sizes[0]}: the "
            f"start is {accumulation_of(search.start)} micro-batches of {sizes[1]}."
        )
    batch = search.windows.measured_batch
    if batch is not None:
        notes.append(
            f"Measured on batches of {batch} without accumulation, since an "
            "optimizer step takes too long here. Ratios may differ in larger batches."
        )
    taken = [trial for trial in search.trials if trial.outcome == "taken"]
    doubtful = {t.technique: t.effect for t in taken if t.effect not in (SAME_ARITHMETIC, ROUNDING)}
    notes += [f"{technique}: {effect}." for technique, effect in doubtful.items()]
    if any(trial.technique == LARGER_BATCH for trial in taken):
        notes.append(f"learning_rate was left alone; {CHECK_BATCH.partition(':')[0]} needs others.")
    left = sum(trial.outcome == "not measured" for trial in search.trials)
    if left:
        notes.append(f"Candidates not measured: {left}; more --seconds measures more.")
    if recipe.training_args.get("hub_model_id"):
        notes.append("hub_model_id was left out: both recipes would be pushed to the same place.")
    if stopped:
        notes.append("Stopped before the end: the best was not measured against the start.")
    return notes
