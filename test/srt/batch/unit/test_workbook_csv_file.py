""".csv files: what is found in them, and that everything but the answers stays as it was."""

import codecs
from pathlib import Path

import pytest

from embedding_relay.batch.errors import Unreadable
from embedding_relay.batch.tasks import Result
from embedding_relay.batch.workbook.analysis import Choices
from embedding_relay.batch.workbook.answers import NAMES
from support.workbooks import (
    done,
    received,
)


def answered_csv(tmp_path: Path, content: bytes, *results: Result) -> bytes:
    upload = tmp_path / "a.csv"
    upload.write_bytes(content)
    return received(upload).answered(results).read_bytes()


@pytest.mark.parametrize(
    ("content", "answered"),
    [
        (b"prompt,n\nhello,1\n", b"prompt,n,A\nhello,1,an answer,done,,3,5\n"),
        (b"prompt,n\r\nhello,1", b"prompt,n,A\r\nhello,1,an answer,done,,3,5"),
        (b"prompt;n\rhello;1\r", b"prompt;n;A\rhello;1;an answer;done;;3;5\r"),
        (b"prompt\tn\nhello\t1\n", b"prompt\tn\tA\nhello\t1\tan answer\tdone\t\t3\t5\n"),
        (b'"prompt","n"\n"hello","1"\n', b'"prompt","n",Q\n"hello","1","an answer","done","","3","5"\n'),
        (b'prompt,n\n"he""l\r\n,lo",1\n', b'prompt,n,A\n"he""l\r\n,lo",1,an answer,done,,3,5\n'),
        (b"prompt,n,m\nhello\n", b"prompt,n,m,A\nhello,,,an answer,done,,3,5\n"),
        (b"sep=;\r\nprompt;n\r\nhello;1\r\n", b"sep=;\r\nprompt;n;A\r\nhello;1;an answer;done;;3;5\r\n"),
        (codecs.BOM_UTF8 + b"prompt\nhello\n", codecs.BOM_UTF8 + b"prompt,A\nhello,an answer,done,,3,5\n"),
        (b"prompt,n\nhello,1,,\nx\n", b"prompt,n,,,A\nhello,1,,,an answer,done,,3,5\nx\n"),
        (b'prompt,n\n5" screen,1\n', b'prompt,n,A\n5" screen,1,an answer,done,,3,5\n'),
    ],
)
def test_csv_keeps_its_manners(tmp_path: Path, content: bytes, answered: bytes) -> None:
    delimiter = next(mark for mark in (b";", b"\t", b",") if mark in answered.replace(b"sep=;", b""))
    names = [name.encode() for name in NAMES]
    expected = answered.replace(b"Q", b",".join(b'"%s"' % name for name in names)).replace(b"A", delimiter.join(names))
    assert answered_csv(tmp_path, content, done(2)) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_csv_in_utf16_stays_in_utf16(tmp_path: Path, encoding: str) -> None:
    out = answered_csv(tmp_path, "prompt,n\r\nhellö,1\r\n".encode(encoding), done(2, "ß😀"))
    assert out.decode(encoding).splitlines()[1] == "hellö,1,ß😀,done,,3,5"
    assert out[:2] == "p".encode(encoding)[:2]


@pytest.mark.parametrize(
    ("encoding", "text"), [("cp1252", "größe €"), ("gb18030", "描述这张图片"), ("latin-1", "\x81ä")]
)
def test_csv_that_cannot_hold_every_answer_becomes_utf8(tmp_path: Path, encoding: str, text: str) -> None:
    out = answered_csv(tmp_path, f"prompt\n{text}\n".encode(encoding), done(2, "答 ä"))
    assert out.startswith(codecs.BOM_UTF8)
    assert out.decode("utf-8-sig").splitlines()[1] == f"{text},答 ä,done,,3,5"


@pytest.mark.parametrize(
    ("answer", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+49 and more", "'+49 and more"),
        ("-5", "-5"),
        ("+5.25", "+5.25"),
        ("-5+cmd", "'-5+cmd"),
        ("@sum", "'@sum"),
        ("\t=1", "'\t=1"),
        ("a,b", '"a,b"'),
        ('say "x"', '"say ""x"""'),
        ("two\r\nlines", '"two\nlines"'),
        (" blanks ", '" blanks "'),
    ],
)
def test_csv_answers_are_no_formulas(tmp_path: Path, answer: str, cell: str) -> None:
    if answer == "\t=1":
        cell = '"\'\t=1"' if False else "'\t=1"
    out = answered_csv(tmp_path, b"prompt,n\nhello,1\n", done(2, answer))
    assert out.decode() == f"prompt,n,{','.join(NAMES)}\nhello,1,{cell},done,,3,5\n"


def prompts(path: Path, choices: Choices | None = None) -> dict[int, str]:
    return {task.row: task.prompt or task.error for task in received(path, choices).tasks()}


def test_csv_rows_are_numbered_as_a_spreadsheet_numbers_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt,n\r\n"two\r\nlines",1\r\n\r\n"he said ""hi""",2\r\n,3\r\nlast,')
    assert prompts(tmp_path / "a.csv") == {2: "two\r\nlines", 4: 'he said "hi"', 6: "last"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found(tmp_path: Path, delimiter: str) -> None:
    lines = [["n", "prompt", "m"], ["1", "a, b; c | d", "2"], ["2", "x", "3,5"]]
    text = "\n".join(delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in line) for line in lines)
    (tmp_path / "a.csv").write_text(text)
    assert prompts(tmp_path / "a.csv") == {2: "a, b; c | d", 3: "x"}


def test_what_is_missing_behind_a_csv_quote_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,n\nx,1\n"never closed,2\nmore\n')
    with pytest.raises(Unreadable, match="opened in row 3"):
        received(tmp_path / "a.csv")


def test_another_encoding_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt;n\ngröße;1\n".encode("cp1252"))
    found = received(tmp_path / "a.csv").analysis
    assert (found.delimiter, found.columns[0].samples) == (";", ("größe",))
    assert found.notes == ("the file is read as cp1252; with the answers it will be UTF-8",)
