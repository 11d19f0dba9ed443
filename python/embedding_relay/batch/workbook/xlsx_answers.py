"""Answers in an .xlsx file: every member as it is, and one sheet with more cells. Charts, pictures and macros stay."""

from __future__ import annotations

import codecs
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final

from embedding_relay.batch.tasks import Result
from embedding_relay.batch.workbook.analysis import Analysis
from embedding_relay.batch.workbook.answer_columns import (
    OURS,
    Ascending,
    NotTheAnswers,
    answer_names,
    values,
)
from embedding_relay.batch.workbook.book import Book, open_book
from embedding_relay.batch.workbook.cells import Cell
from embedding_relay.batch.workbook.container import verify
from embedding_relay.batch.workbook.markup import chunks
from embedding_relay.batch.workbook.pictures import SheetPictures
from embedding_relay.batch.workbook.sheet import read_rows
from embedding_relay.batch.workbook.sheet_editor import SheetEditor, cell_text
from embedding_relay.batch.workbook.table import find_sheet

WIDE: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
DECLARATION: Final = re.compile(rb"^\s*<\?xml[^>]*\?>")
EMPTY: Final = Cell("")


def write(source: Path, analysis: Analysis, results: Iterable[Result], out: Path) -> None:
    with open_book(source, OURS) as book, zipfile.ZipFile(out, "w") as target:
        edited = find_sheet(book, analysis.sheet).member
        for name, info in book.container.members.items():
            copy = zipfile.ZipInfo(name, info.date_time)
            copy.compress_type, copy.external_attr = info.compress_type, info.external_attr
            copy.file_size = info.file_size
            if name == edited:
                with target.open(copy, "w", force_zip64=True) as file:
                    edit_sheet(book, edited, analysis, results, file)
            else:
                with book.container.stream(name) as stream, target.open(copy, "w") as file:
                    shutil.copyfileobj(stream, file)


def edit_sheet(book: Book, member: str, analysis: Analysis, results: Iterable[Result], file: IO[bytes]) -> None:
    pending = Ascending(results)
    editor = SheetEditor(member, analysis.header_row, analysis.width, answer_names(analysis), pending, file.write)
    with book.container.stream(member) as stream:
        for chunk in in_utf8(chunks(stream)):
            editor.feed(chunk)
    editor.close()
    pending.expect_none()


def in_utf8(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Markup is looked for as ASCII, so a sheet in UTF-16, which the format allows, is written in UTF-8."""
    first = next(pieces, b"")
    if not first.startswith(WIDE):
        yield first
        yield from pieces
        return
    decoder = codecs.getincrementaldecoder("utf-16")()
    yield DECLARATION.sub(b"", decoder.decode(first).encode("utf-8", "replace"))
    for piece in pieces:
        yield decoder.decode(piece).encode("utf-8", "replace")


def check(out: Path, analysis: Analysis, results: Iterable[Result]) -> None:
    pending = Ascending(results)
    with open_book(out, OURS) as book:
        verify(book.container)
        for row in read_rows(book, find_sheet(book, analysis.sheet).member, SheetPictures()):
            result = pending.at(row.number)
            expected: Sequence[str] = ()
            if row.number == analysis.header_row:
                expected = answer_names(analysis)
            elif result is not None:
                expected = [cell_text(str(value)) for value in values(result)]
            found = [row.cells.get(column, EMPTY).text for column in range(analysis.width, analysis.width + 5)]
            # A cell of nothing but blanks reads as an empty one.
            if [text.strip() for text in found] != [text.strip() for text in expected or [""] * 5]:
                raise NotTheAnswers(f"row {row.number} of the saved workbook does not hold its answer")
        pending.expect_none()
