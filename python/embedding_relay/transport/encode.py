"""The encode side at work: what the scheduler and the language ranks say goes into the core, what it asks is done."""

from __future__ import annotations

import functools
import json
import logging
import uuid
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from embedding_relay import recorder
from embedding_relay.config import RelayConfig
from embedding_relay.memory.buffers import SourceRows
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.memory.quiet import Prover
from embedding_relay.observer import NOBODY, Observer, Summary
from embedding_relay.protocol import codec
from embedding_relay.protocol.effects import (
    DropRows,
    EncodeEffect,
    HeldByAll,
    Note,
    ProveGone,
    Send,
    StatusChanged,
    TransferEmbeddingChunk,
)
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.messages import Address, Item, TransferEmbeddingInfo
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.registry.client import Announcer
from embedding_relay.registry.entry import EncodeRank
from embedding_relay.transport.manager import MooncakeEmbeddingManager, OpenRank, RoomEnd, data_plane, open_rank
from embedding_relay.transport.workers import ChunkJob, TransferWorker, TransferWorkers

logger = logging.getLogger(__name__)

# Offers of rooms whose request is not here yet, noted for the trace; anybody can invent such rooms.
_MOST_EARLY_OFFERS: Final = 512


class MooncakeEmbeddingSender(RoomEnd):
    """The encode scheduler's end of one room."""

    def __init__(self, manager: EncodeManager | NoTransfer, room: int) -> None:
        super().__init__(room)
        self._manager = manager
        self._is_ours = True
        self.items: tuple[Item, ...] = ()
        # Written by the control thread.
        self._held: tuple[int, ...] = ()
        # For the log line; written by the control thread.
        self.expected_at = 0.0
        self.submitted_at: float | None = None
        self.rows = self.rounds = self.bytes = 0
        self.begun = 0
        """Chunks of which that was noted."""
        self.offers = self.asked_from = 0
        """How many were noted, and the row that the last of them begins with."""
        # Written by the scheduler.
        self.has_forgotten = False
        """Its items are made, whoever has their rows."""

    @property
    def held(self) -> tuple[int, ...]:
        """Items, by their number, whose rows every language rank of the room has: they need not be made. More may come,
        and none is taken back but by `forget_items`.
        """
        return () if self.has_forgotten else self._held

    @held.setter
    def held(self, items: tuple[int, ...]) -> None:
        self._held = items

    def init(self, items: tuple[Item, ...] = ()) -> None:
        """This instance's half of the request has arrived. `items`: all that are in its prompt; none of one whose rows
        are always sent.
        """
        self.items = items
        self._is_ours = self._manager.follow(self)
        if self._is_ours:
            self._manager.expect(self)

    def send_embedding(self, source: SourceRows) -> None:
        """The rows are there (or will be, when `source.ready` says so), or those before `source.made` are. Sending them
        twice is sending them once.
        """
        if self._is_ours:
            self._manager.send_embedding(self.room, source)

    def more_rows(self, source: SourceRows) -> None:
        """More rows are there than were sent: `source` has all so far, those that were sent among them."""
        if self._is_ours:
            self._manager.more_rows(self.room, source)

    def forget_items(self) -> None:
        """Before any rows are sent: what will be made of its items is not what their keys say."""
        self.has_forgotten = True
        if self._is_ours:
            self._manager.forget_items(self.room)

    def refuse(self, failure: Failure) -> None:
        """No rows will come: the language side hears it at once, or as soon as it asks."""
        if self._is_ours:
            self._manager.refuse(self.room, failure)


class NoTransfer:
    """In place of an `EncodeManager`, in the ranks of an encode instance that only compute: the first has the same
    rows, sends them to all language ranks, and decides what becomes of a room.
    """

    observer = NOBODY
    unhealthy_reason = None

    def __init__(self, config: RelayConfig) -> None:
        self.config = config
        self.recorder = recorder.Recorder(0)

    def start(self) -> None: ...

    def close(self) -> None: ...

    def follow(self, end: RoomEnd) -> bool:
        return True

    def expect(self, sender: MooncakeEmbeddingSender) -> None: ...

    def send_embedding(self, room: int, source: SourceRows) -> None: ...

    def more_rows(self, room: int, source: SourceRows) -> None: ...

    def forget_items(self, room: int) -> None: ...

    def refuse(self, room: int, failure: Failure) -> None: ...


class EncodeManager(MooncakeEmbeddingManager):
    """The manager of an encode rank."""

    @classmethod
    def open(
        cls,
        layout: BufferLayout,
        config: RelayConfig,
        *,
        host: str,
        bootstrap: Address,
        rank: int = 0,
        ranks: int = 1,
        ib_device: str = "",
        device: str = "cpu",
        observer: Observer = NOBODY,
    ) -> EncodeManager:
        """`host`: an address of this machine that the other side can reach; `bootstrap`: this instance's registry.

        `rank` of `ranks` among which the instance divides its requests.
        """
        instance = uuid.uuid4().hex
        opened = open_rank(layout, config, host, data_plane(config, host, ib_device, writer=instance), device)
        with opened.closing_on_error():
            return cls(opened, instance, bootstrap, rank, ranks, observer)

    def __init__(
        self, opened: OpenRank, instance: str, bootstrap: Address, rank: int, ranks: int, observer: Observer
    ) -> None:
        super().__init__(opened, observer)
        self.instance = instance
        config = self.config
        handshake = msgspec.structs.replace(self.layout.handshake(), takes_offer_ahead=True, takes_have=True)
        self._core: EncodeSide = EncodeSide(
            handshake=handshake,
            instance=self.instance,
            pool=self.pool,
            timing=config.timing,
            rank=rank,
            ranks=ranks,
        )
        self._announcer = Announcer(
            bootstrap,
            EncodeRank(rank, self.address.host, self.address.port, self.instance, handshake, ranks),
            config.bootstrap_timeout,
            self.report_unhealthy,
            config.keys.registry if config.keys else None,
        )
        self._workers = TransferWorkers(self.transfer_worker)
        self._prover = Prover(self._report_proof)
        self._senders: dict[int, MooncakeEmbeddingSender] = {}
        self._sources: dict[int, SourceRows] = {}
        self._latest: dict[int, dict[str, str]] = {}
        """What has gone wrong with the latest chunk of each room."""
        self._early_offers: dict[int, tuple[float, int]] = {}
        self._chunks = self._rows = self._bytes = 0

    def start(self) -> None:
        super().start()
        self._closing.callback(self._announcer.close)
        self._announcer.start()

    def _close_helpers(self) -> None:
        self._prover.close()
        self._workers.close()
        self._sources.clear()
        self._latest.clear()
        self._senders.clear()

    def reachable(self) -> bool:
        """Language ranks can find this rank: it is in its registry."""
        return self._announcer.announced

    # ---- any thread

    def expect(self, sender: MooncakeEmbeddingSender) -> None:
        """The encode half of this room's request is here."""
        self._loop.post(functools.partial(self._expect, sender))

    def send_embedding(self, room: int, source: SourceRows) -> None:
        source.check(self.layout)
        self._loop.post(functools.partial(self._submit, room, source))

    def more_rows(self, room: int, source: SourceRows) -> None:
        source.check(self.layout)
        self._loop.post(functools.partial(self._more_rows, room, source))

    def forget_items(self, room: int) -> None:
        self._loop.post(lambda now: self._core.forget_items(room))

    def refuse(self, room: int, failure: Failure) -> None:
        self._loop.post(lambda now: self._run(self._core.refuse(room, failure, now), now))

    def is_offered(self, room: int) -> bool:
        """Every language rank of the room has offered blocks for it, or it is over. It only reads what may change."""
        return self._core.is_settled(room)

    def _report_quiet(self, session_id: str) -> None:
        """No failed write to the session can land any more."""
        self._loop.post(lambda now: self._run(self._core.session_quiet(session_id, now), now))

    def _report_proof(self, question: ProveGone, is_gone: bool) -> None:
        self._loop.post(
            lambda now: self._run(self._core.proven(question.session_id, question.address, is_gone, now), now)
        )

    # ---- control thread: what happens

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        message = codec.decode_to_encode(frames)
        if isinstance(message, TransferEmbeddingInfo):
            self._note_offer(message, now)
        self._run(self._core.receive(message, now), now)

    def tick(self, now: float) -> None:
        self._run(self._core.tick(now), now)
        self._workers.keep_only(self._core.sessions())
        self._workers.end_idle(now)

    def next_wakeup(self) -> float | None:
        due = (self._core.next_wakeup(), self._workers.next_wakeup())
        return min((at for at in due if at is not None), default=None)

    def _expect(self, sender: MooncakeEmbeddingSender, now: float) -> None:
        sender.expected_at = now
        self._senders[sender.room] = sender
        self.recorder.note(sender.room, recorder.PARKED, now)
        if (offer := self._early_offers.pop(sender.room, None)) is not None:
            sender.offers = 1
            self.recorder.note(sender.room, recorder.ASKED, offer[0], rows=offer[1])
        self._run(self._core.expect(sender.room, now, sender.items), now)

    def _submit(self, room: int, source: SourceRows, now: float) -> None:
        self._sources.setdefault(room, source)
        if (sender := self._senders.get(room)) is not None and sender.submitted_at is None:
            sender.submitted_at, sender.rows = now, source.total
        absent = tuple(number for number, _ in source.absent)
        self._run(self._core.submit(room, source.total, now, absent, source.made), now)

    def _more_rows(self, room: int, source: SourceRows, now: float) -> None:
        """A step that is under way reads the source that it began with."""
        if room not in self._sources:
            return  # it is over
        self._sources[room] = source
        absent = tuple(number for number, _ in source.absent)
        ready = source.total if source.made is None else source.made
        self._run(self._core.more_rows(room, ready, now, absent), now)

    def _note_offer(self, info: TransferEmbeddingInfo, now: float) -> None:
        """Of several language ranks the first to ask counts; and nobody fills the record of a room by asking again."""
        sender = self._senders.get(info.room)
        if sender is None:
            self._early_offers.setdefault(info.room, (now, info.allocated_tokens))
            if len(self._early_offers) > _MOST_EARLY_OFFERS:
                del self._early_offers[next(iter(self._early_offers))]
        elif sender.offers == 0 or (info.sent_tokens > sender.asked_from and sender.offers < recorder.MOST_ROUNDS):
            sender.offers += 1
            sender.asked_from = info.sent_tokens
            self.recorder.note(info.room, recorder.ASKED, now, first_row=info.sent_tokens, rows=info.allocated_tokens)

    def _transferred(self, job: ChunkJob, now: float) -> None:
        room = job.chunk.room
        self._chunks += 1
        self._rows += job.rows
        self._bytes += job.bytes
        if (sender := self._senders.get(room)) is not None:
            if sender.rounds < recorder.MOST_ROUNDS and not job.errors:
                self._note_chunk(recorder.CHUNK_WRITTEN, job.chunk, now, job.bytes)
            sender.rounds += 1
            sender.bytes += job.bytes
        self._run(self._core.transferred(room, job.chunk.transfer_id, job.errors, now), now)
        # Only now is the core ready to hear that nothing of a failed write can land any more.
        for session_id in job.errors:
            self._workers.report_when_quiet(session_id)

    # ---- control thread: what the core asks for

    def _run(self, effects: Iterable[EncodeEffect], now: float) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._loop.send(effect.to, codec.encode(effect.message), to_stranger=effect.to_stranger)
                case StatusChanged():
                    self._changed(effect, now)
                case TransferEmbeddingChunk():
                    self.add_transfer_request(effect, now)
                case HeldByAll():
                    if (sender := self._senders.get(effect.room)) is not None:
                        sender.held = effect.items
                case DropRows():
                    self._sources.pop(effect.room, None)
                    self._latest.pop(effect.room, None)
                case ProveGone():
                    self._prover.ask(effect)
                case Note():
                    logger.warning("relay-encode %s", effect.text)

    def add_transfer_request(self, chunk: TransferEmbeddingChunk, now: float) -> None:
        """Hand a chunk to the workers of its destinations."""
        before = self._latest.get(chunk.room, {})  # alone: a job that knew the one before it would keep all of them
        job = ChunkJob(
            chunk,
            self._sources[chunk.room],
            self._buffers,
            self._report_transferred,
            functools.partial(self._report_progress, chunk),
            from_where_they_are=self.plane.reads_any_memory,
            is_needed=lambda: not before and not self._core.is_over(chunk.room),
        )
        self._latest[chunk.room] = job.errors
        for destination in chunk.destinations:
            session = self._core.session(destination.session_id)
            if session is None:
                job.done(destination.session_id, f"session {destination.session_id} is gone")
                continue
            self._workers.submit(
                destination.session_id,
                now,
                functools.partial(job.write, destination, session),
                functools.partial(job.done, destination.session_id),
                session.handshake.memory,
            )
        # While the workers wake.
        if (sender := self._senders.get(chunk.room)) is not None and sender.begun < recorder.MOST_ROUNDS:
            sender.begun += 1
            self._note_chunk(recorder.CHUNK_BEGAN, chunk, now)

    def _note_chunk(self, what: str, chunk: TransferEmbeddingChunk, now: float, size: int = 0) -> None:
        """Language ranks that are told the same rows may be at different ones: the step as a whole is noted."""
        first = min(part.start_row for part in chunk.destinations)
        stop = max(part.stop_row for part in chunk.destinations)
        self.recorder.note(chunk.room, what, now, first_row=first, rows=stop - first, size=size)

    def transfer_worker(self, session_id: str) -> TransferWorker:
        """A thread that writes to one destination session."""
        session = self._core.session(session_id)
        memory = session.handshake.memory if session else ""
        return TransferWorker(session_id, self.plane, self._report_quiet, self.report_unhealthy, memory)

    def _report_transferred(self, job: ChunkJob) -> None:
        """The thread of the last worker to finish."""
        self._loop.post(functools.partial(self._transferred, job))

    def _report_progress(self, chunk: TransferEmbeddingChunk, session_id: str, rows: int) -> None:
        """The thread of a worker."""
        progressed = functools.partial(self._core.progressed, chunk.room, chunk.transfer_id, session_id, rows)
        self._loop.post(lambda now: self._run(progressed(), now))

    def _changed(self, effect: StatusChanged, now: float) -> None:
        if is_final(effect.status):
            self._log_end(effect, self._senders.pop(effect.room, None), now)
        self.update_status(effect.room, effect.status, effect.failure)

    def _log_end(self, effect: StatusChanged, sender: MooncakeEmbeddingSender | None, now: float) -> None:
        if effect.status is Status.FAILED:
            logger.info("relay-encode room=%d status=Failed reason=%s", effect.room, json.dumps(str(effect.failure)))
            if sender is not None:
                self.recorder.note(effect.room, recorder.FAILED, now, text=str(effect.failure))
        elif sender is not None and sender.submitted_at is not None:
            summary = Summary(
                rows=sender.rows,
                rounds=sender.rounds,
                bytes=sender.bytes,
                wait_s=sender.submitted_at - sender.expected_at,
                transfer_s=now - sender.submitted_at,
            )
            logger.info("relay-encode room=%d status=Success %s", effect.room, summary)
            self.observer.succeeded(summary)
            self.recorder.note(
                effect.room, recorder.SENT, now, rows=sender.rows, rounds=sender.rounds, size=sender.bytes
            )

    # ---- numbers

    def _sizes(self) -> dict[str, int]:
        return {"senders": len(self._senders), "sources": len(self._sources), "workers": len(self._workers)}

    def _totals(self) -> dict[str, int]:
        return {"chunks": self._chunks, "rows": self._rows, "bytes": self._bytes}
