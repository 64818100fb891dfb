"""Many random bad inputs through the command line: refused in words, with the culprit's name.

``HFBENCH_BAD_INPUTS`` sets how many (1,200), ``HFBENCH_BAD_INPUTS_SEED`` which.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.bad_inputs import bad_inputs
from tests.recipe.test_bad_input import refuse

pytestmark = pytest.mark.campaign


def test_bad_inputs_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = int(os.environ.get("HFBENCH_BAD_INPUTS", "1200"))
    seed = int(os.environ.get("HFBENCH_BAD_INPUTS_SEED", "0"))
    monkeypatch.chdir(tmp_path)
    failed, slowest = [], 0.0
    for number, bad in enumerate(bad_inputs(count, seed)):
        problem, seconds = refuse(bad, tmp_path, monkeypatch, capsys)
        slowest = max(slowest, seconds)
        if problem:
            failed.append(f"{number}: {problem}")
    with capsys.disabled():
        sys.stderr.write(
            f"\n{count} bad inputs, {len(failed)} not refused as they should; the slowest answer "
            f"took {slowest:.2f} s\n"
        )
    assert failed == []
