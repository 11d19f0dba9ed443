"""What once broke the service: too many splits, lost files, full disks, records nobody can read, and odd requests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diskcache
import httpx
import pytest
import redis

from embedding_relay.batch.store import disk_store
from embedding_relay.batch.store.contract import StoreAway
from embedding_relay.batch.store.opening import open_store
from support.batch_service import RELAY, BatchService, batch_service, sheet_of
from support.patience import wait_until
from support.redis_server import redis_server
from support.stub_endpoint import StubEndpoint

EXPANDED_MIB = 20


@pytest.fixture(scope="module")
def service(stub: StubEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchService]:
    """When it starts there is much to sweep up, and every worker begins with that."""
    where = tmp_path_factory.mktemp("service")
    for number in range(1000):
        orphan = where / "cache" / "sessions" / f"{number:016x}"
        orphan.mkdir(parents=True)
        os.utime(orphan, (1, 1))
    with batch_service(where, stub.url, "--max-expanded-mib", str(EXPANDED_MIB), workers=3) as running:
        yield running


def split_session(service: BatchService, *prompts: str) -> str:
    session_id = str(service.upload(sheet_of(prompts))["session_id"])
    assert service.split(session_id)["ready_for_next_stage"]
    return session_id


def test_workers_that_sweep_at_once_live_on(service: BatchService) -> None:
    wait_until(lambda: not list((service.cache_dir / "sessions").glob("0000*")))
    # Every call is on a connection of its own, so that each worker is most likely among those asked.
    assert {service.call("GET", "/health").status_code for _ in range(30)} == {200}
    assert "the background work of this process ended" not in service.process.log_tail()


def test_more_splits_than_threads(stub: StubEndpoint, tmp_path: Path) -> None:
    """Each lease is renewed meanwhile, so none is begun twice."""
    with batch_service(tmp_path, stub.url, "--lease-seconds", "4", workers=1, saving_seconds=4.5) as service:
        ids = [service.upload(sheet_of(["many"]))["session_id"] for _ in range(9)]
        for session_id in ids:
            service.post("/api/tasks/split", {"session_id": session_id})
        splits = [service.wait_split(session_id) for session_id in ids]
    assert [(split["status"], split["attempt"]) for split in splits] == [("completed", 1)] * 9


@pytest.mark.parametrize("name", ["source.csv", "tasks.1/000000.jsonl"])
def test_a_file_that_is_gone_ends_the_run(service: BatchService, name: str) -> None:
    """It will not come back, so it is said and not tried for ever."""
    session_id = split_session(service, "gone")
    (service.folder(session_id) / name).unlink()
    service.start(session_id)
    error = service.wait_stage(session_id, "failed")["execution"]["error"]
    assert Path(name).name in error
    assert str(service.cache_dir) not in error


def test_nothing_is_asked_that_could_not_be_recorded(service: BatchService, stub: StubEndpoint) -> None:
    """A directory stands where the first attempt tries whether the disk takes anything; the next one can."""
    session_id = split_session(service, "full 1", "full 2")
    (service.folder(session_id) / "results.1.probe").mkdir()
    service.start(session_id)
    wait_until(lambda: "trying again" in service.get(f"/api/sessions/{session_id}")["execution"]["message"])
    assert stub.counts() == {}
    assert service.wait_stage(session_id, "completed")["execution"]["done"] == 2
    assert stub.counts() == {"full 1": 1, "full 2": 1}


def test_a_record_of_another_version(service: BatchService) -> None:
    with diskcache.Cache(str(service.cache_dir / "store")) as cache:
        cache.set("session:00000000000000aa", b"\x93garbage")
        try:
            session_id = service.run(sheet_of(["beside it"]))
            listed = [session["session_id"] for session in service.get("/api/sessions")["sessions"]]
            assert session_id in listed
            assert service.call("GET", "/api/sessions/00000000000000aa").status_code == 404
            assert service.call("GET", "/health").status_code == 200
        finally:
            cache.delete("session:00000000000000aa")


def test_a_large_record_is_there_while_it_is_replaced(tmp_path: Path) -> None:
    """diskcache would put it into a file of its own, and take it for missing when that is replaced under the reader."""
    reader, writer = open_store(str(tmp_path)), open_store(str(tmp_path))
    reader.create("session:a", b"x" * 100_000, 1000)
    begun, stop = threading.Event(), threading.Event()

    def replace() -> None:
        while not stop.is_set():
            writer.change("session:a", 1000, lambda value: value[::-1])
            begun.set()

    with ThreadPoolExecutor(1) as thread:
        replacing = thread.submit(replace)
        assert begun.wait(30)
        found = [reader.get("session:a") is not None for _ in range(3000)]
        stop.set()
        replacing.result(30)
    reader.close()
    writer.close()
    assert all(found)


def test_a_store_that_somebody_keeps_locked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_store, "PATIENCE_SECONDS", 0.2)
    store = open_store(str(tmp_path))
    store.create("session:a", b"1", 1000)
    store.claim("run:a", "one", 1000)
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreAway, match="locked"):
            store.change("session:a", 1000, lambda value: value)
        assert store.get("session:a") == b"1", "it can be read meanwhile"
        assert not store.claim("run:a", "two", 1000), "and who asks for what somebody else holds need not wait"
        other.execute("ROLLBACK")
    assert store.change("session:a", 1000, lambda value: value + b"2") == b"12"
    store.close()


# ---- odd requests


@pytest.mark.parametrize(
    "option",
    ['"max_tokens": 100000000000000000000000', '"concurrency": 1e400', '"temperature": NaN', '"system": "\\ud800"'],
)
def test_options_that_no_record_can_hold(service: BatchService, option: str) -> None:
    session_id = split_session(service, "odd")
    headers = {"Content-Type": "application/json"}
    body = f'{{"session_id": "{session_id}", {option}}}'
    answer = service.call("POST", "/api/execute/start", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["detail"].startswith("wrong options")
    assert service.get(f"/api/sessions/{session_id}")["stage"] == "split_complete"


def test_a_name_in_halves_of_characters(service: BatchService) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="+2AA-.csv"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b; charset=utf-7"}
    content = head + b"prompt\nx\n\r\n--b--\r\n"
    answer = service.call("POST", "/api/analyze/upload", content=content, headers=headers)
    assert answer.status_code == 400, answer.text


def test_metadata_in_halves_of_characters(service: BatchService) -> None:
    order = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    body = json.dumps(order | {"metadata": {"a": "\ud800"}})
    answer = service.call("POST", "/v1/batches", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata")


def test_json_is_no_upload(service: BatchService) -> None:
    session_id = split_session(service, "long")
    body = {"session_id": session_id, "system": "x" * 2**21}
    answer = service.call("POST", "/api/execute/start", json=body)
    assert (answer.status_code, answer.json()["detail"]) == (413, "this is more than the 1 MiB that one call may have")


def test_a_column_whose_name_is_a_book(service: BatchService) -> None:
    content = json.dumps({"k" * 2**21: "v"}).encode()
    answer = service.call("POST", "/api/analyze/upload", files={"file": ("k.jsonl", content)})
    assert (answer.status_code, "names of the columns" in answer.json()["detail"]) == (413, True)


def test_a_template_that_fills_the_disk(service: BatchService) -> None:
    session_id = service.upload(sheet_of("x" * 50), template="long " * 100_000 + "{prompt}")["session_id"]
    split = service.split(session_id)
    assert (split["status"], f"more than {EXPANDED_MIB} MiB" in split["error"]) == ("failed", True)


def test_a_template_that_fills_the_memory(service: BatchService) -> None:
    session_id = service.upload(sheet_of(["x" * 2**20, "y"]), template="{prompt}" * 100)["session_id"]
    service.split(session_id)
    service.start(session_id)
    service.wait_stage(session_id, "completed")
    failed = service.get(f"/api/execute/failures/{session_id}")
    assert [row["row"] for row in failed["rows"]] == [2]
    assert f"{100 * 2**20} characters" in failed["rows"][0]["error"]


def test_an_endpoint_that_counts_too_many_tokens(service: BatchService, stub: StubEndpoint) -> None:
    stub.next(1, body={"choices": [{"message": {"content": "fine"}}], "usage": {"prompt_tokens": 10**25}})
    session_id = service.run(sheet_of(["tokens"]))
    assert service.answers(session_id)[0]["answer"] == "fine"


# ---- keys


def test_a_key_that_is_not_ascii(stub: StubEndpoint, tmp_path: Path) -> None:
    with batch_service(tmp_path, stub.url, workers=1, environ={"SESSION_API_KEY": "Schlüssel"}) as guarded:
        for sent, status in (("Schlüssel".encode(), 200), ("Schlüssel".encode("latin-1"), 200), (b"\xff", 401)):
            headers = {b"Authorization": b"Bearer " + sent}
            assert guarded.call("GET", "/api/sessions", headers=headers).status_code == status


def test_a_key_of_the_endpoint_that_cannot_be_sent_is_one_line(tmp_path: Path) -> None:
    command = [*RELAY, "batch", "serve", "--endpoint", "http://127.0.0.1:1", "--port", "0"]
    command += ["--cache-dir", str(tmp_path)]
    environ = os.environ | {"SESSION_ENDPOINT_API_KEY": "Schlüssel"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1), ended.stderr
    assert "characters that no header can carry" in ended.stderr


# ---- Redis, and the terminal


def test_redis_that_hangs_for_a_while_costs_no_row(stub: StubEndpoint, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    with (
        redis_server(tmp_path / "redis") as url,
        redis.Redis.from_url(url) as client,
        batch_service(tmp_path, stub.url, "--store", url, "--lease-seconds", "20", workers=1) as service,
    ):
        session_id = split_session(service, *(f"redis {row}" for row in range(100)))
        stub.delay(0.5)  # so that it is far from its end when Redis hangs
        service.start(session_id, concurrency=4)
        wait_until(lambda: service.get(f"/api/sessions/{session_id}")["execution"]["done"] > 4)
        process, begun = client.info()["process_id"], threading.Event()
        with ThreadPoolExecutor(1) as thread:
            watching = thread.submit(watch, service, session_id, begun)
            assert begun.wait(30), "the live stream has not begun"
            os.kill(process, signal.SIGSTOP)
            try:
                answer = service.call("GET", f"/api/sessions/{session_id}")
            finally:
                os.kill(process, signal.SIGCONT)
            stub.delay(0)
            assert (answer.status_code, "session store" in answer.json()["detail"]) == (503, True)
            execution = service.wait_stage(session_id, "completed")["execution"]
            assert watching.result(30)["stage"] == "completed", "the live stream has outlasted it"
    assert (execution["done"], execution["attempt"]) == (100, 1)
    assert set(stub.counts().values()) == {1}


def watch(service: BatchService, session_id: str, begun: threading.Event) -> Any:
    """The last event of the live stream; tells when the first one is there."""
    url, last = f"{service.url}/api/execute/stream/{session_id}", None
    with httpx.stream("GET", url, timeout=60, trust_env=False) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                last = json.loads(line[6:])
                begun.set()
    return last


def test_the_same_command_in_several_windows(stub: StubEndpoint, tmp_path: Path) -> None:
    workbook, out = tmp_path / "a.csv", tmp_path / "b.csv"
    workbook.write_bytes(sheet_of(f"window {row}" for row in range(40)))
    stub.delay(0.1)
    command = [*RELAY, "batch", "run", str(workbook), "--out", str(out), "--endpoint", stub.url]
    command += ["--cache-dir", str(tmp_path / "cache"), "--concurrency", "4"]
    windows = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [window.communicate(timeout=60) for window in windows]
    assert [window.returncode for window in windows] == [0, 0, 0], said
    assert set(stub.counts().values()) == {1}
    assert len(out.read_text().splitlines()) == 41
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "b.csv", "cache"}


def test_an_out_that_cannot_be_written_is_said_before_anything_is_asked(stub: StubEndpoint, tmp_path: Path) -> None:
    workbook = tmp_path / "a.csv"
    workbook.write_bytes(sheet_of(["a"]))
    (tmp_path / "b.csv").mkdir()
    command = [*RELAY, "batch", "run", str(workbook), "--out", str(tmp_path / "b.csv")]
    command += ["--endpoint", stub.url, "--cache-dir", str(tmp_path / "cache")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, "cannot be written" in ended.stderr) == (1, True)
    assert stub.counts() == {}
