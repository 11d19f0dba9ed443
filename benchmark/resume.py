"""How long one resume takes, and whether the scheduler's own work beside it makes it longer.

    .venv/bin/python benchmark/resume.py [--turns 7] [--resumes 200] [--quick] [--out FOLDER]

A resume: the language side offers a block, the encode side writes 16 small rows into it and says so, the language
side copies them out and offers the block again. `ping-pong` is what a resume cannot do without: a message over ZMQ, a
write of 64 bytes by the raw engine, a message back. `threads` is the same by the plugin's threads, which do nothing
else: a control loop on either side, and on the encode side a worker of its own for the peer, so that one that is stuck
holds up nobody else. `idle`: the language scheduler waits. `torch`: its thread is inside forward passes of 200 ms, one
thread of torch called from Python. `python`: it never leaves the interpreter at all, which no forward pass does; so
this is the worst there can be. They take turns.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final

import report
import torch
import transfer
import zmq

from embedding_relay.memory.engine import MooncakeDataPlane
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.memory.plane import Entry, Link, Region
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.transport.encode import EncodeManager
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from embedding_relay.transport.loop import ControlLoop
from embedding_relay.transport.workers import TransferWorker, TransferWorkers

BLOCK: Final = 16
BYTES: Final = 64
FORWARD_SECONDS: Final = 0.2
PING_PONG: Final = "ping-pong"
THREADS: Final = "threads"
LAYOUT: Final = BufferLayout(64, "bfloat16", 0, BLOCK, blocks=1024)


class Bare:
    """A control loop and its thread, and what it does with a message. Nothing has to be done at a later time."""

    def __init__(self) -> None:
        self._loop = ControlLoop(transfer.HOST, max_frame=BYTES)
        self.address = self._loop.open()
        self._thread = threading.Thread(target=self._loop.run, args=(self, lambda: None))
        self.post = self._loop.post

    def start(self, peer: Address) -> None:
        self._peer = peer
        self._thread.start()

    def send(self, _: float = 0.0) -> None:
        self._loop.send(self._peer, [b"message"])

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        raise NotImplementedError

    def tick(self, now: float) -> None: ...

    def next_wakeup(self) -> None: ...

    def close(self) -> None:
        self._loop.stop()
        self._thread.join()


class BareLanguage(Bare):
    def __init__(self) -> None:
        super().__init__()
        self._sent: list[float] = []
        self._done = threading.Event()

    def take_turns(self, times: int) -> list[float]:
        """Seconds from each message to the next."""
        self._sent, self._left = [], times
        self._done.clear()
        self.post(self._next)
        self._done.wait()
        return [later - earlier for earlier, later in itertools.pairwise(self._sent)]

    def _next(self, _: float) -> None:
        self._sent.append(time.perf_counter())
        if len(self._sent) > self._left:
            self._done.set()
        else:
            self.send()

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        self._next(now)


class BareEncode(Bare):
    def __init__(self, session_id: str, write: Callable[[Link], None], plane: MooncakeDataPlane) -> None:
        super().__init__()
        self._session_id, self._write = session_id, write
        self._workers = TransferWorkers(lambda peer: TransferWorker(peer, plane, print, print))

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        self._workers.submit(self._session_id, now, self._write, self._written)

    def _written(self, problem: str) -> None:
        assert not problem, problem
        self.post(self.send)

    def close(self) -> None:
        super().close()
        self._workers.close()


class TimedReceiver(MooncakeEmbeddingReceiver):
    """Notes when each offer goes out; the control thread calls."""

    def __init__(self, manager: LanguageManager, peer: str, room: int) -> None:
        super().__init__(manager, peer, room)
        self.offered: list[float] = []

    def resume_transfer(self, embedding_indices: Sequence[int], sent_tokens: int, allocated_tokens: int) -> None:
        self.offered.append(time.perf_counter())
        super().resume_transfer(embedding_indices, sent_tokens, allocated_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--resumes", type=int, default=200, help="in each turn of each")
    report.add_options(parser)
    options = parser.parse_args()
    turns, resumes = (2, 20) if options.quick else (options.turns, options.resumes)
    torch.set_num_threads(1)
    facts = report.machine()
    print(report.describe(facts))
    results = summary(measure(turns, resumes))
    table = report.Table("One round trip.", "", "p50 µs", "p90 µs", "p50 of ping-pong")
    for name, one in results.items():
        table.row(name, one["p50"], one["p90"], one["of_ping_pong"])
    report.save(options.out, "resume", facts, results)


def summary(seconds: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, report.Figures]]:
    """Of each turn the quantile, of the turns the median."""
    p50 = {name: [quantile(turn, 50) for turn in turns] for name, turns in seconds.items()}
    return {
        name: {
            "p50": report.Figures.of(p50[name]),
            "p90": report.Figures.of(quantile(turn, 90) for turn in turns),
            "of_ping_pong": report.Figures.of(a / b for a, b in zip(p50[name], p50[PING_PONG], strict=True)),
        }
        for name, turns in seconds.items()
    }


def quantile(seconds: Sequence[float], percent: int) -> float:
    return 1e6 * sorted(seconds)[len(seconds) * percent // 100]


# ---- the language side


def measure(turns: int, resumes: int) -> dict[str, list[list[float]]]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=encode_instance, args=(there,), daemon=True)
    process.start()
    manager = transfer.open_language("mooncake", LAYOUT, BLOCK * (resumes + 1), "cpu")
    memory = torch.zeros(BYTES, dtype=torch.uint8)
    raw = MooncakeDataPlane(transfer.HOST, "tcp")
    raw.start([Region(memory.data_ptr(), BYTES)])
    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    back = pull.bind_to_random_port(f"tcp://{transfer.HOST}")
    bare = BareLanguage()
    here.send((raw.session_id, memory.data_ptr(), back, bare.address))
    registry_port, port, bare_encode = here.recv()
    bare.start(bare_encode)
    push.connect(f"tcp://{transfer.HOST}:{port}")
    peer = f"{transfer.HOST}:{registry_port}"
    rooms = itertools.count(1)
    works = {"idle": None, "torch": forward_pass(), "python": interpreter_only}
    seconds: dict[str, list[list[float]]] = {name: [] for name in (PING_PONG, THREADS, *works)}
    for turn in range(turns + 1):  # the first one pays for connections
        measured = {PING_PONG: ping_pong(push, pull, resumes), THREADS: bare.take_turns(resumes)}
        for name, work in works.items():
            measured[name] = resume_often(manager, here, peer, next(rooms), resumes, work)
        for name, one in measured.items() if turn else ():
            seconds[name].append(one)
    here.send(None)
    process.join()
    bare.close()
    manager.close()
    raw.close()
    context.destroy(linger=0)
    return seconds


def ping_pong(push: zmq.Socket[bytes], pull: zmq.Socket[bytes], times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        push.send(b"ping")
        pull.recv()
        seconds.append(time.perf_counter() - started)
    return seconds


def resume_often(
    manager: LanguageManager, pipe: Connection, peer: str, room: int, resumes: int, work: Callable[[], Any] | None
) -> list[float]:
    poller = zmq.Poller()
    poller.register(manager.wakeup_fd, zmq.POLLIN)
    with transfer.only(manager, 1, False):
        pipe.send((room, BLOCK * (resumes + 1)))
        pipe.recv()
        receiver = TimedReceiver(manager, peer, room)
        receiver.start(hint_rows=BLOCK)
        while receiver.poll() not in transfer.ENDED:
            if work is None:
                poller.poll()
                manager.drain_events()
            else:
                work()
        assert receiver.poll() is Status.SUCCESS, receiver.failure()
        pipe.recv()
    return [later - earlier for earlier, later in itertools.pairwise(receiver.offered)]


def forward_pass() -> Callable[[], Any]:
    """As many layers as take FORWARD_SECONDS."""
    row, weight = torch.randn(64, 1024), torch.randn(1024, 1024) / 32

    def layers(number: int) -> torch.Tensor:
        values = row
        for _ in range(number):
            values = torch.nn.functional.silu(values @ weight) + row
        return values

    started = time.perf_counter()
    layers(50)
    number = max(1, round(50 * FORWARD_SECONDS / (time.perf_counter() - started)))
    return lambda: layers(number)


def interpreter_only() -> None:
    until = time.perf_counter() + FORWARD_SECONDS
    while time.perf_counter() < until:
        pass


# ---- the encode side


def encode_instance(pipe: Connection) -> None:
    torch.set_num_threads(1)
    registry = MooncakeEmbeddingBootstrapServer(transfer.HOST, 0)
    registry.start()
    address = Address(transfer.HOST, registry.port)
    manager = EncodeManager.open(LAYOUT, transfer.config("mooncake"), host=transfer.HOST, bootstrap=address)
    manager.start()
    session_id, pointer, back, bare_language = pipe.recv()
    memory = torch.ones(BYTES, dtype=torch.uint8)
    raw = MooncakeDataPlane(transfer.HOST, "tcp", receives=False)
    raw.start([Region(memory.data_ptr(), BYTES)])
    link = raw.link(session_id)

    def write(to: Link) -> None:
        to.write([Entry(memory.data_ptr(), pointer, BYTES)])

    bare = BareEncode(session_id, write, raw)
    bare.start(bare_language)
    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    push.connect(f"tcp://{transfer.HOST}:{back}")
    pipe.send((registry.port, pull.bind_to_random_port(f"tcp://{transfer.HOST}"), bare.address))
    poller = zmq.Poller()
    poller.register(pull, zmq.POLLIN)
    poller.register(pipe.fileno(), zmq.POLLIN)
    while True:
        if pull in dict(poller.poll()):
            pull.recv()
            write(link)
            push.send(b"pong")
        elif (order := pipe.recv()) is None:
            break
        else:
            room, rows = order
            made = torch.randn(rows, LAYOUT.width).to(torch.bfloat16)
            transfer.serve(manager, pipe, room, transfer.source_rows(made))
            pipe.send("ended")
    bare.close()
    link.close()
    raw.close()
    manager.close()
    registry.close()
    context.destroy(linger=0)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
