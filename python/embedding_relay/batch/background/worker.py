"""The background work of one process: find splits and runs that nobody holds the lease of, and carry them out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Final, Literal

from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.background.places import Places, Share
from embedding_relay.batch.background.running import Execution
from embedding_relay.batch.background.splitting import Split
from embedding_relay.batch.errors import NotWhatWasSaved, Refusal, StaleJob, UnknownSession, WorkersDied, in_words
from embedding_relay.batch.openai.files import Files
from embedding_relay.batch.session.folder import REMOVED, Folder
from embedding_relay.batch.session.records import (
    MOST_DEATHS,
    ExecutionProgress,
    ExecutionStatus,
    Session,
    SplitProgress,
    SplitStatus,
    counted,
)
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import Lease, Store, StoreAway

logger = logging.getLogger(__name__)

Part = Literal["split", "run"]

# After a full disk or a store that was away.
TRY_AGAIN_SECONDS: Final = 5.0
SWEEP_SECONDS: Final = 600.0
# A copy of what another machine has deleted; longer than any upload takes to become a session.
COPY_KEPT: Final = 3600.0
OVER_SECONDS: Final = 60.0
# Splits and savings at the same time. Each occupies a thread for long, and asyncio has as few as five: without a free
# one no lease is renewed, and the workers would take the same work from each other for ever.
HEAVY_AT_ONCE: Final = 3
# When so many workers have died over it, the next one does nothing else meanwhile, so that nothing else is blamed.
SUSPECT_AFTER: Final = MOST_DEATHS - 1
SUSPECTED: Final = f"{SUSPECT_AFTER} workers died while they were at it; it waits for one that has nothing else to do"
# Where every worker always has something to do, it would wait for ever.
ALONE_WITHIN: Final = 900.0
NEVER_ALONE: Final = (
    f"{SUSPECT_AFTER} worker processes died, one after the other, while they were at this {{part}}. It would be tried "
    "once more by a worker that has nothing else to do, and within {minutes:.0f} minutes there was none: try again "
    "when the service has less to do; the log of the machine may say why they died"
)


def open_part(session: Session) -> Part | None:
    """Which part of the session some worker should be carrying out."""
    if session.split.status in (SplitStatus.PROCESSING, SplitStatus.SAVING):
        return "split"
    if session.execution.status in (ExecutionStatus.INITIALIZING, ExecutionStatus.RUNNING):
        return "run"
    return None


def name_of(session: Session, part: Part) -> str:
    """Of its lease, and of the job that has it."""
    return f"{part}:{session.session_id}"


def may_ask(session: Session) -> bool:
    """Whether its run could ask rows, if it had a place for that."""
    execution = session.execution
    return not (execution.wish.paused or execution.wish.cancelled or execution.saving)


def progress_of(session: Session, part: Part) -> SplitProgress | ExecutionProgress:
    return session.split if part == "split" else session.execution


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
        # Sessions that have ended, and until when they are not read again. A retry begins one again: at once in the
        # process that is asked for it (`_woken`), and if that one is killed, in the others a little later.
        self._over: dict[str, float] = {}
        self._woken: set[str] = set()
        self._sweep_at = 0.0
        self._heavy = asyncio.Semaphore(HEAVY_AT_ONCE)
        self._places = Places(store, settings)
        self._its_turn = f"waits for its turn: this service carries out {counted(self._places.count, 'run')} at a time"
        self._alone = ""  # what is carried out here without anything beside it, if that is under way
        # What waits for a worker that has nothing else to do: after how many attempts, and since when.
        self._suspects: dict[str, tuple[int, float]] = {}
        self._alive: set[tuple[Part, str]] = set()  # attempts that have ended in order, and the store was away
        self._passed_by = False  # whether a split was left to others for want of a free thread
        self._endpoint = Endpoint(
            settings.endpoint, api_key=settings.endpoint_api_key, request_seconds=settings.request_seconds
        )

    def wake(self, session_id: str) -> None:
        """A call in this process has begun something in this session: look now, not at the next round. Any thread."""
        self._woken.add(session_id)
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
                # Not wait_for: it may swallow that this task is cancelled, if it is woken in the same moment.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.scan_seconds):
                        await self._wake.wait()
        finally:
            jobs = list(self._jobs.values())
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            await self._endpoint.close()

    async def _look(self) -> None:
        for attempt in list(self._alive):
            await asyncio.to_thread(self._note_alive, *attempt)
        found = await asyncio.to_thread(self._open_parts)
        self._places.runs = sum(part == "run" and may_ask(session) for session, part in found)
        for session, part in found:
            name = name_of(session, part)
            if name in self._jobs or self._not_before.get(name, 0.0) > time.monotonic():
                continue
            if self._alone in self._jobs:
                break
            if part == "split" and self._heavy.locked():
                self._passed_by = True
                continue  # another worker may have a free thread for it
            lease = Lease(self._store, name, self._name, self._settings.lease_seconds)
            if await lease.take():
                try:
                    await self._begin(session, part, name, lease)
                except BaseException:
                    await lease.give_up()
                    raise
        still_open = {name_of(*one) for one in found}
        self._suspects = {name: seen for name, seen in self._suspects.items() if name in still_open}
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_SECONDS
            await asyncio.to_thread(self._sweep)

    async def _begin(self, session: Session, part: Part, name: str, lease: Lease) -> None:
        share, why_not = None, ""
        if progress_of(session, part).unended >= SUSPECT_AFTER:
            self._alone = name
            why_not = SUSPECTED if self._jobs else ""
            if why_not and self._waits_too_long(name, progress_of(session, part).attempt, time.monotonic()):
                died = WorkersDied(NEVER_ALONE.format(part=part, minutes=ALONE_WITHIN / 60))
                with contextlib.suppress(StaleJob, UnknownSession):
                    await asyncio.to_thread(self._fail, part, session.session_id, died)
                await lease.give_up()
                return
        if part == "run" and not why_not:
            share = await self._places.share(session.session_id, self._settings.concurrency if may_ask(session) else 0)
            why_not = "" if share else self._its_turn
        if why_not:
            await lease.give_up()
            await asyncio.to_thread(self._say, part, session.session_id, why_not, session)
            return
        job = asyncio.create_task(self._do(part, session.session_id, lease, share), name=name)
        self._jobs[name] = job
        job.add_done_callback(self._forget)

    def _waits_too_long(self, name: str, attempts: int, now: float) -> bool:
        """By the clock of this process; a worker that has tried it meanwhile has counted one more attempt."""
        before, since = self._suspects.get(name, (attempts, now))
        if before != attempts:
            since = now
        self._suspects[name] = attempts, since
        return now - since > ALONE_WITHIN

    def _forget(self, job: asyncio.Task[None]) -> None:
        del self._jobs[job.get_name()]
        self._wake.set()  # there may be a place for another run now

    def _open_parts(self) -> list[tuple[Session, Part]]:
        """What was uploaded first comes first."""
        found: list[tuple[Session, Part]] = []
        ids = self._sessions.ids()
        while self._woken:
            self._over.pop(self._woken.pop(), None)
        now = time.monotonic()
        self._over = {one: until for one in ids if (until := self._over.get(one, 0.0)) > now}
        for session_id in ids:
            if session_id in self._over:
                continue
            session = self._sessions.find(session_id)
            if session is None:
                continue
            if session.stage.is_over():
                self._over[session_id] = now + OVER_SECONDS
            elif part := open_part(session):
                found.append((session, part))
        return sorted(found, key=lambda one: one[0].created_at)

    # ---- one part of one session

    async def _do(self, part: Part, session_id: str, lease: Lease, share: Share | None) -> None:
        name = f"{part}:{session_id}"
        try:
            async with lease:
                try:
                    await self._do_or_fail(part, session_id, lease, share)
                except BaseException:
                    await asyncio.to_thread(self._note_alive, part, session_id)
                    raise
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
            why = f"{in_words(error)}; trying again every {TRY_AGAIN_SECONDS:g} s"
            await asyncio.to_thread(self._say, part, session_id, why)

    async def _do_or_fail(self, part: Part, session_id: str, lease: Lease, share: Share | None) -> None:
        try:
            await (self._execute(session_id, lease, share) if share else self._split(session_id, lease))
        except Exception as error:
            if self._may_go_on(error):
                raise
            lease.check()
            await asyncio.to_thread(self._fail, part, session_id, error)

    def _may_go_on(self, error: Exception) -> bool:
        """Whether it may be otherwise the next time, or when another worker does it."""
        if isinstance(error, StaleJob | UnknownSession | StoreAway):
            return True
        return isinstance(error, OSError) and not self._is_gone(error)

    def _note_alive(self, part: Part, session_id: str) -> None:
        """The attempt has ended, well or not, and this process lives: nobody has died over it."""

        def note(session: Session) -> None:
            if open_part(session) != part:
                raise StaleJob
            progress = progress_of(session, part)
            progress.unended = max(0, progress.unended - 1)

        self._alive.add((part, session_id))
        with contextlib.suppress(StaleJob, UnknownSession):
            try:
                self._sessions.change(session_id, note)
            except StoreAway:
                return  # tried again at the next look
        self._alive.discard((part, session_id))

    def _is_gone(self, error: OSError) -> bool:
        """Whether a file of the session is gone for good, as opposed to a whole disk that is away for the moment."""
        return isinstance(error, FileNotFoundError) and self._settings.sessions_dir.is_dir()

    async def _split(self, session_id: str, lease: Lease) -> None:
        split = Split(self._sessions, session_id, self._sessions.folder(session_id), self._settings, lease.check)
        async with self._heavy:
            await asyncio.to_thread(split.run)

    async def _execute(self, session_id: str, lease: Lease, share: Share) -> None:
        folder = self._sessions.folder(session_id)
        parts = (self._sessions, session_id, folder, self._settings, self._endpoint, lease, share, self._heavy)
        try:
            await Execution(*parts).run()
        finally:
            await share.give_back()

    def _fail(self, part: Part, session_id: str, error: Exception) -> None:
        sentence = self._sentence(session_id, error)

        def fail(session: Session) -> None:
            if open_part(session) != part:
                raise StaleJob
            if part == "split":
                session.fail_split(sentence)
            else:
                session.fail_execution(sentence)

        self._sessions.change(session_id, fail)
        # Not before: a session that was deleted under our hands has not failed, and is no news.
        trace = None if isinstance(error, WorkersDied) else error
        logger.error("batch: session %s: the %s failed: %s", session_id, part, error, exc_info=trace)

    def _sentence(self, session_id: str, error: Exception) -> str:
        match error:
            case FileNotFoundError(filename=str(path)):
                return f"the file {Path(path).name} of this session is gone; please upload its workbook again"
            case NotWhatWasSaved():
                return f"{error}; is the disk failing?".replace(f"{self._sessions.folder(session_id).path}/", "")
            case Refusal() | WorkersDied():
                return str(error)
            case MemoryError():
                return "the memory of the machine is used up"
        return f"this is a bug of the service ({type(error).__name__}); its log says more"

    def _say(self, part: Part, session_id: str, sentence: str, seen: Session | None = None) -> None:
        """Tell those who wait for it why it does not go on, unless that is what it said when it was `seen`."""
        if seen is not None and progress_of(seen, part).message == sentence:
            return

        def say(session: Session) -> None:
            if open_part(session) == part:
                progress_of(session, part).message = sentence

        with contextlib.suppress(UnknownSession, StoreAway):
            self._sessions.change(session_id, say)

    # ---- expired sessions

    def _sweep(self) -> None:
        """Remove folders without a session, if older than any session: younger ones may belong to another store.

        And those whose removal was begun and not ended.
        """
        known, mirror = set(self._sessions.ids()), self._sessions.mirror
        for path in self._settings.sessions_dir.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # other workers sweep too, and refused uploads are removed
                is_old = time.time() - path.stat().st_mtime > (COPY_KEPT if mirror else self._settings.keep_seconds)
                if path.suffix == REMOVED or (is_old and path.name not in known):
                    Folder(path).remove()
        if mirror:
            mirror.sweep("sessions", self._settings.keep_seconds, known.__contains__)
        Files(self._store, self._sessions, self._settings).sweep()
