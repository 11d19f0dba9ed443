"""Both halves around SGLang's tokenizing: with all its media on the encode half, text alone on the language half."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

_MEDIA_FIELDS: Final = ("image_data", "video_data", "audio_data")


async def tokenize(original: Callable[..., Any], manager: Any, obj: Any) -> Any:
    """Encode half, around SGLang's tokenizing and image processing: whatever that raises is the request's fault.

    SGLang answers a ValueError with 400. Anything else would be a 500, after which the router tries the same image on
    the next instance, and then takes both for unhealthy.
    """
    try:
        return await original(manager, obj)
    except Exception as error:
        if isinstance(error, ValueError) or hasattr(error, "status_code") or not obj.contains_mm_input():
            raise
        raise ValueError(str(error) or f"the prompt and its images do not fit ({type(error).__name__})") from error


async def tokenize_text_only(original: Callable[..., Any], manager: Any, obj: Any) -> Any:
    """Language half: the text keeps one placeholder per item, and no image is fetched or decoded."""
    if not obj.contains_mm_input():
        return await original(manager, obj)
    if obj.bootstrap_room is None:
        raise ValueError(f"Disaggregated request received without bootstrap room id. {obj.rid=}")
    with _without_media(obj):
        tokenized = await original(manager, obj)
    # SGLang's own encoder split uses this field for the same question: do rows come from elsewhere?
    tokenized.need_wait_for_mm_inputs = True
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
