"""Measure what performance tuning buys when a Hugging Face image classifier is fine-tuned.

The public door is three functions: `load_recipe` reads one experiment, `run_recipe` runs it,
`compare` sets a result against its baseline. They are imported when first used, so that ``import
hfbench`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfbench.comparison import Comparison, compare
    from hfbench.recipe import Recipe, load_recipe
    from hfbench.result import Result, load_result
    from hfbench.runner import run_recipe

    __version__: str

_HOMES = {
    "Comparison": "hfbench.comparison",
    "compare": "hfbench.comparison",
    "Recipe": "hfbench.recipe",
    "load_recipe": "hfbench.recipe",
    "Result": "hfbench.result",
    "load_result": "hfbench.result",
    "run_recipe": "hfbench.runner",
}

__all__ = [
    "Comparison",
    "Recipe",
    "Result",
    "__version__",
    "compare",
    "load_recipe",
    "load_result",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name == "__version__":
        metadata = import_module("importlib.metadata")
        try:
            return metadata.version("hfbench")
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
