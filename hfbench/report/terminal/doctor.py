"""What the doctor found as tables for the terminal: the verdict first, then what it rests on."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hfbench.report.terminal.run import PlainTable
from hfbench.results.formats import duration
from hfbench.studies.doctor.limits import milliseconds
from hfbench.studies.doctor.schema import Diagnosis


def diagnosis_tables(found: Diagnosis) -> Group:
    """Show the verdict, each side alone, the techniques, and what the machine lacks."""
    wrong = found.accumulation is not None and not found.accumulation.passed
    parts: list[Table | Text] = [
        Text(f"{found.recipe} on {found.environment.device_name}, {found.precision}", style="bold"),
        Text(found.verdict, style="bold red" if wrong else "bold"),
        _sides(found),
        _parts_of_a_step(found),
        _techniques(found),
    ]
    if found.accumulation is not None and not wrong:
        parts.append(Text(found.accumulation.sentence))
    lacks = found.machine.lacks or ["This machine lacks nothing that a recipe could ask for."]
    parts += [Text(line) for line in (*lacks, *found.notes)]
    parts.append(Text(_forecast(found)))
    return Group(*parts)


def _sides(found: Diagnosis) -> Table:
    table = PlainTable()
    table.add_column("measured alone")
    for heading in ("a batch", "from", "to", "images/s"):
        table.add_column(heading, justify="right")
    for side in found.sides:
        table.add_row(
            "all of it, in training" if side.name == "training" else side.name,
            milliseconds(side.seconds_per_batch),
            milliseconds(side.lowest_seconds_per_batch),
            milliseconds(side.highest_seconds_per_batch),
            f"{side.samples_per_second:,.{0 if side.samples_per_second >= 100 else 2}f}",
        )
    return table


def _parts_of_a_step(found: Diagnosis) -> Text:
    step = found.step
    named = [
        ("waiting for the loader", step.loader_seconds),
        ("copy", step.copy_seconds),
        ("forward and backward", step.model_seconds - step.optimizer_seconds),
        ("optimizer", step.optimizer_seconds),
        ("the rest", step.rest_seconds),
    ]
    shown = [
        f"{name} {100 * seconds / step.batch_seconds:.0f} %"
        for name, seconds in named
        if seconds > 0 or name != "copy"
    ]
    return Text(f"A batch of {found.batch_size} in training: {', '.join(shown)}.")


def _techniques(found: Diagnosis) -> Table:
    table = PlainTable()
    for heading in ("technique", "in recipe", "helps", "gain"):
        table.add_column(heading)
    table.add_column("why", overflow="fold")
    for item in found.advice:
        gain = ""
        if item.speedup_measured is not None:
            gain = f"{item.speedup_measured:.2f}×"
        elif item.speedup_at_most is not None and item.helps != "no":
            gain = f"≤ {item.speedup_at_most:.2f}×"
        elif item.helps == "perhaps":
            gain = "not tried"
        on = "yes" if item.in_recipe else "no"
        table.add_row(item.technique, on, item.helps, gain, item.sentence)
    return table


def _forecast(found: Diagnosis) -> str:
    forecast = found.forecast
    return (
        f"Forecast: {forecast.optimizer_steps} optimizer steps in "
        f"{duration(forecast.train_seconds)}, evaluations {duration(forecast.evaluation_seconds)}, "
        f"checkpoints {duration(forecast.save_seconds)}; the evaluation after training takes "
        f"{duration(forecast.final_evaluation_seconds)}. {forecast.note} Found in "
        f"{duration(found.seconds)}."
    )
