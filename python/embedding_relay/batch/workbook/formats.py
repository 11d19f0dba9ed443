"""One way to read rows and to write answers, whichever of the three kinds of file it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from embedding_relay.batch.tasks import Result
from embedding_relay.batch.workbook import csv_file, jsonl_file
from embedding_relay.batch.workbook.analysis import Analysis, Kind
from embedding_relay.batch.workbook.cells import Row
from embedding_relay.batch.workbook.container import Container
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.xlsx import answers as xlsx_answers
from embedding_relay.batch.workbook.xlsx.book import find_sheet, open_book
from embedding_relay.batch.workbook.xlsx.sheet import SheetTable


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
            yield csv_file.DelimitedTable(source, limits, analysis.delimiter), None
        case "jsonl":
            yield jsonl_file.LinesTable(source, limits), None


def write_answers(source: Path, kind: Kind, analysis: Analysis, results: Iterable[Result], out: Path) -> None:
    """The same file with five columns after its last one. `results` ascend by row.

    What is not an answer stays as it is, to the byte where the format allows it.
    """
    match kind:
        case "xlsx":
            xlsx_answers.write(source, analysis, results, out)
        case "csv":
            csv_file.write(source, analysis, results, out)
        case "jsonl":
            jsonl_file.write(source, analysis, results, out)


def check_answers(out: Path, kind: Kind, analysis: Analysis, results: Iterable[Result]) -> None:
    """Read `out` back; Unreadable if it is damaged, NotWhatWasSaved if it does not hold exactly these answers."""
    match kind:
        case "xlsx":
            xlsx_answers.check(out, analysis, results)
        case "csv":
            csv_file.check(out, analysis, results)
        case "jsonl":
            jsonl_file.check(out, analysis, results)
