"""Writes rows to language ranks: a chunk is staged once, and written to each destination by a thread of its own.

A thread and a link per destination session, so that a peer that is stuck holds up nobody else.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

import msgspec

from embedding_relay.memory.plane import DataPlane, Entry, Link, TransferError, Unreachable
from embedding_relay.protocol.effects import ChunkDestination, TransferEmbeddingChunk
from embedding_relay.protocol.messages import Register
from embedding_relay.protocol.plan import Column, Range, batches, plan_chunk, plan_media
from embedding_relay.threads import WatchedThread

if TYPE_CHECKING:
    from embedding_relay.memory.buffers import EmbeddingBuffers, SourceRows

logger = logging.getLogger(__name__)

# How long a retry waits for proof that the failed write is over. A healthy peer gives it within milliseconds.
_RETRY_PATIENCE: Final = 2.0
# A peer that is stopped or cut off for longer keeps its blocks in quarantine: its operator will restart it anyway.
_PROOF_EXPIRES: Final = 3600.0
# How often to look for that proof: at first, and when it has been missing for long.
_LOOK_EVERY: Final = 0.1
_LOOK_SELDOM: Final = 5.0
# A chunk is written in about so many pieces, of which each costs a round trip of its own.
_PIECES: Final = 8
_SMALLEST_PIECE: Final = 2 << 20
_LARGEST_PIECE: Final = 16 << 20
# Longer than a write can take, so that an unused worker is rarely a busy one.
IDLE_SECONDS: Final = 90.0

Write = Callable[[Link], None]
Done = Callable[[str], None]
"""Called with what went wrong; empty means that every byte is at the peer."""
_Job = tuple[Write, Done]


class _Command(enum.Enum):
    """What else than a job a worker finds in its queue."""

    REPORT_WHEN_QUIET = enum.auto()
    STOP = enum.auto()


class ChunkJob:
    """One chunk on its way, shared by the workers of its destinations; the last one to finish reports."""

    def __init__(
        self,
        chunk: TransferEmbeddingChunk,
        source: SourceRows,
        buffers: EmbeddingBuffers,
        finished: Callable[[ChunkJob], None],
        progressed: Callable[[str, int], None],
        *,
        from_where_they_are: bool,
        is_needed: Callable[[], bool] = lambda: True,
    ) -> None:
        """`progressed` hears of a session that every row before some row is there, as long as more are to come.

        `from_where_they_are`: the data plane can read memory that is not registered. `is_needed` is asked when its turn
        has come: if not, nothing is written.
        """
        self.chunk = chunk
        self.errors: dict[str, str] = {}
        self.bytes = 0
        self._source = source
        self._buffers = buffers
        self._finished = finished
        self._progressed = progressed
        self._is_needed = is_needed
        self._passed_over: set[str] = set()
        self._segments = buffers.segments(source) if from_where_they_are else None
        self._pending = len(chunk.destinations)
        self._staged = not chunk.window.stage
        self._staging = threading.Lock()
        self._counting = threading.Lock()

    @property
    def rows(self) -> int:
        """How many were written, to all destinations together."""
        without = self.errors.keys() | self._passed_over
        return sum(one.stop_row - one.start_row for one in self.chunk.destinations if one.session_id not in without)

    def write(self, destination: ChunkDestination, register: Register, link: Link) -> None:
        """Raise TransferError if some of it may be missing at the peer; may then be called again."""
        if not self._is_needed():
            self._passed_over.add(destination.session_id)
            return
        with self._staging:
            self._stage()
        written, arriving = 0, deque[tuple[int, int]]()
        for _ in link.write_in_turn(self._batches(destination, register, arriving)):
            length, stop = arriving.popleft()
            written += length
            if destination.start_row < stop < destination.stop_row:
                self._progressed(destination.session_id, stop)
        with self._counting:
            self.bytes += written

    def _batches(
        self, destination: ChunkDestination, register: Register, arriving: deque[tuple[int, int]]
    ) -> Iterator[Sequence[Entry]]:
        """What to write, planned when it is its turn. `arriving` gets of each batch how many bytes it has, and the row
        before which all are there with it.
        """
        stop = destination.start_row
        entries = self._small_entries(destination, register)
        for start, end in self._pieces(destination):
            entries += self._media_entries(destination, register.buffer_pointers, start, end)
            *most, last = batches(entries) if entries else ((),)
            for batch in most:
                arriving.append((sum(entry.length for entry in batch), stop))
                yield batch
            arriving.append((sum(entry.length for entry in last), end))
            yield last
            stop, entries = end, []

    def _pieces(self, destination: ChunkDestination) -> Iterator[tuple[int, int]]:
        """A large chunk goes in pieces, so that the peer copies out what is there while more is on its way."""
        layout = self._buffers.layout
        first, stop = destination.start_row, destination.stop_row
        row_bytes = layout.columns[0].bytes_per_row * (1 + layout.deepstack_rows)
        size = min(max((stop - first) * row_bytes // _PIECES, _SMALLEST_PIECE), _LARGEST_PIECE)
        rows = max(1, size // (row_bytes * layout.block_size)) * layout.block_size
        while stop - first >= 2 * rows:
            # To the end of a block, so that none takes two entries.
            end = first + rows - (first - destination.first_row) % layout.block_size
            yield first, end
            first = end
        yield first, stop

    def _small_entries(self, destination: ChunkDestination, register: Register) -> list[Entry]:
        """All but the media rows."""
        layout, records = self._buffers.layout, register.handshake.records
        columns, there = layout.columns, register.buffer_pointers
        if records is not None and register.handshake.takes_records:
            _, aux = layout.short_columns
            columns, there = layout.short_columns, (records[0], there[columns.index(aux)])
        ranges = plan_chunk(columns, layout.block_size, self.chunk.window, destination, media_runs=())
        return self._entries(ranges, columns, there)

    def _media_entries(
        self, destination: ChunkDestination, pointers: Sequence[int], start: int, stop: int
    ) -> list[Entry]:
        layout = self._buffers.layout
        if self._segments is not None:
            size = layout.columns[0].bytes_per_row
            ranges = plan_media(0, size, layout.block_size, self._segments, destination, start, stop)
            return [Entry(r.source, pointers[0] + r.destination, r.length) for r in ranges]
        part = msgspec.structs.replace(destination, start_row=start, stop_row=stop, with_aux=False)
        media = [column for column in layout.columns if column.media_only]
        runs = self._source.media_runs
        ranges = plan_chunk(layout.columns, layout.block_size, self.chunk.window, part, runs)
        return self._entries([r for r in ranges if layout.columns[r.column] in media], layout.columns, pointers)

    def _entries(self, ranges: Iterable[Range], columns: Sequence[Column], there: Sequence[int]) -> list[Entry]:
        here = self._buffers.pointers_of(columns)
        return [Entry(here[r.column] + r.source, there[r.column] + r.destination, r.length) for r in ranges]

    def done(self, session_id: str, problem: str) -> None:
        with self._counting:
            if problem:
                self.errors[session_id] = problem
            self._pending -= 1
            is_last = self._pending == 0
        if is_last:
            self._finished(self)

    def _stage(self) -> None:
        if self._staged:
            return
        window = self.chunk.window
        with_media = self._segments is None
        what = self._source, window.first_row, window.rows, window.blocks
        self._buffers.stage(*what, with_media=with_media, apart=window.apart)
        self._staged = True


class TransferWorkers:
    """The workers of one rank. Used by the control thread only, and by `close`."""

    def __init__(self, make_worker: Callable[[str], TransferWorker]) -> None:
        self._make_worker = make_worker
        self._workers: dict[str, TransferWorker] = {}
        self._last_used: dict[str, float] = {}  # the longest unused first
        self._ended: list[TransferWorker] = []
        self._unproven: set[str] = set()
        """Sessions with a failed write of which no worker can prove any more that it is over."""

    def submit(self, session_id: str, now: float, write: Write, done: Done, memory: str = "") -> None:
        """Run `write` in the session's own thread, after what was submitted for it before.

        `memory`: the name of what the session shares. Another one is another process's, and no old job may write there.
        """
        worker = self._workers.get(session_id)
        if worker is not None and not (worker.is_alive() and worker.serves(memory)):
            self._end(session_id)
            worker = None
        if worker is None:
            worker = self._workers[session_id] = self._make_worker(session_id)
            worker.start()
        self._last_used.pop(session_id, None)
        self._last_used[session_id] = now
        worker.submit(write, done, memory)

    def report_when_quiet(self, session_id: str) -> None:
        """As soon as it is proven that no failed write to the session can land any more."""
        worker = self._workers.get(session_id)
        if worker is not None and session_id not in self._unproven:
            worker.report_when_quiet()

    def keep_only(self, sessions: Collection[str]) -> None:
        """End the workers of sessions that are gone."""
        for session_id in [known for known in self._workers if known not in sessions]:
            self._end(session_id)
        self._ended = [worker for worker in self._ended if worker.is_alive()]

    def _end(self, session_id: str) -> None:
        self._last_used.pop(session_id, None)
        worker = self._workers.pop(session_id)
        if worker.owes_proof:
            self._unproven.add(session_id)
        worker.stop()
        self._ended.append(worker)

    def next_wakeup(self) -> float | None:
        return next((used + IDLE_SECONDS for used in self._last_used.values()), None)

    def end_idle(self, now: float) -> None:
        """A session that is served no more costs no thread; the data plane keeps what the next chunk can use."""
        while (due := self.next_wakeup()) is not None and due <= now:
            session_id = next(iter(self._last_used))
            if self._workers[session_id].is_busy:
                del self._last_used[session_id]
                self._last_used[session_id] = now
            else:
                self._end(session_id)

    def __len__(self) -> int:
        return len(self._workers)

    def close(self) -> None:
        """Wait for the writes under way; they end by themselves within Mooncake's own timeout."""
        self.keep_only(())
        for worker in self._ended:
            worker.join()
        self._ended.clear()


class TransferWorker(WatchedThread):
    """The thread that writes to one session."""

    def __init__(
        self,
        session_id: str,
        plane: DataPlane,
        on_quiet: Callable[[str], None],
        on_death: Callable[[str], None],
        memory: str = "",
    ) -> None:
        super().__init__(f"relay-transfer-{session_id}", self._serve, on_death)
        self._session_id = session_id
        self._plane = plane
        self._memory = self._latest_memory = memory
        self._on_quiet = on_quiet
        self._jobs: SimpleQueue[_Job | _Command] = SimpleQueue()
        self._stopped = False
        self._has_ended = False
        self._submitted = self._finished = 0  # each counted by one thread alone
        self._look_until: float | None = None
        self.owes_proof = False
        """A write has failed, and may still land."""

    # ---- any thread

    def submit(self, write: Write, done: Done, memory: str = "") -> None:
        self._submitted += 1
        self._latest_memory = memory
        self._put((write, done))

    @property
    def is_busy(self) -> bool:
        return self._submitted != self._finished or self._look_until is not None

    def serves(self, memory: str) -> bool:
        """A proof that is owed is this thread's to find, whoever the session is by now; and what it has begun for that
        process is not gone on with by another.
        """
        return self.owes_proof or self._memory == memory or (self.is_busy and self._latest_memory == memory)

    def report_when_quiet(self) -> None:
        self._put(_Command.REPORT_WHEN_QUIET)

    def _put(self, job: _Job | _Command) -> None:
        self._jobs.put(job)
        if self._has_ended:
            self._answer_the_rest()

    def stop(self) -> None:
        self._stopped = True
        self._jobs.put(_Command.STOP)

    def _answer_the_rest(self) -> None:
        """Nobody works on these jobs any more. Several threads may be here at a time: each job is taken once."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if not isinstance(job, _Command):
                job[1](f"the transfer worker for {self._session_id} has ended")
            elif job is _Command.REPORT_WHEN_QUIET and not self.owes_proof:
                self._on_quiet(self._session_id)

    # ---- its own thread

    def _serve(self) -> None:
        try:
            link = self._plane.link(self._session_id, self._memory)
            try:
                self._work_on(link)
            finally:
                link.close()
        finally:
            self._has_ended = True
            self._answer_the_rest()

    def _work_on(self, link: Link) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self._until_next_look())
            except Empty:
                self._look_for_proof(link)
                continue
            if job is _Command.STOP:
                return
            if job is _Command.REPORT_WHEN_QUIET:
                self._look_until = time.monotonic() + _PROOF_EXPIRES
                self._look_for_proof(link)
                continue
            write, done = job
            problem = f"the transfer worker for {self._session_id} has died"
            try:
                problem = self._attempt(link, write)
            finally:
                done(problem)
                self._finished += 1

    def _until_next_look(self) -> float | None:
        """How long to wait for a job: proof comes within moments, or when somebody has done something about it."""
        if self._look_until is None:
            return None
        looked_for = time.monotonic() - (self._look_until - _PROOF_EXPIRES)
        return min(_LOOK_SELDOM, _LOOK_EVERY + looked_for / 10)

    def _attempt(self, link: Link, write: Write) -> str:
        if self._stopped:
            return f"session {self._session_id} is gone"
        try:
            return self._write_or_retry(link, write)
        except BaseException as error:
            # A bug, and nobody knows how far the write got. The instance is unhealthy from here on, but its peer will
            # want the proof that nothing more can land, so this thread goes on.
            logger.exception("%s failed", self.name)
            self._report(f"{self.name} failed: {error!r}")
            self._give_up(link)
            return f"the transfer worker for {self._session_id} failed: {error!r}"

    def _write_or_retry(self, link: Link, write: Write) -> str:
        try:
            write(link)
        except Unreachable as error:
            return str(error)
        except TransferError as error:
            logger.warning("relay transfer failed, the engine is renewed: %s", error)
        else:
            return ""
        self._give_up(link)
        # The same bytes may be written again only when no older copy of them can land later, over newer rows.
        if not self._wait_until_quiet(link):
            return f"the write to {self._session_id} failed, and may still land"
        try:
            write(link)
        except TransferError as error:
            self._give_up(link)
            return str(error)
        return ""

    def _give_up(self, link: Link) -> None:
        self.owes_proof = True
        link.renew()

    def _wait_until_quiet(self, link: Link) -> bool:
        deadline = time.monotonic() + _RETRY_PATIENCE
        while not self._stopped and time.monotonic() < deadline:
            if link.is_quiet():
                self.owes_proof = False
                return True
            time.sleep(_LOOK_EVERY)
        return False

    def _look_for_proof(self, link: Link) -> None:
        if self._look_until is None:
            return
        if link.is_quiet():
            self._look_until = None
            self.owes_proof = False
            self._on_quiet(self._session_id)
        elif time.monotonic() > self._look_until:
            self._look_until = None
            logger.error(
                "relay: %s has not read what was sent to it before a failed write; its blocks stay in quarantine until"
                " it is restarted",
                self._session_id,
            )
