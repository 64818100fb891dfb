"""Measure what performance tuning buys when a Hugging Face image classifier is fine-tuned.

The public door is functions: `load_recipe` reads one experiment, `run_recipe` runs it, `run_suite`
runs many, `compare` gives the verdict, `ablate` and `examine` say what each technique contributes
and what limits a recipe, `tune` finds its fastest settings, `write_report` shows everything. They
are imported when first used, so that ``import hfbench`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfbench.comparison.comparison import Comparison, compare
    from hfbench.comparison.repeats import select_repeats
    from hfbench.recipe.schema import Recipe, load_recipe
    from hfbench.report import write_report
    from hfbench.results.schema import Result, load_result, load_results
    from hfbench.studies.ablation.measure import ablate
    from hfbench.studies.doctor.examine import examine
    from hfbench.studies.suite.run import run_suite
    from hfbench.studies.tune.tuning import tune
    from hfbench.training.run import run_recipe

    __version__: str

_HOMES = {
    "ablate": "hfbench.studies.ablation.measure",
    "Comparison": "hfbench.comparison.comparison",
    "compare": "hfbench.comparison.comparison",
    "examine": "hfbench.studies.doctor.examine",
    "Recipe": "hfbench.recipe.schema",
    "load_recipe": "hfbench.recipe.schema",
    "Result": "hfbench.results.schema",
    "load_result": "hfbench.results.schema",
    "load_results": "hfbench.results.schema",
    "run_recipe": "hfbench.training.run",
    "run_suite": "hfbench.studies.suite.run",
    "select_repeats": "hfbench.comparison.repeats",
    "tune": "hfbench.studies.tune.tuning",
    "write_report": "hfbench.report",
}

__all__ = [
    "Comparison",
    "Recipe",
    "Result",
    "__version__",
    "ablate",
    "compare",
    "examine",
    "load_recipe",
    "load_result",
    "load_results",
    "run_recipe",
    "run_suite",
    "select_repeats",
    "tune",
    "write_report",
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
