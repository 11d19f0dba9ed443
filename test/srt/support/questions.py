"""Prompts whose length in token rows is known, and what servers answered to them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from PIL.Image import Image

from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import Answer, chat_body, data_uri, picture, post

TOLERANCE = 2e-3
FILLER = " <|endoftext|>"  # a special token: it merges with nothing, so one more is one row more

PIXELS_PER_TOKEN = {"qwen2_5_vl": 28, "qwen3_vl": 32}


@dataclass(frozen=True)
class Question:
    """One user turn: pictures and pieces of text in order."""

    name: str
    parts: tuple[Image | str, ...]
    filler: int = 0

    def body(self, **options: Any) -> dict[str, Any]:
        body = chat_body([], "", **options)
        texts = [*self.parts, FILLER.strip() * self.filler] if self.filler else list(self.parts)
        body["messages"][0]["content"] = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_uri(part)}}
            for part in texts
        ]
        return body

    def ask(self, url: str, **options: Any) -> Answer:
        return post(f"{url}/v1/chat/completions", self.body(**options))

    def send(self, url: str, **options: Any) -> HTTPConnection:
        """Nobody waits for the answer."""
        connection = HTTPConnection(url.removeprefix("http://"))
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(self.body(**options)), headers)
        return connection


def squares(family: str, wide: int, high: int, seed: int) -> Image:
    """A picture of `wide * high` tokens."""
    side = PIXELS_PER_TOKEN[family]
    return picture(wide * side, high * side, seed=seed)


def token_ids(family: str, text: str) -> list[int]:
    """By the model's own tokenizer, without the imports that servers need for it."""
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(tiny_model.cached(family) / "tokenizer.json")).encode(text).ids
    return ids


def filler_for(question: Question, rows: int, url: str) -> int:
    """How many fillers make the question exactly so many token rows long, as the server at `url` counts them."""
    base = question.ask(url, max_tokens=1).prompt_tokens
    assert base <= rows, f"the question alone has {base} rows, {rows} were wanted"
    return rows - base


def difference(one: Answer, other: Answer) -> float:
    """The largest difference in log-probability; infinite where the tokens themselves differ."""
    if [token for token, _ in one.logprobs] != [token for token, _ in other.logprobs]:
        return float("inf")
    return max(abs(here - there) for (_, here), (_, there) in zip(one.logprobs, other.logprobs, strict=True))


@dataclass(frozen=True)
class Story:
    """What the language instance logged about one request."""

    rows: int
    rounds: int
    wait_ms: float
    """For the first receive block."""


STORY = re.compile(r"relay room=\d+ status=Success rows=(\d+) rounds=(\d+) bytes=\d+ wait_ms=([\d.]+) ")


def stories(log: str) -> list[Story]:
    return [Story(int(rows), int(rounds), float(wait)) for rows, rounds, wait in STORY.findall(log)]
