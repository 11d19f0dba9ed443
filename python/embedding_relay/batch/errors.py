"""What callers are refused with, and what makes a worker stop: work that was taken over, a disk that fails.

And how errors that are not ours are told to people: never in the words of a library.
"""

from __future__ import annotations

import re
from typing import Final


class Refusal(Exception):
    """The caller's mistake, or a file that cannot be used: an HTTP status and a sentence. Nothing has changed."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class UnknownSession(Refusal):
    def __init__(self, session_id: str) -> None:
        super().__init__(404, f"there is no session {session_id!r}: it was deleted, it expired, or it never existed")


class Unreadable(Refusal):
    """A file that is not what it should be: damaged, of another kind, or without anything to ask."""

    def __init__(self, detail: str) -> None:
        super().__init__(400, detail)


class TooLarge(Refusal):
    def __init__(self, detail: str) -> None:
        super().__init__(413, detail)


class OpenAIRefusal(Refusal):
    """A refusal in the form of OpenAI's API, which names the parameter at fault."""

    def __init__(self, status: int, detail: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, detail)
        self.param = param
        self.code = code


class StaleJob(Exception):
    """A worker works on a part that is over or that another worker has taken over: it must stop, changing nothing."""


class WorkersDied(Exception):
    """Worker processes have died, one after the other, while they were at the same part of a session."""


class NotWhatWasSaved(Exception):
    """What was read back is not what was written: the disk is full or failing, or somebody else changed it."""


# ---- errors of others, in words of ours

NOT_WHAT_WAS_EXPECTED: Final = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")
WHERE: Final = re.compile(r" - at `\$\.?([^`]*)`$")
KINDS: Final = {"int": "a whole number", "float": "a number", "str": "a text", "array": "a list", "object": "an object"}
OTHERS: Final = {"bool": "true or false", "null": "nothing"}


def in_words(error: BaseException) -> str:
    """Of an error of the system the reason alone: which file it was may concern nobody who reads it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return str(error)


def wrong_field(error: Exception) -> str:
    """What is wrong with JSON that msgspec could not convert."""
    text = str(error)
    where = WHERE.search(text)
    text = WHERE.sub("", text)
    if found := NOT_WHAT_WAS_EXPECTED.fullmatch(text):
        expected = [_kind(name) for name in found[1].split(" | ") if name != "null"]
        text = f"it must be {' or '.join(expected)}, not {_kind(found[2])}"
    return f"{where[1]}: {text}" if where and where[1] else text


def _kind(name: str) -> str:
    return KINDS.get(name) or OTHERS.get(name) or name
