"""The same workbook with the answers: five columns after the last one that is in use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from embedding_relay.batch.tasks import Result
from embedding_relay.batch.workbook import csv_answers, jsonl_answers, xlsx_answers
from embedding_relay.batch.workbook.analysis import Analysis, Kind


def write_answers(source: Path, kind: Kind, analysis: Analysis, results: Iterable[Result], out: Path) -> None:
    """`results` ascend by row. What is not an answer stays as it is, to the byte where the format allows it."""
    match kind:
        case "xlsx":
            xlsx_answers.write(source, analysis, results, out)
        case "csv":
            csv_answers.write(source, analysis, results, out)
        case "jsonl":
            jsonl_answers.write(source, analysis, results, out)


def check_answers(out: Path, kind: Kind, analysis: Analysis, results: Iterable[Result]) -> None:
    """Read `out` back; Unreadable if it is damaged, NotTheAnswers if it does not hold exactly these answers."""
    match kind:
        case "xlsx":
            xlsx_answers.check(out, analysis, results)
        case "csv":
            csv_answers.check(out, analysis, results)
        case "jsonl":
            jsonl_answers.check(out, analysis, results)
