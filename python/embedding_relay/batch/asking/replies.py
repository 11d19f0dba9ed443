"""What came of one attempt at the endpoint: five kinds of reply, and what a reply means for its row."""

from __future__ import annotations

import email.utils
import math
from collections.abc import Callable
from typing import Any, Final

import msgspec

from embedding_relay.batch.tasks import Outcome, Result, Task

SENTENCE_LENGTH: Final = 500
# An endpoint that names a longer time in Retry-After is asked again after this one: it may recover sooner.
LONGEST_WAIT: Final = 120.0
# A larger number is not one of tokens, and the sum over all rows could not be stored.
MOST_TOKENS: Final = 2**40

_decode = msgspec.json.Decoder().decode


class Answered(msgspec.Struct, frozen=True):
    """A JSON object with a status of success."""

    status: int
    body: dict[str, Any]


class Refused(msgspec.Struct, frozen=True):
    """The endpoint refuses this request for what it is, and would refuse it the next time."""

    status: int
    reason: str
    body: dict[str, Any] | None = None


class Busy(msgspec.Struct, frozen=True):
    """The endpoint is overloaded. `retry_after` are the seconds that it named, if it did."""

    status: int
    reason: str
    retry_after: float | None = None
    body: dict[str, Any] | None = None


class Broken(msgspec.Struct, frozen=True):
    """An error of the endpoint, an answer that cannot be used, or none in time (then the status is 0)."""

    status: int
    reason: str
    body: dict[str, Any] | None = None


class Away(msgspec.Struct, frozen=True):
    """No answer because of the connection: it could not be made, or (`connected`) it broke under the request."""

    reason: str
    connected: bool


Reply = Answered | Refused | Busy | Broken | Away


def read_reply(status: int, content: bytes, header: Callable[[str], str | None], wall_time: float) -> Reply:
    """`header` looks a header up by its name; `wall_time` is what a date in Retry-After is compared with."""
    body = _json_object(content)
    if 200 <= status < 300:
        if body is None:
            return Broken(status, f"the answer is not a JSON object: {_shortened(_text(content)) or 'it is empty'}")
        return Answered(status, body)
    reason = f"{status}: {sentence(body, content)}"
    if status in (425, 429, 503):
        return Busy(status, reason, retry_after(header("Retry-After"), wall_time), body)
    if 300 <= status < 400:
        return Refused(status, f"{status}: it points to {_shortened(header('Location') or 'nowhere')}, not followed")
    if status >= 500 or status == 408:
        return Broken(status, reason, body)
    return Refused(status, reason, body)


def sentence(body: dict[str, Any] | None, content: bytes) -> str:
    """The endpoint's own words, wherever it put them."""
    return _shortened(_words(body) if body else "") or _shortened(_text(content)) or "it gives no reason"


def retry_after(value: str | None, wall_time: float) -> float | None:
    """Seconds or an HTTP date; None when there is none, or none that can be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - wall_time
        except (ValueError, OverflowError, OSError):
            return None
    return min(max(seconds, 0.0), LONGEST_WAIT) if not math.isnan(seconds) else None


def _words(value: Any) -> str:
    match value:
        case str():
            return value
        case {"msg": str(message), "loc": [*place]}:  # of FastAPI's list of what it could not validate
            return f"{'.'.join(str(part) for part in place)}: {message}"
        case dict():
            return next((words for name in ("error", "message", "detail") if (words := _words(value.get(name)))), "")
        case [*items]:
            return "; ".join(words for item in items[:3] if (words := _words(item)))
    return ""


def _json_object(content: bytes) -> dict[str, Any] | None:
    try:
        value = _decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _text(content: bytes) -> str:
    return content[: 4 * SENTENCE_LENGTH].decode(errors="replace")


def _shortened(text: str) -> str:
    """One line of printable characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * SENTENCE_LENGTH]).split())
    return line if len(line) <= SENTENCE_LENGTH else line[: SENTENCE_LENGTH - 3] + "..."


# ---- what a reply means for its row


def result_of(task: Task, reply: Answered) -> Result:
    """Done if there is an answer that a person can use, else failed."""
    text, problem = _text_of(reply.body)
    if task.body is not None:
        # Who sent a whole request gets the whole answer: tool calls, for one, have no text.
        problem = _error_in(reply.body)
    prompt_tokens, completion_tokens = _tokens(reply.body)
    return Result(
        task.row,
        Outcome.FAILED if problem else Outcome.DONE,
        answer=text,
        error=problem,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        http_status=reply.status,
        custom_id=task.custom_id,
        response=reply.body if task.body is not None else None,
    )


def failure(task: Task, reason: str, http_status: int = 0, response: dict[str, Any] | None = None) -> Result:
    return Result(
        task.row,
        Outcome.FAILED,
        error=reason,
        http_status=http_status,
        custom_id=task.custom_id,
        response=response if task.body is not None else None,
    )


def _text_of(body: dict[str, Any]) -> tuple[str, str]:
    """The text; and a reason if it cannot count as an answer."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "", _error_in(body) or "the answer of the endpoint has no choices"
    choice = choices[0]
    message = choice.get("message")
    if not isinstance(message, dict):
        text = choice.get("text")  # of /v1/completions
        return (text, "") if isinstance(text, str) else ("", "the answer of the endpoint has no message")
    text = _joined(message.get("content"))
    if text:
        return text, ""
    return "", _why_empty(message, choice.get("finish_reason"))


def _why_empty(message: dict[str, Any], finish_reason: object) -> str:
    if refusal := message.get("refusal"):
        return f"the model refused: {refusal}"
    if finish_reason == "length":
        thinking = " while it was still thinking" if message.get("reasoning_content") else ""
        return f"the answer is empty: the limit of tokens was reached{thinking}; allow more with max_tokens"
    if message.get("tool_calls"):
        return "the model answered with a call of a tool, not with text"
    # An empty text is an answer; a missing one is not.
    return "" if isinstance(message.get("content"), str) else "the answer of the endpoint has no text"


def _joined(content: object) -> str:
    """A string, or a list of parts of which some are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))


def _error_in(body: dict[str, Any]) -> str:
    """Some endpoints send their errors with a status of success."""
    return f"the endpoint answered with an error: {sentence(body, b'')}" if body.get("error") else ""


def _tokens(body: dict[str, Any]) -> tuple[int, int]:
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return 0, 0
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return _count(prompt), _count(completion)


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 < value < MOST_TOKENS else 0
