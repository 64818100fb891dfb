"""What a report is made of, whatever it is written as: sections of text, tables and figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from hfbench.errors.harmless import for_csv

NOT_RUN = "not run"
NOT_GIVEN = "not given"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Link:
    """A place in the same report.

    Attributes:
        text: What the reader sees.
        anchor: Of a section.
    """

    text: str
    anchor: str


Text = str | Sequence[str | Link]


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What the reader sees.
        value: The number behind it in its column's unit, by which the column is sorted and which
            the CSV file holds in full; ``None`` for words.
    """

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        title: What the reader sees.
        name: In the CSV file, with its unit: ``execution_seconds``.
        numeric: Whether it holds numbers, which stand to the right.
    """

    title: str
    name: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column names the row.

    Attributes:
        name: Of its CSV file, without ending.
        caption: What it shows, with n.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def csv(self) -> str:
        """Return the table as CSV, numbers in full."""
        return to_csv(
            [column.name for column in self.columns],
            [
                [cell.text if cell.value is None else cell.value for cell in row]
                for row in self.rows
            ],
        )


@dataclass(frozen=True)
class Figure:
    """A picture and the data that it was drawn from.

    Attributes:
        name: Of its files, without ending.
        svg: The drawing, in the sentinel colours of `drawing`.
        alt: What it shows, in words, with its main numbers.
        caption: What it shows, with n.
        header: Column names of its data.
        data: Its data.
    """

    name: str
    svg: str
    alt: str
    caption: str
    header: Sequence[str]
    data: Sequence[Sequence[object]]

    def csv(self) -> str:
        """Return its data as CSV, numbers in full."""
        return to_csv(self.header, self.data)


@dataclass(frozen=True)
class Paragraph:
    """Some sentences."""

    text: Text


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[Text]


Block = Paragraph | Bullets | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it.

    Attributes:
        anchor: By which links find it.
        sections: Below the blocks, one level deeper.
    """

    title: str
    anchor: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    lead: Sequence[Block]
    sections: Sequence[Section]

    def attachments(self) -> list[Table | Figure]:
        """Return all tables and figures in order."""
        found: list[Table | Figure] = []

        def collect(blocks: Sequence[Block], sections: Sequence[Section]) -> None:
            found.extend(block for block in blocks if isinstance(block, Table | Figure))
            for section in sections:
                collect(section.blocks, section.sections)

        collect(self.lead, self.sections)
        return found


def to_csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write CSV as RFC 4180 has it, but with line feeds alone; ``None`` is an empty field.

    What a spreadsheet would take for a formula begins with an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(for_csv, header))
    writer.writerows(map(for_csv, row) for row in rows)
    return text.getvalue()
