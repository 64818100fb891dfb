"""The search of `hfbench tune`: one technique at a time, kept if it is faster beyond noise."""

from __future__ import annotations

from typing import Any

from hfbench.comparison.ratio import Ratio
from hfbench.errors import DeviceError, HfbenchError, first_line
from hfbench.machine.failures import is_out_of_memory
from hfbench.recipe.schema import Recipe
from hfbench.results.windows import Window
from hfbench.studies.tune.decision import decide, ratio_of
from hfbench.studies.tune.memory import MemoryForecast, peak_mib
from hfbench.studies.tune.offers import (
    BATCH,
    LARGER_BATCH,
    MICRO_BATCH,
    Candidate,
    Offers,
    Subject,
    accumulation_of,
    list_techniques,
    micro_batch_of,
    setting_of,
)
from hfbench.studies.tune.schema import Measured, Trial
from hfbench.studies.tune.windows import Budget, Measure, Windows

_BLOCKS = 3  # A B B A each, of a candidate that may be faster
_FINAL_BLOCKS = 4  # of the start and the best
_RESERVED_BLOCKS = 2  # of them; the others only if there is time left
_WORTH_MORE = 1.01  # a gain below this is not looked into further


class Observer:
    """Is told what a tuning does; made to be overridden."""

    def planned(self, candidates: int, window_seconds: float, start: Window) -> None:
        """After the first windows: how many candidates there are at least, and the start."""

    def tried(self, trial: Trial) -> None:
        """After each candidate."""

    def confirming(self) -> None:
        """Before the best is measured against the start once more."""


class Search:
    """One search, step by step: `prepare`, `explore`, `confirm`.

    Attributes:
        start: What everything is compared with: the recipe, in smaller micro-batches if it does
            not fit into memory.
        best: The fastest so far.
        trials: Candidates in the order of measuring.
        windows: How they are measured.
        memory: Says what would not fit.
        final: Windows of the start and of the best, measured at the end.
        speedup: What they say.
    """

    def __init__(
        self,
        recipe: Recipe,
        subject: Subject,
        measure: Measure,
        budget: Budget,
        memory: MemoryForecast,
        observer: Observer | None = None,
    ) -> None:
        """Begin the budget.

        Args:
            recipe: To tune.
            subject: From `describe_subject`.
            measure: `Bench.measure_window`.
            budget: Time, and what may change.
            memory: Says what would not fit.
            observer: Told what is done.
        """
        self.start = self.best = recipe
        self.trials: list[Trial] = []
        self.windows = Windows(measure, budget)
        self.final: list[Measured] = []
        self.speedup: Ratio | None = None
        self.memory = memory
        self._subject, self._budget = subject, budget
        self._left = 0  # candidates that are still to come, as planned
        self._observer = observer or Observer()

    def prepare(self) -> None:
        """Measure the start, and choose how long windows are.

        Raises:
            DeviceError: If no micro-batch of the start fits into memory.
        """
        while not self._measure_start():
            pass
        techniques = list_techniques(self._budget.larger_batch).values()
        count = sum(len(list(offers(self.best, self._subject))) for offers in techniques)
        self._left = count
        self.windows.plan(count)
        self._observer.planned(count, self.windows.window_seconds, self.windows.first)

    def explore(self) -> None:
        """Try every technique in turn, each on top of the best so far."""
        for offers in list_techniques(self._budget.larger_batch).values():
            tried = [self.best]
            while (candidate := self._next(offers, tried)) is not None:
                tried.append(candidate.apply(self.best))
                self._left = max(self._left - 1, 0)
                trial = self._try(candidate)
                if trial.outcome == "taken":
                    self.best = tried[-1]
                mine = [w for w in trial.windows if w.candidate == (trial.outcome == "taken")]
                self.windows.latest = mine[-1].window if mine else self.windows.latest
                self.record(trial)

    def confirm(self) -> None:
        """Measure the best against the start, in windows that chose nothing.

        What was chosen for being the fastest was lucky too; and techniques may get in each other's
        way. If nothing is gained after all, the start is the best.
        """
        if self.best == self.start:
            return
        self._observer.confirming()
        for _ in range(_FINAL_BLOCKS):
            if self.final and not self.windows.has_time(blocks=0, final_blocks=1):
                break
            self.windows.run_block(self.start, self.best, self.windows.first, self.final)
        self.speedup = ratio_of(self.final)
        if self.speedup is not None and self.speedup.value <= 1:
            self.best = self.start
            self.trials = [_take_back(trial) for trial in self.trials]

    def _measure_start(self) -> bool:
        """Measure the start; if it does not fit into memory, make its micro-batches smaller."""
        try:
            self.windows.measure_start(self.start, self.memory)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        else:
            return True
        now, steps = micro_batch_of(self.start), accumulation_of(self.start)
        offers = list_techniques(larger_batch=False)[MICRO_BATCH](self.start, self._subject)
        smaller = [c.apply(self.start) for c in offers if c.settings[BATCH] < now]
        if not smaller:
            raise DeviceError(
                f"{self.start.name} does not fit into the memory of this machine, at {BATCH}="
                f"{now}: {message} Make it smaller."
            )
        trial = Trial(
            technique=MICRO_BATCH,
            detail=f"{now} images, {steps} of them a step, as in the recipe",
            settings={BATCH: now},
            effect="",
            outcome="out of memory",
            reason=message,
        )
        self.record(trial)
        self.start = self.best = smaller[0]
        return False

    def _next(self, offers: Offers, tried: list[Recipe]) -> Candidate | None:
        """Return the first neighbour of the best that is none of those tried."""
        for candidate in offers(self.best, self._subject):
            settings = candidate.settings.items()
            if not any(all(setting_of(r, name) == v for name, v in settings) for r in tried):
                return candidate
        return None

    def _try(self, candidate: Candidate) -> Trial:
        """Measure a candidate in turn with the best so far."""
        trial = Trial(
            technique=candidate.technique,
            detail=candidate.detail,
            settings=dict(candidate.settings),
            effect=candidate.effect,
            outcome="not measured",
        )
        refused = self._refuse(candidate)
        if refused is not None:
            return trial.model_copy(update=refused)
        windows: list[Measured] = []
        try:
            self._measure_pairs(candidate.apply(self.best), windows)
        except Exception as error:  # whatever this machine cannot do in this way
            found = "out of memory" if is_out_of_memory(error) else "failed"
            is_ours = isinstance(error, HfbenchError)  # whose problems stand below the first line
            reason = " ".join(str(error).split()) if is_ours else first_line(error)
            return trial.model_copy(update={"outcome": found, "reason": reason, "windows": windows})
        decided = decide(trial, windows)
        if self.windows.latest.first_loss is not None and any(
            item.candidate and item.window.first_loss is None for item in windows
        ):
            why = "its first loss is not finite"
            return decided.model_copy(update={"outcome": "failed", "reason": why})
        return decided

    def _refuse(self, candidate: Candidate) -> dict[str, Any] | None:
        """Say why a candidate cannot be measured: its outcome and reason."""
        if candidate.technique in (MICRO_BATCH, LARGER_BATCH):
            too_large = self._say_too_large(candidate)
            if too_large is not None:
                return {"outcome": "would not fit", "reason": too_large}
            batch = self.windows.measured_batch
            if batch is not None:
                return {"reason": f"there is time for batches of {batch} only; more --seconds"}
        if not self._has_time():
            return {"reason": f"no time left of {self._budget.seconds:.0f} s; more --seconds"}
        return None

    def _say_too_large(self, candidate: Candidate) -> str | None:
        wanted, now = candidate.settings[BATCH], micro_batch_of(self.best)
        room = self.memory.room() if wanted > now else None
        measured = micro_batch_of(self.windows.as_measured(self.best))
        needed = self.memory.estimate(measured, peak_mib(self.windows.latest), wanted)
        if room is None or needed <= room:
            return None
        return f"needs about {needed:.0f} MiB, {room:.0f} MiB are available"

    def _measure_pairs(self, recipe: Recipe, windows: list[Measured]) -> None:
        """Measure one block, and more as long as they may show a gain."""
        for number in range(_BLOCKS):
            if number and not self._has_time(self._left):
                return
            self.windows.run_block(self.best, recipe, self.windows.latest, windows)
            ratio = ratio_of(windows)
            if ratio is None or ratio.low is None or ratio.value < _WORTH_MORE or ratio.low > 1:
                return

    def _has_time(self, others: int = 0) -> bool:
        """Tell whether there is time for a block, for the end, and for one of each other."""
        return self.windows.has_time(blocks=1 + others, final_blocks=_RESERVED_BLOCKS)

    def record(self, trial: Trial) -> None:
        """Keep what became of a candidate."""
        self.trials.append(trial)
        self._observer.tried(trial)


def _take_back(trial: Trial) -> Trial:
    why = "taken at first, but all together gained nothing"
    if trial.outcome != "taken":
        return trial
    return trial.model_copy(update={"outcome": "no gain shown", "reason": why})
