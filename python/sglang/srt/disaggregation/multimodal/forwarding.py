"""An instance that knows its encode instances (`--encoder-urls`): it sends them the media of its requests itself.

So no router need ask both halves, and behind a router that can ask two instances the second may be SGLang's decode
stage. An encode instance is asked over HTTP as a router would ask it, and its rows come as they come with a router.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from embedding_relay.protocol.errors import BAD_GATEWAY, BAD_REQUEST, UNAVAILABLE, Failure
from embedding_relay.protocol.messages import rank_of_room
from sglang.srt.disaggregation.multimodal import front, modes
from sglang.srt.disaggregation.multimodal.request_notes import EncodeHalf

logger = logging.getLogger(__name__)

_CONNECT_S: Final = 5.0
_AVOIDED_S: Final = 5.0
"""An instance that could not be reached is asked last for so long."""
_INFO_IS_FRESH_S: Final = 30.0
_INFO_TIMEOUT_S: Final = 30.0
_MOST_OF_AN_ERROR: Final = 65536

# Of a request: its prompt, its media, and all that says how they are processed. An encode instance needs no more.
_FIELDS: Final = (
    *("text", "input_ids", "image_data", "video_data", "audio_data", "modalities", "mm_hashes", "mm_content_hashes"),
    *("use_audio_in_video", "video_config", "images_config", "mm_processor_kwargs", "extra_key", "cache_salt"),
    *("max_dynamic_patch", "min_dynamic_patch", "image_max_dynamic_patch", "video_max_dynamic_patch", "priority"),
    "external_trace_header",
)
# A picture with options of its own is an object within SGLang, and JSON between servers.
_OBJECT: Final = "relay_media_object"


class Unusable(Exception):
    """Why an encode instance cannot be asked."""


class EncodeInstance(msgspec.Struct):
    """What its `/server_info` says of it."""

    disaggregation_mode: str
    disaggregation_bootstrap_port: int
    dp_size: int = 1


class EncodeInstances:
    """Asked in turn. Belongs to one event loop."""

    def __init__(self, urls: list[str], api_key: str | None = None) -> None:
        self._urls = urls
        self._next = itertools.count()
        self._avoided_until: dict[str, float] = {}
        self._known: dict[str, tuple[float, EncodeInstance]] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._asked: dict[int, asyncio.Task[Failure | None]] = {}
        """By room: the requests that have not been answered yet."""
        sending = aiohttp.TraceConfig()
        sending.on_request_chunk_sent.append(_note_sent)
        self._session = aiohttp.ClientSession(
            # A connection that is kept may be one to an instance that has gone since: only a new one tells.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            trace_configs=[sending],
        )

    async def ask(self, room: int, body: dict[str, Any], on_failure: Callable[[Failure], None]) -> EncodeHalf:
        """One that takes the request; `on_failure` is called if it fails there later. Raises Unusable."""
        reasons = []
        for url in self._in_turn():
            try:
                instance = await self._instance(url)
                half = EncodeHalf(
                    urlsplit(url).hostname,
                    instance.disaggregation_bootstrap_port,
                    room,
                    rank_of_room(room, instance.dp_size),
                )
                await self._send(url, half, body, on_failure)
                return half
            except (aiohttp.ClientError, TimeoutError, OSError, Unusable) as error:
                reasons.append(f"{url}: {self._avoid(url, error)}")
        raise Unusable(f"no encode instance takes requests ({'; '.join(reasons)})")

    def take_back(self, room: int) -> None:
        """As a client does who goes away: the encode instance sees its connection closed, and forgets the request."""
        if (request := self._asked.get(room)) is not None:
            request.cancel()

    def _in_turn(self) -> list[str]:
        first = next(self._next) % len(self._urls)
        turn = self._urls[first:] + self._urls[:first]
        now = time.monotonic()
        return sorted(turn, key=lambda url: self._avoided_until.get(url, 0.0) > now)

    def _avoid(self, url: str, error: Exception) -> str:
        reason = str(error) or type(error).__name__
        self._avoided_until[url] = time.monotonic() + _AVOIDED_S
        self._known.pop(url, None)  # it may come back with another port
        logger.warning("relay: encode instance %s: %s", url, reason)
        return reason

    async def _instance(self, url: str) -> EncodeInstance:
        """As it was a moment ago, if it was asked before: a busy instance takes its time to answer this."""
        asked_at, known = self._known.get(url, (0.0, None))
        if known is None:
            return await self._look(url)
        if time.monotonic() > asked_at + _INFO_IS_FRESH_S:
            self._known[url] = (time.monotonic(), known)
            self._start(self._look_again(url))
        return known

    async def _look(self, url: str) -> EncodeInstance:
        timeout = aiohttp.ClientTimeout(total=_INFO_TIMEOUT_S, sock_connect=_CONNECT_S)
        async with self._session.get(f"{url}/server_info", timeout=timeout) as response:
            text = await response.read()
            if response.status != 200:
                raise Unusable(f"/server_info answers {response.status}")
        try:
            instance = msgspec.json.decode(text, type=EncodeInstance)
        except msgspec.MsgspecError as error:
            raise Unusable(f"no SGLang server ({error})") from None
        if instance.disaggregation_mode != modes.ENCODE:
            raise Unusable(f"its --disaggregation-mode is {instance.disaggregation_mode}, not {modes.ENCODE}")
        self._known[url] = (time.monotonic(), instance)
        return instance

    async def _look_again(self, url: str) -> None:
        try:
            await self._look(url)
        except (aiohttp.ClientError, TimeoutError, OSError, Unusable) as error:
            self._avoid(url, error)

    async def _send(
        self, url: str, half: EncodeHalf, body: dict[str, Any], on_failure: Callable[[Failure], None]
    ) -> None:
        """Returns when the body is on its way, all or its beginning, so that the caller may keep this event loop busy.

        Of what does not come so far nobody has seen a request, and another may be asked.
        """
        where = {"bootstrap_host": half.host, "bootstrap_port": half.port, "bootstrap_room": half.room}
        payload = msgspec.json.encode({**body, **where})
        sent = asyncio.get_running_loop().create_future()
        request = self._start(self._post(url, payload, sent))
        await asyncio.wait({request, sent}, return_when=asyncio.FIRST_COMPLETED)
        if not sent.done():
            request.result()
            return
        self._asked[half.room] = request
        request.add_done_callback(functools.partial(self._hear_end, url, half.room, on_failure))

    async def _post(self, url: str, payload: bytes, sent: asyncio.Future[None]) -> Failure | None:
        headers = {"Content-Type": "application/json"}
        data = io.BytesIO(payload)
        async with self._session.post(
            f"{url}/generate", data=data, headers=headers, trace_request_ctx=sent
        ) as response:
            text = await response.content.read(_MOST_OF_AN_ERROR)
            return None if response.status == 200 else _failure(url, response.status, text)

    def _hear_end(
        self, url: str, room: int, on_failure: Callable[[Failure], None], request: asyncio.Task[Failure | None]
    ) -> None:
        del self._asked[room]
        if request.cancelled():
            return
        error, failure = request.exception(), None
        if isinstance(error, Exception):
            failure = Failure(BAD_GATEWAY, f"encode instance {url} went away ({self._avoid(url, error)})")
        elif error is None:
            failure = request.result()
        if failure is not None:
            on_failure(failure)

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await self._session.close()


async def _note_sent(_session: Any, context: Any, _params: Any) -> None:
    sent = context.trace_request_ctx
    if sent is not None and not sent.done():
        sent.set_result(None)


def _failure(url: str, status: int, text: bytes) -> Failure:
    """What the client is told. A request that this instance may not make there is no fault of the client's."""
    try:
        said = msgspec.json.decode(text)["error"]["message"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        said = text.decode(errors="replace")[:200]
    if status == BAD_REQUEST or status in (BAD_GATEWAY, UNAVAILABLE):
        return Failure(status, said)
    return Failure(BAD_GATEWAY, f"encode instance {url} answers {status}: {said}")


@contextlib.asynccontextmanager
async def asking_for_rows(manager: Any, obj: Any) -> AsyncIterator[EncodeHalf]:
    """In the HTTP process, for one prompt with media: taken back if what is done within fails."""
    room = secrets.randbits(63)
    instances = _instances_of(manager)
    try:
        half = await instances.ask(room, media_half(obj), functools.partial(_tell_scheduler, manager, room))
    except Unusable as error:
        from fastapi import HTTPException

        logger.warning("relay room=%d refused: %s", room, error)
        raise HTTPException(UNAVAILABLE, str(error)) from None
    try:
        yield half
    except BaseException:
        instances.take_back(room)
        raise


def _instances_of(manager: Any) -> EncodeInstances:
    """Those of this process, made at its first request because they belong to the running event loop."""
    instances: EncodeInstances | None = getattr(manager, "embedding_relay_encode_instances", None)
    if instances is None:
        from sglang.srt.runtime_context import get_serving

        instances = EncodeInstances(modes.encode_urls(), get_serving().api_key)
        manager.embedding_relay_encode_instances = instances
    return instances


def _tell_scheduler(manager: Any, room: int, failure: Failure) -> None:
    logger.info("relay room=%d lost its rows: %s", room, failure)
    manager._dispatch_to_scheduler(front.lost_rows_message(room, failure))


# ---- the media half of a request, as JSON


def media_half(obj: Any) -> dict[str, Any]:
    """A ValueError for what only a caller within the process can name."""
    body = {name: _plain(value) for name in _FIELDS if (value := getattr(obj, name, None)) is not None}
    if isinstance(modalities := body.get("modalities"), str):
        body["modalities"] = [modalities]  # so SGLang takes a batch apart
    params = obj.sampling_params
    most = params.get("max_new_tokens") if isinstance(params, dict) else None
    # The one thing about the tokens that an encode instance checks too: whether they fit into the context.
    return body | {"sampling_params": {} if most is None else {"max_new_tokens": most}}


def _plain(value: Any) -> Any:
    match value:
        case None | str() | bool() | int() | float():
            return value
        case bytes():
            return f"data:;base64,{base64.b64encode(value).decode()}"
        case list() | tuple():
            return [_plain(one) for one in value]
        case dict():
            return {key: _plain(one) for key, one in value.items()}
        case _ if dataclasses.is_dataclass(value) and hasattr(value, "url"):
            return _plain_object(value)
    raise ValueError(f"a {type(value).__name__} cannot be sent to an encode instance: name a URL or a data: URI")


def _plain_object(value: Any) -> Any:
    """SGLang's ImageData or VideoData; most have nothing but their source."""
    options = {
        field.name: _plain(given)
        for field in dataclasses.fields(value)
        if field.name != "url" and (given := getattr(value, field.name)) != field.default
    }
    if not options and isinstance(value.url, str):
        return value.url
    return {_OBJECT: type(value).__name__, "url": _plain(value.url), **options}


def rebuilt(media: Any) -> Any:
    """On the encode half: the objects that `_plain_object` has made JSON of."""
    if isinstance(media, list):
        return [rebuilt(one) for one in media]
    if not isinstance(media, dict) or _OBJECT not in media:
        return media
    from sglang.srt.utils.common import ImageData, VideoData

    kind = next((one for one in (ImageData, VideoData) if one.__name__ == media[_OBJECT]), None)
    options = {key: value for key, value in media.items() if key != _OBJECT}
    known = {field.name for field in dataclasses.fields(kind)} if kind else set()
    if kind is None or "url" not in options or not set(options) <= known:
        raise ValueError("a media object that is none of this version of SGLang")
    return kind(**options)
