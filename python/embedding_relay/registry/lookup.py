"""Asks bootstrap registries for encode ranks, in threads of its own: a peer that does not answer holds up nobody."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from embedding_relay.memory.quiet import is_refused
from embedding_relay.protocol.messages import Address
from embedding_relay.registry.server import (
    EncodeRank,
    RegistryError,
    look_up,
    parse_address,
)

logger = logging.getLogger(__name__)

# Every rank of an encode instance holds the same rows: rank 0 sends them to all language ranks.
_SENDING_RANK: Final = 0
_THREADS: Final = 16
# An instance that has just started announces itself a moment after it accepts requests.
_PATIENCE: Final = 2.0
_EVERY: Final = 0.2


class Answers(Protocol):
    """What a lookup may find out; called in the control thread."""

    def peer_resolved(self, peer: str, address: Address, instance: str, now: float) -> None: ...

    def peer_unreachable(self, peer: str, reason: str, now: float) -> None: ...

    def peer_dead(self, peer: str, now: float) -> None: ...


class PeerLookup:
    def __init__(
        self, answers: Answers, post: Callable[[Callable[[float], None]], None], key: bytes | None = None
    ) -> None:
        self._answers = answers
        self._key = key
        self._post = post
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="relay-lookup")
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
            del self._known[peer]
            self._post(functools.partial(self._answers.peer_dead, peer))
        try:
            rank = self._ask(peer)
        except RegistryError as error:
            self._post(functools.partial(self._answers.peer_unreachable, peer, str(error)))
        else:
            self._known[peer] = rank.address
            self._post(functools.partial(self._answers.peer_resolved, peer, rank.address, rank.instance))

    def _ask(self, peer: str) -> EncodeRank:
        registry, deadline = parse_address(peer), time.monotonic() + _PATIENCE
        while True:
            try:
                rank = look_up(registry, _SENDING_RANK, self._key)
                if is_refused(rank.address):
                    raise RegistryError(f"encode rank {rank.rank} of {registry} is gone: {rank.address} refuses")
                return rank
            except RegistryError:
                if time.monotonic() > deadline or self._stopped.wait(_EVERY):
                    raise
