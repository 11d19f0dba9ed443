"""What is found in a workbook: sheets, header, columns, prompts and pictures, in several languages."""

import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.analysis import Analysis, Choices, Column, Sheet
from embedding_relay.batch.workbook.answers import NAMES
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.xlsx.markup import MOST_TOKEN
from support.workbooks import (
    PICTURE_URL,
    book_members,
    done,
    picture,
    received,
    relations,
    save_book,
    save_sheet,
    save_zip,
    text_cell,
    values,
)

HEADER = f'<row r="1">{text_cell("A1", "prompt")}</row>'


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
    assert found.notes == ("the sheet 'Data' is used; the others are left as they are",)


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


def test_choices_win_and_are_checked(tmp_path: Path) -> None:
    rows = [["prompt", "other", "photo"], ["a", "b", PICTURE_URL]]
    path = save_book(tmp_path / "a.xlsx", rows)
    content = path.read_bytes()

    def chosen(number: int, **choices: Any) -> Analysis:
        path.write_bytes(content)
        return received(path, Choices(**choices), into=str(number)).analysis

    found = chosen(1, prompt_column="OTHER ", image_columns=())
    assert (found.prompt_column, found.image_columns) == ("other", ())
    assert [column.role for column in found.columns] == ["", "prompt", ""]
    assert chosen(2, image_columns=("other", "photo", "other")).image_columns == ("other", "photo")
    assert chosen(3, prompt_column="photo").image_columns == ()
    assert chosen(4, image_columns=("prompt",)).prompt_column == ""
    for number, (choices, words) in enumerate(
        [
            ({"prompt_column": "nope"}, "no column 'nope'; there are: prompt, other, photo"),
            ({"image_columns": ("nope",)}, "no column 'nope'"),
            ({"template": "{nope}"}, "'nope' that does not exist"),
            ({"sheet": "nope"}, "no sheet 'nope'; there are: Sheet"),
        ],
        10,
    ):
        with pytest.raises(Unreadable, match=words):
            chosen(number, **choices)


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


def test_a_workbook_without_cells_is_refused(tmp_path: Path) -> None:
    parts = book_members("<worksheet/>", {"xl/workbook.xml": "<workbook/>"})
    with pytest.raises(Unreadable, match="no sheet with cells"):
        received(save_zip(tmp_path / "a.xlsx", parts))


def test_limits_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\n" + "hello\n" * 11)
    with pytest.raises(TooLarge, match="more than 10 rows"):
        received(tmp_path / "a.csv", limits=Limits(rows=10))
    with pytest.raises(TooLarge, match="3 columns are in use"):
        received(save_book(tmp_path / "a.xlsx", [["prompt", "b", "c"], ["a"]]), limits=Limits(columns=2), into="b")
    (tmp_path / "b.csv").write_text('prompt,n\n"' + "x" * 200 + '",1\n')
    with pytest.raises(TooLarge, match="row 2 is longer"):
        received(tmp_path / "b.csv", limits=Limits(cell_chars=100), into="c")


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


def test_a_row_of_too_many_cells_is_refused(tmp_path: Path) -> None:
    for number, line in enumerate(("x" + "," * 20, '"x"' + "," * 20)):
        (tmp_path / "a.csv").write_text(f"prompt,n\n{line}\n")
        with pytest.raises(TooLarge, match=r"row 2 has 1\d cells; 10 are accepted"):
            received(tmp_path / "a.csv", limits=Limits(columns=10), into=str(number))


def test_a_document_type_in_any_part_is_refused(tmp_path: Path) -> None:
    bad = '<!DOCTYPE x [<!ENTITY a "b">]><x/>'
    rows = f'<row r="1">{text_cell("A1", "prompt")}</row><row r="2">{text_cell("A2", "x")}</row>'
    for number, part in enumerate(["xl/workbook.xml", "_rels/.rels", "xl/cellimages.xml"]):
        path = save_sheet(tmp_path / f"{number}.xlsx", rows, **{part: bad})
        with pytest.raises(Unreadable, match="document type"):
            received(path, into=str(number))


def test_what_is_missing_behind_a_csv_quote_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,n\nx,1\n"never closed,2\nmore\n')
    with pytest.raises(Unreadable, match="opened in row 3"):
        received(tmp_path / "a.csv")


def test_another_encoding_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt;n\ngröße;1\n".encode("cp1252"))
    found = received(tmp_path / "a.csv").analysis
    assert (found.delimiter, found.columns[0].samples) == (";", ("größe",))
    assert found.notes == ("the file is read as cp1252; with the answers it will be UTF-8",)


# ---- lines


def test_keys_are_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "prompt": "a"}\n\n{"image": "a.png", "id": null, "prompt": "b"}\n')
    found = received(tmp_path / "a.jsonl").analysis
    assert [(column.name, column.letter, column.filled) for column in found.columns] == [
        ("id", "id", 1),
        ("prompt", "prompt", 2),
        ("image", "image", 1),
    ]
    assert (found.rows, found.header_row, found.prompt_column, found.image_columns) == (2, 0, "prompt", ("image",))
    assert found.notes == ("1 row is empty and left out",)


REQUEST = (
    '{"custom_id": "%s", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user"}]}}'
)


def test_requests_are_known(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{REQUEST % 'a'}\n{REQUEST % 'b'}\n")
    found = received(tmp_path / "a.jsonl").analysis
    assert (found.requests, found.rows, found.prompt_column) == (True, 2, "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (REQUEST % "a", "lines 1 and 3 have the same custom_id 'a'"),
        ('{"prompt": "x"}', "line 3 has no body, custom_id, method, url"),
        ((REQUEST % "b").replace("POST", "GET"), "line 3: the method"),
        ((REQUEST % "b").replace("chat/completions", "embeddings"), "line 3: the url must be /v1/chat/completions"),
        ((REQUEST % "b").replace('"b"', "7"), "line 3: custom_id"),
        ((REQUEST % ""), "line 3: custom_id"),
        ((REQUEST % "b").replace('[{"role": "user"}]', "[]"), "line 3: the body"),
        ((REQUEST % "b").replace('{"messages"', '{"stream": true, "messages"'), "line 3: .*streamed"),
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3 is not a JSON object"),
        ('{"a": NaN}', "line 3 is not JSON"),
    ],
)
def test_requests_that_cannot_be_sent_are_refused_with_their_line(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{REQUEST % 'a'}\n\n{line}\n")
    with pytest.raises(Unreadable, match=words):
        received(tmp_path / "a.jsonl")


def test_a_table_may_have_a_request_or_two_later(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n' + REQUEST % "a")
    assert not received(tmp_path / "a.jsonl").analysis.requests
