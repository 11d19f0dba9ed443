"""The service as its operator and its callers meet it: keys, sizes, names, metrics, Redis, and an orderly end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openpyxl
import pytest

from embedding_relay.batch.http.serve import GRACE_SECONDS
from support.batch_service import BatchService, batch_service, sheet_of, workbook_of
from support.patience import wait_until
from support.redis_server import redis_server
from support.repo import REPO
from support.s3_server import s3_server
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
    said = [answer.json()["detail"] for answer in wrong]
    assert said[0] == "file: it must be given"
    assert said[1] == "the file is damaged, or it was cut short"
    assert said[3] == "the body: it is not JSON"
    assert "max_tokens: it must be a whole number, not a text" in said[6]
    assert said[7] == "limit: it must be at least 1"
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


# ---- before a run and after it


def test_one_call_from_an_upload_to_its_answers(service: BatchService, stub: StubEndpoint) -> None:
    """Its start is accepted at once: from then on the status is answered, whatever the session is doing."""
    session_id = service.upload(b"question,other\nnot this,one call\n")["session_id"]
    accepted = service.post("/api/run", {"session_id": session_id, "prompt_column": "other", "max_tokens": 4})
    assert accepted["status"] == "initializing"
    while not (status := service.get(f"/api/execute/status/{session_id}"))["ready_for_download"]:
        assert status["status"] in ("initializing", "running")
    assert stub.counts() == {"one call": 1}
    assert stub.seen()["last_body"]["max_tokens"] == 4
    answer = service.call("POST", "/api/run", json={"session_id": session_id})
    assert (answer.status_code, "it is completed" in answer.json()["detail"]) == (400, True)


def test_a_session_that_is_split_is_run_as_it_was_split(service: BatchService) -> None:
    session_id = service.upload(b"question,other\na,b\n")["session_id"]
    service.split(session_id)
    answer = service.call("POST", "/api/run", json={"session_id": session_id, "prompt_column": "other"})
    assert (answer.status_code, "cannot be split in another way" in answer.json()["detail"]) == (400, True)
    service.post("/api/run", {"session_id": session_id})
    service.wait_stage(session_id, "completed")


def test_a_preview_before_and_after_the_split(service: BatchService, stub: StubEndpoint) -> None:
    session_id = service.upload(sheet_of(f"row {number}" for number in range(9)))["session_id"]
    before = service.post("/api/analyze/preview", {"session_id": session_id, "rows": 2})
    assert [row["prompt"] for row in before["rows"]] == ["row 0", "row 1"]
    assert (before["total"], before["why"][0]["reason"]) == (9, "its name says so")
    service.split(session_id)
    after = service.post("/api/analyze/preview", {"session_id": session_id, "rows": 2})
    assert after["rows"] == before["rows"]
    assert stub.counts() == {}
    for rows in (0, 21, "all"):
        answer = service.call("POST", "/api/analyze/preview", json={"session_id": session_id, "rows": rows})
        assert answer.status_code == 400


def test_rows_are_tried_as_the_run_would_ask_them(service: BatchService, stub: StubEndpoint) -> None:
    stub.next(1, "row 1", status=422, message="no")
    session_id = service.upload(sheet_of(f"row {number}" for number in range(8)))["session_id"]
    body = {"session_id": session_id, "rows": 2, "system": "Be brief.", "concurrency": 4}
    found = service.post("/api/analyze/try", body)
    assert [row["status"] for row in found["rows"]] == ["done", "failed"]
    assert found["rows"][0]["answer"] == answer_to("row 0")
    assert (found["rows"][1]["http_status"], found["model"]) == (422, "stub")
    assert (found["estimate"]["rows"], found["estimate"]["in_flight"]) == (8, 4)
    assert stub.seen()["last_body"]["messages"][0]["content"] == "Be brief."
    assert service.get(f"/api/sessions/{session_id}")["stage"] == "analyzed"


def test_the_endpoint_is_told(service: BatchService, stub: StubEndpoint) -> None:
    assert service.get("/api/endpoint") == {"url": stub.url, "model": "stub", "error": ""}


def test_failed_rows_are_asked_again_with_another_option(service: BatchService, stub: StubEndpoint) -> None:
    stub.next(2, "^again", status=400, message="too short")
    session_id = service.run(sheet_of(["again 1", "again 2", "good"]), system="Be brief.")
    (reason,) = service.get(f"/api/execute/failures/{session_id}")["reasons"]
    assert (reason["error"], reason["count"], reason["differs"]) == ("400: too short", 2, False)
    service.post("/api/execute/retry", {"session_id": session_id, "max_tokens": 99})
    service.wait_stage(session_id, "completed")
    assert stub.counts() == {"again 1": 2, "again 2": 2, "good": 1}
    body = stub.seen()["last_body"]
    assert (body["max_tokens"], body["messages"][0]["content"]) == (99, "Be brief.")
    assert [row["status"] for row in service.answers(session_id)] == ["done"] * 3
    assert service.get(f"/api/execute/failures/{session_id}")["failed"] == 0
    answer = service.call("POST", "/api/execute/retry", json={"session_id": session_id})
    assert (answer.status_code, "every row" in answer.json()["detail"]) == (400, True)


def test_a_retry_that_is_cancelled_keeps_what_had_failed(service: BatchService, stub: StubEndpoint) -> None:
    stub.next(2, "^bad", status=400, message="no")
    session_id = service.run(sheet_of(["bad 1", "bad 2", "good"]))
    stub.next(None, "^bad", delay=60)
    service.post("/api/execute/retry", {"session_id": session_id})
    service.wait_running(session_id)
    service.post("/api/execute/cancel", {"session_id": session_id})
    service.wait_stage(session_id, "completed")
    rows = service.answers(session_id)
    assert [row["status"] for row in rows] == ["failed", "failed", "done"]
    assert rows[0]["error"] == "400: no"
    assert service.get(f"/api/execute/failures/{session_id}")["failed"] == 2


def test_answers_are_looked_at_while_others_are_awaited(service: BatchService, stub: StubEndpoint) -> None:
    stub.next(None, "^slow", delay=60)
    session_id = service.upload(sheet_of(["quick", "slow", "not shown"]))["session_id"]
    assert service.call("GET", f"/api/execute/answers/{session_id}").status_code == 400
    service.post("/api/run", {"session_id": session_id})
    wait_until(lambda: service.get(f"/api/execute/status/{session_id}")["done"] == 2)
    found = service.get(f"/api/execute/answers/{session_id}?limit=2")
    assert (found["total"], [row["status"] for row in found["rows"]]) == (3, ["done", "waiting"])
    assert (found["rows"][0]["prompt"], found["rows"][0]["answer"]) == ("quick", answer_to("quick"))
    service.call("DELETE", f"/api/sessions/{session_id}")


def test_the_example_of_the_documentation(service: BatchService, stub: StubEndpoint, tmp_path: Path) -> None:
    """Run as it is printed, but for the address of the service."""
    stub.next(3, "^dark", status=400, message="too dark")
    (tmp_path / "prompts.csv").write_bytes(sheet_of(["light", "dark"]))
    (example,) = re.findall(r"```python\n(import time.*?)```", (REPO / "docs/batch-sessions.md").read_text(), re.DOTALL)
    code = example.replace("http://127.0.0.1:8600", service.url)
    assert code != example
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "prompt: A prompt (its name says so)" in ended.stdout
    assert f"row 2: {answer_to('light')}" in ended.stdout
    assert "1 rows: 400: too dark" in ended.stdout
    assert (tmp_path / "answers.csv").read_text().splitlines()[1].startswith(f"light,{answer_to('light')},done")
    assert stub.counts() == {"light": 2, "dark": 3}


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


def test_what_was_asked_again_is_counted_when_the_run_is_over_too(service: BatchService, stub: StubEndpoint) -> None:
    def retries() -> float:
        text = service.call("GET", "/metrics").text
        return float(re.findall(r"^sglang_relay_batch_retries (\S+)$", text, re.MULTILINE)[0])

    before = retries()
    stub.next(2, "asked again", status=500)
    session_id = service.run(sheet_of(["asked again"]))
    assert service.get(f"/api/execute/status/{session_id}")["retries"] == 2
    assert retries() == before + 2


def test_no_more_runs_and_requests_than_the_service_may_have(stub: StubEndpoint, tmp_path: Path) -> None:
    """Of all its workers together."""
    limits = ("--max-runs", "2", "--max-in-flight", "6", "--lease-seconds", "1")
    with batch_service(tmp_path, stub.url, *limits, workers=2) as service:
        stub.delay(0.1)
        sheets = [sheet_of(f"limit {number} {row}" for row in range(30)) for number in range(3)]
        ids = [service.upload(sheet)["session_id"] for sheet in sheets]
        for session_id in ids:
            service.split(session_id)
            service.start(session_id)

        def view(at: int) -> Any:
            return service.get(f"/api/execute/status/{ids[at]}")

        wait_until(lambda: "2 runs at a time" in view(2)["message"])
        assert (view(2)["status"], view(2)["done"]) == ("initializing", 0)
        for session_id in ids:
            service.wait_stage(session_id, "completed")
        assert 4 <= stub.seen()["most_in_flight"] <= 6
        assert set(stub.counts().values()) == {1}


# ---- Redis, and the end


def test_machines_that_share_redis_and_an_object_store_and_nothing_else(stub: StubEndpoint, tmp_path: Path) -> None:
    """Each service stands for a machine: it has a directory of its own. One is lost in the middle of a run."""
    for name in ("redis", "s3", "one", "two"):
        (tmp_path / name).mkdir()
    with redis_server(tmp_path / "redis") as url, s3_server(tmp_path / "s3") as s3:
        prompts = [f"machine {row}" for row in range(400)]  # so many that none of them ends by itself before it is lost
        shared = ("--store", url, "--files", s3.place, "--lease-seconds", "1.5")
        stub.delay(0.1)
        with (
            batch_service(tmp_path / "one", stub.url, *shared, workers=1, name="one", environ=s3.environ) as one,
            batch_service(tmp_path / "two", stub.url, *shared, workers=1, name="two", environ=s3.environ) as two,
        ):
            session_id = one.upload(workbook_of(prompts), "prompts.xlsx")["session_id"]
            two.split(session_id)
            one.start(session_id, concurrency=4)
            wait_until(lambda: two.get(f"/api/sessions/{session_id}")["execution"].get("done", 0) > 20)
            at_it = [service for service in (one, two) if list(service.folder(session_id).glob("results.*"))]
            assert len(at_it) == 1, "results are in the directory of the machine that asks, and in no other"
            lost, left = (one, two) if at_it == [one] else (two, one)
            assert left.get(f"/api/execute/failures/{session_id}")["failed"] == 0
            wait_until(lambda: any("/results.1.jsonl/" in key for key in s3.names()))
            lost.process.kill_group(signal.SIGKILL)
            lost.process.reap()
            shutil.rmtree(lost.cache_dir)
            stub.delay(0)
            left.wait_stage(session_id, "completed")
            sheet = openpyxl.load_workbook(BytesIO(left.download(session_id))).active
            answers = [row[1] for row in sheet.iter_rows(min_row=2, values_only=True)]
            assert answers == [answer_to(prompt) for prompt in prompts]
            asked_twice = sum(stub.counts().values()) - len(prompts)
            # Four in flight, and what four of them bring in the two seconds between two pieces.
            assert asked_twice <= 4 + 4 * 2 / 0.1
            assert left.call("DELETE", f"/api/sessions/{session_id}").status_code == 200
            assert [name for name in s3.names() if session_id in name] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_order_in_the_middle_of_everything(
    stub: StubEndpoint, tmp_path: Path, number: signal.Signals
) -> None:
    """Well within its grace, with status 0, a live stream open, and no traceback. Ctrl-C goes to all its processes."""
    stub.delay(5)
    try:
        with batch_service(tmp_path, stub.url, workers=2) as service:
            session_id = service.upload(sheet_of(["endless"]))["session_id"]
            service.split(session_id)
            service.start(session_id)
            service.wait_running(session_id)
            with httpx.stream("GET", f"{service.url}/api/execute/stream/{session_id}", trust_env=False) as stream:
                lines = stream.iter_lines()  # kept: without it the stream would be closed
                next(lines)
                begun = time.monotonic()
                if number is signal.SIGTERM:
                    os.kill(service.process.pid, number)
                else:
                    service.process.kill_group(number)
                wait_until(lambda: service.process.returncode() is not None, 20)
            assert time.monotonic() - begun < GRACE_SECONDS, "the live stream has kept it"
            assert service.process.returncode() == 0
            wait_until(lambda: service.process.group_members() == [], 5)
            assert "Traceback" not in service.process.log_text()
            assert "Cancel" not in service.process.log_text()
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
