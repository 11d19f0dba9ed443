"""The manager of a language rank that receives nothing: it reads the rows which another rank of its host receives."""

from __future__ import annotations

import threading

from embedding_relay.config import RelayConfig
from embedding_relay.memory.buffers import ReceivedRows
from embedding_relay.memory.checks import ModelLimits
from embedding_relay.memory.shared_rows import Borrower
from embedding_relay.observer import Observer
from embedding_relay.protocol.errors import CLIENT_GONE, UNAVAILABLE, Failure
from embedding_relay.protocol.status import Status
from embedding_relay.transport.language import MooncakeEmbeddingReceiver
from embedding_relay.transport.manager import Manager, StatusBoard


class BorrowingManager(Manager):
    """No control thread, pool or peer: a room ends well when the other rank says so, and badly when it is cancelled.

    How a room fails is found out by the rank that receives, and decided by the first rank of the instance. Rooms are
    asked for in the order of their numbers, on every rank.
    """

    def __init__(self, borrower: Borrower, config: RelayConfig, limits: ModelLimits, observer: Observer) -> None:
        super().__init__(config, StatusBoard(), observer)
        self.limits = limits
        self._borrower = borrower
        self._lock = threading.Lock()
        self._asked: dict[int, MooncakeEmbeddingReceiver] = {}
        self._early: dict[int, ReceivedRows] = {}
        """What is here before the request: the other rank was told of it sooner."""
        self._next_number = 0

    def start(self) -> None:
        self._board.wakeup.open()
        self._borrower.start(self._rows_are_here, self._end_all)

    def close(self) -> None:
        self._borrower.close()
        self._board.fail_all(Failure(UNAVAILABLE, "this instance is stopping"))
        self._board.wakeup.close()
        self._early.clear()

    def _end_all(self, reason: str) -> None:
        self.report_unhealthy(reason)
        self._board.fail_all(Failure(UNAVAILABLE, reason))

    # ---- the scheduler's thread

    def request(self, receiver: MooncakeEmbeddingReceiver, hint_rows: int | None) -> None:
        if receiver.number is None:
            return
        with self._lock:
            self._next_number = receiver.number + 1
            rows = self._early.pop(receiver.number, None)
            # One that was never asked for, because its room was another's, never will be.
            self._early = {number: early for number, early in self._early.items() if number > receiver.number}
            if rows is None:
                self._asked[receiver.number] = receiver
        if rows is not None:
            self._succeed(receiver, rows)

    def cancel(self, room: int, failure: Failure | None) -> None:
        with self._lock:
            self._asked = {number: one for number, one in self._asked.items() if one.room != room}
        self.update_status(room, Status.FAILED, failure or Failure(CLIENT_GONE, "the request was aborted"))

    def forget_rows(self) -> None:
        """The other rank keeps them."""

    # ---- the borrower's thread

    def _rows_are_here(self, number: int, rows: ReceivedRows) -> None:
        with self._lock:
            receiver = self._asked.pop(number, None)
            if receiver is None and number >= self._next_number:
                self._early[number] = rows
        if receiver is not None:  # else its request has ended, and they go back at once
            self._succeed(receiver, rows)

    def _succeed(self, receiver: MooncakeEmbeddingReceiver, rows: ReceivedRows) -> None:
        receiver.target = rows
        self.update_status(receiver.room, Status.SUCCESS)
