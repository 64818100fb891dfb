"""Recipes and folders from Python, checked as those of the command line are.

Pydantic's ``model_copy(update=…)`` and ``model_construct`` check nothing, a recipe's dictionaries
can be changed in place, and a sweep brings numpy's numbers. What a function is given is read anew,
before anything is loaded, with the messages that a file gets.
"""

from __future__ import annotations

import enum
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hfbench.errors import RecipeError
from hfbench.recipe.schema import Recipe, check_recipe, local_path

_DEPTH = 20  # of lists and objects within each other; no setting needs more


def recheck(recipe: Recipe) -> Recipe:
    """Return a recipe as a file of the same content would give it.

    Numbers of numpy and torch, paths and tuples become what JSON has for them, and objects in the
    place of sections become sections.

    Raises:
        RecipeError: With everything that is wrong with it.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"Expected a recipe from load_recipe, found {_kind(recipe)}. Write: "
            'load_recipe("FILE_OR_NAME", ["NAME=VALUE", …])'
        )
    problems: list[str] = []
    content = _as_json(recipe, "", 0, problems)
    name = content.get("name")
    source = name if isinstance(name, str) and name else "The recipe"
    if not problems:
        checked, problems = check_recipe(content)
        if checked is not None and not problems:
            return checked
    raise RecipeError.from_problems(source, problems)


def recheck_all(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Return several recipes, each as `recheck` does.

    Raises:
        RecipeError: With everything that is wrong with all of them.
    """
    if isinstance(recipes, Recipe | str | Mapping):
        raise RecipeError(f"Expected a list of recipes, found {_kind(recipes)}.")
    found, problems = [], []
    for recipe in recipes:
        try:
            found.append(recheck(recipe))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    if not found:
        raise RecipeError("There is no recipe to run; the list is empty.")
    return found


def output_folder(path: str | os.PathLike[str], argument: str = "output_dir") -> Path:
    """Return a place to write to as a path, ``~`` expanded, as it is where results are read.

    Raises:
        RecipeError: If it is no path, or an empty one.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise RecipeError(f"{argument}: expected a path, found {_kind(path)}.")
    if not str(path).strip():
        raise RecipeError(f'{argument}: found "{path}", expected a path; "." is this folder.')
    if "\0" in str(path):
        raise RecipeError(f"{argument}: a path cannot hold the character NUL.")
    return local_path(path)


def _as_json(value: Any, where: str, depth: int, problems: list[str]) -> Any:
    """Return what a JSON file would hold for a value; note what it could not hold."""
    if depth > _DEPTH:
        problems.append(f"{where}: lists and objects within each other, {_DEPTH} deep and more.")
        return None
    if isinstance(value, enum.Enum):
        value = value.value
    if callable(getattr(value, "item", None)) and getattr(value, "shape", None) == ():
        value = value.item()  # a number of numpy or torch
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        value = {
            (fields[name].alias or name) if name in fields else name: part
            for name, part in value.__dict__.items()
        }
    if isinstance(value, Mapping):
        return {
            str(key): _as_json(part, f"{where}.{key}" if where else str(key), depth + 1, problems)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [
            _as_json(part, f"{where}[{number}]", depth + 1, problems)
            for number, part in enumerate(value)
        ]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    problems.append(f"{where}: found {_kind(value)}, which a recipe cannot hold.")
    return None


def _kind(value: Any) -> str:
    kind = type(value)
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    return f"a value of type {module}{kind.__qualname__}"
