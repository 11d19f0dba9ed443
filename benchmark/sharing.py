"""What further language ranks of one host cost a request, with a copy of the rows for each and with one for all.

    .venv/bin/python benchmark/sharing.py [--ranks 2] [--turns 9] [--quick] [--out FOLDER]

Each rank and the encode instance is a process. `each`: every rank receives. `one`: the first receives, and the others
read there, as an instance does by itself. The two take turns with requests of the same size. Counted is the time until
the last rank has all rows, and the processor time of all processes together; `of each` are the shares of it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, Final

import report
import torch
import transfer
import zmq

from embedding_relay.memory.checks import ModelLimits
from embedding_relay.memory.device import HOST as CPU
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.memory.shared_rows import Borrower
from embedding_relay.observer import NOBODY
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.transport.borrowing import BorrowingManager
from embedding_relay.transport.encode import EncodeManager
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from embedding_relay.transport.neighbours import meet

PLANES: Final = ("mooncake", "shared_memory")
EACH, ONE = WAYS = ("each", "one")
SIZES: Final = (1, 8, 64)
LIMITS: Final = ModelLimits(vocabulary=1, modalities=frozenset({1}))
WARM_UP: Final = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9)
    report.add_options(parser)
    options = parser.parse_args()
    sizes, turns = ((1, 4), 2) if options.quick else (SIZES, options.turns)
    facts = report.machine()
    print(report.describe(facts))
    title = f"A request for {options.ranks} ranks of one host."
    table = report.Table(title, "plane", "MiB", "copies", "ms", "of each", "ms of processors", "of each")
    results = []
    for plane in PLANES:
        for mib, measured in measure(plane, options.ranks, sizes, turns):
            for way in WAYS:
                one = {"plane": plane, "mib": mib, "way": way, **figures(measured[way], measured[EACH])}
                results.append(one)
                table.row(plane, mib, way, one["ms"], one["of_each"], one["cpu_ms"], one["cpu_of_each"])
    report.save(options.out, "sharing", facts, results)


Seconds = list[tuple[float, float]]
"""Of each turn: until the last rank had all rows, and of all processors."""


def figures(seconds: Seconds, each: Seconds) -> dict[str, report.Figures]:
    both = list(zip(seconds, each, strict=True))
    return {
        "ms": report.Figures.of(1e3 * wall for wall, _ in seconds),
        "of_each": report.Figures.of(one[0] / other[0] for one, other in both),
        "cpu_ms": report.Figures.of(1e3 * cpu for _, cpu in seconds),
        "cpu_of_each": report.Figures.of(one[1] / other[1] for one, other in both),
    }


def measure(plane: str, ranks: int, sizes: Sequence[int], turns: int) -> Iterator[tuple[int, dict[str, Seconds]]]:
    most = max(sizes) * transfer.ROWS_PER_MIB
    # Twice what a request needs: no more memory of received rows is kept than the pool has.
    layout = BufferLayout(transfer.HIDDEN, "bfloat16", 0, 128, blocks=-(-2 * most // 128))
    numbers = itertools.count()
    with ExitStack() as running:
        instances = {way: running.enter_context(instance(plane, layout, ranks, way)) for way in WAYS}
        for mib in sizes:
            seconds: dict[str, Seconds] = {way: [] for way in WAYS}
            for turn in range(turns + WARM_UP):
                number = next(numbers)
                for way, processes in instances.items():
                    one = one_request(processes, number, mib * transfer.ROWS_PER_MIB)
                    if turn >= WARM_UP:
                        seconds[way].append(one)
            yield mib, seconds


def one_request(processes: Sequence[Connection], number: int, rows: int) -> tuple[float, float]:
    encode, *ranks = processes
    before = processor_time(processes)
    started = time.perf_counter()
    for rank in ranks:
        rank.send(("room", number, rows))
    encode.send(("room", number, rows))
    for rank in ranks:
        assert rank.recv() == "there"
    wall = time.perf_counter() - started
    assert encode.recv() == "expecting"
    assert encode.recv() == "ended"
    return wall, processor_time(processes) - before


def processor_time(processes: Sequence[Connection]) -> float:
    for process in processes:
        process.send(("cpu",))
    return sum(process.recv() for process in processes)


@contextmanager
def instance(plane: str, layout: BufferLayout, ranks: int, way: str) -> Iterator[list[Connection]]:
    """The encode process and its language ranks."""
    encode = started(encode_process, plane, layout)
    peer = encode.recv()
    others = [started(language_process, plane, layout, rank, way, peer) for rank in range(ranks)]
    for _ in range(2):  # what a rank hands in, all get
        handed_in = [other.recv() for other in others]
        for other in others:
            other.send(handed_in)
    for other in others:
        assert other.recv() == "ready"
    yield [encode, *others]
    for process in (encode, *others):
        process.send(("end",))
        assert process.recv() == "closed"


def started(target: Any, *arguments: Any) -> Connection:
    here, there = multiprocessing.Pipe()
    multiprocessing.Process(target=target, args=(there, *arguments), daemon=True).start()
    return here


def own_processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# ---- the processes


def encode_process(pipe: Connection, plane: str, layout: BufferLayout) -> None:
    torch.set_num_threads(1)
    registry = MooncakeEmbeddingBootstrapServer(transfer.HOST, 0)
    registry.start()
    where = Address(transfer.HOST, registry.port)
    manager = EncodeManager.open(layout, transfer.config(plane), host=transfer.HOST, bootstrap=where)
    manager.start()
    source = torch.randn(layout.blocks * layout.block_size, layout.width).to(torch.bfloat16)
    pipe.send(str(where))
    while (order := pipe.recv())[0] != "end":
        if order[0] == "cpu":
            pipe.send(own_processor_time())
        else:
            _, room, rows = order
            transfer.serve(manager, pipe, room, transfer.source_rows(source[:rows]))
            pipe.send("ended")
    manager.close()
    registry.close()
    pipe.send("closed")


def language_process(pipe: Connection, plane: str, layout: BufferLayout, rank: int, way: str, peer: str) -> None:
    torch.set_num_threads(1)
    manager = language_manager(pipe, plane, layout, rank, way)
    manager.start()
    pipe.send("ready")
    while (order := pipe.recv())[0] != "end":
        if order[0] == "cpu":
            pipe.send(own_processor_time())
        else:
            receive(manager, peer, *order[1:])
            pipe.send("there")
    manager.close()
    pipe.send("closed")


def language_manager(
    pipe: Connection, plane: str, layout: BufferLayout, rank: int, way: str
) -> LanguageManager | BorrowingManager:
    def gather(own: Any) -> Any:
        pipe.send(own)
        return pipe.recv()

    config = transfer.config(plane)
    neighbours = meet(rank, gather, may_share=way == ONE)
    if neighbours.lender is not None:
        return BorrowingManager(Borrower(neighbours.lender, layout, CPU), config, LIMITS, NOBODY)
    return LanguageManager.open(
        layout,
        config,
        host=transfer.HOST,
        ranks=neighbours.receiving,
        max_rows=layout.blocks * layout.block_size,
        limits=LIMITS,
        borrowers=neighbours.borrowers,
    )


def receive(manager: LanguageManager | BorrowingManager, peer: str, number: int, rows: int) -> None:
    poller = zmq.Poller()
    poller.register(manager.wakeup_fd, zmq.POLLIN)
    receiver = MooncakeEmbeddingReceiver(manager, peer, number, number)
    receiver.start(hint_rows=rows)
    while receiver.poll() not in transfer.ENDED:
        poller.poll()
        manager.drain_events()
    assert receiver.poll() is Status.SUCCESS, receiver.failure()
    assert receiver.rows().total == rows


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")  # before anything is open here; so that six processes import once
    main()
