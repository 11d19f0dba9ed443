"""The lease: it is renewed while the work goes on, and whoever loses it is stopped."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from embedding_relay.batch.errors import StaleJob
from embedding_relay.batch.store.contract import Lease, Store, StoreAway

SECONDS = 0.2


class Claims:
    """As much of a store as a lease uses; `answers` are those to the next claims, then the last one again."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.claims = 0
        self.released: list[tuple[str, str]] = []

    def claim(self, name: str, holder: str, seconds: float) -> bool:
        self.claims += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def release(self, name: str, holder: str) -> None:
        self.released.append((name, holder))


def lease_of(claims: Claims) -> Lease:
    return Lease(cast("Store", claims), "split:one", "worker", SECONDS)


async def forever() -> None:
    await asyncio.Event().wait()


def test_it_is_given_up_when_the_work_is_done() -> None:
    claims = Claims(True)

    async def work() -> None:
        lease = lease_of(claims)
        assert await lease.take()
        async with lease:
            lease.check()
        with pytest.raises(StaleJob):
            lease.check()  # a thread that still works for us stops here

    asyncio.run(work())
    assert claims.released == [("split:one", "worker")]


def test_it_is_renewed_while_the_work_goes_on() -> None:
    claims = Claims(True)

    async def work() -> None:
        lease = lease_of(claims)
        await lease.take()
        async with lease:
            while claims.claims < 10:  # more time than one claim lasts
                lease.check()
                await asyncio.sleep(0.01)
            lease.check()

    asyncio.run(work())


def test_whoever_loses_it_is_stopped_and_releases_nothing() -> None:
    claims = Claims(True, False)

    async def work() -> None:
        lease = lease_of(claims)
        await lease.take()
        async with lease:
            await forever()

    with pytest.raises(StaleJob):
        asyncio.run(work())
    assert claims.released == []


def test_somebody_elses_is_not_taken() -> None:
    claims = Claims(False)

    async def work() -> None:
        lease = lease_of(claims)
        assert not await lease.take()
        with pytest.raises(StaleJob):
            lease.check()

    asyncio.run(work())


def test_a_store_that_is_away_for_a_moment_costs_nothing() -> None:
    claims = Claims(True, StoreAway("away"), True)

    async def work() -> None:
        lease = lease_of(claims)
        await lease.take()
        async with lease:
            while claims.claims < 4:
                await asyncio.sleep(0.01)
            lease.check()

    asyncio.run(work())


def test_a_store_that_stays_away_ends_the_work_when_the_lease_has_run_out() -> None:
    claims = Claims(True, StoreAway("away"))

    async def work() -> None:
        lease = lease_of(claims)
        await lease.take()
        async with lease:
            await forever()

    with pytest.raises(StaleJob):
        asyncio.run(work())


def test_who_is_cancelled_meanwhile_is_cancelled() -> None:
    claims = Claims(True)

    async def work() -> None:
        async def body() -> None:
            lease = lease_of(claims)
            await lease.take()
            async with lease:
                started.set()
                await forever()

        started = asyncio.Event()
        task = asyncio.create_task(body())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert claims.released == [("split:one", "worker")]
