"""What the scheduler may know of its rooms: the control thread writes it, the scheduler reads it without waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable

from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.transport.wakeup import WakeUp

Publish = Callable[[int, Status, Failure | None], None]


class Notice:
    """The state of one room. It outlives the room's entry on the board for as long as somebody holds it."""

    def __init__(self) -> None:
        self.status = Status.BOOTSTRAPPING
        self.failure: Failure | None = None

    def change(self, status: Status, failure: Failure | None) -> None:
        self.failure = failure  # before the status: whoever sees FAILED finds the reason
        self.status = status


class Board:
    def __init__(self) -> None:
        self._notices: dict[int, Notice] = {}
        self._changed: dict[int, None] = {}
        self._lock = threading.Lock()
        self._closed: Failure | None = None
        self.wakeup = WakeUp()

    def open(self, room: int) -> Notice | None:
        """Begin to follow a room until it ends; None if it is followed already."""
        with self._lock:
            if room in self._notices:
                return None
            notice = self._notices[room] = Notice()
        if self._closed is not None:
            self.change(room, Status.FAILED, self._closed)
        return notice

    def refused(self, room: int, failure: Failure) -> Notice:
        """A notice that begins with its end; the room on the board, if there is one, is somebody else's."""
        notice = Notice()
        notice.change(Status.FAILED, failure)
        with self._lock:
            self._changed[room] = None
        self.wakeup.set()
        return notice

    def change(self, room: int, status: Status, failure: Failure | None = None) -> None:
        """A room that nobody here follows (yet, or any more) is none of the scheduler's business."""
        with self._lock:
            notice = self._notices.get(room)
            if notice is None or (notice.status is status and failure is None):
                return
            notice.change(status, failure)
            if is_final(status):
                del self._notices[room]
            self._changed[room] = None
        self.wakeup.set()

    def get(self, room: int) -> Notice | None:
        return self._notices.get(room)

    def drain(self) -> list[int]:
        """Rooms that changed since the last call."""
        self.wakeup.clear()
        with self._lock:
            rooms = list(self._changed)
            self._changed.clear()
        return rooms

    def fail_all(self, failure: Failure) -> None:
        """Nobody will report anything any more: no poll may wait for it."""
        self._closed = failure
        for room in list(self._notices):
            self.change(room, Status.FAILED, failure)

    def __len__(self) -> int:
        return len(self._notices)
