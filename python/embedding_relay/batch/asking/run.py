"""One run over the tasks of a session: asks what the schedule decides, and records every row's result once."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Final

import msgspec

from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.asking.replies import failure
from embedding_relay.batch.asking.schedule import PATIENCE_SECONDS, Row, Schedule
from embedding_relay.batch.errors import in_words
from embedding_relay.batch.session.records import Counts
from embedding_relay.batch.tasks import Outcome, Result, Task

# A task's request: a path and a JSON object. Called in a thread when pictures have to be read.
RequestOf = Callable[[Task], tuple[str, Mapping[str, object]]]

# Seconds between two questions whether an endpoint that was away is back.
FIRST_LOOK: Final = 1.0
LONGEST_LOOK: Final = 30.0
CHUNK: Final = 64
# What `Counts.waiting` says in a sentence.
CANNOT_REACH: Final = "cannot reach"
NO_ANSWERS: Final = "no answers"
PACE_SECONDS: Final = 60.0
# With fewer rows than this in that time the rate looks further back.
PACE_ROWS: Final = 8

_encode = msgspec.json.Encoder().encode


class Run:
    """`run` once; `paused`, `cancel` and `counts` at any time, on the same event loop."""

    def __init__(
        self,
        tasks: Iterator[Task],
        endpoint: Endpoint,
        request_of: RequestOf,
        record: Callable[[Result], None],
        *,
        concurrency: int,
        retries: int,
        total: int,
        already: Counts,
        patience: float = PATIENCE_SECONDS,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._endpoint = endpoint
        self._request_of = request_of
        self._record = record
        self.concurrency = concurrency
        self._total = total
        self._wake = asyncio.Event()
        self._feed = Feed(tasks, concurrency, self._wake.set)
        self._schedule = Schedule(concurrency=concurrency, retries=retries, patience=patience, dice=dice)
        self._jobs: set[asyncio.Task[None]] = set()
        self._is_looking = False
        self._look_every = 0.0
        self._paused = self._cancelled = False
        self._error: BaseException | None = None
        self._pace = Pace(time.monotonic())
        self._done, self._failed, self._retries_before = already.done, already.failed, already.retries
        self._prompt_tokens, self._completion_tokens = already.prompt_tokens, already.completion_tokens

    # ---- watching and steering it

    @property
    def paused(self) -> bool:
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        if paused != self._paused:
            self._paused = paused
            # A pause must not count as time in which nothing was answered.
            self._pace = Pace(time.monotonic())
            self._wake.set()

    @property
    def limit(self) -> int:
        """The most requests in flight for now, up to `concurrency`; with 0 nothing new is asked."""
        return self._schedule.limit

    @limit.setter
    def limit(self, limit: int) -> None:
        if limit != self._schedule.limit:
            self._schedule.limit = limit
            self._wake.set()

    def cancel(self) -> None:
        """Ask nothing more, and give up what is in flight."""
        self._cancelled = True
        self._wake.set()

    @property
    def counts(self) -> Counts:
        rate = self._pace.rate(time.monotonic())
        left = self._total - self._done - self._failed
        return Counts(
            done=self._done,
            failed=self._failed,
            running=len(self._jobs) - self._is_looking,
            retries=self._retries_before + self._schedule.retries,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            rate=rate,
            seconds_left=left / rate if rate > 0 else None,
            waiting=self._waiting(),
            trouble=self._trouble(),
        )

    def _trouble(self) -> str:
        if self._schedule.away and self._look_every:
            return CANNOT_REACH
        return NO_ANSWERS if self._schedule.trouble(time.monotonic()) else ""

    def _waiting(self) -> str:
        endpoint = f"the endpoint {self._endpoint.url}"
        if self._schedule.away and self._look_every:
            return f"cannot reach {endpoint} ({self._schedule.away}); asking again every {self._look_every:.0f} s"
        if trouble := self._schedule.trouble(time.monotonic()):
            return f"{endpoint} {trouble}; asking again little by little"
        return ""

    # ---- the run

    async def run(self) -> None:
        """Until every task has its result, or it is cancelled. Raises what `record` or the tasks raise."""
        self._pace = Pace(time.monotonic())
        try:
            while not self._is_over():
                self._wake.clear()
                now = time.monotonic()  # one for both: what becomes due between them would never be asked
                self._ask_what_is_due(now)
                if not self._is_over():
                    await self._something_happens(now)
            if self._error is not None:
                raise self._error
        finally:
            await self._stop()

    def _is_over(self) -> bool:
        return self._cancelled or self._error is not None or (self._feed.is_over and self._schedule.is_idle)

    def _ask_what_is_due(self, now: float) -> None:
        self._feed.check()
        if self._paused:
            return
        while (row := self._schedule.take(now, self._fresh)) is not None:
            self._begin(self._ask(row))
        if self._schedule.away and not self._is_looking:
            self._is_looking = True
            self._begin(self._look_for_endpoint())

    def _begin(self, what: Coroutine[None, None, None]) -> None:
        job = asyncio.create_task(what)
        self._jobs.add(job)
        job.add_done_callback(self._has_ended)

    def _has_ended(self, job: asyncio.Task[None]) -> None:
        self._jobs.discard(job)
        if not job.cancelled() and (error := job.exception()) is not None:
            self._error = self._error or error
        self._wake.set()

    def _fresh(self) -> Task | None:
        """The next task that can be asked; those that cannot are recorded at once."""
        while (task := self._feed.take()) is not None and task.error:
            self._note(failure(task, task.error))
        return task

    async def _something_happens(self, looked_at: float) -> None:
        moment = None if self._paused else self._schedule.look_again_at(looked_at)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(moment - time.monotonic(), self._wake.set) if moment is not None else None
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    async def _stop(self) -> None:
        jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await self._feed.close()

    # ---- one row

    async def _ask(self, row: Row) -> None:
        try:
            path, body = await self._request(row.task)
        except (OSError, ValueError) as error:
            self._note(self._schedule.unaskable(row, f"this row cannot be asked: {in_words(error)}"))
            return
        reply = await self._endpoint.ask(path, body)
        result = self._schedule.settle(row, reply, time.monotonic())
        if result is not None:
            self._note(result)
            self._pace.row_ended(time.monotonic())

    async def _request(self, task: Task) -> tuple[str, bytes]:
        # Reading and encoding a picture takes some milliseconds, so that is not done on the event loop.
        return await asyncio.to_thread(self._encoded, task) if task.images else self._encoded(task)

    def _encoded(self, task: Task) -> tuple[str, bytes]:
        path, body = self._request_of(task)
        return path, _encode(body)

    def _note(self, result: Result) -> None:
        if self._error is not None:
            return  # recording has failed, perhaps in the middle of a line: nothing may be written behind that
        try:
            self._record(result)
        except BaseException as error:
            self._error = error
            raise
        if result.outcome is Outcome.DONE:
            self._done += 1
        else:
            self._failed += 1
        self._prompt_tokens += result.prompt_tokens
        self._completion_tokens += result.completion_tokens

    # ---- an endpoint that cannot be reached

    async def _look_for_endpoint(self) -> None:
        wait = FIRST_LOOK
        try:
            while reason := await self._endpoint.why_away():
                self._schedule.away, self._look_every = reason, wait
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_LOOK)
        finally:
            self._is_looking, self._look_every = False, 0.0
        self._pace = Pace(time.monotonic())
        self._schedule.back()


# ---- what a run is made of


class Feed:
    """Tasks read ahead in a thread, so that the event loop does not wait for the disk.

    `on_news` is called on the loop when more have been read, or when there are no more.
    """

    def __init__(self, tasks: Iterator[Task], ahead: int, on_news: Callable[[], None]) -> None:
        self._tasks = tasks
        self._ahead = max(ahead, CHUNK)
        self._on_news = on_news
        self._ready: deque[Task] = deque()
        self._reading: asyncio.Task[list[Task]] | None = None
        self._ended = False

    def take(self) -> Task | None:
        """The next one, if it has been read."""
        task = self._ready.popleft() if self._ready else None
        if len(self._ready) < self._ahead and self._reading is None and not self._ended:
            self._reading = asyncio.create_task(asyncio.to_thread(self._read), name="reading tasks ahead")
            self._reading.add_done_callback(self._have_read)
        return task

    @property
    def is_over(self) -> bool:
        return self._ended and not self._ready

    def check(self) -> None:
        """Raise what reading raised."""
        if self._reading is not None and self._reading.done():
            self._reading.result()

    async def close(self) -> None:
        """Wait for the chunk that is being read: a thread cannot be stopped."""
        if self._reading is not None:
            await asyncio.wait([self._reading])

    def _read(self) -> list[Task]:
        return list(itertools.islice(self._tasks, self._ahead))

    def _have_read(self, reading: asyncio.Task[list[Task]]) -> None:
        self._on_news()
        if reading.cancelled() or reading.exception():
            return  # `check` raises it
        chunk = reading.result()
        self._ready.extend(chunk)
        self._ended = len(chunk) < self._ahead
        self._reading = None


class Pace:
    """Rows per second over the last minute. Keeps one moment a second at most, however many rows end."""

    def __init__(self, now: float) -> None:
        self._rows = 0
        self._moments = deque([(now, 0)])

    def row_ended(self, now: float) -> None:
        self._rows += 1
        if now - self._moments[-1][0] < 1:
            return
        self._moments.append((now, self._rows))
        while len(self._moments) > 1 and now - self._moments[1][0] >= PACE_SECONDS and self._since(1) >= PACE_ROWS:
            self._moments.popleft()

    def rate(self, now: float) -> float:
        """Rows per second."""
        seconds = now - self._moments[0][0]
        return self._since(0) / seconds if seconds > 0 else 0.0

    def _since(self, moment: int) -> int:
        return self._rows - self._moments[moment][1]
