"""The entry that a bootstrap registry keeps for each encode rank, and its HTTP path: what server and client share."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from embedding_relay.protocol.messages import Address, Handshake, Host, Word

RANKS_PATH: Final = "/relay/ranks"
"""PUT an entry there; GET `/relay/ranks/{rank}` answers with it."""
MAX_RANKS: Final = 4096
MAX_BODY: Final = 64 * 1024


class EncodeRank(msgspec.Struct, frozen=True):
    """Where one encode rank listens and what its buffers are like. A new `instance` is a new process.

    `rank` is a data-parallel one, of `ranks`; of the tensor-parallel ranks in it one sends, and is found here. Which
    rank has a room needs no asking: `rank_of_room`.
    """

    rank: Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
    host: Host
    port: Annotated[int, msgspec.Meta(gt=0, lt=65536)]
    instance: Word
    handshake: Handshake
    ranks: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)] = 1

    @property
    def address(self) -> Address:
        return Address(self.host, self.port)


def name_of_rank(registry: Address, rank: int) -> str:
    """What language ranks call an encode rank: its registry, and which of those that it knows."""
    return f"{registry}#{rank}" if rank else str(registry)
