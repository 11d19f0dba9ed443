"""Tells the registry of an encode instance where its rank listens, and notices when the registry is no more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from embedding_relay.protocol.messages import Address
from embedding_relay.registry.server import EncodeRank, RegistryError, announce, look_up
from embedding_relay.threads import WatchedThread

_EVERY: Final = 0.5
_LOOK_EVERY: Final = 10.0
_MOST_MISSED: Final = 3


class Announcer:
    """Tries again until the registry is there: it starts in another process, at the same time."""

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
            if self._stopped.wait(_EVERY):
                return
        self._keep_an_eye_on_it()

    def _keep_an_eye_on_it(self) -> None:
        """The registry lives in another process, and without it no language rank finds us: its end is our illness."""
        missed = 0
        while not self._stopped.wait(_LOOK_EVERY):
            try:
                look_up(self._registry, self._rank.rank, self._key)
                missed = 0
            except RegistryError as error:
                missed += 1
                if missed == _MOST_MISSED:
                    self._give_up(f"the bootstrap registry is gone: {error}")
                    return
