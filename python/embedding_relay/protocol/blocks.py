"""The blocks of a pool: who holds which. It hands out numbers; the memory behind them is not its concern."""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterable

from embedding_relay.protocol.errors import LeaseError


class BlockPool:
    """Every block is free, leased to one owner, or in quarantine under that owner's name.

    Runs of neighbours are preferred, because a run is one entry of a transfer and a scattered lease is many.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise LeaseError(f"a pool of {count} blocks")
        self.count = count
        # Of the free runs: in the order of the pool, and of their lengths, so that nobody looks at each of them.
        self._starts: list[int] = []
        self._by_length: list[tuple[int, ...]] = []
        """(length, minus the start)"""
        self._lengths: dict[int, int] = {}
        self._add(0, count)
        self._owners: dict[int, Hashable] = {}
        self._quarantine: dict[Hashable, set[int]] = {}
        self._quarantined = 0

    @property
    def free(self) -> int:
        return self.count - len(self._owners)

    @property
    def leased(self) -> int:
        return len(self._owners) - self._quarantined

    @property
    def quarantined(self) -> int:
        return self._quarantined

    def sizes(self) -> dict[str, int]:
        return {"blocks_free": self.free, "blocks_leased": self.leased, "blocks_quarantined": self.quarantined}

    def owner_of(self, block: int) -> Hashable | None:
        """Whom the block belongs to, leased or in quarantine."""
        return self._owners.get(block)

    def lease(self, n: int, owner: Hashable) -> tuple[int, ...]:
        if not 1 <= n <= self.free:
            raise LeaseError(f"{owner} cannot have {n} of {self.free} free blocks")
        blocks: list[int] = []
        while len(blocks) < n:
            start, length = self._best_run(n - len(blocks))
            blocks.extend(range(start, start + length))
            self._cut(start, length)
        self._owners.update(dict.fromkeys(blocks, owner))
        return tuple(blocks)

    def give_back(self, blocks: Iterable[int], owner: Hashable) -> None:
        self._free(self._checked(blocks, owner))

    def quarantine(self, blocks: Iterable[int], owner: Hashable) -> None:
        """Not free, and not to be given back either: a write may land in them until `release_quarantine`."""
        held = self._checked(blocks, owner)
        self._quarantine.setdefault(owner, set()).update(held)
        self._quarantined += len(held)

    def release_quarantine(self, owner: Hashable) -> int:
        """Free every block that is in quarantine under this name; return how many there were."""
        if owner not in self._quarantine:
            raise LeaseError(f"{owner} has nothing in quarantine")
        held = self._quarantine.pop(owner)
        self._quarantined -= len(held)
        self._free(held)
        return len(held)

    def _checked(self, blocks: Iterable[int], owner: Hashable) -> list[int]:
        """Nothing is changed unless all of it may be changed."""
        held = list(blocks)
        in_quarantine = self._quarantine.get(owner, set())
        for block in held:
            if block not in self._owners or self._owners[block] != owner or block in in_quarantine:
                raise LeaseError(f"{owner} does not hold block {block}")
        if len(set(held)) != len(held):
            raise LeaseError(f"{owner} names a block twice: {held}")
        return held

    def _best_run(self, n: int) -> tuple[int, int]:
        """The smallest run that has n blocks; if none has, all of the longest. Of equal ones the first in the pool."""
        at = bisect.bisect_left(self._by_length, (n,))
        length = self._by_length[at if at < len(self._by_length) else -1][0]
        last = bisect.bisect_right(self._by_length, (length, 1)) - 1
        return -self._by_length[last][1], min(n, length)

    def _cut(self, start: int, length: int) -> None:
        """Take `length` blocks off the front of the free run at `start`."""
        rest = self._remove(start) - length
        if rest:
            self._add(start + length, rest)

    def _free(self, blocks: Iterable[int]) -> None:
        """Neighbours among them at once."""
        start = stop = -1
        for block in sorted(blocks):
            del self._owners[block]
            if block != stop:
                self._join(start, stop)
                start = block
            stop = block + 1
        self._join(start, stop)

    def _join(self, start: int, stop: int) -> None:
        """Add a run to the free ones, closing the gaps to its neighbours."""
        if start == stop:
            return
        if stop in self._lengths:
            stop += self._remove(stop)
        at = bisect.bisect_left(self._starts, start)
        if at and self._starts[at - 1] + self._lengths[self._starts[at - 1]] == start:
            start = self._starts[at - 1]
            self._remove(start)
        self._add(start, stop - start)

    def _add(self, start: int, length: int) -> None:
        bisect.insort(self._starts, start)
        bisect.insort(self._by_length, (length, -start))
        self._lengths[start] = length

    def _remove(self, start: int) -> int:
        """The length of this free run, which is one no longer."""
        length = self._lengths.pop(start)
        del self._starts[bisect.bisect_left(self._starts, start)]
        del self._by_length[bisect.bisect_left(self._by_length, (length, -start))]
        return length
