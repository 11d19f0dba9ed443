"""One rank of the transfer as its scheduler sees it: a manager, its rooms, and the thread that works for them.

`encode.py` and `language.py` have the two kinds of manager. The scheduler asks and polls, and never waits; the control
thread owns the protocol core and everything else here.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import logging
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from embedding_relay.config import AUTO, MOONCAKE, SECRET_FILE, RelayConfig
from embedding_relay.memory.buffers import EmbeddingBuffers, SourceRows
from embedding_relay.memory.engine import MooncakeDataPlane
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.memory.plane import DataPlane
from embedding_relay.memory.shared_plane import SharedMemoryDataPlane
from embedding_relay.observer import Numbers, Observer
from embedding_relay.protocol import codec
from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.counts import Event
from embedding_relay.protocol.effects import TransferEmbeddingChunk
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.errors import CONFLICT, UNAVAILABLE, Failure, LocalError
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.recorder import Recorder
from embedding_relay.threads import WakeUp, WatchedThread
from embedding_relay.transport.loop import ControlLoop
from embedding_relay.transport.sockets import ip_address

logger = logging.getLogger(__name__)

# How long the control thread waits at most for a scheduler that computes in Python to hand the interpreter over. A
# resume needs it several times, and took two to three times as long with Python's own 5 ms (benchmark/resume.py).
_SWITCH_INTERVAL: Final = 0.0005

# ---- where rooms stand


class RoomEnd:
    """The scheduler's end of one room. The control thread says where the room stands, and the scheduler polls."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.on_end: Callable[[Failure | None], None] | None = None
        """Called once, by the thread that ends the room; must not wait."""
        self._status = Status.BOOTSTRAPPING
        self._failure: Failure | None = None

    def poll(self) -> Status:
        return self._status

    def failure(self) -> Failure | None:
        return self._failure

    def change(self, status: Status, failure: Failure | None) -> None:
        self._failure = failure  # before the status: whoever sees FAILED finds the reason
        self._status = status
        if self.on_end is not None and is_final(status):
            self.on_end(failure)


class StatusBoard:
    """The rooms that the scheduler follows, until they end; and which of them have changed since it last looked."""

    def __init__(self) -> None:
        self.wakeup = WakeUp()
        self._ends: dict[int, RoomEnd] = {}
        self._changed: dict[int, None] = {}
        self._lock = threading.Lock()
        self._closed: Failure | None = None

    def follow(self, end: RoomEnd) -> bool:
        """Whether the room is the caller's from here on: one room cannot be used twice at a time."""
        with self._lock:
            is_taken = end.room in self._ends
            if is_taken:
                end.change(Status.FAILED, Failure(CONFLICT, f"room {end.room} is in use by another request"))
                self._changed[end.room] = None
            else:
                self._ends[end.room] = end
        if is_taken:
            self.wakeup.set()
        elif self._closed is not None:
            self.change(end.room, Status.FAILED, self._closed)
        return not is_taken

    def change(self, room: int, status: Status, failure: Failure | None = None) -> None:
        """A room that nobody here follows (yet, or any more) is none of the scheduler's business."""
        with self._lock:
            end = self._ends.get(room)
            if end is None or (end.poll() is status and failure is None):
                return
            end.change(status, failure)
            if is_final(status):
                del self._ends[room]
            self._changed[room] = None
        self.wakeup.set()

    def touch(self, room: int) -> None:
        """Something else of a room has changed that the scheduler looks at."""
        with self._lock:
            if room not in self._ends:
                return
            self._changed[room] = None
        self.wakeup.set()

    def status(self, room: int) -> Status | None:
        end = self._ends.get(room)
        return end.poll() if end else None

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
        for room in list(self._ends):
            self.change(room, Status.FAILED, failure)

    def __len__(self) -> int:
        return len(self._ends)


# ---- what a rank has open


@dataclasses.dataclass(frozen=True)
class OpenRank:
    """Memory, an engine that knows it, and a control port: opened before any thread of the rank starts."""

    layout: BufferLayout
    config: RelayConfig
    buffers: EmbeddingBuffers
    plane: DataPlane
    board: StatusBoard
    loop: ControlLoop
    address: Address
    """Of the control port."""
    closing: contextlib.ExitStack

    @contextlib.contextmanager
    def closing_on_error(self) -> Iterator[None]:
        """Until somebody else is responsible for closing it."""
        try:
            yield
        except BaseException:
            self.closing.close()
            raise


def warn_if_open(config: RelayConfig, host: str) -> None:
    if config.keys is None and not ip_address(host).is_loopback:
        logger.warning(
            "relay: ANYONE who reaches %s can take part in this deployment, end its requests and read who takes part, "
            "because %s is not set. See docs/security.md; `sglang-relay make-secret FILE` makes a secret.",
            host,
            SECRET_FILE,
        )


def data_plane(config: RelayConfig, host: str, device: str = "", writer: str = "") -> DataPlane:
    """`writer`: the name of the instance whose rank writes to others; without it, of one that is written to."""
    mooncake = MooncakeDataPlane(host, config.transport, device, receives=not writer, patience=config.write_timeout)
    if config.data_plane == MOONCAKE:
        return mooncake
    return SharedMemoryDataPlane(mooncake if config.data_plane == AUTO else None, writer)


def open_rank(layout: BufferLayout, config: RelayConfig, host: str, plane: DataPlane, device: str = "cpu") -> OpenRank:
    """`host`: an address of this machine that the other side can reach; `device`: where this rank's model runs.

    Raises SettingError for what cannot work.
    """
    warn_if_open(config, host)
    board, buffers = StatusBoard(), EmbeddingBuffers(layout, torch.device(device))
    loop = ControlLoop(host, codec.MAX_FRAME_BYTES, config.keys.control if config.keys else None)
    with contextlib.ExitStack() as opened:
        opened.callback(board.wakeup.close)
        board.wakeup.open()
        opened.callback(buffers.release)
        opened.callback(plane.close)
        buffers.allocate(plane.allocate)
        plane.start(buffers.regions)
        opened.callback(loop.close)
        address = loop.open()
        return OpenRank(layout, config, buffers, plane, board, loop, address, opened.pop_all())


# ---- the manager


class Manager(abc.ABC):
    """What the scheduler of any rank asks: is all well, and which rooms have changed?"""

    @abc.abstractmethod
    def start(self) -> None: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Idempotent."""

    def __init__(self, config: RelayConfig, board: StatusBoard, observer: Observer) -> None:
        self.config = config
        self.observer = observer
        self.recorder = Recorder(config.trace_events)
        self.unhealthy_reason: str | None = None
        self.on_unhealthy: Callable[[str], None] | None = None
        """Called by the thread that reports it; must not wait."""
        self._board = board

    def healthy(self) -> bool:
        return self.unhealthy_reason is None

    def reachable(self) -> bool:
        """Others can find this rank."""
        return True

    def report_unhealthy(self, reason: str) -> None:
        """Any thread: something died that this rank cannot work without."""
        self.unhealthy_reason = self.unhealthy_reason or reason
        logger.error("relay is unhealthy: %s", reason)
        if self.on_unhealthy is not None:
            self.on_unhealthy(reason)

    @property
    def wakeup_fd(self) -> int:
        """Readable while `drain_events` has something to say."""
        return self._board.wakeup.fileno()

    def drain_events(self) -> list[int]:
        """Rooms that changed since the last call."""
        return self._board.drain()

    def follow(self, end: RoomEnd) -> bool:
        """Whether the room is the caller's from here on; if it is somebody else's, `end` has failed already."""
        return self._board.follow(end)

    def update_status(self, room: int, status: Status, failure: Failure | None = None) -> None:
        self._board.change(room, status, failure)

    def check_status(self, room: int) -> Status | None:
        """The status of a room that has not ended."""
        return self._board.status(room)


class MooncakeEmbeddingManager(Manager):
    """One side of the transfer in one rank: the scheduler's way into it, and its control thread.

    Nothing but `start` and `close` waits.
    """

    _core: EncodeSide | LanguageSide

    def __init__(self, rank: OpenRank, observer: Observer) -> None:
        super().__init__(rank.config, rank.board, observer)
        self.layout = rank.layout
        self.address = rank.address
        self.plane = rank.plane
        self.plane.on_death = self.report_unhealthy
        self.pool = BlockPool(rank.layout.blocks)
        self.instance = uuid.uuid4().hex
        self._buffers = rank.buffers
        self._loop = rank.loop
        self._closing = rank.closing
        self._thread = WatchedThread("relay-control", self.embedding_thread, self._end_all)
        self._numbers = Numbers()

    def start(self) -> None:
        self._count()
        before = sys.getswitchinterval()
        self._closing.callback(sys.setswitchinterval, before)
        sys.setswitchinterval(min(before, _SWITCH_INTERVAL))
        self._closing.callback(self._close_helpers)
        self._closing.callback(self._thread.join)
        self._closing.callback(self._loop.stop)
        self._thread.start()

    def close(self) -> None:
        """A write under way is waited for: Mooncake ends it within its own timeout."""
        self._closing.close()
        self._board.fail_all(Failure(UNAVAILABLE, "this instance is stopping"))

    @abc.abstractmethod
    def _close_helpers(self) -> None:
        """After the control thread has ended: the threads that worked for it."""

    # ---- numbers

    def metrics(self) -> Numbers:
        """Numbers of a moment ago; never waits."""
        return self._numbers

    def _count(self) -> None:
        loop, counts = self._loop, self._core.counts
        events = collections.Counter(counts.events)
        events[Event.UNDECODABLE] = loop.undecodable
        events[Event.REFUSED_CLIENTS] = loop.refused_clients
        events[Event.ENGINES_RENEWED] = self.plane.renewals
        sizes = {
            "blocks": self.pool.count,
            "followed": len(self._board),
            "connections": loop.connections,
            "mapped": self.plane.mapped,
        }
        self._numbers = Numbers(
            sizes={**sizes, **self._core.sizes(), **self._sizes()},
            totals=self._totals(),
            events=events,
            failures=collections.Counter(counts.failures),
        )
        self.observer.counted(self._numbers)

    @abc.abstractmethod
    def _sizes(self) -> dict[str, int]: ...

    @abc.abstractmethod
    def _totals(self) -> dict[str, int]: ...

    # ---- the control thread

    def embedding_thread(self) -> None:
        """Owns the core, the sockets and the timers."""
        self._loop.run(self, self._count)

    def _end_all(self, reason: str) -> None:
        """Without the control thread nothing is reported any more: every open room must get its answer now."""
        self.report_unhealthy(reason)
        self._board.fail_all(Failure(UNAVAILABLE, reason))

    @abc.abstractmethod
    def receive(self, frames: Sequence[bytes], now: float) -> None:
        """A message from the other side; raises UndecodableFrames if it is none."""

    @abc.abstractmethod
    def tick(self, now: float) -> None:
        """A time has come that `next_wakeup` has named."""

    @abc.abstractmethod
    def next_wakeup(self) -> float | None: ...

    # ---- what only the manager of an encode rank does

    def send_embedding(self, room: int, source: SourceRows) -> None:
        raise LocalError("the manager of a language rank sends no rows")

    def add_transfer_request(self, chunk: TransferEmbeddingChunk, now: float) -> None:
        raise LocalError("the manager of a language rank writes no rows")

    def transfer_worker(self, session_id: str) -> threading.Thread:
        raise LocalError("the manager of a language rank has no transfer workers")
