"""What can go wrong, drawn once.

RelayError
├── LocalError            our own bug: an illegal move, a lease given back twice
│   ├── IllegalMove
│   └── LeaseError
├── RemoteError           the other side's bug or malice: dropped and counted, never raised past the border
│   └── UndecodableFrames
└── SettingError          the operator's: stops the server at start with one line
"""

from __future__ import annotations

from typing import Final

import msgspec


class RelayError(Exception):
    """Anything that this package raises on purpose."""


class LocalError(RelayError):
    """We did something that our own rules forbid."""


class IllegalMove(LocalError):
    """A status move that is not in the table."""


class LeaseError(LocalError):
    """A block was used or given back by someone who does not hold it."""


class RemoteError(RelayError):
    """The other side sent something that no correct peer sends."""


class UndecodableFrames(RemoteError):
    """Frames that are no message of this protocol."""


class SettingError(RelayError):
    """A setting that cannot work; the message names it."""


BAD_REQUEST: Final = 400
CONFLICT: Final = 409  # this room number was used before
MISDIRECTED: Final = 421  # "this session is not registered here": register again, then ask again
CLIENT_GONE: Final = 499
INTERNAL: Final = 500
BAD_GATEWAY: Final = 502
UNAVAILABLE: Final = 503


class Failure(msgspec.Struct, frozen=True):
    """Why a room failed: an HTTP status class for the client, and a sentence."""

    code: int
    text: str

    def __str__(self) -> str:
        return f"{self.code} {self.text}"


def not_registered(session_id: str) -> Failure:
    """The answer of an encode rank that does not know the session: register, then ask again."""
    return Failure(MISDIRECTED, f"session {session_id} is not registered here")
