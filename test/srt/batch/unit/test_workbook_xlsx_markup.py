"""XML that is damaged, endless or declares document types."""

from pathlib import Path

import pytest

from embedding_relay.batch.errors import Unreadable
from embedding_relay.batch.workbook.xlsx.markup import MOST_TOKEN
from support.workbooks import (
    book_members,
    received,
    save_sheet,
    save_zip,
    text_cell,
)


@pytest.mark.parametrize(
    ("sheet", "words"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><worksheet><sheetData/></worksheet>', "document type"),
        ("<worksheet><sheetData>", "not well-formed"),
        ("", "not well-formed"),
        ('<worksheet><sheetData><row r="2"/><row r="2"/></sheetData></worksheet>', "row 2 stands after row 2"),
        ('<worksheet><sheetData><row r="-1"/></sheetData></worksheet>', "row -1"),
        ('<worksheet><sheetData><row r="1048577"/></sheetData></worksheet>', "row 1048577"),
        ('<worksheet><sheetData><row><c r="XFE1"/></row></sheetData></worksheet>', "no cell XFE1"),
        ('<worksheet><sheetData><row><c r="1A"/></row></sheetData></worksheet>', "'1A' is not the name"),
        ('<worksheet><sheetData><row><c t="s"><v>0</v></c></row></sheetData></worksheet>', "text 0 of 0"),
        ("<worksheet><sheetData><row><c><v>x</v></c></row></sheetData></worksheet>", "A1 holds 'x' as a number"),
    ],
)
def test_damaged_sheets_are_refused_with_what_is_wrong(tmp_path: Path, sheet: str, words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        received(save_zip(tmp_path / "a.xlsx", book_members(sheet)))


def test_a_tag_that_does_not_end_is_refused_early(tmp_path: Path) -> None:
    sheet = f"<worksheet><sheetData><!-- {'x' * (3 * MOST_TOKEN)}"
    with pytest.raises(Unreadable, match="tag without an end"):
        received(save_zip(tmp_path / "a.xlsx", book_members(sheet)))


def test_a_document_type_in_any_part_is_refused(tmp_path: Path) -> None:
    bad = '<!DOCTYPE x [<!ENTITY a "b">]><x/>'
    rows = f'<row r="1">{text_cell("A1", "prompt")}</row><row r="2">{text_cell("A2", "x")}</row>'
    for number, part in enumerate(["xl/workbook.xml", "_rels/.rels", "xl/cellimages.xml"]):
        path = save_sheet(tmp_path / f"{number}.xlsx", rows, **{part: bad})
        with pytest.raises(Unreadable, match="document type"):
            received(path, into=str(number))
