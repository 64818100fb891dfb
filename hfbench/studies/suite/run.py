"""Many runs, measured fairly: one process each, interleaved, and resumable at any point.

The folders of the runs are the only memory: what is finished is found there, and what was killed is
gone on with. This process imports neither torch nor transformers, so that it takes nothing from the
machine that the runs are measured on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hfbench.errors import Interrupted, ResultError
from hfbench.machine.launched import check_alone
from hfbench.recipe.rechecking import output_folder, recheck_all
from hfbench.recipe.schema import Recipe
from hfbench.results.folder import Matches, is_held, match_runs, tidy_up
from hfbench.results.schema import Result, find_runs, write_json
from hfbench.studies.suite.plan import (
    Plan,
    PlannedRun,
    plan_runs,
    repeat_recipes,
    unique,
)
from hfbench.studies.suite.processes import RunProcess, StopRequests, last_lines, say_ending
from hfbench.studies.suite.progress import LogReader, Progress, SuiteRun, TimeLeft

SUITE_FOLDER = ".suite"  # holds recipes with their seeds, output of the runs, and a lock
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0  # at how far a run has come


@dataclass(frozen=True)
class SuiteOutcome:
    """What a suite reached.

    Attributes:
        runs: Each finished or failed.
        seconds: Wall time.
    """

    runs: tuple[SuiteRun, ...]
    seconds: float

    @property
    def results(self) -> list[Result]:
        """Results of all finished runs, in their order."""
        return [run.result for run in self.runs if run.result]

    @property
    def failed(self) -> list[SuiteRun]:
        """Runs that ended without a result."""
        return [run for run in self.runs if run.state == "failed"]


@dataclass(frozen=True)
class Verdict:
    """A candidate against its baseline, over the repeats of a suite."""

    baseline: str
    candidate: str
    sentence: str


Observer = Callable[[Progress], None]


def run_suite(
    recipes: Sequence[Recipe],
    output_dir: str | Path = "runs",
    *,
    repeats: int = 3,
    seeds: Sequence[int] | None = None,
    launcher: str = "",
    observe: Observer | None = None,
) -> SuiteOutcome:
    """Run every recipe with every seed, baseline and candidate in turn; what is finished counts.

    Args:
        recipes: From `load_recipe`. A recipe's `baseline` names the one that it follows.
        output_dir: Each run goes into ``output_dir/<recipe name>/<run id>``.
        repeats: Runs of each recipe: with its own seed, the next one, and so on.
        seeds: These instead.
        launcher: What each run is started with, such as ``accelerate launch --num_processes 2``.
        observe: Called at each change, and about once a second.

    Raises:
        HfbenchError: If two recipes of one name differ, the launcher does not work, or another
            suite runs in this folder.
        Interrupted: After Ctrl-C; the same call goes on.
    """
    check_alone("suite")
    root = output_folder(output_dir)
    repeated = repeat_recipes(unique(recheck_all(recipes)), repeats, seeds)
    return run_plan(plan_runs(repeated, root, launcher), observe)


def run_plan(plan: Plan, observe: Observer | None = None) -> SuiteOutcome:
    """Run what is not finished yet; see `run_suite`."""
    with ExitStack() as stack:
        stack.enter_context(_alone_in(plan.output_dir))
        stop = stack.enter_context(StopRequests().listen())
        return _Suite(plan, observe or (lambda _: None), stop).run()


class _Suite:
    """A suite at work."""

    def __init__(self, plan: Plan, observe: Observer, stop: StopRequests) -> None:
        self.plan = plan
        self.runs = [
            SuiteRun(planned, "finished" if planned.result else "waiting", planned.result)
            for planned in plan.runs
        ]
        self._observe = observe
        self._stop = stop
        self._started = time.monotonic()
        self._left = TimeLeft()

    def run(self) -> SuiteOutcome:
        """Run everything in its order."""
        for run in self.runs:
            if run.result and run.result.folder:
                tidy_up(run.result.folder)
        for run in self.runs:
            if run.state == "waiting" and not self._stop.asked:
                self._wait_for_others(run)
                if run.state == "waiting" and not self._stop.asked:
                    self._run(run)
        if self._stop.asked and any(run.state == "waiting" for run in self.runs):
            done = sum(run.state == "finished" for run in self.runs)
            raise Interrupted(
                f"Stopped; {done} of {len(self.runs)} runs are finished in {self.plan.output_dir}. "
                f"Go on with the same command."
            )
        return SuiteOutcome(tuple(self.runs), self._elapsed())

    def _wait_for_others(self, run: SuiteRun) -> None:
        """Wait for a process that a killed suite left behind, or that somebody started by hand."""
        while not self._stop.asked:
            matches = self._match(run)
            held = [folder for folder in matches.unfinished if is_held(folder)]
            if matches.finished:
                self._finish(run, matches.finished[-1])
                return
            if not held:
                run.waits_for = None
                return
            if run.waits_for is None:
                run.waits_for = held[-1]
                self._tell(run)
            time.sleep(_LOOK_SECONDS)

    def _run(self, run: SuiteRun) -> None:
        run.log = self._file(run.planned, "log")
        process = RunProcess(self._command(run.planned), run.log)
        try:
            run.state, run.seconds = "running", 0.0
            self._tell(run)
            code = self._watch(run, process)
            process.settle()
        except BaseException:
            process.kill()
            raise
        run.seconds, run.progress = process.seconds, None
        matches = self._match(run)
        if code == 0 and matches.finished:
            self._left.note(run, matches.finished[-1])
            self._finish(run, matches.finished[-1])
        elif self._stop.asked:
            run.state, run.seconds = "waiting", None
        else:
            self._fail(run, code, process, matches)

    def _watch(self, run: SuiteRun, process: RunProcess) -> int:
        """Wait for the end of a run's process, look at how far it is, pass on Ctrl-C."""
        passed_on, looked = 0, time.monotonic()
        log: LogReader | None = None
        while (code := process.poll()) is None:
            if self._stop.asked > passed_on:
                passed_on += 1
                process.end() if passed_on < 3 else process.kill()
                self._tell(run)
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked, run.seconds = time.monotonic(), process.seconds
                log = log or self._find_log(run)
                run.progress = log.read() if log else None
                self._tell(None)
            time.sleep(_POLL_SECONDS)
        return code

    def _command(self, planned: PlannedRun) -> list[str]:
        file = self._file(planned, "json")
        write_json(planned.recipe.as_json(), file)
        arguments = ["recipe", str(file), "--output-dir", str(self.plan.output_dir), "--resume"]
        return [*self.plan.command, *arguments]

    def _file(self, planned: PlannedRun, kind: str) -> Path:
        name = f"{planned.recipe.name}-seed{planned.seed}.{kind}"
        return self.plan.output_dir / SUITE_FOLDER / name

    def _match(self, run: SuiteRun) -> Matches:
        runs = list(find_runs(self.plan.output_dir))
        planned = run.planned
        return match_runs(planned.recipe, runs, planned.environment, self.plan.world_size)

    def _find_log(self, run: SuiteRun) -> LogReader | None:
        unfinished = self._match(run).unfinished
        return LogReader(unfinished[-1], run.planned.recipe) if unfinished else None

    def _finish(self, run: SuiteRun, result: Result) -> None:
        run.state, run.result, run.waits_for = "finished", result, None
        if result.folder:
            tidy_up(result.folder)
        self._tell(run)

    def _fail(self, run: SuiteRun, code: int, process: RunProcess, matches: Matches) -> None:
        run.state, run.exit_code = "failed", code
        run.reason = last_lines(process.output())
        if code == 0:  # a launcher that starts something else, or whose runs see another machine
            others = [f"There is one with {other}." for other in matches.elsewhere]
            run.reason = ["It ended without a result that counts here.", *others[-1:]]
        with process.log.open("a", encoding="utf-8") as log:
            log.write(f"\nhfbench suite: {say_ending(code)} after {process.seconds:.1f} s\n")
        self._tell(run)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _tell(self, changed: SuiteRun | None) -> None:
        left, known = self._left.estimate(self.runs)
        stopping = self._stop.asked > 0
        self._observe(Progress(self.runs, changed, self._elapsed(), left, known, stopping))


@contextmanager
def _alone_in(output_dir: Path) -> Iterator[None]:
    """Keep a folder to one suite; a killed one lets go of it."""
    folder = output_dir / SUITE_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: Any = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ResultError(
            f"Another suite is running in {output_dir}; wait for it, or name another --output-dir."
        ) from None
    except OSError as error:
        raise ResultError(f"--output-dir: {folder} cannot be made: {error}") from None
    try:
        yield
    finally:
        lock.release()


def find_verdicts(runs: Sequence[SuiteRun]) -> list[Verdict]:
    """Compare each candidate with its baseline, where both are in the suite.

    Returns:
        One verdict a pair, speeds judged together; where they cannot be compared, or a file of
        theirs cannot be read, its sentence says why.
    """
    from hfbench.comparison.comparison import Comparison, compare, judge_together
    from hfbench.errors import ComparisonError

    results: dict[str, list[Result]] = {}
    for run in runs:
        results.setdefault(run.planned.recipe.name, []).extend([run.result] if run.result else [])
    found: list[tuple[str, str, str | Comparison]] = []
    pairs = {run.planned.recipe.name: run.planned.recipe.baseline for run in runs}
    for candidate, baseline in pairs.items():
        if baseline is None or baseline not in results or baseline == candidate:
            continue
        empty = [name for name in (baseline, candidate) if not results[name]]
        if empty:
            said = f"Not compared: no run of {' and '.join(empty)} is finished."
            found.append((baseline, candidate, said))
            continue
        try:
            found.append((baseline, candidate, compare(results[baseline], results[candidate])))
        except (ComparisonError, ResultError) as error:
            found.append((baseline, candidate, str(error)))
    judged = iter(judge_together([item for *_, item in found if not isinstance(item, str)]))
    return [
        Verdict(baseline, candidate, item if isinstance(item, str) else next(judged).sentence)
        for baseline, candidate, item in found
    ]
