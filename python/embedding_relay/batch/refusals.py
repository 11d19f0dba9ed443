"""What a session answers to a call that cannot be: a status of HTTP and a sentence for a person."""

from __future__ import annotations

from typing import Any


def error_view(path: str, status: int, detail: str) -> dict[str, Any]:
    """Every error of this service is `detail`; the calls of OpenAI's API have a form of their own."""
    if path.startswith("/v1/"):
        kind = "invalid_request_error" if status < 500 else "server_error"
        return {"error": {"message": detail, "type": kind, "param": None, "code": None}}
    return {"detail": detail}


class Refusal(Exception):
    """The caller's mistake, or a file that cannot be used. Nothing has changed."""

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
