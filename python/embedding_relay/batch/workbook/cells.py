"""Rows and cells of any kind of file, and how numbers and dates read to a person."""

from __future__ import annotations

import datetime
import re
from typing import Final, NamedTuple

# What XML cannot hold, and what no text should.
ILLEGAL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
SURROGATES: Final = re.compile("[\ud800-\udfff]")
LINE_ENDS: Final = re.compile("\r\n?")
LETTERS: Final = 26


class Cell(NamedTuple):
    """`problem` says why there is no value where there should be one: "holds the error value #N/A"."""

    text: str
    is_text: bool = True  # not a number, a date or a truth value
    problem: str = ""
    pictures: tuple[str, ...] = ()  # members of the workbook's container
    spread: bool = False  # the value of a merged cell, in a row where that cell is not written


class Row(NamedTuple):
    number: int  # as its owner sees it, from 1
    cells: dict[int, Cell]  # by column, from 0; empty cells are left out

    def is_empty(self) -> bool:
        return all(cell.spread for cell in self.cells.values())


def number_text(value: float) -> str:
    """As a spreadsheet shows it: 3 and not 3.0, and fifteen digits at most."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.15g}"


def date_text(value: datetime.datetime | datetime.date | datetime.time | datetime.timedelta) -> str:
    """ISO 8601; a moment at midnight is a day."""
    match value:
        case datetime.datetime():
            if value.time() == datetime.time():
                return value.date().isoformat()
            return value.replace(microsecond=0).isoformat(sep=" ")
        case datetime.time():
            return value.replace(microsecond=0).isoformat()
        case datetime.date():
            return value.isoformat()
        case _:
            seconds = round(value.total_seconds())
            return f"{seconds // 3600:02}:{seconds % 3600 // 60:02}:{seconds % 60:02}"


def clean_text(text: str) -> str:
    """`text` as a cell can hold it: one kind of line end, and nothing that XML forbids."""
    return ILLEGAL.sub("", LINE_ENDS.sub("\n", text))


def column_letter(index: int) -> str:
    """0 is A, 26 is AA."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, LETTERS)
        letters = chr(ord("A") + rest) + letters
    return letters


def column_index(letters: str) -> int:
    index = 0
    for letter in letters:
        index = index * LETTERS + ord(letter) - ord("A") + 1
    return index - 1
