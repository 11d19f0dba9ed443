"""What the two sides of the protocol ask for. Data only: the transport, which owns sockets and memory, does it."""

from __future__ import annotations

import msgspec

from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.messages import Address, Item, Run, ToEncode, ToLanguage
from embedding_relay.protocol.status import Status

# ---- both sides


class Send(msgspec.Struct, frozen=True):
    """Put this message on the wire, in order with everything else sent to the same address."""

    to: Address
    message: ToEncode | ToLanguage
    to_stranger: bool = False
    """To somebody who has no request under way here. Anybody can ask for many of these, at invented addresses."""


class StatusChanged(msgspec.Struct, frozen=True):
    """The room has another status; the transport publishes it for `poll()`."""

    room: int
    status: Status
    failure: Failure | None = None


class Note(msgspec.Struct, frozen=True):
    """Something that an operator should find in the log."""

    text: str


# ---- encode side


class Window(msgspec.Struct, frozen=True):
    """Rows `[first_row, first_row + rows)` of a room, in `blocks` of our own pool, row `first_row` at offset 0.

    `stage` says that the rows are not there yet: copy them from the room's source before the write. `apart`: the small
    columns too, each for itself, because some destination of the room takes no records.
    """

    first_row: int
    rows: int
    blocks: tuple[int, ...]
    stage: bool
    apart: bool = True


class ChunkDestination(msgspec.Struct, frozen=True):
    """Rows `[start_row, stop_row)` go into `blocks` of this session, row `first_row` of the room at offset 0.

    `left_out`: rows of them that it has, in order. Like rows of text they have no media columns to be written.
    """

    session_id: str
    blocks: tuple[int, ...]
    first_row: int
    start_row: int
    stop_row: int
    with_aux: bool
    left_out: tuple[Run, ...] = ()


class TransferEmbeddingChunk(msgspec.Struct, frozen=True):
    """One unit of work of the transfer workers; the answer is `EncodeSide.transferred`.

    A room may have two of them with the workers, for the same destinations. They are written in their order to each
    destination, and answered in their order. What a room that is over asked for need not be written.
    """

    room: int
    transfer_id: int
    window: Window
    destinations: tuple[ChunkDestination, ...]


class HeldByAll(msgspec.Struct, frozen=True):
    """Every language rank of the room has promised to have the rows of these items of it, by their index. Nobody needs
    to make them: those that are not made by then can be given to `EncodeSide.submit` or `more_rows` as absent.

    All of them, whenever there are more.
    """

    room: int
    items: tuple[int, ...]


class DropRows(msgspec.Struct, frozen=True):
    """The room is over and no write of it is under way: let go of its source rows."""

    room: int


class ProveGone(msgspec.Struct, frozen=True):
    """Another process claims this session. The answer is `proven`: is the process at `address` known to be gone?"""

    session_id: str
    address: Address


EncodeEffect = Send | StatusChanged | Note | TransferEmbeddingChunk | HeldByAll | DropRows | ProveGone

# ---- language side


class Resolve(msgspec.Struct, frozen=True):
    """Ask the bootstrap registry at `peer` (`host:port`); answer with `peer_resolved` or `peer_unreachable`."""

    peer: str


class ClearAux(msgspec.Struct, frozen=True):
    """Let the aux row of this block say that there are 0 rows. Whoever had the block before has left a length there,
    and with it a report about rows that were never written would add up.
    """

    block: int


class LookUp(msgspec.Struct, frozen=True):
    """The room's prompt has these items. Keep the rows of those whose keys are known here until the room is over, and
    answer with `LanguageSide.holds`, if it is any.
    """

    room: int
    items: tuple[Item, ...]


class CopyOut(msgspec.Struct, frozen=True):
    """Rows landed: copy up to `capacity` of them, from row `first_row` on, out of `blocks`; answer with `copied`.

    When `first_row` is 0 the true length is in the aux row of `blocks[0]`, and the room's tensor is made from it. A
    length that is not in `1..max_rows` came from no correct peer: allocate nothing, and answer with 0 rows.

    `held`: items with rows among these, whose embeddings are not in the blocks but kept here. Take them from there, as
    far as they are among these rows and within the true length; rows of another number than the item has are a flaw.
    """

    room: int
    blocks: tuple[int, ...]
    first_row: int
    capacity: int
    max_rows: int
    held: tuple[Item, ...] = ()


class CopyAhead(msgspec.Struct, frozen=True):
    """Rows before `stop_row` of an offer that is still out have landed: copy them out already, if that is possible now.

    The `CopyOut` that follows names them again, and need not copy them twice. No answer: what goes wrong with them goes
    wrong then. `first_row` is the row of the room at offset 0 of `blocks`; `max_rows` is as for `CopyOut`.
    """

    room: int
    blocks: tuple[int, ...]
    first_row: int
    stop_row: int
    max_rows: int


class Deliver(msgspec.Struct, frozen=True):
    """Every row of the room is in its tensor."""

    room: int
    rows: int
    rounds: int


LanguageEffect = Send | StatusChanged | Note | Resolve | ClearAux | LookUp | CopyAhead | CopyOut | Deliver
