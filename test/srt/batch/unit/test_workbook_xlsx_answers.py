"""The same workbook with the answers: nothing else changes, and what was written is read back."""

import re
from pathlib import Path

import openpyxl
import pytest
from openpyxl.styles import Font
from openpyxl.utils import get_column_letter
from openpyxl.worksheet.table import Table

from embedding_relay.batch.tasks import Outcome, Result
from embedding_relay.batch.workbook.answers import NAMES
from embedding_relay.batch.workbook.formats import write_answers
from embedding_relay.batch.workbook.xlsx import markup
from embedding_relay.batch.workbook.xlsx.answers import CELL_CHARS, cell_text
from support.workbooks import (
    NAMESPACE,
    book_members,
    done,
    members,
    picture,
    received,
    relations,
    save_book,
    save_sheet,
    save_zip,
    sheet_xml,
    text_cell,
    values,
)

SHEET = "xl/worksheets/sheet1.xml"


HEADER = f'<row r="1">{text_cell("A1", "prompt")}</row>'


FAILED = Result(3, Outcome.FAILED, error="the endpoint said no", http_status=400)


def edited(path: Path) -> str:
    return members(path)[SHEET].decode()


def test_a_workbook_gets_five_columns(tmp_path: Path) -> None:
    book = received(save_book(tmp_path / "a.xlsx", [["prompt", "n"], ["one", 1], ["two", 2], ["three", 3]]))
    out = book.answered([done(2, "eins"), FAILED])
    assert values(out) == [
        ("prompt", "n", *NAMES),
        ("one", 1, "eins", "done", None, 3, 5),
        ("two", 2, None, "failed", "the endpoint said no", 0, 0),
        ("three", 3, None, None, None, None, None),
    ]
    before, after = members(book.source), members(out)
    assert list(before) == list(after)
    assert {name for name in before if before[name] != after[name]} == {SHEET}
    assert '<dimension ref="A1:G4"' in edited(out)


def test_the_sheet_is_copied_to_the_byte_where_nothing_is_added(tmp_path: Path) -> None:
    first = f"<!-- a > comment -->{text_cell('A1', 'prompt')}"
    rows = (
        f"<row  r='1' spans='1:1' >{first}</row >\n"
        f'<row r="2" spans="1:1" x="a>b">{text_cell("A2", "a")}<extLst/></row>'
        f'<row r="3" /><row r="5">{text_cell("A5", "unasked")}</row>'
    )
    before = '<dimension  ref="A1:A5" /><cols><col min="1" max="1" width="9"/></cols>'
    book = received(save_sheet(tmp_path / "a.xlsx", rows, before, "<extLst>\n</extLst>"))
    added = "".join(
        f'<c r="{letter}1" t="inlineStr"><is><t xml:space="preserve">{name}</t></is></c>'
        for letter, name in zip("BCDEF", NAMES, strict=True)
    )
    answer = (
        '<c r="B2" t="inlineStr"><is><t xml:space="preserve">an answer</t></is></c>'
        '<c r="C2" t="inlineStr"><is><t xml:space="preserve">done</t></is></c>'
        '<c r="E2"><v>3</v></c><c r="F2"><v>5</v></c>'
    )
    ours = "".join(
        f'<col width="{width}" customWidth="1" min="{number}" max="{number}"/>'
        for number, width in enumerate((22, 12, 12, 15, 19), 2)
    )
    expected = edited(book.source).replace('ref="A1:A5"', 'ref="A1:F5"').replace("</cols>", f"{ours}</cols>")
    expected = expected.replace(f"spans='1:1' >{first}", f"spans='1:6' >{first}{added}")
    expected = expected.replace('spans="1:1"', 'spans="1:6"').replace("<extLst/></row>", f"{answer}<extLst/></row>")
    assert edited(book.answered([done(2)])) == expected


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_where_the_sheet_is_cut_while_it_is_read_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    styled = "".join(f'<c r="{letter}2" s="1"{end}' for letter, end in zip("BCG", ("/>", "></c>", " />"), strict=True))
    rows = (
        f'<row r="1" spans="1:1">{text_cell("A1", "prompt &gt; 中文")}</row>'
        f'<row r="2">{text_cell("A2", "a")}{styled}</row>'
        f'<row r="3"/><row r="4">{text_cell("A4", "b")}<c r="F4"><extLst/></c><extLst/></row><row r="9"></row>'
    )
    columns = '<dimension ref="A1"/><cols><col min="2" max="99" hidden="1"/></cols>'
    book = received(save_sheet(tmp_path / "a.xlsx", rows, columns, "<!-- the end -->"))
    given = [done(row, f"<{row}> 😀") for row in (2, 3, 4, 7, 9, 12)]
    whole = members(book.answered(given))
    monkeypatch.setattr(markup, "CHUNK", size)
    assert members(book.answered(given)) == whole


def test_rows_and_cells_without_numbers_and_with_prefixes(tmp_path: Path) -> None:
    rows = f"<row>{text_cell('', 'prompt')}{text_cell('', 'm')}</row><row/><row>{text_cell('', 'hello')}<c/></row>"
    sheet = sheet_xml(rows, "<dimension/>")
    for name in ("worksheet", "dimension", "sheetData", "row", "c", "is", "t"):
        sheet = sheet.replace(f"<{name}", f"<x:{name}").replace(f"</{name}>", f"</x:{name}>")
    for wrong in ("x:x:", "<x:t=", "<x:is>=", "x:colu"):
        assert wrong not in sheet
    sheet = sheet.replace("xmlns=", "xmlns:x=")
    book = received(save_zip(tmp_path / "a.xlsx", book_members(sheet)))
    assert [(task.row, task.prompt) for task in book.tasks()] == [(3, "hello")]
    out = book.answered([done(3, "hi")])
    assert '<x:c r="C3" t="inlineStr"><x:is><x:t xml:space="preserve">hi</x:t></x:is></x:c>' in edited(out)


def test_a_picture_alone_in_its_row_gets_a_row(tmp_path: Path) -> None:
    pictures = {f"B{row}": picture() for row in (3, 5, 9)}
    rows = [["prompt", "photo"], [], [], ["hello", None], [], ["last"]]
    book = received(save_book(tmp_path / "a.xlsx", rows, pictures))
    tasks = book.tasks()
    assert [(task.row, bool(task.error)) for task in tasks] == [(3, True), (4, False), (5, True), (6, False), (9, True)]
    out = book.answered([done(task.row, f"to {task.row}") for task in tasks])
    answers = {number: row[-5] for number, row in enumerate(values(out), 1)}
    assert {number: answer for number, answer in answers.items() if answer} == {
        1: "answer",
        **{row: f"to {row}" for row in (3, 4, 5, 6, 9)},
    }


def test_a_sheet_without_rows_but_with_pictures(tmp_path: Path) -> None:
    made = save_book(tmp_path / "made.xlsx", [], {"A1": picture(), "A2": picture("blue")})
    others = members(made)
    others[SHEET] = re.sub(rb"<sheetData>.*</sheetData>", b"<sheetData/>", others[SHEET])
    book = received(save_zip(tmp_path / "a.xlsx", others))
    assert (book.analysis.header_row, book.analysis.rows, book.analysis.pictures) == (0, 2, 2)
    out = book.answered([done(1, "red"), done(2, "blue")])
    assert [row[-5] for row in values(out)] == ["red", "blue"]


def test_styled_cells_to_the_right_are_replaced_and_lend_their_style(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    book.active.append(["prompt"])
    book.active.append(["hello"])
    for column in range(2, 12):
        book.active.cell(2, column).font = Font(name=f"Font {column}")
    book.save(path)
    taken = received(path)
    assert taken.analysis.width == 1
    sheet = openpyxl.load_workbook(taken.answered([done(2)])).active
    assert [sheet.cell(2, column).value for column in range(1, 9)] == [
        "hello",
        "an answer",
        "done",
        None,
        3,
        5,
        None,
        None,
    ]
    assert [sheet.cell(2, column).font.name for column in range(2, 12)] == [f"Font {column}" for column in range(2, 12)]


def test_the_header_lends_its_style(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    book.active.append(["prompt", "photo"])
    book.active.append(["hello"])
    book.active["B1"].font = Font(bold=True)
    book.save(path)
    sheet = openpyxl.load_workbook(received(path).answered([done(2)])).active
    assert [sheet.cell(1, column).font.b for column in range(1, 8)] == [False, *[True] * 6]
    assert not sheet["C2"].font.b


def test_tables_and_merged_cells_end_before_the_answers(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    for row in [["prompt", "note", "more"], ["hello"], ["again"]]:
        book.active.append(row)
    book.active.add_table(Table(displayName="Things", ref="A1:C3"))
    book.active.merge_cells("B3:H3")
    book.save(path)
    taken = received(path)
    assert taken.analysis.width == 8
    out = taken.answered([done(2), done(3)])
    sheet = openpyxl.load_workbook(out).active
    assert sheet.tables["Things"].ref == "A1:C3"
    assert [str(area) for area in sheet.merged_cells.ranges] == ["B3:H3"]
    assert [sheet[f"I{row}"].value for row in (1, 2, 3)] == ["answer", "an answer", "an answer"]


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("=1+1", "=1+1"),
        ("a <b> & \"c\" 'd' ]]> é 中文 😀", "a <b> & \"c\" 'd' ]]> é 中文 😀"),
        (" kept \n blanks\t", " kept \n blanks\t"),
        ("windows\r\nand\rmac", "windows\nand\nmac"),
        ("\x00\x01\x0b\x1f\ufffe\ud800no", "no"),
        ("", None),
    ],
)
def test_texts_are_texts(tmp_path: Path, answer: str, shown: str | None) -> None:
    book = received(save_book(tmp_path / "a.xlsx", [["prompt"], ["hello"]]))
    out = book.answered([done(2, answer)])
    cell = openpyxl.load_workbook(out).active["B2"]
    assert cell.value == shown
    assert cell.data_type in ("s", "n" if shown is None else "s")


def test_what_looks_like_excels_escapes_stays_what_it_is(tmp_path: Path) -> None:
    book = received(save_book(tmp_path / "a.xlsx", [["prompt"], ["hello"]]))
    out = book.answered([done(2, "_x0041_ _x005F_ x _x00_")])
    assert "_x005F_x0041_ _x005F_x005F_ x _x00_" in edited(out)


def test_an_answer_too_long_for_a_cell_is_cut_and_says_so(tmp_path: Path) -> None:
    book = received(save_book(tmp_path / "a.xlsx", [["prompt"], ["hello"], ["again"]]))
    fits = "x" * CELL_CHARS
    shown = [row[1] for row in values(book.answered([done(2, fits), done(3, "😀" * 20_000)]))]
    assert shown[1] == fits
    assert len(shown[2].encode("utf-16-le")) <= 2 * CELL_CHARS
    assert shown[2].endswith("[cut here: the text has 20000 characters, and a cell holds at most 32767]")
    assert cell_text("x" * (CELL_CHARS + 1)).count("x") < CELL_CHARS


def test_a_sheet_in_utf16_is_answered(tmp_path: Path) -> None:
    rows = f'<row r="1">{text_cell("A1", "prompt")}</row><row r="2">{text_cell("A2", "grüße")}</row>'
    sheet = ('<?xml version="1.0" encoding="UTF-16"?>' + sheet_xml(rows)).encode("utf-16")
    book = received(save_zip(tmp_path / "a.xlsx", book_members(sheet)))
    assert book.tasks()[0].prompt == "grüße"
    assert [row[:2] for row in values(book.answered([done(2, "ä")]))] == [("prompt", "answer"), ("grüße", "ä")]


def columns_of(path: Path) -> str:
    found = re.search("<cols>.*</cols>", edited(path))
    return found.group().replace(' customWidth="1"', "") if found else ""


def test_hidden_columns_are_shown_where_the_answers_are(tmp_path: Path) -> None:
    columns = '<cols><col min="1" max="1" width="9"/><col min="2" max="16384" width="0" hidden="1" x="y"/></cols>'
    rows = f'<row r="1">{text_cell("A1", "prompt")}</row><row r="2">{text_cell("A2", "hello")}</row>'
    book = received(save_sheet(tmp_path / "a.xlsx", rows, columns))
    assert columns_of(book.answered([done(2)])) == (
        '<cols><col min="1" max="1" width="9"/><col width="22" min="2" max="2"/><col width="12" min="3" max="3"/>'
        '<col width="12" min="4" max="4"/><col width="15" min="5" max="5"/><col width="19" min="6" max="6"/>'
        '<col min="7" max="16384" width="0" hidden="1" x="y"/></cols>'
    )


@pytest.mark.parametrize(
    ("answer", "width"),
    [("no", 22), ("a sentence of thirty characters", 33), ("short\nlines\n" * 9, 22), ("雪" * 20, 42), ("x" * 500, 60)],
)
def test_a_column_is_as_wide_as_what_is_in_it(tmp_path: Path, answer: str, width: int) -> None:
    book = received(save_book(tmp_path / "a.xlsx", [["prompt"], ["hello"], ["again"]]))
    sheet = openpyxl.load_workbook(book.answered([done(2, "no"), done(3, answer)])).active
    assert sheet.column_dimensions["B"].width == width


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("", {"B": 22, "C": 12, "G": 13}),
        ("<cols/>", {"B": 22, "C": 12, "G": 13}),
        ('<cols><col min="7" max="9" width="50" customWidth="1"></col></cols>', {"B": 22, "C": 12, "G": 50}),
        ('<cols><col min="1" max="9" width="50" customWidth="1"> </col></cols>', {"A": 50, "B": 50, "F": 50, "G": 50}),
        ('<cols><col min="2" max="2" width="5" style="0"/><col min="3" max="3" width="5"/></cols>', {"B": 22, "C": 12}),
    ],
)
def test_widths_of_other_columns_stay(tmp_path: Path, columns: str, expected: dict[str, float]) -> None:
    book = received(save_sheet(tmp_path / "a.xlsx", f'{HEADER}<row r="2">{text_cell("A2", "x")}</row>', columns))
    out = book.answered([done(2)])
    written = re.findall('<col [^>]*min="([0-9]+)" max="([0-9]+)"', edited(out).replace("/>", ">"))
    numbers = [int(number) for pair in written for number in pair]
    assert numbers == sorted(numbers), "a spreadsheet program finds such a file damaged"
    widths = {
        letter: found.width
        for found in openpyxl.load_workbook(out).active.column_dimensions.values()
        for letter in map(get_column_letter, range(found.min, found.max + 1))
    }
    assert {letter: widths.get(letter, 13) for letter in expected} == expected


def test_the_sheet_that_was_analysed_is_the_one_that_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    book.active.append(["nothing"])
    book.create_sheet("Asked & <answered>").append(["prompt"])
    book.worksheets[1].append(["hello"])
    book.save(path)
    taken = received(path)
    out = taken.answered([done(2, "hi")])
    assert taken.analysis.sheet == "Asked & <answered>"
    assert openpyxl.load_workbook(out).worksheets[1]["B2"].value == "hi"
    assert members(out)[SHEET] == members(taken.source)[SHEET]


def test_charts_macros_and_what_nobody_knows_stay(tmp_path: Path) -> None:
    others = {
        "xl/vbaProject.bin": b"\0\1macro",
        "xl/charts/chart1.xml": b"<c/>",
        "customXml/item1.xml": b"<a/>",
        "d/": b"",
    }
    book = received(save_sheet(tmp_path / "a.xlsm", f'{HEADER}<row r="2">{text_cell("A2", "x")}</row>', **others))
    after = members(book.answered([done(2)]))
    assert {name: after[name] for name in others} == others


def test_names_in_xml_of_the_sheet_cannot_break_out(tmp_path: Path) -> None:
    """The only texts of the owner that are written anew are names of columns."""
    header = text_cell("A1", "prompt") + text_cell("B1", "ANSWER")
    rows = f'<row r="1">{header}</row><row r="2">{text_cell("A2", "x")}</row>'
    others = {"xl/styles.xml": f'<styleSheet xmlns="{NAMESPACE}"/>', "xl/_rels/other.rels": relations({})}
    book = received(save_sheet(tmp_path / "a.xlsx", rows, **others))
    assert '<t xml:space="preserve">answer (2)</t>' in edited(book.answered([done(2)]))


def test_writing_twice_gives_the_same_file(tmp_path: Path) -> None:
    book = received(save_book(tmp_path / "a.xlsx", [["prompt"], ["hello"]]))
    first = book.answered([done(2)]).read_bytes()
    write_answers(book.source, book.kind, book.analysis, [done(2)], tmp_path / "again.xlsx")
    assert (tmp_path / "again.xlsx").read_bytes() == first
