"""The encode side at work: messages and commands go into the core, and what the core asks for is done here."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence

from embedding_relay.memory.buffers import EmbeddingBuffers, SourceRows
from embedding_relay.memory.quiet import Prover
from embedding_relay.observer import Observer, Summary
from embedding_relay.protocol import codec
from embedding_relay.protocol.effects import (
    DropRows,
    EncodeEffect,
    Note,
    ProveGone,
    Send,
    StatusChanged,
    TransferEmbeddingChunk,
)
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.transport.board import Publish
from embedding_relay.transport.loop import ControlLoop
from embedding_relay.transport.workers import ChunkJob, TransferWorker, TransferWorkers

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Tally:
    """What the log line of a room says."""

    expected_at: float
    submitted_at: float | None = None
    rows: int = 0
    rounds: int = 0
    bytes: int = 0


class EncodeShell:
    """Every method runs in the control thread, but for those under `any thread`."""

    def __init__(
        self,
        core: EncodeSide,
        buffers: EmbeddingBuffers,
        loop: ControlLoop,
        publish: Publish,
        make_worker: Callable[[str], TransferWorker],
        observer: Observer,
    ) -> None:
        self._core = core
        self._buffers = buffers
        self._loop = loop
        self._publish = publish
        self._observer = observer
        self._workers = TransferWorkers(make_worker)
        self._prover = Prover(self.report_proof)
        self._sources: dict[int, SourceRows] = {}
        self._tallies: dict[int, _Tally] = {}
        self._rounds_total = 0
        self._rows_total = 0
        self._bytes_total = 0

    # ---- any thread

    def expect(self, room: int) -> None:
        self._loop.post(functools.partial(self._expect, room))

    def submit(self, room: int, source: SourceRows) -> None:
        self._loop.post(functools.partial(self._submit, room, source))

    def refuse(self, room: int, failure: Failure) -> None:
        self._loop.post(lambda now: self._run(self._core.refuse(room, failure, now), now))

    def report_quiet(self, session_id: str) -> None:
        """No failed write to the session can land any more."""
        self._loop.post(lambda now: self._run(self._core.session_quiet(session_id, now), now))

    def report_proof(self, asked: ProveGone, is_gone: bool) -> None:
        """Whether the process that has a session by now is known to be gone."""
        self._loop.post(lambda now: self._run(self._core.proven(asked.session_id, asked.address, is_gone, now), now))

    def close(self) -> None:
        """After the control thread has ended."""
        self._prover.close()
        self._workers.close()
        self._sources.clear()

    # ---- the control loop's handler

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        self._run(self._core.receive(codec.decode_to_encode(frames), now), now)

    def tick(self, now: float) -> None:
        self._run(self._core.tick(now), now)
        self._workers.keep_only(self._core.sessions())
        self._workers.end_idle(now)

    def next_wakeup(self) -> float | None:
        return min(
            (at for at in (self._core.next_wakeup(), self._workers.next_wakeup()) if at is not None), default=None
        )

    def metrics(self) -> dict[str, float]:
        moved = {"rounds_total": self._rounds_total, "rows_total": self._rows_total, "bytes_total": self._bytes_total}
        shell = {"workers": len(self._workers), "sources": len(self._sources), "tallies": len(self._tallies)}
        return {**self._core.sizes(), **self._core.counts(), **shell, **moved}

    # ---- commands

    def _expect(self, room: int, now: float) -> None:
        self._tallies[room] = _Tally(expected_at=now)
        self._run(self._core.expect(room, now), now)

    def _submit(self, room: int, source: SourceRows, now: float) -> None:
        self._sources.setdefault(room, source)
        if (tally := self._tallies.get(room)) is not None and tally.submitted_at is None:
            tally.submitted_at, tally.rows = now, source.total
        self._run(self._core.submit(room, source.total, now), now)

    # ---- effects

    def _run(self, effects: Iterable[EncodeEffect], now: float) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._loop.send(effect.to, codec.encode(effect.message), to_stranger=effect.courtesy)
                case StatusChanged():
                    self._changed(effect, now)
                case TransferEmbeddingChunk():
                    self.add_transfer_request(effect, now)
                case DropRows():
                    self._sources.pop(effect.room, None)
                case ProveGone():
                    self._prover.ask(effect)
                case Note():
                    logger.warning("relay-encode %s", effect.text)

    def add_transfer_request(self, chunk: TransferEmbeddingChunk, now: float) -> None:
        """Hand a chunk to the workers of its destinations."""
        job = ChunkJob(chunk, self._sources[chunk.room], self._buffers, self._post_transferred)
        for destination in chunk.destinations:
            session = self._core.session(destination.session_id)
            if session is None:
                job.done(destination.session_id, f"session {destination.session_id} is gone")
                continue
            self._workers.submit(
                destination.session_id,
                now,
                functools.partial(job.write, destination, session.buffer_pointers),
                functools.partial(job.done, destination.session_id),
            )

    def _post_transferred(self, job: ChunkJob) -> None:
        self._loop.post(functools.partial(self._transferred, job))

    def _transferred(self, job: ChunkJob, now: float) -> None:
        self._rounds_total += 1
        self._rows_total += job.rows
        self._bytes_total += job.bytes
        if (tally := self._tallies.get(job.chunk.room)) is not None:
            tally.rounds += 1
            tally.bytes += job.bytes
        self._run(self._core.transferred(job.chunk.room, job.chunk.transfer_id, job.errors, now), now)
        # Only now is the core ready to hear that nothing of a failed write can land any more.
        for session_id in job.errors:
            self._workers.report_when_quiet(session_id)

    def _changed(self, effect: StatusChanged, now: float) -> None:
        if is_final(effect.status):
            self._log_end(effect, self._tallies.pop(effect.room, None), now)
        self._publish(effect.room, effect.status, effect.failure)

    def _log_end(self, effect: StatusChanged, tally: _Tally | None, now: float) -> None:
        if effect.status is Status.FAILED:
            logger.info("relay-encode room=%d status=Failed reason=%s", effect.room, json.dumps(str(effect.failure)))
        elif tally is not None and tally.submitted_at is not None:
            summary = Summary(
                rows=tally.rows,
                rounds=tally.rounds,
                bytes=tally.bytes,
                wait_s=tally.submitted_at - tally.expected_at,
                transfer_s=now - tally.submitted_at,
            )
            logger.info("relay-encode room=%d status=Success %s", effect.room, summary)
            self._observer.succeeded(summary)
