"""What SGLang's HTTP process and scheduler note of a request, who may read it, and spans for OpenTelemetry.

SGLang's tokenizer manager and its spans are real; support/tokenizing.py says what is not there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from embedding_relay import recorder
from embedding_relay.protocol.errors import BAD_GATEWAY, Failure
from embedding_relay.recorder import Moment, Recorder
from embedding_relay.recorder_socket import Teller, name_of_scheduler
from embedding_relay.spans import LANGUAGE
from embedding_relay.tools.chat_client import data_uri, picture
from sglang.srt.disaggregation.multimodal import front, tracing
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.observability import trace as sglangs_trace
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats
from sglang.srt.runtime_context import get_serving
from support import tokenizing
from support.tokenizing import TokenizerManagerWithoutScheduler, answers, run

GOOD = data_uri(picture(56, 56, seed=1))
ROOM = (1 << 62) + 5


@pytest.fixture(scope="module")
def encode() -> Iterator[TokenizerManagerWithoutScheduler]:
    with tokenizing.serving("encode") as made:
        yield made


@pytest.fixture
def manager(encode: TokenizerManagerWithoutScheduler) -> TokenizerManagerWithoutScheduler:
    encode.make_current()
    encode.sent.clear()
    encode.rid_to_state.clear()
    front._with_scheduler.clear()
    encode.watch_nobody()
    recorder_of = tracing.recorder_of(encode)
    recorder_of._ring.clear()
    recorder_of._followed.clear()
    return encode


def asked(**request: Any) -> GenerateReqInput:
    return tokenizing.asked(bootstrap_room=ROOM, **request)


def abort(rid: str) -> Any:
    return front.abort_message(rid, Failure(BAD_GATEWAY, "gone"))


# ---- what is noted


def test_the_http_process_notes_a_request_from_its_arrival_on(manager: TokenizerManagerWithoutScheduler) -> None:
    before = time.monotonic()
    with pytest.raises(Exception, match="gone"):
        run(answers(manager, asked(), abort))
    moments = tracing.recorder_of(manager).moments(ROOM)
    assert [moment.what for moment in moments] == [recorder.RECEIVED, recorder.PREPARED, recorder.ANSWERED]
    times = [before, *(moment.at for moment in moments), time.monotonic()]
    assert times == sorted(times), "SGLang's clock is another one"


def test_a_request_that_is_refused_says_why(manager: TokenizerManagerWithoutScheduler) -> None:
    with pytest.raises(ValueError, match="Could not decode"):
        run(answers(manager, asked(image_data=["data:image/png;base64,AAAA"], received_time=time.monotonic())))
    received, failed = tracing.recorder_of(manager).moments(ROOM)
    assert received.what == recorder.RECEIVED
    assert "Could not decode" in failed.text


def test_text_alone_is_not_noted(manager: TokenizerManagerWithoutScheduler) -> None:
    with pytest.raises(Exception, match="gone"):
        run(answers(manager, asked(text="a", image_data=None), abort))
    assert tracing.recorder_of(manager).latest(10) == []


def test_a_language_instance_tells_of_its_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = SimpleNamespace(created_time=1.0, api_server_dispatch_time=2.0, first_token_time=3.0, finished_time=0.0)
    monkeypatch.setattr(tracing.modes, "current", lambda: "language")
    assert [moment.what for moment in tracing._http_moments(stats)] == [
        recorder.RECEIVED,
        recorder.PREPARED,
        recorder.FIRST_TOKEN,
    ]


# ---- who may read it


HERE = ("127.0.0.1", 50000)
ELSEWHERE = ("10.0.0.9", 50000)


def refusal(
    client: tuple[str, int] | None, url: str = "http://127.0.0.1:30000", **headers: str
) -> tuple[int, str] | None:
    from starlette.requests import Request

    named = {name.replace("_", "-"): value for name, value in headers.items()}
    host = url.removeprefix("http://")
    raw = [(name.encode(), value.encode()) for name, value in {"host": host, **named}.items()]
    server = (host.rpartition(":")[0].strip("[]"), 30000)
    scope = {"type": "http", "scheme": "http", "path": tracing.PATH, "query_string": b"", "headers": raw}
    return tracing.reason_to_refuse(Request({**scope, "client": client, "server": server}))


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
@pytest.mark.usefixtures("manager")
def test_without_a_key_callers_of_this_machine_are_answered(client: str) -> None:
    assert refusal((client, 50000)) is None
    assert refusal((client, 50000), "http://localhost:30000") is None
    assert refusal((client, 50000), "http://[::1]:30000") is None


@pytest.mark.usefixtures("manager")
def test_an_address_of_this_machine_is_this_machine_too() -> None:
    assert refusal(("10.0.0.1", 50000), "http://10.0.0.1:30000") is None


STRANGERS: dict[str, tuple[tuple[str, int] | None, str, dict[str, str]]] = {
    "another machine": (ELSEWHERE, "http://10.0.0.1:30000", {}),
    "another machine that says it is not": (ELSEWHERE, "http://127.0.0.1:30000", {}),
    "nobody knows who": (None, "http://127.0.0.1:30000", {}),
    "a socket of another kind": (("testclient", 50000), "http://127.0.0.1:30000", {}),
    "a proxy here": (HERE, "http://127.0.0.1:30000", {"x_forwarded_for": "127.0.0.1"}),
    "another proxy here": (HERE, "http://127.0.0.1:30000", {"via": "1.1 x"}),
    "a sidecar": (HERE, "http://127.0.0.1:30000", {"x_envoy_attempt_count": "1"}),
    "a page of another site": (HERE, "http://127.0.0.1:30000", {"origin": "https://example.org"}),
    "a name that means this machine": (HERE, "http://example.org:30000", {}),
}


@pytest.mark.parametrize(("client", "url", "headers"), STRANGERS.values(), ids=STRANGERS)
@pytest.mark.usefixtures("manager")
def test_without_a_key_nobody_else_is(client: tuple[str, int] | None, url: str, headers: dict[str, str]) -> None:
    refused = refusal(client, url, **headers)
    assert refused is not None
    assert refused[0] == 403
    assert "--admin-api-key" in refused[1]


@pytest.mark.usefixtures("manager")
def test_with_a_key_the_key_counts_and_nothing_else() -> None:
    with get_serving().override(admin_api_key="secret"):
        assert refusal(ELSEWHERE, authorization="Bearer secret") is None
        for wrong in ("", "Bearer other", "secret", "Bearer é"):
            refused = refusal(HERE, authorization=wrong)
            assert refused is not None
            assert refused[0] == 401


# ---- the call


@pytest.fixture
def client(manager: TokenizerManagerWithoutScheduler) -> Iterator[TestClient]:
    """A caller of this machine, of an application that has the call as SGLang's server would."""
    app = Starlette()
    app.router.add_route(tracing.PATH, _call(manager), methods=["GET"])
    with TestClient(app, base_url="http://127.0.0.1:30000", client=HERE) as made:
        yield made


def _call(manager: TokenizerManagerWithoutScheduler) -> Any:
    async def call(request: Any) -> Any:
        return await tracing._answer(tracing.recorder_of(manager).is_on, request)

    return call


def test_all_processes_of_the_instance_are_asked(client: TestClient, manager: TokenizerManagerWithoutScheduler) -> None:
    tracing.recorder_of(manager).note(ROOM, recorder.RECEIVED, 1.0)
    tracing.recorder_of(manager).note(9, recorder.RECEIVED, 2.0)
    held = Recorder(10)
    held.note(ROOM, recorder.PARKED, 1.5)
    scheduler = Teller(held)
    scheduler.start(name_of_scheduler(get_serving().host, get_serving().port))
    try:
        answer = client.get(tracing.PATH, params={"room": ROOM}).json()
        latest = client.get(tracing.PATH, params={"last": 1}).json()
    finally:
        scheduler.close()
    (told,) = answer["requests"]
    assert [moment[:2] for moment in told["moments"]] == [[1.0, recorder.RECEIVED], [1.5, recorder.PARKED]]
    assert (answer["mode"], answer["silent"]) == ("encode", [])
    assert [one["room"] for one in latest["requests"]] == [9]
    assert abs(answer["wall"] - time.time()) < 60


def test_a_scheduler_that_does_not_answer_is_named(client: TestClient) -> None:
    answer = client.get(tracing.PATH, params={"last": 3}).json()
    assert answer["silent"] == ["scheduler"]
    assert answer["requests"] == []


@pytest.mark.parametrize(
    "query", [{}, {"room": "x"}, {"room": "-1"}, {"room": 1 << 63}, {"last": "²"}, {"room": 1, "last": 1}]
)
def test_other_questions_are_refused(client: TestClient, query: dict[str, Any]) -> None:
    answer = client.get(tracing.PATH, params=query)
    assert answer.status_code == 400
    assert "?room=NUMBER" in answer.json()["detail"]


def test_where_it_is_switched_off_the_call_says_so(
    client: TestClient, manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "embedding_relay_recorder", Recorder(0))
    answer = client.get(tracing.PATH, params={"last": 1})
    assert answer.status_code == 404
    assert "SGLANG_EMBEDDING_TRACE_EVENTS=0" in answer.json()["detail"]


def test_strangers_learn_nothing(manager: TokenizerManagerWithoutScheduler) -> None:
    app = Starlette()
    app.router.add_route(tracing.PATH, _call(manager), methods=["GET"])
    with TestClient(app, base_url="http://10.0.0.1:30000", client=ELSEWHERE) as stranger:
        answer = stranger.get(tracing.PATH, params={"last": 1})
    assert answer.status_code == 403
    assert answer.json().keys() == {"detail"}


# ---- spans


class Request:
    """An HTTP request, of which only the headers are read."""

    def __init__(self, **headers: str) -> None:
        self.headers = headers


def header(manager: Any, room: Any, request: Any = None) -> Any:
    obj = SimpleNamespace(external_trace_header=None, bootstrap_room=room)
    tracing.join_trace(manager, obj, request)
    return obj.external_trace_header


def test_both_halves_of_a_request_are_of_one_trace() -> None:
    halves = [SimpleNamespace(enable_trace=True) for _ in range(2)]
    first, second = (header(half, ROOM)["traceparent"] for half in halves)
    assert first == second
    version, trace, parent, flags = first.split("-")
    assert (version, len(trace), len(parent), flags) == ("00", 32, 16, "01")
    assert header(halves[0], [ROOM, 9])["traceparent"] == first
    assert header(halves[0], ROOM + 1)["traceparent"] != first
    assert header(halves[0], None)["traceparent"] != header(halves[0], None)["traceparent"]


def test_a_client_that_traces_names_the_trace() -> None:
    named = {"traceparent": "00-1-2-01", "tracestate": "x=y"}
    assert header(SimpleNamespace(enable_trace=True), ROOM, Request(**named, other="z")) == named


def test_without_sglangs_switch_nothing_is_added() -> None:
    assert header(SimpleNamespace(enable_trace=False), ROOM) is None


def test_spans_are_sglangs_own_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the SDK of OpenTelemetry and SGLang's own context of a request: what is exported is kept in memory."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(sglangs_trace, "opentelemetry_initialized", True)
    monkeypatch.setattr(sglangs_trace, "tracer", provider.get_tracer("test"), raising=False)
    named = header(SimpleNamespace(enable_trace=True), ROOM)
    context = sglangs_trace.TraceReqContext("r", ROOM, external_trace_header=named, trace_level=1)
    context.trace_req_start()
    stats = SchedulerReqTimeStats()
    stats.trace_ctx = context

    held, now = Recorder(10), time.monotonic()
    for at, what in ((0.1, recorder.COPY_BEGAN), (0.3, recorder.COPIED)):
        held.note(ROOM, what, now + at, first_row=16, rows=8)
    held.note(ROOM, recorder.PARKED, now + 0.4)
    tracing.emit_spans(held, LANGUAGE, ROOM, SimpleNamespace(time_stats=stats))
    context.trace_req_finish()

    exported = {span.name: span for span in exporter.get_finished_spans()}
    copy = exported["relay copy"]
    assert copy.end_time - copy.start_time == pytest.approx(2e8, abs=1e6)
    assert abs(copy.start_time / 1e9 - time.time()) < 60
    assert dict(copy.attributes) == {"room": str(ROOM), "first_row": 16, "rows": 8, "bytes": 0}
    assert "relay wait for blocks" not in exported, "it has not ended"
    assert f"{copy.context.trace_id:032x}" == named["traceparent"].split("-")[1]
    thread = next(span for span in exported.values() if span.context.span_id == copy.parent.span_id)
    root = next(span for span in exported.values() if span.context.span_id == thread.parent.span_id)
    assert f"{root.parent.span_id:016x}" == named["traceparent"].split("-")[2]


def test_without_a_trace_no_span_is_made() -> None:
    held = Recorder(10)
    held.note(ROOM, recorder.COPY_BEGAN)
    tracing.emit_spans(held, LANGUAGE, ROOM, SimpleNamespace(time_stats=SchedulerReqTimeStats()))


def test_prefill_is_told_from_what_sglang_has_noted() -> None:
    held, stats = Recorder(10), SchedulerReqTimeStats()
    tracing.note_handed_over(held, ROOM, SimpleNamespace(time_stats=stats))
    assert held.moments(ROOM) == []
    stats.set_forward_entry_time(2.0)
    stats.set_prefill_finished_time(3.0)
    assert held.moments(ROOM) == [Moment(2.0, recorder.PREFILL_BEGAN), Moment(3.0, recorder.PREFILL_ENDED)]


def test_the_call_does_not_wait_in_the_event_loop(
    manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is slow to answer holds up nobody's tokens."""
    ways: list[str] = []

    async def in_a_thread(function: Any, *arguments: Any) -> Any:
        ways.append(function.__name__)
        return {}

    monkeypatch.setattr(asyncio, "to_thread", in_a_thread)
    monkeypatch.setattr(tracing, "reason_to_refuse", lambda _: None)
    run(tracing._answer(True, SimpleNamespace(query_params={"last": "1"})))
    assert ways == ["_collect"]
