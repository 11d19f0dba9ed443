"""One room of the encode side: who gets its rows, how far each of them is, and what is to be written next."""

from __future__ import annotations

import dataclasses

from embedding_relay.protocol.effects import ChunkDestination, TransferEmbeddingChunk, Window
from embedding_relay.protocol.errors import BAD_GATEWAY, INTERNAL, UNAVAILABLE, Failure, LocalError
from embedding_relay.protocol.messages import Address, StatusReport, TransferEmbeddingInfo
from embedding_relay.protocol.status import Status, is_final, move
from embedding_relay.protocol.timing import Timing


@dataclasses.dataclass
class Destination:
    """One language rank. Its offer takes rows from `sent` on; without an offer nothing may be written to it."""

    session_id: str
    address: Address
    sent: int = 0
    """Rows that it has been told of."""
    written: int = 0
    """Rows that are in its memory; ahead of `sent` only while a chunk takes several steps."""
    blocks: tuple[int, ...] = ()
    allocated: int = 0
    finished: bool = False

    @property
    def has_offer(self) -> bool:
        return self.allocated > 0

    def waits_for(self, info: TransferEmbeddingInfo) -> bool:
        """No transfer twice: only a resume that goes on exactly where this is, and only if there is no offer yet."""
        return not (self.has_offer or self.finished) and info.is_resume and info.sent_tokens == self.sent

    def offer(self, info: TransferEmbeddingInfo) -> None:
        self.blocks, self.allocated = info.dst_embedding_indices, info.allocated_tokens

    def tokens_to_send(self, total: int) -> int:
        return min(total - self.sent, self.allocated)

    def is_last(self, total: int) -> bool:
        return total - self.sent <= self.allocated

    def goal(self, total: int) -> int:
        """The row at which this chunk ends for it."""
        return self.sent + self.tokens_to_send(total)

    def report(self, room: int, total: int) -> StatusReport:
        """Every row of the chunk is written: use the offer up."""
        self.finished = self.is_last(total)
        self.sent = self.goal(total)
        self.blocks, self.allocated = (), 0
        return StatusReport(room, Status.SUCCESS if self.finished else Status.TRANSFERRING, rows=self.sent)


class SenderRoom:
    """The first chunk and every later one go through the same code: only `sent` differs."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.status = Status.BOOTSTRAPPING
        self.expected = False
        self.asked = False
        """A language rank has said something about it, be it only that it is queued there."""
        self.begin_by = 0.0
        """When both halves of the request must be here."""
        self.queued: dict[str, Address] = {}
        """Sessions that have announced it and offered nothing yet."""
        self.required: int | None = None
        self.total: int | None = None
        self.destinations: dict[str, Destination] = {}
        self.blocks: tuple[int, ...] = ()
        """Of our own pool, from the first write until the end of the room."""
        self.under_way: TransferEmbeddingChunk | None = None
        self.unacknowledged: dict[str, Address] = {}
        """Sessions whose abort waits for the write under way."""
        self._staged = (0, 0)
        self._last_transfer_id = 0

    @property
    def is_over(self) -> bool:
        return is_final(self.status)

    def move(self, wanted: Status) -> None:
        self.status = move(self.status, wanted)

    @property
    def is_complete(self) -> bool:
        """Every rank that was announced has asked."""
        return self.required is not None and len(self.destinations) == self.required

    def has_destination_at(self, address: Address) -> bool:
        return any(destination.address == address for destination in self.destinations.values())

    @property
    def unfinished(self) -> list[Destination]:
        return [destination for destination in self.destinations.values() if not destination.finished]

    @property
    def can_start_chunk(self) -> bool:
        """All of them wait for each other, so that the window of source rows passes over the prompt once."""
        return (
            self.status in (Status.WAITING_FOR_INPUT, Status.TRANSFERRING)
            and self.total is not None
            and self.under_way is None
            and all(destination.has_offer for destination in self.unfinished)
        )

    def begin_step(self, block_size: int) -> TransferEmbeddingChunk | None:
        """The next write of the chunk; None when every destination has the rows that it offered room for."""
        total = self._known_total()
        behind = [d for d in self.unfinished if d.written < d.goal(total)]
        if not behind:
            return None
        stage = not any(self._is_staged(d.written) for d in behind)
        if stage:
            first = min(d.written for d in behind)
            self._staged = (first, min(total, first + len(self.blocks) * block_size))
        first, stop = self._staged
        self._last_transfer_id += 1
        self.under_way = TransferEmbeddingChunk(
            self.room,
            self._last_transfer_id,
            Window(first, stop - first, self.blocks, stage),
            tuple(
                ChunkDestination(d.session_id, d.blocks, d.sent, d.written, min(stop, d.goal(total)), d.written == 0)
                for d in behind
                if self._is_staged(d.written)
            ),
        )
        return self.under_way

    def end_step(self, transfer_id: int) -> TransferEmbeddingChunk:
        """The write is over, however it went."""
        if self.under_way is None or self.under_way.transfer_id != transfer_id:
            raise LocalError(f"room {self.room} has no transfer {transfer_id} under way")
        step, self.under_way = self.under_way, None
        return step

    def note_written(self, step: TransferEmbeddingChunk) -> None:
        for part in step.destinations:
            self.destinations[part.session_id].written = part.stop_row

    def report_chunk(self, destination: Destination) -> StatusReport:
        return destination.report(self.room, self._known_total())

    def needed_blocks(self, block_size: int) -> int:
        return -(-self._known_total() // block_size)

    def disagreement(self, info: TransferEmbeddingInfo) -> Failure | None:
        if self.required in (None, info.required_dst_info_num):
            return None
        counts = f"{self.required} and {info.required_dst_info_num}"
        return Failure(BAD_GATEWAY, f"the ranks of room {self.room} disagree about their number: {counts}")

    def lateness(self, timing: Timing) -> Failure:
        """What the room waited for when its time was up."""
        room, bootstrap, waiting = self.room, f"{timing.bootstrap:g} s", f"{timing.waiting:g} s"
        if not self.expected:
            text = f"the request of room {room} did not reach the encode instance within {bootstrap}"
            return Failure(UNAVAILABLE, text)
        if not self.asked:
            text = f"no language instance has asked for room {room} within {timing.unasked:g} s"
            return Failure(UNAVAILABLE, text)
        if self.required is None:
            text = f"the language side had no receive blocks for room {room} within {bootstrap}"
            return Failure(UNAVAILABLE, text)
        if self.status is Status.BOOTSTRAPPING:
            asked = f"{len(self.destinations)} of {self.required} language ranks"
            return Failure(BAD_GATEWAY, f"only {asked} asked for room {room} within {bootstrap}")
        if self.total is None:
            return Failure(INTERNAL, f"the encoder had no rows for room {room} within {waiting}")
        if self.under_way is not None:
            return Failure(BAD_GATEWAY, f"a write of room {room} did not end within {waiting}")
        if self.can_start_chunk:
            return Failure(UNAVAILABLE, f"no source blocks for room {room} within {waiting}")
        return Failure(BAD_GATEWAY, f"the language side offered no room for more rows of room {room} within {waiting}")

    def _is_staged(self, row: int) -> bool:
        return self._staged[0] <= row < self._staged[1]

    def _known_total(self) -> int:
        if self.total is None:
            raise LocalError(f"room {self.room} has no rows yet")
        return self.total
