"""An ablation as tables for the terminal: its plan, and what each technique contributes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hfbench.comparison.ratio import Ratio
from hfbench.comparison.verdict import FASTER, SLOWER
from hfbench.report.terminal.run import PlainTable
from hfbench.results.formats import percent
from hfbench.studies.ablation.plan import Plan
from hfbench.studies.ablation.schema import Ablation, NotMeasured, Row

_STYLES = {FASTER: "green", SLOWER: "red"}
_NOT_MEASURED = "–"
_RATIO_WIDTH = 12  # of an interval, below its ratio: fixed, so that 80 columns are enough


def plan_table(plan: Plan) -> Group:
    """Show what would be measured."""
    table = PlainTable(title=f"{plan.recipe.name}: {len(plan.configurations)} configurations")
    table.add_column("configuration", overflow="fold")
    table.add_column("techniques", overflow="fold")
    details = {item.technique: item.detail for item in plan.attributions}
    for item in plan.configurations:
        on = [f"{name} ({details[name]})" for name in item.techniques]
        table.add_row(_label(item.label, item.also), "; ".join(on) or _NOT_MEASURED)
    idle = [NotMeasured(technique=i.technique, reason=i.reason) for i in plan.not_run]
    return Group(table, *_say_not_run(idle), *(Text(f"Note: {note}") for note in plan.notes))


def ablation_tables(ablation: Ablation) -> Group:
    """Show the verdict, every configuration, and what each technique contributes."""
    style = "bold red" if ablation.flagged else "bold"
    name = ablation.recipe.name
    parts: list[Table | Text] = [
        Text(f"{name}: what each technique contributes", style="bold"),
        Text(ablation.verdict, style=style),
        *(
            Text(line, style="red" if line.startswith("FLAGGED") else "")
            for line in ablation.findings
        ),
        _configurations(ablation),
        _contributions(ablation),
        Text(" ".join(filter(None, [_say_how(ablation), ablation.judged]))),
    ]
    parts += _say_not_run(ablation.not_run)
    parts += [Text(f"Note: {note}") for note in ablation.notes]
    return Group(*parts)


def _say_how(ablation: Ablation) -> str:
    if ablation.full:
        return (
            f"{ablation.finished_rounds} whole runs of each, one a seed. Intervals at 95 %: of "
            "speed-ups over seeds, of accuracy over seeds and test images."
        )
    return (
        f"{ablation.finished_rounds} rounds; windows of {ablation.steps} optimizer steps of none, "
        "warm-up excluded, and of as many images of the others. Intervals at 95 %, over rounds."
    )


def _configurations(ablation: Ablation) -> Table:
    on_device = any(row.peak_device_memory_mib is not None for row in ablation.rows)
    table = PlainTable()
    table.add_column("configuration", overflow="fold")
    memory = "device memory" if on_device else "process memory"
    last = {"accuracy": 8, "points": 14} if ablation.full else {"data wait": 5, "first loss": 8}
    for heading, width in {"speed-up": _RATIO_WIDTH, "images/s": 8, memory: 8, **last}.items():
        table.add_column(heading, justify="right", width=width)
    for row in ablation.rows:
        peak = row.peak_device_memory_mib if on_device else row.peak_process_memory_mib
        table.add_row(
            Text(_label(row.label, row.also), style="red" if row.flagged else ""),
            _speedup(row),
            _NOT_MEASURED if row.samples_per_second is None else f"{row.samples_per_second:.1f}",
            _NOT_MEASURED if peak is None else f"{peak:.0f} MiB",
            *(_accuracy(row) if ablation.full else (_data_wait(row), _first_loss(row))),
        )
    return table


def _speedup(row: Row) -> Text:
    found = "1" if row.name == "none" else _ratio(row.speedup)
    return Text(f"{found}\n{row.verdict}", style=_STYLES.get(row.verdict, ""))


def _data_wait(row: Row) -> str:
    return _NOT_MEASURED if row.data_wait_share is None else f"{100 * row.data_wait_share:.0f} %"


def _accuracy(row: Row) -> tuple[str, str]:
    found = row.accuracy
    if found is None:
        return _NOT_MEASURED, _NOT_MEASURED
    if found.points is None or found.low is None or found.high is None:
        return percent(found.value), _NOT_MEASURED
    return percent(found.value), f"{found.points:+.2f}\n[{found.low:+.2f}, {found.high:+.2f}]"


def _first_loss(row: Row) -> Text:
    loss = row.first_loss
    if loss is None:
        return Text(_NOT_MEASURED)
    found = "not finite" if loss.found is None else f"{loss.found:.4g}"
    if loss.expected is None:
        return Text(f"{found}, not checked")
    if loss.flagged:
        return Text(f"{found}, not {loss.expected:.4g}", style="bold red")
    return Text(f"{found} ok")


def _contributions(ablation: Ablation) -> Table:
    table = PlainTable()
    table.add_column("technique", overflow="fold")
    table.add_column("what it is here", overflow="fold")
    for heading in ("gain alone", "gain with the others", "interaction"):
        table.add_column(heading, justify="right", width=_RATIO_WIDTH)
    for item in ablation.contributions:
        table.add_row(
            item.technique,
            item.detail,
            _ratio(item.alone),
            _ratio(item.with_others),
            _ratio(item.interaction),
        )
    return table


def _ratio(ratio: Ratio | None) -> str:
    return _NOT_MEASURED if ratio is None else str(ratio).replace(" [", "\n[")


def _label(label: str, also: Sequence[str]) -> str:
    return " = ".join((label, *also))


def _say_not_run(items: Sequence[NotMeasured]) -> list[Text]:
    return [Text(f"Not run: {item.technique}: {item.reason}.") for item in items]
