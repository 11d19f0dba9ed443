"""Where the header is, and what the columns are called."""

import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from embedding_relay.batch.errors import TooLarge
from embedding_relay.batch.workbook.analysis import Analysis, Choices
from embedding_relay.batch.workbook.answers import NAMES
from support.workbooks import (
    PICTURE_URL,
    done,
    received,
    save_book,
    values,
)


def analyzed(tmp_path: Path, rows: list[list[Any]], choices: Choices | None = None, **pictures: bytes) -> Analysis:
    return received(save_book(tmp_path / "a.xlsx", rows, pictures), choices).analysis


@pytest.mark.parametrize(
    ("header", "prompt", "images"),
    [
        (["id", "Question", "Image URL"], 1, [2]),
        (["id", "提示词", "图片"], 1, [2]),
        (["编号", "问题描述", "商品图片"], 1, [2]),
        (["Nr", "Anweisung", "Bild"], 1, [2]),
        (["n°", "Consigne", "Photo"], 1, [2]),
        (["núm", "Pregunta", "Imagen"], 1, [2]),
        (["番号", "質問", "画像"], 1, [2]),
        (["text", "prompt", "file"], 1, [2]),
        (["prompt", "text", "link"], 0, [2]),
        (["Category", "user_prompt", "imageUrl"], 1, [2]),
        (["name", "INPUT TEXT", "Foto 1"], 1, [2]),
        (["name", "other", "image"], None, [2]),
    ],
)
def test_columns_are_known_by_their_names(
    tmp_path: Path, header: list[str], prompt: int | None, images: list[int]
) -> None:
    found = analyzed(tmp_path, [header, ["some", "thing", "https://8.8.8.8/picture?id=1"]])
    assert found.prompt_column == ("" if prompt is None else header[prompt])
    assert found.image_columns == tuple(header[index] for index in images)


def test_equal_and_missing_headers_get_names_of_their_own(tmp_path: Path) -> None:
    found = analyzed(tmp_path, [["prompt", "x", " x ", "", "x (2)", "E"], ["a", "b", "c", "d", "e", "f"]])
    assert [column.name for column in found.columns] == ["prompt", "x", "x (2)", "D", "x (2) (2)", "E"]


@pytest.mark.parametrize(
    ("rows", "header"),
    [
        ([["Products of 2024"], [], ["prompt", "n"], ["a", 1]], 3),
        ([["Products of 2024"], ["name", "n", "m"], ["a", 1, 2]], 2),
        ([["prompt"], ["a"]], 1),
        ([["Describe the cat on this picture, please."], ["And what is this?"]], 0),
        ([["a", PICTURE_URL], ["b", PICTURE_URL]], 0),
        ([["a", 1], ["b", 2]], 0),
        ([["a", datetime.date(2024, 1, 1)], ["b", datetime.date(2024, 1, 2)]], 0),
        ([["x" * 100], ["y"]], 0),
    ],
)
def test_the_header_is_found_or_missed(tmp_path: Path, rows: list[list[Any]], header: int) -> None:
    found = analyzed(tmp_path, rows)
    assert found.header_row == header
    assert found.rows == len([row for row in rows[header:] if row])
    assert ("the first row looks like data" in " ".join(found.notes)) == (header == 0)
    if header == 0:
        assert found.columns[0].name == "A"


def test_a_header_of_two_rows(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [["prompt", "size", None, "photo"], [None, "height", "width", None], ["a", 1, 2, PICTURE_URL]]:
        book.active.append(row)
    for area in ("A1:A2", "B1:C1", "D1:D2"):
        book.active.merge_cells(area)
    book.save(tmp_path / "a.xlsx")
    taken = received(tmp_path / "a.xlsx")
    assert [column.name for column in taken.analysis.columns] == ["prompt", "height", "width", "photo"]
    assert (taken.analysis.header_row, taken.analysis.rows) == (2, 1)
    assert [task.prompt for task in taken.tasks()] == ["a"]
    assert values(taken.answered([done(3)]))[1][4:] == NAMES


def test_a_title_may_be_merged_over_all_columns(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [["Products"], ["prompt", "n"], ["a", 1]]:
        book.active.append(row)
    book.active.merge_cells("A1:XFD1")
    book.create_sheet("Full").merge_cells("A5:XFD5")
    book.save(tmp_path / "a.xlsx")
    assert received(tmp_path / "a.xlsx").analysis.width == 2
    book.active.merge_cells("B3:XFD3")
    book.save(tmp_path / "b.xlsx")
    with pytest.raises(TooLarge, match=r"16384 columns are in use \(sheet 'Sheet'\); 16379 are accepted"):
        received(tmp_path / "b.xlsx", into="other")
