"""Find the fastest settings of a recipe on this machine, and write them as a recipe."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

from hfbench.errors import Interrupted
from hfbench.machine.environment import describe_environment
from hfbench.machine.settings import alone, quick_collections
from hfbench.recipe.rechecking import output_folder, recheck
from hfbench.recipe.schema import Recipe
from hfbench.studies.tune.evaluation import explore_evaluation, measure_evaluation
from hfbench.studies.tune.memory import MemoryForecast, resident_mib
from hfbench.studies.tune.offers import describe_subject, say_inapplicable
from hfbench.studies.tune.outcome import describe_search
from hfbench.studies.tune.schema import Tuning, check_output, measurements_file, write_tuning
from hfbench.studies.tune.search import Observer, Search
from hfbench.studies.tune.windows import Budget
from hfbench.studies.windows import Bench

SECONDS = 90.0


def tune(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    seconds: float = SECONDS,
    larger_batch: bool = False,
    memory_mib: float | None = None,
    force: bool = False,
    observer: Observer | None = None,
) -> Tuning:
    """Find the fastest settings of a recipe on this machine, and write them as a recipe.

    One technique after the other is changed in the best recipe so far, and kept if it makes more
    images a second in windows that take turns with those of the best so far, beyond noise. So
    combinations are not searched: two changes that pay only together are not found. What was kept
    is measured against the start once more.

    Args:
        recipe: From `load_recipe`.
        output: The recipe's file; the measurements go beside it.
        seconds: For measuring; loading comes on top. Whatever does not fit is not measured.
        larger_batch: Try larger effective batches too; the learning rate stays as it is.
        memory_mib: That training may take: device memory on an accelerator, else the process's
            whole memory. By default what is free.
        force: Write over files that are there.
        observer: Told what is done.

    Returns:
        What was found, as written beside the recipe.

    Raises:
        HfbenchError: For everything that the user can mend, before measuring where possible.
        Interrupted: After Ctrl-C; the best so far is written.
    """
    recipe, target = recheck(recipe), output_folder(output, "output")
    check_output(recipe, target, None, force)
    with alone("tune"), quick_collections():
        bench = Bench(recipe)
        return _search(bench, recipe, target, Budget(seconds, larger_batch), memory_mib, observer)


def _search(
    bench: Bench,
    recipe: Recipe,
    output: Path,
    budget: Budget,
    memory_mib: float | None,
    observer: Observer | None,
) -> Tuning:
    subject = describe_subject(bench)
    on_accelerator = subject.device_type not in ("cpu", "mps")
    base = 0.0 if on_accelerator else resident_mib()
    memory = MemoryForecast(base, memory_mib, on_accelerator)
    started = time.perf_counter()
    search = Search(recipe, subject, bench.measure_window, budget, memory, observer)
    search.prepare()
    stopped = False
    try:
        search.explore()
        search.confirm()
        evaluate = partial(measure_evaluation, bench)
        explore_evaluation(search, evaluate, len(bench.inputs.test))
    except KeyboardInterrupt:
        stopped = True
    tried = {trial.technique for trial in search.trials}
    idle = say_inapplicable(search.best, subject, budget.larger_batch)
    tuning = describe_search(
        search,
        recipe,
        describe_environment(subject.device_type),
        budget_seconds=budget.seconds,
        seconds=time.perf_counter() - started,
        not_applicable={name: why for name, why in idle.items() if name not in tried},
        stopped=stopped,
    )
    write_tuning(tuning, output)
    if stopped:
        raise Interrupted(
            f"Stopped; candidates measured: {len(tuning.trials)}. The best so far is in {output}, "
            f"what was measured in {measurements_file(output)}."
        )
    return tuning
