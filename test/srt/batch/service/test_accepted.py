"""From the moment a start is accepted: whichever worker is asked, and whatever becomes of the one that accepted it.

Each of these with both stores, and with several worker processes behind one port.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from embedding_relay.batch.store.contract import Store
from embedding_relay.batch.store.opening import open_store
from support.batch_service import BatchService, batch_service, sheet_of
from support.patience import wait_until
from support.redis_server import redis_server
from support.stub_endpoint import StubEndpoint

WORKERS = 4
RACES = 500  # with each store: a thousand together
RACERS = 8
# Enough calls, each on a connection of its own, that every worker is almost certainly among those that answer.
ENOUGH = 12 * WORKERS


@dataclass(frozen=True)
class Shared:
    """A service, and its store as a worker sees it."""

    service: BatchService
    store: Store

    @contextmanager
    def no_worker_takes_the_run(self, session_id: str) -> Iterator[None]:
        """The test holds the lease, as a worker that is slow to begin would."""
        name, holder = f"run:{session_id}", "the test"
        assert self.store.claim(name, holder, 60)
        try:
            yield
        finally:
            self.store.release(name, holder)


@pytest.fixture(scope="module", params=["diskcache", "redis"])
def shared(
    request: pytest.FixtureRequest, stub: StubEndpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    where = tmp_path_factory.mktemp("accepted")
    if request.param == "diskcache":
        with serving(where, stub, str(where / "cache" / "store")) as running:
            yield running
        return
    (where / "redis").mkdir()
    with redis_server(where / "redis") as url, serving(where, stub, url) as running:
        yield running


@contextmanager
def serving(where: Path, stub: StubEndpoint, place: str) -> Iterator[Shared]:
    # Workers are killed here: nobody shall wait long for them.
    with batch_service(where, stub.url, "--store", place, "--lease-seconds", "3", workers=WORKERS) as service:
        store = open_store(place)
        try:
            yield Shared(service, store)
        finally:
            store.close()


def ready_to_start(service: BatchService, *prompts: str) -> str:
    session_id = str(service.upload(sheet_of(prompts))["session_id"])
    assert service.split(session_id)["ready_for_next_stage"]
    return session_id


# ---- a thousand races, half of them with either store


def race(service: BatchService, number: int) -> Counter[str]:
    """Upload, split, ask as fast as possible, start at the first yes, and ask on; what was seen, and how often.

    Every call is on a connection of its own, which any of the workers may take. `get` and `post` fail on anything but
    200, so one 404 or 400 fails the race.
    """
    seen = Counter[str]()
    session_id = service.upload(sheet_of(f"race {number} row {row}" for row in range(3)))["session_id"]
    service.post("/api/tasks/split", {"session_id": session_id})
    while not service.get(f"/api/tasks/split/status/{session_id}")["ready_for_next_stage"]:
        seen["not split"] += 1
    assert service.post("/api/execute/start", {"session_id": session_id})["status"] == "initializing"
    while True:
        execution = service.get(f"/api/execute/status/{session_id}")
        seen[execution["status"]] += 1
        if execution["ready_for_monitoring"]:
            return seen
        assert (execution["status"], execution["done"], execution["total"]) == ("initializing", 0, 3)


@pytest.mark.timeout(300)
def test_five_hundred_races(shared: Shared) -> None:
    service = shared.service
    with ThreadPoolExecutor(RACERS) as racers:
        seen = sum(racers.map(lambda number: race(service, number), range(RACES)), Counter[str]())
    print(f"{RACES} races: {dict(seen)}")
    assert seen["initializing"] >= RACES / 10, "hardly a race was asked before a worker had taken it"
    sessions = service.get("/api/sessions")["sessions"]
    assert len(sessions) == RACES
    wait_until(lambda: stages_of(service) == {"completed": RACES}, 120)
    for session in sessions[:: RACES // 20]:
        rows = service.answers(session["session_id"])
        assert [row["status"] for row in rows] == ["done"] * 3


def stages_of(service: BatchService) -> dict[str, int]:
    return dict(Counter(session["stage"] for session in service.get("/api/sessions")["sessions"]))


# ---- before a worker has taken it


def test_every_worker_answers_before_one_has_taken_the_run(shared: Shared) -> None:
    service = shared.service
    session_id = ready_to_start(service, "accepted")
    with shared.no_worker_takes_the_run(session_id):
        service.start(session_id)
        for _ in range(ENOUGH):
            status = service.get(f"/api/execute/status/{session_id}")
            assert (status["status"], status["stage"]) == ("initializing", "executing")
            assert (status["ready_for_monitoring"], status["ready_for_download"]) == (False, False)
        assert first_event(service, session_id)["status"] == "initializing"
    service.wait_stage(session_id, "completed")
    assert service.get(f"/api/execute/status/{session_id}")["ready_for_monitoring"]


def first_event(service: BatchService, session_id: str) -> Any:
    with httpx.stream("GET", f"{service.url}/api/execute/stream/{session_id}", trust_env=False) as stream:
        assert stream.status_code == 200
        return next(json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))


def test_an_accepted_run_can_be_paused_and_resumed(shared: Shared, stub: StubEndpoint) -> None:
    service = shared.service
    session_id = ready_to_start(service, "paused early")
    body = {"session_id": session_id}
    with shared.no_worker_takes_the_run(session_id):
        service.start(session_id)
        assert service.post("/api/execute/pause", body)["paused"]
    service.wait_running(session_id)
    wait_until(lambda: service.get(f"/api/execute/status/{session_id}")["message"] == "paused")
    assert stub.counts() == {}
    assert not service.post("/api/execute/resume", body)["paused"]
    service.wait_stage(session_id, "completed")
    assert stub.counts() == {"paused early": 1}


def test_an_accepted_run_can_be_cancelled(shared: Shared, stub: StubEndpoint) -> None:
    service = shared.service
    session_id = ready_to_start(service, "cancelled early")
    with shared.no_worker_takes_the_run(session_id):
        service.start(session_id)
        assert service.post("/api/execute/cancel", {"session_id": session_id})["cancelled"]
    service.wait_stage(session_id, "completed")
    assert [row["status"] for row in service.answers(session_id)] == ["cancelled"]
    assert stub.counts() == {}


def test_an_accepted_run_can_be_deleted(shared: Shared) -> None:
    service = shared.service
    session_id = ready_to_start(service, "deleted early")
    with shared.no_worker_takes_the_run(session_id):
        service.start(session_id)
        assert service.call("DELETE", f"/api/sessions/{session_id}").status_code == 200
        assert service.call("GET", f"/api/execute/status/{session_id}").status_code == 404
    assert not service.folder(session_id).exists()


# ---- and if they die


@pytest.mark.parametrize("part", ["split", "run"])
def test_all_workers_are_killed_right_after_one_has_accepted(shared: Shared, stub: StubEndpoint, part: str) -> None:
    service = shared.service
    service.wait_for_all_workers()
    session_id = str(service.upload(sheet_of([f"{part} accepted and killed"]))["session_id"])
    if part == "run":
        assert service.split(session_id)["ready_for_next_stage"]
        service.start(session_id)
    else:
        service.post("/api/tasks/split", {"session_id": session_id})
    for pid in service.worker_pids():
        service.kill_worker(pid)
    answers = [answered(service, f"/api/execute/status/{session_id}") for _ in range(ENOUGH)]
    assert {answer.status_code for answer in answers} == ({200} if part == "run" else {400})
    wait_until(lambda: service.patiently(f"/api/tasks/split/status/{session_id}")["ready_for_next_stage"], 60)
    service.wait_for_all_workers()
    if part == "split":
        service.start(session_id)
    service.wait_stage(session_id, "completed")
    assert [row["status"] for row in service.answers(session_id)] == ["done"]


def answered(service: BatchService, path: str) -> httpx.Response:
    """An answer from whichever worker lives: a killed one takes its connections along, and answers nothing else."""
    while True:
        try:
            return service.call("GET", path)
        except httpx.TransportError:
            continue
