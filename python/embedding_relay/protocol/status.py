"""The status of a room, the one table of its legal moves, and the rooms that have reached a final one."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Hashable, Set
from typing import Final

import msgspec

from embedding_relay.protocol.errors import Failure, IllegalMove
from embedding_relay.protocol.timing import Timing


class Status(enum.Enum):
    """Values are SGLang's `KVPoll`, because they travel; they are names, not an order."""

    FAILED = 0
    BOOTSTRAPPING = 1
    WAITING_FOR_INPUT = 2
    TRANSFERRING = 3
    SUCCESS = 4


LEGAL_MOVES: Final[dict[Status, frozenset[Status]]] = {
    Status.BOOTSTRAPPING: frozenset({Status.WAITING_FOR_INPUT, Status.FAILED}),
    Status.WAITING_FOR_INPUT: frozenset({Status.TRANSFERRING, Status.SUCCESS, Status.FAILED}),
    Status.TRANSFERRING: frozenset({Status.TRANSFERRING, Status.SUCCESS, Status.FAILED}),
    Status.SUCCESS: frozenset(),
    Status.FAILED: frozenset(),
}


def move(current: Status, wanted: Status) -> Status:
    """Return `wanted` if the table allows the move; raise, never clamp, if it does not."""
    if wanted not in LEGAL_MOVES[current]:
        raise IllegalMove(f"a room cannot go from {current.name} to {wanted.name}")
    return wanted


def is_final(status: Status) -> bool:
    return not LEGAL_MOVES[status]


class Ending(msgspec.Struct, frozen=True):
    status: Status
    failure: Failure | None
    forget_at: float
    rows: int | None = None
    answered: Set[Hashable] = frozenset()
    """The offers that were answered with the success of all `rows`: they get the same answer if they come again."""


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

    def succeed(self, room: int, now: float, rows: int, answered: Set[Hashable] = frozenset()) -> None:
        self._add(room, Ending(Status.SUCCESS, None, now + self._timing.remember_ended, rows, answered))

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
