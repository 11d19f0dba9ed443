"""Answers in a .jsonl file: five more keys in each line that was asked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from embedding_relay.batch.workbook.cells import SURROGATES
from embedding_relay.batch.workbook.lines import BOM, read_lines

_encode = msgspec.json.Encoder().encode


def write(source: Path, analysis: Analysis, results: Iterable[Result], out: Path) -> None:
    names = answer_names(analysis)
    pending = Ascending(results)
    with source.open("rb") as file, out.open("wb") as target:
        if file.read(len(BOM)) == BOM:
            target.write(BOM)
        for line in read_lines(source, OURS):
            result = pending.at(line.number) if line.fields is not None else None
            if result is None:
                target.write(line.text)
                continue
            # The line is an object, so its last character is the brace that ends it.
            body = line.text.rstrip()
            added = _encode(fields(names, result))[1:]
            target.write(body[:-1].rstrip() + (b", " if line.fields else b"") + added + line.text[len(body) :])
        pending.expect_none()


def fields(names: tuple[str, ...], result: Result) -> dict[str, Any]:
    given = (SURROGATES.sub("", value) if isinstance(value, str) else value for value in values(result))
    return dict(zip(names, given, strict=True))


def check(out: Path, analysis: Analysis, results: Iterable[Result]) -> None:
    names = answer_names(analysis)
    pending = Ascending(results)
    for line in read_lines(out, OURS):
        result = pending.at(line.number) if line.fields is not None else None
        found = {name: (line.fields or {})[name] for name in names if name in (line.fields or {})}
        if found != ({} if result is None else fields(names, result)):
            raise NotTheAnswers(f"line {line.number} of the saved file does not hold its answer")
    pending.expect_none()
