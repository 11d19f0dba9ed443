"""Requests answered in time, against the memory of the receive pool and against how much of it each request reserves.

    .venv/bin/python benchmark/pool.py [--pools 1 4 8 16] [--reserve auto 1024 exact maximum ...] [--load 0.6]
                                       [--requests 64] [--turns 4] [--add] [--quick] [--out FOLDER]

Two processes with both sides of the transfer, over Mooncake and ZMQ; the rows are real, tower and model are not. The
requests are those of `workload.py`, open loop. The towers are clocks, four of them (`--towers`), as if so many encode
instances worked for one language instance. Each takes one request after the other, in the order in which their language
halves offered blocks, for as long as its pictures have tokens, in the mean for 320 ms (`--tower`): long, so that the
result is not about this machine. `--load` is the share of their time that they are busy. Rows that are there are taken
at once.

A request is answered in time if its last row is there within twice the time that it takes alone. `unlimited` is a pool
in which nobody waits, and where each request reserves exactly what it needs; the most blocks that were in use then are
the memory of pool 1, of which the others are fractions. In a turn all candidates take the same requests, one candidate
after the other; each turn has requests of its own. `--reserve`: `auto`, a number of tokens, `exact` (what a system
could reserve that asks for the length first), or `maximum`: each request has the blocks of the longest that the model
takes, or waits for them. `--add` counts the turns that are in the folder already.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import heapq
import itertools
import logging
import multiprocessing
import os
import select
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the machine
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
warnings.simplefilter("ignore")

import report  # noqa: E402
import torch  # noqa: E402
import workload  # noqa: E402
from report import Figures  # noqa: E402

from embedding_relay.config import RelayConfig  # noqa: E402
from embedding_relay.memory.buffers import SourceRows  # noqa: E402
from embedding_relay.memory.checks import NO_ITEM, ModelLimits  # noqa: E402
from embedding_relay.memory.layout import BufferLayout  # noqa: E402
from embedding_relay.protocol.messages import Address  # noqa: E402
from embedding_relay.protocol.status import Status, is_final  # noqa: E402
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer  # noqa: E402
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender  # noqa: E402
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver  # noqa: E402

HOST: Final = "127.0.0.1"
HIDDEN: Final = 1024
BLOCK: Final = 128
MOST_ROWS: Final = 32768
"""The context length; longer requests are cut."""
PLENTY: Final = 2048
"""Blocks of a pool in which nobody waits."""
UNSEEN: Final = 8192
AUTO, EXACT, MAXIMUM = "auto", "exact", "maximum"
UNLIMITED: Final = "unlimited"


class Job(NamedTuple):
    at: float
    media: int
    rows: int


class Run(NamedTuple):
    """What came of the requests of one candidate."""

    seconds: list[float | None]
    """From its arrival to its last row; None if it failed."""
    most_blocks: int
    """In use at a time."""
    rounds: float
    """Of the transfer, in the mean."""


def jobs(count: int, seed: int) -> list[Job]:
    drawn = []
    for request in workload.requests(count, seed):
        media = min(request.media, MOST_ROWS)
        drawn.append(Job(request.at, media, min(media + request.text, MOST_ROWS)))
    return drawn


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of language ranks that have ended, which here all do
    facts = report.machine()
    print(report.describe(facts))
    found = report.load(options.out, "pool")["results"] if options.add else {"turns": []}
    with encode_process() as (pipe, peer):
        for _ in range(options.turns):
            found["turns"].append(one_turn(len(found["turns"]), pipe, peer, options))
    results = found | {"requests": options.requests, "load": options.load, "summary": summary(found["turns"])}
    report.save(options.out, "pool", facts, results, drawing(results["summary"]))
    show(results)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=int, nargs="+", default=[1, 4, 8, 16], help="1/N of what is needed at most")
    parser.add_argument("--reserve", nargs="+", default=[AUTO, "256", "1024", "4096", "8192", EXACT, MAXIMUM])
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument("--towers", type=int, default=4)
    parser.add_argument("--tower", type=float, default=320.0, help="ms for a request")
    parser.add_argument("--requests", type=int, default=64, help="in a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1, help="of the first turn's requests; each turn has the next")
    parser.add_argument("--add", action="store_true", help="to the turns that --out has already")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.pools, options.reserve = [1, 8], [AUTO, MAXIMUM]
        options.requests, options.turns, options.tower = 12, 1, 40.0
    return options


# ---- a turn


def one_turn(turn: int, pipe: Connection, peer: str, options: argparse.Namespace) -> dict[str, Any]:
    drawn = jobs(options.requests, options.seed + turn)
    pipe.send((options.towers, 1e-3 * options.tower * len(drawn) / sum(job.media for job in drawn)))
    rate = 1e3 * options.load * options.towers / options.tower
    with language(EXACT, PLENTY) as unlimited:
        unlimited.warm_up(pipe, peer)
        alone = unlimited.one_by_one(pipe, peer, drawn)
        run = unlimited.run(pipe, peer, drawn, rate)
    points = [point_of(UNLIMITED, 0, PLENTY, run, alone, rate)]
    order = list(itertools.product(options.reserve, options.pools))
    for reserve, fraction in report.from_turn(turn * len(order) // 3, order):
        blocks = max(1, points[0]["most_blocks"] // fraction)
        with language(reserve, blocks) as candidate:
            candidate.warm_up(pipe, peer)
            run = candidate.run(pipe, peer, drawn, rate)
        points.append(point_of(reserve, fraction, blocks, run, alone, rate))
    return {"rate": rate, "points": points}


def point_of(reserve: str, fraction: int, blocks: int, run: Run, alone: Sequence[float], rate: float) -> dict[str, Any]:
    done = [one for one in run.seconds if one is not None]
    return {
        "reserve": reserve,
        "fraction": fraction,
        "blocks": blocks,
        "most_blocks": run.most_blocks,
        "goodput": workload.goodput(run.seconds, alone, rate),
        "failed": len(run.seconds) - len(done),
        "median_ms": 1e3 * Figures.of(done).median,
        "rounds": run.rounds,
    }


# ---- the language side: this process


class Candidate:
    """A language rank, and how many of its requests may be under way at a time."""

    def __init__(self, manager: LanguageManager, reserve: str) -> None:
        self.manager = manager
        self.is_exact = reserve == EXACT
        pool = manager.pool.count * BLOCK
        # One at a time where not even one of them fits: with its resumes it can do with less.
        self.at_once = max(1, pool // MOST_ROWS) if reserve == MAXIMUM else None
        self.most_blocks = 0

    def warm_up(self, pipe: Connection, peer: str) -> None:
        """Find the peer, connect, and be trusted with more than one room at a time. `auto` learns nothing from it: it
        takes requests to be as long as that until it has seen some.
        """
        self.run(pipe, peer, [Job(0.0, 16, UNSEEN)], 1.0)

    def one_by_one(self, pipe: Connection, peer: str, drawn: Sequence[Job]) -> list[float]:
        seconds = []
        for job in drawn:
            (one,) = self.run(pipe, peer, [job._replace(at=0.0)], 1.0).seconds
            assert one is not None
            seconds.append(one)
        return seconds

    def run(self, pipe: Connection, peer: str, drawn: Sequence[Job], rate: float) -> Run:
        started = time.perf_counter()
        due = deque((started + job.at / rate, ROOMS.next(), job) for job in drawn)
        numbers = [room for _, room, _ in due]
        waiting: deque[tuple[float, int, Job]] = deque()
        under_way: dict[int, tuple[float, MooncakeEmbeddingReceiver]] = {}
        ended: dict[int, tuple[float | None, int]] = {}
        self.most_blocks = 0
        while due or waiting or under_way:
            while due and due[0][0] <= time.perf_counter():
                waiting.append(due.popleft())
            while waiting and (self.at_once is None or len(under_way) < self.at_once):
                at, room, job = waiting.popleft()
                pipe.send((room, job))
                under_way[room] = at, self.start(peer, room, job)
            select.select([self.manager.wakeup_fd], [], [], self.patience(due))
            self.collect(under_way, ended)
        rounds = [ended[room][1] for room in numbers]
        return Run([ended[room][0] for room in numbers], self.most_blocks, sum(rounds) / len(rounds))

    def start(self, peer: str, room: int, job: Job) -> MooncakeEmbeddingReceiver:
        receiver = MooncakeEmbeddingReceiver(self.manager, peer, room)
        receiver.start(hint_rows=job.rows if self.is_exact else None)
        return receiver

    @staticmethod
    def patience(due: Sequence[tuple[float, int, Job]]) -> float | None:
        return max(0.0, due[0][0] - time.perf_counter()) if due else None

    def collect(
        self,
        under_way: dict[int, tuple[float, MooncakeEmbeddingReceiver]],
        ended: dict[int, tuple[float | None, int]],
    ) -> None:
        """A room that leaves the queue says so, which is when it gets its blocks."""
        for room in self.manager.drain_events():
            self.most_blocks = max(self.most_blocks, self.manager.pool.leased)
            if room not in under_way:  # it had ended when it was looked at for an earlier change
                continue
            at, receiver = under_way[room]
            if is_final(receiver.poll()):
                del under_way[room]
                is_there = receiver.poll() is Status.SUCCESS
                ended[room] = (time.perf_counter() - at if is_there else None), receiver.rounds


class Rooms:
    """Numbers that no room has had."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def next(self) -> int:
        return next(self._numbers)


ROOMS: Final = Rooms()


@contextmanager
def language(reserve: str, blocks: int) -> Iterator[Candidate]:
    tokens = {AUTO: None, MAXIMUM: MOST_ROWS, EXACT: MOST_ROWS}
    default = tokens[reserve] if reserve in tokens else int(reserve)
    manager = LanguageManager.open(
        layout(blocks),
        dataclasses.replace(config(), default_allocate_tokens=default),
        host=HOST,
        ranks=1,
        max_rows=MOST_ROWS,
        limits=ModelLimits(vocabulary=1, modalities=frozenset({1})),
    )
    manager.start()
    yield Candidate(manager, reserve)
    manager.close()


def layout(blocks: int) -> BufferLayout:
    return BufferLayout(HIDDEN, "bfloat16", 0, BLOCK, blocks)


@functools.cache
def config() -> RelayConfig:
    return RelayConfig.from_environment({**os.environ, "SGLANG_EMBEDDING_DATA_PLANE": "mooncake"})


# ---- the encode side: a process of its own


@contextmanager
def encode_process() -> Iterator[tuple[Connection, str]]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=encode_instance, args=(there,), daemon=True)
    process.start()
    there.close()
    yield here, f"{HOST}:{here.recv()}"
    here.send(None)
    process.join()


def encode_instance(pipe: Connection) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    registry = MooncakeEmbeddingBootstrapServer(HOST, 0)
    registry.start()
    manager = EncodeManager.open(layout(PLENTY), config(), host=HOST, bootstrap=Address(HOST, registry.port))
    manager.start()
    pipe.send(registry.port)
    Towers(manager).serve(pipe)
    manager.close()
    registry.close()


class Towers:
    """An encode scheduler whose towers compute nothing: the rows are there when they would have been done with them."""

    def __init__(self, manager: EncodeManager) -> None:
        self.manager = manager
        self.made = torch.randn(MOST_ROWS, HIDDEN).to(torch.bfloat16)
        self.number, self.per_token = 1, 0.0
        self.parked: dict[int, tuple[Job, MooncakeEmbeddingSender]] = {}
        self.queue: deque[int] = deque()
        self.inside: list[tuple[float, int]] = []
        """When a tower is done with a room."""

    def serve(self, pipe: Connection) -> None:
        while True:
            patience = max(0.0, self.inside[0][0] - time.perf_counter()) if self.inside else None
            readable, _, _ = select.select([pipe.fileno(), self.manager.wakeup_fd], [], [], patience)
            if pipe.fileno() in readable:
                match pipe.recv():
                    case None:
                        return
                    case int(number), float(per_token):
                        self.number, self.per_token = number, per_token
                    case room, job:
                        self.park(room, job)
            self.listen()
            self.work(time.perf_counter())

    def park(self, room: int, job: Job) -> None:
        sender = MooncakeEmbeddingSender(self.manager, room)
        self.parked[room] = job, sender
        sender.init()

    def listen(self) -> None:
        for room in self.manager.drain_events():
            if room in self.parked and self.parked[room][1].poll() is Status.WAITING_FOR_INPUT:
                self.queue.append(room)

    def work(self, now: float) -> None:
        while self.inside and self.inside[0][0] <= now:
            done_at, room = heapq.heappop(self.inside)
            job, sender = self.parked.pop(room)
            sender.send_embedding(source_rows(self.made[: job.media], job.rows))
            self.begin(done_at)  # also if this process was looked at only later
        while self.queue and len(self.inside) < self.number:
            self.begin(now)

    def begin(self, at: float) -> None:
        if self.queue:
            room = self.queue.popleft()
            heapq.heappush(self.inside, (at + self.per_token * self.parked[room][0].media, room))


def source_rows(made: torch.Tensor, rows: int) -> SourceRows:
    """Pictures first, as one item, then text."""
    items = torch.zeros(rows, 4, dtype=torch.int32)
    items[: len(made), 1] = 1
    items[len(made) :, 0] = NO_ITEM
    return SourceRows(
        total=rows,
        fill_ids=torch.zeros(rows, dtype=torch.int32),
        mrope=torch.zeros(rows, 3, dtype=torch.int32),
        items=items,
        segments=[(0, made)],
        media_items=1,
    )


# ---- what came of it


def summary(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By candidate; `of_unlimited` is taken within a turn."""
    measured: dict[tuple[str, int], list[tuple[Mapping[str, Any], float]]] = {}
    for turn in turns:
        unlimited = next(point["goodput"] for point in turn["points"] if point["reserve"] == UNLIMITED)
        for point in turn["points"]:
            key = point["reserve"], point["fraction"]
            measured.setdefault(key, []).append((point, point["goodput"] / unlimited))
    return [
        {
            "reserve": reserve,
            "fraction": fraction,
            "mib": Figures.of(point["blocks"] * sum(layout(1).item_lens) / 2**20 for point, _ in points),
            "of_unlimited": Figures.of(ratio for _, ratio in points),
            **{
                name: Figures.of(point[name] for point, _ in points)
                for name in ("goodput", "median_ms", "rounds", "most_blocks")
            },
            "failed": sum(point["failed"] for point, _ in points),
        }
        for (reserve, fraction), points in measured.items()
    ]


def show(results: Mapping[str, Any]) -> None:
    every = {(one["reserve"], one["fraction"]): one for one in results["summary"]}
    unlimited = every[UNLIMITED, 0]
    turns = results["turns"]
    print(
        f"\n{len(turns)} turns of {results['requests']} requests, {turns[0]['rate']:.1f} per second."
        f" In an unlimited pool {unlimited['goodput']} per second are in time, with a median of"
        f" {unlimited['median_ms']} ms. {sum(one['failed'] for one in results['summary'])} failed."
    )
    fractions = sorted({fraction for _, fraction in every if fraction})
    pools = [f"1/{one}" if one > 1 else "1" for one in fractions]
    for title, name in (
        ("Requests in time, beside those of an unlimited pool", "of_unlimited"),
        ("Median time to the last row in ms", "median_ms"),
        ("Rounds of a transfer, in the mean", "rounds"),
    ):
        table = report.Table(title, "reserved", *pools)
        for reserve in dict.fromkeys(one["reserve"] for one in results["summary"] if one["reserve"] != UNLIMITED):
            table.row(reserve, *(every[reserve, one][name] for one in fractions))
    table = report.Table("Memory of the pool in MiB", "", *pools)
    some = next(reserve for reserve, _ in every if reserve != UNLIMITED)
    table.row("", *(every[some, one]["mib"] for one in fractions))


def drawing(every: Sequence[Mapping[str, Any]]) -> str:
    lines: dict[str, dict[float, Figures]] = {}
    for one in every:
        if one["reserve"] != UNLIMITED:
            lines.setdefault(one["reserve"], {})[1 / one["fraction"]] = one["of_unlimited"]
    return report.plot("Requests in time, by what each reserves", "memory of the pool", "of an unlimited pool's", lines)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
