"""The run of one session: ask the rows that have no answer yet, report progress, save the answered workbook."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

import msgspec

from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.asking.question import chat_request
from embedding_relay.batch.asking.run import CANNOT_REACH, NO_ANSWERS, Run
from embedding_relay.batch.background.places import Share
from embedding_relay.batch.errors import StaleJob
from embedding_relay.batch.openai.files import save_batch_files
from embedding_relay.batch.session.folder import Folder, ResultIndex, ResultWriter, keep_set_aside
from embedding_relay.batch.session.records import Counts, Session
from embedding_relay.batch.session.sessions import ANSWERED, RESULTS, SPLIT, UPLOADED, Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import Lease, StoreAway
from embedding_relay.batch.store.mirror import FilesAway
from embedding_relay.batch.tasks import Result, Task
from embedding_relay.batch.workbook.formats import check_answers, write_answers

REPORT_EVERY: Final = 0.25
ASK_FOR_MODEL_EVERY: Final = 2.0
# What came in since then is asked again if the machine is lost, and not only the worker.
KEEP_EVERY: Final = 2.0
# What kills a worker does so sooner.
INNOCENT_SECONDS: Final = 600.0
FOR_A_PLACE: Final = "waits for its turn: other runs have all requests that this service may have in flight"


class Execution:
    """One worker's attempt, on its event loop; large reads and writes go to a thread."""

    def __init__(
        self,
        sessions: Sessions,
        session_id: str,
        folder: Folder,
        settings: Settings,
        endpoint: Endpoint,
        lease: Lease,
        share: Share,
        heavy: asyncio.Semaphore,
    ) -> None:
        self._sessions = sessions
        self._id = session_id
        self._folder = folder
        self._settings = settings
        self._endpoint = endpoint
        self._lease = lease
        self._share = share
        self._taken_at = time.monotonic()
        self._heavy = heavy
        self._one_keeps = threading.Lock()
        self._kept = 0  # bytes of this attempt's results that are in the object store
        self._attempt = 0

    async def run(self) -> None:
        session = await asyncio.to_thread(self._sessions.change, self._id, self._take)
        await asyncio.to_thread(self._sessions.bring, self._id, *UPLOADED, *SPLIT, *RESULTS)
        index = await asyncio.to_thread(ResultIndex, self._folder.path, session.execution.set_aside)
        session = await self._move(lambda session: session.execution.mark_running())
        async with self._share:
            session = await self._ask(session, index)
        session = await self._move(lambda session: session.mark_saving())
        async with self._heavy:
            counts = await asyncio.to_thread(self._save, session)
        await self._move(lambda session: session.complete_execution(counts))

    def _take(self, session: Session) -> None:
        self._attempt = session.execution.take()

    # ---- asking

    async def _ask(self, session: Session, index: ResultIndex) -> Session:
        rest = (task for task in self._folder.tasks(session.split.attempt) if task.row not in index)
        first = await asyncio.to_thread(next, rest, None)
        if first is None or session.execution.wish.cancelled:
            return session  # a worker that died had asked everything, or there is nothing to ask any more
        before = msgspec.structs.replace(index.counts, retries=session.execution.counts.retries)
        model = session.asking.model
        if not model:
            session, model = await self._find_model(session, before)
            if session.execution.wish.cancelled:
                return session
        path = session.order.endpoint if session.order else ""
        most = self._settings.concurrency

        def request_of(task: Task) -> tuple[str, dict[str, object]]:
            return chat_request(task, session.asking, model, self._folder.path, path)

        with ResultWriter(self._folder.path, self._attempt) as writer:

            def record(result: Result) -> None:
                self._lease.check()
                writer.write(result)

            run = Run(
                itertools.chain([first], rest),
                self._endpoint,
                request_of,
                record,
                concurrency=min(session.asking.concurrency or most, most),
                retries=self._settings.retries,
                total=session.execution.total,
                already=before,
            )
            async with self._kept_results():
                return await self._follow(run, session)

    async def _follow(self, run: Run, session: Session) -> Session:
        """Run it; meanwhile pause or cancel it as people wish, and report how far it is."""
        going = asyncio.create_task(run.run(), name=f"run of {self._id}")
        try:
            ended = False
            while not ended:
                run.paused = session.execution.wish.paused
                if session.execution.wish.cancelled:
                    run.cancel()
                self._share.wanted = 0 if run.paused else run.concurrency
                self._share.in_flight = run.counts.running
                run.limit = min(self._share.limit, run.concurrency)
                ended = bool((await asyncio.wait({going}, timeout=REPORT_EVERY))[0])
                # A store that is away for a moment is no reason to give up the rows in flight: the lease decides.
                with contextlib.suppress(StoreAway):
                    session = await self._report(self._counts(run))
            await going
            return session
        finally:
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _kept_results(self) -> AsyncIterator[None]:
        """What comes in goes to the object store every moment, if there is one, and all of it at the end."""

        async def keep() -> None:
            while True:
                await asyncio.sleep(KEEP_EVERY)
                with contextlib.suppress(FilesAway):  # it is on this machine's disk, and may come later
                    await asyncio.to_thread(self._keep_results)

        keeping = asyncio.create_task(keep()) if self._sessions.mirror else None
        try:
            yield
        finally:
            if keeping:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
                await asyncio.to_thread(self._keep_results)

    def _keep_results(self) -> None:
        with self._one_keeps:  # two at once would write pieces that begin at the same place
            self._kept = self._sessions.save_results(self._id, self._attempt, self._kept)

    def _counts(self, run: Run) -> Counts:
        if run.limit or run.paused:
            return run.counts
        return msgspec.structs.replace(run.counts, waiting=FOR_A_PLACE, trouble="its turn")

    async def _find_model(self, session: Session, counts: Counts) -> tuple[Session, str]:
        """The first model that the endpoint lists. While the endpoint is away this is reported, and asked again."""
        while not session.execution.wish.cancelled:
            try:
                return session, await self._endpoint.model()
            except ConnectionError as away:
                trouble = CANNOT_REACH if "cannot reach" in str(away) else NO_ANSWERS
                session = await self._report(msgspec.structs.replace(counts, waiting=str(away), trouble=trouble))
                await asyncio.sleep(ASK_FOR_MODEL_EVERY)
        return session, ""

    # ---- saving

    def _save(self, session: Session) -> Counts:
        assert session.analysis is not None
        keep_set_aside(self._folder.path, session.execution.set_aside, self._attempt)
        index = ResultIndex(self._folder.path, session.execution.set_aside)
        source, answers = self._folder.source(session.kind), self._folder.answers(session.kind, self._attempt)

        def results() -> Iterator[Result]:
            return index.in_order(self._folder.tasks(session.split.attempt))

        with self._folder.saving(answers) as partial:
            write_answers(source, session.kind, session.analysis, results(), partial)
        check_answers(answers, session.kind, session.analysis, results())
        if session.order:
            save_batch_files(self._folder, self._attempt, results())
        self._sessions.save(self._id, *RESULTS)
        self._sessions.save(self._id, *(f"{kind}.{self._attempt}.*" for kind in ANSWERED), verified=True)
        return msgspec.structs.replace(index.counts, retries=session.execution.counts.retries)

    # ---- reporting

    async def _report(self, counts: Counts) -> Session:
        def advance(session: Session) -> None:
            session.execution.advance(counts)
            if time.monotonic() - self._taken_at > INNOCENT_SECONDS:
                session.execution.unended = 1  # our own: the deaths before it were of something else

        return await self._move(advance)

    async def _move(self, by: Callable[[Session], None]) -> Session:
        def ours(session: Session) -> None:
            if session.execution.attempt != self._attempt:
                raise StaleJob
            by(session)

        self._lease.check()
        return await asyncio.to_thread(self._sessions.change, self._id, ours)
