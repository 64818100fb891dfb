"""A sample of bad inputs through the command line; `tests/campaigns` tries many more."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hfbench.cli import app as cli
from tests.bad_inputs import TOGETHER, BadInput, bad_inputs

SAMPLE = 120


class Accepted(Exception):  # noqa: N818 - no error of the product
    """A run would have begun."""


def refuse(
    bad: BadInput,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[str | None, float]:
    """Give a bad input to the command line.

    Returns:
        What is wrong with the answer, if anything, and how long it took.
    """
    file = folder / "bad.json"
    if isinstance(bad.content, bytes):
        file.write_bytes(bad.content)
    else:
        file.write_text(json.dumps(bad.content))
    command = ["recipe", str(file), *bad.overrides] if bad.overrides else ["validate", str(file)]
    monkeypatch.setattr("sys.argv", ["hfbench", *command])
    monkeypatch.setattr("hfbench.training.run.run_recipe", _accept)
    capsys.readouterr()
    start = time.perf_counter()
    try:
        cli.main()
        code: Any = None
    except SystemExit as left:
        code = left.code
    except Accepted:
        code = "accepted"
    except BaseException as error:
        code = f"{type(error).__name__}: {str(error)[:100]}"
    seconds = time.perf_counter() - start
    printed = capsys.readouterr()
    said = printed.out + printed.err
    what = f"{bad.culprit} {bad.overrides or ''}"
    if code != 2:
        return f"{what}: exit {code}, {said[:200]}", seconds
    if "Traceback" in said or bad.culprit not in said or "secret" in said:
        return f"{what}: said {said[:300]}", seconds
    if len(said) > 5000 or "\x1b" in said:
        return f"{what}: {len(said)} letters", seconds
    return (f"{what}: {seconds:.1f} s" if seconds > 10 else None), seconds


def _accept(*_: Any, **__: Any) -> None:
    raise Accepted


def test_sample_of_bad_inputs_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answers = [refuse(bad, tmp_path, monkeypatch, capsys)[0] for bad in bad_inputs(SAMPLE, 1)]
    assert [answer for answer in answers if answer] == []


@pytest.mark.parametrize(("values", "culprit"), TOGETHER)
def test_settings_without_effect_are_refused_by_name(values: dict[str, Any], culprit: str) -> None:
    from hfbench.recipe.arguments import check_training_args

    problems = check_training_args(values)

    assert any(culprit in problem for problem in problems)


def test_all_problems_of_a_recipe_are_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.builders import make_recipe

    content = make_recipe().as_json()
    content["name"] = "a/b"
    content["model"]["revision"] = "a\ud800"
    content["dataset"]["nosuch"] = 1
    content["training_args"] |= {"seed": -1, "ddp_timeout": -1, "optim": "nosuch"}
    bad = BadInput(content, (), "6 problems")

    assert refuse(bad, tmp_path, monkeypatch, capsys)[0] is None
