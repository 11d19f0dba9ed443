"""Rows of pictures that a language rank keeps, so that a picture that comes again need not be encoded or sent again.

In blocks of equal size that are taken once and used again and again: a fresh page of memory costs more than a copy into
it, and no pattern of small and large pictures leaves gaps that nothing fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES: Final = 128 << 10
_GROWTH_BYTES: Final = 16 << 20
"""The cache takes memory in such portions, as it fills."""
_MOST_SOURCES: Final = 16384

_Rows = NDArray[np.uint8]
"""A line of bytes for each row."""


class HeldRows(NamedTuple):
    """Rows `[start, stop)` of a request that did not travel: they are here already, from an earlier one."""

    start: int
    stop: int
    read: Callable[[int, NDArray[Any]], None]
    """Puts rows, from a row of the request on, into an array that has the bytes of a row in each line."""


@dataclasses.dataclass(eq=False)
class KeptRows:
    """The rows of one item. Whoever has them pinned may read them from any thread."""

    rows: int
    blocks: Sequence[_Rows]
    pins: int = 0
    is_findable: bool = True

    def read(self, row: int, into: NDArray[Any]) -> None:
        """As many rows as `into` has lines, from `row` on."""
        done, size = 0, len(self.blocks[0])
        while done < len(into):
            index, first = divmod(row + done, size)
            part = self.blocks[index][first : first + len(into) - done]
            into[done : done + len(part)] = part
            done += len(part)


class RowCache:
    """The least recently used rows go first, and never those that a room has pinned. Belongs to one thread."""

    def __init__(self, max_bytes: int, row_bytes: int) -> None:
        self._shape = (max(1, _BLOCK_BYTES // row_bytes), row_bytes)
        self._untaken = max_bytes // (self._shape[0] * row_bytes)
        """Blocks for which no memory has been taken yet."""
        self._blocks = self._untaken
        self._free: list[_Rows] = []
        self._items: dict[str, KeptRows] = {}  # the longest unused first
        self._pinned: dict[int, dict[str, KeptRows]] = {}
        self._pinned_blocks = 0
        self._sources: dict[str, str] = {}
        self.evictions = 0

    @property
    def can_keep(self) -> bool:
        """There is memory for anything at all."""
        return self._blocks > 0

    @property
    def bytes(self) -> int:
        """Of the blocks that hold rows."""
        used = self._blocks - self._untaken - len(self._free)
        return used * self._shape[0] * self._shape[1]

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: str) -> bool:
        return key in self._items

    # ---- what rooms need

    def pin(self, room: int, keys: Iterable[str]) -> tuple[str, ...]:
        """Keep what is here of these until `unpin`. Returns those that the room had not pinned before."""
        mine = self._pinned.setdefault(room, {})
        found = [key for key in dict.fromkeys(keys) if key in self._items and key not in mine]
        for key in found:
            rows = mine[key] = self._used(key)
            rows.pins += 1
            if rows.pins == 1:
                self._pinned_blocks += len(rows.blocks)
        if not mine:
            del self._pinned[room]
        return tuple(found)

    def held(self, room: int, key: str) -> KeptRows | None:
        """What the room has pinned by this key."""
        return self._pinned.get(room, {}).get(key)

    def unpin(self, room: int) -> None:
        for rows in self._pinned.pop(room, {}).values():
            rows.pins -= 1
            if not rows.pins:
                self._pinned_blocks -= len(rows.blocks)
                if not rows.is_findable:
                    self._free.extend(rows.blocks)

    # ---- what is kept

    def put(self, key: str, runs: Sequence[_Rows]) -> bool:
        """Keep a copy of rows that lie in these pieces, in order; False if there is no space for them."""
        if key in self._items:
            self._used(key)
            return True
        rows = sum(map(len, runs))
        blocks = self._take(-(-rows // self._shape[0]))
        if not blocks:
            return False
        _fill(blocks, runs)
        self._items[key] = KeptRows(rows, blocks)
        return True

    def clear(self) -> None:
        """Nobody finds any of it any more. The memory stays, for what comes next."""
        for key in list(self._items):
            self._let_go(key)
        self._sources.clear()

    def _used(self, key: str) -> KeptRows:
        rows = self._items[key] = self._items.pop(key)
        return rows

    def _take(self, count: int) -> list[_Rows]:
        """So many blocks, or none: nothing is evicted for what does not fit anyway."""
        if not 0 < count <= self._blocks - self._pinned_blocks:
            return []
        missing, victims = count - len(self._free) - self._untaken, []
        for key, rows in self._items.items():
            if missing <= 0:
                break
            if not rows.pins:
                victims.append(key)
                missing -= len(rows.blocks)
        for key in victims:
            self._let_go(key)
        self.evictions += len(victims)
        while len(self._free) < count:
            self._grow()
        taken = self._free[-count:]  # those that were used last, which a processor may still have in its cache
        del self._free[-count:]
        return taken

    def _grow(self) -> None:
        size, row_bytes = self._shape
        count = min(self._untaken, max(1, _GROWTH_BYTES // (size * row_bytes)))
        self._free[:0] = np.empty((count, size, row_bytes), dtype=np.uint8)
        self._untaken -= count

    def _let_go(self, key: str) -> None:
        rows = self._items.pop(key)
        rows.is_findable = False
        if not rows.pins:
            self._free.extend(rows.blocks)

    # ---- by what clients call a picture

    def remember(self, source: str, key: str) -> None:
        """What a client calls so was this item. The next time it may be another one: this is a guess, and no more."""
        self._sources.pop(source, None)
        self._sources[source] = key
        if len(self._sources) > _MOST_SOURCES:
            del self._sources[next(iter(self._sources))]

    def guess(self, sources: Iterable[str]) -> list[str]:
        return [self._sources[source] for source in sources if source in self._sources]


def _fill(blocks: Sequence[_Rows], runs: Sequence[_Rows]) -> None:
    at, size = 0, len(blocks[0])
    for run in runs:
        done = 0
        while done < len(run):
            index, first = divmod(at, size)
            part = run[done : done + size - first]
            blocks[index][first : first + len(part)] = part
            done, at = done + len(part), at + len(part)
