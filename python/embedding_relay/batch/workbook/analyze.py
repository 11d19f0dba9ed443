"""Find out what is in a workbook: its sheets and columns, which column has the prompts and which have pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.analysis import Analysis, Choices, Column, Kind, Role, Sheet
from embedding_relay.batch.workbook.answers import NAMES
from embedding_relay.batch.workbook.cells import Cell, Row, column_letter
from embedding_relay.batch.workbook.choices import choose
from embedding_relay.batch.workbook.csv_file import DelimitedTable
from embedding_relay.batch.workbook.images import Uploaded, is_picture, is_reference, load_uploaded, split_references
from embedding_relay.batch.workbook.jsonl_file import LinesTable, is_request, read_lines, read_requests
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.naming import (
    PICTURE_WORDS,
    PLACE_WORDS,
    PROMPT_WORDS,
    find_header,
    is_word,
    name_columns,
    rank,
)
from embedding_relay.batch.workbook.xlsx.book import Book, SheetPart, find_sheet, open_book
from embedding_relay.batch.workbook.xlsx.drawings import beside, find_covered
from embedding_relay.batch.workbook.xlsx.sheet import SheetTable, parse_area

HEADER_WITHIN = 20
SAMPLES = 3
SAMPLE_CHARS = 80
# Telling a column's kind needs no more of its cells than this.
JUDGED = 1000


def analyze(source: Path, kind: Kind, choices: Choices, limits: Limits) -> Analysis:
    """`source` stands in the folder that `receive` filled. Every row is read once."""
    uploaded = load_uploaded(source.parent)
    match kind:
        case "xlsx":
            analysis = _analyze_book(source, choices, uploaded, limits)
        case "csv":
            _refuse_sheet(choices)
            table = DelimitedTable(source, limits)
            found = survey(table.rows(), True, uploaded, limits)
            found.width = max(found.width, table.width)
            analysis = _describe(found)
            analysis = msgspec.structs.replace(analysis, delimiter=table.style.delimiter)
            if not table.style.is_unicode:
                note = f"the file is read as {table.style.encoding}; with the answers it will be UTF-8"
                analysis = msgspec.structs.replace(analysis, notes=(*analysis.notes, note))
        case "jsonl":
            _refuse_sheet(choices)
            if _holds_requests(source, limits):
                return _with_short_names(_analyze_requests(source, limits), limits)
            lines = LinesTable(source, limits)
            found = survey(lines.rows(), False, uploaded, limits)
            found.names = dict(enumerate(lines.names))
            analysis = _describe(found, by_key=True)
    if not analysis.rows:
        raise Unreadable(f"there are no rows in it{_of(analysis)}: it needs a row for each prompt, below the header")
    if analysis.width > limits.columns:
        raise TooLarge(
            f"{analysis.width} columns are in use{_of(analysis)}; {limits.columns} are accepted, "
            "for the answers come after them"
        )
    chosen = choose(_with_short_names(analysis, limits), choices)
    return msgspec.structs.replace(
        analysis, prompt_column=chosen.prompt_column, image_columns=chosen.image_columns, columns=chosen.columns
    )


def _with_short_names(analysis: Analysis, limits: Limits) -> Analysis:
    if sum(len(column.name) for column in analysis.columns) > limits.names_chars:
        raise TooLarge(
            f"the names of the columns{_of(analysis)} have more than {limits.names_chars} characters together"
        )
    return analysis


def _refuse_sheet(choices: Choices) -> None:
    if choices.sheet:
        raise Unreadable(f"there is no sheet {choices.sheet!r}: only .xlsx files have sheets")


def _of(analysis: Analysis) -> str:
    return f" (sheet {analysis.sheet!r})" if analysis.sheet else ""


# ---- .xlsx


def _analyze_book(source: Path, choices: Choices, uploaded: Uploaded, limits: Limits) -> Analysis:
    with open_book(source, limits) as book:
        if not book.sheets:
            raise Unreadable("the workbook has no sheet with cells")
        parts = sorted(book.sheets, key=lambda part: part.hidden)
        wanted = find_sheet(book, choices.sheet) if choices.sheet else None
        found = {part.name: _describe_sheet(book, part, uploaded, limits) for part in parts}
    used = found[wanted.name] if wanted is not None else _best(list(found.values()))
    sheets = tuple(Sheet(name, analysis.rows) for name, analysis in found.items())
    return msgspec.structs.replace(used, sheets=sheets)


def _best(sheets: Sequence[Analysis]) -> Analysis:
    """The first sheet with something to ask, else the first with rows, else the first."""
    asking = [sheet for sheet in sheets if sheet.rows and (sheet.prompt_column or sheet.image_columns)]
    return (asking or [sheet for sheet in sheets if sheet.rows] or list(sheets))[0]


def _describe_sheet(book: Book, part: SheetPart, uploaded: Uploaded, limits: Limits) -> Analysis:
    table = SheetTable(book, part)
    found = survey(table.rows(), True, uploaded, limits, table.header_end)
    header = 0 if found.header is None else found.header.number
    # A title above the header may be merged as far as it likes.
    merged = (area.last_column + 1 for area in table.areas if area.last_row >= header)
    found.width = max([found.width, *merged, *_table_ends(book, part)])
    analysis = msgspec.structs.replace(_describe(found), sheet=part.name)
    first = beside(found.width, len(NAMES), (header, found.last), find_covered(book, part.member))
    if first == found.width:
        return analysis
    note = f"the answers begin in column {column_letter(first)}, beside what lies over the sheet"
    return msgspec.structs.replace(analysis, width=first, notes=(*analysis.notes, note))


def _table_ends(book: Book, part: SheetPart) -> list[int]:
    """Where the sheet's tables (of "Format as Table") end: the answers must stand beside them."""
    ends = []
    for relation in book.relations(part.member).values():
        if relation.kind == "table" and relation.target:
            reference = book.parse(relation.target).attributes.get("ref", "")
            ends.append(parse_area(reference).last_column + 1)
    return ends


# ---- what a survey says


def _describe(found: Survey, by_key: bool = False) -> Analysis:
    facts = {index: found.facts.get(index, Facts()) for index in found.names}
    roles = _roles(found.names, facts)
    columns = tuple(
        Column(
            name,
            name if by_key else column_letter(index),
            roles[index],
            facts[index].filled,
            tuple(facts[index].samples),
        )
        for index, name in found.names.items()
    )
    header = 0 if found.header is None else found.header.number
    notes = _notes(found, facts, by_key)
    misplaced = sum(facts[index].pictures for index, role in roles.items() if role != "image")
    if misplaced:
        pictures = _counted(misplaced, "picture is", "pictures are")
        notes.append(f"{pictures} over columns that do not look like columns of pictures: name them as image columns")
    return Analysis(
        sheets=(Sheet("", found.rows),),
        sheet="",
        columns=columns,
        prompt_column=next((column.name for column in columns if column.role == "prompt"), ""),
        image_columns=tuple(column.name for column in columns if column.role == "image"),
        rows=found.rows,
        pictures=sum(fact.pictures for fact in facts.values()),
        header_row=header,
        width=found.width,
        notes=tuple(notes),
    )


def _notes(found: Survey, facts: dict[int, Facts], by_key: bool) -> list[str]:
    notes = []
    if found.header is None and not by_key and found.rows:
        notes.append("the first row looks like data, so it is asked too; the columns are called by their letters")
    if found.empty:
        notes.append(f"{_counted(found.empty, 'row is', 'rows are')} empty and left out")
    for index, fact in facts.items():
        if fact.problems:
            cells = _counted(fact.problems, "cell", "cells")
            notes.append(
                f"column {found.names[index]!r} has {cells} with an error or a formula without a stored result"
            )
    return notes


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _roles(names: dict[int, str], facts: dict[int, Facts]) -> dict[int, Role]:
    shown = [index for index, name in names.items() if _shows_pictures(name, facts[index])]
    # A column called "link" holds pictures if no other one does, and if all of it could be.
    shown = shown or [index for index, name in names.items() if _leads_to_pictures(name, facts[index])]
    roles: dict[int, Role] = {index: "image" if index in shown else "" for index in names}
    others = [index for index, role in roles.items() if not role]
    named = [index for index in others if rank(names[index], PROMPT_WORDS)]
    with_text = [index for index in others if facts[index].texts]
    if named:
        # Of two names that fit as well, the one with more in it.
        prompt = max(named, key=lambda index: (rank(names[index], PROMPT_WORDS), facts[index].filled, -index))
        roles[prompt] = "prompt"
    elif len(with_text) == 1:
        roles[with_text[0]] = "prompt"
    return roles


def _shows_pictures(name: str, facts: Facts) -> bool:
    # A picture may lie over a column of texts because its corner does.
    if facts.pictures > facts.texts or facts.sure * 2 > facts.judged:
        return True
    if rank(name, PICTURE_WORDS) == 0:
        return False
    return facts.possible > 0 or facts.pictures > 0 or (not facts.judged and is_word(name, PICTURE_WORDS))


def _leads_to_pictures(name: str, facts: Facts) -> bool:
    return is_word(name, PLACE_WORDS) and 0 < facts.judged == facts.possible


# ---- requests of OpenAI's Batch API


def _holds_requests(source: Path, limits: Limits) -> bool:
    for line in read_lines(source, limits):
        if line.fields is not None:
            return is_request(line.fields)
    return False


def _analyze_requests(source: Path, limits: Limits) -> Analysis:
    count = 0
    for _ in read_requests(source, limits):
        count += 1
        if count > limits.rows:
            raise TooLarge(f"there are more than {limits.rows} requests: split the file")
    names = sorted({name for line in read_lines(source, limits) for name in line.fields or ()})
    columns = tuple(Column(name, name, "", count, ()) for name in names)
    return Analysis((Sheet("", count),), "", columns, "", (), count, 0, header_row=0, width=len(names), requests=True)


# ---- one pass over a table


class Facts(msgspec.Struct):
    """What is in one column, below the header."""

    filled: int = 0
    texts: int = 0
    problems: int = 0
    pictures: int = 0
    judged: int = 0
    sure: int = 0  # of the judged ones: those that can hardly be anything but pictures
    possible: int = 0
    samples: list[str] = msgspec.field(default_factory=list)

    def add(self, cell: Cell, uploaded: Uploaded) -> None:
        self.filled += 1
        self.pictures += 0 if cell.spread else len(cell.pictures)
        self.problems += bool(cell.problem)
        self.texts += bool(cell.text) and cell.is_text
        if cell.text and len(self.samples) < SAMPLES:
            shown = " ".join(cell.text[: SAMPLE_CHARS * 2].split())
            self.samples.append(shown if len(shown) <= SAMPLE_CHARS else shown[: SAMPLE_CHARS - 1] + "…")
        if cell.text and self.judged < JUDGED:
            self.judged += 1
            parts = split_references(cell.text) if len(cell.text) < 4096 else [cell.text.strip()[:100]]
            known = [len(uploaded) > 0 and uploaded.find(part) is not None for part in parts if len(part) < 400]
            self.sure += bool(parts) and (all(map(is_picture, parts)) or (bool(known) and all(known)))
            self.possible += bool(parts) and all(map(is_reference, parts))


class Survey(msgspec.Struct):
    header: Row | None
    names: dict[int, str]
    facts: dict[int, Facts]
    rows: int
    empty: int  # rows between others that hold nothing
    width: int
    last: int  # the number of the last row


def survey(
    rows: Iterator[Row],
    named: bool,
    uploaded: Uploaded,
    limits: Limits,
    header_end: Callable[[int], int] = lambda row: row,
) -> Survey:
    """`named` is whether the rows may begin with a header; `header_end` tells how many rows one has."""
    filled = (row for row in rows if not row.is_empty())
    first = list(itertools.islice(filled, HEADER_WITHIN))
    header = find_header(first) if named else None
    if header is not None:
        # In a header of several rows, merged cells count for the last one too.
        header = next((row for row in first if row.number == header_end(header.number)), header)
    facts: dict[int, Facts] = {}
    last = 0 if header is None else header.number
    count = empty = width = 0
    for row in itertools.chain(first, filled):
        width = max(width, max(row.cells) + 1)
        if row.number <= last:
            continue  # the header, or a title above it
        for index, cell in row.cells.items():
            facts.setdefault(index, Facts()).add(cell, uploaded)
        count += 1
        empty += row.number - last - 1
        last = row.number
        if count > limits.rows:
            raise TooLarge(f"there are more than {limits.rows} rows: split the workbook")
    return Survey(header, name_columns(header, facts), facts, count, empty, width, last)
