"""How many runs a service carries out at a time, and how many requests they have in flight: places, that runs share."""

from __future__ import annotations

import math
import random
from types import TracebackType

from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import RENEWALS, Claim, Keeper, Store

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

    async def claim(self, holder: str) -> tuple[int, Claim] | None:
        """A free place; which one, is left to chance, so that workers do not all try the same."""
        free = [place for place in range(self.count) if place not in self._taken]
        for place in random.sample(free, len(free)):
            claim = Claim(self.store, f"place:{place}", holder, self.seconds)
            self._taken.add(place)
            kept = False
            try:
                kept = await claim.take()
            finally:
                if not kept:
                    self._taken.discard(place)
            if kept:
                return place, claim
        return None

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
        self._held: dict[int, Claim] = {}
        self._keeper = Keeper(self._tend, min(LONGEST_STEP, places.seconds / RENEWALS), f"places of {holder}")

    @property
    def limit(self) -> int:
        held = [place for place, claim in self._held.items() if claim.is_held()]
        self._granted = self._room(held[: self._places.fair(self.wanted)])
        return self._granted

    def _room(self, held: list[int]) -> int:
        return sum(map(self._places.size, held))

    async def grow(self) -> bool:
        claimed = await self._places.claim(self._holder)
        if claimed is None:
            return False
        place, claim = claimed
        self._held[place] = claim
        return True

    async def __aenter__(self) -> Share:
        self._keeper.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._keeper.stop()
        await self.give_back()

    async def give_back(self) -> None:
        while self._held:
            await self._give_back_one()

    async def _give_back_one(self) -> None:
        place, claim = self._held.popitem()
        self._places.lost(place)
        await claim.give_up()

    async def _tend(self) -> bool:
        for place, claim in list(self._held.items()):
            if claim.is_due() and not await claim.take():
                del self._held[place]
                self._places.lost(place)
        fair = self._places.fair(self.wanted)
        # Not before the run knows that it has fewer, and has no more in flight.
        while len(self._held) > fair and max(self._granted, self.in_flight) <= self._room(list(self._held)[:-1]):
            await self._give_back_one()
        if len(self._held) < fair:
            await self.grow()
        return True
