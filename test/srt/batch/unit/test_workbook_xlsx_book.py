"""A workbook as a whole: without cells, or with texts longer than any cell."""

from pathlib import Path

import pytest

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.limits import Limits
from support.workbooks import (
    book_members,
    received,
    relations,
    save_sheet,
    save_zip,
    text_cell,
)

HEADER = f'<row r="1">{text_cell("A1", "prompt")}</row>'


def test_a_workbook_without_cells_is_refused(tmp_path: Path) -> None:
    parts = book_members("<worksheet/>", {"xl/workbook.xml": "<workbook/>"})
    with pytest.raises(Unreadable, match="no sheet with cells"):
        received(save_zip(tmp_path / "a.xlsx", parts))


@pytest.mark.parametrize("shared", [False, True])
def test_a_text_longer_than_any_cell_is_refused(tmp_path: Path, shared: bool) -> None:
    rows = HEADER + f'<row r="2">{text_cell("A2", "x" * 5000)}</row>'
    others: dict[str, str] = {}
    if shared:
        others["xl/sharedStrings.xml"] = f"<sst><si><t>{'x' * 5000}</t></si></sst>"
        parts = {"rId1": ("worksheet", "worksheets/sheet1.xml"), "rId2": ("sharedStrings", "sharedStrings.xml")}
        others["xl/_rels/workbook.xml.rels"] = relations(parts)
    with pytest.raises(TooLarge, match="longer than 4999 characters"):
        received(save_sheet(tmp_path / "a.xlsx", rows, **others), limits=Limits(cell_chars=4999))
