"""Tasks read ahead in a thread, so that nobody on the event loop waits for a disk."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from embedding_relay.batch.tasks import Task

CHUNK: Final = 64


class Feed:
    """`on_news` is called on the loop when there is more, or nothing more."""

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
        """Nobody reads any more when this returns: a thread cannot be told to stop, and its chunk is a short one."""
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
