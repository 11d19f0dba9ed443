"""The doors of the transfer: a manager per rank, and for each room a sender (encode) or a receiver (language)."""

from __future__ import annotations

import contextlib
import logging
import uuid

from embedding_relay.config import RelayConfig
from embedding_relay.memory.buffers import EmbeddingBuffers, SourceRows
from embedding_relay.memory.engine import MooncakeDataPlane
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.memory.plane import DataPlane
from embedding_relay.observer import NOBODY, Observer
from embedding_relay.protocol import codec
from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import TransferEmbeddingChunk
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.errors import CONFLICT, UNAVAILABLE, Failure, LocalError
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import Address, Register, TransferEmbeddingInfo
from embedding_relay.protocol.status import Status
from embedding_relay.registry.client import Announcer
from embedding_relay.registry.entry import EncodeRank
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.threads import WatchedThread
from embedding_relay.transport.board import Board, Notice
from embedding_relay.transport.encode import EncodeShell
from embedding_relay.transport.language import LanguageShell
from embedding_relay.transport.loop import ControlLoop
from embedding_relay.transport.rooms import MooncakeEmbeddingReceiver, MooncakeEmbeddingSender
from embedding_relay.transport.workers import TransferWorker

__all__ = [
    "MooncakeEmbeddingBootstrapServer",
    "MooncakeEmbeddingManager",
    "MooncakeEmbeddingReceiver",
    "MooncakeEmbeddingSender",
    "TransferEmbeddingChunk",
    "TransferEmbeddingInfo",
]

logger = logging.getLogger(__name__)


class MooncakeEmbeddingManager:
    """One side of the transfer in one rank: wires the pure core to memory, engine, sockets and threads.

    The scheduler's thread calls what does not begin with an underscore; nothing but `start` and `close` waits.
    """

    def __init__(self, layout: BufferLayout, config: RelayConfig, host: str, plane: DataPlane) -> None:
        self.config = config
        self.layout = layout
        self.instance = uuid.uuid4().hex
        self.pool = BlockPool(layout.blocks)
        self.plane = plane
        self.unhealthy_reason: str | None = None
        self.observer: Observer = NOBODY
        self._buffers = EmbeddingBuffers(layout)
        self._board = Board()
        self._loop = ControlLoop(host, codec.MAX_FRAME_BYTES, config.keys.control if config.keys else None)
        self._registry_key = config.keys.registry if config.keys else None
        self._thread = WatchedThread("relay-control", self.embedding_thread, self._end_all)
        self._opened = contextlib.ExitStack()
        self._registry: tuple[Address, int] | None = None
        self._max_rows = self.ranks = 0
        self._numbers: dict[str, float] = {}
        self._announcer: Announcer | None = None
        self._encode: EncodeShell | None = None
        self._language: LanguageShell | None = None

    @classmethod
    def encode(
        cls,
        layout: BufferLayout,
        config: RelayConfig,
        *,
        host: str,
        bootstrap: Address,
        rank: int = 0,
        ib_device: str = "",
    ) -> MooncakeEmbeddingManager:
        """`host`: an address of this machine that the other side can reach; `bootstrap`: this instance's registry."""
        plane = MooncakeDataPlane(host, config.transport, ib_device, receives=False)
        manager = cls(layout, config, host, plane)
        manager._registry = bootstrap, rank
        return manager

    @classmethod
    def language(
        cls, layout: BufferLayout, config: RelayConfig, *, host: str, ranks: int, max_rows: int, ib_device: str = ""
    ) -> MooncakeEmbeddingManager:
        """`ranks` language ranks receive the same rows, each on its own; a prompt has at most `max_rows`."""
        manager = cls(layout, config, host, MooncakeDataPlane(host, config.transport, ib_device))
        manager.ranks, manager._max_rows = ranks, max_rows
        return manager

    # ---- beginning and end

    def start(self) -> None:
        with contextlib.ExitStack() as opened:
            opened.callback(self._board.wakeup.close)
            self._board.wakeup.open()
            opened.callback(self._buffers.release)
            self._buffers.allocate()
            opened.callback(self.plane.close)
            self.plane.start(self._buffers.regions)
            opened.callback(self._loop.close)
            self.address = self._loop.open()
            if self._registry is None:
                self._assemble_language(opened)
            else:
                self._assemble_encode(opened, *self._registry)
            self._opened = opened.pop_all()

    def _assemble_encode(self, opened: contextlib.ExitStack, registry: Address, rank: int) -> None:
        handshake = self.layout.handshake()
        core = EncodeSide(handshake=handshake, instance=self.instance, pool=self.pool, timing=self.config.timing)
        self._encode = EncodeShell(
            core, self._buffers, self._loop, self.update_status, self.transfer_worker, self.observer
        )
        opened.callback(self._encode.close)
        self._start_thread(opened)
        who = EncodeRank(rank, self.address.host, self.address.port, self.instance, handshake)
        self._announcer = Announcer(
            registry, who, self.config.bootstrap_timeout, self.report_illness, self._registry_key
        )
        opened.callback(self._announcer.close)
        self._announcer.start()

    def _assemble_language(self, opened: contextlib.ExitStack) -> None:
        register = Register(self.address, self.plane.session_id, self._buffers.pointers, self.layout.handshake())
        core = LanguageSide(
            register=register,
            pool=self.pool,
            default_tokens=self.config.default_allocate_tokens,
            max_rows=self._max_rows,
            ranks=self.ranks,
            timing=self.config.timing,
        )
        self._language = LanguageShell(
            core, self._buffers, self._loop, self.update_status, self.observer, self._registry_key
        )
        opened.callback(self._language.close)
        self._start_thread(opened)

    def _start_thread(self, opened: contextlib.ExitStack) -> None:
        self._count()
        opened.callback(self._thread.join)
        opened.callback(self._loop.stop)
        self._thread.start()

    def close(self) -> None:
        """Idempotent. A write under way is waited for: Mooncake ends it within its own timeout."""
        self._opened.close()
        self._board.fail_all(Failure(UNAVAILABLE, "this instance is stopping"))

    # ---- health and numbers

    def healthy(self) -> bool:
        return self.unhealthy_reason is None

    def reachable(self) -> bool:
        """Others can find this rank: an encode rank is in its registry."""
        return self._announcer is None or self._announcer.announced

    def report_illness(self, reason: str) -> None:
        """Any thread: something died that this rank cannot work without."""
        self.unhealthy_reason = self.unhealthy_reason or reason
        logger.error("relay is ill: %s", reason)

    def metrics(self) -> dict[str, float]:
        """Numbers of a moment ago; never waits."""
        return self._numbers

    def _count(self) -> None:
        side = self._encode or self._language
        loop = {
            "connections": self._loop.connections,
            "undecodable_total": self._loop.undecodable,
            "refused_clients_total": self._loop.refused_clients,
        }
        mine = {"blocks": self.pool.count, "followed": len(self._board), "engines_renewed_total": self.plane.renewals}
        self._numbers = {**mine, **loop, **(side.metrics() if side else {})}
        self.observer.counted(self._numbers)

    # ---- statuses

    @property
    def wakeup_fd(self) -> int:
        """Readable while `drain_events` has something to say."""
        return self._board.wakeup.fileno()

    def drain_events(self) -> list[int]:
        return self._board.drain()

    def follow(self, room: int) -> tuple[Notice, bool]:
        """The notice of a room, and whether the room is the caller's: one room cannot be used twice at a time."""
        notice = self._board.open(room)
        if notice is not None:
            return notice, True
        return self._board.refused(room, Failure(CONFLICT, f"room {room} is in use by another request")), False

    def update_status(self, room: int, status: Status, failure: Failure | None = None) -> None:
        self._board.change(room, status, failure)

    def check_status(self, room: int) -> Status | None:
        """The status of a room that has not ended."""
        notice = self._board.get(room)
        return notice.status if notice else None

    # ---- threads

    def embedding_thread(self) -> None:
        """The control thread: owns the core, the sockets and the timers."""
        side = self._encode or self._language
        assert side is not None
        self._loop.run(side, self._count)

    def _end_all(self, reason: str) -> None:
        """Without the control thread nothing is reported any more: every open room must get its answer now."""
        self.report_illness(reason)
        self._board.fail_all(Failure(UNAVAILABLE, reason))

    def transfer_worker(self, session_id: str) -> TransferWorker:
        """A thread that writes to one destination session."""
        return TransferWorker(session_id, self.plane, self.sending.report_quiet, self.report_illness)

    def add_transfer_request(self, chunk: TransferEmbeddingChunk, now: float) -> None:
        """Control thread: hand a chunk to the workers of its destinations."""
        self.sending.add_transfer_request(chunk, now)

    # ---- what senders and receivers work with

    def send_embedding(self, room: int, source: SourceRows) -> None:
        source.check(self.layout)
        self.sending.submit(room, source)

    @property
    def sending(self) -> EncodeShell:
        if self._encode is None:
            raise LocalError("this manager does not send, or was not started")
        return self._encode

    @property
    def receiving(self) -> LanguageShell:
        if self._language is None:
            raise LocalError("this manager does not receive, or was not started")
        return self._language
