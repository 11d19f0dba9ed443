"""The status of a room, and the one table of its legal moves."""

from __future__ import annotations

import enum
from typing import Final

from embedding_relay.protocol.errors import IllegalMove


class Status(enum.Enum):
    """Values are SGLang's `KVPoll`, because they travel; they are names, not an order."""

    FAILED = 0
    BOOTSTRAPPING = 1
    WAITING_FOR_INPUT = 2
    TRANSFERRING = 3
    SUCCESS = 4

    __hash__ = object.__hash__  # there is one object of each; `Enum` calls a function in Python for it


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
