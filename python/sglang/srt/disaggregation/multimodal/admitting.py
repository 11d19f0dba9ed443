"""Host memory for the requests of an instance: asked for before a body is read, and before media are prepared."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from fastapi import HTTPException

from embedding_relay.admission import Gate, Limits, Refused, Ticket, Watcher
from embedding_relay.available_memory import available_bytes
from embedding_relay.config import ADMISSION, RelayConfig
from embedding_relay.media_costs import Guess, MediaCosts, sources
from embedding_relay.protocol.errors import CLIENT_GONE, UNAVAILABLE
from sglang.srt.disaggregation.multimodal import modes, precomputed
from sglang.srt.runtime_context import get_serving

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_HTTP_SERVER: Final = "sglang.srt.entrypoints.http_server"
_MIB: Final = 2**20

# Of what is free when the first request comes. Both halves may be on one host.
_PART_OF_MEMORY: Final = {modes.ENCODE: 1 / 2, modes.LANGUAGE: 1 / 4}
_PART_FOR_ONE: Final = 3 / 4
_PART_FOR_BODIES: Final = 4
"""Of an encode instance's limit; the rest is for media."""
_SMALLEST_BODY: Final = 65536
"""A smaller one may be anywhere on its way through the server, and is not counted."""
_COPIES_OF_BODY: Final = 3
"""Its bytes, the text of its JSON, and what is joined or cut out of them."""
_COPIES_ON_THE_WAY: Final = 3
"""Of prepared media: in pieces and together, then on their way to the scheduler."""
_COPIES_PREPARED: Final = 2
"""After that: here, and in the scheduler."""
_RETRY_AFTER: Final = 5
"""Seconds, of an error 503 whose reason says nothing about when it will be over."""
_STATE: Final = "embedding_relay"


class HttpState:
    """What is known of one HTTP request here."""

    def __init__(self) -> None:
        self.refused: Refused | None = None
        """Its body was read only to learn which other half must be told."""
        self.retry_after = _RETRY_AFTER


class Gates(NamedTuple):
    """None where there is no limit."""

    bodies: Gate | None = None
    refused: Gate | None = None
    """For the bodies of requests that are refused already."""
    media: Gate | None = None


class Entrance:
    """Of one HTTP process. Constructed with its tokenizer manager; measures the memory at the first request."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.costs = MediaCosts(_most_pixels(manager))
        self._gates: Gates | None = None

    @property
    def gates(self) -> Gates:
        if self._gates is None:
            self._gates = self._open(RelayConfig.from_environment())
        return self._gates

    def _open(self, config: RelayConfig) -> Gates:
        if config.admission_mib == 0:
            return Gates()
        mode, free = modes.current() or modes.ENCODE, available_bytes()
        processes = max(1, get_serving().tokenizer_worker_num)
        whole = int(free * _PART_OF_MEMORY[mode]) if config.admission_mib is None else config.admission_mib * _MIB
        whole, largest = max(_MIB, whole) // processes, int(free * _PART_FOR_ONE) // processes
        of_bodies = whole if mode == modes.LANGUAGE else whole // _PART_FOR_BODIES
        logger.info(
            "relay admission: requests may take %d MiB of host memory at a time here, %d MiB of it their bodies;"
            " %d MiB were free (%s)",
            *(whole // _MIB, of_bodies // _MIB, free // _MIB, ADMISSION),
        )
        watcher = _watcher(self.manager, mode)
        bodies = self._limits(of_bodies, largest, config)
        media = self._limits(whole - of_bodies, largest, config)
        return Gates(
            Gate(bodies, watcher, name="body"),
            Gate(self._limits(of_bodies // _PART_FOR_BODIES, largest, config)),
            Gate(media, watcher, self._ask_offered) if mode == modes.ENCODE else None,
        )

    def _limits(self, limit: int, largest: int, config: RelayConfig) -> Limits:
        return Limits(limit, largest, config.max_waiting_requests, config.admission_timeout, ADMISSION)

    def _ask_offered(self, rooms: list[int]) -> None:
        """The scheduler knows for which of them a language instance keeps blocks."""
        assert self.gates.media is not None
        for watch in self.manager.embedding_relay_watches:  # `front` has made them: these requests wait under them
            watch.on_offered = self.gates.media.let_in_offered
            watch.ask_offered(rooms)


def _most_pixels(manager: Any) -> int | None:
    """To which the processor of the model makes larger pictures smaller, if it says so."""
    processor = getattr(manager.mm_processor, "_processor", None)
    images = getattr(processor, "image_processor", processor)
    size = getattr(images, "size", None) or {}
    found = [getattr(images, "max_pixels", None), size.get("longest_edge") if hasattr(size, "get") else None]
    pixels = [one for one in found if isinstance(one, int) and one > 2**16]  # less is a side, no area
    return max(pixels, default=None)


def _watcher(manager: Any, mode: str) -> Watcher | None:
    if not manager.enable_metrics:
        return None
    from embedding_relay.metrics import AdmissionMetrics

    return AdmissionMetrics(mode, manager.metrics_collector.labels)


def entrance_of(manager: Any) -> Entrance:
    held: Entrance | None = getattr(manager, "embedding_relay_entrance", None)
    if held is None:
        held = manager.embedding_relay_entrance = Entrance(manager)
    return held


# ---- bodies


def start(manager: Any) -> None:
    """In each HTTP process, when its tokenizer manager is made: by then its server has been imported."""
    if (server := sys.modules.get(_HTTP_SERVER)) is None:
        return
    entrance, app = entrance_of(manager), server.app
    if app.middleware_stack is None:
        app.add_middleware(BodyGate, entrance=entrance)
    else:  # a tokenizer worker, whose server runs already
        app.middleware_stack = BodyGate(app.middleware_stack, entrance)


class BodyGate:
    """Around SGLang's HTTP application. A body that must wait is not read meanwhile: its sender keeps it."""

    def __init__(self, app: Callable[..., Awaitable[None]], entrance: Entrance) -> None:
        self._app = app
        self._entrance = entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        state = scope[_STATE] = HttpState()
        send = _with_retry_after(send, state)
        # The memory is measured when the first large request comes: what a server takes for itself, it has by then.
        gates = Gates() if (length := _length(scope)) < _SMALLEST_BODY else self._entrance.gates
        if gates.bodies is None or gates.refused is None:
            await self._app(scope, receive, send)
            return
        async with contextlib.AsyncExitStack() as held:
            try:
                await held.enter_async_context(gates.bodies.admitted(_COPIES_OF_BODY * length))
            except Refused as refused:
                state.refused, state.retry_after = refused, refused.retry_after or _RETRY_AFTER
                try:
                    await held.enter_async_context(gates.refused.admitted(_COPIES_OF_BODY * length))
                except Refused:
                    await _answer(send, refused)
                    return
            await self._app(scope, receive, send)


def _length(scope: Scope) -> int:
    """Without one, it comes in chunks whose number nobody knows yet: most likely a picture or two."""
    headers = {name.lower(): value for name, value in scope["headers"]}
    if (told := headers.get(b"content-length", b"")).isdigit():
        return int(told[:18])
    return _MIB if b"transfer-encoding" in headers else 0


def _with_retry_after(send: Send, state: HttpState) -> Send:
    """SGLang's answers to exceptions keep none of their headers."""

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start" and message["status"] == UNAVAILABLE:
            headers = list(message.get("headers", ()))
            if not any(name.lower() == b"retry-after" for name, _ in headers):
                message = {**message, "headers": [*headers, (b"retry-after", b"%d" % state.retry_after)]}
        await send(message)

    return sending


async def _answer(send: Send, refused: Refused) -> None:
    failure = refused.failure
    body = msgspec.json.encode(
        {"object": "error", "message": failure.text, "type": str(failure.code), "code": failure.code}
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": failure.code, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# ---- media


class Admitted:
    """One request of an encode instance that was let in, and what becomes of its cost."""

    def __init__(self, entrance: Entrance, gate: Gate, ticket: Ticket, guess: Guess, prompts: int) -> None:
        self._entrance = entrance
        self._gate = gate
        self._ticket = ticket
        self._guess = guess
        self._prompts = self._left = prompts
        self._prepared: dict[str, int] = {}
        """By modality."""
        self._media: dict[int | None, int] = {}
        """By room, until its tower has run."""
        self._rows = 0

    @property
    def prepared_bytes(self) -> int:
        """Of each of its prompts, as far as anybody can guess."""
        return self._guess.prepared // self._prompts

    def prepared(self, room: int | None, inputs: Any, config: Any) -> None:
        """One of its prompts is ready: when all are, their cost is known and no guess any more."""
        for item in inputs.mm_items if inputs is not None else ():
            name, size = item.modality.name.lower().partition("_")[0], _bytes_of(item)
            self._prepared[name] = self._prepared.get(name, 0) + size
            self._media[room] = self._media.get(room, 0) + size
            self._rows += precomputed.row_bytes(item, config)
        self._left -= 1
        if self._left == 0:
            self._entrance.costs.learn(self._guess, self._prepared)
        self._correct()

    def encoded(self, room: int) -> None:
        """The rows of this prompt are there, and its media nowhere any more."""
        self._media.pop(room, None)
        self._correct()

    def _correct(self) -> None:
        if self._left == 0:
            self._gate.correct(self._ticket, _COPIES_PREPARED * sum(self._media.values()) + self._rows)


_current: Final[contextvars.ContextVar[Admitted | None]] = contextvars.ContextVar("relay_admitted", default=None)
"""Of the request whose task this is; a batch is prepared in tasks that begin with what its own has."""
_by_room: Final[dict[int, Admitted]] = {}


@contextlib.asynccontextmanager
async def admitted(manager: Any, obj: Any, request: Any, rooms: Sequence[int]) -> AsyncIterator[None]:
    """Around a whole request. HTTPException for one that is refused: the other half is told as of any other failure."""
    state = _state_of(request)
    if state.refused is not None:
        raise _told(state.refused, state)
    entrance = entrance_of(manager)
    gate = entrance.gates.media if obj.contains_mm_input() else None
    if gate is None:
        yield
        return
    guess = entrance.costs.guess(await asyncio.to_thread(_sources, obj))
    async with contextlib.AsyncExitStack() as held:
        try:
            cost = _COPIES_ON_THE_WAY * guess.prepared + guess.beside
            ticket = await held.enter_async_context(gate.admitted(cost, rooms))
        except Refused as refused:
            raise _told(refused, state) from None
        if ticket.has_waited and request is not None and await request.is_disconnected():
            raise HTTPException(CLIENT_GONE, "the client went away while its request waited for memory")
        one = Admitted(entrance, gate, ticket, guess, max(1, len(rooms)))
        _current.set(one)
        _by_room.update(dict.fromkeys(rooms, one))
        try:
            yield
        finally:
            for room in rooms:
                _by_room.pop(room, None)


def cost_of_this() -> int:
    """Bytes that the media of the prompt that this task is about are expected to become; 0 where nobody has asked."""
    return one.prepared_bytes if (one := _current.get()) is not None else 0


def note_prepared(tokenized: Any, config: Any) -> None:
    """SGLang's processor is done with one prompt of the request that this task is about."""
    if (one := _current.get()) is not None:
        one.prepared(tokenized.bootstrap_room, tokenized.mm_inputs, config)


_ENCODED: Final = "relay_encoded_room"


def encoded_message(room: int) -> Any:
    """From the scheduler of an encode instance: the tower has run for this room. An abort of nothing, as in `front`."""
    from sglang.srt.managers.io_struct import AbortReq

    return AbortReq(rid=f"relay-encoded-{room}", finished_reason={_ENCODED: room})


def take_encoded(recv_obj: Any) -> bool:
    """In the HTTP process, for each abort that comes from the scheduler; True if it was what `encoded_message` says."""
    room = (recv_obj.finished_reason or {}).get(_ENCODED)
    if room is not None and (one := _by_room.get(room)) is not None:
        one.encoded(room)
    return room is not None


def _state_of(request: Any) -> HttpState:
    state = request.scope.get(_STATE) if request is not None else None
    return state if isinstance(state, HttpState) else HttpState()


def _told(refused: Refused, state: HttpState) -> HTTPException:
    headers = None
    if refused.retry_after is not None:
        state.retry_after = refused.retry_after
        headers = {"Retry-After": str(refused.retry_after)}
    return HTTPException(refused.failure.code, refused.failure.text, headers)


def _sources(obj: Any) -> list[Any]:
    found = {name: getattr(obj, f"{name}_data", None) for name in ("image", "video", "audio")}
    return [source for name, media in found.items() for source in sources(media, name)]


def _bytes_of(item: Any) -> int:
    """Of the tensors of one item, whatever its model calls them."""
    held = [item.feature, item.precomputed_embeddings, *(item.model_specific_data or {}).values()]
    several = [one for value in held for one in (value if isinstance(value, list | tuple) else [value])]
    return sum(size for one in several if isinstance(size := getattr(one, "nbytes", None), int))
