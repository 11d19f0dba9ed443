"""The deadlines of the protocol, and the table of what is due when. Neither reads a clock."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

import msgspec

K = TypeVar("K", bound=Hashable)


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, but for the counts."""

    bootstrap: float = 300.0
    """From the arrival of one half of a request until the other half, its peer and its first block are there."""
    first_word: float = 30.0
    """From the arrival of a request at the encode side until a language rank has said anything about its room."""
    waiting: float = 300.0
    """How long a room may stand still after that."""
    heartbeat_interval: float = 5.0
    heartbeat_max_failures: int = 2
    repeat_interval: float = 1.0
    """Until an unanswered message is sent again for the first time; doubles with each repetition."""
    longest_repeat_interval: float = 16.0
    """What it doubles up to. A lost message costs no more than this."""
    trial: float = 30.0
    """How long a room may be the only one of an encode instance that has not delivered rows yet."""
    quarantine: float = 60.0
    """After this, blocks in quarantine are counted as overdue. They are never freed without proof."""
    remember_ended: float = 600.0
    max_remembered: int = 100_000
    forget_session: float = 3600.0
    max_sessions: int = 4096
    max_unexpected_rooms: int = 10_000
    """Rooms that language ranks have asked for, and of which this instance has not heard otherwise."""
    max_unexpected_blocks: int = 2_000_000
    """All of their offers together."""

    @property
    def unasked(self) -> float:
        """How long a room waits until a language rank says anything about it."""
        return min(self.first_word, self.bootstrap)

    @property
    def silence(self) -> float:
        """How long a peer with rooms under way may say nothing: the last ping that may fail has an interval too."""
        return self.heartbeat_interval * (self.heartbeat_max_failures + 1)

    def until_repeat(self, repetitions: int) -> float:
        """How long a message may be unanswered that has been repeated so many times."""
        doublings = min(repetitions, 32)  # more would be no different, and at last no float
        return min(self.repeat_interval * 2.0**doublings, self.longest_repeat_interval)


class Alarms(Generic[K]):
    """At most one alarm per key. Setting and cancelling are cheap: what was overtaken stays in the heap for a while."""

    def __init__(self) -> None:
        self._at: dict[K, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._ticket = itertools.count()

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, key: K) -> bool:
        return key in self._at

    def set(self, key: K, at: float) -> None:
        # The ticket tells this entry from older ones of the same key, and keeps keys from being compared.
        ticket = next(self._ticket)
        self._at[key] = (at, ticket)
        heapq.heappush(self._heap, (at, ticket, key))
        if len(self._heap) > 64 + 4 * len(self._at):
            self._heap = [(at, ticket, key) for key, (at, ticket) in self._at.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: K) -> None:
        self._at.pop(key, None)

    def next(self) -> float | None:
        self._drop_overtaken()
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> K | None:
        """The first key whose time has come; its alarm is off from here on."""
        self._drop_overtaken()
        if not self._heap or self._heap[0][0] > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._at[key]
        return key

    def _drop_overtaken(self) -> None:
        while self._heap and self._at.get(self._heap[0][2]) != self._heap[0][:2]:
            heapq.heappop(self._heap)
