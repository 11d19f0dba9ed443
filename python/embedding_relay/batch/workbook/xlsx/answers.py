"""Answers in an .xlsx file: one sheet gets more cells, every other member is copied. Charts, pictures, macros stay."""

from __future__ import annotations

import codecs
import itertools
import re
import shutil
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final
from xml.sax.saxutils import escape, quoteattr

from embedding_relay.batch.errors import NotWhatWasSaved, Unreadable
from embedding_relay.batch.tasks import Result
from embedding_relay.batch.workbook.analysis import Analysis
from embedding_relay.batch.workbook.answers import OURS, Ascending, answer_names, values
from embedding_relay.batch.workbook.cells import Cell, clean_text, column_letter
from embedding_relay.batch.workbook.container import verify
from embedding_relay.batch.workbook.limits import MIB
from embedding_relay.batch.workbook.xlsx.book import Book, escaped, find_sheet, open_book
from embedding_relay.batch.workbook.xlsx.markup import Parser, chunks, local, whole_number
from embedding_relay.batch.workbook.xlsx.pictures import SheetPictures
from embedding_relay.batch.workbook.xlsx.sheet import next_row, parse_area, parse_reference, read_rows

TAG: Final = re.compile(rb"""<(?:"[^"]*"|'[^']*'|[^>"'])*>""")
SPANS: Final = re.compile(rb"""(\sspans\s*=\s*["'])\s*(\d+):(\d+)\s*(["'])""")
REFERENCE: Final = re.compile(rb"""(\sref\s*=\s*["'])([^"']*)(["'])""")
# No spreadsheet program writes so much between two elements.
MOST_BETWEEN: Final = 8 * MIB
CELL_CHARS: Final = 32_767
# How wide our columns are at least and at most, in characters; and how many answers are looked at to fit them.
LEAST_WIDTHS: Final = (20, 10, 10, 10, 10)
MOST_WIDTH: Final = 60
FITTED: Final = 200
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
    results, names = iter(results), answer_names(analysis)
    first = list(itertools.islice(results, FITTED))
    pending = Ascending(itertools.chain(first, results))
    widths = fitting(names, first)
    editor = SheetEditor(member, analysis.header_row, analysis.width, names, widths, pending, file.write)
    with book.container.stream(member) as stream:
        for chunk in in_utf8(chunks(stream)):
            editor.feed(chunk)
    editor.close()
    pending.expect_none()


def fitting(names: Sequence[str], results: Iterable[Result]) -> list[int]:
    """The width of each of our columns, in characters."""
    widths = [max(least, _length(name)) for least, name in zip(LEAST_WIDTHS, names, strict=True)]
    for result in results:
        for column, value in enumerate(values(result)):
            widths[column] = max(widths[column], _length(str(value)))
    return [min(width + 2, MOST_WIDTH) for width in widths]


def _length(text: str) -> int:
    """Of the longest line; letters of East Asia are as wide as two others."""
    lines = text[: 16 * MOST_WIDTH].splitlines() or [""]
    return max(sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line[:MOST_WIDTH]) for line in lines)


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
                raise NotWhatWasSaved(f"row {row.number} of the saved workbook does not hold its answer")
        pending.expect_none()


# ---- the sheet, copied byte for byte while it streams by, with cells put in where they belong


def cell_text(text: str) -> str:
    """`text` as a cell can hold it. Excel counts what UTF-16 counts."""
    text = clean_text(text)
    if len(text) * 2 <= CELL_CHARS or len(text.encode("utf-16-le")) <= CELL_CHARS * 2:
        return text
    mark = f"\n[cut here: the text has {len(text)} characters, and a cell holds at most {CELL_CHARS}]"
    kept = text.encode("utf-16-le")[: (CELL_CHARS - len(mark)) * 2]
    return kept.decode("utf-16-le", "ignore") + mark


def opened(tag: bytes) -> bytes:
    """The start tag of an element that may have been written as an empty one."""
    return tag[:-2].rstrip() + b">" if tag.endswith(b"/>") else tag


class SheetEditor:
    """Takes the sheet in pieces and hands over the pieces of the edited one.

    The columns from `width` on are ours. Cells without a value may stand there, for a style may reach as far as the
    last column; ours take their place and keep their style.
    """

    def __init__(
        self,
        member: str,
        header_row: int,
        width: int,
        names: Sequence[str],
        widths: Sequence[int],
        pending: Ascending,
        emit: Callable[[bytes], object],
    ) -> None:
        self._member = member
        self._header_row = header_row
        self._width = width
        self._names = names
        self._end = width + len(names)
        self._columns = _Columns(width, widths)
        self._column_is_open = False
        self._pending = pending
        self._emit = emit
        self._parser = Parser(member, self._start, self._finish)
        self._buffer = b""
        self._at = 0  # where the buffer begins in the sheet
        self._copied = 0  # up to where the sheet has been handed over
        self._before = True  # the data
        self._inside = False
        self._row = 0
        self._column = -1
        self._prefix = ""
        self._values: Sequence[str | int] | None = None  # what has still to be put into this row
        self._styles: dict[int, str] = {}
        self._header_style = ""
        self._in_cell = False
        self._dropping = False  # an empty cell in one of our columns
        self._data_is_empty = False

    def feed(self, chunk: bytes) -> None:
        self._buffer += chunk
        self._parser.feed(chunk)
        self._buffer = self._buffer[self._copied - self._at :]
        self._at = self._copied
        if len(self._buffer) > MOST_BETWEEN:
            raise Unreadable(f"the workbook is damaged: {self._member} holds no cells for {MOST_BETWEEN // MIB} MiB")

    def close(self) -> None:
        self._parser.close()
        self._emit(self._buffer)

    # ---- expat's calls

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        name = local(tag)
        position = self._parser.position
        self._copy(position)
        if self._before:
            self._start_before_data(name, tag, position, attributes)
        elif not self._inside:
            return
        elif name == "c":
            self._start_cell(position, attributes)
        elif name == "row":
            self._start_row(position, attributes)
        elif name == "extLst" and not self._in_cell:
            self._emit_cells()  # in a row, it must come last

    def _start_before_data(self, name: str, tag: str, position: int, attributes: dict[str, str]) -> None:
        columns = self._columns
        if name == "dimension":
            self._replace_tag(position, self._wider_dimension)
        elif name == "cols" and self._tag(position).endswith(b"/>"):
            self._replace_tag(position, lambda text: opened(text) + columns.ours(tag[:-1]) + f"</{tag}>".encode())
        elif name == "col":
            self._column_is_open = not self._tag(position).endswith(b"/>")
            self._replace_tag(position, lambda text: columns.around_ours(text, tag, attributes))
        elif name == "sheetData":
            self._before, self._inside, self._prefix = False, True, tag[: -len(name)]
            if not columns.written:
                prefix = self._prefix
                self._emit(f"<{prefix}cols>".encode() + columns.ours(f"{prefix}col") + f"</{prefix}cols>".encode())
            self._data_is_empty = self._tag(position).endswith(b"/>")
            self._replace_tag(position, opened)

    def _start_row(self, position: int, attributes: dict[str, str]) -> None:
        self._row = next_row(self._row, attributes.get("r"))
        self._column, self._styles, self._header_style = -1, {}, ""
        for result in self._pending.before(self._row):
            self._emit_row(result.row, values(result))
        at_row = self._pending.at(self._row)
        if self._row == self._header_row:
            self._values = self._names
        elif at_row is not None:
            self._values = values(at_row)
        if self._values is not None:
            self._replace_tag(position, self._wider_spans)
            if self._tag(position).endswith(b"/>"):
                self._emit_cells()
                self._emit(f"</{self._prefix}row>".encode())

    def _start_cell(self, position: int, attributes: dict[str, str]) -> None:
        reference = attributes.get("r")
        self._column = self._column + 1 if reference is None else parse_reference(reference)[1]
        self._in_cell = True
        if self._values is None:
            return
        style = attributes.get("s", "")
        if self._column < self._width:
            self._header_style = style
        elif self._column < self._end:
            self._styles[self._column] = style
            # Of an element without an end tag, expat does not tell where it ends.
            self._dropping = not self._tag(position).endswith(b"/>")
            if not self._dropping:
                self._copied = position + len(self._tag(position))
        else:
            self._emit_cells()

    def _finish(self, tag: str) -> None:
        name = local(tag)
        position = self._parser.position
        if self._before and name == "cols" and not self._columns.written:
            self._copy(position)
            self._emit(self._columns.ours(tag[:-1]))
        elif self._before and name == "col" and self._column_is_open:
            self._column_is_open = False
            self._copied = position + len(self._tag(position))  # what began it was written as an empty element
        elif not self._inside:
            return
        elif name == "c":
            self._in_cell = False
            if self._dropping:
                self._dropping = False
                self._copied = position + len(self._tag(position))
        elif name == "row":
            self._copy(position)
            if self._values is not None:
                self._emit_cells()
        elif name == "sheetData":
            self._copy(position)
            self._inside = False
            for result in self._pending.rest():
                self._emit_row(result.row, values(result))
            if self._data_is_empty:
                self._emit(f"</{tag}>".encode())

    # ---- the sheet as it was

    def _copy(self, position: int) -> None:
        if self._dropping or position <= self._copied:
            return
        self._emit(self._buffer[self._copied - self._at : position - self._at])
        self._copied = position

    def _tag(self, position: int) -> bytes:
        found = TAG.match(self._buffer, position - self._at)
        if found is None:
            raise Unreadable(f"the workbook is damaged: {self._member} has a tag without an end")
        return found.group()

    def _replace_tag(self, position: int, by: Callable[[bytes], bytes]) -> None:
        tag = self._tag(position)
        self._emit(by(tag))
        self._copied = position + len(tag)

    # ---- what is new

    def _wider_dimension(self, tag: bytes) -> bytes:
        found = REFERENCE.search(tag)
        if found is None:
            return tag
        area = parse_area(found.group(2).decode("ascii", "replace"))
        first = f"{column_letter(area.first_column)}{area.first_row}"
        last = f"{column_letter(max(area.last_column, self._end - 1))}{area.last_row}"
        return tag[: found.start(2)] + f"{first}:{last}".encode() + tag[found.end(2) :]

    def _wider_spans(self, tag: bytes) -> bytes:
        tag = opened(tag)
        found = SPANS.search(tag)
        if found is None:
            return tag
        return tag[: found.start(3)] + str(max(int(found.group(3)), self._end)).encode() + tag[found.end(3) :]

    def _emit_row(self, number: int, cells: Sequence[str | int]) -> None:
        """A row that the sheet has not written, because nothing but a picture was in it."""
        before = self._row, self._styles
        self._row, self._styles, self._values = number, {}, cells
        self._emit(f'<{self._prefix}row r="{number}">'.encode())
        self._emit_cells()
        self._emit(f"</{self._prefix}row>".encode())
        self._row, self._styles = before

    def _emit_cells(self) -> None:
        for column, value in enumerate(self._values or (), self._width):
            style = self._styles.get(column, "")
            if not style and self._row == self._header_row:
                style = self._header_style
            self._emit(self._cell(column, value, style))
        self._values = None

    def _cell(self, column: int, value: str | int, style: str) -> bytes:
        prefix = self._prefix
        head = f'<{prefix}c r="{column_letter(column)}{self._row}"' + (f" s={quoteattr(style)}" if style else "")
        if isinstance(value, int):
            return f"{head}><{prefix}v>{value}</{prefix}v></{prefix}c>".encode()
        text = cell_text(value)
        if not text:
            return f"{head}/>".encode() if style else b""
        text = escape(escaped(text))
        start, end = f'<{prefix}is><{prefix}t xml:space="preserve">', f"</{prefix}t></{prefix}is></{prefix}c>"
        return f'{head} t="inlineStr">{start}{text}{end}'.encode()


class _Columns:
    """The widths that a sheet gives to its columns, with ours among them: to be seen whatever the sheet hides."""

    def __init__(self, width: int, widths: Sequence[int]) -> None:
        self.written = False
        self._first = width + 1  # columns are counted from 1 here
        self._last = width + len(widths)
        self._widths = list(widths)
        self._styles: dict[int, str] = {}

    def ours(self, tag: str) -> bytes:
        self.written = True
        return b"".join(
            _column(tag, column, column, {"width": str(width), "customWidth": "1", "style": self._styles.get(column)})
            for column, width in enumerate(self._widths, self._first)
        )

    def around_ours(self, text: bytes, tag: str, attributes: dict[str, str]) -> bytes:
        """What takes the place of one element. Elements ascend, so ours come before the first one behind them."""
        first, last = (whole_number(attributes.get(key, "")) or 0 for key in ("min", "max"))
        if last < self._first:
            return text if text.endswith(b"/>") else _column(tag, first, last, attributes)
        self._take_over(max(first, self._first), min(last, self._last), attributes)
        written = _column(tag, first, min(last, self._first - 1), attributes)
        if last > self._last:
            written += b"" if self.written else self.ours(tag)
            written += _column(tag, max(first, self._last + 1), last, attributes)
        return written

    def _take_over(self, first: int, last: int, attributes: dict[str, str]) -> None:
        """The style of our columns, and their width if somebody has made them wide and did not hide them."""
        hidden = attributes.get("hidden") in ("1", "true", "on")
        by_hand = attributes.get("customWidth") in ("1", "true", "on")
        width = attributes.get("width", "").partition(".")[0] if by_hand and not hidden else ""
        for column in range(first, last + 1):
            if "style" in attributes:
                self._styles[column] = attributes["style"]
            at = column - self._first
            self._widths[at] = max(self._widths[at], whole_number(width) or 0)


def _column(tag: str, first: int, last: int, attributes: Mapping[str, str | None]) -> bytes:
    """Nothing for no column."""
    if first > last:
        return b""
    given = {key: value for key, value in attributes.items() if value is not None}
    given |= {"min": str(first), "max": str(last)}
    return f"<{tag} {' '.join(f'{key}={quoteattr(value)}' for key, value in given.items())}/>".encode()
