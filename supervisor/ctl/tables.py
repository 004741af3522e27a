"""Print tables: with colours on a terminal, as plain columns anywhere else.

What is printed may come from clients and APIs that nobody trusts, so nothing but printable
characters reaches the terminal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, TextIO

if TYPE_CHECKING:  # it loads only where there is a terminal
    from rich.console import Console, RenderableType
    from rich.text import Text

GOOD: Final = "green"
WARN: Final = "yellow"
BAD: Final = "bold red"

_GAP: Final = "  "
_WIDE_FROM: Final = 110  # columns of the terminal


class Word(NamedTuple):
    """Be a text with a colour."""

    text: str
    tone: str = ""


Cell = str | Word


class Column(NamedTuple):
    """Describe a column; a wide one is left out where the terminal is narrow."""

    title: str
    right: bool = False
    wide: bool = False


@dataclass(slots=True)
class Table:
    """Hold rows of cells.

    Attributes:
        has_head: whether the titles of the columns are printed.
        widths: least width of each column; printing raises them to what it needed, so that the
            next page of the same table looks the same.
    """

    columns: Sequence[Column]
    rows: list[Sequence[Cell]]
    has_head: bool = True
    widths: list[int] = field(default_factory=list)

    def grow(self) -> None:
        """Raise the least widths to what the rows need."""
        least = self.widths or [len(c.title) if self.has_head else 0 for c in self.columns]
        self.widths = [
            max(width, *(len(clean(_text(row[i]))) for row in self.rows), 0)
            for i, width in enumerate(least)
        ]


Part = Cell | Table


def clean(text: str) -> str:
    """Make what a terminal would obey visible: controls, escapes, directions, odd spaces."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def encode_json(document: object) -> str:
    """Return JSON in one line, with nothing in it that a terminal obeys."""
    return json.dumps(document).replace("\x7f", "\\u007f")  # all else above ASCII is escaped


class Screen:
    """Print on a stream, in the way that suits it."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.is_terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self._console: Console | None = None

    def show(self, *parts: Part) -> None:
        """Print lines and tables."""
        if self.is_terminal:
            self.console.print(self.render(parts))
        else:
            for line in _plain_lines(parts):
                self._out.write(f"{line}\n")

    @property
    def console(self) -> Console:
        """Rich's console; it heeds NO_COLOR."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self._out, highlight=False, markup=False, emoji=False)
        return self._console

    def render(self, parts: Iterable[Part]) -> RenderableType:
        """Return what rich prints for the parts."""
        from rich.console import Group

        width = self.console.width
        return Group(*(_rich_table(p, width) if isinstance(p, Table) else _rich(p) for p in parts))


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Word) else cell


def _rich(cell: Cell) -> Text:
    from rich.text import Text

    return Text(clean(_text(cell)), style=cell.tone if isinstance(cell, Word) else "")


def _rich_table(table: Table, width: int) -> RenderableType:
    from rich.table import Table as RichTable

    table.grow()
    is_wide = width >= _WIDE_FROM
    shown = [i for i, column in enumerate(table.columns) if is_wide or not column.wide]
    fits = sum(table.widths[i] + len(_GAP) for i in shown) <= width
    result = RichTable(
        box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0), show_header=table.has_head
    )
    for i in shown:
        column = table.columns[i]
        result.add_column(
            column.title,
            justify="right" if column.right else "left",
            header_style="dim",
            overflow="fold",  # an id is worth nothing when its end is missing
            min_width=table.widths[i] if fits else None,
        )
    for row in table.rows:
        result.add_row(*(_rich(row[i]) for i in shown))
    return result


def _plain_lines(parts: Iterable[Part]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Table):
            yield from _plain_rows(part)
        else:
            yield clean(_text(part))


def _plain_rows(table: Table) -> Iterator[str]:
    table.grow()
    heads = [tuple(column.title for column in table.columns)] if table.has_head else []
    for row in [*heads, *table.rows]:
        cells = [clean(_text(cell)) for cell in row]
        padded = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, column, width in zip(cells, table.columns, table.widths, strict=True)
        ]
        yield _GAP.join(padded).rstrip()
