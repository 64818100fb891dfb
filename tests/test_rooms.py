"""Which room a module is in, and that only the command line prints: what linters do not see."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hfbench

ROOT = Path(hfbench.__file__).parent
ROOMS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))


def test_package_has_few_entries() -> None:
    names = [path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__pyc"))]
    assert len(names) <= 15, sorted(names)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_room_says_what_it_is_for(room: Path) -> None:
    tree = ast.parse((room / "__init__.py").read_text("utf-8"))
    assert ast.get_docstring(tree)


def test_no_module_is_called_like_a_public_function() -> None:
    modules = {path.stem for path in ROOT.glob("*")}
    functions = {name for name in hfbench.__all__ if name[0].islower() and name[0] != "_"}
    assert not modules & functions
