"""What each row asks: values as a person sees them, rows left out, rows that cannot be asked."""

import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from embedding_relay.batch.errors import Unreadable
from embedding_relay.batch.tasks import Task
from embedding_relay.batch.workbook.analysis import Choices
from embedding_relay.batch.workbook.rows import PROGRESS_EVERY
from embedding_relay.batch.workbook.url_rules import UrlRules
from support.workbooks import (
    NAMESPACE,
    PICTURE_URL,
    picture,
    received,
    relations,
    save_book,
    save_sheet,
    text_cell,
)

HEADER = f'<row r="1">{text_cell("A1", "prompt")}</row>'


def prompts(path: Path, choices: Choices | None = None) -> dict[int, str]:
    return {task.row: task.prompt or task.error for task in received(path, choices).tasks()}


def test_a_row_is_asked_with_its_number_in_the_sheet(tmp_path: Path) -> None:
    rows = [["title"], [], ["prompt", "photo"], ["one", PICTURE_URL], [], ["two", f"{PICTURE_URL} {PICTURE_URL}?2"]]
    assert received(save_book(tmp_path / "a.xlsx", rows)).tasks() == [
        Task(4, "one", (PICTURE_URL,)),
        Task(6, "two", (PICTURE_URL, f"{PICTURE_URL}?2")),
    ]


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


def test_an_error_in_a_column_that_nobody_asks_about_does_not_matter(tmp_path: Path) -> None:
    rows = f'<row r="1">{text_cell("A1", "prompt")}{text_cell("B1", "n")}</row>'
    rows += f'<row r="2">{text_cell("A2", "fine")}<c r="B2" t="e"><v>#N/A</v></c></row>'
    path = save_sheet(tmp_path / "a.xlsx", rows)
    content = path.read_bytes()
    assert prompts(path) == {2: "fine"}
    path.write_bytes(content)
    task = received(path, Choices(template="{prompt} {n}"), into="other").tasks()[0]
    assert task.error == "column 'n' holds the error value #N/A"


def test_rows_without_prompt_and_picture_are_left_out(tmp_path: Path) -> None:
    rows = [["prompt", "photo", "note"], ["one"], [None, None, "a chapter"], ["  "], [None, PICTURE_URL], ["two"]]
    tasks = received(save_book(tmp_path / "a.xlsx", rows)).tasks()
    assert [(task.row, task.prompt) for task in tasks] == [(2, "one"), (5, ""), (6, "two")]
    assert tasks[1].error == "the prompt is empty: there is nothing in column 'prompt'"


def test_only_such_rows_are_nothing_to_ask(tmp_path: Path) -> None:
    taken = received(save_book(tmp_path / "a.xlsx", [["prompt", "photo", "note"], [None, None, "a chapter"]]))
    with pytest.raises(Unreadable, match="no row holds a prompt or a picture"):
        taken.tasks()


def test_a_template_needs_no_prompt_in_the_row(tmp_path: Path) -> None:
    rows = [["photo", "language"], [PICTURE_URL, "German"], [PICTURE_URL, None], [None, None]]
    choices = Choices(template="Describe it in {language}.")
    assert received(save_book(tmp_path / "a.xlsx", rows), choices).tasks() == [
        Task(2, "Describe it in German.", (PICTURE_URL,)),
        Task(3, "Describe it in .", (PICTURE_URL,)),
    ]


def test_a_template_without_columns_asks_for_every_picture(tmp_path: Path) -> None:
    rows = [["name", "photo"], ["a", None], ["b", None]]
    book = save_book(tmp_path / "a.xlsx", rows, {"B2": picture()})
    assert [task.row for task in received(book, Choices(template="What is it?")).tasks()] == [2]


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


def test_a_row_with_nothing_but_a_note_of_its_own_does_not_ask(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [["prompt", "photo", "note"], ["one", PICTURE_URL], [None, None, "a note"], [None, f"{PICTURE_URL}?2"]]:
        book.active.append(row)
    book.active.merge_cells("A2:A4")
    book.active.merge_cells("B2:B3")
    book.save(tmp_path / "a.xlsx")
    assert received(tmp_path / "a.xlsx").tasks() == [
        Task(2, "one", (PICTURE_URL,)),
        Task(4, "one", (f"{PICTURE_URL}?2",)),
    ]


def test_progress_comes_while_it_reads(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\n" + "x\n" * (2 * PROGRESS_EVERY))
    seen = list[float]()
    received(tmp_path / "a.csv").tasks(progress=seen)
    assert seen == [0.5, 1.0, 1.0]


def test_another_sheet_needs_another_analysis(tmp_path: Path) -> None:
    book = received(save_book(tmp_path / "a.xlsx", [["prompt"], ["x"]]))
    with pytest.raises(Unreadable, match="of the sheet 'Sheet', not of 'Other'"):
        book._replace(choices=Choices(sheet="Other")).tasks()


# ---- .csv


def test_csv_rows_are_numbered_as_a_spreadsheet_numbers_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt,n\r\n"two\r\nlines",1\r\n\r\n"he said ""hi""",2\r\n,3\r\nlast,')
    assert prompts(tmp_path / "a.csv") == {2: "two\r\nlines", 4: 'he said "hi"', 6: "last"}


def test_a_row_with_more_cells_than_the_header_is_not_asked_cut(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,prompt\n1,Describe a cat\n2,Describe a cat, a dog\n")
    good, bad = received(tmp_path / "a.csv").tasks()
    assert good.prompt == "Describe a cat"
    assert "needs quotation marks" in bad.error


def test_so_it_is_with_a_single_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt\nDescribe a cat\nDescribe a cat, a dog\n"Describe a cat, a dog"\n')
    tasks = received(tmp_path / "a.csv").tasks()
    assert ["needs quotation marks" in task.error for task in tasks] == [False, True, False]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found(tmp_path: Path, delimiter: str) -> None:
    lines = [["n", "prompt", "m"], ["1", "a, b; c | d", "2"], ["2", "x", "3,5"]]
    text = "\n".join(delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in line) for line in lines)
    (tmp_path / "a.csv").write_text(text)
    assert prompts(tmp_path / "a.csv") == {2: "a, b; c | d", 3: "x"}


# ---- .jsonl


def test_lines_are_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "one", "images": ["%s", "%s"]}\n\n{"prompt": "two", "images": {"url": "%s"}}\n'
        '{"prompt": {"deep": [1, null]}}\n{"prompt": null}\n' % ((PICTURE_URL,) * 3)
    )
    assert received(tmp_path / "a.jsonl").tasks() == [
        Task(1, "one", (PICTURE_URL, PICTURE_URL)),
        Task(3, "two", (PICTURE_URL,)),
        Task(4, '{"deep":[1,null]}'),
    ]


def request(part: str) -> str:
    messages = f'[{{"content": "hi"}}, {{"content": [{{"type": "text", "text": "file:///x"}}, {part}]}}]'
    address = '"custom_id": "x", "method": "POST", "url": "/v1/chat/completions"'
    return f'{{{address}, "body": {{"messages": {messages}}}}}'


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ('{"type": "image_url", "image_url": {"url": "https://8.8.8.8/a.png"}}', ""),
        ('{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}', ""),
        ('{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}', "file:///etc/passwd: only http"),
        ('{"type": "image_url", "image_url": {"url": "/etc/passwd.png"}}', "only http"),
        ('{"type": "image_url", "image_url": {"url": "DATA:/../etc/passwd.png"}}', "only http"),
        ('{"type": "audio_url", "audio_url": {"url": "a.wav"}}', "only http"),
        ('{"type": "image_url", "image_url": "http://127.0.0.1/a.png"}', "not a public address"),
        ('{"type": "video_url", "video_url": {"url": "http://127.1/a.mp4"}}', "not a public address"),
    ],
)
def test_a_request_is_passed_on_as_it_is_unless_the_endpoint_would_fetch_what_it_must_not(
    tmp_path: Path, part: str, words: str
) -> None:
    (tmp_path / "a.jsonl").write_text(request(part))
    (task,) = received(tmp_path / "a.jsonl").tasks(UrlRules())
    assert (task.row, task.custom_id, task.prompt, task.images) == (1, "x", "", ())
    assert task.body is not None
    assert task.body["messages"][0] == {"content": "hi"}
    assert (words in task.error) if words else not task.error
