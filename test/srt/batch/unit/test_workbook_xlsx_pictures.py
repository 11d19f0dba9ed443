"""Pictures in workbooks: floating, placed in cells, named by formulas; and pictures that rows name."""

import hashlib
from pathlib import Path

import pytest

from support.workbooks import (
    BLUE,
    HEADER,
    PICTURE_URL,
    RED,
    RICH,
    contents,
    done,
    members,
    placed,
    received,
    relations,
    save_book,
    save_sheet,
    text_cell,
)

# ---- Excel's floating pictures, and "Place in Cell"


def test_floating_pictures_belong_to_the_row_of_their_upper_left_corner(tmp_path: Path) -> None:
    rows = [["prompt", "photo"], ["red one"], ["blue one"], ["none"], ["red again"]]
    book = received(save_book(tmp_path / "a.xlsx", rows, {"B2": RED, "B3": BLUE, "B5": RED}))
    assert (book.analysis.pictures, book.analysis.image_columns) == (3, ("photo",))
    tasks = book.tasks()
    assert [contents(book, task.images) for task in tasks] == [[RED], [BLUE], [], [RED]]
    assert tasks[0].images == tasks[3].images == (f"pictures/{hashlib.sha256(RED).hexdigest()[:32]}.png",)
    assert tasks[1].images == (f"pictures/{hashlib.sha256(BLUE).hexdigest()[:32]}.jpg",)
    assert len(list((book.folder / "pictures").iterdir())) == 2


def test_several_pictures_of_a_row_come_in_the_order_of_the_columns(tmp_path: Path) -> None:
    rows = [["front", "prompt", "back"], [None, "compare", PICTURE_URL]]
    book = received(save_book(tmp_path / "a.xlsx", rows, {"A2": RED, "C2": BLUE}))
    (task,) = book.tasks()
    assert contents(book, task.images[:2]) == [RED, BLUE]
    assert task.images[2] == PICTURE_URL


def test_a_picture_with_the_prompt_of_a_merged_cell(tmp_path: Path) -> None:
    rows = HEADER + "".join(
        f'<row r="{row}">{text_cell(f"A{row}", "what is it?") if row == 2 else ""}</row>' for row in (2, 3, 4)
    )
    rows = rows.replace('<row r="3"></row>', f'<row r="3">{text_cell("B3", PICTURE_URL)}</row>')
    rows = rows.replace("what is it?</t></is></c>", f"what is it?</t></is></c>{text_cell('B2', PICTURE_URL)}")
    merged = '<mergeCells count="1"><mergeCell ref="A2:A4"/></mergeCells>'
    book = received(save_sheet(tmp_path / "a.xlsx", rows, after=merged))
    # The fourth row has nothing of its own, so it does not ask the same a third time.
    assert [(task.row, task.prompt, len(task.images)) for task in book.tasks()] == [
        (2, "what is it?", 1),
        (3, "what is it?", 1),
    ]


@pytest.mark.parametrize(("offset", "answers_in"), [(0, "E"), (9525, "F")])
def test_answers_stand_beside_what_floats_over_the_sheet(tmp_path: Path, offset: int, answers_in: str) -> None:
    anchor = f"""<d:wsDr xmlns:d="d" xmlns:a="a" xmlns:r="r"><d:twoCellAnchor>
        <d:from><d:col>1</d:col><d:row>1</d:row></d:from>
        <d:to><d:col>4</d:col><d:colOff>{offset}</d:colOff><d:row>9</d:row></d:to><d:pic><d:blipFill>
        <a:blip r:embed="rId1"/></d:blipFill></d:pic></d:twoCellAnchor></d:wsDr>"""
    others = {
        "xl/worksheets/_rels/sheet1.xml.rels": relations({"rId1": ("drawing", "../drawings/drawing1.xml")}),
        "xl/drawings/drawing1.xml": anchor,
        "xl/drawings/_rels/drawing1.xml.rels": relations({"rId1": ("image", "/xl/media/image1.png")}),
        "xl/media/image1.png": RED,
    }
    rows = f'{HEADER}<row r="2">{text_cell("A2", "what is it?")}</row>'
    book = received(save_sheet(tmp_path / "a.xlsx", rows, **others))
    assert contents(book, book.tasks()[0].images) == [RED]
    assert f'<c r="{answers_in}1"' in members(book.answered([done(2)]))["xl/worksheets/sheet1.xml"].decode()


def test_pictures_placed_in_cells(tmp_path: Path) -> None:
    book = received(save_sheet(tmp_path / "a.xlsx", HEADER + placed(2, 1) + placed(3, 2) + placed(4, 1), **RICH))
    assert (book.analysis.pictures, book.analysis.image_columns) == (3, ("photo",))
    assert [contents(book, task.images) for task in book.tasks()] == [[BLUE], [RED], [BLUE]]


def test_a_cell_whose_picture_is_not_there_is_an_error_of_its_row(tmp_path: Path) -> None:
    book = received(save_sheet(tmp_path / "a.xlsx", HEADER + placed(2, 1) + placed(3, 3) + placed(4, 99), **RICH))
    assert [task.error for task in book.tasks()] == ["", *["column 'photo' holds the error value #VALUE!"] * 2]


def test_a_picture_in_a_merged_cell_counts_for_all_of_its_rows(tmp_path: Path) -> None:
    rows = HEADER + placed(2, 1) + f'<row r="3">{text_cell("A3", "and now?")}</row>'
    merged = '<mergeCells><mergeCell ref="B2:C3"/></mergeCells>'
    book = received(save_sheet(tmp_path / "a.xlsx", rows, after=merged, **RICH))
    assert [contents(book, task.images) for task in book.tasks()] == [[BLUE], [BLUE]]
    assert book.analysis.pictures == 1


# ---- formulas that show pictures


def test_pictures_that_wps_names_in_formulas(tmp_path: Path) -> None:
    others = {
        "xl/cellimages.xml": '<e:cellImages xmlns:e="e" xmlns:x="x" xmlns:a="a" xmlns:r="r"><e:cellImage><x:pic>'
        '<x:nvPicPr><x:cNvPr id="1" name="ID_ABC"/></x:nvPicPr><x:blipFill><a:blip r:embed="rId1"/></x:blipFill>'
        "</x:pic></e:cellImage></e:cellImages>",
        "xl/_rels/cellimages.xml.rels": relations({"rId1": ("image", "media/image1.png")}),
        "xl/media/image1.png": RED,
    }

    def named(row: int, name: str) -> str:
        formula = f'<f>_xlfn.DISPIMG("{name}",1)</f>'
        cell = f'<c r="B{row}" t="str">{formula}<v>=DISPIMG("{name}",1)</v></c>'
        return f'<row r="{row}">{text_cell(f"A{row}", "what is it?")}{cell}</row>'

    book = received(save_sheet(tmp_path / "a.xlsx", HEADER + named(2, "ID_ABC") + named(3, "ID_XYZ"), **others))
    good, bad = book.tasks()
    assert contents(book, good.images) == [RED]
    assert "not in the upload" in bad.error


def test_the_url_of_an_image_formula_is_the_picture(tmp_path: Path) -> None:
    cell = f'<c r="B2" t="e" vm="7"><f>_xlfn.IMAGE("{PICTURE_URL}", "alt", 1)</f><v>#VALUE!</v></c>'
    book = received(save_sheet(tmp_path / "a.xlsx", f'{HEADER}<row r="2">{text_cell("A2", "x")}{cell}</row>'))
    assert book.tasks()[0].images == (PICTURE_URL,)
