"""How many runs a service carries out at a time, and how many requests they have in flight: places, that runs share."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from types import TracebackType

from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import RENEWALS, Store, StoreAway

LONGEST_STEP = 1.0


class Places:
    """As many places as there may be runs, and each stands for its part of the requests in flight.

    A place is a claim in the store, so all workers together have these and no more, on however many machines. A run
    needs one. Those that no other run wants are shared among the runs that can use them.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.count = min(settings.max_runs, settings.most_in_flight)
        self.seconds = settings.lease_seconds
        self.runs = 1  # in the whole service, waiting ones included, as this process has last seen it
        self._most = settings.most_in_flight
        self._taken = set[int]()  # by runs of this process

    def size(self, place: int) -> int:
        """Requests in flight."""
        return self._most // self.count + (place < self._most % self.count)

    def fair(self, wanted: int) -> int:
        """How many places a run may have that could use so many requests in flight."""
        share = self.count // min(max(self.runs, 1), self.count)
        return min(share, math.ceil(wanted / (self._most // self.count)))

    async def share(self, run: str, wanted: int) -> Share | None:
        """A share with one place, if one is free; with none, if none is wanted.

        Called by the one who has the lease of this run, so what a dead worker held for it is there at once.
        """
        share = Share(self, f"run {run}", wanted)
        return share if not wanted or await share.grow() else None

    async def claim(self, holder: str) -> int | None:
        """A free place; which one, is left to chance, so that workers do not all try the same."""
        free = [place for place in range(self.count) if place not in self._taken]
        for place in random.sample(free, len(free)):
            self._taken.add(place)
            kept = False
            try:
                kept = await self.renew(place, holder)
            finally:
                if not kept:
                    self._taken.discard(place)
            if kept:
                return place
        return None

    async def renew(self, place: int, holder: str) -> bool:
        return await asyncio.to_thread(self.store.claim, f"place:{place}", holder, self.seconds)

    async def release(self, place: int, holder: str) -> None:
        self._taken.discard(place)
        with contextlib.suppress(StoreAway):  # it runs out by itself
            await asyncio.to_thread(self.store.release, f"place:{place}", holder)

    def lost(self, place: int) -> None:
        self._taken.discard(place)


class Share:
    """The places of one run. `async with` it: they are renewed meanwhile, and more or fewer as other runs come and go.

    The run says what it could use (`wanted`, 0 while it is paused) and what it has in flight, and reads `limit`.
    """

    def __init__(self, places: Places, holder: str, wanted: int) -> None:
        self.wanted = wanted
        self.in_flight = 0
        self._granted = 0
        self._places = places
        self._holder = holder
        self._held: dict[int, float] = {}  # and until when, if they are not renewed
        self._keeper: asyncio.Task[None] | None = None

    @property
    def limit(self) -> int:
        now = time.monotonic()
        held = [place for place, until in self._held.items() if until > now]
        self._granted = self._room(held[: self._places.fair(self.wanted)])
        return self._granted

    def _room(self, held: list[int]) -> int:
        return sum(map(self._places.size, held))

    async def grow(self) -> bool:
        asked = time.monotonic()
        place = await self._places.claim(self._holder)
        if place is not None:
            self._held[place] = asked + self._places.seconds
        return place is not None

    async def __aenter__(self) -> Share:
        self._keeper = asyncio.create_task(self._keep(), name=f"places of {self._holder}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._keeper is not None
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        await self.give_back()

    async def give_back(self) -> None:
        for place in list(self._held):
            del self._held[place]
            await self._places.release(place, self._holder)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(min(LONGEST_STEP, self._places.seconds / RENEWALS))
            with contextlib.suppress(StoreAway):
                await self._tend()

    async def _tend(self) -> None:
        now, seconds = time.monotonic(), self._places.seconds
        for place, until in list(self._held.items()):
            if until - now > seconds * (1 - 1 / RENEWALS):
                continue
            if await self._places.renew(place, self._holder):
                self._held[place] = now + seconds
            else:
                del self._held[place]
                self._places.lost(place)
        fair = self._places.fair(self.wanted)
        # Not before the run knows that it has fewer, and has no more in flight.
        while len(self._held) > fair and max(self._granted, self.in_flight) <= self._room(list(self._held)[:-1]):
            place, _ = self._held.popitem()
            await self._places.release(place, self._holder)
        if len(self._held) < fair:
            await self.grow()
