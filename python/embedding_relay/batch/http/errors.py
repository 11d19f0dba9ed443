"""How errors are answered: `{"detail": …}` under /api, and in OpenAI's form under /v1."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from embedding_relay.batch.errors import OpenAIRefusal, Refusal
from embedding_relay.batch.store.contract import StoreAway

logger = logging.getLogger(__name__)


def error_answer(path: str, status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    if not path.startswith("/v1/"):
        return JSONResponse({"detail": detail}, status, headers)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _openai_error(status, detail, kind, headers=headers)


def _openai_error(
    status: int,
    message: str,
    kind: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(OpenAIRefusal, _openai_refusal)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _wrong_request)
    app.add_exception_handler(StoreAway, _store_away)
    app.add_exception_handler(OSError, _disk_failed)
    app.add_exception_handler(Exception, _unexpected)


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return error_answer(request.url.path, error.status, error.detail)


def _openai_refusal(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OpenAIRefusal)
    return _openai_error(error.status, error.detail, "invalid_request_error", error.param, error.code)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return error_answer(request.url.path, error.status_code, error.detail)


def _wrong_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    # The first part is where in the request it stands. JSON that cannot be read has no more than a position.
    where = "" if first["type"] == "json_invalid" else ".".join(map(str, first["loc"][1:]))
    return error_answer(request.url.path, 400, f"{where or 'the body'}: {_what_is_wrong(first)}")


def _what_is_wrong(error: dict[str, Any]) -> str:
    """In words of ours."""
    limits: dict[str, Any] = error.get("ctx") or {}
    match error["type"]:
        case "missing":
            return "it must be given"
        case "json_invalid":
            return "it is not JSON"
        case "int_parsing" | "int_type":
            return "it must be a whole number"
        case "greater_than_equal":
            return f"it must be at least {limits['ge']}"
        case "less_than_equal":
            return f"it must be at most {limits['le']}"
        case "literal_error":
            return f"it must be {limits['expected']}"
    return "it cannot be used"


def _store_away(request: Request, error: Exception) -> JSONResponse:
    return error_answer(request.url.path, 503, str(error), {"Retry-After": "2"})


def _disk_failed(request: Request, error: Exception) -> JSONResponse:
    logger.warning("batch: %s %s: %s", request.method, request.url.path, error)
    # Which file it was concerns the operator only, so the caller is not told.
    why = error.strerror if isinstance(error, OSError) and error.strerror else "its disk fails"
    return error_answer(request.url.path, 503, f"the service cannot do this just now: {why}")


def _unexpected(request: Request, _error: Exception) -> JSONResponse:
    """uvicorn logs the error itself."""
    return error_answer(request.url.path, 500, "this is a bug of the service; its log says more")
