"""The pair behind the router says what one undivided server says: same tokens, same log-probabilities."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from embedding_relay.tools import local_cluster
from embedding_relay.tools.chat_client import Answer
from embedding_relay.tools.local_cluster import LocalCluster
from support import servers
from support.questions import TOLERANCE, Question, difference, filler_for, squares, stories

DEFAULT = 256  # of the roomy pair; a multiple of both block sizes

# Reported so that a prefix hit can be asked for.
REPORT = "--enable-cache-report"


@dataclass(frozen=True)
class Buffers:
    """The settings of one pair."""

    block_size: int
    blocks: int
    default: int

    def environ(self) -> dict[str, str]:
        return {
            "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": str(self.block_size),
            "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": str(self.blocks),
            "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": str(self.default),
        }


ROOMY = Buffers(block_size=128, blocks=64, default=DEFAULT)
TINY = Buffers(block_size=16, blocks=4, default=16)  # so small that every request with an image resumes

# The roomy pair of the daily run has the wider rows, those with deepstack; three of its questions resume all the same.
DAILY = {"qwen2_5_vl-tiny": ("qwen2_5_vl", TINY), "qwen3_vl-roomy": ("qwen3_vl", ROOMY)}
EVERY = DAILY | {"qwen2_5_vl-roomy": ("qwen2_5_vl", ROOMY), "qwen3_vl-tiny": ("qwen3_vl", TINY)}
PAIRS = EVERY if os.environ.get("RELAY_EVERY_PAIR") else DAILY

pytestmark = pytest.mark.parametrize(
    ("family", "buffers"), PAIRS.values(), ids=PAIRS.keys(), indirect=True, scope="module"
)


def questions(family: str, url: str) -> list[Question]:
    """Cold first, so that every server meets each picture for the first time in the same place."""
    image = partial(squares, family)

    def sized(name: str, wide: int, high: int, seed: int, rows: int) -> Question:
        ruler = Question(name, (image(wide, high, -seed), "what is this"))  # the same size, but not the same picture
        return Question(name, (image(wide, high, seed), "what is this"), filler_for(ruler, rows, url))

    return [
        Question("text only", ("tell me something",)),
        Question("below one block", (image(2, 3, 1), "what")),
        sized("exactly the default", 12, 12, 2, DEFAULT),
        sized("one more than the default", 12, 12, 3, DEFAULT + 1),
        Question("two rounds", (image(20, 20, 4), "what is this")),
        Question("three rounds", (image(22, 28, 5), "what is this")),
        Question("twenty rounds of the tiny pair", (image(30, 32, 6), "what is this")),
        Question("two adjacent images", (image(5, 5, 7), image(5, 5, 8), "compare")),
        Question(
            "five images with text between",
            (
                image(3, 4, 9), "first", image(8, 2, 10), "second", image(2, 2, 11), "third",
                image(7, 7, 12), "fourth", image(4, 9, 13), "compare them all",
            ),
        ),
        Question("same image twice in one prompt", (image(6, 6, 14), "and", image(6, 6, 14), "equal?")),
        Question("an image seen before", (image(20, 20, 4), "what is this")),
    ]  # fmt: skip


@dataclass(frozen=True)
class Reference:
    questions: list[Question]
    answers: list[Answer]
    other_image: float


@pytest.fixture(scope="module")
def reference(family: str, model: Path, logs: Path) -> Reference:
    with servers.running(
        local_cluster.undivided(servers.options(model, logs / family / "undivided", REPORT))
    ) as server:
        asked = questions(family, server.url)
        answers = [question.ask(server.url) for question in asked]
        one, other = (
            Question("control", (squares(family, 20, 20, seed), "what is this")).ask(server.url) for seed in (100, 101)
        )
    return Reference(asked, answers, difference(one, other))


@pytest.fixture(scope="module")
def buffers(request: pytest.FixtureRequest) -> Buffers:
    found: Buffers = request.param
    return found


@pytest.fixture(scope="module")
def pair(reference: Reference, buffers: Buffers, family: str, model: Path, logs: Path) -> Iterator[LocalCluster]:
    where = logs / family / f"pair-{buffers.block_size}"
    with servers.running(local_cluster.relay(servers.options(model, where, REPORT, **buffers.environ()))) as cluster:
        yield cluster


def test_same_answers(reference: Reference, pair: LocalCluster, buffers: Buffers) -> None:
    assert reference.other_image >= 20 * TOLERANCE, "another image would not be noticed"
    answers = [question.ask(pair.url) for question in reference.questions]
    assert [answer.status for answer in answers] == [200] * len(answers), [answer.body for answer in answers]
    differences = {
        question.name: difference(answer, expected)
        for question, answer, expected in zip(reference.questions, answers, reference.answers, strict=True)
    }
    print(f"largest difference in log-probability: {max(differences.values())}")
    assert {name: value for name, value in differences.items() if value > TOLERANCE} == {}
    assert [answer.prompt_tokens for answer in answers] == [answer.prompt_tokens for answer in reference.answers]
    _the_last_one_hits_the_prefix_cache(answers[-1])
    _rounds_are_as_many_as_the_rule_says(reference, pair, buffers)
    _streamed_equals_whole(reference, pair)


def _the_last_one_hits_the_prefix_cache(answer: Answer) -> None:
    cached = answer.body["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= answer.prompt_tokens - 1, f"{cached} of {answer.prompt_tokens} tokens came from the cache"


def _rounds_are_as_many_as_the_rule_says(reference: Reference, pair: LocalCluster, buffers: Buffers) -> None:
    told = stories(pair["language"].log_text())
    lengths = [answer.prompt_tokens for answer in reference.answers]
    assert lengths[2:4] == [DEFAULT, DEFAULT + 1]
    assert [story.rows for story in told] == lengths[1:], "one transfer per question with an image, of its true length"
    first = buffers.default
    # At a resume a request may take more blocks, but never the last free one.
    later = max(first, (buffers.blocks - 1) * buffers.block_size)
    for story in told:
        assert story.rounds == 1 + math.ceil(max(0, story.rows - first) / later), story
    if buffers is TINY:
        assert min(story.rounds for story in told) > 1
    print(f"rounds of the longest request: {max(story.rounds for story in told)}")


def _streamed_equals_whole(reference: Reference, pair: LocalCluster) -> None:
    answer = reference.questions[-1].ask(pair.url, stream=True)
    assert answer.status == 200
    assert streamed_text(answer) == reference.answers[-1].text


def streamed_text(answer: Answer) -> str:
    chunks = [line.removeprefix("data: ") for line in str(answer.body).splitlines() if line.startswith("data: {")]
    deltas = [json.loads(chunk)["choices"] for chunk in chunks]
    return "".join(choice["delta"].get("content") or "" for choices in deltas for choice in choices)


def test_eight_at_once(reference: Reference, pair: LocalCluster, family: str, buffers: Buffers) -> None:
    """In the tiny pair eight requests of two to four rounds share four blocks."""
    asked = [Question(f"at once {seed}", (squares(family, 7, 9 + seed, 200 + seed), "what")) for seed in range(8)]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda question: question.ask(pair.url), asked))
    assert [answer.status for answer in together] == [200] * len(asked), [answer.body for answer in together]
    alone = [question.ask(pair.url) for question in asked]
    for one, other in zip(together, alone, strict=True):
        assert [token for token, _ in one.logprobs] == [token for token, _ in other.logprobs]


def test_three_samples_of_one_prompt(pair: LocalCluster, family: str) -> None:
    question = Question("three samples", (squares(family, 9, 9, 300), "what"))
    answer = question.ask(pair.url, n=3)
    assert answer.status == 200, answer.body
    one = question.ask(pair.url)
    assert [choice["message"]["content"] for choice in answer.body["choices"]] == [one.text] * 3
