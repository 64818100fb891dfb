"""Which runs a suite consists of, in what order, what there is of them already, and how long."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from hfbench.errors import DeviceError, HfbenchError, RecipeError, ResultError, listed
from hfbench.machine.environment import Environment, check_machine
from hfbench.recipe.schema import Recipe, load_recipe
from hfbench.results.folder import Matches, match_runs
from hfbench.results.schema import Result, Run, find_runs, load_result
from hfbench.studies.suite.processes import build_command, probe_environment

STARTUP_SECONDS = 10.0  # imports; total_seconds begins after them
MOST_REPEATS = 1000
_DEFAULT_SEED = 42  # of TrainingArguments, whose import takes seconds
_SEED_LIMIT = 2**32  # numpy's seeds are unsigned 32-bit integers


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
    """Put the recipes of one repeat into a random order; what is compared stays together.

    A machine that drifts favours whatever it runs first, or last. Where chance decides, with even
    odds, whether a candidate runs before or after its baseline, drift scatters the repeats'
    differences instead of shifting them, and the interval over repeats covers it (Fisher, The
    Design of Experiments, 1935).

    Chance is SHA-256 of seed and names alone: neither how the recipes are listed nor what is
    finished matters, and whoever knows the seeds can check the order.

    Args:
        recipes: Each name once, seeds set.

    Returns:
        The same recipes. Those that are connected by their baselines stand side by side, in any
        order among themselves; so do these groups.
    """
    ordered = sorted(recipes, key=lambda recipe: _draw([recipe]))
    return [recipe for group in sorted(_groups(ordered), key=_draw) for recipe in group]


def _draw(recipes: Sequence[Recipe]) -> str:
    """Return a random number, drawn once and for all for these names and seeds."""
    names = sorted([seed_of(recipe), recipe.name] for recipe in recipes)
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _groups(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    """Divide recipes into those that their baselines connect, each group in the given order."""
    members = {recipe.name: {recipe.name} for recipe in recipes}
    for recipe in recipes:
        if recipe.baseline in members:
            together = members[recipe.name] | members[recipe.baseline]
            members |= dict.fromkeys(together, together)
    groups = {frozenset(names): names for names in members.values()}
    return [[recipe for recipe in recipes if recipe.name in names] for names in groups.values()]


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
        All recipes for the first repeat, in an order of its own (`order_recipes`), then for the
        second, and so on; seeds are set.

    Raises:
        RecipeError: If there are too many repeats, or seeds that are none.
    """
    if seeds is not None:
        check_count(len(seeds), "--seeds")
        sets = [[with_seed(recipe, seed) for recipe in recipes] for seed in dict.fromkeys(seeds)]
    else:
        check_count(repeats)
        sets = [
            [with_seed(recipe, seed_of(recipe) + repeat) for recipe in recipes]
            for repeat in range(repeats)
        ]
    beyond = [recipe.name for recipe in sets[-1] if seed_of(recipe) >= _SEED_LIMIT]
    if beyond:
        raise RecipeError(
            f"training_args.seed of {listed(beyond)}: {repeats} repeats need seeds up to it + "
            f"{repeats - 1}, and a seed is at most {_SEED_LIMIT - 1}; write a smaller one."
        )
    return [recipe for repeated in sets for recipe in order_recipes(repeated)]


def check_count(repeats: int, option: str = "--repeats") -> None:
    """Refuse what is no number of repeats, before memory is taken for them.

    Raises:
        RecipeError: If there are none, or more than anybody waits for.
    """
    if not 1 <= repeats <= MOST_REPEATS:
        raise RecipeError(
            f"{option}: found {repeats} runs of each recipe, expected 1 to {MOST_REPEATS}."
        )


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
    known = _KnownRuns(output_dir, world_size)
    planned = []
    for recipe in recipes:
        here = environment.on_cpu() if recipe.training_args.get("use_cpu") else environment
        matches = known.match(recipe, here)
        planned.append(
            PlannedRun(
                recipe=recipe,
                environment=here,
                result=matches.finished[-1] if matches.finished else None,
                resumes=matches.unfinished[-1] if matches.unfinished else None,
                notes=tuple(_say_others(matches, here)),
                estimate_seconds=known.estimate(recipe, here),
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


class _KnownRuns:
    """The runs in a folder, each file read once, however many recipes are looked for."""

    def __init__(self, output_dir: Path, world_size: int) -> None:
        self._world_size = world_size
        self._results: dict[Path, Result | ResultError] = {}
        self._estimates: dict[tuple[str, str], float | None] = {}
        self._same: dict[tuple[str, str], list[Run]] = {}  # name and digest -> runs
        self._repeats: dict[tuple[str, str], dict[str, Recipe]] = {}  # without the seed
        for run in find_runs(output_dir):
            if run.recipe:
                name, digest = run.folder.parent.name, run.recipe.digest()
                self._same.setdefault((name, digest), []).append(run)
                if run.finished:
                    key = run.recipe.name, run.recipe.digest_but_seed()
                    self._repeats.setdefault(key, {})[digest] = run.recipe

    def match(self, recipe: Recipe, environment: Environment) -> Matches:
        """Return what there is of a recipe; see `match_runs`."""
        same = self._same.get((recipe.name, recipe.digest()), [])
        return match_runs(recipe, same, environment, self._world_size, self._load)

    def estimate(self, recipe: Recipe, environment: Environment) -> float | None:
        """Return the mean time of finished runs that differ in the seed alone."""
        key = recipe.name, recipe.digest_but_seed()
        if key not in self._estimates:
            totals = [
                result.times.total_seconds
                for repeat in self._repeats.get(key, {}).values()
                for result in self.match(repeat, environment).finished
            ]
            self._estimates[key] = fmean(totals) + STARTUP_SECONDS if totals else None
        return self._estimates[key]

    def _load(self, folder: Path) -> Result:
        if folder not in self._results:
            try:
                self._results[folder] = load_result(folder)
            except ResultError as error:
                self._results[folder] = error
        found = self._results[folder]
        if isinstance(found, ResultError):
            raise found
        return found


def total_estimate(plan: Plan) -> tuple[float, bool]:
    """Return the seconds that are left, and whether they are known for every run."""
    known = [run.estimate_seconds for run in plan.todo]
    return math.fsum(seconds or 0.0 for seconds in known), None not in known
