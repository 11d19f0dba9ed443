"""Several encode and language instances behind one router, by each of its policies; they come and go under load.

Every instance meets every other: which language instance a request goes to says nothing about its encode instance. All
answers are those of one undivided server.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from embedding_relay.tools import local_cluster
from embedding_relay.tools.chat_client import Answer, post
from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_process import LocalProcess, free_ports
from support import servers
from support.pairs import SMALL
from support.patience import wait_until
from support.questions import TOLERANCE, Question, difference, squares
from support.server_numbers import not_at_rest, numbers_of
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=60, suite="base-c-test-cpu")

EACH: Final = 2  # instances of either kind
POLICIES: Final = ("round_robin", "random", "cache_aware", "power_of_two")
AT_ONCE: Final = 8
CLIENTS: Final = 4
# What the router's policy `manual` sends to one pair of instances.
KEY: Final = "X-SMG-Routing-Key"
MORE: Final = 6  # requests that must succeed after each change

seeds = itertools.count(9000)


@dataclass(frozen=True)
class Fleet:
    encodes: list[LocalProcess]
    bootstrap_ports: list[int]
    languages: list[LocalProcess]

    @property
    def members(self) -> list[LocalProcess]:
        return [*self.encodes, *self.languages]

    def served(self) -> list[int]:
        """How many requests each instance has served, the encode instances first."""
        return [member.log_text().count("status=Success") for member in self.members]

    def router(self, logs: Path, name: str, *arguments: str, first: int = EACH) -> LocalProcess:
        """In front of the first so many of each kind; not started yet."""
        prefill = [(encode.url, port) for encode, port in zip(self.encodes, self.bootstrap_ports, strict=True)]
        decode = [language.url for language in self.languages]
        options = SMALL.options(logs / name)
        return local_cluster.router(options, *free_ports(1), prefill[:first], decode[:first], *arguments)


@pytest.fixture(scope="module")
def fleet(logs: Path) -> Iterator[Fleet]:
    options, ports = SMALL.options(logs / "many"), free_ports(3 * EACH)
    encodes, bootstrap_ports, languages = [], ports[:EACH], []
    for index in range(EACH):
        mode = ("--disaggregation-mode", "encode", "--disaggregation-bootstrap-port", str(bootstrap_ports[index]))
        encodes.append(local_cluster.sglang_server(f"encode-{index}", options, ports[EACH + index], *mode))
        mode = ("--disaggregation-mode", "language", *SMALL.generating(logs))
        languages.append(local_cluster.sglang_server(f"language-{index}", options, ports[2 * EACH + index], *mode))
    fleet = Fleet(encodes, bootstrap_ports, languages)
    with servers.running(LocalCluster("", [fleet.members])):
        yield fleet


@pytest.fixture(scope="module")
def routers(fleet: Fleet, logs: Path) -> Iterator[dict[str, LocalProcess]]:
    """By policy; they start together, because each waits for seconds until it has looked at its servers."""
    found = {policy: fleet.router(logs, policy, "--policy", policy) for policy in (*POLICIES, "manual")}
    with servers.running(LocalCluster("", [list(found.values())])):
        yield found


def new_question() -> Question:
    return Question("many", (squares(SMALL.family, 8, 8, next(seeds)), "what is this"))


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_of_the_router(
    policy: str, undivided: dict[str, LocalProcess], fleet: Fleet, routers: dict[str, LocalProcess]
) -> None:
    questions = [new_question() for _ in range(AT_ONCE)]
    before = fleet.served()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda question: question.ask(routers[policy].url), questions))
    for question, answer in zip(questions, answers, strict=True):
        assert difference(answer, question.ask(undivided[SMALL.family].url)) < TOLERANCE
    served = [now - then for now, then in zip(fleet.served(), before, strict=True)]
    assert sum(served[:EACH]) == sum(served[EACH:]) == AT_ONCE
    if policy == "round_robin":
        assert served == [AT_ONCE // EACH] * len(served)
    assert [not_at_rest(numbers_of(member)) for member in fleet.members] == [[]] * len(fleet.members)


def test_requests_with_one_routing_key_meet_the_same_instances(fleet: Fleet, routers: dict[str, LocalProcess]) -> None:
    before = fleet.served()
    for _ in range(4):
        url = f"{routers['manual'].url}/v1/chat/completions"
        answer = post(url, new_question().body(), headers={KEY: "one picture"})
        assert answer.ok, answer.body
    served = [now - then for now, then in zip(fleet.served(), before, strict=True)]
    assert sorted(served[:EACH]) == sorted(served[EACH:]) == [0, 4]


# ---- instances come and go


@dataclass
class Load:
    """Clients that ask one question after the other, of a router, until it is over."""

    url: str
    asked: list[tuple[Question, Answer]] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def client(self) -> None:
        while not self._over.is_set():
            question = new_question()
            self.asked.append((question, question.ask(self.url)))

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(CLIENTS) as pool, ExitStack() as stack:
            stack.callback(self._over.set)
            clients = [pool.submit(self.client) for _ in range(CLIENTS)]
            yield
        for client in clients:
            client.result()

    def some_more(self) -> None:
        goal = len(self.asked) + CLIENTS + MORE  # those that are under way do not count
        wait_until(lambda: len(self.asked) >= goal, 60)


def add(router: LocalProcess, instance: LocalProcess, kind: str, bootstrap_port: int | None = None) -> None:
    body = {"url": instance.url, "worker_type": kind} | ({"bootstrap_port": bootstrap_port} if bootstrap_port else {})
    answer = post(f"{router.url}/workers", body)
    assert answer.status in (200, 201, 202), answer.body


def end(instance: LocalProcess) -> None:
    """As an orchestrator does: SIGTERM, and nobody tells the router."""
    os.kill(instance.pid, signal.SIGTERM)
    wait_until(lambda: instance.returncode() is not None, 60)


def test_instances_are_added_and_ended_under_load(fleet: Fleet, undivided: dict[str, LocalProcess], logs: Path) -> None:
    router = fleet.router(logs, "changing", first=1)
    with servers.running(LocalCluster(router.url, [[router]])):
        load = Load(router.url)
        with load.running():
            load.some_more()
            before = fleet.served()
            add(router, fleet.encodes[1], "prefill", fleet.bootstrap_ports[1])
            add(router, fleet.languages[1], "decode")
            serves: list[Callable[[], bool]] = [
                lambda index=index: fleet.served()[index] > before[index] + 2 for index in (1, EACH + 1)
            ]
            wait_until(lambda: all(serve() for serve in serves), 60)
            for instance in (fleet.encodes[0], fleet.languages[0]):
                end(instance)
                load.some_more()
    print(f"{len(load.asked)} requests, lost: {sum(not answer.ok for _, answer in load.asked)}")
    assert [(answer.status, answer.body) for _, answer in load.asked if not answer.ok] == []
    for question, answer in load.asked[-3:]:
        assert difference(answer, question.ask(undivided[SMALL.family].url)) < TOLERANCE


if __name__ == "__main__":
    run_tests(__file__)
