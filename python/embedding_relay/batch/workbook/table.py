"""One way to read rows, whatever the kind of the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from embedding_relay.batch.refusals import Unreadable
from embedding_relay.batch.workbook.analysis import Analysis, Kind
from embedding_relay.batch.workbook.book import Book, SheetPart, open_book
from embedding_relay.batch.workbook.cells import Row
from embedding_relay.batch.workbook.container import Container
from embedding_relay.batch.workbook.delimited import DelimitedTable
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.lines import LinesTable
from embedding_relay.batch.workbook.sheet import SheetTable


class Table(Protocol):
    def rows(self) -> Iterator[Row]:
        """Ascending by number. Rows that the file does not mention are left out, empty ones may come."""


@contextlib.contextmanager
def open_analyzed(
    source: Path, kind: Kind, analysis: Analysis, limits: Limits
) -> Iterator[tuple[Table, Container | None]]:
    """The rows of the sheet that was analysed, and the container that holds its pictures, if there is one."""
    match kind:
        case "xlsx":
            with open_book(source, limits) as book:
                yield SheetTable(book, find_sheet(book, analysis.sheet)), book.container
        case "csv":
            yield DelimitedTable(source, limits, analysis.delimiter), None
        case "jsonl":
            yield LinesTable(source, limits), None


def find_sheet(book: Book, name: str) -> SheetPart:
    for sheet in book.sheets:
        if sheet.name == name:
            return sheet
    there = ", ".join(sheet.name for sheet in book.sheets) or "none"
    raise Unreadable(f"the workbook has no sheet {name!r}; there are: {there}")
