"""Whether other processes were on a GPU while it was measured."""

from __future__ import annotations

from collections.abc import Sequence

from hfbench.results.formats import join_words
from hfbench.results.schema import Result

_SHOWN = 3  # runs that a sentence names


def say_shared(runs: Sequence[Result]) -> str | None:
    """Say that GPUs were shared.

    Args:
        runs: Finished.

    Returns:
        A sentence; ``None`` if no other process was seen, or nothing was there to see it.
    """
    found = {f"{run.recipe.name}/{run.run_id}": said for run in runs if (said := _say_others(run))}
    if not found:
        return None
    if len(runs) == 1:
        which = f": {next(iter(found.values()))}"
    else:
        named = [f"{name} ({said})" for name, said in list(found.items())[:_SHOWN]]
        more = [f"{len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        which = f" in {len(found)} of {len(runs)} runs: {join_words(named + more)}"
    return f"GPU shared while measuring{which}. What others did on it is in the times."


def _say_others(run: Result) -> str | None:
    conditions = run.conditions
    if conditions is None or not conditions.other_processes:
        return None
    number, mib = conditions.other_processes, conditions.other_processes_mib
    memory = "memory not known" if mib is None else f"{mib:.0f} MiB"
    return f"{number} other process{'' if number == 1 else 'es'}, {memory}"
