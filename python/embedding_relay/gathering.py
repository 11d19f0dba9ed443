"""When a pass of the vision tower that has room for more begins: at once, or when those are here that are on their way.

Small requests that share a pass share most of what it costs, and are handed over together: so the language model too
takes them in one pass. What waiting costs is time of the first of them, in which other work has the core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# Of the last pass in what is known of all of them.
_WEIGHT: Final = 0.2

# How long a pass waits for all that come one after the other: as long as one takes, and so many times as long as others
# had the core meanwhile. Where cores are idle a pass that waits is a pass later, and nobody has gained.
_TIMES_WAITED: Final = 6

# And never longer, whatever passes were seen to take.
_LONGEST: Final = 0.2


class Gathering:
    """Waits for each that is on its way as long as a pass takes: that is saved if it comes, and lost if it does not."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._behind = 0
        self._came_at = 0.0
        self._waits_since: float | None = None
        self._took = self._waited = 0.0

    def came(self, behind: int) -> None:
        """A small request is here, and so many that may go with it were being prepared when it left for here."""
        self._behind, self._came_at = behind, self._clock()

    def seconds_left(self) -> float:
        """For how long a pass that could begin now, and has room, waits."""
        if not self._behind:
            return 0.0
        now = self._clock()
        if self._waits_since is None:
            self._waits_since = now
        for_all = min(_LONGEST, self._took + _TIMES_WAITED * self._waited)
        return max(0.0, min(self._came_at + self._took, self._waits_since + for_all) - now)

    def nothing_waits(self) -> None:
        """Any more, because a pass begins, or yet."""
        self._waits_since = None

    def passed(self, took: float, computed: float) -> None:
        """Seconds of a pass of small requests, and those of them in which this thread had a core."""
        weight = _WEIGHT if self._took else 1.0
        self._took += weight * (took - self._took)
        self._waited += weight * (max(0.0, took - computed) - self._waited)
