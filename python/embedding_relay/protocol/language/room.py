"""One room of the language side: the blocks it has on offer, the rows it has, and what a report about it means."""

from __future__ import annotations

import enum
from typing import Final

from embedding_relay.protocol.effects import CopyOut
from embedding_relay.protocol.errors import (
    BAD_GATEWAY,
    BAD_REQUEST,
    INTERNAL,
    UNAVAILABLE,
    Failure,
)
from embedding_relay.protocol.messages import (
    Abort,
    Address,
    Queued,
    Register,
    StatusReport,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status, is_final, move
from embedding_relay.protocol.timing import Timing

_ABORT_DOUBLINGS: Final = 5


class Verdict(enum.Enum):
    """What a status report is, given what the room has had."""

    STALE = enum.auto()
    """A repetition, or of no consequence here."""
    ROWS = enum.auto()
    """The rows on offer have landed."""


class ReceiverRoom:
    def __init__(self, room: int, peer: str, wanted_rows: int) -> None:
        self.room = room
        self.peer = peer
        self.wanted_rows = wanted_rows
        self.status = Status.BOOTSTRAPPING
        self.address: Address | None = None
        """Where the init went; None before."""
        self.instance = ""
        self.blocks: tuple[int, ...] = ()
        self.allocated = 0
        self.received = 0
        self.total: int | None = None
        self.rounds = 0
        self.words = 0
        """First words about it: that it is queued, and its init."""
        self.misdirected = 0
        """Answers that this session is not registered there; each first word may have one."""
        self.copying: StatusReport | None = None
        """The report whose rows are being copied out."""
        self.acknowledged = False
        """No write of this room can land any more."""
        self.failure: Failure | None = None
        self.over_since = 0.0
        self.overdue = False
        self._aborts = 0

    @property
    def is_over(self) -> bool:
        return is_final(self.status)

    @property
    def is_queued(self) -> bool:
        return self.address is None

    def move(self, wanted: Status) -> None:
        self.status = move(self.status, wanted)

    # ---- offers

    def offer(self, blocks: tuple[int, ...], block_size: int, limit: int | None = None) -> None:
        self.blocks = blocks
        self.allocated = len(blocks) * block_size if limit is None else min(limit, len(blocks) * block_size)

    def needed_blocks(self, block_size: int) -> int:
        """For the rows that are still to come; at least one until their number is known."""
        left = 1 if self.total is None else self.total - self.received
        return -(-left // block_size)

    def message(self, register: Register, ranks: int) -> TransferEmbeddingInfo:
        """An init as long as nothing has been received, then a resume."""
        return TransferEmbeddingInfo(
            room=self.room,
            endpoint=register.address.host,
            dst_port=register.address.port,
            mooncake_session_id=register.session_id,
            dst_embedding_indices=self.blocks,
            required_dst_info_num=ranks,
            sent_tokens=self.received,
            allocated_tokens=self.allocated,
        )

    def queued(self, register: Register) -> Queued:
        return Queued(self.room, register.address, register.session_id)

    def abort(self, register: Register) -> Abort:
        return Abort(self.room, register.address, register.session_id, self.failure)

    def next_abort(self, interval: float) -> float:
        """How long to wait for the acknowledgement of the abort that is sent now."""
        self._aborts += 1
        return interval * (1 << min(self._aborts - 1, _ABORT_DOUBLINGS))

    def lateness(self, peer_is_known: bool, timing: Timing) -> Failure:
        """What the room waited for when its time was up."""
        if self.copying is not None:
            return Failure(INTERNAL, f"rows of room {self.room} were not copied within {timing.waiting:g} s")
        if not self.is_queued:
            text = f"encode instance {self.peer} sent no more rows of room {self.room} within {timing.waiting:g} s"
            return Failure(BAD_GATEWAY, text)
        if peer_is_known:
            return Failure(UNAVAILABLE, f"no receive blocks within {timing.bootstrap:g} s")
        text = f"bootstrap registry {self.peer} did not answer within {timing.bootstrap:g} s"
        return Failure(BAD_GATEWAY, text)

    # ---- reports

    def judge(self, report: StatusReport) -> Verdict | Failure:
        """A report either uses up exactly the offer that is out, or is stale, or contradicts the offer."""
        end = self.received + self.allocated
        rows = report.rows
        if report.status not in (Status.TRANSFERRING, Status.SUCCESS):
            return Verdict.STALE
        if rows is not None and rows <= self.received:
            return Verdict.STALE
        if self.copying is not None:
            # The next offer has not been made, so this can only be what is being copied, once more.
            return Verdict.STALE if rows is None or rows <= end else self._contradiction(report)
        if report.status is Status.TRANSFERRING and rows not in (None, end):
            return self._contradiction(report)
        if report.status is Status.SUCCESS and rows is not None and rows > end:
            return self._contradiction(report)
        return Verdict.ROWS

    def _contradiction(self, report: StatusReport) -> Failure:
        offered = f"rows {self.received}..{self.received + self.allocated} were on offer"
        return Failure(BAD_GATEWAY, f"room {self.room} is said to have {report.rows} rows, but {offered}")

    def copy_out(self, report: StatusReport, max_rows: int) -> CopyOut:
        self.copying = report
        self.rounds += 1
        return CopyOut(self.room, self.blocks, self.received, self.allocated, max_rows)

    def account(self, report: StatusReport, rows: int, total: int, max_rows: int) -> Failure | None:
        """Note what was copied out; what does not add up must not reach the model."""
        if total > max_rows:
            return Failure(BAD_REQUEST, f"room {self.room} has {total} rows, more than the {max_rows} that fit")
        if total < 1 or self.total not in (None, total):
            return Failure(BAD_GATEWAY, f"room {self.room} has {total} rows, and {self.total} were announced before")
        self.total = total
        left = total - self.received
        is_last = report.status is Status.SUCCESS
        fits = left <= self.allocated
        if fits is not is_last or (is_last and report.rows not in (None, total)) or rows != min(left, self.allocated):
            said = f"{report.status.name} at row {report.rows}"
            text = f"{said}, but {rows} of {left} rows were in space for {self.allocated}"
            return Failure(BAD_GATEWAY, f"room {self.room} does not add up: {text}")
        self.received += rows
        return None
