"""The rooms that are over, remembered for a while: how each has ended, and what late messages about it are answered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping

import msgspec

from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.messages import Item
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Timing


class Ending(msgspec.Struct, frozen=True):
    status: Status
    failure: Failure | None
    forget_at: float
    rows: int | None = None
    answered: Mapping[Hashable, tuple[Item, ...]] = {}
    """The offers that were answered with the success of all `rows`, and the items that were said to be held there: they
    get the same answer if they come again.
    """


class EndedRooms:
    """Rooms that are over, remembered for a while, because messages about them may still be on their way.

    Bounded in time and in number; every entry lives equally long, so the oldest is always the first.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        # The first of a plain dict is searched for among all that were taken from its front.
        self._endings: OrderedDict[int, Ending] = OrderedDict()

    def __len__(self) -> int:
        return len(self._endings)

    def fail(self, room: int, failure: Failure, now: float) -> None:
        self._add(room, Ending(Status.FAILED, failure, now + self._timing.remember_ended))

    def succeed(
        self, room: int, now: float, rows: int, answered: Mapping[Hashable, tuple[Item, ...]] | None = None
    ) -> None:
        self._add(room, Ending(Status.SUCCESS, None, now + self._timing.remember_ended, rows, answered or {}))

    def _add(self, room: int, ending: Ending) -> None:
        self._endings.pop(room, None)
        self._endings[room] = ending
        if len(self._endings) > self._timing.max_remembered:
            self._endings.popitem(last=False)

    def get(self, room: int) -> Ending | None:
        return self._endings.get(room)

    def next(self) -> float | None:
        return next((ending.forget_at for ending in self._endings.values()), None)

    def forget_due(self, now: float) -> None:
        while (forget_at := self.next()) is not None and forget_at <= now:
            self._endings.popitem(last=False)
