"""Whose turn it is where few are served at a time: all who wait have equal shares, so what is small is soon done."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator


class FairLine:
    """Belongs to one event loop.

    A clock runs by what is served, divided by how many share it. Who comes would be done at the time that it is now
    plus its own cost, if all had their share at once; who would be done first is served first. So small work passes
    large work, and no work of any size waits for ever.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._present = 0
        """Who waits or is served."""
        self._clock = 0.0
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, float, asyncio.Future[None]]] = []

    @contextlib.asynccontextmanager
    async def turn(self, cost: float) -> AsyncIterator[None]:
        self._present += 1
        try:
            if self._free:
                self._begin(cost)
            else:
                await self._wait(cost)
            try:
                yield
            finally:
                self._free += 1
        finally:
            self._present -= 1
            self._serve()

    def _begin(self, cost: float) -> None:
        self._free -= 1
        self._clock += cost / self._present

    async def _wait(self, cost: float) -> None:
        entered = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (self._clock + cost, next(self._numbers), cost, entered))
        try:
            await entered
        except asyncio.CancelledError:
            if not entered.cancelled():  # it had just been given a place
                self._free += 1
            raise

    def _serve(self) -> None:
        while self._free and self._waiting:
            _, _, cost, entered = heapq.heappop(self._waiting)
            if not entered.done():
                self._begin(cost)
                entered.set_result(None)
