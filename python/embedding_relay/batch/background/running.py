"""The run of one session: ask the rows that have no answer yet, report progress, save the answered workbook."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.asking.question import chat_request
from embedding_relay.batch.asking.run import Run
from embedding_relay.batch.errors import StaleJob
from embedding_relay.batch.openai.files import save_batch_files
from embedding_relay.batch.session.folder import Folder, ResultIndex, ResultWriter
from embedding_relay.batch.session.records import Counts, Session
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import Lease, StoreAway
from embedding_relay.batch.tasks import Result, Task
from embedding_relay.batch.workbook.formats import check_answers, write_answers

REPORT_EVERY: Final = 0.25
ASK_FOR_MODEL_EVERY: Final = 2.0


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
        heavy: asyncio.Semaphore,
    ) -> None:
        self._sessions = sessions
        self._id = session_id
        self._folder = folder
        self._settings = settings
        self._endpoint = endpoint
        self._lease = lease
        self._heavy = heavy
        self._attempt = 0

    async def run(self) -> None:
        await asyncio.to_thread(self._sessions.change, self._id, self._take)
        index = await asyncio.to_thread(ResultIndex, self._folder.path)
        session = await self._move(lambda session: session.execution.mark_running())
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
        model = session.asking.model
        if not model:
            session, model = await self._find_model(session, index.counts)
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
                already=index.counts,
            )
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
                ended = bool((await asyncio.wait({going}, timeout=REPORT_EVERY))[0])
                # A store that is away for a moment is no reason to give up the rows in flight: the lease decides.
                with contextlib.suppress(StoreAway):
                    session = await self._report(run.counts)
            await going
            return session
        finally:
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)

    async def _find_model(self, session: Session, counts: Counts) -> tuple[Session, str]:
        """The first model that the endpoint lists. While the endpoint is away this is reported, and asked again."""
        while not session.execution.wish.cancelled:
            try:
                return session, await self._endpoint.model()
            except ConnectionError as away:
                session = await self._report(msgspec.structs.replace(counts, waiting=str(away)))
                await asyncio.sleep(ASK_FOR_MODEL_EVERY)
        return session, ""

    # ---- saving

    def _save(self, session: Session) -> Counts:
        assert session.analysis is not None
        index = ResultIndex(self._folder.path)
        source, answers = self._folder.source(session.kind), self._folder.answers(session.kind, self._attempt)

        def results() -> Iterator[Result]:
            return index.in_order(self._folder.tasks(session.split.attempt))

        with self._folder.saving(answers) as partial:
            write_answers(source, session.kind, session.analysis, results(), partial)
        check_answers(answers, session.kind, session.analysis, results())
        if session.order:
            save_batch_files(self._folder, self._attempt, results())
        return index.counts

    # ---- reporting

    async def _report(self, counts: Counts) -> Session:
        return await self._move(lambda session: session.execution.advance(counts))

    async def _move(self, by: Callable[[Session], None]) -> Session:
        def ours(session: Session) -> None:
            if session.execution.attempt != self._attempt:
                raise StaleJob
            by(session)

        self._lease.check()
        return await asyncio.to_thread(self._sessions.change, self._id, ours)
