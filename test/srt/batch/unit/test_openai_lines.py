"""The lines of OpenAI's batch files: what is wrong with those that come in, and what is in those that go out."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from embedding_relay.batch.openai.lines import MOST_ERRORS, input_errors, is_output, line_of
from embedding_relay.batch.tasks import Outcome, Result

CHAT = "/v1/chat/completions"


def request(**changes: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    fields = {"custom_id": "a", "method": "POST", "url": CHAT, "body": body} | changes
    return {name: value for name, value in fields.items() if value is not ...}


def errors_of(*lines: dict[str, Any] | bytes, most: int = 1000) -> list[tuple[str, int | None, str | None]]:
    content = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return [(error.code, error.line, error.param) for error in input_errors(io.BytesIO(content), CHAT, most)]


def test_a_good_file_has_no_errors() -> None:
    assert errors_of(b"\xef\xbb\xbf" + json.dumps(request()).encode(), b"", request(custom_id="b"), b"") == []


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b'{"custom_id": "a"', "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (b'["a"]', "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (request(custom_id=...), "missing_required_parameter", "custom_id"),
        (request(custom_id=""), "invalid_value", "custom_id"),
        (request(custom_id=7), "invalid_value", "custom_id"),
        (request(method=...), "missing_required_parameter", "method"),
        (request(method="GET"), "invalid_method", "method"),
        (request(url=...), "missing_required_parameter", "url"),
        (request(url="/v1/embeddings"), "url_mismatch", "url"),
        (request(url=None), "url_mismatch", "url"),
        (request(body=...), "missing_required_parameter", "body"),
        (request(body="hello"), "invalid_value", "body"),
        (request(body={"messages": ["hello"], "stream": True}), "invalid_value", "body"),
        (request(body={"messages": []}), "missing_required_parameter", "body"),
        (request(body={"messages": "hello"}), "missing_required_parameter", "body"),
        (request(body={"prompt": "hello"}), "missing_required_parameter", "body"),
    ],
)
def test_a_bad_line_is_named(line: Any, code: str, param: str | None) -> None:
    assert errors_of(request(custom_id="first"), line) == [(code, 2, param)]


def test_every_error_of_a_line_is_told() -> None:
    found = errors_of(request(method="PUT", url="/elsewhere"))
    assert [(param, line) for _, line, param in found] == [("method", 1), ("url", 1)]


def test_the_second_use_of_a_custom_id_is_the_error() -> None:
    lines = [request(), request(custom_id="b"), request(), request()]
    assert errors_of(*lines) == [("duplicate_custom_id", 3, "custom_id"), ("duplicate_custom_id", 4, "custom_id")]
    (first, _) = input_errors(io.BytesIO(b"\n".join(json.dumps(line).encode() for line in lines)), CHAT, 10)
    assert "line 1" in first.message


def test_files_without_requests_and_with_too_many() -> None:
    assert errors_of() == errors_of(b"\n  \n") == [("empty_file", None, None)]
    lines = [request(custom_id=str(number)) for number in range(4)]
    assert errors_of(*lines, most=4) == []
    assert errors_of(*lines, most=3) == [("too_many_tasks", None, None)]


def test_a_file_that_is_wrong_throughout_has_a_bounded_list() -> None:
    assert len(errors_of(*[b"no"] * (MOST_ERRORS + 50))) == MOST_ERRORS


def test_an_answer_goes_to_the_output() -> None:
    body = {"id": "chat-1", "choices": []}
    result = Result(7, Outcome.DONE, answer="x", http_status=200, custom_id="seven", response=body)
    line = line_of(result, "0" * 16)
    assert is_output(result)
    assert line["custom_id"] == "seven"
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    assert line["response"]["body"] == body
    assert line["id"].startswith("batch_req_")


def test_a_refused_request_keeps_what_the_endpoint_said() -> None:
    said = {"error": {"message": "too long", "code": "context_length_exceeded"}}
    result = Result(1, Outcome.FAILED, error="too long", http_status=400, custom_id="a", response=said)
    line = line_of(result, "0" * 16)
    assert not is_output(result)
    assert (line["response"]["status_code"], line["response"]["body"], line["error"]) == (400, said, None)
    plain = line_of(Result(1, Outcome.FAILED, error="no such path", http_status=404), "0" * 16)
    assert plain["response"]["body"] == {"error": {"message": "no such path"}}


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (Result(1, Outcome.CANCELLED, error="not asked"), "batch_cancelled"),
        (Result(1, Outcome.FAILED, error="timeout, 5 times"), "request_failed"),
        (Result(1, Outcome.FAILED, error="broken, 5 times", http_status=500), "request_failed"),
        (Result(1, Outcome.FAILED, error="an error in an answer", http_status=200), "request_failed"),
    ],
)
def test_without_an_answer_there_is_an_error_instead(result: Result, code: str) -> None:
    line = line_of(result, "0" * 16)
    assert not is_output(result)
    assert line["response"] is None
    assert line["error"] == {"code": code, "message": result.error}


def test_ids_of_lines_are_unique_and_stay_the_same() -> None:
    lines = [
        line_of(Result(row, Outcome.DONE), session)["id"] for row in range(300) for session in ("0" * 16, "1" * 16)
    ]
    assert len(set(lines)) == 600
    assert lines[0] == line_of(Result(0, Outcome.DONE), "0" * 16)["id"]
