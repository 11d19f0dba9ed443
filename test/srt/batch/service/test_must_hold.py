"""What must hold, with four real worker processes over real HTTP: ready is ready, whoever is asked and whoever dies."""

from __future__ import annotations

import collections
import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diskcache
import httpx
import pytest

from support.batch_service import BatchService, batch_service, sheet_of, workbook_of
from support.patience import wait_until
from support.stub_endpoint import StubEndpoint, stub_endpoint

SLOW_SAVING = 42
LEASE = 1.5

Seen = set[tuple[str, float]]  # statuses of a split with their progress


@pytest.fixture(scope="module")
def service(stub: StubEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchService]:
    with batch_service(tmp_path_factory.mktemp("service"), stub.url) as running:
        yield running


def asked(stub: StubEndpoint, beginning: str) -> dict[str, int]:
    """How often each prompt that begins so was asked."""
    return {prompt: count for prompt, count in stub.counts().items() if prompt.startswith(beginning)}


@pytest.fixture(scope="module")
def slowly_saved(stub: StubEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Seen]]:
    """It takes its 42 seconds while the other tests go on."""
    with (
        batch_service(tmp_path_factory.mktemp("slow"), stub.url, saving_seconds=SLOW_SAVING) as service,
        ThreadPoolExecutor(1) as thread,
    ):
        yield thread.submit(save_slowly, service)


def save_slowly(service: BatchService) -> Seen:
    """What the status said before it was ready. Start is tried all the time, and refused until then."""
    session_id = service.upload(sheet_of(["slow"]))["session_id"]
    begun = time.monotonic()
    service.post("/api/tasks/split", {"session_id": session_id})
    seen: Seen = set()
    while True:
        status = service.get(f"/api/tasks/split/status/{session_id}")
        if service.call("POST", "/api/execute/start", json={"session_id": session_id}).status_code == 200:
            assert service.get(f"/api/tasks/split/status/{session_id}")["ready_for_next_stage"]
            assert time.monotonic() - begun >= SLOW_SAVING, "nothing has held the saving up"
            service.wait_running(session_id)
            return seen
        assert not status["ready_for_next_stage"], "ready, and yet it could not be started"
        seen.add((status["status"], status["progress"]))
        time.sleep(0.2)


@pytest.fixture(scope="module", autouse=True)
def begun_early(slowly_saved: Future[Seen]) -> None:
    """With the first test of this module."""


# ---- workers killed


@pytest.fixture(scope="module")
def mortal(stub: StubEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchService]:
    """Here workers are killed, so nobody waits long for them; and saving can take long enough to be killed over."""
    where = tmp_path_factory.mktemp("mortal")
    with batch_service(where, stub.url, "--lease-seconds", str(LEASE), saving_seconds=0) as running:
        yield running


def kill_the_one_at(service: BatchService, part: str, session_id: str) -> None:
    """The worker that holds the lease of this part; its holder is named by its process."""
    holder = holder_of(service, f"{part}:{session_id}")
    assert holder
    service.kill_worker(int(holder.split()[1]))


def holder_of(service: BatchService, name: str) -> str | None:
    with diskcache.Cache(str(service.cache_dir / "store")) as cache:
        holder: str | None = cache.get(f"claim:{name}")
        return holder


def is_split(status: str) -> Callable[[BatchService, str], bool]:
    """And a worker is at it: before that it is said to be processed as well."""

    def reached(service: BatchService, session_id: str) -> bool:
        split = service.patiently(f"/api/tasks/split/status/{session_id}")
        return bool(split["attempt"] and split["status"] == status)

    return reached


@pytest.mark.parametrize(
    ("stage", "rows"),
    [("processing", 40_000), ("saving", 20_000), ("saving", 3)],
    ids=["building", "saving", "saving few"],
)
def test_a_worker_killed_while_it_splits(mortal: BatchService, stage: str, rows: int) -> None:
    mortal.wait_for_all_workers()
    session_id = mortal.upload(sheet_of(f"{stage} {row}" for row in range(rows)))["session_id"]
    with mortal.saving(60):
        mortal.post("/api/tasks/split", {"session_id": session_id})
        wait_until(lambda: is_split(stage)(mortal, session_id))
        kill_the_one_at(mortal, "split", session_id)
    wait_until(lambda: mortal.patiently(f"/api/tasks/split/status/{session_id}")["ready_for_next_stage"], 60)
    status = mortal.get(f"/api/tasks/split/status/{session_id}")
    assert status["tasks"] == rows
    assert status["attempt"] == 2
    mortal.start(session_id)
    mortal.wait_running(session_id)
    assert mortal.call("DELETE", f"/api/sessions/{session_id}").status_code == 200


def test_workers_killed_while_they_ask(mortal: BatchService, stub: StubEndpoint) -> None:
    """Two of them, one after the other. No row is lost; those that were answered are not asked again."""
    mortal.wait_for_all_workers()
    prompts = [f"killed while asking {row}" for row in range(400)]
    stub.delay(0.1)
    try:
        session_id = mortal.upload(sheet_of(prompts))["session_id"]
        assert mortal.split(session_id)["ready_for_next_stage"]
        mortal.start(session_id, concurrency=8)
        paid = 0
        for done in (60, 200):
            wait_until(lambda done=done: execution(mortal, session_id).get("done", 0) >= done, 60)  # type: ignore[misc]
            kill_the_one_at(mortal, "run", session_id)
            paid += 8  # what was under way is asked again: nobody knows its answer
        wait_until(lambda: mortal.patiently(f"/api/sessions/{session_id}")["stage"] == "completed", 120)
    finally:
        stub.delay(0)
    assert execution(mortal, session_id)["unended"] == 3, "two attempts ended in the death of their worker"
    rows = mortal.answers(session_id)
    assert [row["prompt"] for row in rows] == prompts
    assert {row["status"] for row in rows} == {"done"}
    counts = asked(stub, "killed while asking")
    assert set(counts) == set(prompts)
    assert sum(counts.values()) - len(prompts) <= paid, "rows that were finished were paid for twice"


def execution(service: BatchService, session_id: str) -> dict[str, Any]:
    found: dict[str, Any] = service.patiently(f"/api/execute/status/{session_id}")
    return found


def test_a_worker_killed_while_it_saves_the_answers(mortal: BatchService) -> None:
    mortal.wait_for_all_workers()
    session_id = mortal.upload(sheet_of(["one", "two"]))["session_id"]
    assert mortal.split(session_id)["ready_for_next_stage"]
    with mortal.saving(60):
        mortal.start(session_id)
        wait_until(lambda: bool(execution(mortal, session_id)["saving"]))
        assert mortal.call("GET", f"/api/download/{session_id}").status_code == 400
        kill_the_one_at(mortal, "run", session_id)
    wait_until(lambda: execution(mortal, session_id)["ready_for_download"], 60)
    assert [row["status"] for row in mortal.answers(session_id)] == ["done", "done"]


def test_killed_while_idle(mortal: BatchService) -> None:
    """Each in turn; sessions of before and after are the same to everybody."""
    session_id = mortal.upload(sheet_of(["idle"]))["session_id"]
    for pid in mortal.worker_pids():
        mortal.kill_worker(pid)
        assert mortal.patiently(f"/api/sessions/{session_id}")["stage"] == "analyzed"
    mortal.wait_for_all_workers()


def test_the_service_started_again_goes_on(stub: StubEndpoint, tmp_path: Path) -> None:
    prompts = [f"started again {row}" for row in range(100)]
    stub.delay(0.2)
    try:
        with batch_service(tmp_path, stub.url, workers=2) as service:
            session_id = service.upload(sheet_of(prompts))["session_id"]
            service.split(session_id)
            service.start(session_id, concurrency=8)
            wait_until(lambda: execution(service, session_id).get("done", 0) >= 30)
        stub.delay(0)
        with batch_service(tmp_path, stub.url, workers=2) as service:
            service.wait_stage(session_id, "completed")
            assert execution(service, session_id)["unended"] == 1, "the first attempt has ended in order"
            assert {row["status"] for row in service.answers(session_id)} == {"done"}
    finally:
        stub.delay(0)
    assert sum(asked(stub, "started again").values()) <= len(prompts) + 8


# ---- every illegal order


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/tasks/split/status/{}"),
        ("GET", "/api/execute/status/{}"),
        ("GET", "/api/execute/stream/{}"),
        ("GET", "/api/execute/failures/{}"),
        ("GET", "/api/download/{}"),
        ("GET", "/api/sessions/{}"),
        ("DELETE", "/api/sessions/{}"),
    ],
)
@pytest.mark.parametrize("session_id", ["0123456789abcdef", "unknown", "..%2f..%2fetc", "ÄÖ"])
def test_an_unknown_session_is_404(service: BatchService, method: str, path: str, session_id: str) -> None:
    answer = service.call(method, path.format(session_id))
    assert answer.status_code == 404
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    "path", ["tasks/split", *(f"execute/{verb}" for verb in ("start", "pause", "resume", "cancel"))]
)
def test_posts_without_a_session(service: BatchService, path: str) -> None:
    unknown = service.call("POST", f"/api/{path}", json={"session_id": "0123456789abcdef"})
    assert unknown.status_code == 404
    for body in ({}, {"session_id": 7}, {"session_id": None}, []):
        answer = service.call("POST", f"/api/{path}", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["detail"]


# What may be done in each state, and what that state is called; everything else is 400.
CALLS = {
    "split": ("POST", "/api/tasks/split"),
    "start": ("POST", "/api/execute/start"),
    "pause": ("POST", "/api/execute/pause"),
    "resume": ("POST", "/api/execute/resume"),
    "cancel": ("POST", "/api/execute/cancel"),
    "status": ("GET", "/api/execute/status/{}"),
    "stream": ("GET", "/api/execute/stream/{}"),
    "download": ("GET", "/api/download/{}"),
}
ALLOWED = {
    "analyzed": {"split"},
    "splitting": set[str](),
    "split": {"start"},
    "running": {"pause", "resume", "cancel", "status", "stream"},
    "completed": {"status", "stream", "download"},
    "failed": set[str](),
}


def try_all(service: BatchService, session_id: str, state: str) -> None:
    """Every call that is illegal here: refused with a sentence, and nothing has changed."""
    before = service.get(f"/api/sessions/{session_id}")
    for name, (method, path) in CALLS.items():
        if name in ALLOWED[state]:
            continue
        body = {"json": {"session_id": session_id}} if method == "POST" else {}
        answer = service.call(method, path.format(session_id), **body)
        assert answer.status_code == 400, f"{name} when {state}: {answer.status_code} {answer.text}"
        assert len(answer.json()["detail"]) > 20
    after = service.get(f"/api/sessions/{session_id}")
    assert after["stage"] == before["stage"]


def test_every_illegal_order(service: BatchService, mortal: BatchService, stub: StubEndpoint) -> None:
    session_id = mortal.upload(sheet_of([f"order {row}" for row in range(50)]))["session_id"]
    try_all(mortal, session_id, "analyzed")
    with mortal.saving(60):
        mortal.post("/api/tasks/split", {"session_id": session_id})
        try_all(mortal, session_id, "splitting")
    assert mortal.wait_split(session_id)["ready_for_next_stage"]
    try_all(mortal, session_id, "split")
    stub.delay(0.3)
    try:
        mortal.start(session_id, concurrency=2)
        mortal.wait_running(session_id)
        try_all(mortal, session_id, "running")
    finally:
        stub.delay(0)
    mortal.wait_stage(session_id, "completed")
    try_all(mortal, session_id, "completed")
    assert len(mortal.answers(session_id)) == 50


def test_a_failed_split_says_why(service: BatchService) -> None:
    """The workbook on the disk is damaged between the upload and the split."""
    session_id = service.upload(workbook_of(["one", "two"]), "prompts.xlsx")["session_id"]
    (service.folder(session_id) / "source.xlsx").write_bytes(b"PK damaged")
    assert service.split(session_id)["status"] == "failed"
    session = service.get(f"/api/sessions/{session_id}")
    assert session["stage"] == "failed"
    assert len(session["split"]["error"]) > 20
    try_all(service, session_id, "failed")


def test_a_workbook_that_is_gone(service: BatchService) -> None:
    session_id = service.upload(sheet_of(["one"]))["session_id"]
    (service.folder(session_id) / "source.csv").unlink()
    answer = service.call("POST", "/api/tasks/split", json={"session_id": session_id})
    assert (answer.status_code, "upload it again" in answer.json()["detail"]) == (404, True)


def test_tasks_that_are_gone(service: BatchService) -> None:
    session_id = service.upload(sheet_of(["one"]))["session_id"]
    service.split(session_id)
    shutil.rmtree(service.folder(session_id) / "tasks.1")
    answer = service.call("POST", "/api/execute/start", json={"session_id": session_id})
    assert (answer.status_code, "upload its workbook again" in answer.json()["detail"]) == (404, True)


# ---- two browsers on one session


def test_two_start_at_once(service: BatchService) -> None:
    """One of them starts it, the other is told that it has been started; each row is asked once."""
    for number in range(20):
        session_id = service.upload(sheet_of([f"two browsers {number}"]))["session_id"]
        both = threading.Barrier(2)

        def at_once(path: str, session_id: str = session_id, both: threading.Barrier = both) -> int:
            both.wait(10)
            return service.call("POST", path, json={"session_id": session_id}).status_code

        with ThreadPoolExecutor(2) as browsers:
            assert sorted(browsers.map(at_once, ["/api/tasks/split"] * 2)) == [200, 400]
            service.wait_split(session_id)
            assert sorted(browsers.map(at_once, ["/api/execute/start"] * 2)) == [200, 400]
        service.wait_stage(session_id, "completed")


def test_one_deletes_what_the_other_watches(service: BatchService, stub: StubEndpoint) -> None:
    stub.delay(0.2)
    try:
        session_id = service.upload(sheet_of([f"deleted {row}" for row in range(200)]))["session_id"]
        service.split(session_id)
        service.start(session_id, concurrency=2)
        service.wait_running(session_id)
        events = []
        with httpx.stream("GET", f"{service.url}/api/execute/stream/{session_id}", trust_env=False) as stream:
            for line in stream.iter_lines():
                events.append(line)
                if len(events) == 1:
                    assert service.call("DELETE", f"/api/sessions/{session_id}").status_code == 200
        assert "event: gone" in events
        assert service.call("GET", f"/api/sessions/{session_id}").status_code == 404
        before = len(asked(stub, "deleted"))
        wait_until(lambda: settled(stub, "deleted"))
        assert len(asked(stub, "deleted")) <= before + 8, "a deleted session goes on"
    finally:
        stub.delay(0)


REACHED: dict[str, Callable[[BatchService, str], bool]] = {
    "building": is_split("processing"),
    "saving": is_split("saving"),
    "asking": lambda service, session_id: execution(service, session_id)["done"] > 0,
    "saving the answers": lambda service, session_id: bool(execution(service, session_id)["saving"]),
}


@pytest.mark.parametrize("moment", REACHED)
def test_deleted_at_any_moment_nothing_is_left(mortal: BatchService, stub: StubEndpoint, moment: str) -> None:
    """No file that a worker was still writing, and no traceback of one that found its folder gone."""
    said_before = len(mortal.process.log_text())
    part, rows = ("split", 40_000) if moment in ("building", "saving") else ("run", 20)
    session_id = mortal.upload(sheet_of(f"{moment} {row}" for row in range(rows)))["session_id"]
    if part == "run":
        assert mortal.split(session_id)["ready_for_next_stage"]
        stub.delay(0.1)
    with mortal.saving(60):
        if part == "split":
            mortal.post("/api/tasks/split", {"session_id": session_id})
        else:
            mortal.start(session_id, concurrency=2)
        wait_until(lambda: REACHED[moment](mortal, session_id), 60)
        assert mortal.call("DELETE", f"/api/sessions/{session_id}").status_code == 200
    stub.delay(0)
    wait_until(lambda: holder_of(mortal, f"{part}:{session_id}") is None)
    assert list((mortal.cache_dir / "sessions").glob(f"{session_id}*")) == []
    assert "Traceback" not in mortal.process.log_text()[said_before:]


def settled(stub: StubEndpoint, prompts: str) -> bool:
    before = asked(stub, prompts)
    time.sleep(0.5)
    return asked(stub, prompts) == before


# ---- pause, resume, cancel


def test_pause_resume_cancel(service: BatchService, stub: StubEndpoint) -> None:
    stub.delay(0.1)
    try:
        session_id = service.upload(sheet_of([f"paused {row}" for row in range(300)]))["session_id"]
        service.split(session_id)
        service.start(session_id, concurrency=2)
        service.wait_running(session_id)
        body = {"session_id": session_id}
        assert service.post("/api/execute/pause", body)["paused"]
        wait_until(lambda: execution(service, session_id)["running"] == 0 and settled(stub, "paused"))
        assert execution(service, session_id)["message"] == "paused"
        done = execution(service, session_id)["done"]
        assert not service.post("/api/execute/resume", body)["paused"]
        wait_until(lambda: execution(service, session_id)["done"] > done)
        service.post("/api/execute/cancel", body)
        service.wait_stage(session_id, "completed")
    finally:
        stub.delay(0)
    rows = service.answers(session_id)
    statuses = collections.Counter(row["status"] for row in rows)
    assert len(rows) == 300
    assert statuses["done"] > 0
    assert statuses["cancelled"] > 0
    assert statuses["done"] + statuses["cancelled"] == 300
    assert "cancelled" in execution(service, session_id)["message"]


def test_an_endpoint_that_disappears_pauses_the_run(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stub = stack.enter_context(stub_endpoint(tmp_path))
        service = stack.enter_context(batch_service(tmp_path, stub.url, workers=1))
        stub.delay(0.1)
        session_id = service.upload(sheet_of([f"away {row}" for row in range(200)]))["session_id"]
        service.split(session_id)
        service.start(session_id, concurrency=4)
        wait_until(lambda: execution(service, session_id).get("done", 0) > 10)
        stub.kill()
        wait_until(lambda: "cannot reach" in execution(service, session_id)["message"])
        assert execution(service, session_id)["failed"] == 0
        stub.start()
        service.wait_stage(session_id, "completed", seconds=90)
        assert {row["status"] for row in service.answers(session_id)} == {"done"}


@pytest.mark.timeout(240)
def test_saving_that_takes_42_seconds(slowly_saved: Future[Seen]) -> None:
    seen = slowly_saved.result(120)
    assert ("saving", 90.0) in seen
    assert [progress for _, progress in seen if progress == 100] == []
