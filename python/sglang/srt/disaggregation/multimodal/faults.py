"""Whose fault it is when a prompt and its media cannot be prepared, and what a client is told about it."""

from __future__ import annotations

import binascii
import logging
import re
from collections.abc import Iterator
from typing import Any, Final

import torch
from fastapi import HTTPException
from PIL import Image, UnidentifiedImageError
from requests import exceptions as fetching

from embedding_relay.protocol.errors import INTERNAL, UNAVAILABLE

logger = logging.getLogger(__name__)

# What these raise about the bytes that they were given is about the bytes. (What they raise when a library of theirs is
# missing is not: `_NEVER_THE_CLIENTS`, and `_LIBRARY_MISSING` for the one that has no class of its own for it.)
_DECODERS: Final = frozenset({"PIL", "torchcodec", "av", "decord", "soundfile"})
_NEVER_THE_CLIENTS: Final = (ImportError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
_OVERLOADED: Final = (MemoryError, torch.OutOfMemoryError)
_NOT_DECODED: Final = re.compile(r"Could not decode (image|video|audio)")
_LIBRARY_MISSING: Final = "Could not load libtorchcodec"
# After which it goes on with a traceback for each version of FFmpeg that it has looked for.
_LIBRARY_MISSING_AT_LENGTH: Final = re.compile(rf"{_LIBRARY_MISSING}.*?(loading traceback\]\.|\Z)", re.DOTALL)
_NO_FFMPEG: Final = "it lacks FFmpeg's libraries (apt-get install ffmpeg)"

# SGLang and what it uses put into their messages: objects and exceptions as Python writes them, and paths.
_NOT_FOR_CLIENTS: Final = re.compile(
    r"<class |0x[0-9a-f]{6}|image mode=|Traceback|\w+(Error|Exception)\b|\b[A-Z]\w*\(\w+=|\[Errno|[{\[(]['\"]"
    r"|(?<![\w:/.<])[/~][\w.-]+/|file:"
)


def warn_without_ffmpeg() -> None:
    """At start. Without FFmpeg's libraries torchcodec can be imported, and fails for each video."""
    try:
        import torchcodec
    except (ImportError, OSError, RuntimeError):
        return  # then SGLang has another decoder, or says for each video that it has none
    if getattr(torchcodec, "ffmpeg_major_version", "") is None:
        logger.warning("relay: this encode instance answers requests with videos with 500: %s", _NO_FFMPEG)


def shorten(record: logging.LogRecord) -> bool:
    """A filter for SGLang's log: it has all that torchcodec says for each audio, which then is decoded without it."""
    said = record.getMessage()
    if _LIBRARY_MISSING in said:
        record.msg, record.args = _LIBRARY_MISSING_AT_LENGTH.sub("FFmpeg's libraries are missing", said), ()
    return True


def explained(error: Exception, mode: str, flaw: str = "") -> Exception:
    """What to raise in its place: a ValueError, which SGLang answers with 400, or an HTTPException of another class.

    `flaw` is what else is known to be wrong with the request.
    """
    if hasattr(error, "status_code"):
        return error  # somebody has decided already
    links = list(_chain(error))
    if any(map(_is_never_the_clients, links)):
        return _fault_of_the_server(error, links, mode)
    if flaw and not isinstance(error, ValueError):
        return ValueError(flaw)
    if not isinstance(error, ValueError) and not _is_about_the_media(links[-1]):
        return _fault_of_the_server(error, links, mode)
    logger.info("relay: a request is refused: %.500s", error)
    return ValueError(_sentence(links))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """From the outside in. SGLang wraps what its loaders raise, at times without naming it as the cause.

    What is inside an error of a fetch is about a network that the URL chose, not about this server.
    """
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        if isinstance(inner, fetching.RequestException):
            return
        within = None if inner.__suppress_context__ else inner.__context__
        inner = inner.__cause__ or (within if within is not None and str(within) in str(inner) else None)


def _is_never_the_clients(error: BaseException) -> bool:
    if isinstance(error, _NEVER_THE_CLIENTS) or _LIBRARY_MISSING in str(error):
        return True
    # Decoders raise errors of the system without a number; with one it is the system that raised it.
    return isinstance(error, OSError) and error.errno is not None and not _is_about_the_media(error)


def _is_about_the_media(error: BaseException) -> bool:
    if isinstance(error, ValueError | fetching.RequestException | Image.DecompressionBombError):
        return True
    if _top(type(error).__module__) in _DECODERS:
        return True
    return _was_raised_in_a_decoder(error) and not (isinstance(error, OSError) and error.errno is not None)


def _was_raised_in_a_decoder(error: BaseException) -> bool:
    frame = error.__traceback__
    while frame is not None:
        if _top(str(frame.tb_frame.f_globals.get("__name__"))) in _DECODERS:
            return True
        frame = frame.tb_next
    return False


def _top(module: str) -> str:
    return module.partition(".")[0]


def _fault_of_the_server(error: Exception, links: list[BaseException], mode: str) -> HTTPException:
    if any(_LIBRARY_MISSING in str(link) for link in links):
        logger.error("relay: this %s instance cannot decode a video: %s", mode, _NO_FFMPEG)
        return HTTPException(INTERNAL, f"this {mode} instance cannot decode videos: {_NO_FFMPEG}")
    logger.error("relay: this %s instance cannot prepare a request", mode, exc_info=error)
    code = UNAVAILABLE if any(isinstance(link, _OVERLOADED) for link in links) else INTERNAL
    return HTTPException(code, f"this {mode} instance cannot prepare the prompt and its media: its log says why")


def _sentence(links: list[BaseException]) -> str:
    for link in reversed(links):
        match link:
            case fetching.HTTPError(response=response) if response is not None:
                return f"a media URL could not be fetched: its server answered {response.status_code}"
            case fetching.Timeout():
                return "a media URL could not be fetched: its server did not answer in time"
            case fetching.TooManyRedirects():
                return "a media URL could not be fetched: it redirects too often"
            case fetching.ConnectionError():
                return "a media URL could not be fetched: its server could not be reached"
            case fetching.RequestException():
                return "a media URL could not be fetched: it is malformed"
            case Image.DecompressionBombError():
                return "Could not decode image: it has more pixels than are decoded here"
            case UnidentifiedImageError():
                return "Could not decode image: it is in no format that is known here"
            case ValueError() if "domain is not allowed" in str(link):
                return "a media URL names a host that this server does not fetch from"
            case binascii.Error():
                return "the data of a picture, video or audio is not valid base64"
    for link in links:
        if said := _NOT_DECODED.search(str(link)):
            return f"{said[0]}: it is damaged, or in no format that is known here"
    innermost = str(links[-1])
    if not innermost or _NOT_FOR_CLIENTS.search(innermost):
        return "the prompt and its media cannot be processed: a picture, video or audio may be damaged"
    return innermost


def flaw_of_prompt(manager: Any, obj: Any) -> str:
    """What is wrong with a prompt beside these media; "" if nothing is, or nobody can tell.

    Processors fail in any way when a prompt has more placeholders than media, or single tokens of a placeholder. So a
    failure that could be anybody's is put down to such a prompt.
    """
    ids, tokens = obj.input_ids, getattr(manager.mm_processor, "mm_tokens", None)
    if ids is not None and not all(0 <= token < manager.model_config.vocab_size for token in ids):
        return "input_ids has numbers outside of the model's vocabulary"
    if tokens is None:
        return ""
    text = obj.text if isinstance(obj.text, str) else manager.tokenizer.decode(ids or [])
    given = {name: _number(getattr(obj, f"{name}_data")) for name in ("image", "video", "audio")}
    parts = re.split(tokens.get_combined_regex(), text)
    found = [modality.name.lower() for part in parts if (modality := tokens.get_modality_of_token(part)) is not None]
    for name, number in given.items():
        if found.count(name) != number:
            return f"the prompt has {found.count(name)} {name} placeholders, but {number} were sent"
    placeholders = "".join(filter(None, (tokens.image_token, tokens.video_token, tokens.audio_token)))
    for special in manager.tokenizer.get_added_vocab():
        if special in placeholders and text.count(special) > sum(given.values()):
            return f"the prompt has {text.count(special)} tokens {special}, but {sum(given.values())} media were sent"
    return ""


def _number(media: Any) -> int:
    return len(media) if isinstance(media, list) else int(media is not None)
