"""A GPU that others used too is said wherever its times are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfbench.comparison.comparison import compare
from hfbench.report import write_report
from hfbench.report.terminal.comparison import comparison_tables
from hfbench.report.terminal.run import result_table
from hfbench.results.schema import Conditions
from hfbench.training.hub import model_card
from tests.builders import make_result
from tests.made_up import save_repeats
from tests.report.terminal.test_comparison import words
from tests.report.terminal.test_run import show

SHARED = Conditions(other_processes=2, other_processes_mib=3000.4)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (SHARED, "GPU shared while measuring: 2 other processes, 3000 MiB."),
        (
            Conditions(other_processes=1, other_processes_mib=None, note="not told"),
            "GPU shared while measuring: 1 other process, memory not known.",
        ),
        (Conditions(other_processes=0, other_processes_mib=0.0), None),
        (Conditions(other_processes=None, other_processes_mib=None, note="none"), None),
        (None, None),
    ],
)
def test_result_and_model_card_say_who_else_was_on_the_gpu(
    conditions: Conditions | None, expected: str | None, tmp_path: Path
) -> None:
    result = make_result(conditions=conditions)
    for text in (show(result_table(result)), model_card(result)):
        if expected is None:
            assert "shared" not in text
        else:
            assert expected in words(text)


def test_verdict_names_the_runs_that_were_not_alone(tmp_path: Path) -> None:
    right = np.ones((4, 40), dtype=bool)
    changes: dict[str, Any] = {"conditions": SHARED}
    alone = save_repeats(tmp_path / "runs", "plain", [9, 9, 9, 9], right)
    tuned = {"baseline": "plain", "variant": "tuned", "training_args": {"bf16": True}}
    found = save_repeats(tmp_path / "runs", "quick", [5, 5, 5, 5], right, recipe=tuned, **changes)
    comparison = compare(alone, found)
    expected = (
        f"GPU shared while measuring in 4 of 8 runs: quick/{found[0].run_id} (2 other processes, "
        f"3000 MiB), quick/{found[1].run_id} (2 other processes, 3000 MiB), "
        f"quick/{found[2].run_id} (2 other processes, 3000 MiB) and 1 more."
    )
    shown = words(show(comparison_tables(comparison)))
    assert expected in shown
    assert shown.index(expected) < shown.index("execution time")  # beside the verdict
    write_report(tmp_path / "runs", tmp_path / "report")
    assert expected in (tmp_path / "report" / "report.md").read_text("utf-8")
    assert compare(alone, alone).shared is None
