"""A claim on one part of one session, kept alive while the work goes on. Whoever loses it stops."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Final

from embedding_relay.batch.records import StaleJob
from embedding_relay.batch.store import Store

# How many times a claim is renewed within the time after which it would run out.
RENEWALS: Final = 4


class Lease:
    """`async with` it; the body is cancelled, and `StaleJob` raised in its place, once the lease is lost."""

    def __init__(self, store: Store, name: str, holder: str, seconds: float) -> None:
        self._store = store
        self._name = name
        self._holder = holder
        self._seconds = seconds
        self._until = 0.0
        self._lost = False
        self._keeper: asyncio.Task[None] | None = None

    async def take(self) -> bool:
        asked = time.monotonic()
        got = await asyncio.to_thread(self._store.claim, self._name, self._holder, self._seconds)
        # From the moment before the question, so that we never believe in it longer than the store does.
        self._until = asked + self._seconds if got else 0.0
        return got

    def check(self) -> None:
        """Raise unless the lease is ours at this moment: before everything that another holder must not do twice."""
        if time.monotonic() >= self._until:
            raise StaleJob

    async def __aenter__(self) -> Lease:
        body = asyncio.current_task()
        assert body is not None
        self._keeper = asyncio.create_task(self._keep(body), name=f"lease of {self._name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._keeper is not None
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        if self._lost:
            if isinstance(error, asyncio.CancelledError) and (body := asyncio.current_task()):
                body.uncancel()
            raise StaleJob from error
        self._until = 0.0  # a thread that still works for us stops at its next check
        await asyncio.to_thread(self._store.release, self._name, self._holder)

    async def _keep(self, body: asyncio.Task[object]) -> None:
        while True:
            await asyncio.sleep(self._seconds / RENEWALS)
            try:
                kept = await self.take()
            except Exception:
                # The store is away. It may be back before the lease has run out; nobody can take it meanwhile.
                kept = time.monotonic() < self._until
            if not kept:
                self._lost = True
                body.cancel()
                return
