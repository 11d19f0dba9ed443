"""What every store offers: small values under keys, changed atomically, and leases that expire by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
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


class Claim:
    """One holder's claim of one name: made, renewed and given up in threads, while the event loop goes on."""

    def __init__(self, store: Store, name: str, holder: str, seconds: float) -> None:
        self._store = store
        self._name = name
        self._holder = holder
        self._seconds = seconds
        self._until = 0.0

    def is_held(self) -> bool:
        """At this moment, by our own clock."""
        return time.monotonic() < self._until

    def is_due(self) -> bool:
        """Whether it is time to renew it."""
        return self._until - time.monotonic() <= self._seconds * (1 - 1 / RENEWALS)

    async def take(self) -> bool:
        """Make or renew it. Whoever is cancelled meanwhile does not have it afterwards.

        The thread that asks the store cannot be stopped. What it still gets is given up, because nobody would renew it,
        and nobody else could have it before it has run out.
        """
        asked = time.monotonic()
        asking = asyncio.get_running_loop().run_in_executor(
            None, self._store.claim, self._name, self._holder, self._seconds
        )
        try:
            got = await asyncio.shield(asking)
        except asyncio.CancelledError:
            await asyncio.wait({asking})
            if asking.exception() is None and asking.result():
                await self.give_up()
            raise
        # Counted from before the question, so that we never believe in it longer than the store does.
        self._until = asked + self._seconds if got else 0.0
        return got

    async def give_up(self) -> None:
        self._until = 0.0
        with contextlib.suppress(StoreAway):  # then it runs out by itself
            await asyncio.to_thread(self._store.release, self._name, self._holder)


class Keeper:
    """Renews claims beside the work that they are for: calls `tend` every so often, until that says that all is over.

    Once it is stopped, nothing is renewed any more, and the claims can be given up.
    """

    def __init__(self, tend: Callable[[], Awaitable[bool]], every: float, name: str) -> None:
        self._tend = tend
        self._every = every
        self._name = name
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=self._name)

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        going = True
        while going:
            await asyncio.sleep(self._every)
            with contextlib.suppress(StoreAway):  # it may be back before anything has run out
                going = await self._tend()


class Lease:
    """A claim on one part of one session, renewed while the work goes on.

    `async with` it; once the lease is lost, the body is cancelled and `StaleJob` raised in its place.
    """

    def __init__(self, store: Store, name: str, holder: str, seconds: float) -> None:
        self._claim = Claim(store, name, holder, seconds)
        self._keeper = Keeper(self._renew, seconds / RENEWALS, f"lease of {name}")
        self._body: asyncio.Task[object] | None = None
        self._lost = False

    async def take(self) -> bool:
        return await self._claim.take()

    async def give_up(self) -> None:
        """Without having used it."""
        await self._claim.give_up()

    def check(self) -> None:
        """Raise unless the lease is ours at this moment: before everything that another holder must not do twice."""
        if not self._claim.is_held():
            raise StaleJob

    async def __aenter__(self) -> Lease:
        self._body = asyncio.current_task()
        self._keeper.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._keeper.stop()
        if self._lost:
            if isinstance(error, asyncio.CancelledError) and (body := asyncio.current_task()):
                body.uncancel()
            raise StaleJob from error
        await self._claim.give_up()  # a thread that still works for us stops at its next check

    async def _renew(self) -> bool:
        with contextlib.suppress(Exception):  # until it has run out, nobody can take it from us
            await self._claim.take()
        if self._claim.is_held():
            return True
        assert self._body is not None
        self._lost = True
        self._body.cancel()
        return False
