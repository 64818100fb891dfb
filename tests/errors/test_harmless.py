"""What others named reaches terminal, CSV, Markdown, model card and page only harmless."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from hfbench.cli import app as cli
from hfbench.errors import HfbenchError
from hfbench.errors.harmless import (
    fenced,
    for_csv,
    for_html,
    for_json,
    for_markdown,
    for_terminal,
    message,
    without_credentials,
)
from hfbench.recipe.schema import check_recipe
from hfbench.report import write_report
from hfbench.report.console import HarmlessConsole
from hfbench.report.document import Cell, Column, Table
from hfbench.report.terminal.run import result_table
from hfbench.training.hub import model_card
from tests.builders import make_recipe, make_result, tiny_recipe
from tests.made_up import save_repeats

TITLE = "\x1b]0;owned\x07"
LINK = "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\"
EVIL = [
    TITLE,
    LINK,
    "\x9b31mred",
    "\u202egnp.exe",
    "a\rb",
    "\x00",
    "\u2066x\u2069",
    "\ud800",
    "a\u2028b",
    "\x08\x08",
]
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", EVIL)
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    for written in (for_terminal(text), for_markdown(text), for_html(text), for_json([text])):
        assert not OBEYED.search(written)
    assert not OBEYED.search(str(for_csv(text)))
    assert not OBEYED.search(str(HfbenchError(text)))
    assert json.loads(for_json([text])) == [text]


@pytest.mark.parametrize("text", ["plain", "Häuser", "日本語 🐱", "العربية", "a-b_c", "1.08×"])
def test_ordinary_names_stay_what_they_are(text: str) -> None:
    assert for_terminal(text) == for_markdown(text) == for_html(text) == for_csv(text) == text


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", " =", "＝", "\n="])
def test_formula_is_text_to_a_spreadsheet(start: str) -> None:
    cell = f'{start}HYPERLINK("https://evil.example";"click")'
    table = Table("t", "c", [Column(cell, cell)], [[Cell(cell)], [Cell("n", -1.5)]])

    rows = list(csv.reader(io.StringIO(table.csv())))

    assert [row[0][0] for row in rows[:2]] == ["'", "'"]
    assert rows[2] == ["-1.5"]  # a number stays one


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "a | b",
        "```\n# heading",
        "[x](javascript:alert(1))",
        "![x](https://evil.example/x.png)",
        "`code`",
        "&lt;b&gt;",
        "# heading",
        "- list",
        "1. list",
        "> quote",
        "---",
        "***bold***",
        "$x$",
    ],
)
def test_markdown_shows_text_as_it_is(text: str) -> None:
    written = for_markdown(text)

    assert "\n" not in written
    assert not re.search(r"(?<!\\)[|`\[*$]|<", written)
    assert not re.match(r"#|-{3}|- |\d\. |>", written)


def test_code_block_cannot_be_ended_from_inside() -> None:
    first, text, last = fenced("a\n````\n# heading", "json")

    assert first == "`````json"
    assert last == "`````"
    assert text == "a\n````\n# heading"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("token hf_abcdefghijklmnopqrstuvwxyz is wrong", "abcdefghijkl"),
        ("GET https://user:pa55word@host/x failed", "pa55word"),
        ("GET https://onlytoken@host/x failed", "onlytoken"),
        ("GET https://host/x?a=1&token=s3cret&b=2 failed", "s3cret"),
        ("https://s3/x?X-Amz-Signature=abcdef0123&x=1", "abcdef0123"),
        ("https://host/x?api_key=s3cret", "s3cret"),
        ("Authorization: Bearer abcdefgh12345678", "abcdefgh12345678"),
    ],
)
def test_credentials_are_hidden(text: str, secret: str) -> None:
    assert secret not in message(text)
    assert secret not in str(HfbenchError(text))
    assert "hidden" in message(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/timm/resnet50",
        "see https://host:8080/a/b?page=2",
        "mail@example.org",
        "hf_transfer is not installed",
        "tokens_per_second=5",
        "the key=value form",
    ],
)
def test_what_is_no_credential_is_shown(text: str) -> None:
    assert without_credentials(text) == text


def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_PASSWORD", "correct horse battery")

    text = without_credentials("login 0123456789abcdef with correct horse battery refused")

    assert text == "login <hidden> with <hidden> refused"


def test_recipe_with_a_credential_is_refused_without_repeating_it() -> None:
    for place, value in (
        ("description", "mine: hf_abcdefghijklmnopqrstuvwxyz"),
        ("model", {"name_or_path": "https://me:pa55word@host/model"}),
        ("dataset", {"name_or_path": "https://host/data?token=s3cret"}),
        ("training_args", {"run_name": "hf_abcdefghijklmnopqrstuvwxyz"}),
    ):
        content = make_recipe().as_json()
        content[place] = content[place] | value if isinstance(value, dict) else value

        _, problems = check_recipe(content)

        assert any("token or password" in problem and place in problem for problem in problems)
        assert not re.search("abcdefgh|pa55word|s3cret", "".join(problems))


@pytest.mark.parametrize("text", [f"a{TITLE}b", "[red]x[/red]", f"[link]{LINK}"])
def test_tables_on_a_terminal_show_names_and_obey_none(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = make_result(data={"notes": [text]})
    target = io.StringIO()
    console = HarmlessConsole(file=target, force_terminal=True, width=200)

    console.print(result_table(result))

    printed = target.getvalue()
    assert "\x1b]" not in printed
    assert "\x07" not in printed
    assert "[red]" in printed or "[red]" not in text


def test_messages_on_a_terminal_obey_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["hfbench", "validate", f"{tmp_path}/{TITLE}.json"])

    with pytest.raises(SystemExit):
        cli.main()

    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert r"\x1b]0;owned\x07" in printed.err


DESCRIPTION = (
    "x\n---\nlicense: evil\n---\n```\n# Owned <img src=x onerror=alert(1)> "
    f"[x](javascript:alert(1)) | `{TITLE}"
)


def test_model_card_shows_a_description_as_it_is() -> None:
    recipe = tiny_recipe().model_copy(update={"description": DESCRIPTION})
    card = model_card(make_result(recipe=recipe))

    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert "evil" not in header
    assert "<img" not in body.replace("&lt;img", "").split("```json")[0]
    assert not OBEYED.search(card)
    fences = [line for line in body.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "````json", "````"]
    inside = body[body.index("````json") + 8 : body.rindex("````")]
    assert json.loads(inside)["description"] == DESCRIPTION


def test_report_is_harmless_whatever_classes_are_called(tmp_path: Path) -> None:
    names = [
        '=HYPERLINK("https://evil.example")',
        "<script>alert(1)</script>",
        f"a{TITLE}",
        "\u202egnp",
        "x | y\n# z",
        "`` ` ``",
        "--><svg onload=alert(1)>",
        "]]></style><script>",
        "@SUM(1)",
        "ok",
    ]
    right = np.tile(np.arange(60) % 5 > 0, (2, 1))
    save_repeats(tmp_path / "runs", "plain", [100.0, 101.0], right, data={"label_names": names})

    write_report(tmp_path / "runs", tmp_path / "report")

    for file in (tmp_path / "report").rglob("*.*"):
        text = file.read_text("utf-8")
        assert not OBEYED.search(text), file
        if file.suffix == ".csv":
            for row in csv.reader(io.StringIO(text)):
                for cell in row:
                    assert not re.match(r"\s*[=@]|[+-](?![\d.]|inf|nan)", cell), (file, cell)
    page = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert page.count("<script") == 1
    assert "onload=alert" not in page.replace("&lt;svg onload=alert", "")


@pytest.mark.parametrize("write", [for_terminal, for_markdown, for_html, without_credentials])
@pytest.mark.parametrize(
    "piece", ["\x1b[", "= ", "_a", "`", "://", "?token=", "&", "Bearer ", "hf_", "\n", ":@/"]
)
def test_time_grows_no_faster_than_the_text(write: object, piece: str) -> None:
    def seconds(length: int) -> float:
        text = (piece * length)[:length]
        best = 1e9
        for _ in range(3):
            start = time.perf_counter()
            write(text)  # type: ignore[operator]
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(80_000) < 12 * seconds(20_000) + 0.02
