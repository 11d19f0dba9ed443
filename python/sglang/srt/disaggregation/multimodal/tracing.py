"""Where the time of a request went: what SGLang notes of it, the call /relay/trace, and spans for OpenTelemetry."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import ipaddress
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from embedding_relay import recorder
from embedding_relay.config import TRACE_EVENTS, RelayConfig
from embedding_relay.protocol.errors import Failure
from embedding_relay.recorder import Moment, Recorder
from embedding_relay.recorder_socket import (
    MOST_REQUESTS,
    Answer,
    Question,
    Teller,
    ask,
    name_of_http_process,
    name_of_scheduler,
)
from embedding_relay.spans import spans
from sglang.srt.disaggregation.multimodal import modes
from sglang.srt.runtime_context import get_parallel, get_serving

PATH: Final = "/relay/trace"
_LARGEST_ROOM: Final = (1 << 63) - 1
# Whoever adds one of these is a proxy on this machine, and speaks for somebody else.
_OF_PROXIES: Final = ("forwarded", "via", "x-real-ip", "x-forwarded-", "x-envoy-")
_HTTP_SERVER: Final = "sglang.srt.entrypoints.http_server"


# ---- what SGLang notes: read when somebody asks, so that it costs a request nothing


def note_dispatched(manager: Any, state: Any) -> None:
    """In the HTTP process, when the scheduler is sent a request."""
    obj = state.obj
    room = getattr(obj, "embedding_relay_room", None) or getattr(obj, "bootstrap_room", None)
    if isinstance(room, int) and obj.contains_mm_input():
        recorder_of(manager).follow(room, functools.partial(_http_moments, state.time_stats))


def note_refused(manager: Any, room: int, failure: Failure, received_at: float | None) -> None:
    """In the HTTP process: the scheduler never gets this one."""
    if received_at is not None:
        recorder_of(manager).note(room, recorder.RECEIVED, received_at)
    recorder_of(manager).note(room, recorder.FAILED, text=str(failure))


def _http_moments(stats: Any) -> Iterator[Moment]:
    first_token = 0.0 if modes.current() == modes.ENCODE else stats.first_token_time
    return _those_that_were(
        (recorder.RECEIVED, stats.created_time),
        (recorder.PREPARED, stats.api_server_dispatch_time),
        (recorder.FIRST_TOKEN, first_token),
        (recorder.ANSWERED, stats.finished_time),
    )


def note_handed_over(held: Recorder, room: int, req: Any) -> None:
    """In the scheduler, when SGLang has made its `Req` of a request whose rows are here."""
    held.follow(room, functools.partial(_prefill_moments, req.time_stats))


def _prefill_moments(stats: Any) -> Iterator[Moment]:
    return _those_that_were(
        (recorder.PREFILL_BEGAN, stats.forward_entry_time), (recorder.PREFILL_ENDED, stats.prefill_finished_time)
    )


def _those_that_were(*moments: tuple[str, float]) -> Iterator[Moment]:
    """SGLang's clock is that of the moments (`time.perf_counter`, on Linux); 0 is for what has not happened."""
    return (Moment(at, what) for what, at in moments if at > 0)


# ---- the call


def recorder_of(manager: Any) -> Recorder:
    """That of an HTTP process, which has one tokenizer manager."""
    held: Recorder | None = getattr(manager, "embedding_relay_recorder", None)
    if held is None:
        held = manager.embedding_relay_recorder = Recorder(RelayConfig.from_environment().trace_events)
    return held


def start(manager: Any) -> None:
    """In each HTTP process, when its tokenizer manager is made: by then its server has been imported, and not begun."""
    teller = Teller(recorder_of(manager))
    teller.start(*_http_processes())
    manager.embedding_relay_teller = teller
    if (server := sys.modules.get(_HTTP_SERVER)) is not None:
        from sglang.srt.utils.auth import AuthLevel, auth_level

        # Without a prefix: SGLang's own check of keys knows it as one of the calls for operators.
        call = auth_level(AuthLevel.ADMIN_OPTIONAL)(functools.partial(_answer, recorder_of(manager).is_on))
        server.app.router.add_route(PATH, call, methods=["GET"], include_in_schema=False)


def _http_processes() -> list[str]:
    serving = get_serving()
    workers = max(1, serving.tokenizer_worker_num)
    return [name_of_http_process(serving.host, serving.port, number) for number in range(workers)]


def _schedulers() -> list[str]:
    serving = get_serving()
    return [name_of_scheduler(serving.host, serving.port, rank) for rank in range(get_parallel().num_dp_ranks)]


async def _answer(is_on: bool, request: Any) -> Any:
    from starlette.responses import JSONResponse, Response

    def refused(status: int, detail: str) -> Any:
        return JSONResponse({"detail": detail}, status)

    if (refusal := reason_to_refuse(request)) is not None:
        return refused(*refusal)
    if not is_on:
        return refused(404, f"this instance notes nothing: it was started with {TRACE_EVENTS}=0")
    room, latest = (_number(request.query_params, name) for name in ("room", "last"))
    if (room is None) == (latest is None) or -1 in (room, latest):
        return refused(400, "ask for ?room=NUMBER, or for ?last=NUMBER, the latest requests")
    found = await asyncio.to_thread(_collect, room, latest or 0)
    return Response(msgspec.json.encode(found), media_type="application/json")


def _number(parameters: Mapping[str, str], name: str) -> int | None:
    """-1 for what is no number from 0 to that of the last room."""
    text = parameters.get(name)
    if text is None:
        return None
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= _LARGEST_ROOM else -1


def reason_to_refuse(request: Any) -> tuple[int, str] | None:
    """Who has the operator's key may ask; without such a key, who is on this machine and speaks for nobody else."""
    if key := get_serving().admin_api_key:
        said = request.headers.get("authorization", "")
        if secrets.compare_digest(said.encode(), f"Bearer {key}".encode()):
            return None
        return 401, "this call takes the key of --admin-api-key"
    hint = "start the instance with --admin-api-key to ask it from elsewhere"
    here = request.scope.get("server") or ("",)
    if request.client is None or not _is_this_machine(request.client.host, here[0]):
        return 403, f"only this machine itself is answered; {hint}"
    if any(name.lower().startswith(_OF_PROXIES) for name in request.headers):
        return 403, f"a proxy's requests are not answered; {hint}"
    # A page of another site, in a browser on this machine: it says so, or has a name of its own mean this machine.
    if "origin" in request.headers or not _is_address(request.url.hostname or ""):
        return 403, f"name the instance by its address, and from no web page; {hint}"
    return None


def _is_this_machine(client: str, server: str) -> bool:
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback) or client == server


def _is_address(host: str) -> bool:
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return False


def _collect(room: int | None, latest: int) -> dict[str, Any]:
    """From all processes of this instance."""
    processes = [*_http_processes(), *_schedulers()]
    silent: set[str] = set()

    def told(question: Question) -> Iterator[Answer]:
        for name in processes:
            if name in silent:
                continue
            answer = ask(name, question)
            if answer is None:
                silent.add(name)
            else:
                yield answer

    rooms = [room] if room is not None else _latest(told(Question(latest=latest)), min(latest, MOST_REQUESTS))
    requests = []
    for one in rooms:
        moments = [moment for answer in told(Question(room=one)) for moment in answer.moments]
        if moments:
            requests.append({"room": one, "moments": sorted(moments, key=lambda moment: moment.at)})
    return {
        "mode": modes.current(),
        "machine": _machine(),
        "monotonic": time.monotonic(),
        "wall": time.time(),
        "silent": ["scheduler" if name in _schedulers() else "HTTP process" for name in sorted(silent)],
        "requests": requests,
    }


def _latest(answers: Iterator[Answer], most: int) -> list[int]:
    began: dict[int, float] = {}
    for answer in answers:
        for room, at in answer.rooms:
            began[room] = min(at, began.get(room, at))
    return sorted(began, key=lambda room: began[room], reverse=True)[:most]


def _machine() -> str:
    """Processes that say the same have the same monotonic clock."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path("/proc/self/ns/time")
    return f"{boot} {namespace.readlink()}" if namespace.exists() else boot


# ---- spans for OpenTelemetry


def join_trace(manager: Any, obj: Any, request: Any) -> None:
    """In the HTTP process. A client or a router that traces says of which trace the request is, to both halves.

    Where nobody does, the room that both halves know makes it one.
    """
    if not getattr(manager, "enable_trace", False) or getattr(obj, "external_trace_header", None):
        return
    from sglang.srt.observability.trace import extract_trace_headers

    headers = {} if request is None else extract_trace_headers(request.headers)
    room = getattr(obj, "bootstrap_room", None)
    room = room[0] if isinstance(room, list) and room else room
    if "traceparent" not in headers:
        headers["traceparent"] = _trace_of(room if isinstance(room, int) else secrets.randbits(63))
    obj.external_trace_header = headers


def _trace_of(room: int) -> str:
    digest = hashlib.blake2b(str(room).encode(), digest_size=24, person=b"relay trace").hexdigest()
    return f"00-{digest[:32]}-{digest[32:]}-01"


def emit_spans(held: Recorder, half: str, room: int, req: Any) -> None:
    """What happened here to a request, beside SGLang's own spans of it in this scheduler."""
    context = req.time_stats.trace_ctx
    if not context.tracing_enable or not held.is_on:
        return
    from sglang.srt.observability.req_time_stats import convert_time_to_realtime_ns
    from sglang.srt.observability.trace import TraceSliceContext

    for span in spans(half, held.moments(room), with_sglangs=False):
        if span.ended is not None:
            context.trace_slice(
                TraceSliceContext(
                    slice_name=f"relay {span.name}",
                    start_time_ns=convert_time_to_realtime_ns(span.began),
                    end_time_ns=convert_time_to_realtime_ns(span.ended),
                    level=1,
                    attrs={"room": str(room), "first_row": span.first_row, "rows": span.rows, "bytes": span.bytes},
                )
            )
