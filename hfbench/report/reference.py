"""The two tables of the README that the shipped recipes follow, its numbers beside ours."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hfbench.recipe.schema import Recipe, ReferenceSection, load_recipe, shipped_recipes
from hfbench.report import cells
from hfbench.report.document import NOT_GIVEN, Block, Bullets, Cell, Column, Section, Table
from hfbench.report.sets import RunSet, last_part
from hfbench.results.schema import Result

# Data set -> its number of classes, by which CIFAR-100's coarse labels are told apart.
_DATASETS = {"CIFAR-10": 10, "CIFAR-100": 100}
_SOURCE = Column("our runs", "runs", numeric=False)
# Of no account for what is measured, or told in the table's own columns.
_NO_CHANGE = ("$schema", "name", "description", "variant", "baseline", "reference")


def reference_section(sets: Sequence[RunSet]) -> Section:
    """Set the reference's numbers beside ours, for every shipped recipe that has such a table."""
    recipes = _recipes()
    blocks: list[Block] = []
    notes: list[str] = []
    for dataset in _DATASETS:
        rows = []
        for recipe in recipes:
            if _dataset_of(recipe) == dataset:
                rows += _rows(recipe, dataset, sets, notes)
        blocks.append(_table(dataset, rows))
    sources = {recipe.reference.source for recipe in recipes if recipe.reference}
    notes = [f"Reference: {source}." for source in sorted(sources)] + notes
    blocks.append(Bullets(list(dict.fromkeys(notes))))
    changes = [
        row
        for recipe in recipes
        for found in sets
        if _dataset_of(recipe) and _is_of(found, recipe)
        for row in _changes(recipe, found)
    ]
    if changes:
        blocks.append(_changes_table(changes))
    return Section("Against the reference", "reference", blocks)


def has_reference(found: RunSet) -> bool:
    """Tell whether a set stands in one of the tables."""
    return any(_dataset_of(recipe) and _is_of(found, recipe) for recipe in _recipes())


def _recipes() -> list[Recipe]:
    """Return the shipped recipes, each model untuned first."""
    recipes = [load_recipe(path) for path in shipped_recipes().values()]
    order = ("untuned", "tuned", "fast")
    return sorted(recipes, key=lambda item: (item.model.name_or_path, order.index(item.variant)))


def _dataset_of(recipe: Recipe) -> str | None:
    """Return whose table a recipe stands in; ``None`` if in neither."""
    name = re.sub("[^a-z0-9]", "", last_part(recipe.dataset.name_or_path).lower())
    if name.startswith("cifar100"):
        return "CIFAR-100"
    return "CIFAR-10" if name.startswith("cifar10") else None


def _is_of(found: RunSet, recipe: Recipe) -> bool:
    """Tell whether a set was run on the model and data of a shipped recipe, in its variant."""
    dataset = _dataset_of(recipe)
    return (
        found.model == last_part(recipe.model.name_or_path)
        and _dataset_of(found.recipe) == dataset
        and len(found.newest.data.label_names) == _DATASETS.get(str(dataset))
        and found.recipe.variant == recipe.variant
    )


def _table(dataset: str, rows: list[list[Cell]]) -> Table:
    if dataset == "CIFAR-10":
        measures = [("accuracy", "accuracy"), ("F1", "f1_macro")]
    else:
        measures = [("train accuracy", "train_accuracy"), ("test accuracy", "accuracy")]
    columns = [Column("model", "model", numeric=False), Column("variant", "variant", numeric=False)]
    for title, name in (*measures, ("execution time", "execution_seconds")):
        columns += [
            Column(f"{title}, reference", f"reference_{name}"),
            Column(f"{title}, ours", name),
        ]
    return Table(
        name=f"reference_{dataset.lower().replace('-', '')}",
        caption=f"{dataset}: the reference's numbers, which are tuned runs on hardware that it "
        "does not state, beside our means; in brackets the lowest and the highest of n runs. Times "
        "on different hardware do not compare.",
        columns=[*columns, _SOURCE],
        rows=rows,
    )


def _changes_table(rows: list[list[Cell]]) -> Table:
    return Table(
        "not_as_shipped",
        "Where our runs in these tables deviate from the shipped recipes.",
        [
            Column("recipe", "set", numeric=False),
            Column("setting", "setting", numeric=False),
            Column("shipped", "shipped", numeric=False),
            Column("run", "run", numeric=False),
        ],
        rows,
    )


def _rows(
    recipe: Recipe, dataset: str, sets: Sequence[RunSet], notes: list[str]
) -> list[list[Cell]]:
    found = [item for item in sets if _is_of(item, recipe)]
    theirs = _theirs(recipe.reference, dataset)
    if recipe.reference and recipe.reference.note:
        notes.append(f"{recipe.name}: {recipe.reference.note}")
    name = [Cell(last_part(recipe.model.name_or_path)), Cell(recipe.variant)]
    if not found:
        ours = [cells.not_run()] * 3
        return [[*name, *_interleaved(theirs, ours), cells.not_run()]]
    rows = []
    for item in found:
        where = f"{item.label}, n = {item.n}, machine {item.machine}"
        if _changes(recipe, item):
            where += ", not as shipped"
        rows.append([*name, *_interleaved(theirs, _ours(item, dataset)), Cell(where)])
    return rows


def _theirs(reference: ReferenceSection | None, dataset: str) -> list[Cell]:
    if reference is None:
        return [Cell(NOT_GIVEN)] * 3
    test = cells.given_share(reference.accuracy)
    time = cells.given_seconds(reference.execution_seconds)
    if dataset == "CIFAR-10":
        return [test, cells.given_share(reference.f1), time]
    return [cells.given_share(reference.train_accuracy), test, time]


def _ours(found: RunSet, dataset: str) -> list[Cell]:
    test = cells.share(found.share(_test_accuracy))
    time = cells.seconds(found.amount(lambda result: result.times.execution_seconds))
    if dataset == "CIFAR-10":
        return [test, cells.share(found.share(_test_f1)), time]
    return [cells.share(found.share(_train_accuracy)), test, time]


def _test_accuracy(result: Result) -> float | None:
    return result.metrics.test.accuracy if result.metrics.test else None


def _test_f1(result: Result) -> float | None:
    return result.metrics.test.f1_macro if result.metrics.test else None


def _train_accuracy(result: Result) -> float | None:
    return result.metrics.train.accuracy if result.metrics.train else None


def _interleaved(theirs: Sequence[Cell], ours: Sequence[Cell]) -> list[Cell]:
    return [cell for pair in zip(theirs, ours, strict=True) for cell in pair]


def _changes(shipped: Recipe, found: RunSet) -> list[list[Cell]]:
    """Return a row for each setting in which a run deviates from the shipped recipe, but seeds."""
    one, two = (_settings(recipe) for recipe in (shipped, found.recipe))
    rows = []
    for name in dict.fromkeys([*one, *two]):
        if one.get(name) == two.get(name):
            continue
        before, after = (cells.setting(name, settings.get(name)) for settings in (one, two))
        if before == after:  # a local copy, which may not be to the bit what the Hub has
            before, after = Cell(str(one[name])), Cell(f"{after.text}, a local copy")
        rows.append([Cell(found.label), Cell(name), before, after])
    return rows


def _settings(recipe: Recipe) -> dict[str, object]:
    content = recipe.as_json()
    flat: dict[str, object] = {}
    for section, values in content.items():
        if section in _NO_CHANGE:
            continue
        flat |= {f"{section}.{name}": value for name, value in values.items() if name != "seed"}
    return flat
