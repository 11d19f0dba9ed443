"""How fast rows come to their end, of late."""

from __future__ import annotations

from collections import deque
from typing import Final

SECONDS: Final = 60.0
# With fewer rows than this in a minute the rate looks further back.
ROWS: Final = 8


class Pace:
    """Remembers one moment a second at most, so that its size does not depend on the rows."""

    def __init__(self, now: float) -> None:
        self._rows = 0
        self._moments = deque([(now, 0)])

    def row_ended(self, now: float) -> None:
        self._rows += 1
        if now - self._moments[-1][0] < 1:
            return
        self._moments.append((now, self._rows))
        while len(self._moments) > 1 and now - self._moments[1][0] >= SECONDS and self._since(1) >= ROWS:
            self._moments.popleft()

    def rate(self, now: float) -> float:
        """Rows per second."""
        seconds = now - self._moments[0][0]
        return self._since(0) / seconds if seconds > 0 else 0.0

    def _since(self, moment: int) -> int:
        return self._rows - self._moments[moment][1]
