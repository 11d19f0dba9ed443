"""Rows of the simulated ranks: those that an encode rank has made so far, and those that a language rank keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from embedding_relay.protocol.effects import ChunkDestination
from embedding_relay.protocol.messages import Item, StatusReport
from embedding_relay.protocol.plan import Range
from embedding_relay.testing.watch import COLUMNS, EMBEDDINGS, Truth, Violation

_WIDTH = COLUMNS[EMBEDDINGS].bytes_per_row
_NOT_MADE = b"\xee"


class MadeRows:
    """The embeddings of one room at an encode rank. Rows that are not made are there too, and wrong."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.ready = 0
        self.absent: set[int] = set()
        self.columns = list(truth.columns)
        self.columns[EMBEDDINGS] = _NOT_MADE * (truth.total * _WIDTH)

    def make(self, ready: int, held: Iterable[int]) -> None:
        """All before `ready`, but for items that need not be made and of which nothing is."""
        items = self.truth.items
        self.absent.update(index for index in held if items[index].runs[0][0] >= self.ready)
        embeddings = bytearray(self.columns[EMBEDDINGS])
        made = slice(self.ready * _WIDTH, ready * _WIDTH)
        embeddings[made] = self.truth.columns[EMBEDDINGS][made]
        for start, stop in (run for index in self.absent for run in items[index].runs):
            embeddings[start * _WIDTH : stop * _WIDTH] = _NOT_MADE * ((stop - start) * _WIDTH)
        self.ready, self.columns[EMBEDDINGS] = ready, bytes(embeddings)


class WrittenRows:
    """Which media rows an encode rank has written to one destination: none that it says are held, and all others."""

    def __init__(self, truth: Truth) -> None:
        self._media = {row for start, stop in truth.media_runs for row in range(start, stop)}
        self._written: set[int] = set()

    def note(self, ranges: Iterable[Range], destination: ChunkDestination, block_size: int) -> None:
        for one in ranges:
            if one.column == EMBEDDINGS:
                first, rows = one.destination // _WIDTH, one.length // _WIDTH
                for place in range(first, first + rows):
                    block, offset = divmod(place, block_size)
                    index = destination.blocks.index(block)
                    self._written.add(destination.first_row + index * block_size + offset)

    def check(self, report: StatusReport) -> None:
        if report.rows is None:
            return
        held = {row for item in report.held for start, stop in item.runs for row in range(start, stop)}
        if both := held & self._written:
            raise Violation(f"held: rows {sorted(both)} of room {report.room} are said to be held, and were written")
        if neither := {row for row in self._media if row < report.rows} - held - self._written:
            raise Violation(f"held: rows {sorted(neither)} of room {report.room} are neither held nor written")


class KeptRows:
    """The row cache of a language rank, without bounds: a test evicts what it likes."""

    def __init__(self) -> None:
        self._rows: dict[str, bytes] = {}
        self._pins: dict[int, set[str]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def keys(self) -> list[str]:
        return list(self._rows)

    def put(self, items: Iterable[Item], embeddings: bytes | bytearray) -> None:
        for item in items:
            if item.key:
                parts = [embeddings[start * _WIDTH : stop * _WIDTH] for start, stop in item.runs]
                self._rows.setdefault(item.key, bytes(b"".join(parts)))

    def pin(self, room: int, keys: Iterable[str]) -> list[str]:
        found = [key for key in keys if key in self._rows]
        if found:
            self._pins.setdefault(room, set()).update(found)
        return found

    def unpin(self, room: int) -> None:
        self._pins.pop(room, None)

    @property
    def pinned(self) -> dict[int, set[str]]:
        return self._pins

    def evict(self, which: int) -> None:
        pinned = set().union(*self._pins.values())
        if free := [key for key in self._rows if key not in pinned]:
            del self._rows[free[which % len(free)]]

    def fill(self, embeddings: bytearray, held: Sequence[Item], start: int, stop: int) -> str:
        """Take the rows `[start, stop)` of these items from here. Return what is wrong with them."""
        for item in held:
            rows = self._rows.get(item.key)
            if rows is None:
                raise Violation(f"held: the rows of an item were promised, and are gone: {item.key}")
            if len(rows) != item.rows * _WIDTH:
                return f"an item has {item.rows} rows, and {len(rows) // _WIDTH} are kept"
            at = 0
            for first, last in item.runs:
                begin, end = max(first, start), min(last, stop)
                if begin < end:
                    skipped = at + begin - first
                    part = rows[skipped * _WIDTH : (skipped + end - begin) * _WIDTH]
                    embeddings[begin * _WIDTH : end * _WIDTH] = part
                at += last - first
        return ""
