"""One pass over a table: its header, and for each column how much is in it and what it looks like."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import msgspec

from embedding_relay.batch.refusals import TooLarge
from embedding_relay.batch.workbook.cells import Cell, Row
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.naming import find_header, name_columns
from embedding_relay.batch.workbook.references import (
    Uploaded,
    is_picture,
    is_reference,
    split_references,
)

HEADER_WITHIN = 20
SAMPLES = 3
SAMPLE_CHARS = 80
# Telling a column's kind needs no more of its cells than this.
JUDGED = 1000


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
    return Survey(header, name_columns(header, facts), facts, count, empty, width)
