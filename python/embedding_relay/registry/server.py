"""The bootstrap registry: encode ranks say where they listen, language ranks ask. A few HTTP requests per pairing."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Annotated, Any, Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from embedding_relay.config import SECRET_FILE
from embedding_relay.protocol.errors import RemoteError, SettingError
from embedding_relay.protocol.messages import Address, Handshake, Host, Word
from embedding_relay.registry import seal as seals
from embedding_relay.threads import WatchedThread

logger = logging.getLogger(__name__)

_PATH: Final = "/relay/ranks"
_HEALTH: Final = "/health"
_MAX_RANKS: Final = 4096
_MAX_BODY: Final = 64 * 1024
_REQUEST_TIMEOUT: Final = 5.0
_UNAUTHORIZED: Final = 401


class EncodeRank(msgspec.Struct, frozen=True):
    """What the registry knows of one encode rank. A new `instance` under an old name is a new process."""

    rank: Annotated[int, msgspec.Meta(ge=0, lt=_MAX_RANKS)]
    host: Host
    port: Annotated[int, msgspec.Meta(gt=0, lt=65536)]
    instance: Word
    handshake: Handshake

    @property
    def address(self) -> Address:
        return Address(self.host, self.port)


class RegistryError(RemoteError):
    """The registry did not answer as it should, or does not know the rank (yet)."""


class MooncakeEmbeddingBootstrapServer:
    """Runs in the HTTP-server process of an encode instance, in a thread of its own."""

    def __init__(self, host: str, port: int, key: bytes | None = None) -> None:
        """With a `key`, it hears only who has that key, and its answers can be told from anybody else's."""
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
        app = web.Application(client_max_size=_MAX_BODY, middlewares=[_sealed(self._key)] if self._key else [])
        app.router.add_put(_PATH, self._put)
        app.router.add_get(_PATH + "/{rank}", self._get)
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
            return web.Response(status=400, text=str(error))
        self._ranks[rank.rank] = rank
        logger.info("relay bootstrap: encode rank %d is at %s, instance %s", rank.rank, rank.address, rank.instance)
        return web.Response(text="OK")

    async def _get(self, request: web.Request) -> web.Response:
        name = request.match_info["rank"]
        rank = self._ranks.get(int(name)) if name.isdecimal() and len(name) < 5 else None
        if rank is None:
            return web.Response(status=404, text=f"no encode rank {name} has registered here")
        return web.Response(body=msgspec.json.encode(rank), content_type="application/json")

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="OK")


def _sealed(key: bytes) -> Middleware:
    """All but the health check is for those who have the secret, and each answer to them proves that we have it."""
    inspector = seals.Inspector(key, time.time_ns())

    @web.middleware
    async def inspect(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == _HEALTH:
            return await handler(request)
        assert request.transport is not None
        to = _name(request.transport.get_extra_info("sockname")) if request.method == "PUT" else ""
        asked = seals.Request(request.method, request.raw_path, await request.read(), to)
        objection = inspector.objection(asked, request.headers, time.time_ns())
        if objection:
            return web.Response(status=_UNAUTHORIZED, text=objection)
        answer = await handler(request)
        assert isinstance(answer, web.Response)
        assert isinstance(answer.body, bytes)
        nonce = request.headers[seals.NONCE]
        answer.headers[seals.SEAL] = seals.seal_answer(key, nonce, answer.status, answer.body)
        return answer

    return inspect


def announce(registry: Address, rank: EncodeRank, key: bytes | None = None) -> None:
    """Tell the registry about a rank; raises RegistryError."""
    _request(registry, "PUT", _PATH, msgspec.json.encode(rank), key)


def look_up(registry: Address, rank: int, key: bytes | None = None) -> EncodeRank:
    """Ask the registry for a rank; raises RegistryError."""
    body = _request(registry, "GET", f"{_PATH}/{rank}", b"", key)
    try:
        return msgspec.json.decode(body, type=EncodeRank)
    except msgspec.DecodeError as error:
        raise RegistryError(f"bootstrap registry {registry} answered with something else: {error}") from error


def parse_address(text: str) -> Address:
    """`host:port` or `[v6 host]:port`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port[:6]) < 65536:
        raise RegistryError(f"{text!r} is no address of a bootstrap registry")
    return Address(host, int(port))


def _request(registry: Address, method: str, path: str, body: bytes, key: bytes | None) -> bytes:
    """A direct connection: a proxy of the environment is for the world outside, not for our own instances."""
    connection = http.client.HTTPConnection(registry.host, registry.port, timeout=_REQUEST_TIMEOUT)
    headers = {}
    try:
        connection.connect()
        if key:
            to = _name(connection.sock.getpeername()) if method == "PUT" else ""
            headers = seals.seal_request(key, seals.Request(method, path, body, to), time.time_ns())
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = response.read(_MAX_BODY)
    except (OSError, UnicodeError, http.client.HTTPException) as error:  # Unicode: a host that no name server takes
        raise RegistryError(f"bootstrap registry {registry} did not answer: {error}") from error
    finally:
        connection.close()
    text = answer.decode(errors="replace")[:200]
    if response.status == _UNAUTHORIZED:  # never sealed, because whoever asked may not have the secret
        raise RegistryError(f"bootstrap registry {registry} refuses this instance: {text}")
    seal = response.getheader(seals.SEAL, "")
    if key and not seals.is_sealed_answer(key, headers[seals.NONCE], response.status, answer, seal):
        raise RegistryError(
            f"bootstrap registry {registry} does not prove that it has our secret:"
            f" {SECRET_FILE} differs or is missing there"
        )
    if response.status != 200:
        raise RegistryError(f"bootstrap registry {registry} answered {response.status}: {text}")
    return answer


def _name(socket_address: Sequence[Any]) -> str:
    """Of an address as sockets give it, with two parts or four."""
    return str(Address(*socket_address[:2]))
