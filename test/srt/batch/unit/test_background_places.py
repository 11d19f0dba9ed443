"""Places: never more than there are, shared among the runs that can use them, given back when others want them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_relay.batch.background.places import Places, Share
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import Watch
from embedding_relay.batch.store.disk_store import DiskStore
from embedding_relay.testing.plane import Clock
from support import virtual_time

LEASE = 60.0


class Service:
    """Worker processes of one service, each with its own connection to the store."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self._path = path
        self._stores = list[DiskStore]()

    def worker(self, runs: int = 1, max_runs: int = 4, max_in_flight: int = 40) -> Places:
        store = DiskStore.open(str(self._path / "store"))
        store._watch = Watch(self.clock)
        self._stores.append(store)
        settings = Settings(
            endpoint="http://unused",
            cache_dir=self._path,
            max_runs=max_runs,
            max_in_flight=max_in_flight,
            lease_seconds=LEASE,
        )
        places = Places(store, settings)
        places.runs = runs
        return places

    def close(self) -> None:
        for store in self._stores:
            store.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.close()


async def until(share: Share, limit: int) -> None:
    """As a run does it: it reads its limit all the time."""
    give_up = asyncio.get_running_loop().time() + 10
    while share.limit != limit:
        assert asyncio.get_running_loop().time() < give_up, f"{share.limit} and not {limit}"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("runs", "most", "sizes"), [(4, 40, [10] * 4), (3, 10, [4, 3, 3]), (8, 3, [1, 1, 1])])
def test_places_are_all_requests_together(service: Service, runs: int, most: int, sizes: list[int]) -> None:
    places = service.worker(max_runs=runs, max_in_flight=most)
    assert [places.size(place) for place in range(places.count)] == sizes


def test_without_a_limit_each_run_has_its_concurrency(tmp_path: Path) -> None:
    settings = Settings(endpoint="http://unused", cache_dir=tmp_path, concurrency=5, max_runs=3)
    assert settings.most_in_flight == 15


@pytest.mark.parametrize(
    ("runs", "wanted", "fair"),
    [(1, 40, 4), (1, 32, 4), (1, 10, 1), (1, 11, 2), (2, 40, 2), (3, 40, 1), (4, 40, 1), (99, 40, 1), (2, 0, 0)],
)
def test_a_fair_share(service: Service, runs: int, wanted: int, fair: int) -> None:
    assert service.worker(runs).fair(wanted) == fair


def test_no_more_runs_than_places_whichever_worker_asks(service: Service) -> None:
    async def work() -> None:
        one, two = service.worker(runs=9), service.worker(runs=9)
        shares = [await places.share(f"{number}", 10) for number, places in enumerate([one, two, one, two, one, two])]
        assert [share is not None for share in shares] == [True] * 4 + [False] * 2
        assert shares[0] is not None
        await shares[0].give_back()
        assert await two.share("late", 10) is not None

    virtual_time.run(work(), service.clock)


def test_a_run_alone_has_all_and_gives_back_what_another_one_wants(service: Service) -> None:
    async def work() -> None:
        one, two = service.worker(), service.worker()
        first = await one.share("first", 40)
        assert first is not None
        async with first:
            await until(first, 40)
            first.in_flight = 40
            one.runs = two.runs = 2
            assert await two.share("second", 40) is None, "all places are taken"
            await until(first, 20)
            await asyncio.sleep(LEASE)  # while all 40 are in flight, none is given away, for all that it tends them
            assert await two.share("second", 40) is None
            first.in_flight = 20
            second = None
            while second is None:
                second = await two.share("second", 40)
                await asyncio.sleep(0.01)
            async with second:
                await until(second, 20)
                assert first.limit == 20
                second.wanted = second.in_flight = 0  # paused
                await until(second, 0)
                one.runs = 1
                await until(first, 40)

    virtual_time.run(work(), service.clock)


def test_places_of_a_worker_that_died_are_free_when_they_have_run_out(service: Service) -> None:
    async def work() -> None:
        dead, alive = service.worker(max_runs=1), service.worker(max_runs=1)
        assert await dead.share("one", 10) is not None
        assert await alive.share("one", 10) is not None, "who takes the same run over has its place at once"
        other = service.worker(max_runs=1)
        assert await other.share("two", 10) is None
        await asyncio.sleep(LEASE * 0.99)
        assert await other.share("two", 10) is None
        await asyncio.sleep(LEASE * 0.01)
        assert await other.share("two", 10) is not None

    virtual_time.run(work(), service.clock)


def test_places_are_renewed_meanwhile(service: Service) -> None:
    async def work() -> None:
        one, two = service.worker(max_runs=1), service.worker(max_runs=1)
        share = await one.share("one", 10)
        assert share is not None
        async with share:
            end = asyncio.get_running_loop().time() + 3 * LEASE
            while asyncio.get_running_loop().time() < end:
                assert await two.share("two", 10) is None
                await asyncio.sleep(LEASE / 50)
            assert share.limit == 40

    virtual_time.run(work(), service.clock)


def test_a_run_that_is_cancelled_while_it_asks_for_a_place_keeps_none(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that asks the store gets the place all the same, after nobody wants it any more."""
    asked, answer = threading.Event(), threading.Event()

    async def work() -> None:
        one, two = service.worker(max_runs=1), service.worker(max_runs=1)
        real = one.store.claim

        def slowly(name: str, holder: str, seconds: float) -> bool:
            asked.set()
            assert answer.wait(20)
            return real(name, holder, seconds)

        monkeypatch.setattr(one.store, "claim", slowly)
        asking = asyncio.create_task(one.share("one", 10))
        await asyncio.to_thread(asked.wait, 20)
        asking.cancel()
        asyncio.get_running_loop().call_soon(answer.set)
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await two.share("two", 10) is not None, "and not when it has run out"
        assert await one.share("three", 10) is None
        assert one._taken == set()

    asyncio.run(work())
