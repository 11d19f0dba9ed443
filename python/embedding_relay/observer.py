"""What the transfer tells whoever watches it: numbers of the moment, and how each request went."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Final, Protocol

from embedding_relay.protocol.counts import Event


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What one rank counts. A key that is missing from `events` or `failures` is a zero."""

    sizes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of tables and pools, at this moment."""
    totals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of what was moved since the start."""
    events: collections.Counter[Event] = dataclasses.field(default_factory=collections.Counter)
    failures: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Rooms that failed, by the status code that their clients got."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """One half of a request that has succeeded.

    `wait_s` is the wait for receive blocks (language half) or for the tower's rows (encode half); `transfer_s` is the
    rest of that half's time.
    """

    rows: int
    rounds: int
    bytes: int
    wait_s: float
    transfer_s: float
    cached: int = 0
    """Rows that did not travel, because they were kept here."""

    def __str__(self) -> str:
        """As in the log."""
        sizes = f"rows={self.rows} rounds={self.rounds} bytes={self.bytes}"
        times = f"wait_ms={self.wait_s * 1000:.1f} transfer_ms={self.transfer_s * 1000:.1f}"
        return f"{sizes} {times} cached={self.cached}" if self.cached else f"{sizes} {times}"


class Observer(Protocol):
    """Called in the thread that is named; none of the calls may wait."""

    def counted(self, numbers: Numbers) -> None:
        """Control thread: what `metrics()` says from now on, soon after anything has changed."""

    def succeeded(self, summary: Summary) -> None:
        """Control thread."""

    def parked(self, tables: Mapping[str, int]) -> None:
        """The scheduler's thread, whenever one of its own tables has another size."""

    def encoded(self, totals: Mapping[str, float]) -> None:
        """The scheduler's thread of an encode instance, after each batch: what its tower has been asked for so far."""

    def prefilled(self, totals: Mapping[str, float]) -> None:
        """The scheduler's thread of a language instance: what was prefilled so far before all its rows were here."""


class Nobody:
    def counted(self, numbers: Numbers) -> None: ...

    def succeeded(self, summary: Summary) -> None: ...

    def parked(self, tables: Mapping[str, int]) -> None: ...

    def encoded(self, totals: Mapping[str, float]) -> None: ...

    def prefilled(self, totals: Mapping[str, float]) -> None: ...


NOBODY: Final[Observer] = Nobody()
