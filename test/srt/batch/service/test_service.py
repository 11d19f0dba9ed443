"""The service as its operator and its callers meet it: keys, sizes, names, metrics, Redis, and an orderly end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import pytest

from support.batch_service import BatchService, batch_service, sheet_of, workbook_of
from support.patience import wait_until
from support.redis_server import redis_server
from support.repo import REPO
from support.stub_endpoint import StubEndpoint, answer_to

KEY = "correct horse"
UPLOAD_MIB = 2


@pytest.fixture(scope="module")
def service(stub: StubEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchService]:
    limits = ("--max-upload-mib", str(UPLOAD_MIB), "--max-expanded-mib", "20")
    with batch_service(tmp_path_factory.mktemp("service"), stub.url, *limits, workers=2) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(stub: StubEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchService]:
    key = {"SESSION_API_KEY": KEY, "SESSION_ENDPOINT_API_KEY": "the endpoint's"}
    with batch_service(tmp_path_factory.mktemp("guarded"), stub.url, workers=1, environ=key) as running:
        yield running


# ---- who may call


def calls_of(service: BatchService) -> list[tuple[str, str]]:
    """Every call that the service describes, with something in place of its parameters."""
    paths = service.get("/openapi.json")["paths"]
    found = [(method.upper(), path) for path, here in paths.items() for method in here if path != "/health"]
    assert len(found) > 15
    return [(method, re.sub(r"\{\w+\}", "0123456789abcdef", path)) for method, path in found]


def test_every_call_wants_the_key(guarded: BatchService) -> None:
    for method, path in calls_of(guarded):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            answer = guarded.call(method, path, headers=headers)
            assert answer.status_code == 401, f"{method} {path} with {headers}"
            assert answer.headers["www-authenticate"] == "Bearer"
    ours = {"Authorization": f"Bearer {KEY}"}
    assert guarded.call("GET", "/api/sessions", headers=ours).status_code == 200
    assert guarded.call("GET", "/metrics", headers=ours).status_code == 200
    assert guarded.call("GET", "/").status_code == 200, "the page itself asks for the key"
    assert guarded.call("GET", "/health").status_code == 200


def test_the_endpoint_gets_its_own_key_only(guarded: BatchService, stub: StubEndpoint) -> None:
    ours = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=guarded.url, headers=ours, trust_env=False) as client:
        files = {"file": ("a.csv", sheet_of(["whose key"]))}
        session_id = client.post("/api/analyze/upload", files=files).json()["session_id"]
        body = {"session_id": session_id}
        client.post("/api/tasks/split", json=body)
        wait_until(lambda: client.get(f"/api/tasks/split/status/{session_id}").json()["ready_for_next_stage"])
        client.post("/api/execute/start", json=body)
        wait_until(lambda: client.get(f"/api/sessions/{session_id}").json()["stage"] == "completed")
    sent = {name.lower(): value for name, value in stub.seen()["last_headers"].items()}
    assert sent["authorization"] == "Bearer the endpoint's"
    assert KEY not in json.dumps(sent)


def test_pages_of_other_sites_may_change_nothing(service: BatchService) -> None:
    for path in ("/api/analyze/upload", "/api/tasks/split", "/api/execute/start"):
        answer = service.call("POST", path, headers={"Sec-Fetch-Site": "cross-site"}, json={})
        assert answer.status_code == 403
    assert service.call("GET", "/api/sessions", headers={"Host": "evil.example"}).status_code == 400
    assert service.call("GET", "/api/sessions", headers={"Host": "localhost:1"}).status_code == 200


# ---- sizes


def test_an_upload_that_is_too_large(service: BatchService) -> None:
    content = sheet_of(["x" * 1000] * 1024 * (UPLOAD_MIB + 2))
    answer = service.call("POST", "/api/analyze/upload", files={"file": ("a.csv", content)})
    assert (answer.status_code, "MiB" in answer.json()["detail"]) == (413, True)
    assert folders(service) == sessions(service)


def test_an_upload_that_does_not_say_how_large_it_is(service: BatchService) -> None:
    """Chunked, and endless: it is refused when it has become too large, whatever it said."""
    host, _, port = service.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = "POST /api/analyze/upload HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode())
        part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'
        connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        piece = b"%x\r\n%s\r\n" % (2**16, b"x" * 2**16)
        answer = b""
        try:
            for _ in range(16 * (UPLOAD_MIB + 8)):
                connection.sendall(piece)
            answer = connection.recv(1000)
        except (BrokenPipeError, ConnectionResetError):
            answer = connection.recv(1000)
    assert b" 413 " in answer.splitlines()[0]


def test_a_bomb(service: BatchService) -> None:
    bomb = BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("prompts.csv", sheet_of(["x"]))
        archive.writestr("big.png", bytes(100 * 2**20))
    assert len(bomb.getvalue()) < UPLOAD_MIB * 2**20
    answer = service.call("POST", "/api/analyze/upload", files={"file": ("a.zip", bomb.getvalue())})
    assert answer.status_code == 413, answer.text
    assert folders(service) == sessions(service)


def folders(service: BatchService) -> set[str]:
    return {path.name for path in (service.cache_dir / "sessions").iterdir()}


def sessions(service: BatchService) -> set[str]:
    return {session["session_id"] for session in service.get("/api/sessions")["sessions"]}


# ---- names


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd.csv", "/etc/cron.d/x.csv", "C:\\x\\y.csv", "a\r\nSet-Cookie: b.csv", "<b>ü雪.csv", "x" * 999],
)
def test_no_name_becomes_a_path_or_a_header(service: BatchService, name: str) -> None:
    session_id = service.upload(sheet_of(["hostile name"]), name)["session_id"]
    known = {"source.csv", "tasks.1", "results.1.jsonl", "answers.1.csv"}
    service.split(session_id)
    service.start(session_id)
    service.wait_stage(session_id, "completed")
    assert {path.name for path in service.folder(session_id).iterdir()} <= known
    answer = service.call("GET", f"/api/download/{session_id}")
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    offered = answer.headers["content-disposition"]
    assert offered.startswith("attachment; filename*=UTF-8''")
    assert "/" not in offered.removeprefix("attachment; filename*=UTF-8''")


# ---- what is answered


def test_every_error_is_a_sentence(service: BatchService) -> None:
    session_id = service.upload(sheet_of(["x"]))["session_id"]
    wrong = [
        service.call("POST", "/api/analyze/upload"),
        service.call("POST", "/api/analyze/upload", files={"file": ("a.xlsx", b"PK\x03\x04 but no more")}),
        service.call("POST", "/api/analyze/upload", files={"file": ("a.csv", b"")}),
        service.call("POST", "/api/tasks/split", content=b"{", headers={"Content-Type": "application/json"}),
        service.call("POST", "/api/tasks/split", json={"session_id": session_id, "sheat": "one"}),
        service.call("POST", "/api/tasks/split", json={"session_id": session_id, "prompt_column": "none"}),
        service.call("POST", "/api/execute/start", json={"session_id": session_id, "max_tokens": "many"}),
        service.call("GET", f"/api/execute/failures/{session_id}?limit=0"),
    ]
    for answer in wrong:
        assert answer.status_code == 400, f"{answer.request.url}: {answer.text}"
        assert list(answer.json()) == ["detail"]
        assert len(answer.json()["detail"]) > 10
    assert "'sheat'" in wrong[4].json()["detail"]
    assert "prompt" in wrong[5].json()["detail"], "the columns that exist are named"
    assert service.call("GET", "/no/such/page").status_code == 404
    assert service.split(session_id)["ready_for_next_stage"], "and nothing has changed"


def test_choices_of_the_split_replace_those_of_the_upload(service: BatchService, stub: StubEndpoint) -> None:
    upload = service.upload(b"question,other\nnot this,but this\n", template="{question}?")
    assert upload["choices"]["template"] == "{question}?"
    session_id = upload["session_id"]
    service.split(session_id, prompt_column="other")
    service.start(session_id, system="Be brief.", max_tokens=3)
    service.wait_stage(session_id, "completed")
    assert stub.counts()["but this"] == 1
    body = stub.seen()["last_body"]
    assert body["max_tokens"] == 3
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_failed_rows_in_pages(service: BatchService, stub: StubEndpoint) -> None:
    stub.next(None, "^hopeless", status=422, message="never")
    try:
        session_id = service.run(sheet_of(f"hopeless {row}" for row in range(30)))
    finally:
        stub.forget()
    page = service.get(f"/api/execute/failures/{session_id}?skip=25&limit=10")
    assert page["failed"] == 30
    assert len(page["rows"]) == 5
    assert page["rows"][0]["http_status"] == 422
    assert "never" in page["rows"][0]["error"]
    assert {row["status"] for row in service.answers(session_id)} == {"failed"}


def test_the_live_stream_ends_with_the_run(service: BatchService, stub: StubEndpoint) -> None:
    stub.delay(0.05)
    try:
        session_id = service.upload(sheet_of(f"streamed {row}" for row in range(60)))["session_id"]
        service.split(session_id)
        service.start(session_id, concurrency=4)
        service.wait_running(session_id)
        with httpx.stream("GET", f"{service.url}/api/execute/stream/{session_id}", trust_env=False) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    finally:
        stub.delay(0)
    assert [event["done"] for event in events] == sorted(event["done"] for event in events)
    assert (events[-1]["stage"], events[-1]["done"], events[-1]["progress"]) == ("completed", 60, 100)
    assert [event["progress"] for event in events[:-1] if event["progress"] > 99] == []
    assert len(events) > 3


def test_metrics_are_those_that_are_documented(service: BatchService, stub: StubEndpoint) -> None:
    service.run(sheet_of(["counted one", "counted two"]))
    lines = service.call("GET", "/metrics").text.splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# HELP")}
    page = (REPO / "docs/batch-sessions.md").read_text()
    assert names == set(re.findall(r"`(sglang_relay_batch_\w+)`", page))
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['sglang_relay_batch_sessions{stage="completed"}']) >= 1
    assert float(values['sglang_relay_batch_rows{state="done"}']) >= 2
    assert float(values['sglang_relay_batch_rows{state="waiting"}']) == 0


# ---- Redis, and the end


def test_the_same_with_redis(stub: StubEndpoint, tmp_path: Path) -> None:
    """A worker of one service goes on with what a service on another machine began: they share Redis and files."""
    (tmp_path / "redis").mkdir()
    with redis_server(tmp_path / "redis") as url:
        prompts = [f"redis {row}" for row in range(120)]
        store = ("--store", url, "--lease-seconds", "1.5")
        stub.delay(0.1)
        with (
            batch_service(tmp_path, stub.url, *store, workers=1, name="one") as one,
            batch_service(tmp_path, stub.url, *store, workers=1, name="two", log="two.log") as two,
        ):
            session_id = one.upload(workbook_of(prompts), "prompts.xlsx")["session_id"]
            two.split(session_id)
            one.start(session_id, concurrency=4)
            wait_until(lambda: two.get(f"/api/sessions/{session_id}")["execution"].get("done", 0) > 20)
            # Whichever of them is at it: every process of that machine, at once.
            for service in (one, two):
                wait_until(lambda service=service: len(service.worker_pids()) == 1)  # type: ignore[misc]
            one.process.kill_group(signal.SIGKILL)
            one.process.reap()
            stub.delay(0)
            two.wait_stage(session_id, "completed")
            assert len(two.download(session_id)) > 0
            assert two.get(f"/api/sessions/{session_id}")["execution"]["done"] == len(prompts)


def test_it_ends_in_order_in_the_middle_of_everything(stub: StubEndpoint, tmp_path: Path) -> None:
    """Within its grace, with status 0, and with a live stream open."""
    stub.delay(5)
    try:
        with batch_service(tmp_path, stub.url, workers=2) as service:
            session_id = service.upload(sheet_of(["endless"]))["session_id"]
            service.split(session_id)
            service.start(session_id)
            service.wait_running(session_id)
            with httpx.stream("GET", f"{service.url}/api/execute/stream/{session_id}", trust_env=False) as stream:
                next(stream.iter_lines())
                os.kill(service.process.pid, signal.SIGTERM)
                wait_until(lambda: service.process.returncode() is not None, 20)
            assert service.process.returncode() == 0
            wait_until(lambda: service.process.group_members() == [], 5)
    finally:
        stub.delay(0)


def test_workers_end_when_their_parent_was_killed(stub: StubEndpoint, tmp_path: Path) -> None:
    with batch_service(tmp_path, stub.url, workers=2) as service:
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.reap()
        wait_until(lambda: service.process.group_members() == [], 20)


def test_answers_are_the_endpoints(service: BatchService) -> None:
    prompts = ["=1+1", "ünï\ncode", "a,b;c"]
    session_id = service.run(sheet_of(prompts))
    assert [row["answer"] for row in service.answers(session_id)] == [answer_to(prompt) for prompt in prompts]
