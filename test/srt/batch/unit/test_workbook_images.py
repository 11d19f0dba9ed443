"""The pictures of a row: in the workbook, beside it, or named by a URL or a data URI."""

import base64
import itertools
from pathlib import Path

import pytest

from embedding_relay.batch.workbook.analysis import Choices
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.rows import read_tasks
from embedding_relay.batch.workbook.url_rules import UrlRules
from support.workbooks import (
    BLUE,
    HEADER,
    PICTURE_URL,
    RED,
    RICH,
    Received,
    contents,
    picture,
    placed,
    received,
    save_book,
    save_sheet,
    save_zip,
)


def in_zip(tmp_path: Path, cells: list[str], **pictures: bytes) -> Received:
    lines = "".join(f'look,"{cell}"\n' for cell in cells)
    files = {f"images/{name.replace('_', '.')}": content for name, content in pictures.items()}
    return received(save_zip(tmp_path / "a.zip", {"rows.csv": f"prompt,photo\n{lines}", **files}))


def test_reading_again_finds_the_same_names(tmp_path: Path) -> None:
    """A worker that takes over from another one writes the same pictures to the same places."""
    book = received(save_book(tmp_path / "a.xlsx", [["prompt", "p"], ["x"], ["y"]], {"B2": RED, "B3": BLUE}))
    assert book.tasks() == book.tasks()
    assert len(list((book.folder / "pictures").iterdir())) == 2


def test_pictures_beside_the_workbook_are_used_where_they_are(tmp_path: Path) -> None:
    book = in_zip(tmp_path, ["images/a.png", "b.jpg", f"a.png\n{PICTURE_URL}\nIMAGES\\B.JPG"], a_png=RED, b_jpg=BLUE)
    assert book.analysis.image_columns == ("photo",)
    tasks = book.tasks()
    assert [task.images for task in tasks] == [
        ("uploaded/000001.png",),
        ("uploaded/000002.jpg",),
        ("uploaded/000001.png", PICTURE_URL, "uploaded/000002.jpg"),
    ]
    assert contents(book, tasks[0].images) == [RED]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("images/c.png", "'images/c.png' is not in the upload"),
        ("images/b.png", "not a picture"),
        ("/etc/passwd", "not in the upload"),
        ("../../../etc/a.png", "not in the upload"),
        ("C:\\photos\\x.png", "not in the upload"),
        ("file:///etc/a.png", "only http and https"),
        ("ftp://8.8.8.8/a.png", "only http and https"),
        ("http://169.254.169.254/a.png", "not a public address"),
        ("data:image/png;base64,AA!A", "not correct base64"),
        ("data:image/png;base64,AAAA", "not a picture"),
        ("data:text/plain;base64,AAAA", "must begin with"),
        (f"{PICTURE_URL}\nimages/c.png", "not in the upload"),
    ],
)
def test_pictures_that_cannot_be_used_are_errors_of_their_rows(tmp_path: Path, cell: str, words: str) -> None:
    book = in_zip(tmp_path, ["images/a.png", cell], a_png=RED, b_png=b"this is no picture")
    good, bad = book.tasks()
    assert (good.error, bad.images) == ("", ())
    assert words in bad.error
    assert bad.error.startswith("column 'photo'")
    assert (bad.row, bad.prompt) == (3, "look")


def test_data_uris_are_passed_on(tmp_path: Path) -> None:
    encoded = base64.b64encode(RED).decode()
    book = in_zip(tmp_path, [f"data:image/png;base64,{encoded}", f"DATA:image/PNG;base64,{encoded[:9]} {encoded[9:]}"])
    assert [task.images for task in book.tasks()] == [(f"data:image/png;base64,{encoded}",)] * 2


def test_a_scheme_in_capitals_is_passed_on_as_sglang_knows_it(tmp_path: Path) -> None:
    book = in_zip(tmp_path, ["HTTPS://8.8.8.8/A.PNG", "uploaded.png"], uploaded_png=RED)
    assert [task.images for task in book.tasks()] == [("https://8.8.8.8/A.PNG",), ("uploaded/000001.png",)]


def test_an_embedded_file_that_is_no_picture_is_an_error_of_its_row(tmp_path: Path) -> None:
    others = {
        **RICH,
        "xl/media/image1.png": b"\x01\0\0\0 no picture",
        "xl/media/image2.jpeg": picture(form="ICO", size=16),
    }
    book = received(save_sheet(tmp_path / "a.xlsx", HEADER + placed(2, 1) + placed(3, 2), **others))
    assert ["of a kind that cannot" in book.tasks()[0].error, "not a picture" in book.tasks()[1].error] == [True, True]


def test_a_picture_too_large_is_an_error_of_its_row(tmp_path: Path) -> None:
    book = received(save_sheet(tmp_path / "a.xlsx", HEADER + placed(2, 1), **RICH))
    limits = Limits(picture_bytes=10)
    (task,) = read_tasks(book.source, book.kind, book.analysis, Choices(), book.folder, limits, UrlRules(), [].append)
    assert "larger than" in task.error


def test_a_picture_of_too_many_pixels_is_an_error_of_its_row(tmp_path: Path) -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4) + (60_000).to_bytes(4) + b"\x08\x02\0\0\0"
    bomb = header + b"\xdc\xb7\x1c\x5f"
    others = {**RICH, "xl/media/image2.jpeg": bomb}
    book = received(save_sheet(tmp_path / "a.xlsx", HEADER + placed(2, 1), **others))
    assert "picture" in book.tasks()[0].error


def test_every_format_that_is_named_can_be_used(tmp_path: Path) -> None:
    formats = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
    pictures = {f"p{number}_{suffix}": picture(form=form) for number, (form, suffix) in enumerate(formats.items())}
    book = in_zip(tmp_path, [f"p{number}.{suffix}" for number, suffix in enumerate(formats.values())], **pictures)
    assert [task.error for task in book.tasks()] == [""] * 6
    assert len(set(itertools.chain.from_iterable(task.images for task in book.tasks()))) == 6
