"""One sheet of an .xlsx file as rows, in constant memory: values, merged cells, and the pictures in and over cells."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.cells import Cell, Row, column_index, column_letter, date_text, number_text
from embedding_relay.batch.workbook.xlsx.book import Book, SheetPart, unescaped
from embedding_relay.batch.workbook.xlsx.markup import Parser, chunks, local, whole_number
from embedding_relay.batch.workbook.xlsx.pictures import SheetPictures, find_pictures

REFERENCE: Final = re.compile(r"\$?([A-Z]{1,3})\$?([0-9]{1,7})")
MOST_ROWS: Final = 1_048_576
MOST_COLUMNS: Final = 16_384
# =IMAGE("https://…") shows a picture; it has no stored value.
IMAGE_FORMULA: Final = re.compile(r'(?:_xlfn\.)?IMAGE\(\s*"([^"]+)"', re.IGNORECASE)
# What WPS writes for a picture in a cell.
NAMED_PICTURE: Final = re.compile(r'(?:_xlfn\.)?DISPIMG\(\s*"([^"]+)"', re.IGNORECASE)
NOT_CALCULATED: Final = (
    "holds a formula without a stored result: open the workbook in Excel or LibreOffice, save it, and upload it again"
)


class Area(NamedTuple):
    """Rows and columns as in `Row`: rows from 1, columns from 0, both ends included."""

    first_row: int
    first_column: int
    last_row: int
    last_column: int


def parse_reference(reference: str) -> tuple[int, int]:
    """ "C5" as row and column."""
    found = REFERENCE.fullmatch(reference)
    if found is None:
        raise Unreadable(f"the workbook is damaged: {reference!r} is not the name of a cell")
    row, column = int(found.group(2)), column_index(found.group(1))
    if not 1 <= row <= MOST_ROWS or column >= MOST_COLUMNS:
        raise Unreadable(f"the workbook is damaged: there is no cell {reference}")
    return row, column


def parse_area(reference: str) -> Area:
    first, _, last = reference.partition(":")
    return Area(*parse_reference(first), *parse_reference(last or first))


def next_row(before: int, number: str | None) -> int:
    """The number of a row element: what it says, or else one more than the one before."""
    row = before + 1 if number is None else whole_number(number)
    if row is None or not before < row <= MOST_ROWS:
        raise Unreadable(f"the workbook is damaged: row {number} stands after row {before}")
    return row


class SheetTable:
    """A sheet as rows. Merged areas and pictures are looked up once, before the first row is read."""

    def __init__(self, book: Book, part: SheetPart) -> None:
        self._book = book
        self._part = part
        self.pictures: SheetPictures = find_pictures(book, part.member)
        self.areas = read_merged_areas(book, part.member)

    def header_end(self, row: int) -> int:
        """The last row of a header that begins in `row` and whose cells are merged with the ones below."""
        return max((area.last_row for area in self.areas if area.first_row == row), default=row)

    def rows(self) -> Iterator[Row]:
        written = read_rows(self._book, self._part.member, self.pictures)
        return spread_merged(with_floating(written, self.pictures.floating), self.areas)


def read_merged_areas(book: Book, member: str) -> list[Area]:
    """They come after the rows in the file, so it is read twice; but only if the word occurs in it at all."""
    if not mentions(book, member, b"mergeCell"):
        return []
    areas = list[Area]()

    def start(name: str, attributes: dict[str, str]) -> None:
        if local(name) == "mergeCell":
            areas.append(parse_area(attributes.get("ref", "")))
            if len(areas) > MOST_ROWS:
                raise TooLarge(f"{member} in the file holds more than {MOST_ROWS} merged cells")

    with book.container.stream(member) as stream:
        Parser(member, start).read(stream)
    return sorted(areas)


def mentions(book: Book, member: str, word: bytes) -> bool:
    """Whether `word` stands in the member, in an encoding that is ASCII where it can be or in UTF-16."""
    wide = b"\0".join(word[index : index + 1] for index in range(len(word)))
    rest = b""
    with book.container.stream(member) as stream:
        for chunk in chunks(stream):
            text = rest + chunk
            if word in text or wide in text:
                return True
            rest = text[-len(wide) :]
    return False


def read_rows(book: Book, member: str, pictures: SheetPictures) -> Iterator[Row]:
    """The rows as they are written, empty ones too."""
    reader = _RowReader(book, pictures)
    parser = Parser(member, reader.start, reader.end, reader.data)
    with book.container.stream(member) as stream:
        for chunk in chunks(stream):
            parser.feed(chunk)
            while reader.ready:
                yield reader.ready.popleft()
    parser.close()
    yield from reader.ready


class _RowReader:
    """Handlers for expat that make rows of a sheet's elements."""

    def __init__(self, book: Book, pictures: SheetPictures) -> None:
        self.ready: deque[Row] = deque()
        self._book = book
        self._pictures = pictures
        self._inside = False  # of the sheet's data
        self._row = 0
        self._column = -1
        self._cells: dict[int, Cell] = {}
        self._attributes: dict[str, str] = {}
        self._formula: list[str] | None = None
        self._value: list[str] = []
        self._into: list[str] | None = None
        self._aside = 0
        self._size = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        name = local(name)
        if not self._inside:
            self._inside = name == "sheetData"
        elif name == "c":
            reference = attributes.get("r")
            self._column = self._column + 1 if reference is None else parse_reference(reference)[1]
            self._attributes, self._formula, self._value, self._size = attributes, None, [], 0
        elif name in ("v", "t"):
            self._into = None if self._aside else self._value
        elif name == "f":
            self._into = self._formula = []
        elif name == "rPh":
            self._aside += 1
        elif name == "row":
            self._start_row(attributes.get("r"))

    def _start_row(self, number: str | None) -> None:
        row = next_row(self._row, number)
        self._row, self._column, self._cells = row, -1, {}

    def data(self, text: str) -> None:
        if self._into is not None:
            self._into.append(text)
            self._size += len(text)
            if self._size > self._book.container.limits.cell_chars:
                raise TooLarge(f"{self._here()} is longer than {self._book.container.limits.cell_chars} characters")

    def end(self, name: str) -> None:
        name = local(name)
        if not self._inside:
            return
        if name in ("v", "t", "f"):
            self._into = None
        elif name == "c":
            cell = self._cell()
            if cell is not None:
                self._cells[self._column] = cell
        elif name == "row":
            self.ready.append(Row(self._row, self._cells))
        elif name == "rPh":
            self._aside -= 1
        elif name == "sheetData":
            self._inside = False

    def _cell(self) -> Cell | None:
        value, kind = "".join(self._value), self._attributes.get("t", "n")
        placed = self._pictures.in_cell(self._attributes.get("vm", ""))
        if placed is not None:
            return Cell("", pictures=(placed,))
        if self._formula is not None:
            formula = "".join(self._formula).strip()
            if (named := NAMED_PICTURE.match(formula)) and (member := self._pictures.named.get(named.group(1))):
                return Cell("", pictures=(member,))
            if shown := IMAGE_FORMULA.match(formula):
                return Cell(shown.group(1))
            if not value and kind != "str":
                return Cell("", problem=NOT_CALCULATED)
        match kind:
            case "s":
                text = self._book.texts[self._integer(value)] if value.strip() else ""
            case "str" | "inlineStr":
                text = unescaped(value)
            case "e":
                return Cell("", problem=f"holds the error value {value}")
            case "b":
                return Cell("TRUE" if value.strip() == "1" else "FALSE", is_text=False)
            case _:
                return self._number(value, kind) if value.strip() else None
        return Cell(text) if text and not text.isspace() else None

    def _integer(self, value: str) -> int:
        number = whole_number(value)
        if number is None:
            raise Unreadable(f"the workbook is damaged: {self._here()} refers to text {value!r}")
        return number

    def _number(self, value: str, kind: str) -> Cell:
        if kind == "d":
            return Cell(value.strip().removesuffix("Z").replace("T", " ").removesuffix(" 00:00:00"), is_text=False)
        try:
            number = float(value)
        except ValueError:
            raise Unreadable(f"the workbook is damaged: {self._here()} holds {value!r} as a number") from None
        style = whole_number(self._attributes.get("s", "0"))
        duration = style in self._book.duration_styles
        if duration or style in self._book.date_styles:
            from openpyxl.utils.datetime import CALENDAR_MAC_1904, CALENDAR_WINDOWS_1900, from_excel

            epoch = CALENDAR_MAC_1904 if self._book.from_1904 else CALENDAR_WINDOWS_1900
            try:
                return Cell(date_text(from_excel(number, epoch, timedelta=duration)), is_text=False)
            except (OverflowError, ValueError):
                pass  # not a date that exists; Excel shows the number then, too
        return Cell(number_text(number), is_text=False)

    def _here(self) -> str:
        return f"cell {column_letter(self._column)}{self._row}"


def with_floating(rows: Iterable[Row], floating: Mapping[int, Mapping[int, Sequence[str]]]) -> Iterator[Row]:
    """The pictures that lie over cells belong to the cell of their upper left corner, be it written or not."""
    waiting = deque(sorted(floating))
    for row in rows:
        while waiting and waiting[0] < row.number:
            number = waiting.popleft()
            yield _with_pictures(Row(number, {}), floating[number])
        if waiting and waiting[0] == row.number:
            row = _with_pictures(row, floating[waiting.popleft()])
        yield row
    for number in waiting:
        yield _with_pictures(Row(number, {}), floating[number])


def _with_pictures(row: Row, pictures: Mapping[int, Sequence[str]]) -> Row:
    cells = dict(row.cells)
    for column, members in pictures.items():
        cell = cells.get(column, Cell(""))
        cells[column] = cell._replace(pictures=(*cell.pictures, *members))
    return Row(row.number, cells)


def spread_merged(rows: Iterable[Row], areas: Sequence[Area]) -> Iterator[Row]:
    """The value of a merged cell counts for all of its rows, in its first column."""
    waiting = deque(area for area in areas if area.last_row > area.first_row)
    current: dict[int, tuple[int, Cell]] = {}  # by column: the last row of the area, and its value
    for row in rows:
        for column in [column for column, (last, _) in current.items() if last < row.number]:
            del current[column]
        for column, (_, cell) in current.items():
            row.cells.setdefault(column, cell)
        while waiting and waiting[0].first_row <= row.number:
            area = waiting.popleft()
            value = row.cells.get(area.first_column)
            if area.first_row == row.number and value is not None and not value.spread:
                current[area.first_column] = area.last_row, value._replace(spread=True)
        yield row
