"""What became of one attempt at the endpoint: five kinds of reply, told apart by status and content."""

from __future__ import annotations

import email.utils
import math
from collections.abc import Callable
from typing import Any, Final

import msgspec

SENTENCE_LENGTH: Final = 500
# An endpoint that names a longer time is asked again after this one: it may be back sooner than it thought.
LONGEST_WAIT: Final = 120.0

_decode = msgspec.json.Decoder().decode


class Answered(msgspec.Struct, frozen=True):
    """A JSON object with a status of success."""

    status: int
    body: dict[str, Any]


class Refused(msgspec.Struct, frozen=True):
    """The endpoint does not want this request, and would not want it the next time."""

    status: int
    reason: str
    body: dict[str, Any] | None = None


class Busy(msgspec.Struct, frozen=True):
    """Not now. `retry_after` are the seconds that the endpoint named, if it did."""

    status: int
    reason: str
    retry_after: float | None = None
    body: dict[str, Any] | None = None


class Broken(msgspec.Struct, frozen=True):
    """An error of the endpoint, an answer that is none, or no answer in time (then the status is 0)."""

    status: int
    reason: str
    body: dict[str, Any] | None = None


class Away(msgspec.Struct, frozen=True):
    """No answer because of the connection: it could not be made, or (`connected`) it broke under the request."""

    reason: str
    connected: bool


Reply = Answered | Refused | Busy | Broken | Away


def read_reply(status: int, content: bytes, header: Callable[[str], str | None], wall_time: float) -> Reply:
    """`header` looks one up by its name; `wall_time` is what a date in Retry-After is compared with."""
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
    """Seconds or a date of HTTP; None when there is none, or none that can be read."""
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
