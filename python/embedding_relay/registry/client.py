"""Requests to a bootstrap registry: an encode rank announces itself there, and language ranks look it up.

Both do so in threads of their own, so that a registry that does not answer holds up nobody.
"""

from __future__ import annotations

import functools
import http.client
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

import msgspec

from embedding_relay.config import SECRET_FILE
from embedding_relay.memory.quiet import is_refused
from embedding_relay.protocol.errors import RemoteError
from embedding_relay.protocol.messages import Address
from embedding_relay.registry import seal as seals
from embedding_relay.registry.entry import MAX_BODY, RANKS_PATH, EncodeRank
from embedding_relay.threads import WatchedThread

logger = logging.getLogger(__name__)

_REQUEST_TIMEOUT: Final = 5.0

# An encode rank and its registry start at the same time, in two processes.
_ANNOUNCE_AGAIN_AFTER: Final = 0.5
_CHECK_EVERY: Final = 10.0
_MOST_MISSED: Final = 3

# Every rank of an encode instance holds the same rows: rank 0 sends them to all language ranks.
_SENDING_RANK: Final = 0
_LOOKUP_THREADS: Final = 16
# An instance that has just started announces itself a moment after it accepts requests.
_LOOKUP_PATIENCE: Final = 2.0
_LOOK_UP_AGAIN_AFTER: Final = 0.2


class RegistryError(RemoteError):
    """The registry did not answer as it should, or does not know the rank (yet)."""


# ---- one request


def announce(registry: Address, rank: EncodeRank, key: bytes | None = None) -> None:
    """Tell the registry about a rank; raises RegistryError."""
    _request(registry, "PUT", RANKS_PATH, msgspec.json.encode(rank), key)


def look_up(registry: Address, rank: int, key: bytes | None = None) -> EncodeRank:
    """Ask the registry for a rank; raises RegistryError."""
    body = _request(registry, "GET", f"{RANKS_PATH}/{rank}", b"", key)
    try:
        return msgspec.json.decode(body, type=EncodeRank)
    except msgspec.DecodeError as error:
        raise RegistryError(f"what answers at {registry} is no bootstrap registry of this version: {error}") from error


def parse_address(text: str) -> Address:
    """`host:port` or `[v6 host]:port`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port[:6]) < 65536:
        raise RegistryError(f"{text!r} is no address of a bootstrap registry: it should be host:port")
    return Address(host, int(port))


def _request(registry: Address, method: str, path: str, body: bytes, key: bytes | None) -> bytes:
    """A direct connection: a proxy of the environment is for the world outside, not for our own instances."""
    connection = http.client.HTTPConnection(registry.host, registry.port, timeout=_REQUEST_TIMEOUT)
    headers = {}
    try:
        connection.connect()
        if key:
            sent_to = connection.sock.getpeername() if method == "PUT" else None
            request = seals.Request(method, path, body, seals.destination(sent_to))
            headers = seals.seal_request(key, request, time.time_ns())
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = response.read(MAX_BODY)
    except (OSError, UnicodeError, http.client.HTTPException) as error:  # Unicode: a host that no name server takes
        raise RegistryError(f"bootstrap registry {registry} did not answer: {error}") from error
    finally:
        connection.close()
    text = answer.decode(errors="replace")[:200]
    if response.status == http.HTTPStatus.UNAUTHORIZED:  # never sealed: whoever asked may not have the secret
        raise RegistryError(f"bootstrap registry {registry} refuses this instance: {text}")
    seal = response.getheader(seals.SEAL, "")
    if key and not seals.is_sealed_answer(key, headers[seals.NONCE], response.status, answer, seal):
        raise RegistryError(
            f"bootstrap registry {registry} does not prove that it has our secret:"
            f" {SECRET_FILE} differs or is missing there"
        )
    if response.status != http.HTTPStatus.OK:
        raise RegistryError(f"bootstrap registry {registry} answered {response.status}: {text}")
    return answer


# ---- encode side


class Announcer:
    """Announces one encode rank, again and again until the registry is there; then notices if the registry goes."""

    def __init__(
        self,
        registry: Address,
        rank: EncodeRank,
        patience: float,
        give_up: Callable[[str], None],
        key: bytes | None = None,
    ) -> None:
        self._registry = registry
        self._rank = rank
        self._key = key
        self._patience = patience
        self._give_up = give_up
        self._stopped = threading.Event()
        self._announced = threading.Event()
        self._thread = WatchedThread("relay-announce", self._run, give_up)

    @property
    def announced(self) -> bool:
        return self._announced.is_set()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    # ---- its own thread

    def _run(self) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                announce(self._registry, self._rank, self._key)
                self._announced.set()
                break
            except RegistryError as error:
                if time.monotonic() > deadline:
                    self._give_up(f"no bootstrap registry within {self._patience:g} s: {error}")
                    return
            if self._stopped.wait(_ANNOUNCE_AGAIN_AFTER):
                return
        self._watch_registry()

    def _watch_registry(self) -> None:
        """It lives in another process, and without it no language rank finds us: then this instance is unhealthy."""
        missed = 0
        while not self._stopped.wait(_CHECK_EVERY):
            try:
                look_up(self._registry, self._rank.rank, self._key)
                missed = 0
            except RegistryError as error:
                missed += 1
                if missed == _MOST_MISSED:
                    self._give_up(f"the bootstrap registry is gone: {error}")
                    return


# ---- language side


class LookupAnswers(Protocol):
    """What a lookup may find out; called in the control thread. A `peer` is the address of a registry, as text."""

    def peer_resolved(self, peer: str, address: Address, instance: str, now: float) -> None: ...

    def peer_unreachable(self, peer: str, reason: str, now: float) -> None: ...

    def peer_dead(self, peer: str, now: float) -> None:
        """The process that this peer's registry named last time is gone; what became of the peer comes next."""


class PeerLookup:
    """Finds out which encode rank a registry has, and posts the answer to the control thread."""

    def __init__(
        self, answers: LookupAnswers, post: Callable[[Callable[[float], None]], None], key: bytes | None = None
    ) -> None:
        self._answers = answers
        self._key = key
        self._post = post
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="relay-lookup")
        self._known: dict[str, Address] = {}
        """Where ranks were last: a refused connection there proves that such a process is gone."""

    def resolve(self, peer: str) -> None:
        self._pool.submit(self._resolve, peer)

    def close(self) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    # ---- lookup threads

    def _resolve(self, peer: str) -> None:
        try:
            self._find(peer)
        except BaseException as error:  # the top of a thread: who waits for this answer must get one
            logger.exception("the lookup of %s failed", peer)
            self._post(functools.partial(self._answers.peer_unreachable, peer, repr(error)))

    def _find(self, peer: str) -> None:
        known = self._known.get(peer)
        if known is not None and is_refused(known):
            self._known.pop(peer, None)
            self._post(functools.partial(self._answers.peer_dead, peer))
        try:
            rank = self._ask(peer)
        except RegistryError as error:
            self._post(functools.partial(self._answers.peer_unreachable, peer, str(error)))
        else:
            self._known[peer] = rank.address
            self._post(functools.partial(self._answers.peer_resolved, peer, rank.address, rank.instance))

    def _ask(self, peer: str) -> EncodeRank:
        registry, deadline = parse_address(peer), time.monotonic() + _LOOKUP_PATIENCE
        while True:
            try:
                rank = look_up(registry, _SENDING_RANK, self._key)
                if is_refused(rank.address):
                    raise RegistryError(
                        f"encode rank {rank.rank} of {registry} is gone: {rank.address} refuses connections"
                    )
                return rank
            except RegistryError:
                if time.monotonic() > deadline or self._stopped.wait(_LOOK_UP_AGAIN_AFTER):
                    raise
