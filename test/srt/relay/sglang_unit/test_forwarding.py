"""The media half of a request, sent by the instance that generates: which encode instance gets it, and what is heard.

The encode instances are small HTTP servers of this process: they listen on real ports and say what a test wants. They
do not encode anything.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from fastapi import HTTPException

from embedding_relay.protocol.errors import BAD_GATEWAY, BAD_REQUEST, UNAVAILABLE, Failure
from embedding_relay.tools.chat_client import data_uri, picture
from embedding_relay.tools.local_process import free_ports
from sglang.srt.disaggregation.multimodal import forwarding, request_notes
from sglang.srt.disaggregation.multimodal.forwarding import EncodeInstances, Unusable
from sglang.srt.utils.common import ImageData, VideoData
from support import tokenizing
from support.tokenizing import IMAGE, TokenizerManagerWithoutScheduler
from support.tokenizing import run as run_on_its_loop

ROOM = 7


class Encode:
    """One instance: what it was asked, and how it answers."""

    def __init__(self, port: int, bootstrap_port: int = 8998) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.info: dict[str, Any] = {"disaggregation_mode": "encode", "disaggregation_bootstrap_port": bootstrap_port}
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.looks = 0
        self.answer: Callable[[], Coroutine[Any, Any, web.StreamResponse]] = self.succeed

    async def succeed(self) -> web.StreamResponse:
        return web.json_response({"text": ""})

    async def look(self, request: web.Request) -> web.Response:
        self.looks += 1
        return web.json_response(self.info)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        return await self.answer()


@asynccontextmanager
async def serving(*instances: Encode) -> AsyncIterator[None]:
    runners = []
    for one in instances:
        application = web.Application(client_max_size=2**24)
        application.add_routes([web.get("/server_info", one.look), web.post("/generate", one.generate)])
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", one.port).start()
        runners.append(runner)
    try:
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


class InAThread(BaseHTTPRequestHandler):
    """An encode instance that hears of requests while the event loop of the test stands still."""

    asked = threading.Event()

    def do_GET(self) -> None:
        self._answer({"disaggregation_mode": "encode", "disaggregation_bootstrap_port": 8998})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.set()
        self._answer({"text": ""})

    def _answer(self, said: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())


@contextmanager
def listening() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), InAThread) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@asynccontextmanager
async def client(*urls: str, api_key: str | None = None) -> AsyncIterator[EncodeInstances]:
    instances = EncodeInstances(list(urls), api_key)
    try:
        yield instances
    finally:
        await instances.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def refusal(status: int, message: str) -> Callable[[], Coroutine[Any, Any, web.StreamResponse]]:
    async def answer() -> web.StreamResponse:
        return web.json_response({"error": {"message": message}}, status=status)

    return answer


async def first_failure(instances: EncodeInstances, body: dict[str, Any] | None = None) -> Failure:
    heard: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()
    await instances.ask(ROOM, body or {"text": "a"}, heard.set_result)
    return await heard


# ---- which instance is asked


def test_the_instance_learns_the_room_and_the_caller_where_its_rows_come_from() -> None:
    async def test() -> None:
        one = Encode(*free_ports(1), bootstrap_port=4321)
        one.info["dp_size"] = 4
        async with serving(one), client(one.url, api_key="secret") as instances:
            half = await instances.ask(ROOM, {"text": "a"}, pytest.fail)
            await asyncio.gather(*instances._running)
            assert (half.host, half.port, half.room, half.rank) == ("127.0.0.1", 4321, ROOM, ROOM % 4)
            where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 4321, "bootstrap_room": ROOM}
            assert one.asked == [{"text": "a", **where}]
            assert one.keys == ["Bearer secret"]

    run(test)


def test_instances_take_turns_and_are_looked_at_once() -> None:
    async def test() -> None:
        one, two = (Encode(port) for port in free_ports(2))
        async with serving(one, two), client(one.url, two.url) as instances:
            for room in range(6):
                await instances.ask(room, {}, pytest.fail)
            await asyncio.gather(*instances._running)
            assert [len(one.asked), len(two.asked)] == [3, 3]
            assert [one.looks, two.looks] == [1, 1]

    run(test)


def test_an_instance_that_is_not_there_is_passed_over_and_then_avoided() -> None:
    async def test() -> None:
        (gone, port) = free_ports(2)
        one = Encode(port)
        async with serving(one), client(f"http://127.0.0.1:{gone}", one.url) as instances:
            for room in range(4):
                assert (await instances.ask(room, {}, pytest.fail)).port == 8998
            await asyncio.gather(*instances._running)
            assert len(one.asked) == 4
            assert instances._in_turn()[0] == one.url == instances._in_turn()[0]

    run(test)


def test_an_instance_that_ends_is_passed_over_by_the_next_request() -> None:
    async def test() -> None:
        one, two = (Encode(port) for port in free_ports(2))
        async with client(one.url, two.url) as instances:
            async with serving(one, two):
                for room in range(2):
                    await instances.ask(room, {}, pytest.fail)
                await asyncio.gather(*instances._running)
            async with serving(two):
                for room in range(2, 6):
                    await instances.ask(room, {}, pytest.fail)
                await asyncio.gather(*instances._running)
        assert [len(one.asked), len(two.asked)] == [1, 5]

    run(test)


def test_when_there_is_none_the_reason_names_each() -> None:
    async def test() -> None:
        gone, port = free_ports(2)
        other = Encode(port)
        other.info["disaggregation_mode"] = "null"
        async with serving(other), client(f"http://127.0.0.1:{gone}", other.url) as instances:
            with pytest.raises(Unusable) as failed:
                await instances.ask(ROOM, {}, pytest.fail)
            assert f"http://127.0.0.1:{gone}: " in str(failed.value)
            assert f"{other.url}: its --disaggregation-mode is null, not encode" in str(failed.value)
            assert other.asked == []

    run(test)


@pytest.mark.parametrize("said", [{}, {"disaggregation_mode": 1}, ["encode"]])
def test_what_is_no_sglang_server_is_not_asked(said: Any) -> None:
    async def test() -> None:
        one = Encode(*free_ports(1))
        one.info = said
        async with serving(one), client(one.url) as instances:
            with pytest.raises(Unusable, match="no SGLang server"):
                await instances.ask(ROOM, {}, pytest.fail)

    run(test)


def test_an_instance_that_came_back_with_another_port_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        one = Encode(*free_ports(1))
        async with serving(one), client(one.url) as instances:
            await instances.ask(1, {}, pytest.fail)
            one.info["disaggregation_bootstrap_port"] = 5555
            monkeypatch.setattr(forwarding, "_INFO_IS_FRESH_S", 0.0)
            await instances.ask(2, {}, pytest.fail)
            await asyncio.gather(*instances._running)
            assert (await instances.ask(3, {}, pytest.fail)).port == 5555

    run(test)


# ---- what comes of it


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, Failure(BAD_REQUEST, "no picture")),
        (503, Failure(UNAVAILABLE, "no picture")),
        (502, Failure(BAD_GATEWAY, "no picture")),
    ],
)
def test_a_refusal_reaches_the_client_as_it_was_said(status: int, expected: Failure) -> None:
    async def test() -> None:
        one = Encode(*free_ports(1))
        one.answer = refusal(status, "no picture")
        async with serving(one), client(one.url) as instances:
            assert await first_failure(instances) == expected

    run(test)


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_fault_between_the_instances_is_not_the_clients(status: int) -> None:
    async def test() -> None:
        one = Encode(*free_ports(1))
        one.answer = refusal(status, "Unauthorized")
        async with serving(one), client(one.url) as instances:
            failure = await first_failure(instances)
            assert failure.code == BAD_GATEWAY
            assert failure.text == f"encode instance {one.url} answers {status}: Unauthorized"

    run(test)


def test_an_instance_that_goes_away_meanwhile_fails_the_request() -> None:
    async def test() -> None:
        one = Encode(*free_ports(1))

        async def hang_up() -> web.StreamResponse:
            raise asyncio.CancelledError  # the connection is closed without an answer

        one.answer = hang_up
        async with serving(one), client(one.url) as instances:
            failure = await first_failure(instances)
            assert failure.code == BAD_GATEWAY
            assert "went away" in failure.text

    run(test)


def test_success_is_not_reported_the_rows_tell() -> None:
    async def test() -> None:
        one = Encode(*free_ports(1))
        async with serving(one), client(one.url) as instances:
            await instances.ask(ROOM, {}, pytest.fail)
            await asyncio.gather(*instances._running)

    run(test)


# ---- the body


def request(**fields: Any) -> Any:
    return SimpleNamespace(**{"sampling_params": None, **fields})


def test_only_what_makes_rows_is_sent() -> None:
    asked = request(
        text="a",
        image_data=["http://h/a.png", b"\x00\x01"],
        rid="r",
        lora_path="x",
        return_logprob=True,
        mm_processor_kwargs={"min_pixels": 4},
        sampling_params={"max_new_tokens": 5, "n": 3, "regex": "a"},
    )
    assert forwarding.media_half(asked) == {
        "text": "a",
        "image_data": ["http://h/a.png", "data:;base64,AAE="],
        "mm_processor_kwargs": {"min_pixels": 4},
        "sampling_params": {"max_new_tokens": 5},
    }


@pytest.mark.parametrize(
    ("medium", "plain"),
    [
        (ImageData(url="http://h/a.png"), True),
        (ImageData(url="http://h/a.png", detail="high", max_dynamic_patch=3), False),
        (VideoData(url="http://h/a.mp4", preprocess_kwargs={"fps": 2}), False),
    ],
)
def test_a_medium_with_options_arrives_as_it_was(medium: Any, plain: bool) -> None:
    (sent,) = forwarding.media_half(request(image_data=[medium]))["image_data"]
    assert isinstance(sent, str) == plain
    (rebuilt,) = forwarding.rebuilt([sent])
    assert rebuilt == (medium.url if plain else medium)


@pytest.mark.parametrize("media", ["http://h/a", ["http://h/a", {"format": "precomputed_embedding"}], [["a"], None]])
def test_what_a_client_sends_is_left_alone(media: Any) -> None:
    assert forwarding.rebuilt(media) == media


@pytest.mark.parametrize(
    "marked",
    [
        {"relay_media_object": "os.system", "url": "a"},
        {"relay_media_object": "ImageData"},
        {"relay_media_object": "ImageData", "url": "a", "mode": "x"},
        {"relay_media_object": ["ImageData"], "url": "a"},
    ],
)
def test_what_is_no_object_of_ours_is_refused(marked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="media object"):
        forwarding.rebuilt([marked])


def test_of_a_batch_each_prompt_is_sent_alone() -> None:
    assert forwarding.media_half(request(modalities="image"))["modalities"] == ["image"]


def test_what_cannot_be_named_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="name a URL or a data: URI"):
        forwarding.media_half(request(image_data=[object()]))


# ---- in SGLang's tokenizer manager


@contextmanager
def generating(mode: str, *urls: str) -> Iterator[TokenizerManagerWithoutScheduler]:
    with tokenizing.serving(mode, encoder_urls=list(urls)) as manager:
        yield manager
        run_on_its_loop(closed(manager))


async def closed(manager: TokenizerManagerWithoutScheduler) -> None:
    if (instances := getattr(manager, "embedding_relay_encode_instances", None)) is not None:
        await instances.close()


PICTURE = {"text": f"{IMAGE}a", "image_data": [data_uri(picture(56, 56, seed=1))]}
ROUTED = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": ROOM}


@pytest.mark.parametrize(("mode", "routed"), [("language", {}), ("prefill", ROUTED)])
def test_the_media_half_is_sent_and_the_scheduler_learns_where_to(mode: str, routed: dict[str, Any]) -> None:
    one = Encode(*free_ports(1))

    async def prepare() -> Any:
        async with serving(one):
            tokenized = await manager.tokenized(**PICTURE, **routed)
            await asyncio.gather(*manager.embedding_relay_encode_instances._running)
            return tokenized

    with generating(mode, one.url) as manager:
        tokenized = run_on_its_loop(prepare())
    half = request_notes.encode_half(tokenized)
    (body,) = one.asked
    assert body["image_data"] == PICTURE["image_data"]
    assert body["text"] == PICTURE["text"]
    assert (half.host, half.port, half.room) == tuple(body[name] for name in ROUTED)
    assert half.room != ROOM
    assert tokenized.need_wait_for_mm_inputs
    assert tokenized.mm_inputs is None
    assert tokenized.bootstrap_room == routed.get("bootstrap_room")


def test_the_encode_instance_has_the_media_while_the_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    had: list[bool] = []
    with listening() as url, generating("language", url) as manager:
        read = manager._tokenize_texts

        async def note_and_read(*args: Any) -> Any:
            had.append(InAThread.asked.wait(5))  # like a tokenizer, this stops the event loop that sends
            return await read(*args)

        monkeypatch.setattr(manager, "_tokenize_texts", note_and_read)
        manager.prepare(**PICTURE)
    assert had == [True]


def test_media_of_a_prompt_that_is_refused_are_taken_back() -> None:
    one = Encode(*free_ports(1))
    is_gone = asyncio.Event()

    async def wait_for_the_end(self: Encode, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        while request.transport is not None and not request.transport.is_closing():
            await asyncio.sleep(0)
        is_gone.set()
        raise asyncio.CancelledError

    async def prepare() -> None:
        one.generate = wait_for_the_end.__get__(one)  # type: ignore[method-assign]
        async with serving(one):
            with pytest.raises(ValueError, match="longer than the model's context length"):
                await manager.tokenized(text=IMAGE + "a b " * manager.context_len, image_data=PICTURE["image_data"])
            await asyncio.wait_for(is_gone.wait(), 10)

    with generating("language", one.url) as manager:
        run_on_its_loop(prepare())
    assert len(one.asked) == 1
    assert manager.sent == []  # nobody else is told: no scheduler has heard of this room


def test_a_request_that_the_router_has_paired_goes_by_the_router() -> None:
    with generating("language", "http://127.0.0.1:9") as manager:
        tokenized = manager.prepare(**PICTURE, **ROUTED)
    assert request_notes.read(tokenized).encode_half is None
    assert request_notes.encode_half(tokenized).room == ROOM


def test_several_samples_are_refused_where_sglang_would_never_answer() -> None:
    with generating("prefill", "http://127.0.0.1:9") as manager, pytest.raises(ValueError, match="several samples"):
        manager.prepare(**PICTURE, **ROUTED, sampling_params={"n": 2})


def test_text_asks_nobody() -> None:
    with generating("prefill", "http://127.0.0.1:9") as manager:
        tokenized = manager.prepare(text="a", **ROUTED)
    assert not tokenized.need_wait_for_mm_inputs


def test_without_an_encode_instance_the_answer_is_503_with_the_reason() -> None:
    with generating("language", "http://127.0.0.1:9") as manager, pytest.raises(HTTPException) as failed:
        manager.prepare(**PICTURE)
    assert failed.value.status_code == UNAVAILABLE
    assert "no encode instance takes requests (http://127.0.0.1:9: " in failed.value.detail
