"""Where drawings lie over a sheet, and that answers are written beside them."""

from __future__ import annotations

import io
from pathlib import Path

import openpyxl
import pytest
from openpyxl.chart import BarChart, Reference
from openpyxl.drawing.image import Image as SheetImage

from embedding_relay.batch.workbook.cells import column_letter
from embedding_relay.batch.workbook.xlsx.drawings import beside
from embedding_relay.batch.workbook.xlsx.sheet import Area
from support.workbooks import HEADER, Received, done, members, picture, received, relations, save_sheet, text_cell

ROWS = f'{HEADER}<row r="2">{text_cell("A2", "what is it?")}</row>'


def corner(name: str, column: int, row: int, offset: int = 0) -> str:
    return f"<d:{name}><d:col>{column}</d:col><d:colOff>{offset}</d:colOff><d:row>{row}</d:row></d:{name}>"


def drawn(tmp_path: Path, anchor: str, before: str = "") -> Received:
    """A workbook with two columns and two rows, and this in its drawing."""
    drawing = f'<d:wsDr xmlns:d="d">{anchor}</d:wsDr>'
    others = {
        "xl/worksheets/_rels/sheet1.xml.rels": relations({"rId1": ("drawing", "../drawings/drawing1.xml")}),
        "xl/drawings/drawing1.xml": drawing,
    }
    return received(save_sheet(tmp_path / "a.xlsx", ROWS, before, **others))


@pytest.mark.parametrize(
    ("anchor", "width"),
    [
        # A chart over E to H, and two that leave the columns behind the data free, or are not beside the data.
        (f"<d:twoCellAnchor>{corner('from', 4, 0)}{corner('to', 7, 9, 1)}<d:graphicFrame/></d:twoCellAnchor>", 8),
        (f"<d:twoCellAnchor>{corner('from', 7, 0)}{corner('to', 9, 9, 1)}<d:graphicFrame/></d:twoCellAnchor>", 2),
        (f"<d:twoCellAnchor>{corner('from', 4, 2)}{corner('to', 7, 9, 1)}<d:graphicFrame/></d:twoCellAnchor>", 2),
        # A column is 64 pixels wide: this reaches from C over D, E, F to the first pixel of G.
        (f'<d:oneCellAnchor>{corner("from", 2, 1)}<d:ext cx="{257 * 9525}" cy="9"/></d:oneCellAnchor>', 7),
        (f'<d:oneCellAnchor>{corner("from", 2, 1)}<d:ext cx="{256 * 9525}" cy="9"/></d:oneCellAnchor>', 6),
        (f'<d:absoluteAnchor><d:pos x="{100 * 9525}" y="0"/><d:ext cx="{64 * 9525}" cy="9"/></d:absoluteAnchor>', 3),
        # So wide that there would be no column left; and no numbers at all.
        (f"<d:twoCellAnchor>{corner('from', 1, 0)}{corner('to', 16_383, 9, 1)}<d:sp/></d:twoCellAnchor>", 2),
        ("<d:twoCellAnchor><d:from/><d:to/></d:twoCellAnchor><d:oneCellAnchor/><d:absoluteAnchor/>", 2),
        (f'<d:oneCellAnchor>{corner("from", 999_999_999, 1)}<d:ext cx="99999999999"/></d:oneCellAnchor>', 2),
    ],
)
def test_answers_begin_behind_what_is_in_their_way(tmp_path: Path, anchor: str, width: int) -> None:
    book = drawn(tmp_path, anchor)
    assert book.analysis.width == width
    assert any("beside what lies over the sheet" in note for note in book.analysis.notes) is (width > 2)
    sheet = members(book.answered([done(2)]))["xl/worksheets/sheet1.xml"].decode()
    assert f'<c r="{column_letter(width)}1" t="inlineStr"><is><t xml:space="preserve">answer<' in sheet


def test_narrow_and_hidden_columns_count_as_what_they_are(tmp_path: Path) -> None:
    anchor = f'<d:oneCellAnchor>{corner("from", 2, 1)}<d:ext cx="{60 * 9525}" cy="9"/></d:oneCellAnchor>'
    narrow = '<cols><col min="3" max="4" width="3" customWidth="1"/><col min="5" max="9" hidden="1"/></cols>'
    assert drawn(tmp_path, anchor, narrow).analysis.width == 10


def test_columns_that_are_named_again_and_again_are_read_once(tmp_path: Path) -> None:
    """In a second or two; each of them counted anew would take minutes."""
    anchor = f'<d:oneCellAnchor>{corner("from", 2, 1)}<d:ext cx="9525" cy="9"/></d:oneCellAnchor>'
    columns = '<col min="1" max="16384" width="9"/>' * 100_000
    assert drawn(tmp_path, anchor, f"<cols>{columns}</cols>").analysis.width == 3


def test_a_chart_and_a_picture_that_openpyxl_puts_there(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    for row in [["prompt", "sold"], ["how many?", 3], ["and now?", 4]]:
        sheet.append(row)
    chart = BarChart()
    chart.add_data(Reference(sheet, min_col=2, min_row=1, max_row=3), titles_from_data=True)
    sheet.add_chart(chart, "D2")
    sheet.add_image(SheetImage(io.BytesIO(picture(size=200))), "M2")
    book.save(tmp_path / "a.xlsx")
    taken = received(tmp_path / "a.xlsx")
    # The chart is 15 cm wide, which are 567 pixels or 8.9 columns: D to L. The picture stands over M to P.
    assert taken.analysis.width == 16
    out = openpyxl.load_workbook(taken.answered([done(2), done(3)])).active
    assert (out["Q1"].value, out["Q2"].value) == ("answer", "an answer")


def test_the_first_gap_that_is_wide_enough() -> None:
    covered = [Area(1, 20, 9, 25), Area(1, 4, 9, 6), Area(1, 10, 9, 12)]
    assert beside(2, 5, (1, 9), covered) == 13
    assert beside(2, 2, (1, 9), covered) == 2
    assert beside(5, 3, (1, 9), covered) == 7
    assert beside(2, 5, (10, 99), covered) == 2
