"""One sheet: what its cells say to a person, merged cells, and cells that cannot be read."""

import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from embedding_relay.batch.errors import TooLarge
from embedding_relay.batch.tasks import Task
from embedding_relay.batch.workbook.analysis import Choices
from embedding_relay.batch.workbook.limits import Limits
from support.workbooks import (
    NAMESPACE,
    received,
    relations,
    save_sheet,
    text_cell,
)

HEADER = f'<row r="1">{text_cell("A1", "prompt")}</row>'


def prompts(path: Path, choices: Choices | None = None) -> dict[int, str]:
    return {task.row: task.prompt or task.error for task in received(path, choices).tasks()}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3, "3"),
        (3.0, "3"),
        (-0.5, "-0.5"),
        (0.1 + 0.2, "0.3"),
        (1e21, "1e+21"),
        (123456789012345, "123456789012345"),
        (True, "TRUE"),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (datetime.datetime(2024, 2, 29, 13, 5, 7), "2024-02-29 13:05:07"),
        (datetime.time(13, 5), "13:05:00"),
        (datetime.timedelta(hours=30, minutes=1), "30:01:00"),
        (" kept as it is ", " kept as it is "),
        ("line\nends", "line\nends"),
    ],
)
@pytest.mark.parametrize("epoch", [datetime.datetime(1899, 12, 30), datetime.datetime(1904, 1, 1)])
def test_values_read_as_a_person_sees_them(tmp_path: Path, value: Any, shown: str, epoch: datetime.datetime) -> None:
    book = openpyxl.Workbook()
    book.epoch = epoch
    book.active.append(["x"])
    book.active.append([value])
    book.save(tmp_path / "a.xlsx")
    taken = received(tmp_path / "a.xlsx", Choices(template="<{x}>"))
    assert [task.prompt for task in taken.tasks()] == [f"<{shown}>"]


def test_dates_are_told_by_the_number_format(tmp_path: Path) -> None:
    styles = f"""<styleSheet xmlns="{NAMESPACE}"><numFmts><numFmt numFmtId="165" formatCode="[$-407]d. mmmm yyyy"/>
        <numFmt numFmtId="166" formatCode="0.00&quot; days&quot;"/></numFmts><cellXfs><xf numFmtId="0"/>
        <xf numFmtId="165"/><xf numFmtId="166"/><xf numFmtId="14"/></cellXfs></styleSheet>"""
    others = {
        "xl/styles.xml": styles,
        "xl/_rels/workbook.xml.rels": relations(
            {"rId1": ("worksheet", "worksheets/sheet1.xml"), "rId2": ("styles", "styles.xml")}
        ),
    }
    cells = "".join(f'<c r="{c}2" s="{style}"><v>45351</v></c>' for c, style in zip("BCDE", (0, 1, 2, 3), strict=True))
    cells += '<c r="F2" s="1"><v>99999999999</v></c><c r="G2" t="d"><v>2024-02-29T00:00:00</v></c>'
    header = "".join(text_cell(f"{c}1", c.lower()) for c in "ABCDEFG")
    rows = f'<row r="1">{header}</row><row r="2">{text_cell("A2", "x")}{cells}</row>'
    path = save_sheet(tmp_path / "a.xlsx", rows, **others)
    (task,) = received(path, Choices(template="{b} {c} {d} {e} {f} {g}")).tasks()
    assert task.prompt == "45351 2024-02-29 45351 2024-02-29 99999999999 2024-02-29"


def test_texts_in_all_the_places_where_they_can_be(tmp_path: Path) -> None:
    shared = f"""<sst xmlns="{NAMESPACE}"><si><t>plain</t></si><si><r><rPr><b/></rPr><t>ri</t></r><r><t>ch</t></r>
        <rPh sb="0" eb="1"><t>spoken</t></rPh></si><si><t>a_x000D_\nb_x005F_x0041_</t></si></sst>"""
    others = {
        "xl/sharedStrings.xml": shared,
        "xl/_rels/workbook.xml.rels": relations(
            {"rId1": ("worksheet", "/xl/worksheets/sheet1.xml"), "rId2": ("sharedStrings", "SharedStrings.xml")}
        ),
    }
    cells = [
        *(f'<c t="s"><v>{index}</v></c>' for index in range(3)),
        '<c t="inlineStr"><is><r><t>in</t></r><r><t xml:space="preserve">line </t></r><rPh><t>no</t></rPh></is></c>',
        '<c t="str"><f>"a"&amp;"b"</f><v>ab</v></c>',
        '<c t="inlineStr"><is><t><![CDATA[<&>]]></t></is></c>',
        '<c t="b"><f>1=1</f><v>1</v></c>',
        "<c><f>1+1</f><v>2</v></c>",
    ]
    rows = HEADER + "".join(f"<row>{cell}</row>" for cell in cells)
    texts = ["plain", "rich", "a\r\nb_x0041_", "inline ", "ab", "<&>", "TRUE", "2"]
    assert list(prompts(save_sheet(tmp_path / "a.xlsx", rows, **others)).values()) == texts


def test_what_cannot_be_read_is_an_error_of_its_row(tmp_path: Path) -> None:
    cells = [
        "<c><f>NOW()</f></c>",
        '<c><f>A1&amp;"x"</f><v></v></c>',
        '<c t="e"><f>1/0</f><v>#DIV/0!</v></c>',
        '<c t="e"><v>#N/A</v></c>',
        '<c t="str"><f>""</f><v></v></c>',
        text_cell("", "fine"),
    ]
    rows = HEADER + "".join(f"<row>{cell}</row>" for cell in cells)
    taken = received(save_sheet(tmp_path / "a.xlsx", rows))
    unstored = (
        "column 'prompt' holds a formula without a stored result: "
        "open the workbook in Excel or LibreOffice, save it, and upload it again"
    )
    assert taken.tasks() == [
        Task(2, error=unstored),
        Task(3, error=unstored),
        Task(4, error="column 'prompt' holds the error value #DIV/0!"),
        Task(5, error="column 'prompt' holds the error value #N/A"),
        Task(7, "fine"),
    ]
    assert taken.analysis.notes[-1] == (
        "column 'prompt' has 4 cells with an error or a formula without a stored result"
    )


def test_hidden_rows_are_rows(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for text in ("prompt", "one", "two"):
        book.active.append([text])
    book.active.row_dimensions[2].hidden = True
    book.save(tmp_path / "a.xlsx")
    assert prompts(tmp_path / "a.xlsx") == {2: "one", 3: "two"}


def test_a_merged_value_counts_for_all_of_its_rows_and_asks_no_row_by_itself(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [["language", "text"], ["German", "one"], [None, "two"], [None, None], ["French", "three"]]:
        book.active.append(row)
    book.active.merge_cells("A2:A4")
    book.active.merge_cells("B5:D7")
    book.save(tmp_path / "a.xlsx")
    taken = received(tmp_path / "a.xlsx", Choices(template="{text}: {language}"))
    assert [(task.row, task.prompt) for task in taken.tasks()] == [
        (2, "one: German"),
        (3, "two: German"),
        (5, "three: French"),
    ]
    assert taken.analysis.rows == 3
    assert taken.analysis.width == 4


def test_a_row_of_too_many_cells_is_refused(tmp_path: Path) -> None:
    for number, line in enumerate(("x" + "," * 20, '"x"' + "," * 20)):
        (tmp_path / "a.csv").write_text(f"prompt,n\n{line}\n")
        with pytest.raises(TooLarge, match=r"row 2 has 1\d cells; 10 are accepted"):
            received(tmp_path / "a.csv", limits=Limits(columns=10), into=str(number))
