"""The benchmark of a trace asks when it should, and counts what is late or failed. The server is a stub."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from support.repo import REPO

FAILS = 3
"""Of the requests, by the number of its output tokens."""


class Stub(BaseHTTPRequestHandler):
    """Answers with two chunks, at once. It is no model: what pictures and text cost is not reproduced."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((time.perf_counter(), body))  # type: ignore[attr-defined]
        if body["max_completion_tokens"] == FAILS:
            self.send_error(503)
            return
        chunks = [{"choices": [{"delta": {"content": text}}]} for text in ("a", "b")]
        content = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(
        sys.modules, "trace", None
    )  # and afterwards it is what it was: Python has a module of that name
    del sys.modules["trace"]
    monkeypatch.syspath_prepend(REPO / "benchmark")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as it does itself, for good
    import trace

    return trace


@pytest.fixture
def stub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def requests(trace: Any, *outputs: int) -> list[Any]:
    picture = trace.workload.Picture(number=0, tokens=6)
    return [trace.workload.Request(float(at), (picture,), 5, output) for at, output in enumerate(outputs)]


def test_requests_go_out_at_their_times_and_a_failed_one_is_none(trace: Any, stub: Any) -> None:
    url = f"http://127.0.0.1:{stub.server_port}"
    began = time.perf_counter()
    outcomes = trace.ask_all(url, "m", requests(trace, 2, FAILS, 2), [20.0], [1])
    assert [at - began >= number / 20.0 for number, (at, _) in enumerate(stub.asked)] == [True] * 3
    assert [one.first is None for one in outcomes[20.0]] == [False, True, False]
    assert all(0 < one.first <= one.last for one in outcomes[20.0] if one.first)


def test_what_is_not_answered_is_given_up(trace: Any, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "PATIENCE", 0.0)
    outcomes = trace.ask_all(f"http://127.0.0.1:{stub.server_port}", "m", requests(trace, 2, 2), [20.0], [1])
    assert outcomes[20.0][-1] == trace.Outcome(None, None)


def test_another_salt_shows_other_pictures_of_the_same_sizes(trace: Any) -> None:
    def urls(salt: int) -> list[str]:
        (message,) = trace.messages(requests(trace, 2)[0], salt)
        return [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]

    assert urls(1) == urls(1)
    assert urls(1) != urls(2)


def test_a_picture_becomes_about_as_many_tokens_as_it_shall(trace: Any) -> None:
    for tokens in range(4, 200):
        width, height = trace.sides(tokens)
        assert width % 28 == height % 28 == 0
        assert width // 28 * (height // 28) == pytest.approx(tokens, rel=0.15, abs=2)


def test_all_candidates_have_the_same_limit(trace: Any) -> None:
    def outcomes(*firsts: float | None) -> list[Any]:
        return [trace.Outcome(first, first) for first in firsts]

    asked = {
        "quick": {trace.ALONE: outcomes(1.0, 1.0), 4.0: outcomes(4.0, 2.1)},
        "slow": {trace.ALONE: outcomes(3.0, None), 4.0: outcomes(4.1, None)},
    }
    assert trace.limits(asked) == [2.0, 1.0]
    points = {(one["candidate"], one["rate"]): one for one in trace.points(asked, [4.0])}
    assert points["quick", 4.0]["goodput"] == 2.0  # the first is within twice 2.0, the second not within twice 1.0
    assert points["slow", 4.0]["goodput"] == 0.0
    assert points["slow", 4.0]["failed"] == 1


def test_rates_are_multiples_of_what_is_answered_one_by_one(trace: Any) -> None:
    alone = [trace.Outcome(0.1, 0.5), trace.Outcome(None, None), trace.Outcome(0.1, 0.3)]
    assert trace.rates_of(alone, [0.5, 1.0]) == pytest.approx([1.25, 2.5])
