"""Pictures that come again: what a language rank keeps of the rows of a room, and finds there for the next one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from embedding_relay.available_memory import available_bytes
from embedding_relay.memory.row_cache import HeldRows, KeptRows, RowCache
from embedding_relay.protocol.messages import Item

if TYPE_CHECKING:
    from embedding_relay.memory.buffers import ReceivedRows

# Of the memory that is free at start. An instance has others beside it, and SGLang's own caches in front of it.
_PART: Final = 16
_MOST_BYTES: Final = 4 << 30


def default_bytes() -> int:
    return min(available_bytes() // _PART, _MOST_BYTES)


@dataclasses.dataclass
class _Room:
    sources: Sequence[str]
    """What the client calls each of its pictures; empty where nobody can tell which is which item."""
    items: tuple[Item, ...] = ()
    filled: dict[tuple[tuple[int, int], ...], Item] = dataclasses.field(default_factory=dict)
    """Items whose rows came from here, by their rows."""
    may_keep: bool = True


class Flaw(Exception):
    """Why rows that are said to be kept here cannot be those of the room, as a part of a sentence."""


class Repeats:
    """Belongs to the control thread. A room has what it was told it has, until it is over."""

    def __init__(self, max_bytes: int, row_bytes: int) -> None:
        self._cache = RowCache(max_bytes, row_bytes)
        self.can_keep = self._cache.can_keep
        self._row_bytes = row_bytes
        self._rooms: dict[int, _Room] = {}
        self._hits = self._misses = self._saved = 0

    # ---- a room, from its beginning to its end

    def begin(self, room: int, sources: Sequence[str] = ()) -> tuple[str, ...]:
        """The keys that its items may have, as far as the client's pictures have come before by these names."""
        self._rooms[room] = _Room(sources)
        return self._cache.pin(room, self._cache.guess(sources))

    def look_up(self, room: int, items: tuple[Item, ...]) -> tuple[str, ...]:
        """The keys of these items of its that are here, but for those that it was told before."""
        if (known := self._rooms.get(room)) is None:
            return ()
        known.items = items
        return self._cache.pin(room, (item.key for item in items if item.key))

    def held_rows(self, room: int, items: Iterable[Item]) -> list[HeldRows]:
        """Where the rows of items are that did not travel; raises Flaw."""
        held = []
        for item in items:
            kept = self._cache.held(room, item.key)
            if kept is None or kept.rows != item.rows:
                here = "none" if kept is None else kept.rows
                raise Flaw(f"{item.rows} rows of an item were left out because they are kept here, but {here} are")
            self._rooms[room].filled[item.runs] = item
            before = 0
            for start, stop in item.runs:
                held.append(HeldRows(start, stop, functools.partial(_read, kept, before - start)))
                before += stop - start
        return held

    def filled_rows(self, room: int) -> int:
        known = self._rooms.get(room)
        return sum(item.rows for item in known.filled.values()) if known else 0

    def end(self, room: int, rows: ReceivedRows | None = None) -> None:
        """The room is over. `rows`: all of its rows, if it has ended well."""
        known = self._rooms.pop(room, None)
        if known is not None and rows is not None:
            self._count(known)
            if known.may_keep:
                self._keep(known, rows)
        self._cache.unpin(room)

    def forget(self) -> None:
        """What is kept, and what is under way: both were made before this."""
        self._cache.clear()
        for known in self._rooms.values():
            known.may_keep = False

    def _count(self, known: _Room) -> None:
        rows = sum(item.rows for item in known.filled.values())
        self._hits += len(known.filled)
        self._saved += rows * self._row_bytes
        self._misses += sum(1 for item in known.items if item.key and item.runs not in known.filled)

    def _keep(self, known: _Room, rows: ReceivedRows) -> None:
        """Only what is told of items in the same way twice: beforehand, and row by row."""
        column, lines = rows.items[:, 0].numpy(), rows.embedding_bytes
        sizes = np.bincount(column[column >= 0])
        for item in known.items:
            if item.key and item.runs not in known.filled and _is_item(item, column, sizes):
                self._cache.put(item.key, [lines[start:stop] for start, stop in item.runs])
        if len(known.sources) == len(known.items):
            for source, item in zip(known.sources, known.items, strict=True):
                if source and item.key:
                    self._cache.remember(source, item.key)

    # ---- numbers

    def sizes(self) -> dict[str, int]:
        return {"row_cache_items": len(self._cache), "row_cache_bytes": self._cache.bytes}

    def totals(self) -> dict[str, int]:
        return {
            "row_cache_hits": self._hits,
            "row_cache_misses": self._misses,
            "row_cache_saved": self._saved,
            "row_cache_evictions": self._cache.evictions,
        }


def _read(kept: KeptRows, shift: int, row: int, into: NDArray[Any]) -> None:
    kept.read(row + shift, into)


def _is_item(item: Item, column: NDArray[np.int32], sizes: NDArray[np.int64]) -> bool:
    """The rows of this item are those of one number in the column, all of them."""
    if item.runs[-1][1] > len(column) or (number := int(column[item.runs[0][0]])) < 0:
        return False
    return int(sizes[number]) == item.rows and all((column[start:stop] == number).all() for start, stop in item.runs)
