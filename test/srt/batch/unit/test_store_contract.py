"""The lease: it is renewed while the work goes on, and whoever loses it is stopped. And how a claim runs out."""

from __future__ import annotations

import asyncio
import threading
from typing import cast

import pytest

from embedding_relay.batch.errors import StaleJob
from embedding_relay.batch.store.contract import (
    MOST_WATCHED,
    UNKNOWN_SECONDS,
    Claim,
    Lease,
    Store,
    StoreAway,
    Watch,
    claim_of,
    holder_of,
)
from support import virtual_time

SECONDS = 20.0


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


class SlowClaims(Claims):
    """The claims after the first few take until `answer` is set; and what was held when is known."""

    def __init__(self, at_once: int, *answers: bool | Exception) -> None:
        super().__init__(*answers)
        self.at_once = at_once
        self.asked, self.answer = threading.Event(), threading.Event()
        self.held = False

    def claim(self, name: str, holder: str, seconds: float) -> bool:
        if self.claims >= self.at_once:
            self.asked.set()
            assert self.answer.wait(20)
        self.held = super().claim(name, holder, seconds)
        return self.held

    def release(self, name: str, holder: str) -> None:
        super().release(name, holder)
        self.held = False


def lease_of(claims: Claims, seconds: float = SECONDS) -> Lease:
    return Lease(cast("Store", claims), "split:one", "worker", seconds)


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

    virtual_time.run(work())
    assert claims.released == [("split:one", "worker")]


def test_it_is_renewed_while_the_work_goes_on() -> None:
    claims = Claims(True)

    async def work() -> None:
        lease = lease_of(claims)
        await lease.take()
        async with lease:
            while claims.claims < 10:  # more time than one claim lasts
                lease.check()
                await asyncio.sleep(0.1)
            lease.check()

    virtual_time.run(work())


def test_whoever_loses_it_is_stopped_and_releases_nothing() -> None:
    claims = Claims(True, False)

    async def work() -> None:
        lease = lease_of(claims)
        await lease.take()
        async with lease:
            await forever()

    with pytest.raises(StaleJob):
        virtual_time.run(work())
    assert claims.released == []


def test_somebody_elses_is_not_taken() -> None:
    claims = Claims(False)

    async def work() -> None:
        lease = lease_of(claims)
        assert not await lease.take()
        with pytest.raises(StaleJob):
            lease.check()

    virtual_time.run(work())


def test_a_store_that_is_away_for_a_moment_costs_nothing() -> None:
    claims = Claims(True, StoreAway("away"), True)

    async def work() -> None:
        lease = lease_of(claims)
        await lease.take()
        async with lease:
            while claims.claims < 4:
                await asyncio.sleep(0.1)
            lease.check()

    virtual_time.run(work())


def test_a_store_that_stays_away_ends_the_work_when_the_lease_has_run_out() -> None:
    claims = Claims(True, StoreAway("away"))

    async def work() -> None:
        lease = lease_of(claims)
        await lease.take()
        async with lease:
            await forever()

    with pytest.raises(StaleJob):
        virtual_time.run(work())


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

    virtual_time.run(work())
    assert claims.released == [("split:one", "worker")]


@pytest.mark.parametrize("at_once", [0, 1], ids=["made", "renewed"])
def test_a_claim_that_is_cancelled_while_the_store_is_asked_is_given_up(at_once: int) -> None:
    """Its thread goes on, and gets it after nobody wants it any more."""
    claims = SlowClaims(at_once, True)

    async def work() -> None:
        claim = Claim(cast("Store", claims), "place:0", "run one", 60)
        for _ in range(at_once):
            assert await claim.take()
        taking = asyncio.create_task(claim.take())
        await asyncio.to_thread(claims.asked.wait, 20)
        taking.cancel()
        asyncio.get_running_loop().call_soon(claims.answer.set)
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert not claim.is_held()

    asyncio.run(work())
    assert claims.claims == at_once + 1
    assert (claims.held, claims.released) == (False, [("place:0", "run one")])


@pytest.mark.parametrize("answer", [False, StoreAway("away")])
def test_what_a_cancelled_claim_did_not_get_is_not_given_up(answer: bool | Exception) -> None:
    claims = SlowClaims(0, answer)

    async def work() -> None:
        taking = asyncio.create_task(Claim(cast("Store", claims), "place:0", "run one", 60).take())
        await asyncio.to_thread(claims.asked.wait, 20)
        taking.cancel()
        asyncio.get_running_loop().call_soon(claims.answer.set)
        with pytest.raises(asyncio.CancelledError):
            await taking

    asyncio.run(work())
    assert claims.released == []


def test_work_that_ends_while_its_lease_is_renewed_leaves_none() -> None:
    claims = SlowClaims(1, True)

    async def work() -> None:
        lease = lease_of(claims, 4)  # renewed after one second
        assert await lease.take()
        async with lease:
            await asyncio.to_thread(claims.asked.wait, 20)
            asyncio.get_running_loop().call_later(0.05, claims.answer.set)  # when the body has ended

    asyncio.run(work())
    assert claims.claims == 2
    assert not claims.held


def test_a_store_that_is_away_when_a_lease_is_given_up_lets_it_run_out() -> None:
    class Away(Claims):
        def release(self, name: str, holder: str) -> None:
            raise StoreAway("away")

    async def work() -> str:
        lease = lease_of(Away(True))
        await lease.take()
        async with lease:
            return "done"

    assert virtual_time.run(work()) == "done"


# ---- claims, and when they have run out


def test_a_claim_that_stands_there_unrenewed_runs_out_by_our_own_clock() -> None:
    now = 1000.0
    watch = Watch(lambda: now)
    claim = claim_of("host 12 ab|cd", 10)
    assert holder_of(claim) == "host 12 ab|cd"
    assert not watch.has_run_out("run:a", claim), "it may have been made in this moment"
    now += 9.9
    assert not watch.has_run_out("run:a", claim)
    now += 0.1
    assert watch.has_run_out("run:a", claim)
    assert not watch.has_run_out("run:b", claim), "another one is watched by itself"


def test_a_renewed_claim_begins_anew() -> None:
    now = 0.0
    watch = Watch(lambda: now)
    for _ in range(5):
        assert not watch.has_run_out("run:a", claim_of("me", 10))
        now += 9
    claim = claim_of("me", 10)
    watch.has_run_out("run:a", claim)
    watch.forget("run:a")
    now += 100
    assert not watch.has_run_out("run:a", claim)


@pytest.mark.parametrize("claim", ["host 12 ab", "", "a|b|c"])
def test_a_claim_of_another_version_runs_out_too(claim: str) -> None:
    now = 0.0
    watch = Watch(lambda: now)
    assert not watch.has_run_out("run:a", claim)
    now = UNKNOWN_SECONDS
    assert watch.has_run_out("run:a", claim)


def test_what_nobody_asks_for_any_more_is_not_remembered_for_ever() -> None:
    now = 0.0
    watch = Watch(lambda: now)
    for number in range(MOST_WATCHED):
        watch.has_run_out(f"run:{number}", claim_of("me", 10))
    now += 100_000
    watch.has_run_out("run:new", claim_of("me", 10))
    assert len(watch._seen) == 1


def test_a_lease_that_was_not_used_is_given_up() -> None:
    claims = Claims(True)

    async def work() -> None:
        lease = lease_of(claims)
        await lease.take()
        await lease.give_up()
        with pytest.raises(StaleJob):
            lease.check()

    virtual_time.run(work())
    assert claims.released == [("split:one", "worker")]
