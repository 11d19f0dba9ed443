"""A task (what one row asks) and its result, as they are handed around and saved: a line of JSON each."""

from __future__ import annotations

import enum
from typing import Any

import msgspec


class Task(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one row asks. `row` is its number as the owner sees it: the first row or line is 1."""

    row: int
    prompt: str = ""
    # In the order of the columns: http(s) URLs, data URIs, or paths of files within the session's folder.
    images: tuple[str, ...] = ()
    # A row that cannot be asked, and why. It is recorded as failed with this sentence.
    error: str = ""
    # From a file in the format of OpenAI's Batch API: the request as it was given, which `prompt` does not repeat.
    custom_id: str = ""
    body: dict[str, Any] | None = None


class Outcome(enum.Enum):
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """The final result of one row. Written once."""

    row: int
    outcome: Outcome
    answer: str = ""
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    # Of the endpoint's last answer; 0 when there was none.
    http_status: int = 0
    custom_id: str = ""
    # The endpoint's whole answer, kept for tasks with a `body` only.
    response: dict[str, Any] | None = None
