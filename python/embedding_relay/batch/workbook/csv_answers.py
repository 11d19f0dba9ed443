"""Answers in a .csv file: each record as it stands, and five more cells in the file's own style."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from embedding_relay.batch.tasks import Result
from embedding_relay.batch.workbook.analysis import Analysis
from embedding_relay.batch.workbook.answer_columns import (
    OURS,
    Ascending,
    NotTheAnswers,
    answer_names,
    values,
)
from embedding_relay.batch.workbook.cells import clean_text
from embedding_relay.batch.workbook.delimited import (
    QUOTE,
    Style,
    find_style,
    open_text,
    quoted,
    read_records,
)

# A spreadsheet takes a cell that begins so for a formula, wherever the text came from.
FORMULA: Final = re.compile(r"[=+\-@\t\r]")
PLAIN_NUMBER: Final = re.compile(r"[+-]?\d+([.,]\d+)?")


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
                raise NotTheAnswers(f"row {record.number} of the saved file does not hold its answer")
        pending.expect_none()
