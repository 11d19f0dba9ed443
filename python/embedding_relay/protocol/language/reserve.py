"""How many rows the language side reserves before it can know how many there will be."""

from __future__ import annotations

import collections
from typing import Final

_UNTIL_LEARNED: Final = 8192
_REMEMBERED: Final = 256
_QUANTILE: Final = 0.9


class DefaultReservation:
    """A fixed number; or with None, what nine of ten recent requests needed, within a fair share of the pool."""

    def __init__(self, fixed: int | None, capacity: int) -> None:
        self._fixed = fixed
        self._capacity = capacity
        self._recent: collections.deque[int] = collections.deque(maxlen=_REMEMBERED)

    def observe(self, total: int) -> None:
        self._recent.append(total)

    def rows(self, rooms: int) -> int:
        """For one of `rooms` requests that share the pool now."""
        if self._fixed is not None:
            return self._fixed
        learned = _UNTIL_LEARNED
        if self._recent:
            ordered = sorted(self._recent)
            learned = ordered[min(len(ordered) - 1, int(len(ordered) * _QUANTILE))]
        return max(1, min(learned, self._capacity // max(1, rooms)))
