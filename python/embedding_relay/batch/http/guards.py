"""Checks before every call: the API key, the size of the body, and requests that pages of other sites make."""

from __future__ import annotations

import contextlib
import hmac
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedding_relay.batch.http.errors import error_answer

# They show no data. The page asks for the key and sends it with each of its calls.
OPEN_PATHS: Final = frozenset({"/", "/page.css", "/page.js", "/health", "/docs", "/openapi.json", "/favicon.ico"})
UPLOADS: Final = frozenset({"/api/analyze/upload", "/v1/files"})
# For the JSON of every other call: it becomes part of the session's record, which is read all the time.
MOST_JSON: Final = 2**20
READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class _BodyTooLarge(Exception):
    pass


class Guards:
    """`most_bytes` is the size of the largest upload; with an empty `api_key` no key is asked for."""

    def __init__(self, app: ASGIApp, most_bytes: int, api_key: str) -> None:
        self._app = app
        self._most = most_bytes
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._key and scope["path"] not in OPEN_PATHS and not self._knows_key(headers):
            answer = error_answer(
                scope["path"], 401, "this service wants an API key: send it as `Authorization: Bearer KEY`"
            )
            answer.headers["WWW-Authenticate"] = "Bearer"
        elif scope["method"] not in READING and headers.get("sec-fetch-site") == "cross-site":
            answer = error_answer(scope["path"], 403, "a page of another site may not use this service")
        elif _declared(headers) > self._most_of(scope):
            answer = self._too_large(scope)
        else:
            await self._counted(scope, receive, send)
            return
        await answer(scope, receive, send)

    def _knows_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = key.strip()
        # A terminal sends what is not ASCII as UTF-8, a browser as Latin-1; a header is read as Latin-1.
        known = [hmac.compare_digest(sent.encode(encoding), self._key) for encoding in ("latin-1", "utf-8")]
        return scheme.lower() == "bearer" and any(known)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A body may be longer than its header says, or there is no header: so its bytes are counted."""
        received, begun, most = 0, False, self._most_of(scope)

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise _BodyTooLarge
            return message

        async def instead(message: Message) -> None:
            """The parser of the body takes our exception for a broken form and would answer 400: answer 413 instead."""
            nonlocal begun
            if received <= most:
                await send(message)
            elif not begun:
                begun = True
                await self._too_large(scope)(scope, receive, send)

        with contextlib.suppress(_BodyTooLarge):
            await self._app(scope, counting, instead)
            return
        await instead({})

    def _most_of(self, scope: Scope) -> int:
        return self._most if scope["path"] in UPLOADS else MOST_JSON

    def _too_large(self, scope: Scope) -> JSONResponse:
        what = "upload" if scope["path"] in UPLOADS else "call"
        most = self._most_of(scope) / 2**20
        answer = error_answer(scope["path"], 413, f"this is more than the {most:.0f} MiB that one {what} may have")
        answer.headers["Connection"] = "close"  # the rest of it is not read
        return answer


def _declared(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() else 0
