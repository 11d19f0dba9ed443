"""In the HTTP process of an instance: bodies that must wait are not read, and media are counted before they are loaded.

SGLang's tokenizer manager is real (support/tokenizing.py says what is not there); its HTTP server is not here: what is
around it is called as uvicorn calls it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, MutableMapping
from typing import Any, ClassVar

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from embedding_relay.admission import Gate, Limits, Refused
from embedding_relay.config import ADMISSION
from embedding_relay.media_costs import IMAGE as PICTURE
from embedding_relay.protocol.errors import BAD_REQUEST, UNAVAILABLE, Failure
from embedding_relay.tools.chat_client import data_uri, picture
from sglang.srt.disaggregation.multimodal import admitting, front
from sglang.srt.disaggregation.multimodal.admitting import BodyGate, Entrance, Gates
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from support import tokenizing
from support.tokenizing import GOOD, IMAGE, TokenizerManagerWithoutScheduler, answers, asked, refusals, run

PREPARED = 56 * 56 * 3 * 4 * 2 + 24
"""Of that picture: three float32 a pixel, twice because the tower takes pairs of frames of a video, and its grid."""
MIB = 2**20
BODY = 4 * MIB


def gate(limit: int, **more: Any) -> Gate:
    return Gate(Limits(**{"bytes": limit, "largest": 0, "waiting": 8, "patience": 0.05, "name": ADMISSION, **more}))


@pytest.fixture(scope="module")
def manager() -> Iterator[TokenizerManagerWithoutScheduler]:
    with tokenizing.serving("encode") as made:
        yield made


@pytest.fixture
def encode(manager: TokenizerManagerWithoutScheduler) -> Iterator[TokenizerManagerWithoutScheduler]:
    manager.make_current()
    manager.sent.clear()
    manager.rid_to_state.clear()
    front._with_scheduler.clear()
    manager.watch_nobody()
    admitting.entrance_of(manager)._gates = None
    yield manager
    admitting.entrance_of(manager)._gates = None


def limited(manager: TokenizerManagerWithoutScheduler, limit: int, **more: Any) -> Gate:
    media = gate(limit, **more)
    admitting.entrance_of(manager)._gates = Gates(None, None, media)
    return media


# ---- media


def taken(one: Gate) -> int:
    return sum(one.account.taken.values())


def test_a_request_that_can_never_be_let_in_is_refused_on_both_halves(
    encode: TokenizerManagerWithoutScheduler,
) -> None:
    limited(encode, 100)
    with pytest.raises(HTTPException, match=ADMISSION) as caught:
        run(answers(encode, asked()))
    assert caught.value.status_code == BAD_REQUEST
    (refusal,) = refusals(encode)
    assert (refusal.room, refusal.failure.code) == (7, BAD_REQUEST)
    assert encode.rid_to_state == {}


def test_a_request_that_has_waited_long_enough_may_ask_again_later(encode: TokenizerManagerWithoutScheduler) -> None:
    media = limited(encode, 10 * MIB)

    async def scenario() -> None:
        async with media.admitted(9 * MIB):
            async with media.admitted(MIB // 8):  # an eighth is for small ones, and somebody has it
                pass
            with pytest.raises(HTTPException, match=r"has waited for 0\.05 s") as caught:
                await answers(encode, asked(image_data=[data_uri(picture(300, 300, seed=2))]))
            assert caught.value.status_code == UNAVAILABLE
            assert caught.value.headers is not None
            assert int(caught.value.headers["Retry-After"]) >= 1

    run(scenario())
    assert [refusal.failure.code for refusal in refusals(encode)] == [UNAVAILABLE]
    assert taken(media) == 0


def test_a_request_is_counted_as_what_it_became_until_it_is_over(encode: TokenizerManagerWithoutScheduler) -> None:
    media = limited(encode, 100 * MIB)
    seen = []

    def encoded(rid: str) -> Any:
        seen.append(taken(media))
        return admitting.encoded_message(7)

    def end(rid: str) -> Any:
        seen.append(taken(media))
        return front.abort_message(rid, Failure(UNAVAILABLE, "over"))

    with pytest.raises(HTTPException):
        run(answers(encode, asked(), encoded, end))
    config = encode.model_config
    rows = 4 * config.hidden_size * config.dtype.itemsize
    assert seen == [admitting._COPIES_PREPARED * PREPARED + rows, rows]
    assert taken(media) == 0
    assert admitting._by_room == {}


def test_word_of_a_request_that_is_over_is_for_nobody(encode: TokenizerManagerWithoutScheduler) -> None:
    encode._result_dispatcher(admitting.encoded_message(7))


def test_what_pictures_become_is_learned(encode: TokenizerManagerWithoutScheduler) -> None:
    limited(encode, 100 * MIB)
    run_and_abort(encode, asked())
    guess = admitting.entrance_of(encode).costs.guess(admitting._sources(asked()))
    assert guess.prepared == PREPARED
    assert [source.modality for source in guess.sources] == [PICTURE]


def test_the_prompts_of_one_request_are_counted_together(encode: TokenizerManagerWithoutScheduler) -> None:
    media = limited(encode, 100 * MIB)
    entered: list[tuple[int, tuple[int, ...]]] = []
    enter = media.account.enter

    def note(cost: int, now: float, rooms: Any = ()) -> Any:
        entered.append((cost, tuple(rooms)))
        return enter(cost, now, rooms)

    media.account.enter = note  # type: ignore[method-assign]
    single = asked()
    guess = admitting.entrance_of(encode).costs.guess(admitting._sources(single))
    batch = asked(
        text=[f"{IMAGE}a", f"{IMAGE}b"],
        image_data=[[GOOD], [GOOD]],
        bootstrap_host=["10.0.0.1"] * 2,
        bootstrap_port=[8998] * 2,
        bootstrap_room=[7, 8],
    )
    run_and_abort(encode, batch)
    ((cost, rooms),) = entered
    assert rooms == (7, 8)
    assert cost == 2 * (3 * guess.prepared + guess.beside)
    assert taken(media) == 0


def test_text_costs_nothing(encode: TokenizerManagerWithoutScheduler) -> None:
    """Nor is it the request at which the memory is measured: that of a server's start comes before its neighbours'."""
    run_and_abort(encode, asked(text="a", image_data=None))
    assert admitting.entrance_of(encode)._gates is None
    encode.sent.clear()
    limited(encode, 1)
    run_and_abort(encode, asked(text="a", image_data=None))


def run_and_abort(manager: TokenizerManagerWithoutScheduler, obj: GenerateReqInput) -> None:
    with pytest.raises(HTTPException, match="over"):
        run(answers(manager, obj, lambda rid: front.abort_message(rid, Failure(UNAVAILABLE, "over"))))


def test_a_client_that_went_away_while_it_waited_gets_nothing_prepared(
    encode: TokenizerManagerWithoutScheduler,
) -> None:
    media = limited(encode, 10 * MIB, patience=30)

    class Request:
        scope: ClassVar[dict[str, Any]] = {}

        async def is_disconnected(self) -> bool:
            return True

    async def ask() -> None:
        async for _ in encode.generate_request(asked(image_data=[data_uri(picture(300, 300, seed=2))]), Request()):
            raise AssertionError("it was answered")

    async def scenario() -> None:
        async with media.admitted(9 * MIB):
            asking = asyncio.create_task(ask())
            await until(lambda: media.account.waiting)
        with pytest.raises(HTTPException, match="went away"):
            await asking

    run(asyncio.wait_for(scenario(), 30))
    assert taken(media) == 0
    assert not any(isinstance(one, TokenizedGenerateReqInput) for one in encode.sent)


# ---- limits


def test_the_limit_is_a_part_of_what_is_free(
    encode: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admitting, "available_bytes", lambda: 16_000 * MIB)
    monkeypatch.delenv(ADMISSION, raising=False)
    gates = admitting.entrance_of(encode).gates
    assert gates.bodies is not None
    assert gates.media is not None
    assert gates.bodies.account.limits.bytes == 2000 * MIB
    assert gates.media.account.limits.bytes == 6000 * MIB
    assert gates.media.account.limits.largest == 12_000 * MIB


def test_an_operator_says_how_much_or_that_there_is_no_limit(
    encode: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADMISSION, "400")
    media = Entrance(encode).gates.media
    assert media is not None
    assert media.account.limits.bytes == 300 * MIB
    monkeypatch.setenv(ADMISSION, "0")
    assert Entrance(encode).gates == (None, None, None)


def test_a_processor_that_makes_large_pictures_smaller_says_so(encode: TokenizerManagerWithoutScheduler) -> None:
    images = encode.mm_processor._processor.image_processor
    assert admitting._most_pixels(encode) == max(
        one for one in (getattr(images, "max_pixels", 0), dict(images.size).get("longest_edge", 0)) if one
    )


# ---- bodies


class Server:
    """As uvicorn calls an application, with a body of one piece. What the application does is the test's to say."""

    def __init__(self, bodies: Gate, refused: Gate, status: int = 200) -> None:
        self.states: list[admitting.HttpState] = []
        self.read = 0
        self.go_on = asyncio.Event()
        self._status = status
        entrance = Entrance.__new__(Entrance)
        entrance._gates = Gates(bodies, refused, None)
        self._app = BodyGate(self._application, entrance)

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:
        self.states.append(scope.get("embedding_relay"))
        await receive()
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": self._status, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b""})

    async def ask(self, length: int = BODY, method: str = "POST", **headers: str) -> MutableMapping[str, Any]:
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            self.read += 1
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        told = {"Content-Length": str(length), **headers}
        lines = [(name.encode(), value.encode()) for name, value in told.items()]
        await self._app({"type": "http", "method": method, "headers": lines}, receive, send)
        return sent[0]


def retry_after(answer: MutableMapping[str, Any]) -> int | None:
    found = [int(value) for name, value in answer["headers"] if name == b"retry-after"]
    assert len(found) < 2
    return found[0] if found else None


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_a_body_that_must_wait_is_not_read() -> None:
    async def scenario() -> None:
        server = Server(gate(20 * MIB, patience=30), gate(20 * MIB))
        first, second = asyncio.create_task(server.ask()), asyncio.create_task(server.ask())
        await until(lambda: server.read)
        for _ in range(20):
            await asyncio.sleep(0)
        assert server.read == 1
        server.go_on.set()
        answers = await asyncio.gather(first, second)
        assert [answer["status"] for answer in answers] == [200, 200]
        assert server.read == 2
        assert [retry_after(answer) for answer in answers] == [None, None]

    run(asyncio.wait_for(scenario(), 30))


def test_a_body_that_has_waited_too_long_is_read_to_tell_the_other_half() -> None:
    async def scenario() -> None:
        server = Server(gate(20 * MIB), gate(20 * MIB), status=UNAVAILABLE)
        first, second = asyncio.create_task(server.ask()), asyncio.create_task(server.ask())
        await until(lambda: len(server.states) == 2)
        assert [state.refused is not None for state in server.states] == [False, True]
        server.go_on.set()
        assert retry_after(await first) == 5
        assert retry_after(await second) == 1

    run(asyncio.wait_for(scenario(), 30))


def test_where_nothing_more_can_be_read_there_is_an_answer_all_the_same() -> None:
    async def scenario() -> None:
        server = Server(gate(20 * MIB), gate(20 * MIB))
        kept = [asyncio.create_task(server.ask()) for _ in range(2)]
        await until(lambda: len(server.states) == 2)
        answer = await server.ask()
        assert answer["status"] == UNAVAILABLE
        assert retry_after(answer) == 1
        server.go_on.set()
        await asyncio.gather(*kept)

    run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize(
    ("length", "method", "headers"),
    [(1000, "POST", {}), (100 * MIB, "GET", {})],
)
def test_what_is_small_or_no_request_is_let_by(length: int, method: str, headers: dict[str, str]) -> None:
    async def scenario() -> None:
        server = Server(gate(1), gate(1))
        server.go_on.set()
        assert (await server.ask(length, method, **headers))["status"] == 200

    run(asyncio.wait_for(scenario(), 30))


@pytest.mark.filterwarnings("ignore:ORJSONResponse is deprecated")  # SGLang's own
@pytest.mark.parametrize("runs_already", [False, True])
def test_sglangs_application_says_when_to_come_back(
    encode: TokenizerManagerWithoutScheduler, runs_already: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's own handlers answer, and keep no header of an exception. A tokenizer worker's server runs already."""
    application = FastAPI(exception_handlers=http_server.app.exception_handlers)

    @application.post("/busy")
    async def busy() -> None:
        raise HTTPException(UNAVAILABLE, "busy", {"Retry-After": "9"})

    if runs_already:
        application.middleware_stack = application.build_middleware_stack()
    monkeypatch.setattr(http_server, "app", application)
    admitting.start(encode)
    posted = TestClient(application).post("/busy")
    assert (posted.status_code, posted.headers["Retry-After"]) == (UNAVAILABLE, "5")


def test_a_request_whose_body_was_refused_is_refused_to_both_halves(
    encode: TokenizerManagerWithoutScheduler,
) -> None:
    """However little its media would have cost."""
    limited(encode, 100 * MIB)
    state = admitting.HttpState()
    state.refused = Refused(Failure(UNAVAILABLE, "no space for its body"), 9)

    class Request:
        def __init__(self) -> None:
            self.scope = {"embedding_relay": state}

    async def scenario() -> None:
        async for _ in encode.generate_request(asked(), Request()):
            raise AssertionError("it was answered")

    with pytest.raises(HTTPException, match="no space for its body"):
        run(scenario())
    assert [refusal.failure.text for refusal in refusals(encode)] == ["no space for its body"]
