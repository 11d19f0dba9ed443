"""The request that asks one task: its path and its JSON."""

from __future__ import annotations

import base64
import mimetypes
import re
from pathlib import Path
from typing import Any, Final

from embedding_relay.batch.errors import in_words
from embedding_relay.batch.session.records import Asking
from embedding_relay.batch.tasks import Task

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

_PATH: Final = re.compile(r"(/[A-Za-z0-9_.-]+)+")
# The first bytes of a picture are a better witness than the name of its file.
_SIGNATURES: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
)


class Unaskable(ValueError):
    """No request can be made of this row; the message says why."""


def chat_request(task: Task, asking: Asking, model: str, folder: Path, path: str = "") -> tuple[str, dict[str, Any]]:
    """`path` is where the requests of a batch go; without one they tell. May read files: not for an event loop."""
    path = path or (COMPLETIONS if task.body and "messages" not in task.body else CHAT)
    if not _PATH.fullmatch(path):
        raise Unaskable(f"requests go to a path like {CHAT}, not to {path!r}")
    if task.body is not None:
        return path, _completed(task.body, model)
    body: dict[str, Any] = {"model": model, "messages": _messages(task, asking, folder)}
    if asking.max_tokens is not None:
        body["max_tokens"] = asking.max_tokens
    if asking.temperature is not None:
        body["temperature"] = asking.temperature
    return path, body


def _completed(body: dict[str, Any], model: str) -> dict[str, Any]:
    # Nobody would read a streamed answer while it comes.
    given = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    return given if given.get("model") else given | {"model": model}


def _messages(task: Task, asking: Asking, folder: Path) -> list[dict[str, Any]]:
    content: str | list[dict[str, Any]] = task.prompt
    if task.images:
        parts = [{"type": "image_url", "image_url": {"url": _image_url(image, folder)}} for image in task.images]
        content = [*parts, {"type": "text", "text": task.prompt}] if task.prompt else parts
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return [{"role": "system", "content": asking.system}, *messages] if asking.system else messages


def _image_url(image: str, folder: Path) -> str:
    scheme = image[:11].lower()
    if scheme.startswith(("http://", "https://", "data:image/")):
        return image
    content = _file_within(folder, image).read_bytes()
    return f"data:{_media_type(content, image)};base64,{base64.b64encode(content).decode()}"


def _file_within(folder: Path, name: str) -> Path:
    """The endpoint may be somebody else's, so no name may lead to a file outside the session's folder."""
    shown = name if len(name) <= 80 else name[:77] + "..."
    try:
        home = folder.resolve()
        path = (home / name).resolve()
        usable = path.is_relative_to(home) and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, links that go in circles
        raise Unaskable(f"the picture {shown!r} cannot be read: {in_words(error)}") from None
    if not usable:
        raise Unaskable(f"there is no picture {shown!r} in this session")
    return path


def _media_type(content: bytes, name: str) -> str:
    for signature, media_type in _SIGNATURES:
        if content.startswith(signature):
            return media_type
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    guess = mimetypes.guess_type(name)[0] or ""
    if not guess.startswith("image/"):
        raise Unaskable(f"{Path(name).name!r} is not a picture of a known kind (PNG, JPEG, GIF, WebP, BMP, TIFF)")
    return guess
