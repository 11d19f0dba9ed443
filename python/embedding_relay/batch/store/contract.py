"""What every store offers: small values under keys, changed atomically, and leases that expire by themselves."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Protocol

from embedding_relay.batch.errors import StaleJob

DAY: Final = 86_400.0
MOST_WATCHED: Final = 10_000
UNKNOWN_SECONDS: Final = 60.0
# What is left of a claim that was never given up and that nobody asks for, the store may forget after this time.
CLAIM_KEPT: Final = 30 * DAY


class StoreAway(Exception):
    """The store cannot be reached, or cannot write, just now. Nothing is known to have changed."""


def claim_of(holder: str, seconds: float) -> str:
    """What stands in the store for a claim. No two are alike, so that a renewed one is told from the one before."""
    return f"{holder}|{seconds:g}|{secrets.token_hex(8)}"


def holder_of(claim: str) -> str:
    return claim.rsplit("|", 2)[0]


def _seconds_of(claim: str) -> float:
    try:
        return float(claim.rsplit("|", 2)[1])
    except (IndexError, ValueError):
        return UNKNOWN_SECONDS  # another version wrote it


class Watch:
    """Tells when somebody else's claim has run out: it stood there, not renewed, for as long as it was made for.

    Measured by the monotonic clock of the process that would take it. So it makes no difference what time it is on any
    machine, or whether somebody sets a clock; and a process that has just started has to watch for the whole time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[str, float]] = {}

    def has_run_out(self, name: str, claim: str) -> bool:
        now = self._clock()
        before, since = self._seen.get(name, (None, now))
        if before != claim:
            self._make_room(now)
            self._seen[name] = claim, now
            return False
        return now - since >= _seconds_of(claim)

    def forget(self, name: str) -> None:
        self._seen.pop(name, None)

    def _make_room(self, now: float) -> None:
        """Names that nobody asks about any more would stay for ever."""
        if len(self._seen) >= MOST_WATCHED:
            self._seen = {name: seen for name, seen in self._seen.items() if now - seen[1] < DAY}


class Store(Protocol):
    """Two implementations, one contract (test/srt/batch/service/test_store.py). Any process may call any method."""

    def create(self, key: str, value: bytes, seconds: float) -> bool:
        """Keep `value` for `seconds`, unless the key is there already; the answer is whether it was kept."""

    def get(self, key: str) -> bytes | None: ...

    def change(self, key: str, seconds: float, by: Callable[[bytes], bytes]) -> bytes | None:
        """Replace the value by what `by` makes of it, as one step that no other worker can come between.

        `by` may be called more than once, so it must do nothing else. What it raises is raised here, and then nothing
        has changed. The value lives for `seconds` from now. None when there is no such key.
        """

    def delete(self, key: str) -> bool:
        """Whether it was there."""

    def keys(self, prefix: str) -> list[str]: ...

    def claim(self, name: str, holder: str, seconds: float) -> bool:
        """Become, or stay, the only holder of `name` for `seconds` from now; False while somebody else holds it.

        Who does not renew it loses it to the first who asks for it again and again during all these seconds (`Watch`).
        """

    def release(self, name: str, holder: str) -> None:
        """Give `name` up, if this holder has it."""

    def close(self) -> None: ...


# How many times a claim is renewed within the time after which it would run out.
RENEWALS: Final = 4


class Lease:
    """A claim on one part of one session, renewed while the work goes on.

    `async with` it; once the lease is lost, the body is cancelled and `StaleJob` raised in its place.
    """

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
        # Counted from before the question, so that we never believe in it longer than the store does.
        self._until = asked + self._seconds if got else 0.0
        return got

    async def give_up(self) -> None:
        """Without having used it."""
        self._until = 0.0
        await asyncio.to_thread(self._store.release, self._name, self._holder)

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
