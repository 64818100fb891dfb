from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

import hfbench


def is_installed() -> bool:
    try:
        version("hfbench")
    except PackageNotFoundError:
        return False
    return True


needs_installation = pytest.mark.skipif(
    not is_installed(), reason="the version is that of the installed package"
)


@pytest.mark.parametrize("name", sorted({*hfbench.__all__} - {"__version__"}))
def test_public_name_can_be_had_from_the_package(name: str) -> None:
    assert getattr(hfbench, name) is not None


def test_public_functions_are_those_of_their_modules() -> None:
    from hfbench.comparison.comparison import compare
    from hfbench.recipe.schema import load_recipe
    from hfbench.training.run import run_recipe

    assert hfbench.load_recipe is load_recipe
    assert hfbench.compare is compare
    assert hfbench.run_recipe is run_recipe


@needs_installation
def test_version_is_the_one_that_is_installed() -> None:
    assert hfbench.__version__ == version("hfbench")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hfbench' has no attribute 'load_recipes'"):
        _ = hfbench.load_recipes


@needs_installation
def test_star_import_brings_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from hfbench import *", namespace)

    assert set(hfbench.__all__) <= set(namespace)


def test_import_and_a_look_at_the_recipes_load_nothing_heavy() -> None:
    code = (
        "import sys, hfbench, hfbench.cli.app; from hfbench.recipe.schema import shipped_recipes; "
        "shipped_recipes(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    heavy = {"torch", "transformers", "datasets", "evaluate", "timm", "sklearn", "matplotlib"}
    assert heavy & set(done.stdout.split()) == set()
