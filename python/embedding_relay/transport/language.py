"""The language side at work: what the scheduler and the encode ranks say goes into the core, what it asks is done."""

from __future__ import annotations

import functools
import json
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import msgspec

from embedding_relay import recorder
from embedding_relay.config import ROW_CACHE, RelayConfig
from embedding_relay.memory.buffers import ReceivedRows
from embedding_relay.memory.checks import ModelLimits, SmallColumns
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.memory.row_cache import HeldRows
from embedding_relay.memory.shared_rows import Lender
from embedding_relay.observer import NOBODY, Observer, Summary
from embedding_relay.protocol import codec
from embedding_relay.protocol.effects import (
    ClearAux,
    CopyAhead,
    CopyOut,
    Deliver,
    LanguageEffect,
    LookUp,
    Note,
    Resolve,
    Send,
    StatusChanged,
)
from embedding_relay.protocol.errors import Failure, LocalError
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import Register, TransferEmbeddingInfo
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.registry.client import PeerLookup
from embedding_relay.registry.entry import EncodeRank
from embedding_relay.transport.manager import MooncakeEmbeddingManager, OpenRank, RoomEnd, data_plane, open_rank
from embedding_relay.transport.repeats import Flaw, Repeats, default_bytes

logger = logging.getLogger(__name__)


class GetsRows(Protocol):
    """The manager of a language rank, however the rows come to it."""

    def follow(self, end: RoomEnd) -> bool: ...

    def request(self, receiver: MooncakeEmbeddingReceiver, hint_rows: int | None) -> None: ...

    def cancel(self, room: int, failure: Failure | None) -> None: ...

    def forget_rows(self) -> None: ...


class MooncakeEmbeddingReceiver(RoomEnd):
    """The language scheduler's end of one room."""

    def __init__(
        self,
        manager: GetsRows,
        bootstrap_addr: str,
        room: int,
        number: int | None = None,
        sources: Sequence[str] = (),
        items: int = 1,
    ) -> None:
        """`number`: by which all ranks of this instance know the room; without one, nobody wants its rows.

        `sources`: what the client calls the pictures of the prompt, in order; equal ones are probably equal pictures.
        `items`: how many pictures, videos and sounds it has.
        """
        super().__init__(room)
        self.bootstrap_addr = bootstrap_addr
        self.number = number
        self.sources = sources
        self.items = items
        self._manager = manager
        self._is_ours = False
        # Written by the control thread.
        self.target: ReceivedRows | None = None
        """Where rows are copied to, from the first copy on."""
        self.requested_at = 0.0
        self.offered_at: float | None = None
        self.resumed_at = self.resumes = self.rounds = self.bytes = 0
        self.copied = 0
        """Rows that are in the target."""

    def start(self, hint_rows: int | None = None) -> None:
        """Ask for the rows of this room; `hint_rows` is a guess at how many there are."""
        self._is_ours = self._manager.follow(self)
        if self._is_ours:
            self._manager.request(self, hint_rows)

    def rows(self) -> ReceivedRows:
        if self.poll() is not Status.SUCCESS or self.target is None:
            raise LocalError(f"room {self.room} has no rows: it is {self.poll().name}")
        return self.target

    def abort(self, failure: Failure | None = None) -> None:
        """Nobody wants the rows any more. The encode side stops, and the blocks wait until it says that it has."""
        if self._is_ours and not is_final(self.poll()):
            self._manager.cancel(self.room, failure)

    # ---- control thread: an offer of this room is being sent

    def init(self, embedding_indices: Sequence[int], allocated_tokens: int) -> None:
        """The first blocks are on offer; the same blocks may be offered again."""
        self.offered_at = self.offered_at or time.monotonic()

    def resume_transfer(self, embedding_indices: Sequence[int], sent_tokens: int, allocated_tokens: int) -> None:
        """Blocks are on offer for the rows after the first `sent_tokens`; the same offer may be made again."""
        if sent_tokens > self.resumed_at:
            self.resumed_at = sent_tokens
            self.resumes += 1


class LanguageManager(MooncakeEmbeddingManager):
    """The manager of a language rank."""

    @classmethod
    def open(
        cls,
        layout: BufferLayout,
        config: RelayConfig,
        *,
        host: str,
        ranks: int,
        max_rows: int,
        limits: ModelLimits,
        ib_device: str = "",
        device: str = "cpu",
        observer: Observer = NOBODY,
        borrowers: Mapping[int, socket.socket] | None = None,
    ) -> LanguageManager:
        """`ranks` language ranks receive the same rows, each on its own; a prompt has at most `max_rows`.

        `limits`: what the model can be given. Rows beyond them fail their room.
        `borrowers`: connections to ranks that do not receive these rows, but read them here.
        """
        opened = open_rank(layout, config, host, data_plane(config, host, ib_device), device)
        with opened.closing_on_error():
            return cls(opened, ranks, max_rows, limits, observer, borrowers or {})

    def __init__(
        self,
        opened: OpenRank,
        ranks: int,
        max_rows: int,
        limits: ModelLimits,
        observer: Observer,
        borrowers: Mapping[int, socket.socket] = MappingProxyType({}),
    ) -> None:
        super().__init__(opened, observer)
        self.limits = limits
        self._lender = Lender(borrowers, self._buffers.total_bytes) if borrowers else None
        if self._lender is not None:
            self._buffers.make_targets_in(self._lender.take)
        self._repeats = self._make_repeats()
        handshake = msgspec.structs.replace(
            self.layout.handshake(),
            memory=self.plane.memory_name,
            takes_progress=True,
            takes_manifest=self._repeats.can_keep,
            records=self._buffers.records,
        )
        self._core: LanguageSide = LanguageSide(
            register=Register(self.address, self.plane.session_id, self._buffers.pointers, handshake),
            pool=self.pool,
            default_tokens=self.config.default_allocate_tokens,
            max_rows=max_rows,
            ranks=ranks,
            timing=self.config.timing,
        )
        keys = self.config.keys
        self._lookup = PeerLookup(
            self,
            self._loop.post,
            keys.registry if keys else None,
            self.config.may_ask,
            self.plane.has_read_everything,
        )
        self._receivers: dict[int, MooncakeEmbeddingReceiver] = {}
        self._chunks = self._resumes = self._rows = self._bytes = 0

    def _make_repeats(self) -> Repeats:
        size = self.config.row_cache_bytes
        size = default_bytes() if size is None else size
        logger.info("relay: rows of pictures that come again are kept in up to %d bytes (%s)", size, ROW_CACHE)
        return Repeats(size, self._buffers.row_bytes)

    def start(self) -> None:
        if self._lender is not None:
            self._closing.callback(self._lender.close)
            self._lender.start(lambda: self._loop.post(lambda now: None), self.report_unhealthy)  # to count again
        super().start()

    def _close_helpers(self) -> None:
        self._lookup.close()
        self._receivers.clear()

    # ---- any thread

    def request(self, receiver: MooncakeEmbeddingReceiver, hint_rows: int | None) -> None:
        self._loop.post(functools.partial(self._request, receiver, hint_rows))

    def cancel(self, room: int, failure: Failure | None) -> None:
        self._loop.post(lambda now: self._run(self._core.cancel(room, now, failure), now))

    def forget_rows(self) -> None:
        """Nothing that was received so far is used for another request."""
        self._loop.post(lambda now: self._repeats.forget())

    # ---- control thread: what happens

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        self._run(self._core.receive(codec.decode_to_language(frames), now), now)

    def tick(self, now: float) -> None:
        self._run(self._core.tick(now), now)

    def next_wakeup(self) -> float | None:
        return self._core.next_wakeup()

    def _request(self, receiver: MooncakeEmbeddingReceiver, hint_rows: int | None, now: float) -> None:
        receiver.requested_at = now
        self._receivers[receiver.room] = receiver
        self.recorder.note(receiver.room, recorder.PARKED, now)
        held = self._repeats.begin(receiver.room, receiver.sources)
        effects = self._core.request(
            receiver.room,
            receiver.bootstrap_addr,
            now,
            hint_rows=hint_rows,
            held=held,
            items=receiver.items,
        )
        self._run(effects, now)

    def peer_resolved(self, peer: str, rank: EncodeRank, now: float) -> None:
        takes = rank.handshake
        effects = self._core.peer_resolved(
            peer,
            rank.address,
            rank.instance,
            now,
            takes_offer_ahead=takes.takes_offer_ahead,
            takes_have=takes.takes_have,
        )
        self._run(effects, now)

    def peer_unreachable(self, peer: str, reason: str, now: float) -> None:
        self._run(self._core.peer_unreachable(peer, reason, now), now)

    def peer_dead(self, peer: str, now: float) -> None:
        self._run(self._core.peer_dead(peer, now), now)

    # ---- control thread: what the core asks for

    def _run(self, effects: Iterable[LanguageEffect], now: float) -> None:
        """What a copy leads to comes behind what was asked for before it, and what nobody waits for behind all."""
        waiting, at_last = deque(effects), list[Callable[[], None]]()
        while waiting:
            effect = waiting.popleft()
            match effect:
                case Send():
                    self._send(effect)
                case StatusChanged():
                    self._changed(effect)
                case Resolve():
                    self._lookup.resolve(effect.peer)
                case ClearAux():
                    self._buffers.clear_aux(effect.block)
                case LookUp():
                    found = self._repeats.look_up(effect.room, effect.items)
                    waiting.extend(self._core.holds(effect.room, found, now))
                case CopyAhead():
                    self._copy_ahead(effect)
                case CopyOut():
                    waiting.extend(self._copy_out(effect, now))
                case Deliver():
                    at_last.append(self._deliver(effect, now))
                case Note():
                    logger.warning("relay %s", effect.text)
        for tell in at_last:
            tell()

    def _send(self, effect: Send) -> None:
        info = effect.message
        if isinstance(info, TransferEmbeddingInfo):
            self._note_offer(self._receivers[info.room], info)  # not later: the other half's clock is compared with it
        self._loop.send(effect.to, codec.encode(info))
        if not isinstance(info, TransferEmbeddingInfo):
            return
        receiver = self._receivers[info.room]
        if info.is_resume:
            if info.sent_tokens > receiver.resumed_at:  # else it is said again, in case that it was lost
                self._resumes += 1
            receiver.resume_transfer(info.dst_embedding_indices, info.sent_tokens, info.allocated_tokens)
        else:
            receiver.init(info.dst_embedding_indices, info.allocated_tokens)

    def _note_offer(self, receiver: MooncakeEmbeddingReceiver, info: TransferEmbeddingInfo) -> None:
        """Each offer once: it is made again in case that it was lost."""
        is_new = info.sent_tokens > receiver.resumed_at if info.is_resume else receiver.offered_at is None
        if is_new and receiver.resumes < recorder.MOST_ROUNDS:
            self.recorder.note(info.room, recorder.OFFERED, first_row=info.sent_tokens, rows=info.allocated_tokens)

    def _copy_out(self, effect: CopyOut, now: float) -> list[LanguageEffect]:
        receiver = self._receivers.get(effect.room)
        if receiver is None:  # it failed meanwhile: only the blocks are still of interest
            return self._core.copied(effect.room, 0, 0, now)
        began_at = time.monotonic()
        try:
            if receiver.target is None:
                aux = self._buffers.read_aux(effect.blocks[0])
                if not 1 <= aux.total <= effect.max_rows:
                    return self._core.copied(effect.room, 0, aux.total, now)
                receiver.target = self._buffers.make_target(aux)
            rows = min(effect.capacity, receiver.target.total - effect.first_row)
            held = self._repeats.held_rows(effect.room, effect.held)
            self._copy(receiver, receiver.target, effect.blocks, effect.first_row, effect.first_row + rows, held)
        except Flaw as what:
            return self._core.refuse_rows(effect.room, str(what), now)
        except (RuntimeError, MemoryError) as error:  # no memory is left for a prompt of this length
            return self._core.copy_failed(effect.room, str(error), now)
        if flaw := receiver.target.flaw or self._flaw(receiver.target, effect.first_row + rows):
            return self._core.refuse_rows(effect.room, flaw, now)
        self._chunks += 1
        self._rows += rows
        if receiver.resumes < recorder.MOST_ROUNDS:
            self.recorder.note(effect.room, recorder.COPY_BEGAN, began_at, first_row=effect.first_row, rows=rows)
            self.recorder.note(effect.room, recorder.COPIED, first_row=effect.first_row, rows=rows)
        return self._core.copied(effect.room, rows, receiver.target.total, now)

    def _copy_ahead(self, effect: CopyAhead) -> None:
        """What stands against it stands against the `CopyOut` that follows, and is said then."""
        if (receiver := self._receivers.get(effect.room)) is None:
            return
        try:
            if receiver.target is None:
                aux = self._buffers.read_aux(effect.blocks[0])
                if not 1 <= aux.total <= effect.max_rows:
                    return
                receiver.target = self._buffers.make_target(aux)
            stop = min(effect.stop_row, receiver.target.total)
            self._copy(receiver, receiver.target, effect.blocks, effect.first_row, stop)
        except (RuntimeError, MemoryError):
            return

    def _copy(
        self,
        receiver: MooncakeEmbeddingReceiver,
        target: ReceivedRows,
        blocks: Sequence[int],
        first: int,
        stop: int,
        held: Sequence[HeldRows] = (),
    ) -> None:
        """Rows `[first, stop)` but for those that were copied before."""
        copied = self._buffers.copy_out(target, blocks, first, stop - first, receiver.copied, held)
        receiver.copied = max(receiver.copied, stop)
        if self.config.prefix_prefill and stop < target.total:
            self._board.touch(receiver.room)
        if target.flaw is None:
            receiver.bytes += copied
            self._bytes += copied

    def _flaw(self, target: ReceivedRows, end: int) -> str | None:
        """What is wrong with all rows together, once the last of them is here."""
        if end < target.total:
            return None
        columns = SmallColumns(target.aux, target.fill_ids.numpy(), target.mrope.numpy(), target.items.numpy())
        return columns.flaw(self.limits)

    def _deliver(self, effect: Deliver, now: float) -> Callable[[], None]:
        """What is to be said of it, to those who watch."""
        receiver = self._receivers[effect.room]
        assert receiver.offered_at is not None
        receiver.rounds = effect.rounds
        summary = Summary(
            rows=effect.rows,
            rounds=effect.rounds,
            bytes=receiver.bytes,
            wait_s=receiver.offered_at - receiver.requested_at,
            transfer_s=now - receiver.offered_at,
            cached=self._repeats.filled_rows(effect.room),
        )
        self.recorder.note(effect.room, recorder.COMPLETE, rows=effect.rows, rounds=effect.rounds, size=receiver.bytes)

        def tell() -> None:
            logger.info("relay room=%d status=Success %s", effect.room, summary)
            self.observer.succeeded(summary)

        return tell

    def _changed(self, effect: StatusChanged) -> None:
        receiver = self._receivers.pop(effect.room, None) if is_final(effect.status) else None
        rows = receiver.target if receiver is not None and effect.status is Status.SUCCESS else None
        if effect.status is Status.FAILED:
            # As JSON: a reason may quote anything, and the line must stay one line.
            logger.info("relay room=%d status=Failed reason=%s", effect.room, json.dumps(str(effect.failure)))
            if receiver is not None:
                self.recorder.note(effect.room, recorder.FAILED, text=str(effect.failure))
                receiver.target = None  # the scheduler may keep the receiver for a while, and needs only the reason
        elif receiver is not None and rows is not None:
            self._share(receiver, rows)
        self.update_status(effect.room, effect.status, effect.failure)
        if is_final(effect.status):
            self._repeats.end(effect.room, rows)  # behind what the scheduler waits for

    def _share(self, receiver: MooncakeEmbeddingReceiver, rows: ReceivedRows) -> None:
        if self._lender is not None:
            if receiver.number is not None:
                self._lender.lend(receiver.number, rows)
            receiver.target = self._buffers.for_the_model(rows)

    # ---- numbers

    def _sizes(self) -> dict[str, int]:
        lender = self._lender
        return {
            "receivers": len(self._receivers),
            "borrowers": lender.borrowers if lender else 0,
            "lent": lender.lent if lender else 0,
            **self._repeats.sizes(),
        }

    def _totals(self) -> dict[str, int]:
        moved = {"chunks": self._chunks, "resumes": self._resumes, "rows": self._rows, "bytes": self._bytes}
        return moved | self._repeats.totals()
