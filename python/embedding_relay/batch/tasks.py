"""What one row asks, and what became of it: the two records that travel between the parts, a line of JSON each."""

from __future__ import annotations

import enum
from typing import Any

import msgspec


class Task(msgspec.Struct, frozen=True, omit_defaults=True):
    """One row's question. `row` is the row's number as its owner sees it: 1 is the first row of the sheet or line."""

    row: int
    prompt: str = ""
    # In the order of the columns: http(s) URLs, data URIs, or the paths of files within the session's directory.
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
    """One row's end. Written once."""

    row: int
    outcome: Outcome
    answer: str = ""
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    # Of the last answer that the endpoint gave; 0 when there was none.
    http_status: int = 0
    custom_id: str = ""
    # The endpoint's whole answer, kept for tasks with a `body` only.
    response: dict[str, Any] | None = None
