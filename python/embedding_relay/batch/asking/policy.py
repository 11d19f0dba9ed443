"""How patience is measured out: waits, how many requests may be in flight, and whom an error is blamed on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

# Of the time between two setbacks this much counts: a person may have paused the run, or the endpoint was away.
LONGEST_STEP: Final = 180.0
# So many rows, none of which had met an error before, and no other answer: then it is the endpoint, not the rows.
BLAMED_AFTER: Final = 8


class Backoff:
    """Doubles with every try, up to a limit; a random share of it, so that rows do not come back all at once."""

    def __init__(self, first: float, most: float, dice: Callable[[], float] = random.random) -> None:
        self._first = first
        self._most = most
        self._dice = dice

    def wait(self, tries: int) -> float:
        """`tries` is 1 after the first failure."""
        return self._dice() * min(self._most, self._first * 2.0 ** min(tries - 1, 30))


class Patience:
    """How long something has been going on, told by its setbacks."""

    __slots__ = ("_at", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._at: float | None = None

    def setback(self, now: float) -> None:
        if self._at is not None:
            self.seconds += min(now - self._at, LONGEST_STEP)
        self._at = now


class Window:
    """How many requests may be in flight: halved when the endpoint has too many, one more for each window answered.

    Up to half of what there was before a storm of refusals it grows by one for each answer instead: the endpoint had
    that many, and with slow rows it would take minutes to have them again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = float(most)
        self._quick_below = 0.0
        self._shrunk_at = float("-inf")
        self._shrinking = False

    @property
    def size(self) -> int:
        return int(self._size)

    def answered(self) -> None:
        self._shrinking = False
        if self._size < self._most:
            step = 1.0 if self._size < self._quick_below else 1 / self._size
            self._size = min(self._size + step, self._most)

    def busy(self, asked_at: float, now: float) -> None:
        """What was asked before it last shrank says nothing about its size of now."""
        if asked_at < self._shrunk_at:
            return
        if not self._shrinking:
            self._quick_below = self._size / 2
        self._size = max(1.0, self._size / 2)
        self._shrunk_at = now
        self._shrinking = True


class Blame:
    """Tells an endpoint that has nothing but errors from rows that cause errors.

    A pair that restarts behind its router answers every row with an error for minutes, and that must not cost them
    their retries. But not for ever: an endpoint that never gets well is one that cannot answer these rows.
    """

    def __init__(self, patience: float) -> None:
        self._most = patience
        self.well()

    def well(self) -> None:
        self._rows: set[int] = set()
        self._patience = Patience()

    def error(self, row: int, erred_before: bool, now: float) -> None:
        self._patience.setback(now)
        if not erred_before and len(self._rows) < BLAMED_AFTER:
            self._rows.add(row)

    @property
    def is_on_endpoint(self) -> bool:
        return len(self._rows) >= BLAMED_AFTER and self._patience.seconds < self._most
