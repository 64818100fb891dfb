"""Which configurations an ablation measures: none, each technique alone, all but each, all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hfbench.errors import RecipeError
from hfbench.recipe.schema import Recipe, check_recipe
from hfbench.recipe.techniques import MIXED_PRECISION, PINNED_MEMORY, Use, change
from hfbench.studies.uses import find_uses

NONE, ALL = "none", "all"
_LARGER = "accumulation, larger batch"


@dataclass(frozen=True)
class Configuration:
    """One set of techniques.

    Attributes:
        name: ``none``, ``all``, a technique's slug, or ``all-but-`` and one.
        label: The same in words.
        also: What else comes to the same, in words; it is measured once.
        techniques: That are turned on.
        recipe: With exactly these.
    """

    name: str
    label: str
    also: tuple[str, ...]
    techniques: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Attribution:
    """The configurations that tell what one technique contributes.

    Attributes:
        technique: Its name.
        detail: What exactly was turned on.
        alone: Name of the configuration with it alone.
        all_but: Name of the configuration with all others; ``None`` if it is not among "all".
    """

    technique: str
    detail: str
    alone: str
    all_but: str | None


@dataclass(frozen=True)
class NotRun:
    """A technique that cannot have an effect here."""

    technique: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        recipe: Whose techniques these are.
        configurations: Different recipes; the first is ``none``.
        attributions: One of each technique that is measured.
        not_run: The others.
        notes: What a reader has to know about "all".
    """

    recipe: Recipe
    configurations: list[Configuration]
    attributions: list[Attribution]
    not_run: list[NotRun]
    notes: list[str]

    def find(self, name: str) -> Configuration:
        """Return a configuration by its name."""
        return next(item for item in self.configurations if item.name == name)


def plan_ablation(recipe: Recipe, *, whole_runs: bool = False) -> Plan:
    """Choose the configurations.

    "All" is the recipe as written. If it has none of the reference's three techniques (mixed
    precision, pinned memory, accumulation), "all" has them too. Accumulation at the same batch
    excludes the one that enlarges it; it is measured alone. What can have no effect on this machine
    stays as the recipe has it, everywhere, and in short windows so does what acts outside of steps.

    Args:
        recipe: As written.
        whole_runs: Whether runs from beginning to end are planned, instead of short windows.
    """
    found_uses = find_uses(recipe)
    idle = {use.slug: _why_idle(use, whole_runs) for use in found_uses}
    uses = [use for use in found_uses if idle[use.slug] is None]
    chosen, notes = _choose_all(recipe, uses)
    base = change(recipe, (item for use in uses for item in use.off.items()))
    found: dict[str, Configuration] = {}

    def add(name: str, label: str, on: Iterable[Use]) -> str:
        turned_on = list(on)
        variant = change(base, (item for use in turned_on for item in use.on.items()))
        digest = variant.digest()
        if digest in found:
            earlier = found[digest]
            found[digest] = replace(earlier, also=(*earlier.also, label))
        else:
            names = tuple(use.name for use in turned_on)
            found[digest] = Configuration(name, label, (), names, variant)
        return found[digest].name

    add(NONE, NONE, [])
    alone = {use.slug: add(use.slug, use.name, [use]) for use in uses}
    all_but = {
        use.slug: add(
            f"all-but-{use.slug}",
            f"all but {use.name}",
            [other for other in chosen if other is not use],
        )
        for use in chosen
    }
    add(ALL, ALL, chosen)
    return Plan(
        recipe=recipe,
        configurations=list(found.values()),
        attributions=[
            Attribution(use.name, use.detail, alone[use.slug], all_but.get(use.slug))
            for use in uses
        ],
        not_run=[NotRun(use.name, why) for use in found_uses if (why := idle[use.slug])],
        notes=notes,
    )


def _why_idle(use: Use, whole_runs: bool) -> str | None:
    return use.no_effect if use.no_effect or whole_runs else use.whole_runs_only


def _choose_all(recipe: Recipe, uses: list[Use]) -> tuple[list[Use], list[str]]:
    """Return the techniques of "all", and what has to be said about them."""
    names = (MIXED_PRECISION.name, PINNED_MEMORY.name, _LARGER)
    three = [use for use in uses if use.name in names]
    of_recipe = [use for use in uses if use.in_recipe]
    if any(use.in_recipe for use in three):
        return of_recipe, []
    said = f"{recipe.name} has none of the three basic techniques; here "
    return [use for use in uses if use.in_recipe or use in three], [
        f'{said}"all" has {", ".join(use.name for use in three)} too.'
        if of_recipe
        else f'{said}"all" is {", ".join(use.name for use in three)}.'
    ]


def full_recipes(plan: Plan) -> list[Recipe]:
    """Return a recipe of each configuration, to be run from beginning to end.

    They are called ``<recipe>.<configuration>``, and their baseline is ``<recipe>.none``.

    Raises:
        RecipeError: If a name would be too long.
    """
    recipes, problems = [], []
    baseline = f"{plan.recipe.name}.{NONE}"
    tuned = "tuned" if plan.recipe.variant == "untuned" else plan.recipe.variant
    for item in plan.configurations:
        content = item.recipe.as_json() | {
            "name": f"{plan.recipe.name}.{item.name}",
            "description": f"{plan.recipe.name} with these techniques: "
            f"{', '.join(item.techniques) or 'none'}.",
            "variant": "untuned" if item.name == NONE else tuned,
            "baseline": None if item.name == NONE else baseline,
        }
        content["training_args"]["push_to_hub"] = False
        if not content["training_args"].get("dataloader_num_workers"):  # refused without workers
            content["training_args"].pop("dataloader_multiprocessing_context", None)
        recipe, found = check_recipe(content)
        problems += found
        recipes += [recipe] if recipe else []
    if problems:
        raise RecipeError.from_problems(plan.recipe.name, list(dict.fromkeys(problems)))
    return recipes
