"""The background work of one process: find splits and runs that nobody holds the lease of, and carry them out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Literal

from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.background.running import Execution
from embedding_relay.batch.background.splitting import Split
from embedding_relay.batch.errors import StaleJob, UnknownSession
from embedding_relay.batch.openai.files import Files
from embedding_relay.batch.session.folder import REMOVED, Folder
from embedding_relay.batch.session.records import ExecutionStatus, Session, SplitStatus
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import Lease, Store, StoreAway

logger = logging.getLogger(__name__)

Part = Literal["split", "run"]

# After a full disk or a store that was away.
TRY_AGAIN_SECONDS: Final = 5.0
SWEEP_SECONDS: Final = 600.0
# Splits and savings at the same time. Each occupies a thread for long, and asyncio has as few as five: without a free
# one no lease is renewed, and the workers would take the same work from each other for ever.
HEAVY_AT_ONCE: Final = 3


def open_part(session: Session) -> Part | None:
    """Which part of the session some worker should be carrying out."""
    if session.split.status in (SplitStatus.PROCESSING, SplitStatus.SAVING):
        return "split"
    if session.execution.status in (ExecutionStatus.INITIALIZING, ExecutionStatus.RUNNING):
        return "run"
    return None


class Worker:
    def __init__(self, settings: Settings, store: Store, sessions: Sessions) -> None:
        self._settings = settings
        self._store = store
        self._sessions = sessions
        self._name = f"{os.uname().nodename} {os.getpid()} {secrets.token_hex(4)}"
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}
        self._over: set[str] = set()  # sessions that have ended: they are not read again
        self._sweep_at = 0.0
        self._heavy = asyncio.Semaphore(HEAVY_AT_ONCE)
        self._passed_by = False  # whether a split was left to others for want of a free thread
        self._endpoint = Endpoint(
            settings.endpoint, api_key=settings.endpoint_api_key, request_seconds=settings.request_seconds
        )

    def wake(self) -> None:
        """A call in this process has begun something: look now, not at the next round. From any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    async def run(self) -> None:
        """Until cancelled. The leases are released then, so that other workers can take over at once."""
        self._loop = asyncio.get_running_loop()
        await self._endpoint.start()
        try:
            while True:
                self._wake.clear()
                try:
                    await self._look()
                except (StoreAway, OSError) as away:
                    logger.warning("batch: %s; trying again in %g s", away, self._settings.scan_seconds)
                try:
                    await asyncio.wait_for(self._wake.wait(), self._settings.scan_seconds)
                except TimeoutError:
                    continue
        finally:
            jobs = list(self._jobs.values())
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            await self._endpoint.close()

    async def _look(self) -> None:
        for session_id, part in await asyncio.to_thread(self._open_parts):
            name = f"{part}:{session_id}"
            if name in self._jobs or self._not_before.get(name, 0.0) > time.monotonic():
                continue
            if part == "split" and self._heavy.locked():
                self._passed_by = True
                continue  # another worker may have a free thread for it
            lease = Lease(self._store, name, self._name, self._settings.lease_seconds)
            if await lease.take():
                job = asyncio.create_task(self._do(part, session_id, lease), name=name)
                self._jobs[name] = job
                job.add_done_callback(self._forget)
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_SECONDS
            await asyncio.to_thread(self._sweep)

    def _forget(self, job: asyncio.Task[None]) -> None:
        del self._jobs[job.get_name()]

    def _open_parts(self) -> list[tuple[str, Part]]:
        found: list[tuple[str, Part]] = []
        ids = self._sessions.ids()
        self._over.intersection_update(ids)
        for session_id in ids:
            if session_id in self._over:
                continue
            session = self._sessions.find(session_id)
            if session is None:
                continue
            if session.stage.is_over():
                self._over.add(session_id)
            elif part := open_part(session):
                found.append((session_id, part))
        return found

    # ---- one part of one session

    async def _do(self, part: Part, session_id: str, lease: Lease) -> None:
        work: dict[Part, Callable[[str, Lease], Awaitable[None]]] = {"split": self._split, "run": self._execute}
        name = f"{part}:{session_id}"
        try:
            async with lease:
                try:
                    await work[part](session_id, lease)
                except (StaleJob, UnknownSession, StoreAway):
                    raise
                except Exception as error:
                    if isinstance(error, OSError) and not self._is_gone(error):
                        raise
                    lease.check()
                    await asyncio.to_thread(self._fail, part, session_id, error)
                    # Not before: a session that was deleted under our hands has not failed, and is no news.
                    logger.exception("batch: session %s: the %s failed", session_id, part)
            logger.info("batch: session %s: the %s is over", session_id, part)
            if self._passed_by:
                self._passed_by = False
                self._wake.set()  # a thread is free for the next one
        except (StaleJob, UnknownSession):
            logger.debug(
                "batch: session %s: the %s is over, deleted, or taken over by another worker", session_id, part
            )
        except (StoreAway, OSError) as error:
            # A full disk or a store that is away may be mended; no answer is lost meanwhile.
            logger.warning("batch: session %s: %s; trying again in %g s", session_id, error, TRY_AGAIN_SECONDS)
            self._not_before[name] = time.monotonic() + TRY_AGAIN_SECONDS
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            await asyncio.to_thread(self._say, part, session_id, f"{why}; trying again every {TRY_AGAIN_SECONDS:g} s")

    def _is_gone(self, error: OSError) -> bool:
        """Whether a file of the session is gone for good, as opposed to a whole disk that is away for the moment."""
        return isinstance(error, FileNotFoundError) and self._settings.sessions_dir.is_dir()

    async def _split(self, session_id: str, lease: Lease) -> None:
        split = Split(self._sessions, session_id, self._sessions.folder(session_id), self._settings, lease.check)
        async with self._heavy:
            await asyncio.to_thread(split.run)

    async def _execute(self, session_id: str, lease: Lease) -> None:
        folder = self._sessions.folder(session_id)
        await Execution(self._sessions, session_id, folder, self._settings, self._endpoint, lease, self._heavy).run()

    def _fail(self, part: Part, session_id: str, error: Exception) -> None:
        sentence = f"{type(error).__name__}: {error}"
        if isinstance(error, FileNotFoundError) and error.filename:
            sentence = f"the file {Path(error.filename).name} of this session is gone; please upload its workbook again"

        def fail(session: Session) -> None:
            if open_part(session) != part:
                raise StaleJob
            if part == "split":
                session.fail_split(sentence)
            else:
                session.fail_execution(sentence)

        self._sessions.change(session_id, fail)

    def _say(self, part: Part, session_id: str, sentence: str) -> None:
        """Tell those who wait for it why it does not go on."""

        def say(session: Session) -> None:
            if open_part(session) == part:
                progress = session.split if part == "split" else session.execution
                progress.message = sentence

        with contextlib.suppress(UnknownSession, StoreAway):
            self._sessions.change(session_id, say)

    # ---- expired sessions

    def _sweep(self) -> None:
        """Remove folders without a session, if older than any session: younger ones may belong to another store.

        And those whose removal was begun and not ended.
        """
        known = set(self._sessions.ids())
        for path in self._settings.sessions_dir.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # other workers sweep too, and refused uploads are removed
                is_old = time.time() - path.stat().st_mtime > self._settings.keep_seconds
                if path.suffix == REMOVED or (is_old and path.name not in known):
                    Folder(path).remove()
        Files(self._store, self._sessions, self._settings).sweep()
