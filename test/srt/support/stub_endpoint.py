"""An OpenAI-compatible endpoint without a model, in a process of its own: it answers at once, or as it was told to.

    with stub_endpoint(tmp_path) as stub:         # stub.url; also by hand: python -m support.stub_endpoint --port 8000
        stub.next(2, status=503, retry_after=1)   # the next two questions are answered so, whoever asks them
        stub.next(None, "cat", status=400)        # every question whose prompt matches this regular expression
        stub.counts()                             # {prompt: how often it was asked}
        answer_to("a prompt", ["http://…"])       # what it answers to it: each row can be checked

A rule may have `status` with `message`, `retry_after` and `location`; `body`, any JSON that is sent instead; `text`,
sent instead as it is; `delay` in seconds; `connection`: "drop" (closed without an answer), "cut" (in the middle of one)
or "die" (the whole process ends, as in a crash). Rules are tried in order; one with a number of times goes when it is
used up. `stub.capacity(8)`: more in flight than that is answered 503. `stub.kill()`, `stub.start()`: the same port
again, nothing remembered. `stub.seen()` tells all that it knows, `stub.forget()` makes it new.

What it does not reproduce: tokens (usage counts words), templates, limits of length, streams, the time a model takes.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import re
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from embedding_relay.tools.local_process import LocalProcess, free_ports, wait_all_ready

MODEL = "stub"
CONTROL = "/control"


def answer_to(prompt: str, images: Sequence[str] = ()) -> str:
    digest = hashlib.sha256("\n".join([prompt, *images]).encode()).hexdigest()
    return f"{digest[:12]} {len(images)} {prompt}"


# ---- the server


class Rule:
    def __init__(self, *, match: str = "", times: int | None = None, **effects: Any) -> None:
        self.pattern = re.compile(match, re.DOTALL)
        self.left = times
        self.effects = effects


class Stub:
    def __init__(self, capacity: int | None = None, delay: float = 0.0) -> None:
        self._numbers = itertools.count(1)
        self._in_flight = 0
        self._be_new(capacity, delay)

    def _be_new(self, capacity: int | None = None, delay: float = 0.0) -> None:
        self._capacity = capacity
        self._delay = delay
        self._health = 200
        self._rules: list[Rule] = []
        self._asked: Counter[str] = Counter()
        self._most_in_flight = 0
        self._last_headers: dict[str, str] = {}
        self._last_body: Any = None

    def application(self) -> web.Application:
        application = web.Application(client_max_size=256 * 2**20)
        application.router.add_get("/health", self.health)
        application.router.add_get("/v1/models", self.models)
        application.router.add_post("/v1/chat/completions", self.chat)
        application.router.add_post("/v1/completions", self.chat)
        application.router.add_get(CONTROL, self.tell)
        application.router.add_post(CONTROL, self.control)
        application.router.add_delete(CONTROL, self.forget)
        return application

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response(status=self._health)

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt, images = _question(body["messages"]) if "messages" in body else (body["prompt"], [])
        self._asked[prompt] += 1
        self._last_headers, self._last_body = dict(request.headers), body
        self._in_flight += 1
        self._most_in_flight = max(self._most_in_flight, self._in_flight)
        try:
            return await self._answer(request, body, prompt, images)
        finally:
            self._in_flight -= 1

    async def _answer(
        self, request: web.Request, body: dict[str, Any], prompt: str, images: Sequence[str]
    ) -> web.StreamResponse:
        if self._capacity is not None and self._in_flight > self._capacity:
            return web.json_response({"error": {"message": "too many requests in flight"}}, status=503)
        effects = self._effects(prompt)
        if delay := effects.get("delay", self._delay):
            await asyncio.sleep(delay)
        if connection := effects.get("connection"):
            return await _break(request, connection)
        status, headers = effects.get("status", 200), _headers(effects)
        if "text" in effects:
            return web.Response(text=effects["text"], status=status, headers=headers)
        if "body" in effects:
            return web.json_response(effects["body"], status=status, headers=headers)
        if status != 200:
            message = effects.get("message", f"told to answer {status}")
            return web.json_response({"error": {"message": message}}, status=status, headers=headers)
        return web.json_response(self._completion(body, prompt, images))

    def _effects(self, prompt: str) -> dict[str, Any]:
        for rule in self._rules:
            if rule.pattern.search(prompt):
                if rule.left is not None:
                    rule.left -= 1
                    if not rule.left:
                        self._rules.remove(rule)
                return rule.effects
        return {}

    def _completion(self, body: dict[str, Any], prompt: str, images: Sequence[str]) -> dict[str, Any]:
        answer = answer_to(prompt, images)
        said = {"message": {"role": "assistant", "content": answer}} if "messages" in body else {"text": answer}
        words = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(answer.split())}
        return {
            "id": f"stub-{next(self._numbers)}",
            "object": "chat.completion",
            "created": 0,
            "model": body.get("model"),
            "choices": [{"index": 0, **said, "finish_reason": "stop"}],
            "usage": words | {"total_tokens": sum(words.values())},
        }

    async def tell(self, _request: web.Request) -> web.Response:
        return web.json_response(
            {
                "asked": self._asked,
                "in_flight": self._in_flight,
                "most_in_flight": self._most_in_flight,
                "last_headers": self._last_headers,
                "last_body": self._last_body,
            }
        )

    async def control(self, request: web.Request) -> web.Response:
        """One of {"rule": {…}}, {"capacity": n or null}, {"delay": seconds}, {"health": status}."""
        for verb, value in (await request.json()).items():
            match verb:
                case "rule":
                    self._rules.append(Rule(**value))
                case "capacity":
                    self._capacity = value
                case "delay":
                    self._delay = value
                case "health":
                    self._health = value
                case _:
                    raise web.HTTPBadRequest(text=f"there is no verb {verb!r}")
        return web.json_response({})

    async def forget(self, _request: web.Request) -> web.Response:
        self._be_new()
        return web.json_response({})


def _question(messages: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """The text of the last message, and its pictures."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content, []
    text = "".join(part["text"] for part in content if part["type"] == "text")
    return text, [part["image_url"]["url"] for part in content if part["type"] == "image_url"]


def _headers(effects: dict[str, Any]) -> dict[str, str]:
    names = {"retry_after": "Retry-After", "location": "Location"}
    return {header: str(effects[name]) for name, header in names.items() if name in effects}


async def _break(request: web.Request, connection: str) -> web.StreamResponse:
    if connection == "die":
        os._exit(1)
    response = web.StreamResponse()
    if connection == "cut":
        response.content_length = 1000
        await response.prepare(request)
        await response.write(b'{"choices": [')
    assert request.transport is not None
    request.transport.close()
    return response


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--delay", type=float, default=0.0)
    options = parser.parse_args()
    stub = Stub(options.capacity, options.delay)
    web.run_app(
        stub.application(),
        host=options.host,
        port=options.port,
        print=None,
        access_log=None,
        # Who has hung up waits for nothing: a real server aborts such a request too.
        handler_cancellation=True,
    )


# ---- for tests


class StubEndpoint:
    def __init__(self, log: Path, port: int | None = None) -> None:
        if port is None:
            (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "support.stub_endpoint", "--port", str(port)]
        path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        self._process = LocalProcess("stub", command, self.url, log, path)

    def start(self, seconds: float = 30.0) -> None:
        self._process.start()
        wait_all_ready([self._process], seconds)

    def kill(self) -> None:
        self._process.kill_group()
        self._process.reap()

    def next(self, times: int | None, match: str = "", **effects: Any) -> None:
        """`times` None is always."""
        self._call("POST", {"rule": {"times": times, "match": match, **effects}})

    def capacity(self, most: int | None) -> None:
        self._call("POST", {"capacity": most})

    def delay(self, seconds: float) -> None:
        self._call("POST", {"delay": seconds})

    def health(self, status: int) -> None:
        self._call("POST", {"health": status})

    def forget(self) -> None:
        self._call("DELETE")

    def seen(self) -> dict[str, Any]:
        """All that it knows: asked, in_flight, most_in_flight, last_headers, last_body."""
        seen: dict[str, Any] = self._call("GET")
        return seen

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.seen()["asked"]
        return counts

    def _call(self, method: str, body: object = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + CONTROL, content, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())


@contextmanager
def stub_endpoint(logs: Path) -> Iterator[StubEndpoint]:
    stub = StubEndpoint(logs / "stub.log")
    try:
        stub.start()
        yield stub
    finally:
        stub.kill()


if __name__ == "__main__":
    main()
