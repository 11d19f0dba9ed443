"""An operator pauses, flushes, updates and empties instances beside parked requests: nothing is lost, nothing mixed up.

A request is parked by sending one of its halves alone. The answers are those of an undivided server with the same
weights. docs/operations.md says in which order to update two halves.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.chat_client import Answer, post
from embedding_relay.tools.local_cluster import HOST, LocalCluster
from embedding_relay.tools.local_process import LocalProcess, free_ports
from support import servers
from support.pairs import Pair, Settings
from support.patience import wait_until
from support.questions import TOLERANCE, Question, difference, squares
from support.server_numbers import numbers_of
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=240, suite="base-c-test-cpu")

# Its halves wait for each other longer than all that is done meanwhile takes; every request resumes.
PATIENT: Final = Settings(
    *("qwen2_5_vl", 16, 8, 64),
    environ=(("SGLANG_EMBEDDING_FIRST_WORD_TIMEOUT", "300"),),
)
AT_ONCE: Final = 20  # far from the five minutes that a half waits which nobody told
HALVES: Final = ("encode", "language")
MODES: Final = ("in_place", "retract")
OTHER: Final = {"encode": "language", "language": "encode"}
# Tensors with other values for the same model.
OLD, NEW = (partial(tiny_model.cached, PATIENT.family, seed=seed) for seed in (0, 1))

seeds = itertools.count(5000)

pytestmark = pytest.mark.parametrize("pair", [PATIENT], ids=[PATIENT.name], indirect=True, scope="session")


@pytest.fixture(scope="module")
def reference(logs: Path) -> Iterator[LocalProcess]:
    """An undivided server of this module's own, because its weights change too."""
    server = local_cluster.sglang_server("undivided-pause", PATIENT.options(logs), *free_ports(1))
    with servers.running(LocalCluster("", [[server]])):
        yield server


@pytest.fixture(autouse=True)
def left_as_it_was(reference: LocalProcess, pair: Pair) -> Iterator[None]:
    yield
    for half in HALVES:
        command(pair[half], "continue_generation")
    pair.wait_until_at_rest()
    question = new_question()
    assert difference(question.ask(pair.url), question.ask(reference.url)) < TOLERANCE


def new_question() -> Question:
    return Question("pause", (squares(PATIENT.family, 10, 12, next(seeds)), "what"))


def command(server: LocalProcess, name: str, **body: object) -> Answer:
    answer = post(f"{server.url}/{name}", body)
    assert answer.ok, f"{server.name} answered {name} with {answer.status}: {answer.body}"
    return answer


def update(server: LocalProcess, model: partial) -> None:
    assert command(server, "update_weights_from_disk", model_path=str(model())).body["success"]


@dataclass(frozen=True)
class Parked:
    """A request of which only one half has been sent."""

    pair: Pair
    question: Question
    room: int
    clients: ThreadPoolExecutor
    first: str
    sent: Future[Answer]

    def send_other(self) -> Future[Answer]:
        return send(self.clients, self.pair, OTHER[self.first], self.question, self.room)

    def answer(self, other: Future[Answer]) -> Answer:
        """The language half's, when both are there."""
        answers = {self.first: self.sent.result(), OTHER[self.first]: other.result()}
        assert answers["encode"].ok, answers["encode"].body
        return answers["language"]


def send(clients: ThreadPoolExecutor, pair: Pair, half: str, question: Question, room: int) -> Future[Answer]:
    body = question.body(bootstrap_host=HOST, bootstrap_port=pair.bootstrap_port, bootstrap_room=room)
    return clients.submit(post, f"{pair[half].url}/v1/chat/completions", body)


@contextmanager
def parked(pair: Pair, half: str, question: Question | None = None) -> Iterator[Parked]:
    with ThreadPoolExecutor(3) as clients:
        question, room = question or new_question(), secrets.randbits(62)
        sent = send(clients, pair, half, question, room)
        wait_until(lambda: numbers_of(pair[half])["parked_requests"] == 1)
        yield Parked(pair, question, room, clients, half, sent)


def wait_until_only_the_pause_is_in_the_way(pair: Pair, half: str, room: int) -> None:
    """The other half has done all that it can, and the paused scheduler has had its turns since."""
    if half == "encode":
        wait_until(lambda: numbers_of(pair["language"])["leased_blocks"] > 0)
    else:
        wait_until(lambda: f"relay room={room} status=Success" in pair["language"].log_text())
    command(pair[half], "flush_cache")
    command(pair[half], "flush_cache")


# ---- one half after the other


@pytest.mark.parametrize("half", HALVES)
def test_a_flush_beside_a_parked_request(reference: LocalProcess, pair: Pair, half: str) -> None:
    with parked(pair, half) as request:
        command(pair[half], "flush_cache")
        answer = request.answer(request.send_other())
    assert difference(answer, request.question.ask(reference.url)) < TOLERANCE


@pytest.mark.parametrize("half", HALVES)
def test_memory_released_and_resumed_beside_a_parked_request(reference: LocalProcess, pair: Pair, half: str) -> None:
    with parked(pair, half) as request:
        command(pair[half], "release_memory_occupation")
        other = request.send_other()
        wait_until_only_the_pause_is_in_the_way(pair, half, request.room)
        assert not request.sent.done()
        command(pair[half], "resume_memory_occupation")
        answer = request.answer(other)
    assert difference(answer, request.question.ask(reference.url)) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("half", HALVES)
def test_all_that_is_done_to_a_paused_half(reference: LocalProcess, pair: Pair, half: str, mode: str) -> None:
    with parked(pair, half) as request:
        command(pair[half], "pause_generation", mode=mode)
        command(pair[half], "flush_cache")
        command(pair[half], "release_memory_occupation")
        command(pair[half], "resume_memory_occupation")
        update(pair[half], OLD)
        other = request.send_other()
        wait_until_only_the_pause_is_in_the_way(pair, half, request.room)
        assert not request.sent.done()
        assert f"relay-encode room={request.room} status=Success" not in pair["encode"].log_text() or half != "encode"
        command(pair[half], "continue_generation")
        answer = request.answer(other)
    assert difference(answer, request.question.ask(reference.url)) < TOLERANCE


@pytest.mark.parametrize("half", HALVES)
def test_a_pause_that_aborts_tells_the_other_half(pair: Pair, half: str) -> None:
    with parked(pair, half) as request:
        command(pair[half], "pause_generation", mode="abort")
        assert request.sent.result().status == 400
        command(pair[half], "continue_generation")
        other = request.send_other().result()
    assert other.status == 400, other.body
    assert other.seconds < AT_ONCE


@pytest.mark.parametrize("half", HALVES)
def test_an_update_without_a_pause_waits_for_parked_requests(reference: LocalProcess, pair: Pair, half: str) -> None:
    with parked(pair, half) as request:
        done = request.clients.submit(update, pair[half], OLD)
        answer = request.answer(request.send_other())
        done.result()
    assert difference(answer, request.question.ask(reference.url)) < TOLERANCE


# ---- both halves get new weights


@contextmanager
def new_weights(servers: list[LocalProcess]) -> Iterator[None]:
    for server in servers:
        update(server, NEW)
    try:
        yield
    finally:
        for server in servers:
            update(server, OLD)


@pytest.mark.parametrize("half", HALVES)
def test_a_parked_request_is_answered_by_the_new_weights_of_both_halves(
    reference: LocalProcess, pair: Pair, half: str
) -> None:
    """Also of a picture that both halves remember: the one by its rows, the other by its prefix."""
    question = new_question()
    before = question.ask(pair.url)
    # SGLang's own cache of pictures outlives an update: the undivided server must not have seen this one before.
    with new_weights([reference]):
        expected = question.ask(reference.url)
    assert difference(before, expected) > TOLERANCE
    with parked(pair, half, question) as request:
        command(pair["encode"], "pause_generation", mode="retract")
        if half == "encode":
            other = request.send_other()
            wait_until_only_the_pause_is_in_the_way(pair, half, request.room)
        command(pair["language"], "pause_generation", mode="retract")
        with new_weights([pair["encode"], pair["language"]]):
            for server in (pair["encode"], pair["language"]):
                command(server, "continue_generation")
            if half == "language":
                other = request.send_other()
            answer = request.answer(other)
            again = question.ask(pair.url)
    assert difference(answer, expected) < TOLERANCE
    assert difference(again, expected) < TOLERANCE


if __name__ == "__main__":
    run_tests(__file__)
