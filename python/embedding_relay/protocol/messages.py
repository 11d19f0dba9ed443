"""Immutable messages of the control plane; `codec.py` turns them into frames and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

import msgspec

from embedding_relay.protocol.errors import BAD_REQUEST, Failure
from embedding_relay.protocol.status import Status

PROTOCOL_VERSION = 1

MAX_ROOM: Final = (1 << 63) - 1
MAX_BLOCKS: Final = 1 << 20
MAX_COLUMNS: Final = 32
MAX_ROWS: Final = 1 << 40
# Of one request. One that has more takes no part in what is kept at the language side: its rows are all sent.
MAX_ITEMS: Final = 4096
MAX_RUNS: Final = 1 << 15
# Eight integers of a row: its id, three positions, and four that say which item it belongs to.
RECORD_BYTES: Final = 32

# ZMQ takes a text apart when it connects: with `;` in it, a stranger would choose where our connections come from.
HOST: Final = r"[0-9A-Za-z][0-9A-Za-z_.:%-]{0,255}|:[0-9A-Fa-f:.]{1,45}"

# What a stranger may write: numbers that 64 bits hold, and words that a log line can quote.
Host = Annotated[str, msgspec.Meta(pattern=rf"\A(?:{HOST})\Z")]
Word = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,64}\Z")]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
_Blocks = Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]
_MemoryName = Annotated[str, msgspec.Meta(pattern=r"\A(?:[0-9a-f]{32})?\Z")]
_Facts = Annotated[tuple[tuple[Word, Word], ...], msgspec.Meta(max_length=64)]
_Sizes = Annotated[tuple[_Size, ...], msgspec.Meta(min_length=1, max_length=MAX_COLUMNS)]
_ItemKey = Annotated[str, msgspec.Meta(pattern=r"\A(?:[0-9a-f]{32})?\Z")]
_Row = Annotated[int, msgspec.Meta(ge=0, le=MAX_ROWS)]

Run = tuple[int, int]
"""Rows `[start, stop)`."""


def flaw_of_room(room: int) -> Failure | None:
    """Why no message can be about this room, so that the other side would never hear of it."""
    if 0 <= room <= MAX_ROOM:
        return None
    return Failure(BAD_REQUEST, f"room {room} is not from 0 to {MAX_ROOM}")


def rank_of_room(room: int, ranks: int) -> int:
    """Which data-parallel rank of an instance has this room: both halves of a request find it by the number alone."""
    return room % ranks


class Address(msgspec.Struct, frozen=True, order=True):
    """Where a rank listens for control messages."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Handshake(msgspec.Struct, frozen=True, omit_defaults=True):
    """What two instances must agree on before a byte may move. `blocks` bounds the indices; it need not be equal.

    `model`: facts by name that tell one model from another, where rows of both have the same size. `memory`: the name
    of the shared memory that the buffers of a language rank lie in, for encode ranks of its host; empty if in none.
    """

    version: _Count
    block_size: _Size
    item_lens: _Sizes
    dtype: Word
    deepstack_rows: _Count
    blocks: _Blocks
    model: _Facts = ()
    memory: _MemoryName = ""
    takes_progress: bool = False
    """A language rank of another version does not know `Progress`."""
    takes_offer_ahead: bool = False
    """An encode rank of another version ignores an offer as long as it has one."""
    takes_manifest: bool = False
    """A language rank that keeps no rows, or is of another version, has no use for `Manifest`."""
    takes_have: bool = False
    """An encode rank of another version does not know `Have`, and sends all rows."""
    records: tuple[_Size, _Size] | None = None
    """Where a language rank also takes the small columns, side by side in one: its pointer, and bytes per row. Where
    that is another number than ours, or none, they are written apart.
    """

    @property
    def takes_records(self) -> bool:
        return self.records is not None and self.records[1] == RECORD_BYTES


class Item(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A picture, video or sound of a prompt: which rows are its own, in order, and the key under which they are kept.

    Items of equal keys have the same rows. An empty key: these rows cannot be kept, and are always sent.
    """

    key: _ItemKey
    runs: Annotated[tuple[tuple[_Row, _Row], ...], msgspec.Meta(min_length=1, max_length=MAX_RUNS)]

    @property
    def rows(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    def overlaps(self, start: int, stop: int) -> bool:
        return any(first < stop and start < last for first, last in self.runs)


def flaw_of_items(items: Iterable[Item]) -> str:
    """Why these cannot be the items of one prompt; empty if they can. Items need not be in the order of their rows."""
    runs: list[Run] = []
    for item in items:
        if any(last > first for (_, last), (first, _) in zip(item.runs, item.runs[1:], strict=False)):
            return f"runs {item.runs[:4]} are not in order"
        runs += item.runs
    if len(runs) > MAX_RUNS:
        return f"{len(runs)} runs are more than {MAX_RUNS}"
    end = 0
    for start, stop in sorted(runs):
        if start >= stop or start < end:
            return f"rows {start} to {stop} are none, or another item's too"
        end = stop
    return ""


class Register(msgspec.Struct, frozen=True):
    """Language rank -> encode rank: who I am, where my buffers are, what they look like."""

    address: Address
    session_id: str
    buffer_pointers: tuple[int, ...]
    handshake: Handshake


class TransferEmbeddingInfo(msgspec.Struct, frozen=True):
    """Language rank -> encode rank: blocks for rows are on offer. `sent_tokens > 0` makes it a resume, not an init."""

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

    @property
    def session_id(self) -> str:
        return self.mooncake_session_id

    @property
    def identity(self) -> tuple[str, Address, int, int]:
        """Offers of one room that agree in this are the same offer: a rank makes one for every number of rows sent."""
        return self.mooncake_session_id, self.address, self.sent_tokens, self.allocated_tokens


class Queued(msgspec.Struct, frozen=True):
    """Language rank -> encode rank: this room has arrived here, and waits for its first blocks."""

    room: int
    address: Address
    session_id: str


class Abort(msgspec.Struct, frozen=True):
    """Language rank -> encode rank: write no more rows of this room, and tell me when that is certain.

    `failure` says why, so that both halves of the request end with the same class of status.
    """

    room: int
    address: Address
    session_id: str
    failure: Failure | None = None


class Have(msgspec.Struct, frozen=True):
    """Language rank -> encode rank: I have the rows of items with these keys, and keep them until this room is over.

    A promise: it may be repeated and added to, and is never taken back. It may come before the init, and too late.
    """

    room: int
    address: Address
    session_id: str
    keys: tuple[str, ...]


class Ping(msgspec.Struct, frozen=True):
    """Language rank -> encode rank, while rooms are under way: are you there? It also keeps the session alive.

    `instance` is who the sender believes to be there, because the answer carries no other return address.
    """

    address: Address
    session_id: str
    instance: str


class StatusReport(msgspec.Struct, frozen=True):
    """Encode rank -> language rank. `rows` (sent so far) tells a repeated `Transferring` from the next one.

    `held`: the items of which no rows were written, now or before, because this language rank has promised them. They
    count in `rows` like all others.
    """

    room: int
    status: Status
    rows: int | None = None
    failure: Failure | None = None
    held: tuple[Item, ...] = ()


class Manifest(msgspec.Struct, frozen=True):
    """Encode rank -> language rank: these are the items of the room's prompt. The answer, if any, is `Have`.

    Nobody waits for it, so it may be lost. Only for who `takes_manifest`.
    """

    room: int
    items: tuple[Item, ...]


class Progress(msgspec.Struct, frozen=True):
    """Encode rank -> language rank: of the offer that is out, rows before `rows` of the room are in your memory.

    It changes nothing but when they may be copied out, so it may be lost. Only for who `takes_progress`.
    """

    room: int
    rows: int


class AbortAck(msgspec.Struct, frozen=True):
    """Encode rank -> language rank: no write for this room is under way, and none will start."""

    room: int


class Pong(msgspec.Struct, frozen=True):
    """Encode rank -> language rank: the answer to `Ping`. If `instance` is not who was `asked`, that one is dead."""

    instance: str
    asked: str


ToEncode = Register | Queued | TransferEmbeddingInfo | Have | Abort | Ping
ToLanguage = StatusReport | Progress | Manifest | AbortAck | Pong
