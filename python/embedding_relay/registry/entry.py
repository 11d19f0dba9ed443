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
    """Where one encode rank listens and what its buffers are like. A new `instance` is a new process."""

    rank: Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
    host: Host
    port: Annotated[int, msgspec.Meta(gt=0, lt=65536)]
    instance: Word
    handshake: Handshake

    @property
    def address(self) -> Address:
        return Address(self.host, self.port)
