"""Both halves around SGLang's tokenizing: with all its media on the encode half, text alone on the language half."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

from embedding_relay.config import RelayConfig
from embedding_relay.fair_line import FairLine
from embedding_relay.media_sources import MediaSources
from sglang.srt.disaggregation.multimodal import (
    admitting,
    faults,
    forwarding,
    modes,
    precomputed,
    request_notes,
    small_tensors,
)
from sglang.srt.disaggregation.multimodal.request_notes import Note
from sglang.srt.runtime_context import get_parallel

_MEDIA_FIELDS: Final = ("image_data", "video_data", "audio_data")


# ---- encode half


async def tokenize(original: Callable[..., Any], manager: Any, obj: Any) -> Any:
    """What SGLang's loaders may not have is refused before they see it; what fails after that is put down to somebody.

    SGLang answers a ValueError with 400. Anything else is a 5xx, after which the router tries the same picture on the
    next instance, and then takes both for unhealthy.
    """
    if not obj.contains_mm_input():
        return await original(manager, obj)
    _shorten_logs()
    cost = admitting.cost_of_this()
    _costs_being_prepared.append(cost)
    try:
        for field in _MEDIA_FIELDS:
            if (media := getattr(obj, field)) is not None:
                media = forwarding.rebuilt(media)
                precomputed.check(media, getattr(manager.mm_processor, "FEATURE_NAMES", ()))
                setattr(obj, field, await asyncio.to_thread(_sources().accepted, media))
        tokenized = await original(manager, obj)
        precomputed.check_rows(tokenized.mm_inputs, manager.model_config)
        admitting.note_prepared(tokenized, manager.model_config)
        if tokenized.mm_inputs is not None:
            small_tensors.make_small(tokenized.mm_inputs)
        if getattr(obj, "mm_hashes", None):
            # Whoever names the hash of a picture may name that of another one: rows are not shared with those who do
            # not. Here this field serves nothing else, as there is no prefix cache.
            tokenized.extra_key = f"{tokenized.extra_key or ''} with hashes of the caller"
    except Exception as error:
        raise faults.explained(error, modes.ENCODE, faults.flaw_of_prompt(manager, obj)) from error
    finally:
        _costs_being_prepared.remove(cost)
    request_notes.write(tokenized, Note(behind=_like_it_behind(cost)))
    return tokenized


def _like_it_behind(cost: int) -> int:
    """Requests that are no larger and on their way to the same scheduler, as far as anybody knows."""
    return sum(0 < other <= cost for other in _costs_being_prepared) if get_parallel().num_dp_ranks == 1 else 0


_costs_being_prepared: Final[list[int]] = []
"""Of each request of this process that is on its way to the scheduler and has not left."""


async def process_in_turn(
    original: Callable[..., Any], executor: Any, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Around SGLang's image processing, which has few threads: a small request is not behind all large ones."""
    async with _line_of(executor).turn(max(_LEAST_COST, admitting.cost_of_this())):
        return await original(executor, functools.partial(_without_stop_iteration, function), *args, **kwargs)


# Of one turn, in bytes: what costs nothing would pass all others for ever.
_LEAST_COST: Final = 1 << 16


@functools.cache
def _line_of(executor: Any) -> FairLine:
    return FairLine(executor._executor._max_workers + 1)  # one is there already when a thread has become free


def _without_stop_iteration(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A StopIteration, which a prompt with too many placeholders brings about, cannot be the outcome of a future: the
    request would wait for ever.
    """
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError("SGLang's processor came to an end of its media too early") from error


@functools.cache
def _sources() -> MediaSources:
    from sglang.srt.runtime_context import get_mm

    return MediaSources(RelayConfig.from_environment().allowed_media_dir, get_mm().media_url_max_file_size_mb)


@functools.cache
def _shorten_logs() -> None:
    logging.getLogger("sglang.srt.utils.common").addFilter(faults.shorten)


def guard_session(session: Any) -> Any:
    """In which SGLang fetches media. Its own list of domains says which hosts are meant, private ones included."""
    from sglang.srt.runtime_context import get_mm

    if get_mm().allowed_media_domains or _private_urls_allowed():
        return session
    from sglang.srt.disaggregation.multimodal import fetching

    return fetching.public_only(session)


@functools.cache
def _private_urls_allowed() -> bool:
    return RelayConfig.from_environment().private_media_urls


# ---- language half


async def tokenize_text_only(original: Callable[..., Any], manager: Any, obj: Any) -> Any:
    """The text keeps one placeholder per item, and no media are fetched, read or decoded."""
    if not obj.contains_mm_input():
        tokenized = await original(manager, obj)
        # A client can set this field of SGLang's, and would have the request wait for rows that nobody makes.
        if hasattr(tokenized, "need_wait_for_mm_inputs"):
            tokenized.need_wait_for_mm_inputs = False
        return tokenized
    we_choose = modes.is_prefill() or getattr(obj, "bootstrap_room", None) is None
    if we_choose and not modes.encode_urls():
        raise ValueError(
            "Disaggregated request received without bootstrap room id: requests with media need the router,"
            " or --encoder-urls at this instance"
        )
    if modes.is_prefill() and obj.sampling_params.get("n", 1) > 1:
        raise ValueError("several samples of one prompt are not answered by SGLang's prefill and decode instances")
    # The encode instance is asked first: it prepares the media while this process reads the prompt.
    async with forwarding.asking_for_rows(manager, obj) if we_choose else contextlib.nullcontext() as encode_half:
        if encode_half is not None:
            obj.embedding_relay_room = encode_half.room  # by which an operator finds it (tracing.py)
        try:
            with _without_media(obj):
                tokenized = await original(manager, obj)
        except Exception as error:
            raise faults.explained(error, modes.LANGUAGE) from error
    # SGLang's own encoder split uses this field for the same question: do rows come from elsewhere?
    tokenized.need_wait_for_mm_inputs = True
    # SGLang would answer at once with the ids that it has: placeholders. A late answer has none instead.
    request_notes.write(tokenized, Note(encode_half, bool(obj.return_prompt_token_ids), sources_of(obj), items_of(obj)))
    obj.return_prompt_token_ids = False
    return tokenized


@contextlib.contextmanager
def _without_media(obj: Any) -> Iterator[None]:
    kept = {field: getattr(obj, field) for field in _MEDIA_FIELDS}
    for field in _MEDIA_FIELDS:
        setattr(obj, field, None)
    try:
        yield
    finally:
        for field, value in kept.items():
            setattr(obj, field, value)


# ---- what clients call their pictures

_SAMPLE: Final = 1 << 16


def sources_of(obj: Any) -> tuple[str, ...]:
    """Digests of the media of a prompt, as they were sent or named. Equal ones are probably equal, and nothing rests on
    it: so of long ones the beginning, the middle and the end will do. None if there are several kinds of media: nobody
    here knows their order.
    """
    given = [(field, media) for field in _MEDIA_FIELDS if (media := getattr(obj, field, None))]
    if len(given) != 1:
        return ()
    ((kind, media),) = given
    tenant = [kind, *(getattr(obj, field, None) for field in ("extra_key", "cache_salt", "lora_path"))]
    return tuple(_digest(repr(tenant), one) for one in (media if isinstance(media, list) else [media]))


def items_of(obj: Any) -> int:
    """Pictures, videos and sounds of a prompt."""
    given = [media for field in _MEDIA_FIELDS if (media := getattr(obj, field, None))]
    return sum(len(media) if isinstance(media, list) else 1 for media in given)


def _digest(tenant: str, media: Any) -> str:
    """Empty for what is neither data nor the name of any: processed media of a caller within the process."""
    options = ""
    if dataclasses.is_dataclass(media) and hasattr(media, "url"):  # SGLang's ImageData or VideoData
        options, media = repr([(field.name, getattr(media, field.name)) for field in _options(media)]), media.url
    if not isinstance(media, str | bytes):
        return ""
    length = len(media)
    places = (0, max(0, (length - _SAMPLE) // 2), max(0, length - _SAMPLE))
    digest = hashlib.blake2b(repr((tenant, options, length)).encode(), digest_size=16)
    for place in places:
        part = media[place : place + _SAMPLE]
        digest.update(part.encode(errors="surrogatepass") if isinstance(part, str) else part)
    return digest.hexdigest()


def _options(media: Any) -> list[Any]:
    return [field for field in dataclasses.fields(media) if field.name != "url"]
