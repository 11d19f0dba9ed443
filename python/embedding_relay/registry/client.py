"""Requests to a bootstrap registry: an encode rank announces itself there, and language ranks look it up.

Both do so in threads of their own, so that a registry that does not answer holds up nobody.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
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

# For each step of a request, and for the whole: who sends a byte now and then must not keep a thread for ever.
_REQUEST_TIMEOUT: Final = 5.0
_WHOLE_REQUEST_TIMEOUT: Final = 10.0
_MOST_QUOTED: Final = 200

# An encode rank and its registry start at the same time, in two processes.
_ANNOUNCE_AGAIN_AFTER: Final = 0.5
_CHECK_EVERY: Final = 10.0
_MOST_MISSED: Final = 3

_LOOKUP_THREADS: Final = 16
# An instance that has just started announces itself a moment after it accepts requests.
_LOOKUP_PATIENCE: Final = 2.0
_LOOK_UP_AGAIN_AFTER: Final = 0.2
# An instance that is restarted takes longer than this; clients choose registries, and may name many.
_SIZE_IS_KNOWN_FOR: Final = 10.0
_SIZE_TIMEOUT: Final = 1.0
_MOST_SIZES: Final = 1000


class RegistryError(RemoteError):
    """The registry did not answer as it should, or does not know the rank (yet). A client may read the text.

    A client also chooses which host is asked. So `said`, what that host answered, is for the log only.
    """

    def __init__(self, text: str, said: str = "") -> None:
        super().__init__(text)
        self.said = json.dumps(said[:_MOST_QUOTED]) if said else "nothing"

    @property
    def for_the_log(self) -> str:
        return f"{self}; it said {self.said}"


# ---- one request


def announce(registry: Address, rank: EncodeRank, key: bytes | None = None) -> None:
    """Tell the registry about a rank; raises RegistryError."""
    _request(registry, "PUT", RANKS_PATH, msgspec.json.encode(rank), key)


def look_up(registry: Address, rank: int, key: bytes | None = None, timeout: float = _REQUEST_TIMEOUT) -> EncodeRank:
    """Ask the registry for a rank; raises RegistryError. `timeout` is for each step of it."""
    body = _request(registry, "GET", f"{RANKS_PATH}/{rank}", b"", key, timeout)
    try:
        return msgspec.json.decode(body, type=EncodeRank)
    except msgspec.DecodeError as error:
        raise _no_registry(registry, f"{error}: {body.decode(errors='replace')}") from error


def _no_registry(registry: Address, said: str) -> RegistryError:
    """The same whatever it is: a client learns nothing about hosts that only this instance reaches."""
    text = f"what answers at {registry} is no bootstrap registry of this version, or knows no such encode rank (yet)"
    return RegistryError(text, said)


def parse_peer(text: str) -> tuple[Address, int]:
    """The registry, and the rank that is meant: what `name_of_rank` has made."""
    registry, _, rank = text.partition("#")
    return parse_address(registry), int(rank or 0)


def parse_address(text: str) -> Address:
    """`host:port` or `[v6 host]:port`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port[:6]) < 65536:
        raise RegistryError(f"{text!r} is no address of a bootstrap registry: it should be host:port")
    return Address(host, int(port))


def _request(
    registry: Address, method: str, path: str, body: bytes, key: bytes | None, timeout: float = _REQUEST_TIMEOUT
) -> bytes:
    """A direct connection: a proxy of the environment is for the world outside, not for our own instances."""
    connection = http.client.HTTPConnection(registry.host, registry.port, timeout=timeout)
    headers = {}
    try:
        connection.connect()
        if key:
            sent_to = connection.sock.getpeername() if method == "PUT" else None
            request = seals.Request(method, path, body, seals.destination(sent_to))
            headers = seals.seal_request(key, request, time.time_ns())
        with _cut_off(connection.sock):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = response.read(MAX_BODY)
    except (OSError, UnicodeError) as error:  # Unicode: a host that no name server takes
        raise RegistryError(f"bootstrap registry {registry} did not answer: {error}") from error
    except http.client.HTTPException as error:
        raise _no_registry(registry, repr(error)) from error
    finally:
        connection.close()
    said = f"{response.status} {answer.decode(errors='replace')}"
    if response.status == http.HTTPStatus.UNAUTHORIZED:  # never sealed: whoever asked may not have the secret
        reason = "or the clock differs there" if key else "is set there, and is missing here"
        raise RegistryError(f"bootstrap registry {registry} refuses this instance: {SECRET_FILE} {reason}", said)
    seal = response.getheader(seals.SEAL, "")
    if key and not seals.is_sealed_answer(key, headers[seals.NONCE], response.status, answer, seal):
        raise RegistryError(
            f"bootstrap registry {registry} does not prove that it has our secret:"
            f" {SECRET_FILE} differs or is missing there",
            said,
        )
    if response.status != http.HTTPStatus.OK:
        raise _no_registry(registry, said)
    return answer


@contextlib.contextmanager
def _cut_off(connection: socket.socket) -> Iterator[None]:
    """End the connection under whoever waits for it when its time is up: its own time-out begins with each byte."""

    def end() -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_WHOLE_REQUEST_TIMEOUT, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


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
                    self._give_up(f"no bootstrap registry within {self._patience:g} s: {error.for_the_log}")
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
                    self._give_up(f"the bootstrap registry is gone: {error.for_the_log}")
                    return


# ---- language side


class LookupAnswers(Protocol):
    """What a lookup may find out; called in the control thread. A `peer` is a rank as `name_of_rank` calls it."""

    def peer_resolved(self, peer: str, rank: EncodeRank, now: float) -> None: ...

    def peer_unreachable(self, peer: str, reason: str, now: float) -> None: ...

    def peer_dead(self, peer: str, now: float) -> None:
        """The process that this peer's registry named last time is gone; what became of the peer comes next."""


class PeerLookup:
    """Finds out which encode rank a registry has, and posts the answer to the control thread."""

    def __init__(
        self,
        answers: LookupAnswers,
        post: Callable[[Callable[[float], None]], None],
        key: bytes | None = None,
        may_ask: Callable[[str], bool] = lambda host: True,
        has_read_everything: Callable[[str], bool] = lambda instance: True,
    ) -> None:
        """`may_ask`: whether an operator lets a host be asked. Clients choose registries, and these name more hosts.

        `has_read_everything`: whether nothing that an instance wrote before it ended can still land here.
        """
        self._answers = answers
        self._may_ask = may_ask
        self._has_read_everything = has_read_everything
        self._key = key
        self._post = post
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="relay-lookup")
        self._known: dict[str, EncodeRank] = {}
        """What ranks were last: if a connection to one is refused, such a process is gone."""

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
            self._post(functools.partial(self._answers.peer_unreachable, peer, type(error).__name__))

    def _find(self, peer: str) -> None:
        known = self._known.get(peer)
        if known is not None and is_refused(known.address) and self._has_read_everything(known.instance):
            del self._known[peer]
            known = None
            self._post(functools.partial(self._answers.peer_dead, peer))
        try:
            rank = self._ask(peer)
            moved = known is not None and known.address != rank.address
            if known and moved and not self._has_read_everything(known.instance):
                raise RegistryError(f"what its predecessor at {peer} wrote is still being read here")
        except RegistryError as error:
            logger.warning("relay: encode instance %s cannot be found: %s", peer, error.for_the_log)
            self._post(functools.partial(self._answers.peer_unreachable, peer, str(error)))
        else:
            self._known[peer] = rank
            self._post(functools.partial(self._answers.peer_resolved, peer, rank))

    def _ask(self, peer: str) -> EncodeRank:
        (registry, wanted), deadline = parse_peer(peer), time.monotonic() + _LOOKUP_PATIENCE
        while True:
            try:
                rank = look_up(registry, wanted, self._key)
                if not self._may_ask(rank.host):
                    raise RegistryError(f"{registry} names a host that may not be asked", str(rank.address))
                if is_refused(rank.address):
                    text = f"encode rank {rank.rank} of {registry} is gone: its address refuses connections"
                    raise RegistryError(text, str(rank.address))
                return rank
            except RegistryError:
                if time.monotonic() > deadline or self._stopped.wait(_LOOK_UP_AGAIN_AFTER):
                    raise


class InstanceSizes:
    """How many data-parallel ranks encode instances have; looked up where requests arrive, which may wait for it.

    Nothing depends on the answer but which rank is asked for the rows, and a rank that is asked for another's says so.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key
        self._known: dict[Address, tuple[float, int]] = {}

    def known(self, registry: Address, now: float) -> int | None:
        """Unless it was asked too long ago: an instance may come back with another number."""
        asked_at, size = self._known.get(registry, (-_SIZE_IS_KNOWN_FOR, 1))
        return size if now < asked_at + _SIZE_IS_KNOWN_FOR else None

    def ask(self, registry: Address) -> int:
        """Waits for the registry. 1 if it does not answer: whoever asks for the rows will find out why."""
        try:
            size = look_up(registry, 0, self._key, _SIZE_TIMEOUT).ranks
        except RegistryError as error:
            logger.warning("relay: how many ranks encode instance %s has is not known: %s", registry, error.for_the_log)
            size = 1
        while len(self._known) >= _MOST_SIZES:
            self._known.pop(next(iter(self._known)), None)
        self._known[registry] = (time.monotonic(), size)
        return size
