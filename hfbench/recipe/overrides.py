"""Change a recipe for one run: ``dotted.name=value`` on the command line."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from hfbench.recipe.arguments import shown_name, suggest, takes_text_only

_LONGEST_NAME = 256  # letters of a dotted name


def apply_overrides(
    content: dict[str, Any], overrides: Iterable[str], schema: type[BaseModel]
) -> list[str]:
    """Set ``dotted.name=value`` in a recipe's content, in place.

    Args:
        content: The recipe's JSON object.
        overrides: The value of each is read as JSON, else taken as text.
        schema: Knows which names there are.

    Returns:
        One sentence for each override that cannot be applied.
    """
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if len(dotted) > _LONGEST_NAME:
            problems.append(f'override "{shown_name(override)}": there is no such name.')
            continue
        keys = dotted.split(".")
        if not equals or not all(keys):
            problems.append(
                f'override "{shown_name(override)}": expected name=value, as in '
                f"training_args.num_train_epochs=1."
            )
            continue
        if problem := _unknown_path(keys, text, schema):
            problems.append(f'override "{shown_name(override)}": {problem}')
            continue
        target = content
        for key in keys[:-1]:
            if not isinstance(target.get(key), dict):
                target[key] = {}
            target = target[key]
        value = _parse_value(text)
        # A revision of digits is text, although it could be read as a number.
        is_other = isinstance(value, bool | int | float) or value is None
        target[keys[-1]] = text if is_other and _takes_text_only(keys, value, schema) else value
    return problems


def _unknown_path(keys: Sequence[str], text: str, schema: type[BaseModel]) -> str | None:
    """Say why a dotted name cannot exist in a recipe; training arguments are checked later."""
    fields = _fields(schema)
    for depth, key in enumerate(keys):
        if key not in fields:
            where = ".".join(keys[:depth]) or "a recipe"
            near = suggest(key, fields) or f"; it has {', '.join(fields)}."
            return f"{key} is unknown in {where}{near}"
        section = section_of(fields[key].annotation)
        last = depth == len(keys) - 1
        if key == "training_args":  # `check_training_args` knows its names
            part = "set its parts, as in training_args.seed=…"
            return f"training_args is a whole section; {part}" if last else None
        if section is None:
            return None if last else f"{'.'.join(keys[: depth + 1])} has no parts."
        if last and text == "null" and type(None) in _options(fields[key]):
            return None
        fields = _fields(section)
    part = f"{keys[-1]}.{next(iter(fields))}"
    return f"{'.'.join(keys)} is a whole section; set its parts, as in {part}=…"


def _takes_text_only(keys: Sequence[str], value: Any, schema: type[BaseModel]) -> bool:
    """Tell whether a field takes text, but not this number, truth value or null."""
    if keys[0] == "training_args":
        return len(keys) == 2 and value is not None and takes_text_only(keys[1])
    section: type[BaseModel] | None = schema
    for key in keys[:-1]:
        section = section_of(_fields(section)[key].annotation) if section else None
    options = _options(_fields(section)[keys[-1]]) if section else ()
    return str in options and not (value is None and type(None) in options)


def _options(field: Any) -> tuple[Any, ...]:
    return typing.get_args(field.annotation) or (field.annotation,)


def _fields(schema: type[BaseModel]) -> dict[str, Any]:
    """Return a section's fields by the names that stand in JSON."""
    return {field.alias or name: field for name, field in schema.model_fields.items()}


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda constant: constant)
    except (ValueError, RecursionError):
        return text


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field of a recipe holds, ``None`` for a plain value."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    found = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if found else None
