"""The application that each worker process serves: both APIs, the page, health, metrics, and the worker behind."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import ipaddress
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from embedding_relay.batch import calls, docs_page, metrics, openai_calls
from embedding_relay.batch.guards import Guards
from embedding_relay.batch.openai_files import Files, Mistake
from embedding_relay.batch.refusals import Refusal
from embedding_relay.batch.service import Service
from embedding_relay.batch.sessions import Sessions
from embedding_relay.batch.settings import MIB, Settings
from embedding_relay.batch.store import StoreAway, open_store
from embedding_relay.batch.worker import Worker

logger = logging.getLogger(__name__)

# A form has a little around its file.
AROUND_AN_UPLOAD: Final = 1 * MIB
PAGE_RULES: Final = {
    "Content-Security-Policy": "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def create_app(settings: Settings) -> FastAPI:
    app = FastAPI(
        title="Batch sessions",
        summary="A workbook of prompts, run to the end.",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings = settings
    app.include_router(calls.router)
    app.include_router(openai_calls.router)
    app.add_api_route("/", _page, include_in_schema=False)
    app.add_api_route("/docs", _docs, include_in_schema=False)
    app.add_api_route("/health", _health, summary="200 while this worker serves and its store answers")
    app.add_api_route("/metrics", _metrics, summary="For Prometheus", response_class=PlainTextResponse)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(Mistake, openai_calls.answer_mistake)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _wrong_request)
    app.add_exception_handler(StoreAway, _store_away)
    app.add_exception_handler(OSError, _disk_fails)
    app.add_exception_handler(Exception, _our_mistake)
    app.add_middleware(Guards, most_bytes=settings.upload_mib * MIB + AROUND_AN_UPLOAD, api_key=settings.api_key)
    if is_loopback(settings.host) and not settings.api_key:
        # A page on the web could otherwise reach this service under a name of its own that leads to 127.0.0.1. The
        # bracket is what is left of `[::1]:8600` where Starlette cuts off the port.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[", settings.host])
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    store = await asyncio.to_thread(open_store, settings.store_place)
    sessions = Sessions(store, settings.keep_seconds)
    worker = Worker(settings, store, sessions)
    app.state.service = Service(settings, sessions, worker)
    app.state.files = Files(store, sessions, settings)
    working = asyncio.create_task(worker.run(), name="worker")
    working.add_done_callback(_say_if_it_died)
    app.state.working = working
    try:
        yield
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        store.close()


def _say_if_it_died(working: asyncio.Task[None]) -> None:
    if not working.cancelled() and (error := working.exception()):
        logger.error("batch: the worker ended; /health is red and others take over", exc_info=error)


# ---- pages


def _page() -> HTMLResponse:
    page = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    return HTMLResponse(page, headers=PAGE_RULES)


def _docs(request: Request) -> HTMLResponse:
    return HTMLResponse(docs_page.render(request.app.openapi(), str(request.base_url)), headers=PAGE_RULES)


def _health(request: Request) -> JSONResponse:
    if request.app.state.working.done():
        return JSONResponse({"detail": "the part of this worker that runs sessions has ended"}, 503)
    request.app.state.service.sessions.ids()
    return JSONResponse({"status": "ok"})


def _metrics(request: Request) -> PlainTextResponse:
    return PlainTextResponse(metrics.text(request.app.state.service), media_type=metrics.CONTENT_TYPE)


# ---- errors: all of them in one form


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return JSONResponse(calls.refusal_view(request, error.status, error.detail), error.status)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(calls.refusal_view(request, error.status_code, error.detail), error.status_code)


def _wrong_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return JSONResponse(calls.refusal_view(request, 400, f"{where or 'the body'}: {first['msg']}"), 400)


def _store_away(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(calls.refusal_view(request, 503, str(error)), 503, headers={"Retry-After": "2"})


def _disk_fails(request: Request, error: Exception) -> JSONResponse:
    logger.warning("batch: %s %s: %s", request.method, request.url.path, error)
    # Which file it was is nobody's business but the operator's.
    why = error.strerror if isinstance(error, OSError) and error.strerror else "its disk fails"
    return JSONResponse(calls.refusal_view(request, 503, f"the service cannot do this just now: {why}"), 503)


def _our_mistake(request: Request, error: Exception) -> JSONResponse:
    """The error itself is logged by who called us."""
    return JSONResponse(calls.refusal_view(request, 500, "this is a mistake of the service; its log says more"), 500)
