"""A minimal client of /v1/chat/completions: one question about some images, and what came back."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Answer:
    """What the server said; `body` is the decoded JSON, or the plain text when it was none."""

    status: int
    body: Any
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status == 200

    @property
    def text(self) -> str:
        return str(self._choice()["message"]["content"])

    @property
    def prompt_tokens(self) -> int:
        return int(self.body["usage"]["prompt_tokens"])

    @property
    def logprobs(self) -> list[tuple[str, float]]:
        """Each generated token with its log-probability; asked for unless `logprobs` was switched off."""
        return [(token["token"], token["logprob"]) for token in self._choice()["logprobs"]["content"]]

    def _choice(self) -> Any:
        if not self.ok:
            raise ValueError(f"status {self.status}: {self.body}")
        return self.body["choices"][0]


def picture(width: int, height: int, seed: int = 0) -> Image:
    """A picture of coloured squares, the same for the same arguments."""
    import random

    from PIL import Image

    dice = random.Random(seed)
    small = Image.frombytes("RGB", (16, 16), dice.randbytes(16 * 16 * 3))
    return small.resize((width, height), Image.Resampling.NEAREST)


def data_uri(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat_body(images: Sequence[Image | str], text: str, **options: Any) -> dict[str, Any]:
    """The request's JSON: images first (as pictures or as URLs), then the text; greedy unless the options say more."""
    urls = [image if isinstance(image, str) else data_uri(image) for image in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts.append({"type": "text", "text": text})
    defaults = {"model": "default", "max_tokens": 8, "temperature": 0, "logprobs": True}
    return defaults | {"messages": [{"role": "user", "content": parts}]} | options


def ask(url: str, images: Sequence[Image | str], text: str, *, timeout: float = 300, **options: Any) -> Answer:
    """Ask the server at `url` and wait for the whole answer. A refusal is an Answer too; no connection raises."""
    return post(f"{url}/v1/chat/completions", chat_body(images, text, **options), timeout=timeout)


def post(url: str, body: Any, *, headers: Mapping[str, str] | None = None, timeout: float = 300) -> Answer:
    headers = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    started = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            status, content = reply.status, reply.read()
    except urllib.error.HTTPError as refusal:
        with refusal:
            status, content = refusal.code, refusal.read()
    seconds = time.monotonic() - started
    try:
        return Answer(status, json.loads(content), seconds)
    except ValueError:
        return Answer(status, content.decode(errors="replace"), seconds)
