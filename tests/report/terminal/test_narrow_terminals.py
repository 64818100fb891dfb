"""What a reader can still read, and copy, on a terminal of any width and in a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group
from rich.text import Text

from hfbench.cli.options import print_whole, show
from hfbench.report.terminal.run import PlainTable, environment_table, result_table, run_table
from hfbench.results.schema import find_runs
from tests.builders import make_result, save_run

WIDTHS = [400, 120, 100, 80, 60, 40, 20]


def shown(what: Any, width: int) -> str:
    """Return what the command line prints on a terminal of this width."""
    output = io.StringIO()
    print_whole(Console(file=output, width=width, color_system=None, force_terminal=True), what)
    return output.getvalue()


def words(text: str) -> list[str]:
    return text.replace("│", " ").replace("┃", " ").split()


@pytest.mark.parametrize("width", WIDTHS)
def test_names_and_run_ids_stay_whole(tmp_path: Path, width: int) -> None:
    ids = ["20261201T054706654-203b43e1", "20261201T054706655-203b43e1"]
    for run_id in ids:
        save_run(tmp_path, "tiny", run_id)
    (tmp_path / "unfinished" / ("f" * 90)).mkdir(parents=True)
    (tmp_path / "unfinished" / ("f" * 90) / "recipe.json").write_text("{}")
    runs = list(find_runs(tmp_path))

    text = shown(run_table(runs), width)
    for run in runs:
        assert run.folder.name in words(text)
        assert run.folder.parent.name in words(text)
    assert set(ids) <= set(words(text))
    for cell in ("finished", "unfinished", "accuracy"):
        assert cell in words(text)
    longest = max(len(word) for word in words(text)) + len("  run ")
    assert max(map(len, text.splitlines())) <= max(width, longest)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_word_of_a_result_stays_whole(width: int) -> None:
    result = make_result()
    wide = [word for word in words(shown(result_table(result), 400)) if word.isalnum()]

    narrow = words(shown(result_table(result), width))
    assert set(wide) - {"this"} <= set(narrow)  # a heading goes with the table
    environment = environment_table(result.environment, 1, ["It lacks nothing, says " + "x" * 50])
    text = shown(environment, width)
    assert "x" * 50 in words(text)
    assert result.environment.platform.split()[-1] in words(text)


def test_table_is_one_while_its_words_fit() -> None:
    table = PlainTable()
    for heading in ("name", "why"):
        table.add_column(heading)
    table.add_row("abcdefghij", "some words that say why, at length")

    assert "abcdefghij │ some" in shown(table, 30)
    assert shown(table, 22).splitlines() == [
        "abcdefghij",
        "  why some words that",
        "  say why, at length",
    ]


def test_row_in_a_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_run(tmp_path, "tiny", "20261201T054706654-203b43e1")
    table = run_table(find_runs(tmp_path))
    note = Text("a sentence of many words, " * 20)

    show(Group(table, note))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[-1].strip() == note.plain.strip()
    name, run, state, *_ = (cell.strip() for cell in lines[3].strip("│").split("│"))
    assert (tmp_path / name / run).is_dir()
    assert state == "finished"


def test_brackets_and_colours_stay_in_lines_too() -> None:
    table = PlainTable(title="All of [it]")
    for heading in ("", "name", "state"):
        table.add_column(heading)
    table.add_row("1", "[bold]x", Text("failed", style="red"))
    table.add_row("", "", "")

    lines = shown(table, 12).splitlines()
    assert lines == ["All of [it]", "1 [bold]x", "  state", "  failed"]
