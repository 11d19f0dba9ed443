"""Rows that travel as they are made, and a prefill that begins on them: the answers, and what may come in between.

A tower that has a picture to itself sums up in another order than one that has several, and so does a prefill in two
parts. These servers compute in float32, where that is a hundredth of what another picture would make of an answer. In
bfloat16 it is as much: docs/rows-as-they-are-made.md says why both settings are off by default.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedding_relay.config import PREFIX_PREFILL, PROGRESSIVE
from embedding_relay.recorder import PREFIX_BEGAN, TOWER_BEGAN
from embedding_relay.tools import local_cluster, trace_ask
from embedding_relay.tools.chat_client import post
from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_process import LocalProcess, free_ports
from support import servers
from support.pairs import REPORT, Pair, Settings
from support.patience import wait_until
from support.questions import Question, difference, squares
from support.server_numbers import numbers_of
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=90, suite="base-c-test-cpu")

# The family with deepstack. Its blocks are few, so that the groups of a request come in several rounds as well.
AS_MADE = Settings(
    *("qwen3_vl", 32, 8, 64),
    arguments=(*REPORT, "--dtype", "float32"),
    environ=((PROGRESSIVE, "1"), (PREFIX_PREFILL, "1")),
)
# More than the tokens of a group on a CPU: each picture is a group.
WIDE, HIGH = 12, 12
HALVES = ("encode", "language")
TOLERANCE = 1e-4

seeds = itertools.count(9000)

pytestmark = pytest.mark.parametrize("pair", [AS_MADE], ids=["as-made"], indirect=True, scope="session")


def about(pictures: int) -> Question:
    """The text in front is this question's own: no server finds a beginning of it in its radix cache."""
    number = next(seeds)
    images = [squares(AS_MADE.family, WIDE, HIGH + at, 100 * number + at) for at in range(pictures)]
    between = [part for at, image in enumerate(images) for part in (image, f"and picture {at + 1}")]
    return Question(f"about {pictures}", (f"{number}: compare these", *between, "which is the darkest"))


@pytest.fixture(scope="module")
def undivided(logs: Path) -> Iterator[LocalProcess]:
    """A server of this module's own, because it computes as its pair does."""
    server = local_cluster.sglang_server("undivided-float32", AS_MADE.undivided(logs), *free_ports(1))
    with servers.running(LocalCluster("", [[server]])):
        yield server


def moments_of_the_last(pair: Pair) -> Counter[str]:
    """How often each thing happened to the latest request, on either half."""
    urls = [pair[half].url for half in HALVES]
    (room,) = trace_ask.latest(urls, 1, None, silent := {})
    told = trace_ask.ask_all(urls, [room])
    assert not silent
    return Counter(moment.what for one in told for request in one.requests for moment in request.moments)


@pytest.mark.parametrize("pictures", [1, 3, 8])
def test_the_answer_is_that_of_an_undivided_server(undivided: LocalProcess, pair: Pair, pictures: int) -> None:
    question = about(pictures)
    answer = question.ask(pair.url)
    there = question.ask(undivided.url)
    happened = moments_of_the_last(pair)
    print(f"{pictures} pictures: {difference(answer, there):.1e}, {dict(happened)}")
    assert difference(answer, there) < TOLERANCE
    assert answer.prompt_tokens == there.prompt_tokens
    assert difference(answer, about(pictures).ask(pair.url)) > TOLERANCE, "other pictures would not be noticed"
    assert happened[TOWER_BEGAN] == pictures, "each picture is a group"
    assert happened[PREFIX_BEGAN] > 0 or pictures < 8


def test_several_samples_share_the_prefixes_of_one_prompt(pair: Pair) -> None:
    """SGLang takes several samples of a prompt with one picture only. The text behind it comes in later rounds."""
    question = Question("samples", (*about(1).parts[:2], "what"), filler=600)
    answer = question.ask(pair.url, n=3)
    assert answer.status == 200, answer.body
    assert moments_of_the_last(pair)[PREFIX_BEGAN] > 0
    one = question.ask(pair.url)
    assert [choice["message"]["content"] for choice in answer.body["choices"]] == [one.text] * 3


def test_requests_that_take_turns_have_the_answers_that_they_have_alone(undivided: LocalProcess, pair: Pair) -> None:
    questions = [about(pictures) for pictures in (4, 1, 3, 2, 1, 4)]
    with ThreadPoolExecutor(len(questions)) as clients:
        answers = list(clients.map(lambda question: question.ask(pair.url), questions))
    assert [answer.status for answer in answers] == [200] * len(answers), [answer.body for answer in answers]
    differences = [
        difference(answer, question.ask(undivided.url)) for question, answer in zip(questions, answers, strict=True)
    ]
    assert max(differences) < TOLERANCE, differences


def test_pictures_that_were_seen_before_stand_among_new_ones(undivided: LocalProcess, pair: Pair) -> None:
    """The language instance has rows of some and not of others."""
    known, new = about(3), about(3)
    assert known.ask(pair.url).ok
    towers = numbers_of(pair["encode"])["encoded_items_total"]
    parts = ("mixed", *itertools.chain(*zip(known.parts[1:-1:2], new.parts[1:-1:2], strict=True)), "which is which")
    mixed = Question("mixed", parts)
    answer = mixed.ask(pair.url)
    assert difference(answer, mixed.ask(undivided.url)) < TOLERANCE
    assert numbers_of(pair["encode"])["encoded_items_total"] - towers == 3


def test_a_cache_that_is_flushed_in_the_middle_costs_time_and_nothing_else(undivided: LocalProcess, pair: Pair) -> None:
    """It is asked for all the time. SGLang refuses while it computes; between two prefixes it does not."""
    question = about(8)
    begun = numbers_of(pair["language"])["prefix_prefills_total"]
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(question.ask, pair.url)
        wait_until(lambda: numbers_of(pair["language"])["prefix_prefills_total"] > begun)
        while not asked.done():
            post(f"{pair['language'].url}/flush_cache", None)
        answer = asked.result()
    assert answer.status == 200, answer.body
    assert difference(answer, question.ask(undivided.url)) < TOLERANCE


def test_clients_that_leave_in_the_middle_leave_nothing(undivided: LocalProcess, pair: Pair) -> None:
    begun = numbers_of(pair["language"])["prefix_prefills_total"]
    clients = [about(6).send(pair.url) for _ in range(4)]
    wait_until(lambda: numbers_of(pair["language"])["prefix_prefills_total"] > begun)
    for client in clients:
        client.close()
    pair.wait_until_at_rest()
    question = about(3)
    assert difference(question.ask(pair.url), question.ask(undivided.url)) < TOLERANCE


if __name__ == "__main__":
    run_tests(__file__)
