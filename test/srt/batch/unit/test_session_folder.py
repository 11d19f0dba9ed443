"""The files of a session: tasks that are read back, results of which the first counts, lines that were cut off."""

from __future__ import annotations

import contextlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.batch.session.folder import (
    Failures,
    Folder,
    NotWhatWasSaved,
    ResultIndex,
    ResultWriter,
    failures,
    keep_set_aside,
    results_of,
)
from embedding_relay.batch.tasks import Outcome, Result, Task
from support.effort import effort, unhurried

TASKS = [Task(row, f"prompt {row}\u2028\n", images=("https://a/b.png",) * (row % 3)) for row in range(2, 25)]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "session")
    made.make()
    return made


# ---- removing


def test_nothing_stays_behind_of_a_folder_that_somebody_writes_into(tmp_path: Path) -> None:
    """A worker goes on writing for a moment after the session that it works on was deleted."""
    for number in range(20):
        folder = Folder(tmp_path / f"{number:016x}")
        folder.make()
        begun = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            writing = thread.submit(write_until_it_is_gone, folder.path, begun)
            assert begun.wait(10)
            folder.remove()
            writing.result(10)
    assert list(tmp_path.iterdir()) == []


def write_until_it_is_gone(place: Path, begun: threading.Event) -> None:
    with contextlib.suppress(FileNotFoundError):
        for number in range(10_000):
            (place / str(number)).write_bytes(b"a task")
            if number == 9:
                begun.set()


def test_what_is_gone_is_removed_again(folder: Folder) -> None:
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


# ---- results


def result(row: int, text: str, outcome: Outcome = Outcome.DONE) -> Result:
    tokens = {} if outcome is Outcome.FAILED else {"prompt_tokens": 3, "completion_tokens": 2}
    field = {"error": text} if outcome is Outcome.FAILED else {"answer": text}
    return Result(row, outcome, **field, **tokens)  # type: ignore[arg-type]


def write(path: Path, attempt: int, results: list[Result]) -> None:
    with ResultWriter(path, attempt) as writer:
        for each in results:
            writer.write(each)


def test_tasks_are_there_only_when_they_are_saved(folder: Folder) -> None:
    manifest = folder.build_tasks(1, TASKS, batch_rows=5)
    assert (manifest.tasks, len(manifest.batches)) == (23, 5)
    assert folder.manifest(1) is None
    with pytest.raises(NotWhatWasSaved):
        next(folder.tasks(1))
    folder.save_tasks(1, manifest)
    folder.verify_tasks(1, manifest)
    assert list(folder.tasks(1)) == TASKS


def test_a_second_attempt_touches_nothing_of_the_first(folder: Folder) -> None:
    folder.save_tasks(1, folder.build_tasks(1, TASKS, 5))
    folder.save_tasks(2, folder.build_tasks(2, TASKS[:3], 5))
    assert (list(folder.tasks(1)), list(folder.tasks(2))) == (TASKS, TASKS[:3])


def test_an_attempt_that_was_broken_off_is_begun_anew(folder: Folder) -> None:
    folder.build_tasks(1, TASKS, 5)
    folder.save_tasks(1, folder.build_tasks(1, TASKS[:3], 5))
    assert len(list((folder.path / "tasks.1").iterdir())) == 2


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone", "manifest"])
def test_what_is_not_as_it_was_saved_is_noticed(folder: Folder, damage: str) -> None:
    manifest = folder.build_tasks(1, TASKS, 5)
    folder.save_tasks(1, manifest)
    path = folder.path / "tasks.1" / ("manifest.json" if damage == "manifest" else manifest.batches[2].name)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "shorter" else content.replace(b"1", b"2"))
    with pytest.raises((NotWhatWasSaved, FileNotFoundError)):
        folder.verify_tasks(1, manifest)


def test_saving_leaves_nothing_half_done(folder: Folder) -> None:
    path = folder.answers("csv", 1)
    with contextlib.suppress(ZeroDivisionError), folder.saving(path) as partial:
        partial.write_text(f"half {1 // 0}")
    assert not path.exists()
    with folder.saving(path) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole"


def test_two_uploads_do_not_share_a_folder(folder: Folder) -> None:
    with pytest.raises(FileExistsError):
        folder.make()


def test_the_first_result_of_a_row_counts(tmp_path: Path) -> None:
    write(tmp_path, 1, [result(5, "first"), result(2, "no", Outcome.FAILED)])
    write(tmp_path, 2, [result(5, "second"), result(3, "three")])
    write(tmp_path, 10, [result(2, "late"), result(3, "later"), result(9, "nine")])
    index = ResultIndex(tmp_path)
    assert [row in index for row in (2, 3, 4, 5, 9)] == [True, True, False, True, True]
    assert (index.counts.done, index.counts.failed, index.counts.prompt_tokens) == (3, 1, 9)
    answers = list(index.in_order([Task(row, custom_id=f"id {row}") for row in (2, 3, 4, 5, 9)]))
    assert [each.answer or each.error for each in answers][:2] == ["no", "three"]
    assert (answers[2].outcome, answers[2].custom_id) == (Outcome.CANCELLED, "id 4")
    assert answers[3].answer == "first"


def test_a_line_that_was_cut_off_is_no_result(tmp_path: Path) -> None:
    write(tmp_path, 1, [result(1, "one"), result(2, "two\nlines \u2028 here")])
    path = tmp_path / "results.1.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        index = ResultIndex(tmp_path)
        assert index.counts.done == whole[:cut].count(b"\n")
    path.write_bytes(whole)
    assert ResultIndex(tmp_path).counts.done == 2


def test_no_results_at_all(tmp_path: Path) -> None:
    index = ResultIndex(tmp_path)
    assert (index.counts.done, 1 in index) == (0, False)
    assert failures(tmp_path, 0, 0, 10) == Failures(0, (), ())


def test_failures_in_pages(tmp_path: Path) -> None:
    write(tmp_path, 1, [result(row, f"why {row}", Outcome.FAILED if row % 2 else Outcome.DONE) for row in range(20)])
    write(tmp_path, 2, [result(1, "again", Outcome.FAILED), result(30, 'the answer says "failed"')])
    found = failures(tmp_path, 0, 3, 4)
    assert (found.count, [each.row for each in found.page]) == (10, [7, 9, 11, 13])


def test_failures_by_their_reasons(tmp_path: Path) -> None:
    """What differs in names and numbers only is one reason; the most frequent comes first."""
    reasons = ["the picture 'a.png' is not in the upload", "no answer within 20 s (tried 6 times)"]
    written = [result(row, reasons[0].replace("a.png", f"{row}.png"), Outcome.FAILED) for row in range(2, 10)]
    write(tmp_path, 1, [result(1, reasons[1], Outcome.FAILED), *written, result(11, "400: no", Outcome.FAILED)])
    pictures, late, refused = failures(tmp_path, 0, 0, 0).reasons
    assert pictures.error == "the picture '2.png' is not in the upload"
    assert (pictures.count, pictures.rows, pictures.differs) == (8, [2, 3, 4, 5, 6], True)
    assert (late.error, late.rows, late.differs) == (reasons[1], [1], False)
    assert refused.error == "400: no"


def test_so_many_reasons_are_not_all_listed(tmp_path: Path) -> None:
    letters = [chr(ord("a") + at % 26) * (1 + at // 26) for at in range(70)]
    write(tmp_path, 1, [result(row, why, Outcome.FAILED) for row, why in enumerate(letters)])
    reasons = failures(tmp_path, 0, 0, 0).reasons
    assert (len(reasons), sum(reason.count for reason in reasons)) == (51, 70)
    assert (reasons[0].error, reasons[0].count) == ("other reasons", 20)


# ---- a retry


def test_failures_that_are_set_aside_are_no_results(tmp_path: Path) -> None:
    write(tmp_path, 1, [result(1, "one"), result(2, "two", Outcome.FAILED), result(3, "three", Outcome.FAILED)])
    write(tmp_path, 2, [result(4, "four", Outcome.FAILED)])
    index = ResultIndex(tmp_path, set_aside=2)
    assert [row in index for row in (1, 2, 3, 4)] == [True, False, False, False]
    write(tmp_path, 3, [result(2, "now"), result(3, "again", Outcome.FAILED)])
    index = ResultIndex(tmp_path, set_aside=2)
    assert (index.counts.done, index.counts.failed) == (2, 1)
    assert [each.answer or each.error for each in index.in_order(map(Task, (1, 2, 3)))] == ["one", "now", "again"]
    assert [each.row for each in failures(tmp_path, 2, 0, 9).page] == [3]
    assert {row: each.answer for row, each in results_of(tmp_path, {1, 2, 4}, 2).items()} == {1: "one", 2: "now"}


def test_what_a_cancelled_retry_did_not_come_to_has_failed_as_before(tmp_path: Path) -> None:
    write(tmp_path, 1, [result(row, f"why {row}", Outcome.FAILED) for row in (1, 2, 3)])
    write(tmp_path, 2, [result(2, "now")])
    for attempt in (2, 3):  # the second time another worker saves, because the first was killed over it
        keep_set_aside(tmp_path, 1, attempt)
    index = ResultIndex(tmp_path, set_aside=1)
    assert (index.counts.done, index.counts.failed) == (1, 2)
    assert [each.answer or each.error for each in index.in_order(map(Task, (1, 2, 3)))] == ["why 1", "now", "why 3"]
    assert not (tmp_path / "results.3.jsonl").read_bytes()


def test_tasks_from_the_middle_on(folder: Folder) -> None:
    folder.save_tasks(1, folder.build_tasks(1, TASKS, 5))
    for skip in range(len(TASKS) + 2):
        assert list(folder.tasks(1, skip)) == TASKS[skip:]


@unhurried
@effort(100)
@given(st.data())
def test_any_attempts_any_cuts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Against a dict: for each row what the earliest attempt wrote and was not killed over."""
    folder, model = tmp_path_factory.mktemp("results"), dict[int, str]()
    numbers = itertools.count()
    for attempt in range(1, data.draw(st.integers(0, 4)) + 1):
        rows = data.draw(st.lists(st.integers(1, 8), max_size=8))
        written = [result(row, f"answer {next(numbers)}") for row in rows]
        write(folder, attempt, written)
        path = folder / f"results.{attempt}.jsonl"
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        for each in written[: path.read_bytes().count(b"\n")]:
            model.setdefault(each.row, each.answer)
    index = ResultIndex(folder)
    found = {each.row: each.answer for each in index.in_order(map(Task, range(1, 9))) if each.outcome is Outcome.DONE}
    assert found == model
    assert index.counts.done == len(model)
