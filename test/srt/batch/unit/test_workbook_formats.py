"""Each kind of file, written and read back."""

from pathlib import Path

import pytest

from embedding_relay.batch.errors import NotWhatWasSaved, Unreadable
from embedding_relay.batch.tasks import Outcome, Result
from embedding_relay.batch.workbook.formats import check_answers
from support.workbooks import (
    done,
    received,
    save_book,
)


@pytest.mark.parametrize("kind", ["xlsx", "csv", "jsonl"])
def test_reading_back_finds_what_is_missing_wrong_or_too_much(tmp_path: Path, kind: str) -> None:
    upload = tmp_path / f"a.{kind}"
    if kind == "xlsx":
        save_book(upload, [["prompt"], ["one"], ["two"], ["three"]])
    elif kind == "csv":
        upload.write_text("prompt\none\ntwo\nthree\n")
    else:
        upload.write_text('\n{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "three"}\n')
    book = received(upload)
    given = [done(2, "a"), done(4, "b")]
    out = book.answered(given)
    for wrong in (
        [],
        given[:1],
        given[1:],
        [*given[:1], done(3, "c"), *given[1:]],
        [done(2, "A"), given[1]],
        [done(2, "a", error="e"), given[1]],
        [*given, done(5, "d")],
        [Result(2, Outcome.FAILED, "a", prompt_tokens=3, completion_tokens=5), given[1]],
        [Result(2, Outcome.DONE, "a", prompt_tokens=3, completion_tokens=6), given[1]],
    ):
        with pytest.raises(NotWhatWasSaved):
            check_answers(out, book.kind, book.analysis, wrong)
    if kind == "xlsx":
        content = out.read_bytes()
        out.write_bytes(content[:-30])
        with pytest.raises(Unreadable, match="damaged"):
            check_answers(out, book.kind, book.analysis, given)
