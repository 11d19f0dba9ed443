"""The language side at work: messages and commands go into the core, and what the core asks for is done here."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from embedding_relay.memory.buffers import EmbeddingBuffers, ReceivedRows
from embedding_relay.observer import Observer, Summary
from embedding_relay.protocol import codec
from embedding_relay.protocol.effects import (
    CopyOut,
    Deliver,
    LanguageEffect,
    Note,
    Resolve,
    Send,
    StatusChanged,
)
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import Address, TransferEmbeddingInfo
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.registry.client import PeerLookup
from embedding_relay.transport.board import Publish
from embedding_relay.transport.loop import ControlLoop

logger = logging.getLogger(__name__)


class Receiver(Protocol):
    """The scheduler's end of one room, as far as the control thread needs it."""

    room: int
    bootstrap_addr: str

    def init(self, embedding_indices: Sequence[int], allocated_tokens: int) -> None: ...

    def resume_transfer(self, embedding_indices: Sequence[int], sent_tokens: int, allocated_tokens: int) -> None: ...

    def deliver(self, rows: ReceivedRows, rounds: int) -> None: ...


@dataclasses.dataclass
class _Arrival:
    """A room whose rows are on their way, and what its log line will say."""

    receiver: Receiver
    requested_at: float
    encode_address: Address | None = None
    offered_at: float | None = None
    rows: ReceivedRows | None = None
    rounds: int = 0
    bytes: int = 0


class LanguageShell:
    """Every method runs in the control thread, but for those under `any thread`."""

    def __init__(
        self,
        core: LanguageSide,
        buffers: EmbeddingBuffers,
        loop: ControlLoop,
        publish: Publish,
        observer: Observer,
        registry_key: bytes | None,
    ) -> None:
        self._core = core
        self._buffers = buffers
        self._loop = loop
        self._publish = publish
        self._observer = observer
        self._lookup = PeerLookup(self, loop.post, registry_key)
        self._arrivals: dict[int, _Arrival] = {}
        self._rounds_total = 0
        self._resumes_total = 0
        self._rows_total = 0
        self._bytes_total = 0

    # ---- any thread

    def request(self, receiver: Receiver, hint_rows: int | None) -> None:
        self._loop.post(functools.partial(self._request, receiver, hint_rows))

    def cancel(self, room: int, failure: Failure | None) -> None:
        self._loop.post(lambda now: self._run(self._core.cancel(room, now, failure), now))

    def close(self) -> None:
        """After the control thread has ended."""
        self._lookup.close()
        self._arrivals.clear()

    # ---- the control loop's handler

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        self._run(self._core.receive(codec.decode_to_language(frames), now), now)

    def tick(self, now: float) -> None:
        self._run(self._core.tick(now), now)

    def next_wakeup(self) -> float | None:
        return self._core.next_wakeup()

    def metrics(self) -> dict[str, float]:
        moved = {"rounds_total": self._rounds_total, "rows_total": self._rows_total, "bytes_total": self._bytes_total}
        shell = {"arrivals": len(self._arrivals), "resumes_total": self._resumes_total}
        return {**self._core.sizes(), **self._core.counts(), **shell, **moved}

    # ---- commands

    def _request(self, receiver: Receiver, hint_rows: int | None, now: float) -> None:
        self._arrivals[receiver.room] = _Arrival(receiver, requested_at=now)
        self._run(self._core.request(receiver.room, receiver.bootstrap_addr, now, hint_rows=hint_rows), now)

    def peer_resolved(self, peer: str, address: Address, instance: str, now: float) -> None:
        self._run(self._core.peer_resolved(peer, address, instance, now), now)

    def peer_unreachable(self, peer: str, reason: str, now: float) -> None:
        self._run(self._core.peer_unreachable(peer, reason, now), now)

    def peer_dead(self, peer: str, now: float) -> None:
        self._run(self._core.peer_dead(peer, now), now)

    # ---- effects

    def _run(self, effects: Iterable[LanguageEffect], now: float) -> None:
        """What a copy leads to comes behind what was asked for before it."""
        waiting = deque(effects)
        while waiting:
            effect = waiting.popleft()
            match effect:
                case Send(message=TransferEmbeddingInfo() as info):
                    self._offer(effect.to, info, now)
                case Send():
                    self._loop.send(effect.to, codec.encode(effect.message))
                case StatusChanged():
                    self._changed(effect)
                case Resolve():
                    self._lookup.resolve(effect.peer)
                case CopyOut():
                    waiting.extend(self._copy_out(effect, now))
                case Deliver():
                    self._deliver(effect, now)
                case Note():
                    logger.warning("relay %s", effect.text)

    def _offer(self, to: Address, info: TransferEmbeddingInfo, now: float) -> None:
        """An init or a resume leaves through the receiver's doors."""
        arrival = self._arrivals[info.room]
        arrival.encode_address = to
        if info.is_resume:
            self._resumes_total += 1
            arrival.receiver.resume_transfer(info.dst_embedding_indices, info.sent_tokens, info.allocated_tokens)
            return
        arrival.offered_at = arrival.offered_at or now
        arrival.receiver.init(info.dst_embedding_indices, info.allocated_tokens)

    def transmit(self, info: TransferEmbeddingInfo) -> None:
        """What the doors put on the wire."""
        to = self._arrivals[info.room].encode_address
        assert to is not None
        self._loop.send(to, codec.encode(info))

    def _copy_out(self, effect: CopyOut, now: float) -> list[LanguageEffect]:
        arrival = self._arrivals.get(effect.room)
        if arrival is None:  # it failed meanwhile: only the blocks are still of interest
            return self._core.copied(effect.room, 0, 0, now)
        try:
            if arrival.rows is None:
                aux = self._buffers.read_aux(effect.blocks[0])
                if not 1 <= aux.total <= effect.max_rows:
                    return self._core.copied(effect.room, 0, aux.total, now)
                arrival.rows = self._buffers.make_target(aux)
            rows = min(effect.capacity, arrival.rows.total - effect.first_row)
            copied = self._buffers.copy_out(arrival.rows, effect.blocks, effect.first_row, rows)
        except RuntimeError as error:  # torch has no memory left for a prompt of this length
            return self._core.copy_failed(effect.room, str(error), now)
        arrival.rounds += 1
        arrival.bytes += copied
        self._rounds_total += 1
        self._rows_total += rows
        self._bytes_total += copied
        return self._core.copied(effect.room, rows, arrival.rows.total, now)

    def _deliver(self, effect: Deliver, now: float) -> None:
        arrival = self._arrivals[effect.room]
        assert arrival.rows is not None
        assert arrival.offered_at is not None
        arrival.receiver.deliver(arrival.rows, effect.rounds)
        summary = Summary(
            rows=effect.rows,
            rounds=effect.rounds,
            bytes=arrival.bytes,
            wait_s=arrival.offered_at - arrival.requested_at,
            transfer_s=now - arrival.offered_at,
        )
        logger.info("relay room=%d status=Success %s", effect.room, summary)
        self._observer.succeeded(summary)

    def _changed(self, effect: StatusChanged) -> None:
        if effect.status is Status.FAILED:
            # As JSON: a reason may quote anything, and the line must stay one line.
            logger.info("relay room=%d status=Failed reason=%s", effect.room, json.dumps(str(effect.failure)))
        if is_final(effect.status):
            self._arrivals.pop(effect.room, None)
        self._publish(effect.room, effect.status, effect.failure)
