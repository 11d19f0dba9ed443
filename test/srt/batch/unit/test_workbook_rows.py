"""What each row asks: values as a person sees them, rows left out, rows that cannot be asked."""

from pathlib import Path

import openpyxl
import pytest

from embedding_relay.batch.errors import Unreadable
from embedding_relay.batch.tasks import Task
from embedding_relay.batch.workbook.analysis import Choices
from embedding_relay.batch.workbook.rows import PROGRESS_EVERY
from embedding_relay.batch.workbook.url_rules import UrlRules
from support.workbooks import (
    PICTURE_URL,
    picture,
    received,
    save_book,
    save_sheet,
    text_cell,
)


def prompts(path: Path, choices: Choices | None = None) -> dict[int, str]:
    return {task.row: task.prompt or task.error for task in received(path, choices).tasks()}


def request(part: str) -> str:
    messages = f'[{{"content": "hi"}}, {{"content": [{{"type": "text", "text": "file:///x"}}, {part}]}}]'
    address = '"custom_id": "x", "method": "POST", "url": "/v1/chat/completions"'
    return f'{{{address}, "body": {{"messages": {messages}}}}}'


def test_a_row_is_asked_with_its_number_in_the_sheet(tmp_path: Path) -> None:
    rows = [["title"], [], ["prompt", "photo"], ["one", PICTURE_URL], [], ["two", f"{PICTURE_URL} {PICTURE_URL}?2"]]
    assert received(save_book(tmp_path / "a.xlsx", rows)).tasks() == [
        Task(4, "one", (PICTURE_URL,)),
        Task(6, "two", (PICTURE_URL, f"{PICTURE_URL}?2")),
    ]


def test_an_error_in_a_column_that_nobody_asks_about_does_not_matter(tmp_path: Path) -> None:
    rows = f'<row r="1">{text_cell("A1", "prompt")}{text_cell("B1", "n")}</row>'
    rows += f'<row r="2">{text_cell("A2", "fine")}<c r="B2" t="e"><v>#N/A</v></c></row>'
    path = save_sheet(tmp_path / "a.xlsx", rows)
    content = path.read_bytes()
    assert prompts(path) == {2: "fine"}
    path.write_bytes(content)
    task = received(path, Choices(template="{prompt} {n}"), into="other").tasks()[0]
    assert task.error == "column 'n' holds the error value #N/A"


def test_rows_without_prompt_and_picture_are_left_out(tmp_path: Path) -> None:
    rows = [["prompt", "photo", "note"], ["one"], [None, None, "a chapter"], ["  "], [None, PICTURE_URL], ["two"]]
    tasks = received(save_book(tmp_path / "a.xlsx", rows)).tasks()
    assert [(task.row, task.prompt) for task in tasks] == [(2, "one"), (5, ""), (6, "two")]
    assert tasks[1].error == "the prompt is empty: there is nothing in column 'prompt'"


def test_only_such_rows_are_nothing_to_ask(tmp_path: Path) -> None:
    taken = received(save_book(tmp_path / "a.xlsx", [["prompt", "photo", "note"], [None, None, "a chapter"]]))
    with pytest.raises(Unreadable, match="no row holds a prompt or a picture"):
        taken.tasks()


def test_a_template_needs_no_prompt_in_the_row(tmp_path: Path) -> None:
    rows = [["photo", "language"], [PICTURE_URL, "German"], [PICTURE_URL, None], [None, None]]
    choices = Choices(template="Describe it in {language}.")
    assert received(save_book(tmp_path / "a.xlsx", rows), choices).tasks() == [
        Task(2, "Describe it in German.", (PICTURE_URL,)),
        Task(3, "Describe it in .", (PICTURE_URL,)),
    ]


def test_a_template_without_columns_asks_for_every_picture(tmp_path: Path) -> None:
    rows = [["name", "photo"], ["a", None], ["b", None]]
    book = save_book(tmp_path / "a.xlsx", rows, {"B2": picture()})
    assert [task.row for task in received(book, Choices(template="What is it?")).tasks()] == [2]


def test_a_row_with_nothing_but_a_note_of_its_own_does_not_ask(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [["prompt", "photo", "note"], ["one", PICTURE_URL], [None, None, "a note"], [None, f"{PICTURE_URL}?2"]]:
        book.active.append(row)
    book.active.merge_cells("A2:A4")
    book.active.merge_cells("B2:B3")
    book.save(tmp_path / "a.xlsx")
    assert received(tmp_path / "a.xlsx").tasks() == [
        Task(2, "one", (PICTURE_URL,)),
        Task(4, "one", (f"{PICTURE_URL}?2",)),
    ]


def test_progress_comes_while_it_reads(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\n" + "x\n" * (2 * PROGRESS_EVERY))
    seen = list[float]()
    received(tmp_path / "a.csv").tasks(progress=seen)
    assert seen == [0.5, 1.0, 1.0]


def test_a_row_with_more_cells_than_the_header_is_not_asked_cut(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,prompt\n1,Describe a cat\n2,Describe a cat, a dog\n")
    good, bad = received(tmp_path / "a.csv").tasks()
    assert good.prompt == "Describe a cat"
    assert "needs quotation marks" in bad.error


def test_so_it_is_with_a_single_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt\nDescribe a cat\nDescribe a cat, a dog\n"Describe a cat, a dog"\n')
    tasks = received(tmp_path / "a.csv").tasks()
    assert ["needs quotation marks" in task.error for task in tasks] == [False, True, False]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ('{"type": "image_url", "image_url": {"url": "https://8.8.8.8/a.png"}}', ""),
        ('{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}', ""),
        ('{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}', "file:///etc/passwd: only http"),
        ('{"type": "image_url", "image_url": {"url": "/etc/passwd.png"}}', "only http"),
        ('{"type": "image_url", "image_url": {"url": "DATA:/../etc/passwd.png"}}', "only http"),
        ('{"type": "audio_url", "audio_url": {"url": "a.wav"}}', "only http"),
        ('{"type": "image_url", "image_url": "http://127.0.0.1/a.png"}', "not a public address"),
        ('{"type": "video_url", "video_url": {"url": "http://127.1/a.mp4"}}', "not a public address"),
    ],
)
def test_a_request_is_passed_on_as_it_is_unless_the_endpoint_would_fetch_what_it_must_not(
    tmp_path: Path, part: str, words: str
) -> None:
    (tmp_path / "a.jsonl").write_text(request(part))
    (task,) = received(tmp_path / "a.jsonl").tasks(UrlRules())
    assert (task.row, task.custom_id, task.prompt, task.images) == (1, "x", "", ())
    assert task.body is not None
    assert task.body["messages"][0] == {"content": "hi"}
    assert (words in task.error) if words else not task.error
