"""Time that passes only while nobody has anything to do: no deadline of a test depends on how busy the machine is.

What the work would leave to threads is done at once, so this is not for tests of what happens meanwhile.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

from embedding_relay.batch.store import contract
from embedding_relay.testing.plane import Clock

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits, and for nothing that will happen"
        self._clock.advance_to(self._clock.now + timeout)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: Clock) -> None:
        super().__init__(_Selector(clock))
        self._clock = clock

    def time(self) -> float:
        return self._clock()

    def run_in_executor(self, executor: Any, func: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        done = self.create_future()
        try:
            done.set_result(func(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


def run(work: Coroutine[Any, Any, T], clock: Clock | None = None) -> T:
    """As `asyncio.run`; claims and leases go by the same time."""
    clock = clock or Clock()
    with (
        mock.patch.object(contract, "time", SimpleNamespace(monotonic=clock)),
        asyncio.Runner(loop_factory=lambda: _Loop(clock)) as runner,
    ):
        return runner.run(work)
