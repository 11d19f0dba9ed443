"""Comma-separated files: encoding, delimiter and quotes as found, and answers added in the same style."""

from __future__ import annotations

import codecs
import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final, NamedTuple

import msgspec

from embedding_relay.batch.errors import NotWhatWasSaved, TooLarge, Unreadable
from embedding_relay.batch.tasks import Result
from embedding_relay.batch.workbook.analysis import Analysis
from embedding_relay.batch.workbook.answers import OURS, Ascending, answer_names, values
from embedding_relay.batch.workbook.cells import Cell, Row, clean_text
from embedding_relay.batch.workbook.limits import MIB, Limits

QUOTE: Final = '"'
DELIMITERS: Final = ",;\t|"
SAMPLE_CHARS: Final = 2**18
SAMPLE_RECORDS: Final = 100
NUMBER: Final = re.compile(r"[+-]?(\d+([.,]\d+)*|\d*[.,]\d+)([eE][+-]?\d+)?%?")
# A first line that tells Excel the delimiter; it is not a row.
DELIMITER_LINE: Final = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)
FREQUENT_CHINESE: Final = re.compile(rb"[\xb0-\xd7][\xa1-\xfe]")
RARE_CHINESE: Final = re.compile(rb"[\xd8-\xf7][\xa1-\xfe]")
BOMS: Final = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# A spreadsheet evaluates a cell that begins with one of these as a formula, wherever the text came from.
FORMULA: Final = re.compile(r"[=+\-@\t\r]")
PLAIN_NUMBER: Final = re.compile(r"[+-]?\d+([.,]\d+)?")


class Style(msgspec.Struct, frozen=True):
    encoding: str
    bom: bytes
    delimiter: str
    line_end: str
    quotes_all: bool  # even where no quotes are needed
    first_line: str  # the one that names the delimiter, or ""

    @property
    def is_unicode(self) -> bool:
        return self.encoding.startswith("utf")


class Record(NamedTuple):
    number: int
    text: str  # as it stands in the file, without its line end
    end: str
    fields: list[str]


class DelimitedTable:
    """A .csv file as rows."""

    def __init__(self, source: Path, limits: Limits, delimiter: str = "") -> None:
        self.style = find_style(source, limits, delimiter)
        self._source = source
        self._limits = limits
        self.width = 0  # of the widest record so far, empty cells at its end included

    def rows(self) -> Iterator[Row]:
        with open_text(self._source, self.style) as file:
            for record in read_records(file, self.style.delimiter, self._limits):
                self.width = max(self.width, len(record.fields))
                cells = {
                    index: Cell(field, NUMBER.fullmatch(field.strip()) is None)
                    for index, field in enumerate(record.fields)
                    if field.strip()
                }
                yield Row(record.number, cells)


@contextlib.contextmanager
def open_text(source: Path, style: Style) -> Iterator[IO[str]]:
    """The text after the byte order mark and the line that names the delimiter."""
    with source.open("rb") as raw:
        raw.seek(len(style.bom) + len(style.first_line.encode(style.encoding)))
        with io.TextIOWrapper(raw, style.encoding, newline="") as file:
            yield file


def read_records(lines: Iterator[str], delimiter: str, limits: Limits) -> Iterator[Record]:
    """Numbered as a spreadsheet numbers them: a quoted cell may hold line ends, and an empty line is an empty row."""
    for number, first in enumerate(lines, 1):
        line = first
        if QUOTE in line:
            line, fields = _read_quoted(line, lines, delimiter, limits, number)
            body = line.rstrip("\r\n")
        else:
            body = line.rstrip("\r\n")
            fields = body.split(delimiter, limits.columns) if body else []
        if len(fields) > limits.columns:
            raise TooLarge(f"row {number} has {len(fields)} cells; {limits.columns} are accepted")
        if len(line) > limits.cell_chars:
            raise TooLarge(f"row {number} is longer than {limits.cell_chars} characters")
        yield Record(number, body, line[len(body) :], fields)


def _read_quoted(text: str, lines: Iterator[str], delimiter: str, limits: Limits, number: int) -> tuple[str, list[str]]:
    """The whole record that `text` begins, and its fields."""
    fields, at = list[str](), 0
    while True:
        value = ""
        if text.startswith(QUOTE, at):
            close = at + 1
            while (close := text.find(QUOTE, close)) < 0 or text.startswith(QUOTE, close + 1):
                if close >= 0:
                    close += 2  # a doubled quote stands for one
                    continue
                close = len(text)
                line = next(lines, None)
                if line is None or len(text) > limits.cell_chars:
                    raise Unreadable(f"a quotation mark is opened in row {number} and never closed")
                text += line
            value = text[at + 1 : close].replace(QUOTE * 2, QUOTE)
            at = close + 1
        end = len(text.rstrip("\r\n"))
        stop = text.find(delimiter, at, end)
        if stop < 0:
            return text, [*fields, value + text[at:end]]
        fields.append(value + text[at:stop])
        if len(fields) > limits.columns:
            return text, fields
        at = stop + 1


def find_style(source: Path, limits: Limits, delimiter: str = "") -> Style:
    """`delimiter` is the one that is known already, if it is."""
    bom, encoding = find_encoding(source)
    with source.open("rb") as raw:
        raw.seek(len(bom))
        with io.TextIOWrapper(raw, encoding, newline="") as file:
            sample = file.read(SAMPLE_CHARS)
            whole = not file.read(1)
    named = DELIMITER_LINE.match(sample)
    first_line = named.group() if named else ""
    records = {
        candidate: sample_records(sample[len(first_line) :], candidate, whole, limits)
        for candidate in (delimiter or (named.group(1) if named else DELIMITERS))
    }
    delimiter = max(records, key=lambda candidate: regularity(records[candidate]))
    ends = Counter(record.end for record in records[delimiter] if record.end)
    filled = [record for record in records[delimiter] if record.fields]
    return Style(
        encoding=encoding,
        bom=bom,
        delimiter=delimiter,
        line_end=ends.most_common(1)[0][0] if ends else "\r\n",
        quotes_all=bool(filled) and all(quotes_every_field(record, delimiter) for record in filled),
        first_line=first_line,
    )


def sample_records(sample: str, delimiter: str, whole: bool, limits: Limits) -> list[Record]:
    records = list[Record]()
    try:
        for record in read_records(iter(io.StringIO(sample, newline="")), delimiter, limits):
            records.append(record)
            if len(records) == SAMPLE_RECORDS:
                return records
    except (Unreadable, TooLarge):
        return records  # a cell that the sample cuts, or the wrong delimiter: reading the file will tell
    return records if whole else records[:-1]


def regularity(records: list[Record]) -> tuple[float, int]:
    """How many records have as many cells as the first, and how many cells that are; one cell says nothing."""
    widths = [len(record.fields) for record in records if record.fields]
    if not widths or widths[0] == 1:
        return 0.0, 0
    return sum(width == widths[0] for width in widths) / len(widths), widths[0]


def quotes_every_field(record: Record, delimiter: str) -> bool:
    return record.text == delimiter.join(quoted(field) for field in record.fields)


def quoted(field: str) -> str:
    return QUOTE + field.replace(QUOTE, QUOTE * 2) + QUOTE


def find_encoding(source: Path) -> tuple[bytes, str]:
    """The byte order mark and the encoding that the whole file obeys."""
    with source.open("rb") as file:
        head = file.read(4096)
    for bom, encoding in BOMS:
        if head.startswith(bom):
            if not decodes(source, encoding, len(bom)):
                raise Unreadable(f"the file says that it is {encoding.upper()} and is not")
            return bom, encoding
    if b"\0" in head:
        for encoding, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
            if zeros.count(0) > len(zeros) / 2 and decodes(source, encoding, 0):
                return b"", encoding
        raise Unreadable("the file is not text, though it is named like a table of texts")
    if decodes(source, "utf-8", 0):
        return b"", "utf-8"
    if decodes(source, "gb2312", 0) and reads_as_chinese(source):
        return b"", "gb18030"
    return b"", "cp1252" if decodes(source, "cp1252", 0) else "latin-1"


def reads_as_chinese(source: Path) -> bool:
    """Whether pairs of high bytes are frequent Chinese characters; read so, Western letters would be rare ones."""
    with source.open("rb") as file:
        sample = file.read(MIB)
    return len(FREQUENT_CHINESE.findall(sample)) > len(RARE_CHINESE.findall(sample))


def decodes(source: Path, encoding: str, skip: int) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    with source.open("rb") as file:
        file.seek(skip)
        try:
            while chunk := file.read(MIB):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


# ---- with the answers


def write(source: Path, analysis: Analysis, results: Iterable[Result], out: Path) -> None:
    style = find_style(source, OURS, analysis.delimiter)
    written = style_with_answers(style)
    pending = Ascending(results)
    with out.open("wb") as raw, open_text(source, style) as file:
        raw.write(written.bom)
        with io.TextIOWrapper(raw, written.encoding, newline="") as target:
            target.write(style.first_line)
            for record in read_records(file, style.delimiter, OURS):
                result = pending.at(record.number)
                added: Sequence[str] = ()
                if result is not None:
                    added = cells(result)
                elif record.number == analysis.header_row:
                    added = answer_names(analysis)
                target.write(record.text)
                if added:
                    missing = [""] * (analysis.width - max(1, len(record.fields)))
                    for field in (*missing, *added):
                        target.write(style.delimiter + field_text(field, style))
                target.write(record.end)
            pending.expect_none()


def style_with_answers(style: Style) -> Style:
    """An answer may hold any character, so a file in an encoding that cannot hold all of them becomes UTF-8."""
    if style.is_unicode:
        return style
    return msgspec.structs.replace(style, encoding="utf-8", bom=codecs.BOM_UTF8)


def cells(result: Result) -> list[str]:
    answer, status, error, *tokens = values(result)
    return [harmless(clean_text(answer)), status, harmless(clean_text(error)), *map(str, tokens)]


def harmless(text: str) -> str:
    return f"'{text}" if FORMULA.match(text) and not PLAIN_NUMBER.fullmatch(text) else text


def field_text(field: str, style: Style) -> str:
    special = style.delimiter in field or any(mark in field for mark in f"{QUOTE}\r\n") or field != field.strip()
    return quoted(field) if special or style.quotes_all else field


def check(out: Path, analysis: Analysis, results: Iterable[Result]) -> None:
    style = find_style(out, OURS, analysis.delimiter)
    pending = Ascending(results)
    with open_text(out, style) as file:
        for record in read_records(file, style.delimiter, OURS):
            result = pending.at(record.number)
            expected: Sequence[str] = ()
            if result is not None:
                expected = cells(result)
            elif record.number == analysis.header_row:
                expected = answer_names(analysis)
            if record.fields[analysis.width :] != list(expected):
                raise NotWhatWasSaved(f"row {record.number} of the saved file does not hold its answer")
        pending.expect_none()
