"""What each technique of a recipe contributes, measured in short interleaved windows of steps."""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from torch._dynamo.exc import TorchDynamoException

from hfbench.errors import DeviceError, HfbenchError, Interrupted, first_line
from hfbench.machine.environment import describe_environment
from hfbench.machine.failures import is_out_of_memory
from hfbench.machine.settings import alone, quick_collections
from hfbench.recipe.rechecking import output_folder, recheck
from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import is_compiled
from hfbench.results.schema import write_json
from hfbench.results.windows import FirstLoss, Window
from hfbench.studies.ablation.analysis import (
    batch_size_of,
    describe_rows,
    say_findings,
    say_verdict,
)
from hfbench.studies.ablation.gains import Gains, speeds_of
from hfbench.studies.ablation.plan import NONE, Configuration, Plan, plan_ablation
from hfbench.studies.ablation.plots import CSV_FILE, PLOT_FILE, plot_ablation, write_csv
from hfbench.studies.ablation.schema import (
    ABLATION_FILE,
    Ablation,
    Measured,
    NotMeasured,
    load_ablation,
    make_ablation_folder,
)
from hfbench.studies.first_loss import CHECK_STEPS, check_first_loss, precision_of
from hfbench.studies.windows import Bench
from hfbench.training.run import find_unwritable

ROUNDS = 5

_BATCH = "per_device_train_batch_size"
_PILOT_STEPS = 3
_WINDOW_SECONDS = (2.0, 20.0)  # at least, and at most if steps are slow
_WINDOW_STEPS = (10, 3)  # at least, and at least if steps are slow
_WARMUP_STEPS = 2
_COMPILED_WARMUP_STEPS = 4  # a graph may be compiled anew when a second step looks different


class Observer:
    """Is told what an ablation does; made to be overridden."""

    def planned(self, plan: Plan, steps: int, rounds: int, seconds: float) -> None:
        """Before anything is measured: the plan, steps of ``none``, and how long it may take."""

    def checked(self, configuration: Configuration, first_loss: FirstLoss | None) -> None:
        """After the first loss of a configuration; ``None`` if it failed."""

    def measured(self, configuration: Configuration, round_number: int, window: Window) -> None:
        """After each window; rounds count from 1."""


@dataclass
class _Session:
    """What has been found so far."""

    bench: Bench
    plan: Plan
    steps: int
    rounds: int
    folder: Path
    started: float
    windows: list[Measured] = field(default_factory=list)
    first_losses: dict[str, FirstLoss] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def ablate(
    recipe: Recipe,
    output_dir: str | os.PathLike[str] = "runs",
    *,
    steps: int | None = None,
    rounds: int = ROUNDS,
    observer: Observer | None = None,
) -> Ablation:
    """Measure none, each technique alone, all but each, and all, and say what each contributes.

    Each round measures every configuration once, in random order, so that drift of the machine
    favours none; ratios are taken within a round and judged together.

    Args:
        recipe: From `load_recipe`.
        output_dir: Everything goes into ``output_dir/ablations/<recipe name>/<id>``.
        steps: Optimizer steps of a window of ``none``; other configurations see as many images. By
            default enough for 2 s and at least 10, fewer if steps are slow.
        rounds: At least 2 for an interval.
        observer: Told what is done.

    Returns:
        The ablation, as saved in ``ablation.json``.

    Raises:
        HfbenchError: For everything that the user can mend, before measuring where possible.
        Interrupted: After Ctrl-C; what was measured is saved.
    """
    recipe, root = recheck(recipe), output_folder(output_dir)
    with alone("ablate"), quick_collections():
        return _ablate(recipe, root, steps, rounds, observer or Observer())


def _ablate(
    recipe: Recipe, root: Path, steps: int | None, rounds: int, observer: Observer
) -> Ablation:
    started = time.perf_counter()
    unwritable = find_unwritable(root)
    if unwritable:
        raise DeviceError.from_problems(recipe.name, unwritable)
    plan = plan_ablation(recipe)
    bench = Bench(recipe)
    none = plan.find(NONE)
    pilot_started = time.perf_counter()
    try:
        pilot = bench.measure_window(_PILOT_STEPS, _WARMUP_STEPS, none.recipe)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = recipe.argument(_BATCH)
        raise DeviceError(
            f"{bench.device} ran out of memory without any technique, at "
            f"per_device_train_batch_size={size}: {first_line(error)} Make it smaller."
        ) from error
    overhead = time.perf_counter() - pilot_started - pilot.seconds
    steps = steps or choose_steps(pilot.seconds_per_step)
    seconds = _estimate(plan, pilot, overhead, steps, rounds)
    observer.planned(plan, steps, rounds, seconds)
    folder = make_ablation_folder(recipe, root)
    session = _Session(bench, plan, steps, rounds, folder, started)
    try:
        _check_first_losses(session, observer)
        for number in range(1, rounds + 1):
            _measure_round(session, number, observer)
            _save(session)  # a kill loses one round at most
    except KeyboardInterrupt:
        done = _finish(session)
        raise Interrupted(
            f"Stopped after {done.finished_rounds} of {rounds} rounds; what was measured is in "
            f"{folder}."
        ) from None
    return _finish(session)


def choose_steps(seconds_per_step: float) -> int:
    """Return how many steps a window of ``none`` takes.

    Enough for 2 s and at least 10; if that took more than 20 s, what fits into these, at least 3.
    """
    shortest, longest = _WINDOW_SECONDS
    many, few = _WINDOW_STEPS
    wanted = max(many, math.ceil(shortest / seconds_per_step))
    return max(few, min(wanted, math.ceil(longest / seconds_per_step)))


def steps_of(recipe: Recipe, none: Recipe, steps: int) -> int:
    """Return the optimizer steps in which a recipe sees as many images as ``none`` in `steps`."""
    return max(1, math.ceil(steps * batch_size_of(none) / batch_size_of(recipe)))


def warmup_steps_of(recipe: Recipe) -> int:
    """Return how many steps come before a window, more if the model is compiled."""
    return _COMPILED_WARMUP_STEPS if is_compiled(recipe) else _WARMUP_STEPS


def _estimate(plan: Plan, pilot: Window, overhead: float, steps: int, rounds: int) -> float:
    """Return seconds, as if no technique gained anything and compiling were free."""
    per_image = pilot.seconds / pilot.samples
    none = plan.find(NONE).recipe
    total = 0.0
    for item in plan.configurations:
        own = steps_of(item.recipe, none, steps) + warmup_steps_of(item.recipe)
        images = own * batch_size_of(item.recipe)
        check = CHECK_STEPS * batch_size_of(item.recipe) * per_image + overhead
        total += rounds * (images * per_image + overhead) + check
    return total


def _check_first_losses(session: _Session, observer: Observer) -> None:
    for item in session.plan.configurations:
        try:
            precision = precision_of(item.recipe, session.bench.device)
            found = check_first_loss(session.bench, item.recipe, precision)
            session.first_losses[item.name] = found
        except Exception as error:
            _fail(session, item, error)
        observer.checked(item, session.first_losses.get(item.name))


def _measure_round(session: _Session, number: int, observer: Observer) -> None:
    items = list(session.plan.configurations)
    # Random order: in any fixed one, some configuration would run late in most rounds, and a
    # machine that slows down would look like its effect.
    random.Random(f"{session.folder.name} {number}").shuffle(items)
    none = session.plan.find(NONE).recipe
    for position, item in enumerate(items, start=1):
        if item.name in session.failures:
            continue
        own = steps_of(item.recipe, none, session.steps)
        try:
            window = session.bench.measure_window(own, warmup_steps_of(item.recipe), item.recipe)
        except Exception as error:
            _fail(session, item, error)
            continue
        session.windows.append(
            Measured(configuration=item.name, round=number, position=position, window=window)
        )
        observer.measured(item, number, window)


def _fail(session: _Session, item: Configuration, error: Exception) -> None:
    """Go on without a configuration that this machine cannot run; a bug keeps its traceback."""
    lacks_memory = is_out_of_memory(error)
    expected = lacks_memory or isinstance(error, TorchDynamoException | HfbenchError)
    if item.name == NONE or not expected:
        raise error
    kind = "out of memory: " if lacks_memory else ""
    session.failures[item.name] = f"{kind}{first_line(error)}"


def _finish(session: _Session) -> Ablation:
    ablation = _save(session)
    if ablation.windows:
        plot_ablation(ablation, session.folder / PLOT_FILE)
    return load_ablation(session.folder)


def _save(session: _Session) -> Ablation:
    """Write what has been found so far."""
    plan, windows = session.plan, session.windows
    gains = Gains(plan, speeds_of(windows))
    rows = describe_rows(plan, windows, gains, session.first_losses, session.failures)
    contributions = gains.contributions()
    measured = [item.name for item in plan.configurations if item.name not in session.failures]
    seen = {(item.round, item.configuration) for item in windows}
    finished = sum(
        all((number, name) in seen for name in measured) for number in range(1, session.rounds + 1)
    )
    notes = list(plan.notes)
    images, batch = len(session.bench.inputs.train), plan.recipe.argument(_BATCH)
    if images < batch:
        notes.append(
            f"{images} training images do not fill a batch of {batch}: windows repeat them, where "
            "a run has smaller batches."
        )
    if finished < session.rounds:
        notes.append(f"Stopped after {finished} of {session.rounds} rounds.")
    notes.append(
        "Speeds are images per second. Accumulation with a larger batch takes fewer optimizer "
        "steps for the same images; what that does to accuracy needs full runs: --full."
    )
    ablation = Ablation(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=plan.recipe,
        recipe_sha256=plan.recipe.digest(),
        environment=describe_environment(session.bench.device.type),
        rounds=session.rounds,
        finished_rounds=finished,
        steps=session.steps,
        seconds=time.perf_counter() - session.started,
        verdict=say_verdict(rows, contributions),
        findings=say_findings(rows, contributions),
        notes=notes,
        rows=rows,
        contributions=contributions,
        not_run=[NotMeasured(technique=i.technique, reason=i.reason) for i in plan.not_run],
        windows=windows,
    )
    write_json(ablation.model_dump(mode="json", by_alias=True), session.folder / ABLATION_FILE)
    write_csv(ablation, session.folder / CSV_FILE)
    return ablation
