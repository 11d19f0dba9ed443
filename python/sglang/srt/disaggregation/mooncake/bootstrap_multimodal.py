"""The bootstrap registry: encode ranks say where they listen, language ranks ask. A few HTTP requests per pairing."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import threading
from concurrent.futures import Future
from typing import Annotated, Final

import msgspec
from aiohttp import web

from sglang.srt.disaggregation.multimodal.protocol.errors import RemoteError, SettingError
from sglang.srt.disaggregation.multimodal.protocol.messages import Address, Handshake

logger = logging.getLogger(__name__)

_PATH: Final = "/relay/ranks"
_MAX_RANKS: Final = 4096
_MAX_BODY: Final = 64 * 1024
_REQUEST_TIMEOUT: Final = 5.0


class EncodeRank(msgspec.Struct, frozen=True):
    """What the registry knows of one encode rank. A new `instance` under an old name is a new process."""

    rank: Annotated[int, msgspec.Meta(ge=0, lt=_MAX_RANKS)]
    host: str
    port: Annotated[int, msgspec.Meta(gt=0, lt=65536)]
    instance: str
    handshake: Handshake

    @property
    def address(self) -> Address:
        return Address(self.host, self.port)


class RegistryError(RemoteError):
    """The registry did not answer as it should, or does not know the rank (yet)."""


class MooncakeEmbeddingBootstrapServer:
    """Runs in the HTTP-server process of an encode instance, in a thread of its own."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._ranks: dict[int, EncodeRank] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """Where it listens; known after `start` if the system was to choose."""
        return self._port

    def start(self) -> None:
        bound: Future[int] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(bound)), name="relay-bootstrap", daemon=True
        )
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
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._thread = None

    async def _serve(self, bound: Future[int]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_put(_PATH, self._put)
        app.router.add_get(_PATH + "/{rank}", self._get)
        app.router.add_get("/health", self._health)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host or None, self._port).start()
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


def announce(registry: Address, rank: EncodeRank) -> None:
    """Tell the registry about a rank; raises RegistryError."""
    _request(registry, "PUT", _PATH, msgspec.json.encode(rank))


def look_up(registry: Address, rank: int) -> EncodeRank:
    """Ask the registry for a rank; raises RegistryError."""
    body = _request(registry, "GET", f"{_PATH}/{rank}", b"")
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


def _request(registry: Address, method: str, path: str, body: bytes) -> bytes:
    """A direct connection: a proxy of the environment is for the world outside, not for our own instances."""
    connection = http.client.HTTPConnection(registry.host, registry.port, timeout=_REQUEST_TIMEOUT)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        answer = response.read(_MAX_BODY)
    except (OSError, UnicodeError, http.client.HTTPException) as error:  # Unicode: a host that no name server takes
        raise RegistryError(f"bootstrap registry {registry} did not answer: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        text = answer.decode(errors="replace")[:200]
        raise RegistryError(f"bootstrap registry {registry} answered {response.status}: {text}")
    return answer
