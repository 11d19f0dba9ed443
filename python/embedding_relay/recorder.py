"""The moments of recent requests, kept in memory, so that somebody can see later where the time of one of them went."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

# ---- what happens to a request: on either half, ...
RECEIVED: Final = "received"
"""By the HTTP process."""
PREPARED: Final = "prepared"
"""Prompt (and on the encode half the media) processed, and sent to the scheduler."""
PARKED: Final = "parked"
"""From here on the transfer knows of it."""
FAILED: Final = "failed"
ANSWERED: Final = "answered"
# ---- ... on the encode half, ...
ASKED: Final = "asked"
"""An offer of blocks has come, for rows from `first_row` on."""
TOWER_BEGAN: Final = "tower began"
TOWER_ENDED: Final = "tower ended"
CHUNK_BEGAN: Final = "chunk began"
CHUNK_WRITTEN: Final = "chunk written"
SENT: Final = "sent"
"""All rows."""
# ---- ... and on the language half.
OFFERED: Final = "offered"
"""Blocks, for rows from `first_row` on; a resume if that is not the first."""
COPY_BEGAN: Final = "copy began"
"""The report of the rows has come."""
COPIED: Final = "copied"
PREFIX_BEGAN: Final = "prefix began"
"""SGLang is given the first rows, while others are on their way."""
PREFIX_ENDED: Final = "prefix ended"
COMPLETE: Final = "complete"
HANDED_OVER: Final = "handed over"
PREFILL_BEGAN: Final = "prefill began"
PREFILL_ENDED: Final = "prefill ended"
FIRST_TOKEN: Final = "first token"

MOST_ROUNDS: Final = 64
"""So many rounds of a request are noted one by one: a request of thousands must not push out all others."""
_LONGEST_TEXT: Final = 300
_MOST_FOLLOWED: Final = 1024


class Moment(msgspec.Struct, frozen=True, array_like=True):
    """`at` is in seconds, by the monotonic clock of the machine. What has no meaning for a moment is 0 or empty."""

    at: float
    what: str
    first_row: int = 0
    rows: int = 0
    bytes: int = 0
    rounds: int = 0
    text: str = ""


class Recorder:
    """What one process knows of its recent requests. Any thread may note, and any thread may read.

    One ring for all requests: to note something is to append a tuple, which takes no lock.
    """

    def __init__(self, most: int) -> None:
        """It keeps so many moments; with 0 it notes nothing."""
        self._ring: collections.deque[tuple[int, Moment]] = collections.deque(maxlen=most)
        self._followed: dict[int, Callable[[], Iterable[Moment]]] = {}

    @property
    def is_on(self) -> bool:
        return self._ring.maxlen != 0

    def note(
        self,
        room: int,
        what: str,
        at: float | None = None,
        *,
        first_row: int = 0,
        rows: int = 0,
        size: int = 0,
        rounds: int = 0,
        text: str = "",
    ) -> None:
        """`size` in bytes."""
        if self._ring.maxlen:
            at = time.monotonic() if at is None else at
            self._ring.append((room, Moment(at, what, first_row, rows, size, rounds, text[:_LONGEST_TEXT])))

    def follow(self, room: int, read: Callable[[], Iterable[Moment]]) -> None:
        """Others note when things happen to this room: `read` is called whenever somebody wants to know.

        For one thread of a process. The first one for a room counts, until many others have come.
        """
        if not self._ring.maxlen or room in self._followed:
            return
        self._followed[room] = read
        if len(self._followed) > _MOST_FOLLOWED:
            del self._followed[next(iter(self._followed))]

    def moments(self, room: int) -> list[Moment]:
        """In order of time."""
        found = [moment for of_room, moment in self._copy() if of_room == room]
        if (read := self._followed.get(room)) is not None:
            found += read()
        return sorted(found, key=lambda moment: moment.at)

    def latest(self, most: int) -> list[tuple[int, float]]:
        """The rooms whose first moment is latest, with that moment; the latest first."""
        began: dict[int, float] = {}
        for room, read in list(self._followed.items()):
            for moment in read():
                began[room] = min(moment.at, began.get(room, moment.at))
        for room, moment in self._copy():
            began[room] = min(moment.at, began.get(room, moment.at))
        return sorted(began.items(), key=lambda item: item[1], reverse=True)[:most]

    def _copy(self) -> Sequence[tuple[int, Moment]]:
        return self._ring.copy()  # at once, for all other threads: it runs no Python code
