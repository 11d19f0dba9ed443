"""Instances of several ranks say what an undivided server of several ranks says, and resume on every one of them.

A day has one of two parts, since starting servers is what takes time (support/today.py). Numbers are of 32 bits here,
so that ranks which round otherwise than one, and towers otherwise than the model, differ by next to nothing and another
picture by a thousand times as much.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import Answer, post
from embedding_relay.tools.local_cluster import HOST, LocalCluster, Options, sglang_server
from embedding_relay.tools.local_process import LocalProcess, free_ports
from support import servers
from support.patience import wait_until
from support.questions import TOLERANCE, Question, difference, squares
from support.server_numbers import not_at_rest, numbers_of
from support.sglang_ci import register_cpu_ci, run_tests
from support.today import todays

register_cpu_ci(est_time=900, suite="base-c-test-cpu")

# Rows of deepstack are wider; SGLang's class takes them in the first pipeline stage only, which must have the layers.
FAMILIES: Final = {"tensor": "qwen3_vl", "data-and-pipeline": "qwen2_5_vl"}
# SGLang writes the rank behind the time, if there are several.
ROUNDS: Final = re.compile(r"\[[-\d]+ [:\d]+ ?([^]]*)\] relay room=(\d+) status=Success rows=\d+ rounds=(\d+) ")
BLOCKS: Final = 4
BLOCK_SIZE: Final = 16
# For what waits for a rank that is not there.
DEADLINE: Final = 20

PARTS: Final = ("tensor", "data-and-pipeline")
TODAY: Final = todays(PARTS, 1)

rooms = itertools.count(random.randrange(1 << 40))


# ---- the servers


@dataclass(frozen=True)
class Size:
    """Of one instance, by SGLang's names."""

    kind: str
    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}-tp{self.tp}-pp{self.pp}-dp{self.dp}"

    @property
    def flags(self) -> tuple[str, ...]:
        sizes = {"tp": self.tp, "pp": self.pp, "dp": self.dp}
        return tuple(word for name, size in sizes.items() if size > 1 for word in (f"--{name}-size", str(size)))


def instance(size: Size, options: Options) -> tuple[LocalProcess, int]:
    """And its bootstrap port, if it is an encode instance."""
    port, bootstrap_port = free_ports(2)
    mode: tuple[str, ...] = () if size.kind == "undivided" else ("--disaggregation-mode", size.kind)
    if size.kind == "encode":
        mode += ("--disaggregation-bootstrap-port", str(bootstrap_port))
    # SGLang wants to know which cores each rank has, if there are several.
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if size.flags else {}
    return sglang_server(size.name, options, port, *mode, *size.flags, environ=cores), bootstrap_port


class Instances:
    """Any encode instance serves any language instance: there is no router here that would choose."""

    def __init__(self, sizes: list[Size], family: str, logs: Path) -> None:
        options = servers.options(
            tiny_model.cached(family),
            logs,
            *("--dtype", "float32", "--enable-metrics"),
            SGLANG_EMBEDDING_CACHE_BLOCK_SIZE=str(BLOCK_SIZE),
            SGLANG_EMBEDDING_CACHE_BUFFER_SIZE=str(BLOCKS),
            SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE=str(BLOCK_SIZE),
            SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT=str(DEADLINE),
            SGLANG_DISAGGREGATION_WAITING_TIMEOUT=str(DEADLINE),
        )
        made = {size: instance(size, options) for size in sizes}
        self.servers = {size: server for size, (server, _) in made.items()}
        self.bootstrap_ports = {size: port for size, (_, port) in made.items()}
        self.cluster = LocalCluster("", [list(self.servers.values())])

    def ask(self, question: Question, encode: Size, language: Size, **options: Any) -> list[Answer]:
        """What both halves answer, the encode instance first."""
        where = {"bootstrap_host": HOST, "bootstrap_port": self.bootstrap_ports[encode], "bootstrap_room": next(rooms)}
        body = question.body(**where, **options)
        urls = [f"{self.servers[size].url}/v1/chat/completions" for size in (encode, language)]
        with ThreadPoolExecutor(2) as both:
            return list(both.map(lambda url: post(url, body), urls))

    def rounds(self, language: Size, seen: int) -> dict[str, dict[int, str]]:
        """How many rounds each room took, by rank and room, in what the instance has logged after `seen` characters."""
        found: dict[str, dict[int, str]] = {}
        for rank, room, rounds in ROUNDS.findall(self.servers[language].log_text()[seen:]):
            found.setdefault(rank, {})[int(room)] = rounds
        return found

    def log_length(self, size: Size) -> int:
        return len(self.servers[size].log_text())

    def log(self, size: Size) -> str:
        return self.servers[size].log_text()


ENCODE, ENCODE_TP, ENCODE_DP = Size("encode"), Size("encode", tp=2), Size("encode", dp=2)
LANGUAGE, LANGUAGE_TP = Size("language"), Size("language", tp=2)
LANGUAGE_DP, LANGUAGE_PP = Size("language", dp=2), Size("language", pp=2)
PAIRS: Final = {
    "tensor": [(ENCODE, LANGUAGE_TP), (ENCODE_TP, LANGUAGE), (ENCODE_TP, LANGUAGE_TP)],
    "data-and-pipeline": [(ENCODE_DP, LANGUAGE_DP), (ENCODE_DP, LANGUAGE_PP)],
}
UNDIVIDED: Final = {"tensor": Size("undivided", tp=2), "data-and-pipeline": Size("undivided")}


def questions(family: str) -> list[Question]:
    image = partial(squares, family)
    return [
        Question("text only", ("tell me something",)),
        Question("two rounds", (image(3, 6, 1), "what")),
        Question("many rounds", (image(20, 20, 2), "what is this")),
        Question("two adjacent images", (image(5, 5, 3), image(5, 5, 4), "compare")),
        Question("text between images", (image(3, 4, 5), "first", image(8, 2, 6), "second", image(7, 7, 7), "compare")),
        Question("an image seen before", (image(20, 20, 2), "what is this")),
    ]


@dataclass(frozen=True)
class Part:
    """What runs, and what its undivided server has answered."""

    name: str
    instances: Instances
    expected: list[Answer]
    """And to another picture, last."""

    @property
    def family(self) -> str:
        return FAMILIES[self.name]

    def picture(self, wide: int, high: int, seed: int) -> Question:
        return Question(f"{wide}x{high} {seed}", (squares(self.family, wide, high, seed), "what is this"))

    @property
    def pairs(self) -> list[tuple[Size, Size]]:
        return PAIRS[self.name]


@pytest.fixture(scope="module")
def part(request: pytest.FixtureRequest, logs: Path) -> Iterator[Part]:
    name, family = request.param, FAMILIES[request.param]
    sizes = {size: None for pair in PAIRS[name] for size in pair} | {UNDIVIDED[name]: None}
    instances = Instances(list(sizes), family, logs / name)
    other = Question("another picture", (squares(family, 20, 20, 99), "what is this"))
    with servers.running(instances.cluster):
        url = instances.servers[UNDIVIDED[name]].url
        yield Part(name, instances, [question.ask(url) for question in (*questions(family), other)])


# `conftest.py` leaves out those that it is not the day of.
each_part, tensor_part, data_part = (
    pytest.mark.parametrize("part", parts, indirect=True, scope="module") for parts in (PARTS, PARTS[:1], PARTS[1:])
)


# ---- what they answer


@each_part
def test_same_answers(part: Part) -> None:
    *expected, other_picture = part.expected
    assert difference(expected[2], other_picture) >= 20 * TOLERANCE, "another picture would not be noticed"
    differences: dict[str, float] = {}
    for encode, language in part.pairs:
        for question, there in zip(questions(part.family), expected, strict=True):
            halves = part.instances.ask(question, encode, language)
            assert [half.status for half in halves] == [200, 200], [half.body for half in halves]
            name = f"{encode.name} {language.name}: {question.name}"
            differences[name] = difference(halves[1], there)
            assert halves[1].prompt_tokens == there.prompt_tokens, name
    print(f"largest differences in log-probability: {sorted(differences.items(), key=lambda one: -one[1])[:5]}")
    assert {name: value for name, value in differences.items() if value > TOLERANCE} == {}


@each_part
def test_every_instance_resumes(part: Part) -> None:
    """Of each instance and room, the one rank that receives for all of its host."""
    for encode, language in part.pairs:
        seen = part.instances.log_length(language)
        for question in questions(part.family):
            part.instances.ask(question, encode, language)
        found = part.instances.rounds(language, seen)
        print(encode.name, language.name, {rank: list(rounds.values()) for rank, rounds in found.items()})
        assert all(int(rounds) > 1 for by_room in found.values() for rounds in by_room.values())
        if language.dp > 1:
            assert sum(map(len, found.values())) == len(questions(part.family)) - 1, "all but the text"
            continue
        (first,) = found.values()
        assert len(first) == len(questions(part.family)) - 1, "all but the text"


WRITTEN = "request_bytes_sum"
"""Counted before a request is answered; `bytes_total` is brought up to date up to a quarter of a second later."""


@each_part
def test_ranks_of_one_host_share_one_copy_of_the_rows(part: Part) -> None:
    """What an encode instance writes does not grow with the ranks of a language instance."""
    written: dict[str, float] = {}
    encode = part.pairs[-1][0]
    for number, language in enumerate({language for _, language in part.pairs}):
        before = numbers_of(part.instances.servers[encode])[WRITTEN]
        halves = part.instances.ask(part.picture(12, 12, 700 + number), encode, language)
        assert [half.status for half in halves] == [200, 200], [half.body for half in halves]
        server = part.instances.servers[encode]
        wait_until(lambda server=server: not_at_rest(numbers_of(server)) == [])
        written[language.name] = numbers_of(server)[WRITTEN] - before
        shared = numbers_of(part.instances.servers[language])
        assert shared["borrowing_ranks"] == language.tp * language.pp - 1
    print(written)
    assert len(set(written.values())) == 1
    assert min(written.values()) > 0


@each_part
def test_many_at_once(part: Part) -> None:
    """With pools of four blocks: the ranks serve rooms in the same order, or two would wait for each other."""
    crowd = [part.picture(3 + seed % 4, 4, 200 + seed) for seed in range(16)]
    undivided = part.instances.servers[UNDIVIDED[part.name]].url
    alone = [question.ask(undivided) for question in crowd]
    for encode, language in part.pairs:
        with ThreadPoolExecutor(len(crowd)) as clients:
            ask = partial(part.instances.ask, encode=encode, language=language)
            together = [halves[1] for halves in clients.map(ask, crowd)]
        assert [answer.status for answer in together] == [200] * len(crowd)
        assert max(difference(one, other) for one, other in zip(together, alone, strict=True)) <= TOLERANCE
        for size in (encode, language):
            wait_until(lambda server=part.instances.servers[size]: not_at_rest(numbers_of(server)) == [])


@each_part
def test_samples_share_the_rows_of_their_room(part: Part) -> None:
    for encode, language in part.pairs:
        seen = part.instances.log_length(language)
        _, answer = part.instances.ask(part.picture(3, 6, 1), encode, language, n=3)
        assert answer.status == 200, answer.body
        assert len(answer.body["choices"]) == 3
        assert all(len(by_room) == 1 for by_room in part.instances.rounds(language, seen).values())


@data_part
def test_requests_are_divided_among_data_parallel_ranks(part: Part) -> None:
    seen = part.instances.log_length(LANGUAGE_DP)
    for number in range(8):
        part.instances.ask(part.picture(2, 2, 300 + number), ENCODE_DP, LANGUAGE_DP)
    found = part.instances.rounds(LANGUAGE_DP, seen)
    assert len(found) == 2
    for by_room in found.values():
        assert len({room % 2 for room in by_room}) == 1
    ended = re.findall(r" DP(\d)\S*\] relay-encode room=(\d+) status=Success", part.instances.log(ENCODE_DP))
    assert {dp for dp, _ in ended} == {"0", "1"}
    assert all(int(room) % 2 == int(dp) for dp, room in ended)


# ---- what breaks


@tensor_part
def test_ranks_that_wait_for_a_request_sleep_and_drop_it_when_its_client_leaves(part: Part) -> None:
    """No rank spins: the first sleeps until something happens, the others in SGLang's broadcast until it has."""
    encode, language = ENCODE_TP, part.instances.servers[LANGUAGE_TP]
    where = {"bootstrap_host": HOST, "bootstrap_port": part.instances.bootstrap_ports[encode]}
    never = part.picture(3, 3, 400).body(**where, bootstrap_room=next(rooms))  # its encode half does not come
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(post, f"{language.url}/v1/chat/completions", never, timeout=12)
        wait_until(lambda: parked(language) == 1)
        before = seconds_of_cores(language)
        time.sleep(3)  # what is measured is this time
        spent = seconds_of_cores(language) - before
        assert parked(language) == 1
        with pytest.raises(TimeoutError):
            asked.result()
    print(f"in 3 s with a parked request: {spent:.2f} s of cores")
    assert spent < 1.5, "each of two spinning ranks would take 3"
    wait_until(lambda: parked(language) == 0)
    assert [half.status for half in part.instances.ask(part.picture(3, 6, 401), encode, LANGUAGE_TP)] == [200, 200]


@tensor_part
def test_a_rank_that_is_killed_ends_its_instance_and_nothing_else(part: Part) -> None:
    """The last test of its part. Whoever waits gets an answer or the end of its connection, in time."""
    victim = part.instances.servers[LANGUAGE_TP]
    crowd = [part.picture(12, 12, 500 + seed) for seed in range(8)]

    def ask(question: Question) -> list[int]:
        return [half.status for half in part.instances.ask(question, ENCODE_TP, LANGUAGE_TP)]

    seen, started = part.instances.log_length(LANGUAGE_TP), time.monotonic()
    with ThreadPoolExecutor(len(crowd)) as clients:
        asked = [clients.submit(ask, question) for question in crowd]
        wait_until(lambda: bool(part.instances.rounds(LANGUAGE_TP, seen)))  # the first has its rows, others wait
        os.kill(scheduler_of(victim, "TP1"), signal.SIGKILL)
        outcomes = [one.exception() or one.result() for one in asked]
    print(f"after {time.monotonic() - started:.1f} s: {outcomes}")
    assert time.monotonic() - started < 3 * DEADLINE
    wait_until(lambda: victim.returncode() is not None and not victim.group_members(), seconds=60)
    halves = part.instances.ask(part.picture(20, 20, 600), ENCODE_TP, LANGUAGE)
    assert [half.status for half in halves] == [200, 200], [half.body for half in halves]


def scheduler_of(server: LocalProcess, rank: str) -> int:
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in server.group_members()}
    (found,) = [pid for pid, title in titles.items() if title.startswith(f"sglang::scheduler_{rank}")]
    return found


def parked(server: LocalProcess) -> int:
    return int(numbers_of(server)["parked_requests"])


def seconds_of_cores(server: LocalProcess) -> float:
    ticks = 0
    for pid in server.group_members():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    run_tests(__file__)
