"""What an ablation beside the runs says of each technique: a line below a comparison's verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from hfbench.comparison.ratio import Ratio
from hfbench.machine.bounds import parse_json, read_text
from hfbench.machine.environment import Environment, environment_differences
from hfbench.recipe.schema import Recipe
from hfbench.results.schema import Result


class _Contribution(BaseModel):
    """What an ablation says of one technique."""

    technique: str
    alone: Ratio | None
    with_others: Ratio | None


class _Ablation(BaseModel):
    """What is needed of an ``ablation.json``; all of it is in its own schema."""

    created_at: str
    recipe: Recipe
    environment: Environment
    full: bool = False
    finished_rounds: int
    steps: int | None
    contributions: list[_Contribution]


def say_attribution(runs: Sequence[Result]) -> str | None:
    """Say what the newest ablation of a candidate's recipe found for each of its techniques alone.

    Args:
        runs: Repeats of the candidate. Their ablation is in ``ablations/<recipe name>/<id>`` beside
            the recipe's folder, of the same settings but for the seed, on the same machine.

    Returns:
        A sentence; ``None`` if there is no such ablation.
    """
    newest = runs[-1]
    if newest.folder is None:
        return None
    root = newest.folder.resolve().parent.parent
    files = sorted(root.glob(f"ablations/{newest.recipe.name}/*/ablation.json"), reverse=True)
    for file in files:
        found = _read(file)
        if found and _is_of(found, newest):
            return _say(found)
    return None


def _read(file: Path) -> _Ablation | None:
    try:
        return _Ablation.model_validate(parse_json(read_text(file)))
    except (OSError, ValueError):
        return None  # it adds to a verdict that stands without it


def _is_of(found: _Ablation, run: Result) -> bool:
    return (
        found.recipe.digest_but_seed() == run.recipe.digest_but_seed()
        and not environment_differences(found.environment, run.environment)
    )


def _say(found: _Ablation) -> str | None:
    gains = [
        f"{item.technique} alone {item.alone}"
        for item in found.contributions
        if item.alone is not None and item.with_others is not None  # else not in this recipe
    ]
    if not gains:
        return None
    rounds = found.finished_rounds
    how = (
        f"whole runs with {rounds} seed{'' if rounds == 1 else 's'}"
        if found.full
        else f"{rounds} round{'' if rounds == 1 else 's'} of {found.steps} steps"
    )
    return f"Ablation of {found.created_at[:10]} ({how}): {'; '.join(gains)}."
