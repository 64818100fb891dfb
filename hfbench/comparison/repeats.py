"""Which runs are repeats of each other, and which of two sides belong together."""

from __future__ import annotations

from collections.abc import Sequence

from hfbench.comparison.differences import differing_settings, ran_differently
from hfbench.machine.environment import environment_differences
from hfbench.results.formats import join_words
from hfbench.results.schema import Result


def select_repeats(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Choose from the runs of one recipe's folder those that are repeats of the newest.

    Args:
        results: Finished runs, oldest first, at least one.

    Returns:
        Runs of the same settings but for the seed, the same environment, number of processes and
        images; and a sentence for each reason why others were left out.
    """
    newest = results[-1]
    chosen: list[Result] = []
    left_out: dict[str, int] = {}
    for run in results:
        reason = _why_no_repeat(run, newest)
        if reason is None:
            chosen.append(run)
        else:
            left_out[reason] = left_out.get(reason, 0) + 1
    name = newest.recipe.name
    return chosen, [
        f"{name}: {count} run{'s' if count > 1 else ''} left out, {reason}."
        for reason, count in left_out.items()
    ]


def check_repeats(results: Sequence[Result]) -> list[str]:
    """Say why the runs of one side are no repeats of each other; empty if they are."""
    if not results:
        return ["one side has no runs."]
    first = results[0]
    reasons = {_why_no_repeat(run, first): run.run_id for run in results}
    return [
        f"{first.recipe.name}: runs {first.run_id} and {run_id} are no repeats of each other: "
        f"{reason}."
        for reason, run_id in reasons.items()
        if reason
    ]


def pair_by_seed(
    baseline: Sequence[Result], candidate: Sequence[Result]
) -> tuple[list[Result], list[Result], list[str]]:
    """Pair runs of equal seeds, in order of time; what has no partner is left out.

    Returns:
        Both sides, equally long, and what a reader has to know, a sentence each.
    """
    before, after = map(_in_order, (baseline, candidate))
    notes: list[str] = []
    for side, given in ((before, baseline), (after, candidate)):
        copies = len(given) - len(side)
        if copies:
            runs = "1 run" if copies == 1 else f"{copies} runs"
            notes.append(f"{side[0].recipe.name}: {runs} left out, copies of others.")
    seeds = {run.seed for run in before} & {run.seed for run in after}
    if not seeds:
        pairs = list(zip(before, after, strict=False))
        notes.append("The two sides share no seed: runs are paired in order of time.")
    else:
        pairs = [
            pair
            for seed in sorted(seeds)
            for pair in zip(
                (run for run in before if run.seed == seed),
                (run for run in after if run.seed == seed),
                strict=False,
            )
        ]
    for side, place in ((before, 0), (after, 1)):
        used = {id(pair[place]) for pair in pairs}
        alone = [f"{run.run_id} (seed {run.seed})" for run in side if id(run) not in used]
        if alone:
            notes.append(f"{side[0].recipe.name}: without a partner: {', '.join(alone)}.")
    same = sum(one == two for one, two in pairs)
    if same:
        notes.append(f"{same} of {len(pairs)} pairs are of a run with itself.")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], notes


def seeds_of_pairs(baseline: Sequence[Result], candidate: Sequence[Result]) -> list[int]:
    """Return the seed of each pair; where those of its runs differ, of the side with fewer seeds.

    Pairs that share a training seed on one side are no independent trainings.
    """
    sides = [[run.seed for run in side] for side in (baseline, candidate)]
    return min(sides, key=lambda seeds: len(set(seeds)))


def _in_order(runs: Sequence[Result]) -> list[Result]:
    """Sort runs by time; a copy of a run is no repeat of it."""
    found: list[Result] = []
    for run in sorted(runs, key=lambda run: run.run_id):
        if run not in found:
            found.append(run)
    return found


def _why_no_repeat(run: Result, other: Result) -> str | None:
    if run.recipe.digest_but_seed() != other.recipe.digest_but_seed():
        names = [item.name for item in differing_settings(run, other)] or ["its name"]
        return f"other settings ({', '.join(names)})"
    if run.training.world_size != other.training.world_size:
        return f"{run.training.world_size} processes instead of {other.training.world_size}"
    changed = environment_differences(run.environment, other.environment)
    if changed:
        return (
            "another environment ("
            + ", ".join(f"{name} {before} instead of {after}" for name, before, after in changed)
            + ")"
        )
    for what, name in (("test", "eval_fingerprint"), ("training", "train_fingerprint")):
        if getattr(run.data, name) != getattr(other.data, name):
            return f"other {what} images"
    differing = ran_differently(other, run)
    return f"it ran differently: {join_words(list(map(str, differing)))}" if differing else None
