"""What is found in a workbook: sheets, header, columns, prompts and pictures, in several languages."""

from pathlib import Path
from typing import Any

import openpyxl
import pytest

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.analysis import Analysis, Choices, Column, Sheet
from embedding_relay.batch.workbook.limits import Limits
from support.workbooks import (
    PICTURE_URL,
    picture,
    received,
    save_book,
)


def analyzed(tmp_path: Path, rows: list[list[Any]], choices: Choices | None = None, **pictures: bytes) -> Analysis:
    return received(save_book(tmp_path / "a.xlsx", rows, pictures), choices).analysis


def test_an_analysis_says_what_is_there(tmp_path: Path) -> None:
    rows = [["id", " Prompt ", "Photo"], [1, "long " * 40, PICTURE_URL], [], [2.0, "two\nlines", None], [3, None, None]]
    assert analyzed(tmp_path, rows) == Analysis(
        sheets=(Sheet("Sheet", 3),),
        sheet="Sheet",
        columns=(
            Column("id", "A", "", 3, ("1", "2", "3")),
            Column("Prompt", "B", "prompt", 2, (("long " * 16)[:79] + "…", "two lines")),
            Column("Photo", "C", "image", 1, (PICTURE_URL,)),
        ),
        prompt_column="Prompt",
        image_columns=("Photo",),
        rows=3,
        pictures=0,
        header_row=1,
        width=3,
        notes=("1 row is empty and left out",),
    )


@pytest.mark.parametrize(
    ("value", "is_image"),
    [
        (PICTURE_URL, True),
        ("HTTPS://8.8.8.8/A.JPG?size=3#x", True),
        ("data:image/png;base64,AAAA", True),
        ("photos/one two.webp", True),
        (f"{PICTURE_URL}\n{PICTURE_URL}", True),
        (f"{PICTURE_URL}, {PICTURE_URL}", True),
        ("https://8.8.8.8/page", False),
        ("a picture of a cat.png and more", False),
        ("something", False),
    ],
)
def test_a_column_of_pictures_is_known_by_what_is_in_it(tmp_path: Path, value: str, is_image: bool) -> None:
    found = analyzed(tmp_path, [["prompt", "xyz"], ["a", value], ["b", value], ["c", None]])
    assert found.image_columns == (("xyz",) if is_image else ())


def test_words_about_pictures_are_no_pictures(tmp_path: Path) -> None:
    found = analyzed(
        tmp_path, [["prompt", "picture description", "Link"], ["a", "a cat", "https://8.8.8.8/page"], ["b"]]
    )
    assert found.image_columns == ("Link",)
    (tmp_path / "other").mkdir()
    rows = [["prompt", "picture", "Link"], ["a", PICTURE_URL, "https://8.8.8.8/page"]]
    assert analyzed(tmp_path / "other", rows).image_columns == ("picture",)


def test_embedded_pictures_make_a_column_of_pictures(tmp_path: Path) -> None:
    found = analyzed(tmp_path, [["prompt", "xyz"], ["a"], ["b"]], B2=picture(), D3=picture())
    assert (found.pictures, found.image_columns, found.width) == (2, ("xyz", "D"), 4)
    assert [column.letter for column in found.columns] == ["A", "B", "D"]


def test_a_picture_that_lies_over_a_column_of_texts_is_noted(tmp_path: Path) -> None:
    found = analyzed(tmp_path, [["prompt", "n"], ["a", 1], ["b", 2]], A3=picture())
    assert (found.prompt_column, found.image_columns, found.pictures) == ("prompt", (), 1)
    assert "1 picture is over columns that do not look like columns of pictures" in found.notes[0]


def test_one_column_of_texts_is_the_prompt_whatever_it_is_called(tmp_path: Path) -> None:
    found = analyzed(tmp_path, [["n", "something"], [1, "a"], [2, "b"]])
    assert (found.prompt_column, found.header_row) == ("something", 1)


def test_several_columns_of_texts_are_left_to_the_person(tmp_path: Path) -> None:
    rows = [["one", "two"], ["a", "b"]]
    taken = received(save_book(tmp_path / "a.xlsx", rows))
    assert (taken.analysis.prompt_column, taken.analysis.rows) == ("", 1)
    with pytest.raises(Unreadable, match=r"prompt, question, text or instruction.* The columns are: one, two"):
        taken.tasks()


def test_hidden_sheets_come_last_and_the_one_with_something_to_ask_is_used(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.title = "Secret"
    book.active.append(["prompt"])
    book.active.append(["hidden"])
    book.active.sheet_state = "hidden"
    book.create_sheet("Cover").append(["Welcome!"])
    book.create_sheet("Data").append(["question"])
    book["Data"].append(["a"])
    book["Data"].append(["b"])
    book.create_chartsheet("Chart")
    book.save(tmp_path / "a.xlsx")
    found = received(tmp_path / "a.xlsx").analysis
    assert found.sheets == (Sheet("Cover", 0), Sheet("Data", 2), Sheet("Secret", 1))
    assert (found.sheet, found.prompt_column) == ("Data", "question")
    assert found.notes == ()


def test_a_hidden_sheet_can_be_chosen(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for name in ("Shown", "Hidden"):
        book.create_sheet(name).append(["prompt"])
        book[name].append([name])
    book["Hidden"].sheet_state = "veryHidden"
    del book["Sheet"]
    book.save(tmp_path / "a.xlsx")
    taken = received(tmp_path / "a.xlsx", Choices(sheet="Hidden"))
    assert [task.prompt for task in taken.tasks()] == ["Hidden"]


def test_a_table_of_text_has_no_sheets_to_choose(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\nhello\n")
    with pytest.raises(Unreadable, match=r"only \.xlsx files have sheets"):
        received(tmp_path / "a.csv", Choices(sheet="Sheet1"))


@pytest.mark.parametrize("content", ["prompt,image\n", "\n\n\n,,\n"])
def test_without_rows_there_is_nothing_to_ask(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(f" {content}")
    with pytest.raises(Unreadable, match="no rows"):
        received(tmp_path / "a.csv")


def test_an_empty_workbook_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"no rows in it \(sheet 'Sheet'\)"):
        analyzed(tmp_path, [])


def test_limits_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\n" + "hello\n" * 11)
    with pytest.raises(TooLarge, match="more than 10 rows"):
        received(tmp_path / "a.csv", limits=Limits(rows=10))
    with pytest.raises(TooLarge, match="3 columns are in use"):
        received(save_book(tmp_path / "a.xlsx", [["prompt", "b", "c"], ["a"]]), limits=Limits(columns=2), into="b")
    (tmp_path / "b.csv").write_text('prompt,n\n"' + "x" * 200 + '",1\n')
    with pytest.raises(TooLarge, match="row 2 is longer"):
        received(tmp_path / "b.csv", limits=Limits(cell_chars=100), into="c")
