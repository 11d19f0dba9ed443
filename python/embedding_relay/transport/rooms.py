"""What the scheduler holds of a room: a sender on the encode side, a receiver on the language side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedding_relay.memory.buffers import ReceivedRows, SourceRows
from embedding_relay.protocol.errors import Failure, LocalError
from embedding_relay.protocol.messages import TransferEmbeddingInfo
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.transport.board import Notice

if TYPE_CHECKING:
    from embedding_relay.transport.manager import MooncakeEmbeddingManager


class MooncakeEmbeddingSender:
    """The encode scheduler's end of one room."""

    def __init__(self, manager: MooncakeEmbeddingManager, room: int) -> None:
        self.room = room
        self._manager = manager
        self._notice = Notice()
        self._is_ours = True

    def init(self) -> None:
        """This instance's half of the request has arrived."""
        self._notice, self._is_ours = self._manager.follow(self.room)
        if self._is_ours:
            self._manager.sending.expect(self.room)

    def send_embedding(self, source: SourceRows) -> None:
        """The rows are there (or will be, when `source.ready` says so). Sending them twice is sending them once."""
        if self._is_ours:
            self._manager.send_embedding(self.room, source)

    def refuse(self, failure: Failure) -> None:
        """No rows will come: the language side hears it at once, or as soon as it asks."""
        if self._is_ours:
            self._manager.sending.refuse(self.room, failure)

    def poll(self) -> Status:
        return self._notice.status

    def failure(self) -> Failure | None:
        return self._notice.failure


class MooncakeEmbeddingReceiver:
    """The language scheduler's end of one room."""

    def __init__(self, manager: MooncakeEmbeddingManager, bootstrap_addr: str, room: int) -> None:
        self.room = room
        self.bootstrap_addr = bootstrap_addr
        self.rounds = 0
        self._manager = manager
        self._notice = Notice()
        self._is_ours = False
        self._rows: ReceivedRows | None = None

    def start(self, hint_rows: int | None = None) -> None:
        """Ask for the rows of this room; `hint_rows` is a guess at how many there are."""
        self._notice, self._is_ours = self._manager.follow(self.room)
        if self._is_ours:
            self._manager.receiving.request(self, hint_rows)

    def poll(self) -> Status:
        return self._notice.status

    def failure(self) -> Failure | None:
        return self._notice.failure

    def rows(self) -> ReceivedRows:
        if self._notice.status is not Status.SUCCESS or self._rows is None:
            raise LocalError(f"room {self.room} has no rows: it is {self._notice.status.name}")
        return self._rows

    def abort(self, failure: Failure | None = None) -> None:
        """Nobody wants the rows any more. The encode side stops, and the blocks wait until it says that it has."""
        if self._is_ours and not is_final(self._notice.status):
            self._manager.receiving.cancel(self.room, failure)

    # ---- control thread

    def init(self, embedding_indices: Sequence[int], allocated_tokens: int) -> None:
        """Offer the first blocks."""
        self._offer(embedding_indices, 0, allocated_tokens)

    def resume_transfer(self, embedding_indices: Sequence[int], sent_tokens: int, allocated_tokens: int) -> None:
        """Offer blocks for the rows behind the first `sent_tokens`."""
        self._offer(embedding_indices, sent_tokens, allocated_tokens)

    def _offer(self, indices: Sequence[int], sent: int, allocated: int) -> None:
        manager = self._manager
        manager.receiving.transmit(
            TransferEmbeddingInfo(
                room=self.room,
                endpoint=manager.address.host,
                dst_port=manager.address.port,
                mooncake_session_id=manager.plane.session_id,
                dst_embedding_indices=tuple(indices),
                required_dst_info_num=manager.ranks,
                sent_tokens=sent,
                allocated_tokens=allocated,
            )
        )

    def deliver(self, rows: ReceivedRows, rounds: int) -> None:
        self._rows, self.rounds = rows, rounds
