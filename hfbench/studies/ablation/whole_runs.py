"""An ablation from whole runs: what each technique contributes, and what it costs in accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median

from hfbench.comparison.comparison import compare
from hfbench.comparison.ratio import Ratio
from hfbench.comparison.verdict import WORSE
from hfbench.errors import ComparisonError, ResultError, first_line
from hfbench.results.schema import Result, write_json
from hfbench.studies.ablation.analysis import (
    batch_size_of,
    geometric_mean,
    judge_row,
    say_findings,
    say_verdict,
    settings_of,
)
from hfbench.studies.ablation.gains import Gains
from hfbench.studies.ablation.plan import NONE, Configuration, Plan
from hfbench.studies.ablation.plots import CSV_FILE, PLOT_FILE, plot_ablation, write_csv
from hfbench.studies.ablation.schema import (
    ABLATION_FILE,
    Ablation,
    Accuracy,
    FullRun,
    NotMeasured,
    Row,
    load_ablation,
    make_ablation_folder,
)


def record_full_runs(
    plan: Plan,
    results: Mapping[str, Sequence[Result]],
    output_dir: Path,
    *,
    repeats: int,
    seconds: float,
    failures: Mapping[str, str] | None = None,
) -> Ablation:
    """Put finished runs together and save what they say.

    Args:
        plan: What was run.
        results: Finished runs of each configuration, by its name.
        output_dir: It goes into ``output_dir/ablations/<recipe name>/<id>``.
        repeats: Runs of each configuration that were asked for.
        seconds: Wall time of everything.
        failures: Why runs of a configuration failed, by its name.

    Raises:
        ResultError: If no run of ``none`` is finished, or the folder cannot be made.
    """
    if not results.get(NONE):
        raise ResultError(
            f"No run of {plan.recipe.name}.{NONE} is finished, so that nothing can be compared."
        )
    notes = list(plan.notes)
    speeds = {
        (result.seed, name): 1 / result.times.execution_seconds
        for name, runs in results.items()
        for result in runs
    }
    gains = Gains(plan, speeds)
    rows = []
    for item in plan.configurations:
        runs = list(results.get(item.name, []))
        accuracy, note = _accuracy(item, list(results[NONE]), runs)
        notes += [note] if note else []
        failure = None if runs else (failures or {}).get(item.name, "no run is finished")
        rows.append(_describe(item, plan, runs, gains.rows[item.name], accuracy, failure))
    contributions = gains.contributions()
    worse = [
        f"Less accurate: {row.label}: {row.accuracy.points:+.2f} points "
        f"[{row.accuracy.low:+.2f}, {row.accuracy.high:+.2f}]."
        for row in rows
        if row.accuracy and row.accuracy.verdict == WORSE
    ]
    seeds = sorted({seed for seed, _ in speeds})
    names = [item.name for item in plan.configurations]
    ablation = Ablation(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=plan.recipe,
        recipe_sha256=plan.recipe.digest(),
        environment=results[NONE][-1].environment,
        full=True,
        rounds=repeats,
        finished_rounds=sum(all((seed, name) in speeds for name in names) for seed in seeds),
        steps=None,
        seconds=seconds,
        verdict=say_verdict(rows, contributions),
        findings=worse + say_findings(rows, contributions),
        notes=[*notes, "Speed-ups are of the execution time: evaluation and checkpoints included."],
        rows=rows,
        contributions=contributions,
        not_run=[NotMeasured(technique=i.technique, reason=i.reason) for i in plan.not_run],
        windows=[],
        runs=[
            FullRun(
                configuration=name,
                seed=result.seed,
                run_id=result.run_id,
                execution_seconds=result.times.execution_seconds,
            )
            for name, runs in results.items()
            for result in runs
        ],
    )
    folder = make_ablation_folder(plan.recipe, output_dir)
    plot_ablation(ablation, folder / PLOT_FILE)
    write_csv(ablation, folder / CSV_FILE)
    write_json(ablation.model_dump(mode="json", by_alias=True), folder / ABLATION_FILE)
    return load_ablation(folder)


def _describe(
    item: Configuration,
    plan: Plan,
    runs: Sequence[Result],
    speedup: Ratio | None,
    accuracy: Accuracy | None,
    failure: str | None,
) -> Row:
    rates = [run.throughput.samples_per_second for run in runs]
    device = [run.memory.peak_device_memory_mib for run in runs]
    known = [memory for memory in device if memory is not None]
    return Row(
        name=item.name,
        label=item.label,
        also=list(item.also),
        techniques=list(item.techniques),
        settings=settings_of(plan.configurations[0].recipe, item.recipe),
        effective_batch_size=batch_size_of(item.recipe),
        speedup=speedup,
        verdict=judge_row(item.name, speedup, failure),
        samples_per_second=geometric_mean([rate for rate in rates if rate]),
        seconds_per_step=None,
        data_wait_share=fmean(r.waited_seconds / r.times.execution_seconds for r in runs)
        if runs
        else None,
        peak_process_memory_mib=median(run.memory.peak_process_memory_mib for run in runs)
        if runs
        else None,
        peak_device_memory_mib=median(known) if known else None,
        first_loss=None,
        not_applied=[],
        failure=failure,
        accuracy=accuracy,
    )


def _accuracy(
    item: Configuration, none: Sequence[Result], runs: Sequence[Result]
) -> tuple[Accuracy | None, str | None]:
    """Return accuracy against ``none``, and why it cannot be compared."""
    found = [run.metrics.test.accuracy for run in runs if run.metrics.test]
    if not found:
        return None, None
    mean = math.fsum(found) / len(found)
    if item.name == NONE:
        return Accuracy(value=mean), None
    try:
        judged = compare(none, runs).accuracy
    except (ComparisonError, ResultError) as error:
        return Accuracy(
            value=mean
        ), f"{item.label} and none cannot be compared: {first_line(error)}"
    if judged is None:
        return Accuracy(value=mean), None
    return Accuracy(
        value=mean,
        points=judged.points,
        low=judged.low,
        high=judged.high,
        verdict=judged.verdict,
    ), None
