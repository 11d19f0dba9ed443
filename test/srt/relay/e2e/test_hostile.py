"""What arrives at real servers from whoever likes to: rows that no model may have, and requests that name nonsense."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
import torch

from embedding_relay.config import RelayConfig
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.encode import sessions
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.tools.chat_client import Answer, chat_body, data_uri, post
from embedding_relay.tools.local_cluster import HOST
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender
from support.columns import changed, columns
from support.loopback import wait_until
from support.pairs import CONTEXT, DEADLINE, SMALL, Pair
from support.questions import Question, squares
from support.rows import Forged
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=240, suite="base-c-test-cpu")

pytestmark = pytest.mark.parametrize("pair", [SMALL], ids=[SMALL.name], indirect=True, scope="session")

AT_ONCE: Final = DEADLINE / 2  # too soon for a half that waits for a deadline
WIDTH: Final = 256
ROWS: Final = (-1, *[0] * 40, -1, *[1] * 30, -1)
_rooms = itertools.count(1 << 50)
_contents = itertools.count(1)


@pytest.fixture(autouse=True)
def works_afterwards(pair: Pair) -> Iterator[None]:
    yield
    answer = Question("after", (squares(pair.family, 4, 4, next(_rooms)), "still there?")).ask(pair.url)
    assert answer.status == 200, answer.body


# ---- rows


class ForgedInstance:
    """An encode instance without a model, in this process: it sends what a test made up, to whoever asks for it."""

    def __init__(self) -> None:
        self._registry = MooncakeEmbeddingBootstrapServer(HOST, 0)
        self._registry.start()
        self.port = self._registry.port
        layout = BufferLayout(WIDTH, "bfloat16", deepstack_rows=0, block_size=SMALL.block_size, blocks=64)
        self._manager = EncodeManager.open(
            layout, RelayConfig(transport="tcp"), host=HOST, bootstrap=Address(HOST, self.port)
        )
        self._manager.start()

    def send(self, room: int, rows: Forged) -> Status:
        sender = MooncakeEmbeddingSender(self._manager, room)
        sender.init()
        wait_until(lambda: sender.poll() is not Status.BOOTSTRAPPING, self._manager, DEADLINE)
        sender.send_embedding(rows)
        wait_until(lambda: sender.poll() in (Status.SUCCESS, Status.FAILED), self._manager, DEADLINE)
        return sender.poll()

    def close(self) -> None:
        self._manager.close()
        self._registry.close()


@pytest.fixture(scope="module")
def forger() -> Iterator[ForgedInstance]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "disagreement", lambda encode, language: "")  # it says what its peer wants to hear
        instance = ForgedInstance()
        yield instance
        instance.close()


def made_up(*changes: tuple[str, int, int, int], value: float = 0.5, total: int = len(ROWS)) -> Forged:
    """Two pictures in a text, with these numbers of the columns changed, and this one among the embeddings."""
    good = columns(*ROWS, total=total)
    good.items[good.items[:, 0] >= 0, 3] = next(_contents)  # no two of them meet in the prefix cache
    for change in changes:
        good = changed(good, *change)
    noise = torch.Generator().manual_seed(7)
    segments = []
    for item in (0, 1):
        segments.append((ROWS.index(item), torch.randn(ROWS.count(item), WIDTH, generator=noise).to(torch.bfloat16)))
    segments[-1][1][-1, 0] = value
    return Forged(
        total=good.aux.total,
        fill_ids=torch.from_numpy(good.fill_ids),
        mrope=torch.from_numpy(good.mrope),
        items=torch.from_numpy(good.items),
        segments=segments,
        mrope_delta=good.aux.mrope_delta,
        has_mrope=good.aux.has_mrope,
        media_items=good.aux.media_items,
    )


def ask_with(pair: Pair, forger: ForgedInstance, rows: Forged, **options: Any) -> tuple[Answer, int]:
    room = next(_rooms)
    where = {"bootstrap_host": HOST, "bootstrap_port": forger.port, "bootstrap_room": room}
    body = chat_body([squares(pair.family, 4, 4, 4)], "what", temperature=1.0, seed=3, **where, **options)
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(post, f"{pair['language'].url}/v1/chat/completions", body)
        forger.send(room, rows)
        return answer.result(), room


BEYOND: Final = 2**31 - 1
DAMAGE: Final[dict[str, Forged]] = {
    "modality": made_up(*(("items", row, 1, 999) for row, item in enumerate(ROWS) if item == 0)),
    "a modality that this model lacks": made_up(*(("items", row, 1, 3) for row, item in enumerate(ROWS) if item == 0)),
    "an item that is none": made_up(("items", 5, 0, BEYOND)),
    "an item without rows": made_up(("media_items", 0, 0, 3)),
    "more items than rows": made_up(("media_items", 0, 0, BEYOND)),
    "an item of two contents": made_up(("items", 5, 2, 1)),
    "a token id": made_up(("fill_ids", 0, 0, BEYOND)),
    "a negative token id": made_up(("fill_ids", 5, 0, -7)),
    "a position": made_up(("mrope", 7, 1, CONTEXT)),
    "a negative position": made_up(("mrope", 7, 2, -1)),
    "a next position": made_up(("mrope_delta", 0, 0, CONTEXT)),
    "no positions": made_up(("has_mrope", 0, 0, 0)),
    "no number": made_up(value=math.nan),
    "an infinite number": made_up(value=math.inf),
    "a number too large to add": made_up(value=3e38),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_rows_that_no_model_may_have_cost_one_request(pair: Pair, forger: ForgedInstance, damage: str) -> None:
    answer, room = ask_with(pair, forger, DAMAGE[damage])
    assert answer.status == 502, answer.body
    assert f"encode instance {HOST}:{forger.port} sent rows of room {room} that cannot be used: " in str(answer.body)
    assert answer.seconds < AT_ONCE


# What is let through although no encoder would make it: the model must be able to work with it.
HARMLESS: Final[dict[str, Forged]] = {
    "as it should be": made_up(),
    "the last position": made_up(("mrope", 7, 1, CONTEXT - 1)),
    "no next position but one": made_up(("mrope_delta", 0, 0, CONTEXT - 1 - len(ROWS))),
    "the first next position": made_up(("mrope_delta", 0, 0, -len(ROWS))),
    "a large number": made_up(value=9e29),
    "the longest prompt": made_up(total=CONTEXT - 20),
}


@pytest.mark.parametrize("oddity", HARMLESS)
def test_rows_that_are_only_odd_are_answered(pair: Pair, forger: ForgedInstance, oddity: str) -> None:
    answer, _ = ask_with(pair, forger, HARMLESS[oddity], max_tokens=12, ignore_eos=True)
    assert answer.status == 200, answer.body
    generated = answer.body["usage"]["completion_tokens"]
    assert generated == (1 if oddity == "no next position but one" else 12)
    assert all(math.isfinite(logprob) for _, logprob in answer.logprobs)


# ---- requests

PROMPT: Final = "<|vision_start|><|image_pad|><|vision_end|>what"
PICTURE: Final = data_uri(squares(SMALL.family, 4, 4, 4))
NONSENSE: Final[dict[str, dict[str, Any]]] = {
    "a negative room": {"bootstrap_room": -1},
    "a room of 64 bits": {"bootstrap_room": 1 << 63},
    "a room of many bits": {"bootstrap_room": 1 << 100},
    "a word as room": {"bootstrap_room": "seven"},
    "no rooms": {"bootstrap_room": []},
    "port 0": {"bootstrap_port": 0},
    "port 99999": {"bootstrap_port": 99_999},
    "a word as port": {"bootstrap_port": "http"},
    "no ports": {"bootstrap_port": []},
    "no host": {"bootstrap_host": ""},
    "a host with control characters": {"bootstrap_host": "a\r\nHost: b\0"},
    "a host with a port": {"bootstrap_host": "host:80"},
    "a long host": {"bootstrap_host": "x" * 10_000},
    "a number as host": {"bootstrap_host": 7},
    "no hosts": {"bootstrap_host": []},
}


@pytest.mark.parametrize("half", ["encode", "language"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_requests_that_name_nonsense_are_refused_at_once(pair: Pair, half: str, path: str) -> None:
    answers = {}
    for name, nonsense in NONSENSE.items():
        where = {"bootstrap_host": HOST, "bootstrap_port": 9, "bootstrap_room": next(_rooms)} | nonsense
        chat = chat_body([PICTURE], "what", **where)
        plain = {"text": PROMPT, "image_data": PICTURE, **where}
        answers[name] = post(f"{pair[half].url}{path}", plain if path == "/generate" else chat)
    # Where SGLang knows the type already, the answer is its own.
    others = {name: answer.body for name, answer in answers.items() if answer.status not in (400, 422)}
    assert others == {}
    assert sum(answer.seconds for answer in answers.values()) < AT_ONCE


@pytest.mark.parametrize("half", ["encode", "language"])
def test_a_batch_with_too_few_rooms_is_refused_at_once(pair: Pair, half: str) -> None:
    batch = {"text": [PROMPT] * 2, "image_data": [PICTURE] * 2, "bootstrap_host": HOST, "bootstrap_port": 9}
    few = post(f"{pair[half].url}/generate", {**batch, "bootstrap_room": [next(_rooms)]})
    assert (few.status, "bootstrap_room has 1 values" in str(few.body)) == (400, True), few.body
    room = next(_rooms)
    twice = post(f"{pair[half].url}/generate", {**batch, "bootstrap_room": [room, room]})
    assert (twice.status, "one room for two prompts" in str(twice.body)) == (400, True), twice.body
    assert few.seconds + twice.seconds < AT_ONCE


if __name__ == "__main__":
    run_tests(__file__)
