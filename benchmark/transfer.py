"""How fast rows move from one process to another on this machine, at once and in resumed pieces, measured in one run.

    .venv/bin/python benchmark/transfer.py [--rows 8192] [--hidden 4096] [--repeat 5] [--device cuda]

Every line is the same request: registry known, blocks free, rows ready at the encode side. The time is from the
language side's request to the last row in its tensor. `raw` is Mooncake alone: the same bytes as one entry. With
`--device` the rows begin on that device and the time ends when they are there again; `to host` and `to device` are
what its own copies of the same bytes take, from and to page-locked memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch
import zmq

warnings.simplefilter("ignore")
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")

from embedding_relay.config import RelayConfig  # noqa: E402
from embedding_relay.memory.buffers import SourceRows  # noqa: E402
from embedding_relay.memory.checks import ModelLimits  # noqa: E402
from embedding_relay.memory.device import everything_queued_on  # noqa: E402
from embedding_relay.memory.engine import MooncakeDataPlane  # noqa: E402
from embedding_relay.memory.layout import BufferLayout  # noqa: E402
from embedding_relay.memory.plane import Entry, Region  # noqa: E402
from embedding_relay.protocol.messages import Address  # noqa: E402
from embedding_relay.protocol.status import Status  # noqa: E402
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer  # noqa: E402
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender  # noqa: E402
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver  # noqa: E402

HOST = "127.0.0.1"
ENDED = (Status.SUCCESS, Status.FAILED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="of one request, all of them media")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows, block = options.rows, options.block_size
    layout = BufferLayout(options.hidden, "bfloat16", 0, block, blocks=-(-rows // block))
    size = rows * sum(column.bytes_per_row for column in layout.columns if not column.per_block)
    print(f"{rows} rows of {options.hidden} bfloat16, blocks of {block}: {size / 1e6:.1f} MB per request")
    print(f"{'first offer':>12} {'rounds':>7} {'median ms':>10} {'best ms':>9} {'GB/s':>6}")
    report("raw", 1, measure_raw(size, options.repeat), size)
    if options.device != "cpu":
        for name, seconds in measure_copies(layout, rows, options.device, options.repeat):
            report(name, 1, seconds, rows * layout.width * 2)
    offers = [rows, rows // 2, rows // 4, rows // 8, block]
    for offer in offers:
        rounds, seconds = measure_relay(layout, rows, offer, options.repeat, options.device)
        report(str(offer), rounds, seconds, size)


def report(name: str, rounds: int, seconds: list[float], size: int) -> None:
    median, best = statistics.median(seconds), min(seconds)
    print(f"{name:>12} {rounds:>7} {median * 1e3:>10.2f} {best * 1e3:>9.2f} {size / median / 1e9:>6.2f}", flush=True)


def measure_relay(layout: BufferLayout, rows: int, offer: int, repeat: int, device: str) -> tuple[int, list[float]]:
    """On the language side one encode instance may have exactly the offered blocks, so that no resume can grow."""
    here, there = multiprocessing.Pipe()
    encode = multiprocessing.Process(target=encode_instance, args=(there, layout, rows, device), daemon=True)
    encode.start()
    offered = max(1, offer // layout.block_size)
    small = dataclasses.replace(layout, blocks=next(n for n in itertools.count(offered) if n - n // 8 == offered))
    limits = ModelLimits(vocabulary=1, modalities=frozenset({1}))
    manager = LanguageManager.open(
        small, RelayConfig(), host=HOST, ranks=1, max_rows=rows, limits=limits, device=device
    )
    manager.start()
    peer = f"{HOST}:{here.recv()}"
    poller = zmq.Poller()
    poller.register(manager.wakeup_fd, zmq.POLLIN)
    seconds: list[float] = []
    for room in range(repeat + 2):  # the first two pay for connections and fresh pages
        here.send(room)
        here.recv()
        started = time.perf_counter()
        receiver = MooncakeEmbeddingReceiver(manager, peer, room)
        receiver.start(hint_rows=offer)
        while receiver.poll() not in ENDED:
            poller.poll()
            manager.drain_events()
        if receiver.poll() is Status.SUCCESS:
            receiver.rows().embeddings.to(device)
        seconds.append(time.perf_counter() - started)
        assert receiver.poll() is Status.SUCCESS, receiver.failure()
    manager.close()
    here.send(None)
    encode.join()
    return receiver.rounds, seconds[2:]


def encode_instance(pipe: Connection, layout: BufferLayout, rows: int, device: str) -> None:
    registry = MooncakeEmbeddingBootstrapServer(HOST, 0)
    registry.start()
    address = Address(HOST, registry.port)
    manager = EncodeManager.open(layout, RelayConfig(), host=HOST, bootstrap=address, device=device)
    manager.start()
    source = source_rows(layout, rows, device)
    pipe.send(registry.port)
    poller = zmq.Poller()
    poller.register(manager.wakeup_fd, zmq.POLLIN)
    while (room := pipe.recv()) is not None:
        sender = MooncakeEmbeddingSender(manager, room)
        sender.init()
        pipe.send("expecting")
        while sender.poll() not in ENDED:
            poller.poll()
            manager.drain_events()
            if sender.poll() is Status.WAITING_FOR_INPUT:
                sender.send_embedding(source)
    manager.close()
    registry.close()


def source_rows(layout: BufferLayout, rows: int, device: str) -> SourceRows:
    made = torch.randn(rows, layout.width).to(device, torch.bfloat16)
    return SourceRows(
        total=rows,
        fill_ids=torch.zeros(rows, dtype=torch.int32),
        mrope=torch.zeros(rows, 3, dtype=torch.int32),
        items=torch.tensor([[0, 1, 0, 0]], dtype=torch.int32).repeat(rows, 1),
        segments=[(0, made)],
        media_items=1,
        ready=everything_queued_on(made.device),
    )


def measure_copies(layout: BufferLayout, rows: int, device: str, repeat: int) -> Iterator[tuple[str, list[float]]]:
    on_device = torch.empty(rows, layout.width, dtype=torch.bfloat16, device=device)
    on_host = torch.empty_like(on_device, device="cpu").pin_memory()
    for name, target, source in (("to host", on_host, on_device), ("to device", on_device, on_host)):
        seconds: list[float] = []
        for _ in range(repeat + 2):
            torch.accelerator.synchronize()
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - started)
        yield name, seconds[2:]


def measure_raw(size: int, repeat: int) -> list[float]:
    here, there = multiprocessing.Pipe()
    target = multiprocessing.Process(target=raw_target, args=(there, size), daemon=True)
    target.start()
    session_id, pointer = here.recv()
    memory = torch.ones(size, dtype=torch.uint8)
    plane = MooncakeDataPlane(HOST, receives=False)
    plane.start([Region(memory.data_ptr(), size)])
    link = plane.link(session_id)
    seconds: list[float] = []
    for _ in range(repeat + 2):
        started = time.perf_counter()
        link.write([Entry(memory.data_ptr(), pointer, size)])
        seconds.append(time.perf_counter() - started)
    link.close()
    plane.close()
    here.send(None)
    target.join()
    return seconds[2:]


def raw_target(pipe: Connection, size: int) -> None:
    memory = torch.zeros(size, dtype=torch.uint8)
    plane = MooncakeDataPlane(HOST)
    plane.start([Region(memory.data_ptr(), size)])
    pipe.send((plane.session_id, memory.data_ptr()))
    pipe.recv()
    plane.close()


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
