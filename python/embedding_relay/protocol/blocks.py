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
        self._starts = [0]  # of the free runs, sorted
        self._lengths = {0: count}
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
        for block in self._checked(blocks, owner):
            del self._owners[block]
            self._join(block)

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
        for block in held:
            del self._owners[block]
            self._join(block)
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
        """The smallest run that has n blocks; if none has, all of the longest."""
        fitting = [start for start in self._starts if self._lengths[start] >= n]
        if fitting:
            return min(fitting, key=lambda start: (self._lengths[start], start)), n
        longest = max(self._starts, key=lambda start: self._lengths[start])
        return longest, self._lengths[longest]

    def _cut(self, start: int, length: int) -> None:
        """Take `length` blocks off the front of the free run at `start`."""
        rest = self._lengths.pop(start) - length
        at = bisect.bisect_left(self._starts, start)
        if rest:
            self._starts[at] = start + length
            self._lengths[start + length] = rest
        else:
            del self._starts[at]

    def _join(self, block: int) -> None:
        """Add one block to the free runs, closing the gap between its neighbours."""
        at = bisect.bisect_left(self._starts, block)
        start, length = block, 1
        if at < len(self._starts) and self._starts[at] == block + 1:
            length += self._lengths.pop(self._starts.pop(at))
        if at and self._starts[at - 1] + self._lengths[self._starts[at - 1]] == block:
            start = self._starts[at - 1]
            length += self._lengths[start]
        else:
            self._starts.insert(at, start)
        self._lengths[start] = length
