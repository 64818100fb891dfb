"""Which runs a suite consists of, in what order, what there is of them already, and how long."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from hfbench.environment import Environment, check_machine
from hfbench.errors import DeviceError, HfbenchError, RecipeError
from hfbench.folders import Matches, match_runs
from hfbench.launching import build_command, probe_environment
from hfbench.recipe import Recipe, load_recipe
from hfbench.result import Result, Run, find_runs

STARTUP_SECONDS = 10.0  # imports; total_seconds begins after them
_DEFAULT_SEED = 42  # of TrainingArguments, whose import takes seconds


@dataclass(frozen=True)
class PlannedRun:
    """One recipe with one seed.

    Attributes:
        recipe: Its seed included.
        environment: Where it will run.
        result: Of an earlier run in this environment, which counts; ``None`` if it has to be run.
        resumes: An unfinished run to go on with.
        notes: Why other runs of this recipe do not count, and the like, a sentence each.
        estimate_seconds: Wall time of the whole process, from runs with any seed, or measured;
            ``None`` if there are none and it was not.
        is_measured: Whether the estimate comes from ``hfbench doctor``.
    """

    recipe: Recipe
    environment: Environment
    result: Result | None
    resumes: Path | None
    notes: tuple[str, ...]
    estimate_seconds: float | None
    is_measured: bool = False

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return seed_of(self.recipe)


@dataclass(frozen=True)
class Plan:
    """All runs of a suite in their order.

    Attributes:
        output_dir: Of the runs.
        command: What comes before hfbench's own arguments.
        world_size: Processes of each run.
        runs: Finished ones included.
    """

    output_dir: Path
    command: tuple[str, ...]
    world_size: int
    runs: tuple[PlannedRun, ...]

    @property
    def todo(self) -> list[PlannedRun]:
        """Those that are not finished."""
        return [run for run in self.runs if run.result is None]


def load_recipes(names: Sequence[str], overrides: Sequence[str] = ()) -> list[Recipe]:
    """Load all recipes of a suite and check them against this machine.

    Args:
        names: Files, or names of shipped recipes.
        overrides: Applied to each.

    Raises:
        RecipeError: With all problems of all recipes, two different ones of one name included.
        DeviceError: With everything that this machine cannot do for them.
    """
    recipes, problems = [], []
    for name in dict.fromkeys(names):
        try:
            recipes.append(load_recipe(name, overrides))
        except RecipeError as error:
            problems.append(str(error))
    try:
        recipes = unique(recipes)
    except RecipeError as error:
        problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    missing: list[HfbenchError] = []
    for recipe in recipes:
        lacks = check_machine(recipe)
        if lacks:
            missing.append(DeviceError.from_problems(recipe.name, lacks))
    if missing:
        raise DeviceError("\n".join(map(str, missing)))
    return recipes


def unique(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Drop what stands twice.

    Raises:
        RecipeError: If two recipes of one name differ: their runs would share a folder.
    """
    found: dict[str, Recipe] = {}
    problems = {}
    for recipe in recipes:
        earlier = found.setdefault(recipe.name, recipe)
        if earlier.digest() != recipe.digest():
            problems[recipe.name] = (
                f"Two recipes are both called {recipe.name}, and differ; give each a name of its "
                f"own."
            )
    if problems:
        raise RecipeError("\n".join(problems.values()))
    return list(found.values())


def order_recipes(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Put each candidate directly behind its baseline, else keep the order."""
    names = {recipe.name for recipe in recipes}
    ordered: dict[str, Recipe] = {}

    def add(recipe: Recipe) -> None:
        if recipe.name in ordered:
            return
        ordered[recipe.name] = recipe
        for other in recipes:
            if other.baseline == recipe.name:
                add(other)

    for recipe in recipes:
        if recipe.baseline not in names:
            add(recipe)
    for recipe in recipes:  # those whose baselines go round in a circle
        add(recipe)
    return list(ordered.values())


def repeat_recipes(
    recipes: Sequence[Recipe], repeats: int = 3, seeds: Sequence[int] | None = None
) -> list[Recipe]:
    """Interleave repeats, so that drift of the machine hits baseline and candidate alike.

    Args:
        recipes: Each name once.
        repeats: How often each is run.
        seeds: One a repeat; by default each recipe's own, the next one, and so on, so that a plain
            run of the recipe counts as the first repeat.

    Returns:
        The whole list for the first repeat, then for the second, and so on; seeds are set.
    """
    ordered = order_recipes(recipes)
    if seeds is not None:
        return [with_seed(recipe, seed) for seed in dict.fromkeys(seeds) for recipe in ordered]
    return [
        with_seed(recipe, seed_of(recipe) + repeat)
        for repeat in range(repeats)
        for recipe in ordered
    ]


def seed_of(recipe: Recipe) -> int:
    """Return a recipe's seed."""
    return int(recipe.training_args.get("seed", _DEFAULT_SEED))


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """Return the same recipe with another seed; itself, digest and all, if it has this one."""
    if seed_of(recipe) == seed:
        return recipe
    return recipe.model_copy(update={"training_args": recipe.training_args | {"seed": seed}})


def plan_runs(recipes: Sequence[Recipe], output_dir: Path, launcher: str = "") -> Plan:
    """Find out what has to be run, without running it.

    Args:
        recipes: In their order, seeds set, as from `repeat_recipes`.
        output_dir: Holds finished and unfinished runs.
        launcher: What each run is started with, such as ``accelerate launch``.

    Raises:
        DeviceError: If the launcher does not start hfbench.
    """
    command = build_command(launcher)
    environment, world_size = probe_environment(command)
    runs = list(find_runs(output_dir))
    planned = []
    for recipe in recipes:
        here = environment.on_cpu() if recipe.training_args.get("use_cpu") else environment
        matches = match_runs(recipe, runs, here, world_size)
        planned.append(
            PlannedRun(
                recipe=recipe,
                environment=here,
                result=matches.finished[-1] if matches.finished else None,
                resumes=matches.unfinished[-1] if matches.unfinished else None,
                notes=tuple(_say_others(matches, here)),
                estimate_seconds=_estimate(recipe, runs, here, world_size),
            )
        )
    return Plan(output_dir, tuple(command), world_size, tuple(planned))


def _say_others(matches: Matches, here: Environment) -> list[str]:
    said = list(matches.unreadable)
    for run in matches.elsewhere:
        state = "finished" if run.finished else "begun"
        said.append(f"{run.folder.name} was {state} with {run}: it does not count.")
    if matches.finished:
        commits = [e.hfbench_commit for e in (matches.finished[-1].environment, here)]
        if None not in commits and commits[0] != commits[1]:
            before, now = (str(commit)[:10] for commit in commits)
            said.append(f"It is of hfbench's commit {before}, now {now}: it counts.")
    return said


def _estimate(
    recipe: Recipe, runs: Sequence[Run], environment: Environment, world_size: int
) -> float | None:
    """Return the mean time of finished runs that differ in the seed alone."""
    key = recipe.digest_but_seed()
    repeats = {
        run.recipe.digest(): run.recipe
        for run in runs
        if run.finished
        and run.recipe
        and run.recipe.name == recipe.name
        and run.recipe.digest_but_seed() == key
    }
    totals = [
        result.times.total_seconds
        for repeat in repeats.values()
        for result in match_runs(repeat, runs, environment, world_size).finished
    ]
    return fmean(totals) + STARTUP_SECONDS if totals else None


def total_estimate(plan: Plan) -> tuple[float, bool]:
    """Return the seconds that are left, and whether they are known for every run."""
    known = [run.estimate_seconds for run in plan.todo]
    return math.fsum(seconds or 0.0 for seconds in known), None not in known
