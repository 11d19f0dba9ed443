"""What the transfer tells whoever watches it: numbers of the moment, and how each request went."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, Protocol


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

    def __str__(self) -> str:
        """As in the log."""
        sizes = f"rows={self.rows} rounds={self.rounds} bytes={self.bytes}"
        return f"{sizes} wait_ms={self.wait_s * 1000:.1f} transfer_ms={self.transfer_s * 1000:.1f}"


class Observer(Protocol):
    """Called in the thread that is named; none of the calls may wait."""

    def counted(self, numbers: Mapping[str, float]) -> None:
        """Control thread: what `metrics()` says from now on, soon after anything has changed."""

    def succeeded(self, summary: Summary) -> None:
        """Control thread."""

    def parked(self, tables: Mapping[str, int]) -> None:
        """The scheduler's thread, whenever one of its own tables has another size."""


class Nobody:
    def counted(self, numbers: Mapping[str, float]) -> None: ...

    def succeeded(self, summary: Summary) -> None: ...

    def parked(self, tables: Mapping[str, int]) -> None: ...


NOBODY: Final[Observer] = Nobody()
