"""Change a recipe for one run: ``dotted.name=value`` on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from hfbench.arguments import suggest


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
        keys = dotted.split(".")
        if not equals or not all(keys):
            problems.append(
                f'override "{override}": expected name=value, as in '
                f"training_args.num_train_epochs=1."
            )
            continue
        if problem := _unknown_path(keys, schema):
            problems.append(f'override "{override}": {problem}')
            continue
        target = content
        for key in keys[:-1]:
            if not isinstance(target.get(key), dict):
                target[key] = {}
            target = target[key]
        target[keys[-1]] = _parse_value(text)
    return problems


def _unknown_path(keys: Sequence[str], schema: type[BaseModel]) -> str | None:
    """Say why a dotted name cannot exist in a recipe; training arguments are checked later."""
    fields: Mapping[str, Any] = schema.model_fields
    for depth, key in enumerate(keys):
        if key not in fields:
            where = ".".join(keys[:depth]) or "a recipe"
            near = suggest(key, fields) or f"; it has {', '.join(fields)}."
            return f"{key} is unknown in {where}{near}"
        section = section_of(fields[key].annotation)
        if section is None:
            # A dictionary takes any key here; `check_training_args` knows its names.
            whole = depth == len(keys) - 1 or key == "training_args"
            return None if whole else f"{'.'.join(keys[: depth + 1])} has no parts."
        fields = section.model_fields
    part = f"{keys[-1]}.{next(iter(fields))}"
    return f"{'.'.join(keys)} is a whole section; set its parts, as in {part}=…"


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda constant: constant)
    except json.JSONDecodeError:
        return text


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field of a recipe holds, ``None`` for a plain value."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    found = [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if found else None
