"""A report as one HTML page: style, script, figures and data are all inside it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hfbench.errors.harmless import for_html
from hfbench.report.document import (
    Block,
    Bullets,
    Cell,
    Column,
    Document,
    Figure,
    Link,
    Paragraph,
    Section,
    Table,
    Text,
)
from hfbench.report.drawing import THEME, for_page

_STYLE_SHEET = re.compile(r"<style[^>]*>(.*?)</style>", re.DOTALL)
_HERE = Path(__file__).parent
_NAMES = ("baseline",)  # columns of words that may be long names
_SORTABLE_ROWS = 2  # fewer cannot be sorted
_LONG_WORD = 24  # characters after which a name without an underscore may be broken
_LONG_TEXT = 40  # characters above which a cell's text is broken into lines


def render_page(document: Document) -> str:
    """Write the report as one HTML file that loads nothing and opens from disk."""
    title = for_html(document.title)
    style, script = f"\n{_theme()}\n{_asset('page.css')}", f"\n{_asset('page.js')}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            _policy(document, style, script),
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{title}</title>",
            # Without one, a browser asks the server for /favicon.ico and logs that there is none.
            '<link rel="icon" href="data:,">',
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            '<a class="skip" href="#main">Skip to the report</a>',
            f"<header>\n<h1>{title}</h1>\n</header>",
            '<nav aria-label="Contents">',
            *_contents(document.sections),
            "</nav>",
            '<main id="main" tabindex="-1">',
            '<section class="lead" aria-label="Verdicts">',
            *(line for block in document.lead for line in _render(block)),
            "</section>",
            *(line for section in document.sections for line in _section(section, 2)),
            "</main>",
            "<footer><p>Written by hfbench from the results of finished runs.</p></footer>",
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _policy(document: Document, style: str, script: str) -> str:
    """Allow the page its own style and script, by their hashes, and nothing else.

    Figures are styled by attributes, and each has a style sheet of its own.
    """
    figures = [item.svg for item in document.attachments() if isinstance(item, Figure)]
    sheets = [style, *(sheet for svg in figures for sheet in _STYLE_SHEET.findall(for_page(svg)))]
    styles = " ".join(dict.fromkeys(map(_source_hash, sheets)))
    rules = (
        "default-src 'none'",
        f"script-src {_source_hash(script)}",
        "style-src 'unsafe-inline'",  # for browsers that do not know the two below
        f"style-src-elem {styles}",
        "style-src-attr 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(rules)}">'


def _source_hash(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _asset(name: str) -> str:
    return (_HERE / name).read_text("utf-8")


def _theme() -> str:
    """Write both themes as CSS variables; paper is always light."""

    def variables(place: int) -> str:
        return " ".join(f"--{name}: {colors[place]};" for name, colors in THEME.items())

    return (
        f":root {{ {variables(0)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(1)} }} }}"
    )


def _contents(sections: Sequence[Section]) -> Iterator[str]:
    yield "<ul>"
    for section in sections:
        yield f'<li><a href="#{for_html(section.anchor)}">{for_html(section.title)}</a></li>'
    yield "</ul>"


def _section(section: Section, level: int) -> Iterator[str]:
    anchor = for_html(section.anchor)
    yield f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
    yield f'<h{level} id="{anchor}-title">{for_html(section.title)}</h{level}>'
    for block in section.blocks:
        yield from _render(block)
    for inner in section.sections:
        yield from _section(inner, level + 1)
    yield "</section>"


def _render(block: Block) -> Iterator[str]:
    if isinstance(block, Paragraph):
        yield f"<p>{_inline(block.text)}</p>"
    elif isinstance(block, Bullets):
        yield "<ul>"
        for item in block.items:
            yield f"<li>{_inline(item)}</li>"
        yield "</ul>"
    elif isinstance(block, Table):
        yield from _table(block)
    else:
        yield from _figure(block)


def _table(table: Table) -> Iterator[str]:
    caption = for_html(table.caption)
    sortable = " data-sortable" if len(table.rows) >= _SORTABLE_ROWS else ""
    name = for_html(table.name)
    yield f'<div class="scroll" role="region" aria-labelledby="table-{name}-caption" tabindex="0">'
    yield f"<table{sortable}>"
    yield f'<caption id="table-{name}-caption"><span>{caption}</span></caption>'
    yield "<thead>\n<tr>"
    for column in table.columns:
        kind = ' class="number"' if column.numeric else ""
        yield f'<th scope="col"{kind}>{_breakable(column.title)}</th>'
    yield "</tr>\n</thead>\n<tbody>"
    for row in table.rows:
        yield "<tr>"
        for number, (column, cell) in enumerate(zip(table.columns, row, strict=True)):
            yield _cell(column, cell, is_name=number == 0)
        yield "</tr>"
    yield "</tbody>\n</table>\n</div>"
    yield f'<p class="data">{_download(table)}</p>'


def _cell(column: Column, cell: Cell, is_name: bool) -> str:
    tag, scope = ("th", ' scope="row"') if is_name else ("td", "")
    kind = ' class="number"' if column.numeric else ""
    if len(cell.text) > _LONG_TEXT and not column.numeric:
        kind = ' class="long"'
    elif column.name in _NAMES and not column.numeric:
        kind = ' class="name"'
    value = "" if cell.value is None else f' data-sort-value="{float(cell.value)!r}"'
    breakable = is_name or (column.name in _NAMES and not column.numeric)
    text = _breakable(cell.text) if breakable else _two_lines(cell.text, column.numeric)
    return f"<{tag}{scope}{kind}{value}>{text}</{tag}>"


def _two_lines(text: str, numeric: bool) -> str:
    """Put the interval or the range of a number on a line of its own, or tables get too wide."""
    found = re.fullmatch(r"(\S.*) ([(\[].*[)\]])", text) if numeric else None
    if not found:
        return for_html(text)
    return f'{for_html(found[1])} <span class="range">{for_html(found[2])}</span>'


def _breakable(name: str) -> str:
    """Let a name be broken after an underscore, or anywhere if it has none for long."""
    parts = re.findall(rf"[^_]{{0,{_LONG_WORD - 1}}}_|[^_]{{1,{_LONG_WORD}}}", name)
    return "<wbr>".join(map(for_html, parts))


def _figure(figure: Figure) -> Iterator[str]:
    name = for_html(figure.name)
    # A quotation mark would end the attribute; the text itself may hold any.
    svg = for_page(figure.svg).replace(
        "<svg ", f'<svg role="img" aria-label="{for_html(figure.alt)}" ', 1
    )
    yield "<figure>"
    yield f'<div class="scroll" role="region" aria-labelledby="figure-{name}-caption" tabindex="0">'
    yield svg
    yield "</div>"
    caption = f"{for_html(figure.caption)} {_download(figure)}"
    yield f'<figcaption id="figure-{name}-caption">{caption}</figcaption>'
    yield "</figure>"


def _download(item: Table | Figure) -> str:
    content = base64.b64encode(item.csv().encode()).decode()
    name = for_html(item.name)
    return (
        f'<a download="{name}.csv" href="data:text/csv;charset=utf-8;base64,{content}" '
        f'aria-label="Data of {name} as CSV">data (CSV)</a>'
    )


def _inline(text: Text) -> str:
    if isinstance(text, str):
        return for_html(text)
    return "".join(
        f'<a href="#{for_html(part.anchor)}">{for_html(part.text)}</a>'
        if isinstance(part, Link)
        else for_html(part)
        for part in text
    )
