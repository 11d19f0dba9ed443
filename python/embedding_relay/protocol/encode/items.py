"""The items of one room's prompt: which language rank has promised to have them, and what is left out for it."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

from embedding_relay.protocol.errors import LocalError
from embedding_relay.protocol.messages import MAX_ITEMS, Item, Run, flaw_of_items

Decisions = dict[int, bool]
"""Of one destination: whether the item of this index is left out. Made with its first row, and never changed."""

# A promise that nobody expects takes as much memory here as so many blocks on offer.
_BLOCKS_PER_KEY: Final = 4


class PromptItems:
    """Promises may come before the items are known, and from ranks that turn out to have no part in the room."""

    def __init__(self) -> None:
        self.all: tuple[Item, ...] = ()
        self._keys: frozenset[str] | None = None
        """Of the items; None until the request is here."""
        self._runs: list[tuple[int, int, int]] = []
        """(start, stop, item) in the order of rows."""
        self._promised: dict[str, set[str]] = {}
        """Keys, by session."""
        self._held_by_all: set[int] = set()
        """What the encoder has been told, so that it may have made none of these."""

    def expect(self, items: Sequence[Item]) -> None:
        """The request is here. If nothing of it can be kept, or it is too much to tell, it has no items."""
        if len(items) <= MAX_ITEMS and any(item.key for item in items) and not flaw_of_items(items):
            self.all = tuple(items)
        self._keys = frozenset(item.key for item in self.all if item.key)
        self._runs = sorted((*run, index) for index, item in enumerate(self.all) for run in item.runs)
        for promised in self._promised.values():
            promised &= self._keys

    def forget(self) -> None:
        """What was known of the items does not hold any more: all rows are sent, whoever has promised to have them."""
        self.all, self._keys, self._runs = (), frozenset(), []
        self._promised.clear()
        self._held_by_all.clear()

    @property
    def end(self) -> int:
        return self._runs[-1][1] if self._runs else 0

    # ---- promises

    @property
    def sessions(self) -> frozenset[str]:
        """Who has promised anything."""
        return frozenset(self._promised)

    def promise(self, session_id: str, keys: Iterable[str]) -> int:
        """Return what must be accounted for if the room is not expected, in blocks."""
        known = self._promised.setdefault(session_id, set())
        wanted = keys if self._keys is None else self._keys.intersection(keys)
        news = set(wanted) - known
        # No prompt has more items than that.
        known.update(sorted(news)[: MAX_ITEMS - len(known)])
        return len(news) * _BLOCKS_PER_KEY

    def keep_only(self, sessions: Collection[str]) -> None:
        for session_id in self.sessions.difference(sessions):
            del self._promised[session_id]

    def newly_held_by_all(self, destinations: Mapping[str, Decisions]) -> tuple[int, ...]:
        """The items that all of them have, and for none of them are sent; nothing unless these are more than before."""
        promised = [(self._promised.get(session_id, set()), decided) for session_id, decided in destinations.items()]
        held = {
            index
            for index, item in enumerate(self.all)
            if item.key and all(item.key in keys and decided.get(index, True) for keys, decided in promised)
        }
        if held <= self._held_by_all:
            return ()
        self._held_by_all |= held
        return tuple(sorted(self._held_by_all))

    def check_absent(self, absent: Iterable[int]) -> None:
        if not_held := set(absent) - self._held_by_all:
            raise LocalError(f"items {sorted(not_held)[:4]} are absent, and not every destination has promised them")

    # ---- what is left out

    def leave_out(self, session_id: str, decided: Decisions, start: int, stop: int) -> tuple[Run, ...]:
        """Which of the rows `[start, stop)` are not written, now that they are planned for this destination."""
        promised = self._promised.get(session_id, set())
        left_out: list[Run] = []
        for first, last, index in self._among(start, stop):
            if decided.setdefault(index, self.all[index].key in promised):
                left_out.append((max(first, start), min(last, stop)))
        return tuple(left_out)

    def _among(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        at = bisect.bisect_right(self._runs, start, key=lambda run: run[1])
        while at < len(self._runs) and self._runs[at][0] < stop:
            yield self._runs[at]
            at += 1

    def held(self, decided: Decisions) -> tuple[Item, ...]:
        """What a report must name."""
        return tuple(self.all[index] for index in sorted(decided) if decided[index])
