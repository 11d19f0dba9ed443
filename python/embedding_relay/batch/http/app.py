"""The application in each worker process: both APIs, the page, /health, /metrics, and the background work."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import ipaddress
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from embedding_relay.batch.background.worker import Worker
from embedding_relay.batch.http import calls, docs_page, metrics
from embedding_relay.batch.http.errors import add_error_handlers
from embedding_relay.batch.http.guards import Guards
from embedding_relay.batch.openai import calls as openai_calls
from embedding_relay.batch.openai.files import Files
from embedding_relay.batch.service import Service
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import MIB, Settings
from embedding_relay.batch.store.opening import open_mirror, open_store

logger = logging.getLogger(__name__)

# A multipart form is a little larger than the file in it.
AROUND_AN_UPLOAD: Final = 1 * MIB
PAGE: Final = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PAGE_RULES: Final = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
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
    for path, (name, media_type) in PAGE.items():
        app.add_api_route(path, _part_of_page(name, media_type), include_in_schema=False)
    app.add_api_route("/docs", _docs, include_in_schema=False)
    app.add_api_route("/health", _health, summary="200 while this worker serves and its store answers")
    app.add_api_route("/metrics", _metrics, summary="For Prometheus", response_class=PlainTextResponse)
    add_error_handlers(app)
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
    mirror = await asyncio.to_thread(open_mirror, settings.files)
    sessions = Sessions(store, settings.sessions_dir, settings.keep_seconds, mirror)
    worker = Worker(settings, store, sessions)
    app.state.service = Service(settings, sessions, wake=worker.wake)
    app.state.files = Files(store, sessions, settings)
    working = asyncio.create_task(worker.run(), name="worker")
    working.add_done_callback(_log_if_it_failed)
    app.state.working = working
    app.state.closing = threading.Event()
    _on_sigterm(app.state.closing.set)
    try:
        yield
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        store.close()


def _on_sigterm(what: Callable[[], object]) -> None:
    """Before uvicorn's own handler, which waits for the live streams to end and cuts those that do not."""
    if threading.current_thread() is not threading.main_thread():
        return  # another program runs this application, and signals are its own business
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def handle(number: int, frame: FrameType | None, before: Any = before) -> None:
            what()
            if callable(before):
                before(number, frame)

        if callable(before):
            signal.signal(number, handle)


def _log_if_it_failed(working: asyncio.Task[None]) -> None:
    if not working.cancelled() and (error := working.exception()):
        logger.error(
            "batch: the background work of this process ended; /health answers 503 and other processes take over",
            exc_info=error,
        )


# ---- pages


def _part_of_page(name: str, media_type: str) -> Callable[[], Response]:
    def part() -> Response:
        content = importlib.resources.files(__package__).joinpath(name).read_bytes()
        return Response(content, media_type=media_type, headers=PAGE_RULES)

    return part


def _docs(request: Request) -> HTMLResponse:
    return HTMLResponse(docs_page.render(request.app.openapi(), str(request.base_url)), headers=PAGE_RULES)


def _health(request: Request) -> JSONResponse:
    if request.app.state.working.done():
        return JSONResponse({"detail": "the background work of this process has ended"}, 503)
    request.app.state.service.sessions.ids()
    return JSONResponse({"status": "ok"})


def _metrics(request: Request) -> PlainTextResponse:
    return PlainTextResponse(metrics.text(request.app.state.service), media_type=metrics.CONTENT_TYPE)
