"""Immutable messages of the control plane; `codec.py` turns them into frames and back."""

from __future__ import annotations

import msgspec

from sglang.srt.disaggregation.multimodal.protocol.errors import Failure
from sglang.srt.disaggregation.multimodal.protocol.status import Status

PROTOCOL_VERSION = 1


class Address(msgspec.Struct, frozen=True, order=True):
    """Where a rank listens for control messages."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Handshake(msgspec.Struct, frozen=True):
    """What two instances must agree on before a byte may move. `blocks` bounds the indices; it need not be equal."""

    version: int
    block_size: int
    item_lens: tuple[int, ...]
    dtype: str
    deepstack_rows: int
    blocks: int


class Register(msgspec.Struct, frozen=True):
    """Language rank -> encode rank: who I am, where my buffers are, what they look like."""

    address: Address
    session_id: str
    buffer_pointers: tuple[int, ...]
    handshake: Handshake


class TransferEmbeddingInfo(msgspec.Struct, frozen=True):
    """Language rank -> encode rank: room for rows. `sent_tokens > 0` is what makes it a resume instead of an init."""

    room: int
    endpoint: str
    dst_port: int
    mooncake_session_id: str
    dst_embedding_indices: tuple[int, ...]
    required_dst_info_num: int
    sent_tokens: int = 0
    allocated_tokens: int = 0

    @property
    def is_resume(self) -> bool:
        return self.sent_tokens > 0

    @property
    def address(self) -> Address:
        return Address(self.endpoint, self.dst_port)


class Abort(msgspec.Struct, frozen=True):
    """Language rank -> encode rank: write no more rows of this room, and tell me when that is certain.

    `failure` says why, so that both halves of the request end with the same class of status.
    """

    room: int
    address: Address
    session_id: str
    failure: Failure | None = None


class Ping(msgspec.Struct, frozen=True):
    """Language rank -> encode rank, while rooms are under way: are you there? It also keeps the session alive.

    `instance` is who the sender believes to be there, because the answer carries no other return address.
    """

    address: Address
    session_id: str
    instance: str


class StatusReport(msgspec.Struct, frozen=True):
    """Encode rank -> language rank. `rows` (sent so far) tells a repeated `Transferring` from the next one."""

    room: int
    status: Status
    rows: int | None = None
    failure: Failure | None = None


class AbortAck(msgspec.Struct, frozen=True):
    """Encode rank -> language rank: no write for this room is under way, and none will start."""

    room: int


class Pong(msgspec.Struct, frozen=True):
    """Encode rank -> language rank: the answer to `Ping`. If `instance` is not who was `asked`, that one is dead."""

    instance: str
    asked: str


ToEncode = Register | TransferEmbeddingInfo | Abort | Ping
ToLanguage = StatusReport | AbortAck | Pong
