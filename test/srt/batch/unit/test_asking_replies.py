"""What an endpoint said, sorted by what it means: for the run, and for the row."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.batch.asking.replies import (
    LONGEST_WAIT,
    SENTENCE_LENGTH,
    Answered,
    Broken,
    Busy,
    Refused,
    Reply,
    read_reply,
    result_of,
    retry_after,
)
from embedding_relay.batch.tasks import Outcome, Result, Task
from support.effort import effort, unhurried

WALL = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


def read(status: int, content: object = b"", **headers: str) -> Reply:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_reply(status, raw, lambda name: headers.get(name.replace("-", "_")), WALL)


# ---- what it means for the row


def answered(body: dict[str, Any], /, **task: Any) -> Result:
    return result_of(Task(4, "prompt", **task), Answered(200, body))


def chat(message: object, finish_reason: str = "stop", **rest: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": finish_reason}], **rest}


# ---- the kinds


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 415, 422, 451])
def test_a_refused_request_stays_refused(status: int) -> None:
    assert isinstance(read(status, {"error": "no"}), Refused)


@pytest.mark.parametrize("status", [425, 429, 503])
def test_not_now(status: int) -> None:
    assert read(status, {"error": "full"}, Retry_After="7") == Busy(status, f"{status}: full", 7.0, {"error": "full"})


@pytest.mark.parametrize("status", [408, 500, 501, 502, 504, 520, 599])
def test_an_error_of_the_endpoint(status: int) -> None:
    assert isinstance(read(status, {"error": "oops"}), Broken)


@pytest.mark.parametrize("content", [b"", b"<html>", b"[1]", b'"text"', b"null", b"{", b"\xff\xfe", b"[" * 5000])
def test_a_success_that_is_no_json_object_is_an_error(content: bytes) -> None:
    reply = read(200, content)
    assert isinstance(reply, Broken)
    assert reply.reason.startswith("the answer is not a JSON object: ")


def test_a_redirect_is_not_followed() -> None:
    assert read(307, Location="http://elsewhere/") == Refused(307, "307: it points to http://elsewhere/, not followed")


# ---- the sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"error": {"message": "too long", "code": 400}}, "too long"),
        ({"object": "error", "message": "too long"}, "too long"),
        ({"error": "too long"}, "too long"),
        ({"error": None, "detail": "too long"}, "too long"),
        ({"detail": [{"loc": ["body", "n"], "msg": "must be positive"}]}, "body.n: must be positive"),
        ({"detail": [{"loc": [], "msg": "a"}, {"msg": "b", "loc": ["c"]}]}, ": a; c: b"),
        (b"too\n  long\x00", "too long"),
        ({"something": "else"}, '{"something": "else"}'),
        (b"", "it gives no reason"),
        (b"\xff", "\ufffd"),
    ],
)
def test_the_endpoints_own_words_are_found(content: object, words: str) -> None:
    reply = read(400, content)
    assert isinstance(reply, Refused)
    assert reply.reason == f"400: {words}"


@unhurried
@effort(300)
@given(status=st.integers(200, 599), content=st.binary(max_size=300), after=st.text(max_size=30))
def test_no_content_whatever_raises(status: int, content: bytes, after: str) -> None:
    reply = read(status, content, Retry_After=after)
    if not isinstance(reply, Answered):
        assert len(reply.reason) <= SENTENCE_LENGTH + 50
        assert reply.reason.isprintable()


def test_a_long_sentence_is_cut() -> None:
    reply = read(400, {"error": "x" * 100_000})
    assert isinstance(reply, Refused)
    assert len(reply.reason) < SENTENCE_LENGTH + 10


# ---- when to come back


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        ("0", 0.0),
        (" 2.5 ", 2.5),
        ("-3", 0.0),
        ("99999", LONGEST_WAIT),
        ("inf", LONGEST_WAIT),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ("Tue, 14 Nov 2023 22:13:50 -0000", 30.0),
        ("Tue, 14 Nov 2023 22:00:00 GMT", 0.0),
        ("Tue, 14 Nov 2099 22:00:00 GMT", LONGEST_WAIT),
        ("Tue, 99 Nov 2023 22:13:50 GMT", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, WALL) == seconds


def test_text_and_tokens() -> None:
    result = answered(chat({"content": "yes"}, usage={"prompt_tokens": 3, "completion_tokens": 1}))
    assert result == Result(4, Outcome.DONE, "yes", prompt_tokens=3, completion_tokens=1, http_status=200)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            chat(
                {
                    "content": "half of",
                },
                "length",
            ),
            "half of",
        ),
        (chat({"content": ""}), ""),
        (chat({"content": [{"type": "text", "text": "a"}, {"type": "x"}, {"type": "text", "text": "b"}]}), "ab"),
        ({"choices": [{"text": "completed"}]}, "completed"),
        (chat({"content": "yes"}, usage=None), "yes"),
        (chat({"content": "yes"}, usage={"prompt_tokens": None, "completion_tokens": "x"}), "yes"),
    ],
)
def test_done_with_what_there_is(body: dict[str, Any], text: str) -> None:
    result = answered(body)
    assert (result.outcome, result.answer, result.prompt_tokens) == (Outcome.DONE, text, 0)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "the answer of the endpoint has no choices"),
        ({"choices": []}, "the answer of the endpoint has no choices"),
        ({"choices": ["x"]}, "the answer of the endpoint has no choices"),
        ({"choices": [{}]}, "the answer of the endpoint has no message"),
        ({"error": {"message": "out of luck"}}, "the endpoint answered with an error: out of luck"),
        (chat({"content": ""}, "length"), "the limit of tokens was reached; allow more with max_tokens"),
        (chat({"content": None, "reasoning_content": "hm"}, "length"), "reached while it was still thinking; allow"),
        (chat({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"), "a call of a tool, not with text"),
        (chat({"content": None, "refusal": "I will not"}), "the model refused: I will not"),
        (chat({"content": None}), "the answer of the endpoint has no text"),
    ],
)
def test_failed_when_there_is_nothing_for_a_person(body: dict[str, Any], error: str) -> None:
    result = answered(body)
    assert result.outcome is Outcome.FAILED
    assert error in result.error
    assert result.response is None


def test_who_sent_a_request_gets_the_whole_answer() -> None:
    for body in ({"data": [{"embedding": [1.0]}]}, chat({"content": None, "tool_calls": [{"id": "1"}]}), {}):
        result = answered(body, body={"input": "a"}, custom_id="mine")
        assert (result.outcome, result.error, result.response, result.custom_id) == (Outcome.DONE, "", body, "mine")


def test_an_error_with_a_status_of_success_is_one_for_everybody() -> None:
    result = answered({"error": "no"}, body={"input": "a"})
    assert (result.outcome, result.response) == (Outcome.FAILED, {"error": "no"})
