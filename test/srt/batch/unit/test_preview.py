"""What is shown before anything is asked: the first rows, why these columns, thumbnails, an estimate.

Nothing is asked here; what an endpoint answers to a few rows is tried in the service lane.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from embedding_relay.batch import preview
from embedding_relay.batch.errors import Unreadable
from embedding_relay.batch.preview import Estimate, Picture, Trial, Tried, Why, estimate, first_tasks, question_of, whys
from embedding_relay.batch.session.folder import Folder
from embedding_relay.batch.session.records import Session
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.tasks import Outcome, Result, Task
from embedding_relay.batch.workbook.analysis import Choices
from support.workbooks import PICTURE_URL, RED, Received, picture, received, save_book, save_zip

SETTINGS = Settings(endpoint="http://127.0.0.1:1", cache_dir=Path("/nonexistent"))


def session_of(book: Received) -> Session:
    session = Session(session_id="0" * 16, name="a", kind=book.kind, created_at=0.0, choices=book.choices)
    session.mark_analyzed(book.analysis)
    return session


def first_rows(book: Received, choices: Choices | None = None, most: int = 5) -> list[Task]:
    return first_tasks(Folder(book.folder), session_of(book), choices or book.choices, SETTINGS, most)


def csv_book(where: Path, content: str, choices: Choices | None = None) -> Received:
    (where / "a.csv").write_text(content)
    return received(where / "a.csv", choices)


# ---- the first rows


def test_the_first_rows_are_those_that_a_split_would_make(tmp_path: Path) -> None:
    book = csv_book(tmp_path, "prompt,image\n" + "".join(f"what is {at}?,{PICTURE_URL}\n" for at in range(9)))
    assert first_rows(book, most=3) == book.tasks()[:3]


def test_with_other_choices_the_workbook_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries columns one after the other does not wait for a million rows each time."""
    book = csv_book(tmp_path, "prompt,other\none,two\n")
    monkeypatch.setattr(preview, "analyze", lambda *_: pytest.fail("the workbook was read"))
    asked = first_rows(book, Choices(prompt_column="other", image_columns=()))
    assert [task.prompt for task in asked] == ["two"]
    asked = first_rows(book, Choices(template="{other}?", image_columns=()))
    assert [task.prompt for task in asked] == ["two?"]


def test_choices_that_leave_something_open_are_completed_by_an_analysis(tmp_path: Path) -> None:
    book = csv_book(tmp_path, "prompt,other\none,two\n", Choices(prompt_column="other"))
    assert [task.prompt for task in first_rows(book, Choices(image_columns=()))] == ["one"]


def test_choices_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="nothing"):
        first_rows(csv_book(tmp_path, "prompt\none\n"), Choices(prompt_column="nothing", image_columns=()))


def test_a_look_at_other_columns_changes_no_picture_that_a_split_has_saved(tmp_path: Path) -> None:
    """Both save the pictures of cells as files of the session."""
    rows = [["prompt", "front", "back"], ["compare", None, None]]
    red, blue = picture("red"), picture("blue")
    book = received(save_book(tmp_path / "a.xlsx", rows, {"B2": red, "C2": blue}))
    (task,) = book.tasks()
    (other,) = first_rows(book, Choices(prompt_column="prompt", image_columns=("back",)))
    assert [(book.folder / image).read_bytes() for image in task.images] == [red, blue]
    assert [(book.folder / image).read_bytes() for image in other.images] == [blue]


# ---- why


def test_why_this_sheet_and_these_columns(tmp_path: Path) -> None:
    book = received(save_book(tmp_path / "a.xlsx", [["id", "question", "photo"], [1, "what?", PICTURE_URL]]))
    assert whys(book.analysis, Choices()) == [
        Why("sheet", "Sheet", "the only one with rows"),
        Why("prompt", "B question", "its name says so"),
        Why("pictures", "C photo", "its name says so"),
    ]


@pytest.mark.parametrize(
    ("content", "choices", "found"),
    [
        ("a,b\nwhat?,1\n", Choices(), Why("prompt", "A a", "the only column of texts")),
        ("a,question\nx,y\n", Choices(prompt_column="a"), Why("prompt", "A a", "you chose it")),
        ("a,b\nx,y\n", Choices(template="{a} {b}"), Why("prompt", "{a} {b}", "your template")),
        (f"prompt,c\nx,{PICTURE_URL}\n", Choices(), Why("pictures", "B c", "its cells are pictures, or name some")),
        (f"prompt,c\nx,{PICTURE_URL}\n", Choices(image_columns=("c",)), Why("pictures", "B c", "you chose it")),
    ],
)
def test_the_reason_tells_a_choice_from_a_finding(tmp_path: Path, content: str, choices: Choices, found: Why) -> None:
    book = csv_book(tmp_path, content, choices)
    assert found in whys(book.analysis, choices)


def test_whole_requests_have_no_columns_to_choose(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{}]}}\n'
    )
    (only,) = whys(received(tmp_path / "a.jsonl").analysis, Choices())
    assert "whole request" in only.reason


# ---- how a row is shown


def size_of(thumbnail: str) -> tuple[int, int]:
    assert thumbnail.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
    return Image.open(io.BytesIO(base64.b64decode(thumbnail.partition(",")[2]))).size


def test_pictures_become_thumbnails_and_urls_stay_urls(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("green", size=900))
    data = f"data:image/png;base64,{base64.b64encode(RED).decode()}"
    question = question_of(Task(2, "what?", ("a.png", data, PICTURE_URL)), tmp_path)
    assert [size_of(shown.thumbnail) for shown in question.pictures[:2]] == [(160, 160), (8, 8)]
    assert question.pictures[2] == Picture(url=PICTURE_URL)


def huge_picture() -> bytes:
    """A few kilobytes that would be 60 million pixels, at which Pillow does not even warn."""
    content = io.BytesIO()
    Image.new("1", (8_000, 7_500)).save(content, "PNG")
    return content.getvalue()


# Pillow reads it, and hundreds of formats that nobody asks a model about.
PIXMAP = b"P6 2 2 255\n" + bytes(12)


@pytest.mark.parametrize("content", [b"", b"no picture", RED[:30], PIXMAP, huge_picture()])
def test_what_cannot_be_shown_is_not_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert question_of(Task(2, "what?", ("a.png",)), tmp_path).pictures == (Picture(),)


@pytest.mark.parametrize("name", ["../secret.png", "nothing.png", "data:image/png;base64,AAA", "\0", "x" * 5000])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(RED)
    (tmp_path / "session").mkdir()
    assert question_of(Task(2, "what?", (name,)), tmp_path / "session").pictures == (Picture(),)


def test_long_prompts_and_many_pictures_are_cut(tmp_path: Path) -> None:
    question = question_of(Task(2, "x" * 9000, (PICTURE_URL,) * 30), tmp_path)
    assert (len(question.prompt), question.prompt[-1]) == (2000, "…")
    assert (len(question.pictures), question.more_pictures) == (8, 22)


@pytest.mark.parametrize(
    ("body", "prompt", "pictures"),
    [
        ({"prompt": "once upon"}, "once upon", 0),
        ({"messages": [{"role": "system", "content": "Be brief."}, {"content": "what?"}]}, "Be brief.\nwhat?", 0),
        (
            {"messages": [{"content": [{"text": "what?"}, {"image_url": {"url": PICTURE_URL}}, {"image_url": "x"}]}]},
            "what?",
            2,
        ),
        ({"messages": "none"}, "", 0),
        ({"messages": [7, {"content": 7}, {"content": [7, {"image_url": 7}, {"text": None}]}]}, "", 0),
        ({"prompt": [1, 2]}, "", 0),
    ],
)
def test_a_whole_request_is_shown_by_its_texts(tmp_path: Path, body: Any, prompt: str, pictures: int) -> None:
    question = question_of(Task(1, custom_id="a", body=body), tmp_path)
    assert (question.prompt, len(question.pictures)) == (prompt, pictures)


# ---- the estimate


def tried(seconds: float, outcome: Outcome = Outcome.DONE) -> Tried:
    return Tried(Result(2, outcome, prompt_tokens=30, completion_tokens=10), seconds)


def test_the_estimate_is_of_all_rows_if_they_are_like_those_that_were_answered() -> None:
    trial = Trial("m", (tried(2.0), tried(4.0), tried(60.0, Outcome.FAILED)))
    assert estimate(trial, 1000, 10) == Estimate(1000, 30_000, 10_000, 300.0, 10)
    assert estimate(trial, 4, 10) == Estimate(4, 120, 40, 3.0, 4), "no more requests than rows"


def test_nothing_is_estimated_from_nothing() -> None:
    assert estimate(Trial("m", (tried(1.0, Outcome.FAILED),)), 1000, 10) is None


def test_pictures_of_a_zip_are_shown(tmp_path: Path) -> None:
    members = {"p.csv": b"prompt,image\nwhat?,a.png\n", "a.png": RED}
    book = received(save_zip(tmp_path / "a.zip", members))
    (task,) = first_rows(book)
    (shown,) = question_of(task, book.folder).pictures
    assert size_of(shown.thumbnail) == (8, 8)
