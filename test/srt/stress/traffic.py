"""The traffic of a soak: what clients ask and do, which answer each of them must get, and what a fault excuses."""

from __future__ import annotations

import collections
import contextlib
import http.client
import itertools
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from embedding_relay.tools.chat_client import Answer, chat_body, picture, post
from embedding_relay.tools.local_cluster import HOST

Tokens = list[tuple[str, float]]

# How far the same token's log-probability may be off: other requests in the batch change the order of sums.
TOLERANCE: Final = 0.02
# By how much the answers to two prompts must differ, so that one given for the other is noticed.
APART: Final = 5 * TOLERANCE
PART_OF_A_CHARACTER: Final = "\N{REPLACEMENT CHARACTER}"
NO_ANSWER_AFTER: Final = 180.0
# What a request may be told when the encode instance stood still for longer than its heartbeats allow.
UNHEALTHY: Final = (502, 503)
EXCUSED: Final = "5xx in a fault"


class WrongAnswer(Exception):
    """An answer that must not be."""


@dataclass(frozen=True)
class Prompt:
    """A question, and what the undisturbed pair answered to it."""

    name: str
    body: dict[str, Any]
    rows: int
    tokens: Tokens

    def check(self, answer: Answer) -> None:
        if answer.prompt_tokens != self.rows:
            raise WrongAnswer(f"{self.name}: {answer.prompt_tokens} rows, not {self.rows}")
        for choice in answer.body["choices"]:
            self.check_tokens(tokens_of(choice))

    def check_tokens(self, tokens: Tokens) -> None:
        if (off := distance(tokens, self.tokens)) > TOLERANCE:
            raise WrongAnswer(f"{self.name}: {tokens}, not {self.tokens}: off by {off}")


def tokens_of(choice: Any) -> Tokens:
    return [(token["token"], token["logprob"]) for token in (choice["logprobs"] or {}).get("content") or ()]


def distance(one: Tokens, other: Tokens) -> float:
    if [token for token, _ in one] != [token for token, _ in other]:
        return float("inf")
    return max((abs(here - there) for (_, here), (_, there) in zip(one, other, strict=True)), default=float("inf"))


# ---- prompts


def bodies(side: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Endlessly, in turn: a text, a picture, many small pictures. `side`: the pixels of one token."""
    for seed in itertools.count():
        for name, pictures, squares in (("text", 0, 0), ("image", 1, 8), ("images", 10, 6)):
            images = [picture(squares * side, squares * side, seed=100 * seed + i) for i in range(pictures)]
            yield f"{name}-{seed}", chat_body(images, f"what is number {seed}", max_tokens=4, top_logprobs=2)


def learn_prompts(url: str, side: int, *, of_each: int) -> dict[str, list[Prompt]]:
    """Ask one by one. Kept are prompts whose tokens no rounding can change, and whose answers are nobody else's.

    And whose tokens all show in a stream: SGLang sends no event, and no log-probability, for a part of a character.
    """
    known: dict[str, list[Prompt]] = collections.defaultdict(list)
    for name, body in itertools.islice(bodies(side), 30 * of_each):
        kind = name.partition("-")[0]
        if len(known[kind]) == of_each:
            continue
        answer = post(f"{url}/v1/chat/completions", body)
        if not answer.ok:
            raise SystemExit(f"{name}: status {answer.status}: {answer.body}")
        choice = answer.body["choices"][0]
        prompt = Prompt(name, body, answer.prompt_tokens, tokens_of(choice))
        others = [other.tokens for prompts in known.values() for other in prompts]
        told_apart = margin(choice) > APART and all(distance(prompt.tokens, other) > APART for other in others)
        if told_apart and not any(PART_OF_A_CHARACTER in token for token, _ in prompt.tokens):
            known[kind].append(prompt)
        if len(known) == 3 and all(len(prompts) == of_each for prompts in known.values()):
            return known
    raise SystemExit("too few prompts whose answers can be told apart")


def margin(choice: Any) -> float:
    """How far the second best token was behind, at the closest."""
    best_two = ([top["logprob"] for top in token["top_logprobs"]] for token in choice["logprobs"]["content"])
    return min(float(best - second) for best, second, *_ in best_two)


# ---- faults


class Disturbances:
    """When the encode instance stood still for too long. A request of that time may fail, if the error says so."""

    # A request that comes right after may still meet the last of it.
    AFTERWARDS: Final = 3.0

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        with self._lock:
            self._spans.append((time.monotonic(), float("inf")))
        try:
            yield
        finally:
            with self._lock:
                self._spans[-1] = (self._spans[-1][0], time.monotonic() + self.AFTERWARDS)

    def met(self, began: float) -> bool:
        """Whether a request that began then, and has ended now, may have met one."""
        with self._lock:
            return any(began <= until for _, until in self._spans)


# ---- clients


@dataclass(frozen=True)
class Target:
    router: str
    encode: str
    language: str
    bootstrap_port: int


class Clients:
    """Threads that ask, each one thing after the other, until they are told to stop."""

    def __init__(
        self, target: Target, prompts: dict[str, list[Prompt]], count: int, seed: str, disturbances: Disturbances
    ) -> None:
        self.target = target
        self.prompts = prompts
        self.usual_s = 1.0
        """How long an answer takes these days."""
        self.outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
        self.wrong: list[str] = []
        self._disturbances = disturbances
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(random.Random(f"{seed} {number}"),)) for number in range(count)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask nothing new, and wait for the answers that are still to come."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    @property
    def asked(self) -> int:
        return sum(self.outcomes.values())

    def _ask_on(self, dice: random.Random) -> None:
        first = dice.sample(list(ACTIONS), len(ACTIONS))  # a short run should not lack anything
        weights = [weight for weight, _ in ACTIONS.values()]
        while not self._stopped.is_set():
            name = first.pop() if first else dice.choices(list(ACTIONS), weights)[0]
            began = time.monotonic()
            try:
                outcome = ACTIONS[name][1](self, dice)
            except WrongAnswer as problem:
                outcome = self._judge(name, str(problem), began)
            except (OSError, http.client.HTTPException) as problem:
                outcome = self._judge(name, f"no answer: {problem!r}", began)
            except Exception as problem:  # the top of a thread: a client that died must not look like one that is done
                outcome = self._judge(name, f"not understood: {problem!r}", began)
            with self._lock:
                self.outcomes[name, outcome] += 1
                if outcome == "200":
                    self.usual_s += 0.1 * (time.monotonic() - began - self.usual_s)

    def _judge(self, name: str, problem: str, began: float) -> str:
        with self._lock:
            self.wrong.append(f"{name}, {time.monotonic() - began:.1f} s: {problem}")
        return "WRONG"

    def expect(self, answer: Answer, statuses: Sequence[int], *words: str) -> str:
        """One of these statuses and all of these words, or the excuse of a fault meanwhile."""
        if answer.status in statuses and all(word in str(answer.body) for word in words):
            return str(answer.status)
        if answer.status in UNHEALTHY and self.may_fail(time.monotonic() - answer.seconds):
            return EXCUSED
        raise WrongAnswer(f"status {answer.status}, not {statuses}: {str(answer.body)[:300]}")

    def may_fail(self, began: float) -> bool:
        return self._disturbances.met(began)


def ask(url: str, body: dict[str, Any]) -> Answer:
    return post(f"{url}/v1/chat/completions", body, timeout=NO_ANSWER_AFTER)


def burst(url: str, prompt: Prompt, count: int) -> None:
    """All at once, whatever the answers: a pool that starts a thread when all of its are busy has them from here on."""
    threads = [threading.Thread(target=ask, args=(url, prompt.body)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def ask_right(kind: str, **options: Any) -> Callable[[Clients, random.Random], str]:
    def action(clients: Clients, dice: random.Random) -> str:
        prompt = dice.choice(clients.prompts[kind])
        answer = ask(clients.target.router, prompt.body | options)
        outcome = clients.expect(answer, [200])
        if answer.ok:
            prompt.check(answer)
        return outcome

    return action


def ask_with_broken_image(clients: Clients, dice: random.Random) -> str:
    body = chat_body(["data:image/png;base64,AAAA"], "what is this")
    return clients.expect(ask(clients.target.router, body), [400], "image")


def ask_one_half(clients: Clients, dice: random.Random) -> str:
    """The other half of this request does not exist; who gives up first says so."""
    room = dice.getrandbits(62)
    where = {"bootstrap_host": HOST, "bootstrap_port": clients.target.bootstrap_port, "bootstrap_room": room}
    url = dice.choice((clients.target.encode, clients.target.language))
    body = dice.choice(clients.prompts["image"]).body
    return clients.expect(ask(url, body | where), UNHEALTHY, f"room {room}")


def read_stream(clients: Clients, dice: random.Random) -> str:
    prompt = dice.choice(clients.prompts["images"])
    return _stream(clients, prompt, NO_ANSWER_AFTER)


def hang_up(clients: Clients, dice: random.Random) -> str:
    """In the middle of a stream, or before its first word; by chance after its last."""
    prompt = dice.choice(clients.prompts[dice.choice(("text", "image", "images"))])
    return _stream(clients, prompt, dice.uniform(0.0, 2 * clients.usual_s), max_tokens=32)


def _stream(clients: Clients, prompt: Prompt, patience: float, **options: Any) -> str:
    began = time.monotonic()
    body = json.dumps(prompt.body | {"stream": True} | options).encode()
    url = f"{clients.target.router}/v1/chat/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    tokens: Tokens = []
    try:
        with contextlib.closing(urllib.request.urlopen(request, timeout=max(patience, 0.001))) as reply:
            for line in reply:
                if line.strip() == b"data: [DONE]":
                    prompt.check_tokens(tokens[: len(prompt.tokens)])
                    return "200"
                if line.startswith(b"data: "):
                    tokens += _tokens_of_event(json.loads(line[6:]), clients, began)
                if time.monotonic() - began > patience:
                    return "hung up"
    except urllib.error.HTTPError as refusal:
        with refusal:
            answer = Answer(refusal.code, refusal.read().decode(errors="replace"), time.monotonic() - began)
        return clients.expect(answer, [200])
    except TimeoutError:
        if patience < NO_ANSWER_AFTER:
            return "hung up"
        raise
    except _ExcusedInStream:
        return EXCUSED
    if clients.may_fail(began):
        return "cut in a fault"
    raise WrongAnswer(f"{prompt.name}: the stream ended after {tokens}")


class _ExcusedInStream(Exception):
    """The status line was sent before the fault: the reason comes as an event."""


def _tokens_of_event(event: Any, clients: Clients, began: float) -> Tokens:
    if "error" in event:
        if event["error"].get("code") in UNHEALTHY and clients.may_fail(began):
            raise _ExcusedInStream
        raise WrongAnswer(f"an error in the stream: {event['error']}")
    return [token for choice in event["choices"] if choice.get("logprobs") for token in tokens_of(choice)]


ACTIONS: Final[dict[str, tuple[int, Callable[[Clients, random.Random], str]]]] = {
    "text": (4, ask_right("text")),
    "image": (6, ask_right("image")),
    "images": (3, ask_right("images")),
    "two samples": (2, ask_right("image", n=2)),
    "stream": (2, read_stream),
    "hang up": (4, hang_up),
    "broken image": (2, ask_with_broken_image),
    "one half": (1, ask_one_half),
}


def outcomes_table(outcomes: collections.Counter[tuple[str, str]]) -> Sequence[str]:
    lines = []
    for name in ACTIONS:
        found = {outcome: count for (action, outcome), count in sorted(outcomes.items()) if action == name}
        lines.append(f"{name:<14} " + ", ".join(f"{outcome}: {count}" for outcome, count in found.items()))
    return lines
