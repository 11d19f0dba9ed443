"""The bootstrap registry: an HTTP server that remembers where encode ranks listen. A few requests per pairing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from concurrent.futures import Future
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from embedding_relay.protocol.errors import SettingError
from embedding_relay.registry import seal as seals
from embedding_relay.registry.entry import MAX_BODY, RANKS_PATH, EncodeRank
from embedding_relay.threads import WatchedThread

logger = logging.getLogger(__name__)

_HEALTH: Final = "/health"


class MooncakeEmbeddingBootstrapServer:
    """Runs in the HTTP-server process of an encode instance, in a thread of its own."""

    def __init__(self, host: str, port: int, key: bytes | None = None) -> None:
        """With a `key`, it answers only who has that key, and its answers can be told from anybody else's."""
        self._host = host
        self._port = port
        self._key = key
        self._ranks: dict[int, EncodeRank] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: WatchedThread | None = None

    @property
    def port(self) -> int:
        """Where it listens; known after `start` if the system was to choose."""
        return self._port

    def start(self) -> None:
        bound: Future[int] = Future()
        # The scheduler, which lives in another process, notices the end of this thread by itself: see `Announcer`.
        self._thread = WatchedThread("relay-bootstrap", lambda: self._run(bound), logger.error)
        self._thread.start()
        try:
            self._port = bound.result()
        except OSError as error:
            self._thread.join()
            self._thread = None
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise SettingError(f"bootstrap port {self._port} cannot be used on {self._host}: {reason}") from None

    def close(self) -> None:
        if self._thread is None or self._loop is None or self._stop is None:
            return
        with contextlib.suppress(RuntimeError):  # its thread has died, and the loop with it
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._thread = None

    def _run(self, bound: Future[int]) -> None:
        try:
            asyncio.run(self._serve(bound))
        except BaseException as error:
            if bound.done():
                raise
            bound.set_exception(error)  # `start` waits for it

    async def _serve(self, bound: Future[int]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=MAX_BODY, middlewares=[_sealed(self._key)] if self._key else [])
        app.router.add_put(RANKS_PATH, self._put)
        app.router.add_get(RANKS_PATH + "/{rank}", self._get)
        app.router.add_get(_HEALTH, self._health)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
            bound.set_result(int(runner.addresses[0][1]))
            await self._stop.wait()
        except OSError as error:
            bound.set_exception(error)
        finally:
            await runner.cleanup()

    async def _put(self, request: web.Request) -> web.Response:
        try:
            rank = msgspec.json.decode(await request.read(), type=EncodeRank)
        except msgspec.DecodeError as error:
            return web.Response(status=HTTPStatus.BAD_REQUEST, text=str(error))
        self._ranks[rank.rank] = rank
        logger.info("relay bootstrap: encode rank %d is at %s, instance %s", rank.rank, rank.address, rank.instance)
        return web.Response(text="OK")

    async def _get(self, request: web.Request) -> web.Response:
        name = request.match_info["rank"]
        rank = self._ranks.get(int(name)) if name.isdecimal() and len(name) < 5 else None
        if rank is None:
            return web.Response(status=HTTPStatus.NOT_FOUND, text=f"no encode rank {name} has registered here")
        return web.Response(body=msgspec.json.encode(rank), content_type="application/json")

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="OK")


def _sealed(key: bytes) -> Middleware:
    """All but the health check is for those who have the secret, and each answer to them proves that we have it."""
    check = seals.SealCheck(key, time.time_ns())

    @web.middleware
    async def check_and_seal(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == _HEALTH:
            return await handler(request)
        assert request.transport is not None
        arrived_at = request.transport.get_extra_info("sockname") if request.method == "PUT" else None
        asked = seals.Request(request.method, request.raw_path, await request.read(), seals.destination(arrived_at))
        refusal = check.refusal(asked, request.headers, time.time_ns())
        if refusal:
            return web.Response(status=HTTPStatus.UNAUTHORIZED, text=refusal)
        answer = await handler(request)
        assert isinstance(answer, web.Response)
        assert isinstance(answer.body, bytes)
        nonce = request.headers[seals.NONCE]
        answer.headers[seals.SEAL] = seals.seal_answer(key, nonce, answer.status, answer.body)
        return answer

    return check_and_seal
