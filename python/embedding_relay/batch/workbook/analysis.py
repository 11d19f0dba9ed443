"""The record of what was found in a workbook, and of what its owner chose: light enough for the store."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["xlsx", "csv", "jsonl"]
Role = Literal["prompt", "image", ""]


class Column(msgspec.Struct, frozen=True):
    name: str  # of the header; made unique by a number in parentheses where two are alike
    letter: str  # as the sheet shows it, "A"; for .jsonl the name again
    role: Role  # what the analysis takes it for
    filled: int  # rows with something in it
    samples: tuple[str, ...]  # a few values, shortened


class Sheet(msgspec.Struct, frozen=True):
    name: str
    rows: int  # below the header, empty ones not counted


class Choices(msgspec.Struct, frozen=True):
    """What the user named; everything left open is taken from the analysis."""

    sheet: str = ""
    prompt_column: str = ""
    image_columns: tuple[str, ...] | None = None  # () is: no images, whatever it looks like
    template: str = ""  # "Translate {text} into {language}": column names in braces, doubled braces for themselves


class Analysis(msgspec.Struct, frozen=True):
    sheets: tuple[Sheet, ...]
    sheet: str  # the one that is used
    columns: tuple[Column, ...]
    prompt_column: str  # "" where a template is needed, or lines are whole requests
    image_columns: tuple[str, ...]
    rows: int
    pictures: int  # embedded in the cells of this sheet
    header_row: int = 1  # its number in the sheet; 0 if the first row is data already, and for .jsonl
    width: int = 0  # columns in use, named or not: the answers come after them
    delimiter: str = ""  # of a .csv file
    requests: bool = False  # each line is a request in the format of OpenAI's Batch API
    notes: tuple[str, ...] = ()  # what a person should know before starting: "12 rows are empty and left out"
