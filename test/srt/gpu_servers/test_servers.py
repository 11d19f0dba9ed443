"""A pair on one card says what one undivided server on it says, with rows that fit and rows that resume.

On a card the last bits depend on what else is in a pass, and on what the cache of prefixes has: one server differs from
itself by some 1e-4 there. So an answer must be far nearer to the undivided server's than one to another picture is.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.chat_client import Answer
from embedding_relay.tools.local_cluster import LocalCluster, Options
from embedding_relay.tools.local_process import LocalProcess
from support import servers
from support.questions import Question, squares, stories

UNTIL_READY: Final = 600
POOL: Final = {
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "8",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "32",
}
NEARER: Final = 10
"""Times as near as the answer to another picture."""
LIMIT: Final = 0.05
"""Also where another picture has another first token."""


@dataclass(frozen=True)
class Trio:
    """An undivided server and a pair behind its router, on one card."""

    family: str
    undivided: LocalProcess
    pair: LocalCluster

    def questions(self) -> list[Question]:
        image = partial(squares, self.family)
        return [
            Question("text only", ("tell me something",)),
            Question("fits", (image(2, 3, 1), "what")),
            Question("resumes", (image(20, 20, 4), "what is this")),
            Question("resumes often", (image(30, 32, 6), "what is this")),
            Question("three images", (image(3, 4, 9), "first", image(8, 2, 10), "second", image(7, 7, 11), "all")),
            Question("seen before", (image(20, 20, 4), "what is this")),
        ]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def trio(request: pytest.FixtureRequest, logs: Path) -> Iterator[Trio]:
    more = shlex.split(os.environ.get("RELAY_GPU_ARGUMENTS", ""))
    options = Options(tiny_model.cached(request.param), logs / request.param, "accelerator", more, POOL)
    (undivided,), pair = local_cluster.undivided(options).members, local_cluster.relay(options)
    with servers.running(LocalCluster(pair.url, [[undivided, *pair.members]]), UNTIL_READY):
        yield Trio(request.param, undivided, pair)


def test_same_answers(trio: Trio) -> None:
    asked = trio.questions()
    expected = [question.ask(trio.undivided.url) for question in asked]
    answers = [question.ask(trio.pair.url) for question in asked]
    assert [answer.status for answer in (*expected, *answers)] == [200] * 2 * len(asked), answers
    other = Question("another picture", (squares(trio.family, 20, 20, 5), "what is this")).ask(trio.undivided.url)
    limit = min(LIMIT, first_difference(other, expected[-1]) / NEARER)
    found = {
        question.name: first_difference(one, same) for question, one, same in zip(asked, answers, expected, strict=True)
    }
    print(f"differences in the log-probability of the first token, at most {limit}: {found}")
    assert {name: value for name, value in found.items() if not value < limit} == {}
    first, *others = [story.rounds for story in stories(trio.pair["language"].log_text())][:3]
    assert first == 1, "this one fits"
    assert min(others) > 1, "these do not"


def test_eight_at_once_are_not_mixed_up(trio: Trio) -> None:
    asked = [Question(f"at once {seed}", (squares(trio.family, 7, 9 + seed, 200 + seed), "what")) for seed in range(8)]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda question: question.ask(trio.pair.url), asked))
    alone = [question.ask(trio.undivided.url) for question in asked]
    assert [answer.status for answer in (*together, *alone)] == [200] * 2 * len(asked)
    for number, answer in enumerate(together):
        nearest = min(range(len(alone)), key=lambda other: first_difference(answer, alone[other]))
        assert nearest == number


def first_difference(one: Answer, other: Answer) -> float:
    """In the log-probability of the first token; infinite if it is another one."""
    (token, here), (same, there) = one.logprobs[0], other.logprobs[0]
    return abs(here - there) if token == same else float("inf")
