"""The faults of a soak: the encode scheduler stands still for a while, and what this excuses."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Final


class Disturbances:
    """When the encode instance stood still for too long. Requests of that time may be told so."""

    # A request that comes right after may still meet the last of it.
    AFTERWARDS: Final = 3.0

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        with self._lock:
            self._spans.append((time.monotonic(), float("inf")))
        try:
            yield
        finally:
            with self._lock:
                self._spans[-1] = (self._spans[-1][0], time.monotonic() + self.AFTERWARDS)

    def met(self, began: float) -> bool:
        """Whether a request that began then, and has ended now, may have met one."""
        with self._lock:
            return any(began <= until for _, until in self._spans)


class Freezer:
    """Stops a process and lets it go on, in turn for less and for more than its heartbeats allow."""

    def __init__(self, pid: int, silence: float, disturbances: Disturbances, dice: random.Random) -> None:
        self.freezes: collections.Counter[str] = collections.Counter()
        self._pid = pid
        self._silence = silence
        self._disturbances = disturbances
        self._dice = dice
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Freezer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The process goes on, whatever has happened."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._dice.uniform(4.0, 12.0)):
            self._freeze("short", self._dice.uniform(0.1, self._silence / 3), contextlib.nullcontext())
            if self._over.wait(self._dice.uniform(4.0, 12.0)):
                return
            self._freeze("long", self._silence + self._dice.uniform(1.0, 4.0), self._disturbances.span())

    def _freeze(self, kind: str, seconds: float, span: contextlib.AbstractContextManager[None]) -> None:
        with span:
            os.kill(self._pid, signal.SIGSTOP)
            try:
                self._over.wait(seconds)
            finally:
                os.kill(self._pid, signal.SIGCONT)
        self.freezes[kind] += 1
