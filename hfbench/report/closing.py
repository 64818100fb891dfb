"""What a reader needs besides the numbers: machines, how to read them, what was left out."""

from __future__ import annotations

from collections.abc import Sequence

from hfbench.machine.environment import Environment
from hfbench.report import cells
from hfbench.report.document import Bullets, Cell, Column, Link, Paragraph, Section, Table
from hfbench.report.sets import Collection, RunSet


def machines_section(runs: Collection) -> Section:
    """Show each machine with its versions, and what ran on it with what settings seen."""
    facts = [_facts(environment) for environment in runs.machines.values()]
    names = list(dict.fromkeys(name for found in facts for name in found))
    table = Table(
        "machines",
        "Hardware and versions. Runs on different ones are never mixed.",
        [Column("what", "what", numeric=False)]
        + [Column(f"machine {letter}", letter, numeric=False) for letter in runs.machines],
        [
            [Cell(name), *(Cell(found.get(name, "not recorded")) for found in facts)]
            for name in names
        ],
    )
    return Section("Hardware and versions", "machines", [table, _applied(runs.sets)])


def _facts(environment: Environment) -> dict[str, str]:
    memory = environment.device_memory_mib
    facts = {
        "device": environment.device_name,
        "device memory": "none of its own" if memory is None else f"{memory / 1024:.0f} GiB",
        "CPU": f"{environment.cpu}, {environment.cpu_cores} cores",
        "memory": f"{environment.memory_mib / 1024:.0f} GiB",
        "torch threads": str(environment.torch_threads),
        "system": environment.platform,
        "Python": environment.python,
        "CUDA": environment.cuda or "none",
        **_gpu_facts(environment),
        "hfbench's commit": environment.hfbench_commit or "not from a checkout",
    }
    return facts | environment.packages


def _gpu_facts(environment: Environment) -> dict[str, str]:
    if environment.device_type != "cuda":
        return {}
    watts = environment.power_limit_watts
    facts = {
        "driver": environment.driver,
        "power limit": None if watts is None else f"{watts:.0f} W",
        "MIG profile": environment.mig_profile,
    }
    return {name: value or "not known" for name, value in facts.items()}


def _applied(sets: Sequence[RunSet]) -> Table:
    names = list(dict.fromkeys(name for found in sets for name in found.newest.switches))

    def cell(found: RunSet, name: str) -> Cell:
        switch = found.newest.switches.get(name)
        if switch is None:
            return Cell("not recorded")
        applied = cells.setting(name, switch.applied).text
        if switch.requested == switch.applied:
            return Cell(applied)
        asked = cells.setting(name, switch.requested).text
        return Cell(
            f"{applied}; asked for {asked}" + (f" ({switch.reason})" if switch.reason else "")
        )

    return Table(
        "applied",
        "What was seen to be applied, in the newest of each recipe's runs.",
        [Column("recipe", "set", numeric=False), Column("seeds", "seeds", numeric=False)]
        + [Column(name, name, numeric=False) for name in names],
        [
            [
                Cell(found.label),
                Cell(", ".join(str(result.seed) for result in found.results)),
                *(cell(found, name) for name in names),
            ]
            for found in sets
        ],
    )


def reading_section(margin_points: float) -> Section:
    """Say what each number means."""
    return Section(
        "How to read this",
        "reading",
        [
            Bullets(
                [
                    "n counts runs, in comparisons pairs of runs with the same seed. From one pair "
                    "no interval follows, and the verdict is “undecided”.",
                    [
                        "Speed-up is baseline / candidate, the geometric mean over pairs: above 1 "
                        "is faster, and for memory above 1 is less. Its 95 % interval is Student's "
                        "t on the logarithms. See ",
                        Link("the comparisons", "comparison"),
                        ".",
                    ],
                    "“No difference shown” means that the interval holds 1: a difference may still "
                    "be there, smaller than these runs can show. With several candidates it may "
                    "also mean that the interval leaves 1 out, but not by more than one of so many "
                    "does by chance: their p-values are adjusted after Holm, so that in 95 of 100 "
                    "reports without any effect no candidate is called faster or slower.",
                    "“Order not balanced” means that the runs of the two sides were not made in "
                    "turn, so that a machine that changed meanwhile would look the same.",
                    "“Not worse” means that the whole interval of the accuracy difference lies "
                    f"above the loss of {margin_points:g} points that is put up with, “worse” that "
                    "it lies below, "
                    "“undecided” that these runs cannot tell.",
                    "Execution time is the whole training call with its evaluations and "
                    "checkpoints; train time leaves these out; steady-state training leaves out "
                    "the first steps too.",
                    [
                        "Set-up before the training call and the final evaluation after it are in "
                        "no speed-up; ",
                        Link("where the time goes", "time"),
                        " shows them.",
                    ],
                    "Test accuracy, F1 and calibration are measured on test images without "
                    "augmentation, after training; macro F1 weighs every class the same.",
                    "Means of times, rates and memory are geometric, means of shares and of the "
                    "time budget arithmetic; in brackets stand the lowest and the highest run.",
                    "“Not run”, “not measured” and “not given” are said where there is no number.",
                    [
                        "Letters name ",
                        Link("machines and versions", "machines"),
                        "; “#2” names older runs of a recipe with other settings, or on another "
                        "machine.",
                    ],
                ]
            )
        ],
    )


def left_out_section(runs: Collection) -> Section:
    """List what is in the folder and not in this report."""
    if not runs.left_out:
        return Section("Left out", "left-out", [Paragraph("Nothing: every run was read.")])
    return Section("Left out", "left-out", [Bullets(list(runs.left_out))])
