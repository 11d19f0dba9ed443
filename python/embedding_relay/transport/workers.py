"""Transfer workers: one thread and one link per destination session, so that a stuck peer holds up nobody else."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Collection
from queue import Empty, SimpleQueue
from typing import Final

from embedding_relay.memory.plane import DataPlane, Link, TransferError
from embedding_relay.threads import WatchedThread

logger = logging.getLogger(__name__)

# How long a retry waits for proof that the failed write is over. A healthy peer gives it within milliseconds.
_RETRY_PATIENCE: Final = 2.0
# A peer that is stopped or cut off for longer keeps its blocks in quarantine: its operator will restart it anyway.
_PROOF_EXPIRES: Final = 3600.0
_LOOK_EVERY: Final = 0.1
# Longer than a write can take, so that an unused worker is rarely a busy one.
IDLE_SECONDS: Final = 90.0
_LOOK_SELDOM: Final = 5.0

Write = Callable[[Link], None]
Done = Callable[[str], None]
"""Called with what went wrong; empty means that every byte is at the peer."""
_Job = tuple[Write, Done]


class _Order(enum.Enum):
    WATCH = enum.auto()
    STOP = enum.auto()


class TransferWorkers:
    """The workers of one rank. Used by the control thread only, and by `close`."""

    def __init__(self, make_worker: Callable[[str], TransferWorker]) -> None:
        self._make_worker = make_worker
        self._workers: dict[str, TransferWorker] = {}
        self._last_used: dict[str, float] = {}  # the longest unused first
        self._ended: list[TransferWorker] = []
        self._unproven: set[str] = set()
        """Sessions with a failed write of which no worker can prove any more that it is over."""

    def submit(self, session_id: str, now: float, write: Write, done: Done) -> None:
        """Run `write` in the session's own thread, after what was submitted for it before."""
        worker = self._workers.get(session_id)
        if worker is not None and not worker.is_alive():
            self._end(session_id)
            worker = None
        if worker is None:
            worker = self._workers[session_id] = self._make_worker(session_id)
            worker.start()
        self._last_used.pop(session_id, None)
        self._last_used[session_id] = now
        worker.submit(write, done)

    def watch(self, session_id: str) -> None:
        """Report as soon as it is proven that no failed write to the session can land any more."""
        worker = self._workers.get(session_id)
        if worker is not None and session_id not in self._unproven:
            worker.watch()

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
        """A session that is served no more costs no thread and no connection; the next chunk opens both anew."""
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
    def __init__(
        self, session_id: str, plane: DataPlane, on_quiet: Callable[[str], None], on_death: Callable[[str], None]
    ) -> None:
        super().__init__(f"relay-transfer-{session_id}", self._serve, on_death)
        self._session_id = session_id
        self._plane = plane
        self._on_quiet = on_quiet
        self._jobs: SimpleQueue[_Job | _Order] = SimpleQueue()
        self._stopped = False
        self._is_over = False
        self._is_working = False
        self._watch_until: float | None = None
        self.owes_proof = False
        """A write has failed, and may still land."""

    # ---- any thread

    def submit(self, write: Write, done: Done) -> None:
        self._jobs.put((write, done))
        if self._is_over:
            self._answer_the_rest()

    @property
    def is_busy(self) -> bool:
        return self._is_working or self._watch_until is not None or not self._jobs.empty()

    def watch(self) -> None:
        self._jobs.put(_Order.WATCH)

    def stop(self) -> None:
        self._stopped = True
        self._jobs.put(_Order.STOP)

    def _answer_the_rest(self) -> None:
        """Nobody works on these jobs any more. Several threads may be here at a time: each job is taken once."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if not isinstance(job, _Order):
                job[1](f"the transfer worker for {self._session_id} has ended")

    # ---- its own thread

    def _serve(self) -> None:
        try:
            link = self._plane.link(self._session_id)
            try:
                self._work_on(link)
            finally:
                link.close()
        finally:
            self._is_over = True
            self._answer_the_rest()

    def _work_on(self, link: Link) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self._patience())
            except Empty:
                self._look_for_proof(link)
                continue
            if job is _Order.STOP:
                return
            if job is _Order.WATCH:
                self._watch_until = time.monotonic() + _PROOF_EXPIRES
                self._look_for_proof(link)
                continue
            write, done = job
            problem = f"the transfer worker for {self._session_id} has died"
            self._is_working = True
            try:
                problem = self._attempt(link, write)
            finally:
                self._is_working = False
                done(problem)

    def _patience(self) -> float | None:
        """How long to wait for a job: proof comes within moments, or when somebody has done something about it."""
        if self._watch_until is None:
            return None
        watched = time.monotonic() - (self._watch_until - _PROOF_EXPIRES)
        return min(_LOOK_SELDOM, _LOOK_EVERY + watched / 10)

    def _attempt(self, link: Link, write: Write) -> str:
        if self._stopped:
            return f"session {self._session_id} is gone"
        try:
            return self._write_or_retry(link, write)
        except BaseException as error:
            # A bug, and nobody knows how far the write got. The instance is ill, but its peer will want the proof that
            # nothing more can land, so this thread goes on.
            logger.exception("%s failed", self.name)
            self._report(f"{self.name} failed: {error!r}")
            self._give_up(link)
            return f"the transfer worker for {self._session_id} failed: {error!r}"

    def _write_or_retry(self, link: Link, write: Write) -> str:
        try:
            write(link)
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
        if self._watch_until is None:
            return
        if link.is_quiet():
            self._watch_until = None
            self.owes_proof = False
            self._on_quiet(self._session_id)
        elif time.monotonic() > self._watch_until:
            self._watch_until = None
            logger.error("relay: no proof that %s is quiet; blocks stay in quarantine there", self._session_id)
