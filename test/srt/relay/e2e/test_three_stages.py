"""Encode, prefill, decode: SGLang's own prefill/decode disaggregation behind our first stage, and its router before it.

The third stage is stock SGLang. Beside the three stages runs a language instance that knows the same encode instances
and needs no router; in front of it is one that does not pair, as in front of any server.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from embedding_relay.tools import local_cluster
from embedding_relay.tools.chat_client import Answer, post
from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_process import LocalProcess, free_ports, silent, wait_all_ready
from support import servers
from support.pairs import CHUNK, DEADLINE, REPORT, SMALL
from support.patience import wait_until
from support.questions import TOLERANCE, Question, difference, squares, stories
from support.server_numbers import not_at_rest, numbers_of
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=60, suite="base-c-test-cpu")

# As the small pair; of the scheduler's flags only the one that changes what is computed.
STAGES = dataclasses.replace(SMALL, arguments=(*REPORT, "--chunked-prefill-size", str(CHUNK)), adapter=False)
ENCODE = ("encode", "encode-1")
GENERATING = ("prefill", "language")
PLAIN = "plain-router"


@pytest.fixture(scope="module")
def cluster(logs: Path) -> Iterator[LocalCluster]:
    options = STAGES.options(logs / "stages")
    stages = local_cluster.three_stages(options, encode_instances=len(ENCODE))
    knows = ("--encoder-urls", *(stages[name].url for name in ENCODE))
    port, plain_port = free_ports(2)
    alone = local_cluster.sglang_server("language", options, port, "--disaggregation-mode", "language", *knows)
    plain = local_cluster.plain_router(options, plain_port, [alone.url])
    stages.stages = [[*stages.stages[0], alone], [*stages.stages[1], plain]]
    with servers.running(stages) as running:
        yield running


def entrance(cluster: LocalCluster, name: str) -> str:
    """Where clients ask for tokens of the prefill instance or of the language instance that needs no router."""
    return cluster.url if name == "prefill" else cluster[name].url


def question(name: str, *sizes: tuple[int, int], seed: int = 1) -> Question:
    pictures = [squares(STAGES.family, wide, high, seed + at) for at, (wide, high) in enumerate(sizes)]
    return Question(name, (*pictures, f"what is this {name}"))


@pytest.mark.parametrize("name", GENERATING)
def test_tokens_are_those_of_an_undivided_server(
    name: str, cluster: LocalCluster, undivided: dict[str, LocalProcess]
) -> None:
    whole = undivided[STAGES.family].url
    asked = [question("text"), question("one", (3, 2)), question("two", (4, 4), (5, 3)), question("long", (20, 18))]
    for one in asked:
        answer = one.ask(entrance(cluster, name))
        assert answer.ok, (one.name, answer.body)
        assert difference(answer, one.ask(whole)) < TOLERANCE, one.name
    told = stories(cluster[name].log_text())
    assert [story.rounds for story in told] == [STAGES.rounds(story.rows) for story in told]
    assert max(story.rounds for story in told) > 2
    assert len(told) == len(asked) - 1


@pytest.mark.parametrize("name", GENERATING)
def test_many_at_once_share_a_pool_that_is_too_small(
    name: str, cluster: LocalCluster, undivided: dict[str, LocalProcess]
) -> None:
    asked = [question(f"number {seed}", (3 + seed % 3, 3), seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: one.ask(entrance(cluster, name)), asked))
    for one, answer in zip(asked, answers, strict=True):
        assert answer.ok, answer.body
        assert difference(answer, one.ask(undivided[STAGES.family].url)) < TOLERANCE
    assert all("status=Success" in cluster[instance].log_text() for instance in ENCODE), "they take turns"


def test_samples_share_the_rows_of_their_prompt(cluster: LocalCluster) -> None:
    before = len(stories(cluster["language"].log_text()))
    answer = question("samples", (4, 3), seed=40).ask(cluster["language"].url, n=2, max_tokens=4)
    assert answer.ok, answer.body
    assert len(answer.body["choices"]) == 2
    assert len(stories(cluster["language"].log_text())) == before + 1


def test_samples_that_sglangs_two_stages_do_not_answer_are_refused_at_once(cluster: LocalCluster) -> None:
    """SGLang uses one room for all samples. Text with several is not answered by these stages either."""
    several = question("samples", (4, 3), seed=40)
    started = time.monotonic()
    answer = several.ask(cluster.url, n=2, max_tokens=4)
    assert answer.status == 500, answer.body  # the decode instance's: it has no other for what it hears from the first
    assert "several samples" in str(answer.body)
    assert time.monotonic() - started < DEADLINE, "a half has waited for its deadline"
    answer = several.ask(cluster["prefill"].url, n=2, max_tokens=4, bootstrap_room=1, bootstrap_host="127.0.0.1")
    assert answer.status == 400, answer.body


@pytest.mark.parametrize("name", GENERATING)
def test_a_picture_that_nobody_can_read_is_the_clients_fault(name: str, cluster: LocalCluster) -> None:
    assert broken_picture(entrance(cluster, name)).status == 400


def broken_picture(url: str) -> Answer:
    body: dict[str, Any] = question("broken", (2, 2)).body()
    body["messages"][0]["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    return post(f"{url}/v1/chat/completions", body)


def test_an_encode_instance_that_is_gone_is_passed_over_and_none_is_an_answer_at_once(cluster: LocalCluster) -> None:
    first, second = (cluster[name] for name in ENCODE)
    first.kill_group(signal.SIGKILL)
    first.reap()
    asked = [question(f"still {seed}", (3, 3), seed=60 + seed) for seed in range(3)]
    for name in GENERATING:
        answers = [one.ask(entrance(cluster, name), max_tokens=2) for one in asked]
        assert [answer.status for answer in answers] == [200] * 3, [answer.body for answer in answers]

    second.kill_group(signal.SIGKILL)
    second.reap()
    for name in GENERATING:
        started = time.monotonic()
        answer = asked[0].ask(entrance(cluster, name), max_tokens=2)
        assert answer.status in (500, 503), answer.body
        assert time.monotonic() - started < DEADLINE, "a half has waited for its deadline"
        assert "no encode instance takes requests" in cluster[name].log_text()
        assert question("text").ask(entrance(cluster, name), max_tokens=2).ok
    text_goes_past_what_is_dead(cluster)

    first.start()
    wait_all_ready([first], 120, silent)
    for name in GENERATING:
        wait_until(lambda name=name: asked[0].ask(entrance(cluster, name), max_tokens=2).ok)
    assert asked[0].ask(cluster[PLAIN].url, max_tokens=2).ok


def text_goes_past_what_is_dead(cluster: LocalCluster) -> None:
    """Behind the router that does not pair, which would count a 503 against the server that answers it."""
    url, pictures = cluster[PLAIN].url, [question("gone", (2, 2), seed=90 + at) for at in range(6)]
    with ThreadPoolExecutor(len(pictures)) as pool:
        answers = list(pool.map(lambda one: one.ask(url, max_tokens=2), pictures))
    assert [answer.status for answer in answers] == [503] * len(pictures), [answer.body for answer in answers]
    assert "no encode instance takes requests" in str(answers[0].body)
    answer = question("text").ask(url, max_tokens=2)
    assert answer.ok, answer.body


def test_nothing_is_left_behind(cluster: LocalCluster) -> None:
    """After everything above."""
    for name in GENERATING:
        wait_until(lambda name=name: not_at_rest(numbers_of(cluster[name])) == [])


if __name__ == "__main__":
    run_tests(__file__)
