""".jsonl files: keys as columns, whole requests, and lines that keep their own text."""

import json
from pathlib import Path

import pytest

from embedding_relay.batch.errors import Unreadable
from embedding_relay.batch.tasks import Task
from support.workbooks import (
    PICTURE_URL,
    done,
    received,
)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "x"}',
        ' {"prompt":"x" , "a":{"b":[]} } ',
        '{"prompt":"}","answer":1,"STATUS":2}',
        '{"prompt": "\\u00e4"}',
    ],
)
def test_a_line_gets_five_keys_and_keeps_its_own_text(tmp_path: Path, line: str) -> None:
    upload = tmp_path / "a.jsonl"
    upload.write_bytes(f"\ufeff\r\n{line}\r\n{{}}\n{line}".encode())
    book = received(upload)
    out = book.answered([done(2, "ä\x00\n"), done(4)]).read_bytes().decode()
    lines = out.split("\n")
    assert out.startswith("\ufeff\r\n" + line.rstrip().removesuffix("}").rstrip())
    assert lines[1].endswith("\r")
    assert lines[2] == "{}"
    assert not out.endswith("\n")
    before, after = json.loads(line), json.loads(lines[1])
    assert {key: after[key] for key in before} == before
    assert list(after.values())[-5:] == ["ä\x00\n", "done", "", 3, 5]


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


REQUEST = (
    '{"custom_id": "%s", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user"}]}}'
)


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
