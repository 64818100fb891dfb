"""The windows of `hfbench tune`: how long they are, and whether there is time for more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import is_compiled, not_compiled
from hfbench.results.windows import Window
from hfbench.studies.ablation.measure import steps_of, warmup_steps_of
from hfbench.studies.tune.decision import ratio_of
from hfbench.studies.tune.memory import MemoryForecast, peak_mib
from hfbench.studies.tune.offers import accumulation_of, micro_batch_of
from hfbench.studies.tune.schema import Measured
from hfbench.studies.windows import with_arguments

Measure = Callable[[int, int, Recipe], Window]  # as `Bench.measure_window`

_BATCH, _STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"
_PILOT_BATCH = 4
_EVALUATION_SHARE = 0.1  # of the time, for evaluations at the end
_UPDATE_SHARE = 0.01  # of the time, for one optimizer step: about a hundred are made
_QUICK_SECONDS = 0.25  # of an optimizer step that is never made smaller
_LONGEST_SECONDS = 5.0  # of a window
_FEWEST_STEPS = 2
_SLOW_SECONDS = 0.2  # of a step that needs no second one, neither to warm up nor to measure
BLOCK = (False, True, True, False)  # whether the candidate's: a drift hits both sides alike
_PLANNED_WINDOWS = 7  # of a candidate: one block, some need two
_HOPELESS = 2 / 3  # a candidate that makes less than this in its first pair is not measured again


@dataclass(frozen=True)
class Budget:
    """What a search may take.

    Attributes:
        seconds: For measuring.
        larger_batch: Whether the effective batch may change.
        clock: Gives seconds; of the same kind as the windows' own.
    """

    seconds: float
    larger_batch: bool = False
    clock: Callable[[], float] = time.perf_counter


class Windows:
    """Windows within a budget.

    Attributes:
        measured_batch: Images of a batch if it has to be smaller to be measured in time.
        window_seconds: Length of a window.
        first: The first window of the start.
        latest: The latest window of the best recipe so far.
    """

    def __init__(self, measure: Measure, budget: Budget) -> None:
        """Begin the budget.

        Args:
            measure: `Bench.measure_window`.
            budget: Time.
        """
        self.measured_batch: int | None = None
        self.window_seconds = 0.0
        self.first: Window
        self.latest: Window
        self._measure, self._budget = measure, budget
        self._end = budget.clock() + budget.seconds
        self._deadline = self._end - _EVALUATION_SHARE * budget.seconds
        self._overhead = 0.0  # of a window: building a trainer, and what it frees

    def measure_start(self, start: Recipe, memory: MemoryForecast) -> None:
        """Measure a recipe in growing batches, so that a slow machine is found out soon.

        Args:
            start: The recipe that everything begins with.
            memory: Learns what part of it grows with the images.

        Raises:
            Exception: That `is_out_of_memory` knows, if it does not fit.
        """
        affordable = max(self._budget.seconds * _UPDATE_SHARE, _QUICK_SECONDS)
        batch, steps = micro_batch_of(start), accumulation_of(start)
        size, fits = 0, min(batch, _PILOT_BATCH)
        while size < fits and (size == 0 or 1.5 * size < fits < batch):
            size = fits
            window = self._measure(1, 1, _small(start, size))
            fits = min(batch, max(int(affordable * size / window.seconds), 2))
        small = (size, peak_mib(window))
        if fits == batch and size < batch:
            window = self._measure(1, 1, _small(start, batch))
            memory.learn(small, (batch, peak_mib(window)))
        too_long = window.seconds * steps > affordable and steps > 1
        self.measured_batch = fits if fits < batch or too_long else None
        self.latest = window
        self.first = self.latest = self._run(start, self._fewest_steps)

    def plan(self, candidates: int) -> None:
        """Choose how long windows are, so that about so many candidates can be measured."""
        windows = _PLANNED_WINDOWS * candidates + 2 * len(BLOCK)
        each = (self._deadline - self._budget.clock()) / windows - self._cost_beside(self.first)
        shortest = self._fewest_steps * self.latest.seconds_per_step
        self.window_seconds = max(min(each, _LONGEST_SECONDS), shortest)

    def has_time(self, blocks: int, final_blocks: int = 0) -> bool:
        """Tell whether there is time for more.

        Args:
            blocks: Of the best so far and a candidate.
            final_blocks: Of the start and the best.
        """
        now, first = (self.window_seconds + self._cost_beside(w) for w in (self.latest, self.first))
        needed = len(BLOCK) * (blocks * now + final_blocks * first)
        return self._budget.clock() + needed <= self._deadline

    def has_seconds(self, seconds: float) -> bool:
        """Tell whether there is as much time left, that for evaluations included."""
        return self._budget.clock() + seconds <= self._end

    def run_block(
        self, best: Recipe, candidate: Recipe, pace: Window, windows: list[Measured]
    ) -> None:
        """Measure A B B A, and only A B if the candidate is far behind.

        Args:
            best: A.
            candidate: B; sees as many images.
            pace: An earlier window of A.
            windows: Are added here, one by one.
        """
        steps = max(self._fewest_steps, math.ceil(self.window_seconds / pace.seconds_per_step))
        for is_candidate in BLOCK:
            recipe = candidate if is_candidate else best
            own = steps_of(self.as_measured(recipe), self.as_measured(best), steps)
            windows.append(Measured(candidate=is_candidate, window=self._run(recipe, own)))
            ratio = ratio_of(windows)
            if ratio is not None and ratio.rounds == 1 and ratio.value < _HOPELESS:
                return

    def as_measured(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the batch that there is time for."""
        if self.measured_batch is None:
            return recipe
        return with_arguments(recipe, **{_BATCH: self.measured_batch, _STEPS: 1})

    @property
    def _is_slow(self) -> bool:
        return self.latest.seconds_per_step > _SLOW_SECONDS

    @property
    def _fewest_steps(self) -> int:
        return 1 if self._is_slow else _FEWEST_STEPS

    def _run(self, recipe: Recipe, steps: int) -> Window:
        started = self._budget.clock()
        warmup = warmup_steps_of(recipe)
        if self._is_slow and not is_compiled(recipe):
            warmup = 1
        window = self._measure(steps, warmup, self.as_measured(recipe))
        inside = (steps + warmup) * window.seconds_per_step
        self._overhead = max(self._budget.clock() - started - inside, 0.0)
        return window

    def _cost_beside(self, window: Window) -> float:
        """Return what a window costs beside its measured steps."""
        return window.warmup_steps * window.seconds_per_step + self._overhead


def _small(recipe: Recipe, size: int) -> Recipe:
    """Return a recipe in small batches, and not compiled for them."""
    return with_arguments(recipe, **{_BATCH: size, _STEPS: 1}, **not_compiled(recipe))
