"""Random workbooks: nothing but the answers is added, and no damage raises anything but a refusal."""

import contextlib
import csv
import datetime
import functools
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
from openpyxl.styles import Font, PatternFill
from openpyxl.utils import get_column_letter

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.tasks import Outcome, Result
from embedding_relay.batch.workbook.answers import NAMES
from embedding_relay.batch.workbook.csv_file import harmless
from embedding_relay.batch.workbook.jsonl_file import LinesTable
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.upload import receive
from embedding_relay.batch.workbook.xlsx.answers import cell_text
from embedding_relay.batch.workbook.xlsx.book import ESCAPED
from support.effort import effort, unhurried
from support.workbooks import Received, members, picture, received, save_book, save_zip

pytestmark = unhurried

SHEET = "xl/worksheets/sheet1.xml"
nasty = st.sampled_from(
    [
        "=1+1",
        "<a>&amp;",
        "]]>",
        "_x000D_",
        "'",
        '"',
        '""',
        ",",
        ";",
        "a\nb",
        "\t",
        " x ",
        "中文",
        "😀",
        "\u2028",
        "0",
        "-",
        "}",
    ]
)
texts = st.lists(nasty | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=4).map("".join)
answers = texts.filter(lambda text: not text or bool(text.strip()))
dates = st.datetimes(datetime.datetime(1950, 1, 1), datetime.datetime(2100, 1, 1)).map(
    lambda d: d.replace(microsecond=0)
)
numbers = st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9, allow_nan=False).map(lambda value: round(value, 3))
plain = texts.filter(lambda text: not ILLEGAL_CHARACTERS_RE.search(text))
cells = st.none() | plain | numbers | dates | st.booleans()


@st.composite
def results(draw: st.DrawFn, rows: int, first: int = 2) -> list[Result]:
    asked = draw(st.lists(st.integers(first, first + rows - 1), unique=True).map(sorted)) if rows else []
    return [
        Result(
            row,
            draw(st.sampled_from(Outcome)),
            draw(answers),
            draw(answers),
            draw(st.integers(0, 10**6)),
            draw(st.integers(0, 10**6)),
        )
        for row in asked
    ]


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def tables(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[list[Any]]]:
    return st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(values, min_size=width, max_size=width), min_size=1, max_size=6)
    )


@st.composite
def books(draw: st.DrawFn) -> openpyxl.Workbook:
    book = openpyxl.Workbook()
    sheet = book.active
    rows = draw(tables(cells))
    sheet.append(["prompt", "b", "c", "d"][: len(rows[0])])
    for number, row in enumerate(rows, 2):
        for column, value in enumerate(row, 1):
            cell = sheet.cell(number, column)
            if value is not None:
                cell.value = value
            if isinstance(value, str):
                cell.data_type = "s"  # and no formula, whatever it begins with
    sheet["A2"] = "asked"
    for column, row in draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=4)):
        sheet.cell(row, column).font = Font(name="Some", size=draw(st.integers(5, 30)))
        sheet.cell(row, column).fill = PatternFill("solid", fgColor="FF00FF")
    if draw(st.booleans()):
        top, left = draw(st.integers(3, 8)), draw(st.integers(1, 6))
        sheet.merge_cells(None, top, left, top + draw(st.integers(0, 3)), left + draw(st.integers(0, 3)))
    sheet.column_dimensions["B"].width = draw(st.integers(3, 50))
    sheet.row_dimensions[draw(st.integers(1, 9))].hidden = draw(st.booleans())
    if draw(st.booleans()):
        sheet.freeze_panes = "B2"
    return book


def looks(cell: Any) -> tuple[Any, ...]:
    """Its style by number: the part that says what the numbers mean is unchanged to the byte."""
    return cell.value, cell.data_type, cell.style_id, cell.number_format


@effort(daily=80)
@given(st.data())
def test_a_workbook_stays_what_it_is(data: st.DataObject) -> None:
    book = data.draw(books())
    rows = book.active.max_row
    with folder() as at:
        book.save(at / "a.xlsx")
        taken = received(at / "a.xlsx")
        given_results = data.draw(results(rows))
        out = taken.answered(given_results)
        before, after = members(taken.source), members(out)
        assert {name for name in before if before[name] != after[name]} == {SHEET}
        assert list(before) == list(after)
        old, new = (openpyxl.load_workbook(path).active for path in (taken.source, out))
    width = taken.analysis.width
    for row in old.iter_rows(max_col=width):
        for cell in row:
            assert looks(new.cell(cell.row, cell.column)) == looks(cell)
    assert new.merged_cells.ranges == old.merged_cells.ranges
    assert new.freeze_panes == old.freeze_panes
    for dimensions in ("column_dimensions", "row_dimensions"):
        for key, dimension in getattr(old, dimensions).items():
            now = getattr(new, dimensions)[key]
            if key in map(get_column_letter, range(width + 1, width + 6)):
                assert now.width >= dimension.width  # it fits the answers
                continue
            assert dict(now) | {"spans": ""} == dict(dimension) | {"spans": ""}
    assert [new.cell(1, width + 1 + index).value for index in range(5)] == list(NAMES)
    by_row = {result.row: result for result in given_results}
    for number in range(2, rows + 1):
        found = [new.cell(number, width + 1 + index).value for index in range(5)]
        result = by_row.get(number)
        expected: list[Any] = [None] * 5
        if result is not None:
            shown = [
                ESCAPED.sub(lambda m: "_x005F_" + m.group()[1:], cell_text(t)) or None
                for t in (result.answer, result.error)
            ]
            expected = [shown[0], result.outcome.value, shown[1], result.prompt_tokens, result.completion_tokens]
        assert found == expected, number


@effort(daily=120)
@given(
    st.data(),
    tables(texts.map(lambda text: text.replace("\r", "").replace("\0", ""))),
    st.sampled_from(",;\t|"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_a_csv_file_stays_what_it_is(
    data: st.DataObject, table: list[list[str]], delimiter: str, quoting: Any, end: str, encoding: str
) -> None:
    width = len(table[0])
    delimiter = delimiter if width > 1 else ","
    table[0][0] = "asked"
    for row in table[1:]:
        del row[data.draw(st.integers(0, width)) :]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerows([["prompt", "b", "c", "d"][:width], *table])
    with folder() as at:
        (at / "a.csv").write_bytes(text.getvalue().encode(encoding))
        taken = received(at / "a.csv")
        given_results = data.draw(results(len(table)))
        content = taken.answered(given_results).read_bytes()
    assert content[:6] == text.getvalue().encode(encoding)[:6]
    found = list(csv.reader(io.StringIO(content.decode(encoding), newline=""), delimiter=delimiter))
    assert found[0] == [*["prompt", "b", "c", "d"][:width], *NAMES]
    by_row = {result.row: result for result in given_results}
    for number, (row, original) in enumerate(zip(found[1:], table, strict=True), 2):
        result = by_row.get(number)
        if result is None:
            assert row == original
            continue
        texts_shown = [harmless(cell_text(value)) for value in (result.answer, result.error)]
        tokens = [str(result.prompt_tokens), str(result.completion_tokens)]
        padded = [*original, *[""] * (width - len(original))]
        assert row == [*padded, texts_shown[0], result.outcome.value, texts_shown[1], *tokens]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@effort(daily=120)
@given(st.data(), st.lists(st.dictionaries(texts, json_values, max_size=4), min_size=1, max_size=5), st.booleans())
def test_lines_of_json_stay_what_they_are(data: st.DataObject, lines: list[dict[str, Any]], plain: bool) -> None:
    lines[0]["prompt"] = "asked"
    content = "\n".join(json.dumps(line, ensure_ascii=plain) for line in lines).encode()
    with folder() as at:
        (at / "a.jsonl").write_bytes(content)
        taken = received(at / "a.jsonl")
        given_results = data.draw(results(len(lines), first=1))
        out = [json.loads(line) for line in taken.answered(given_results).read_bytes().split(b"\n")]
        table = LinesTable(taken.source, Limits())
        assert len(list(table.rows())) == len(lines)
    by_row = {result.row: result for result in given_results}
    for number, (line, original) in enumerate(zip(out, lines, strict=True), 1):
        assert {key: line[key] for key in original} == original
        result = by_row.get(number)
        expected = [] if result is None else [
            result.answer, result.outcome.value, result.error, result.prompt_tokens, result.completion_tokens
        ]  # fmt: skip
        assert list(line.values())[len(original) :] == expected


@functools.cache
def samples() -> dict[str, bytes]:
    """One small upload of each kind. Made once, for what openpyxl makes holds the time of day."""
    rows = [["prompt", "photo", "n"], ["one", None, 1], ["two", "x.png", 2]]
    with folder() as at:
        book = save_book(at / "a.xlsx", rows, {"B2": picture()}).read_bytes()
        zipped = save_zip(at / "a.zip", {"rows.csv": "prompt,photo\none,a.png\n", "a.png": picture()}).read_bytes()
    return {
        "a.xlsx": book,
        "a.zip": zipped,
        "a.csv": 'prompt;photo\r\n"one\r\n";\r\ntwo;x.png\r\n'.encode("utf-16"),
        "a.jsonl": b'{"prompt": "one", "image": ["data:image/png;base64,AAAA"]}\n{"prompt": "two", "n": 1.5}\n',
        "b.jsonl": b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{}]}}\n',
    }


def go_all_the_way(at: Path, content: bytes, name: str) -> None:
    upload = at / "upload"
    upload.write_bytes(content)
    with contextlib.suppress(Unreadable, TooLarge):
        taken: Received = received(upload, name=name)
        tasks = taken.tasks()
        taken.answered([Result(task.row, Outcome.DONE, "x") for task in tasks])


@effort(daily=120)
@given(st.data())
def test_damage_is_refused_or_does_no_harm(data: st.DataObject) -> None:
    with folder() as at:
        name, content = data.draw(st.sampled_from(sorted(samples().items())), label="sample")
        changed = bytearray(content)
        if data.draw(st.booleans(), label="cut"):
            del changed[data.draw(st.integers(0, len(changed))) :]
        for place in data.draw(st.lists(st.integers(0, max(0, len(changed) - 1)), max_size=3)) if changed else ():
            changed[place] ^= 1 << data.draw(st.integers(0, 7))
        go_all_the_way(at, bytes(changed), name)


@effort(daily=120)
@given(st.data())
def test_damaged_parts_in_a_sound_container_are_refused_or_do_no_harm(data: st.DataObject) -> None:
    """A container is sound again once it is zipped again, so the damage reaches whoever reads the part."""
    with folder() as at:
        (at / "a.xlsx").write_bytes(samples()["a.xlsx"])
        parts: dict[str, bytes | str] = dict(members(at / "a.xlsx"))
        name = data.draw(st.sampled_from(sorted(parts)))
        changed = bytearray(parts[name])
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(changed) - 1))
            length = data.draw(st.integers(0, 8))
            changed[place : place + length] = data.draw(
                st.binary(max_size=4)
                | st.sampled_from([b"<", b">", b"/", b'"', b"999999999999999", b"<row/>", b"<c/>", b"-1"])
            )
        parts[name] = bytes(changed)
        if data.draw(st.booleans()):
            del parts[data.draw(st.sampled_from(sorted(parts)))]
        go_all_the_way(at, save_zip(at / "b.xlsx", parts).read_bytes(), "b.xlsx")


@pytest.mark.parametrize("name", ["a.xlsx", "a.zip", "a.csv", "a.jsonl", "b.jsonl"])
def test_the_samples_are_sound(tmp_path: Path, name: str) -> None:
    (tmp_path / "upload").write_bytes(samples()[name])
    (tmp_path / "session").mkdir()
    receive(tmp_path / "upload", name, tmp_path / "session", Limits())
