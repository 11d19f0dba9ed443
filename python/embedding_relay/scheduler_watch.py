"""While requests wait, asks their scheduler's process how it is; without an answer they must get theirs from elsewhere.

SGLang ends a server whose scheduler died. One that is frozen, or stuck in its loop, would keep its clients waiting, and
with them a router that waits for both halves of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from embedding_relay.config import RelayConfig
from embedding_relay.pulse import Asker, Condition

_LONGEST_LOOK = 1.0


class SchedulerWatch:
    """Belongs to the event loop that it is made in. Costs nothing while no request waits."""

    def __init__(
        self,
        name: str,
        config: RelayConfig,
        *,
        on_trouble: Callable[[str], None],
        on_illness: Callable[[str], None],
    ) -> None:
        self._asker = Asker(name)
        self._interval = config.heartbeat_interval
        self._silence = config.timing.silence
        self._longest_turn = config.waiting_timeout
        self._on_trouble = on_trouble
        self._on_illness = on_illness
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._asker.fileno(), self._hear)
        self._heard = asyncio.Event()
        self._asked_at: float | None = None
        """When the first question was asked that has no answer yet."""
        self._waiting = 0
        self._task: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        self._is_ill = False

    def close(self) -> None:
        self._loop.remove_reader(self._asker.fileno())
        self._asker.close()
        if self._task is not None:
            self._task.cancel()

    async def trouble_before_a_request(self) -> str | None:
        """Why nothing should be sent there. A scheduler that was in trouble must say first that it is not any more."""
        if self._trouble is None:
            return None
        self._heard.clear()
        self._asker.ask()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), min(_LONGEST_LOOK, self._interval))
        return self._trouble

    @contextlib.contextmanager
    def a_request_waits(self) -> Iterator[None]:
        self._waiting += 1
        if self._task is None:
            self._task = self._loop.create_task(self._keep_asking())
        try:
            yield
        finally:
            self._waiting -= 1

    async def _keep_asking(self) -> None:
        while self._waiting:
            self._ask()
            await asyncio.sleep(self._interval)
            self._hear()  # this loop may have been the busy one, and the answer be there
            silence = 0.0 if self._asked_at is None else self._loop.time() - self._asked_at
            if silence >= self._silence:
                self._trouble = f"the scheduler of this instance has not answered for {silence:.3g} s"
            if self._trouble is not None and self._waiting:
                self._on_trouble(self._trouble)
        self._asked_at = None
        self._task = None

    def _ask(self) -> None:
        if self._asked_at is None:
            self._asked_at = self._loop.time()
        self._asker.ask()

    def _hear(self) -> None:
        condition = self._asker.answer()
        if condition is None:
            return
        self._asked_at = None
        self._trouble = self._trouble_in(condition)
        self._heard.set()

    def _trouble_in(self, condition: Condition) -> str | None:
        if condition.illness is not None:
            if not self._is_ill:
                self._is_ill = True
                self._on_illness(condition.illness)
            return f"this instance is ill: {condition.illness}"
        if condition.busy_for > self._longest_turn:
            return f"the scheduler of this instance has been stuck for {condition.busy_for:.3g} s"
        return None
