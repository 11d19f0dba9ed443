"""What the HTTP process of a language instance notes on a request for its scheduler.

SGLang's messages take no fields of ours. One of its own encoder split, which our modes exclude, is free.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

_MARK: Final = "relay"


class EncodeHalf(msgspec.Struct, frozen=True):
    """Where the rows of a request come from: a room of one rank of an encode instance."""

    host: str | None
    port: int | None
    """Of its registry; None for the port that this instance was started with."""
    room: int
    rank: int = 0


class Note(msgspec.Struct, frozen=True):
    encode_half: EncodeHalf | None = None
    """Chosen by this instance; None if the router has chosen, and says so in the bootstrap fields."""
    wants_prompt_ids: bool = False
    sources: tuple[str, ...] = ()
    """Digests of what the client sent or named as its pictures, videos or sounds, in order, if they are of one kind."""
    items: int = 1
    """How many there are, of all kinds."""
    behind: int = 0
    """Encode: requests no larger than this one that are being prepared."""


def write(tokenized: Any, note: Note) -> None:
    """Over whatever a client has put there."""
    tokenized.encoder_urls = [_MARK, msgspec.json.encode(note).decode()]


def read(recv_req: Any) -> Note:
    """In the scheduler, of a request that waits for rows."""
    match recv_req.encoder_urls:
        case [mark, text] if mark == _MARK:
            return msgspec.json.decode(text, type=Note)
    return Note()


def encode_half(recv_req: Any) -> EncodeHalf:
    noted = read(recv_req).encode_half
    if noted is not None:
        return noted
    return EncodeHalf(
        recv_req.bootstrap_host, recv_req.bootstrap_port, recv_req.bootstrap_room, recv_req.disagg_prefill_dp_rank or 0
    )
