"""Tells the registry of an encode instance where its rank listens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from sglang.srt.disaggregation.mooncake.bootstrap_multimodal import EncodeRank, RegistryError, announce
from sglang.srt.disaggregation.multimodal.protocol.messages import Address

_EVERY: Final = 0.5


class Announcer:
    """Tries again until the registry is there: it starts in another process, at the same time."""

    def __init__(self, registry: Address, rank: EncodeRank, patience: float, give_up: Callable[[str], None]) -> None:
        self._registry = registry
        self._rank = rank
        self._patience = patience
        self._give_up = give_up
        self._stopped = threading.Event()
        self._announced = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay-announce", daemon=True)

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
                announce(self._registry, self._rank)
                self._announced.set()
                return
            except RegistryError as error:
                if time.monotonic() > deadline:
                    self._give_up(f"no bootstrap registry within {self._patience:g} s: {error}")
                    return
            if self._stopped.wait(_EVERY):
                return
