"""The worker of one process: what it takes, in which order, and what it does not touch any more."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from embedding_relay.batch.background.worker import ALONE_WITHIN, Worker
from embedding_relay.batch.errors import NotWhatWasSaved
from embedding_relay.batch.service import Service
from embedding_relay.batch.session.records import MOST_DEATHS, Asking, ExecutionStatus, Session, Stage
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.disk_store import DiskStore
from embedding_relay.batch.workbook.analysis import Choices


class Place:
    def __init__(self, path: Path) -> None:
        # Nothing listens there: a run waits for its endpoint. Workers end in order here and release their leases, so
        # none has to run out, and none runs out while the machine stands still for a moment.
        self.settings = Settings(
            endpoint="http://127.0.0.1:9", cache_dir=path, lease_seconds=10, scan_seconds=0.05, max_runs=1
        )
        self.store = DiskStore.open(str(path / "store"))
        self.sessions = Sessions(self.store, self.settings.sessions_dir, 1000)
        self.service = Service(self.settings, self.sessions, wake=lambda session_id: None)

    def upload(self) -> str:
        return self.service.take_upload(io.BytesIO(b"prompt\na\n"), "a.csv", Choices()).session_id

    def died_over(self, session_id: str, part: str, times: int) -> None:
        """What killed workers leave behind: attempts that began and did not end."""

        def died(session: Session) -> None:
            for _ in range(times):
                (session.split if part == "split" else session.execution).take()

        self.sessions.change(session_id, died)

    def get(self, session_id: str) -> Session:
        return self.sessions.get(session_id)

    async def work_until(self, *conditions: object) -> None:
        """A worker, until each of these functions has said yes."""
        worker = Worker(self.settings, self.store, self.sessions)
        working = asyncio.create_task(worker.run())
        try:
            async with asyncio.timeout(20):
                for condition in conditions:
                    assert callable(condition)
                    while not condition():
                        assert not working.done()
                        await asyncio.sleep(0.01)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr("embedding_relay.batch.background.places.LONGEST_STEP", 0.1)
    place = Place(tmp_path)
    yield place
    place.store.close()


def split(place: Place) -> str:
    session_id = place.upload()
    place.service.split(session_id, None)
    asyncio.run(place.work_until(lambda: place.get(session_id).split.is_ready()))
    return session_id


def test_a_session_that_had_ended_is_taken_again_at_once_when_it_is_retried(place: Place) -> None:
    """Those that have ended are not read at every look; the process that is asked for a retry reads this one."""
    session_id = split(place)
    place.service.start(session_id, Asking())
    place.sessions.change(session_id, lambda session: session.fail_execution("its disk was away"))

    async def retry() -> None:
        worker = Worker(place.settings, place.store, place.sessions)
        service = Service(place.settings, place.sessions, wake=worker.wake)
        working = asyncio.create_task(worker.run())
        try:
            async with asyncio.timeout(20):
                while session_id not in worker._over:
                    await asyncio.sleep(0.01)
                service.retry(session_id)
                while place.get(session_id).execution.status is not ExecutionStatus.RUNNING:
                    await asyncio.sleep(0.01)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    asyncio.run(retry())


def test_a_split_that_has_killed_three_workers_is_failed(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    session_id = place.upload()
    place.service.split(session_id, None)
    place.died_over(session_id, "split", MOST_DEATHS)
    asyncio.run(place.work_until(lambda: place.get(session_id).stage is Stage.FAILED))
    session = place.get(session_id)
    assert "3 worker processes died, one after the other, while they were at this split" in session.split.error
    assert session.split.attempt == MOST_DEATHS, "it was not tried again"
    assert "Traceback" not in caplog.text


def test_a_run_that_has_killed_three_workers_is_failed(place: Place) -> None:
    session_id = split(place)
    place.service.start(session_id, Asking(model="m"))
    place.died_over(session_id, "run", MOST_DEATHS)
    asyncio.run(place.work_until(lambda: place.get(session_id).stage is Stage.FAILED))
    assert "while they were at this run" in place.get(session_id).execution.error


def test_two_deaths_are_forgiven(place: Place) -> None:
    session_id = place.upload()
    place.service.split(session_id, None)
    place.died_over(session_id, "split", MOST_DEATHS - 1)
    asyncio.run(place.work_until(lambda: place.get(session_id).split.is_ready()))


def test_a_worker_that_ends_in_order_has_not_died(place: Place) -> None:
    session_id = split(place)
    place.service.start(session_id, Asking(model="m"))
    for attempt in range(1, MOST_DEATHS + 2):
        asyncio.run(place.work_until(lambda attempt=attempt: waits(place, session_id, attempt)))
        assert place.get(session_id).execution.unended == 0
    assert place.get(session_id).stage is Stage.EXECUTING


def waits(place: Place, session_id: str, attempt: int) -> bool:
    execution = place.get(session_id).execution
    return execution.attempt >= attempt and "cannot reach the endpoint" in execution.message


def test_what_may_kill_again_is_done_alone(place: Place) -> None:
    """An innocent run that is under way beside it would be blamed for its next death."""
    innocent, suspect = split(place), place.upload()
    place.service.start(innocent, Asking(model="m"))
    place.service.split(suspect, None)
    place.died_over(suspect, "split", MOST_DEATHS - 1)
    asyncio.run(
        place.work_until(
            lambda: waits(place, innocent, 1),
            lambda: "it waits for one that has nothing else to do" in place.get(suspect).split.message,
            lambda: place.service.wish(innocent, "cancel"),
            lambda: place.get(suspect).split.is_ready(),
        )
    )
    assert place.get(innocent).stage is Stage.COMPLETED


def test_what_may_kill_again_does_not_wait_for_ever(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no worker ever has nothing else to do."""
    monkeypatch.setattr("embedding_relay.batch.background.worker.ALONE_WITHIN", 0.3)
    innocent, suspect = split(place), place.upload()
    place.service.start(innocent, Asking(model="m"))
    place.service.split(suspect, None)
    place.died_over(suspect, "split", MOST_DEATHS - 1)
    asyncio.run(
        place.work_until(
            lambda: waits(place, innocent, 1),
            lambda: place.get(suspect).stage is Stage.FAILED,
        )
    )
    assert place.store.claim(f"split:{suspect}", "another worker", 1), "its lease is given up"
    error = place.get(suspect).split.error
    assert error.startswith("2 worker processes died, one after the other, while they were at this split. ")
    assert "a worker that has nothing else to do, and within 0 minutes there was none" in error
    assert place.get(suspect).split.attempt == MOST_DEATHS - 1
    assert place.get(innocent).execution.attempt == 1


def test_another_death_begins_the_time_to_wait_anew(place: Place) -> None:
    waits = Worker(place.settings, place.store, place.sessions)._waits_too_long
    assert not waits("run:a", 2, now=1000)
    assert not waits("run:a", 2, now=1000 + ALONE_WITHIN)
    assert not waits("run:b", 2, now=1001 + ALONE_WITHIN), "each by itself"
    assert not waits("run:a", 3, now=1001 + ALONE_WITHIN), "another worker has tried it, and died"
    assert waits("run:a", 3, now=1002 + 2 * ALONE_WITHIN)


def test_a_worker_that_is_stopped_before_it_begins_leaves_no_lease(place: Place) -> None:
    """It has taken the lease, and asks for a place."""
    session_id = split(place)
    place.service.start(session_id, Asking(model="m"))
    asked, answer = threading.Event(), threading.Event()
    real = place.store.claim

    def slowly(name: str, holder: str, seconds: float) -> bool:
        if name.startswith("place:"):
            asked.set()
            assert answer.wait(20)
        return real(name, holder, seconds)

    async def stop() -> None:
        worker = Worker(place.settings, place.store, place.sessions)
        place.store.claim = slowly  # type: ignore[method-assign]
        working = asyncio.create_task(worker.run())
        await asyncio.to_thread(asked.wait, 20)
        working.cancel()
        asyncio.get_running_loop().call_soon(answer.set)
        await asyncio.gather(working, return_exceptions=True)

    asyncio.run(stop())
    for name in (f"run:{session_id}", "place:0"):
        assert real(name, "another worker", 1), f"{name} is still claimed"


def test_one_run_at_a_time_and_the_first_comes_first(place: Place) -> None:
    ids = [split(place) for _ in range(2)]
    for session_id in reversed(ids):
        place.service.start(session_id, Asking(model="m"))
    asyncio.run(
        place.work_until(
            lambda: waits(place, ids[0], 1),
            lambda: "waits for its turn: this service carries out 1 run at a time" in message(place, ids[1]),
            lambda: not place.get(ids[1]).execution.ready_for_monitoring,
            lambda: place.service.wish(ids[0], "pause"),  # a paused run needs no place
            lambda: waits(place, ids[1], 1),
            lambda: place.service.wish(ids[0], "resume"),
            lambda: place.service.wish(ids[1], "cancel"),
            lambda: place.get(ids[1]).stage is Stage.COMPLETED,
            lambda: waits(place, ids[0], 1),
        )
    )


def test_a_run_that_waits_for_its_turn_can_be_cancelled(place: Place) -> None:
    ids = [split(place) for _ in range(2)]
    place.service.start(ids[0], Asking(model="m"))
    place.service.start(ids[1], Asking(model="m"))
    asyncio.run(
        place.work_until(
            lambda: "waits for its turn" in message(place, ids[1]),
            lambda: place.service.wish(ids[1], "cancel"),
            lambda: place.get(ids[1]).stage is Stage.COMPLETED,
        )
    )


def message(place: Place, session_id: str) -> str:
    return place.get(session_id).execution.message


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("inside of a library"), "this is a bug of the service (KeyError); its log says more"),
        (MemoryError(), "the memory of the machine is used up"),
        (msgspec.DecodeError("MessagePack data is malformed"), "this is a bug of the service (DecodeError); its log"),
    ],
)
def test_what_libraries_say_goes_to_the_log_and_not_to_people(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, says: str
) -> None:
    session_id = place.upload()
    place.service.split(session_id, None)

    def raising(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("embedding_relay.batch.background.splitting.read_tasks", raising)
    asyncio.run(place.work_until(lambda: place.get(session_id).stage is Stage.FAILED))
    assert place.get(session_id).split.error.startswith(says)
    assert type(error).__name__ in caplog.text


def test_no_path_of_the_service_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    session_id = place.upload()
    place.service.split(session_id, None)
    folder = place.sessions.folder(session_id)

    def failing(self: object, attempt: int, manifest: object) -> None:
        raise NotWhatWasSaved(f"{folder.path}/tasks.1/000000.jsonl is not what was saved")

    monkeypatch.setattr("embedding_relay.batch.session.folder.Folder.verify_tasks", failing)
    asyncio.run(place.work_until(lambda: place.get(session_id).stage is Stage.FAILED))
    assert place.get(session_id).split.error == "tasks.1/000000.jsonl is not what was saved; is the disk failing?"
