"""What others named, made harmless for where it is shown: one function for each medium.

Class names, descriptions, file names and messages of libraries come from whoever made them. A
terminal obeys escape sequences, a spreadsheet formulas, a browser tags, and a reader is misled by
letters that turn the direction of writing. Nothing is left out: what is not shown as it is, is
shown as an escape.
"""

from __future__ import annotations

import html
import json
import os
import re
from typing import Any

# What a terminal or a browser obeys: C0 and C1 controls, marks and overrides of the direction of
# writing (https://www.unicode.org/reports/tr9), separators of lines; and halves of surrogate
# pairs, which cannot be written at all. Tabs and line feeds are left to the medium.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
# A cell that begins with one of these is a formula to a spreadsheet, also behind white space
# (https://owasp.org/www-community/attacks/CSV_Injection); the last four are their wide forms.
_FORMULA = re.compile("\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
# At the beginning of a block: a heading, a list, a quotation, a rule.
_BLOCK = re.compile(r"^(#{1,6}(?= |$)|>|[-+](?= |$)|[-=]{2,}|\d{1,9}(?=[.)]( |$)))")

_TOKEN = re.compile(r"\b(hf_|api_org_|sk-|ghp_|github_pat_|glpat-)[A-Za-z0-9_\-]{16,}")
_IN_URL = re.compile(r"(?<=://)[^\s/@:'\"]{0,256}(:[^\s/@'\"]{0,256})?@")
_SECRET_NAME = r"[\w.\-]{0,40}(?:token|key|secret|password|passwd|signature|credential)"
_IN_QUERY = re.compile(rf"([?&;]{_SECRET_NAME}=)[^\s&#'\"]+", re.IGNORECASE)
_BEARER = re.compile(r"(\b(?:Bearer|Basic)\s+)[A-Za-z0-9+/=._\-]{8,}", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"(TOKEN|API_?KEY|ACCESS_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE
)
_SHORTEST_SECRET = 8  # shorter values of variables stand in too many words
_HIDDEN = "<hidden>"


def for_terminal(text: str) -> str:
    """Show what a terminal would obey as escapes, backslash and all; lines stay lines."""
    return _OBEYED.sub(lambda found: _escape(found.group()), text)


def for_csv(value: object) -> object:
    """Make text that a spreadsheet would compute plain text; numbers stay what they are."""
    if not isinstance(value, str):
        return value
    text = for_terminal(value)
    return f"'{text}" if _FORMULA.match(value) else text


def for_html(text: str) -> str:
    """Write text for HTML, also inside the quotation marks of an attribute."""
    return html.escape(for_terminal(text))


def for_markdown(text: str) -> str:
    """Write text so that GitHub's Markdown shows it as it is, on one line, in a table too."""
    text = for_terminal(re.sub(r"\s+", " ", text))
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    # An underscore inside a word and a dash inside a line mean nothing to GitHub.
    text = re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]|~$]", lambda found: "\\" + found.group(), text)
    return _BLOCK.sub(_escaped_block, text)


def for_json(content: Any) -> str:
    """Write JSON for people: letters as they are, but what a terminal obeys as escapes."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return _OBEYED.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def fenced(text: str, language: str) -> list[str]:
    """Return the lines of a block of code in Markdown that nothing inside can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text, fence]


def without_credentials(text: str) -> str:
    """Hide tokens, passwords in addresses, and the values of variables such as ``HF_TOKEN``."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name):
            text = text.replace(value, _HIDDEN)
    text = _TOKEN.sub(rf"\g<1>{_HIDDEN}", text)
    text = _IN_URL.sub(f"{_HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\g<1>{_HIDDEN}", text)
    return _BEARER.sub(rf"\g<1>{_HIDDEN}", text)


def holds_credential(text: str) -> bool:
    """Tell whether there is something in a text that `without_credentials` hides."""
    return without_credentials(text) != text


def message(text: str) -> str:
    """Write a message for the terminal: without credentials, nothing in it obeyed."""
    return for_terminal(without_credentials(text))


def shown(value: Any, limit: int = 120) -> str:
    """Write a value from JSON for a message; a long one is cut."""
    text = json.dumps(value, default=str)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def _escape(letter: str) -> str:
    number = ord(letter)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def _escaped_block(found: re.Match[str]) -> str:
    start = found.group()
    return start + "\\" if start[0].isdigit() else "\\" + start
