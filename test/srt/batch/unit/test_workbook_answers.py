"""What the answers look like in any kind of file: their names, and results that must fit the rows."""

from pathlib import Path

import pytest

from embedding_relay.batch.errors import NotWhatWasSaved
from embedding_relay.batch.workbook.answers import NAMES
from support.workbooks import (
    done,
    received,
    save_book,
    values,
)


def test_names_that_are_taken_get_a_number(tmp_path: Path) -> None:
    book = received(save_book(tmp_path / "a.xlsx", [["prompt", "Answer", "status"], ["hello"]]))
    assert values(book.answered([done(2)]))[0][3:] == ("answer (2)", "status (2)", *NAMES[2:])


def test_an_answered_workbook_can_be_asked_again(tmp_path: Path) -> None:
    first = received(save_book(tmp_path / "a.xlsx", [["prompt"], ["hello"]]))
    second = received(first.answered([done(2, "one")]))
    assert [task.prompt for task in second.tasks()] == ["hello"]
    out = values(second.answered([done(2, "two")]))
    assert (out[1][1], out[1][6], out[0][6]) == ("one", "two", "answer (2)")


def test_a_result_without_its_row_is_no_silent_loss(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text("prompt\nhello\n")
    with pytest.raises(NotWhatWasSaved, match="row 9"):
        received(csv).answered([done(9)])


def test_results_out_of_order_are_our_own_mistake(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text("prompt\nhello\n")
    book = received(csv)
    with pytest.raises(ValueError, match="comes after"):
        book.answered([done(2), done(2)])
