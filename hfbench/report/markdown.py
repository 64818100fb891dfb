"""A report as Markdown, with its figures and data in files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hfbench.errors.harmless import for_markdown
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
    lines = [f"# {for_markdown(document.title)}", ""]
    for block in document.lead:
        lines += _render(block)
    for section in document.sections:
        lines += _section(section, 2)
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(section: Section, level: int) -> Iterator[str]:
    # Headings hold names that anchors cannot, so each has an anchor of its own.
    yield f'<a id="{section.anchor}"></a>'
    yield ""
    yield f"{'#' * level} {for_markdown(section.title)}"
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
    yield f"**{for_markdown(table.caption)}** [data (CSV)](data/{table.name}.csv)"
    yield ""
    yield _row([for_markdown(column.title) for column in table.columns])
    yield _row(["---:" if column.numeric else "---" for column in table.columns])
    for row in table.rows:
        yield _row([for_markdown(cell.text) for cell in row])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(figure: Figure) -> Iterator[str]:
    yield f"![{for_markdown(figure.alt)}](figures/{figure.name}.svg)"
    yield ""
    yield f"{for_markdown(figure.caption)} [data (CSV)](data/{figure.name}.csv)"


def _inline(text: Text) -> str:
    if isinstance(text, str):
        return for_markdown(text)
    return "".join(
        f"[{for_markdown(part.text)}](#{part.anchor})"
        if isinstance(part, Link)
        else for_markdown(part)
        for part in text
    )
