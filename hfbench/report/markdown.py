"""A report as Markdown, with its figures and data in files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hfbench.report.document import (
    Block,
    Bullets,
    Document,
    Figure,
    Link,
    Paragraph,
    Section,
    Table,
    Text,
)


def render_markdown(document: Document) -> str:
    """Write the report as GitHub's Markdown.

    Figures are expected as ``figures/<name>.svg``, data as ``data/<name>.csv``.
    """
    lines = [f"# {_escape(document.title)}", ""]
    for block in document.lead:
        lines += _render(block)
    for section in document.sections:
        lines += _section(section, 2)
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(section: Section, level: int) -> Iterator[str]:
    # Headings hold names that anchors cannot, so each has an anchor of its own.
    yield f'<a id="{section.anchor}"></a>'
    yield ""
    yield f"{'#' * level} {_escape(section.title)}"
    yield ""
    for block in section.blocks:
        yield from _render(block)
    for inner in section.sections:
        yield from _section(inner, level + 1)


def _render(block: Block) -> Iterator[str]:
    if isinstance(block, Paragraph):
        yield _inline(block.text)
    elif isinstance(block, Bullets):
        for item in block.items:
            yield f"- {_inline(item)}"
    elif isinstance(block, Table):
        yield from _table(block)
    else:
        yield from _figure(block)
    yield ""


def _table(table: Table) -> Iterator[str]:
    yield f"**{_escape(table.caption)}** [data (CSV)](data/{table.name}.csv)"
    yield ""
    yield _row([_escape(column.title) for column in table.columns])
    yield _row(["---:" if column.numeric else "---" for column in table.columns])
    for row in table.rows:
        yield _row([_escape(cell.text) for cell in row])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(figure: Figure) -> Iterator[str]:
    yield f"![{_escape(figure.alt)}](figures/{figure.name}.svg)"
    yield ""
    yield f"{_escape(figure.caption)} [data (CSV)](data/{figure.name}.csv)"


def _inline(text: Text) -> str:
    if isinstance(text, str):
        return _escape(text)
    return "".join(
        f"[{_escape(part.text)}](#{part.anchor})" if isinstance(part, Link) else _escape(part)
        for part in text
    )


def _escape(text: str) -> str:
    """Write text so that Markdown shows it as it is; line breaks would end a table's row."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;")
    # An underscore inside a word and a dash inside a line mean nothing to GitHub.
    return re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]|~$]", lambda found: "\\" + found.group(), text)
