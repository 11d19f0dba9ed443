"""How fast rows get from one process to another, beside the raw engine that writes the same bytes as one entry.

    .venv/bin/python benchmark/transfer.py [--planes mooncake shared_memory] [--repeat 9] [--quick] [--out FOLDER]

Each point is one request: registry known, blocks free, rows ready at the encode side; the time runs from the language
side's request to the last row in its tensor. `raw` is Mooncake over TCP alone, by its own blocking call: as many
bytes, as one entry, from registered memory to registered memory. `asleep` is the same as the plugin does it: its
blocking call spins, and what waits asleep leaves a core to the threads that move the bytes. `copies` is what shared
memory cannot do without: one thread copies the bytes into it, and another one out of it and looks at them, piece by
piece. `entries` is the raw engine by its own call again, with the entries that a pool without free neighbours makes
of these bytes. All points of one block size and all of these take turns, one request each, so that what else the
machine does falls on all of them; a ratio is taken within a turn. `best` is the quickest of the raw engine's turns
over the quickest of the point's: what is left when nobody else was at work. With `--device cuda` the rows begin on
that device and the time ends when they are there again; only one size is measured then. `to host` and `to device` are
what its own copies of the same bytes take, from and to page-locked memory.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the machine
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
import zmq  # noqa: E402

from embedding_relay.config import RelayConfig  # noqa: E402
from embedding_relay.memory.buffers import SourceRows  # noqa: E402
from embedding_relay.memory.checks import ModelLimits  # noqa: E402
from embedding_relay.memory.device import everything_queued_on  # noqa: E402
from embedding_relay.memory.engine import MooncakeDataPlane  # noqa: E402
from embedding_relay.memory.layout import BufferLayout  # noqa: E402
from embedding_relay.memory.plane import Entry, Region  # noqa: E402
from embedding_relay.protocol.messages import RECORD_BYTES, Address  # noqa: E402
from embedding_relay.protocol.status import Status  # noqa: E402
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer  # noqa: E402
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender  # noqa: E402
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver  # noqa: E402

HOST: Final = "127.0.0.1"
ENDED: Final = (Status.SUCCESS, Status.FAILED)
HIDDEN: Final = 4096
MIB: Final = 2**20
ROWS_PER_MIB: Final = MIB // (2 * HIDDEN)
WARM_UP: Final = 2  # turns that pay for connections and fresh pages
RAW: Final = "raw"
ASLEEP: Final = "asleep"
ENTRIES: Final = "entries"
COPIES: Final = "copies"
COPY_PIECES: Final = 8


class Point(NamedTuple):
    """One request: how large, in how many pieces, into blocks of what size, neighbours or not."""

    mib: int
    resumes: int
    block: int
    fragmented: bool

    @property
    def rows(self) -> int:
        return self.mib * ROWS_PER_MIB

    @property
    def offered(self) -> int:
        """Blocks, of which there are only whole ones: for about as many resumes as are wanted."""
        return max(1, round(self.rows / ((self.resumes + 1) * self.block)))

    @property
    def rounds(self) -> int:
        return -(-self.rows // (self.offered * self.block))

    @property
    def is_possible(self) -> bool:
        return self.rounds > self.resumes // 2 + min(1, self.resumes)


def points(quick: bool) -> list[Point]:
    if quick:
        return [Point(2, 0, 16, False), Point(2, 8, 16, False), Point(2, 0, 16, True)]
    usual = [Point(mib, resumes, 128, False) for mib in (1, 8, 64, 256) for resumes in (0, 1, 8, 64)]
    fragmented = [Point(mib, 0, block, True) for mib in (8, 64) for block in (16, 128)]
    blocks = [Point(64, resumes, block, False) for block in (16, 1024) for resumes in (0, 8)]
    return [point for point in (*usual, *fragmented, *blocks) if point.is_possible]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", nargs="+", default=["mooncake"], choices=["mooncake", "shared_memory"])
    parser.add_argument("--mib", type=int, nargs="+", help="only requests of these sizes")
    parser.add_argument("--block", type=int, nargs="+", help="only blocks of these sizes")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    report.add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [
        point
        for point in points(options.quick)
        if point.mib in (options.mib or [point.mib]) and point.block in (options.block or [point.block])
    ]
    if options.device != "cpu":
        chosen = [point for point in chosen if point.block == 128 and point.mib == 64 and not point.fragmented]
    facts, repeat = report.machine(), 2 if options.quick else options.repeat
    print(report.describe(facts))
    results: list[dict[str, Any]] = []
    for plane in options.planes:
        for block in sorted({point.block for point in chosen}):
            results += measure(plane, [point for point in chosen if point.block == block], repeat, options.device)
    show(results)
    if options.device != "cpu":
        show_copies(64, options.device, repeat)
    report.save(options.out, "transfer", facts, results, drawing(results))


# ---- the language side, and who takes turns


Seconds = dict[Point | tuple[str, int], list[float]]


def share(seconds: Seconds, what: Point | tuple[str, int], how: str, mib: int) -> report.Figures:
    """In the same turns."""
    return report.Figures.of(alone / one for one, alone in zip(seconds[what], seconds[how, mib], strict=True))


def beside_raw(seconds: Seconds, what: str, mib: int) -> dict[str, report.Figures]:
    return {
        f"{what}_milliseconds": report.Figures.of(map(in_ms, seconds[what, mib])),
        f"{what}_of_raw": share(seconds, (what, mib), RAW, mib),
    }


def measure(plane: str, chosen: Sequence[Point], repeat: int, device: str) -> Iterator[dict[str, Any]]:
    most = max(point.rows for point in chosen)
    block = chosen[0].block
    layout = layout_for(most, block)
    with encode_process(plane, layout, most, device) as pipe:
        manager = open_language(plane, layout, most, device)
        memory = torch.zeros(most * HIDDEN * 2, dtype=torch.uint8)
        raw = MooncakeDataPlane(HOST, "tcp")
        raw.start([Region(memory.data_ptr(), memory.numel())])
        pipe.send(("raw", raw.session_id, memory.data_ptr()))
        seconds = take_turns(manager, pipe, chosen, repeat, device)
        manager.close()
        raw.close()
    for point in chosen:
        yield {
            "plane": plane,
            **point._asdict(),
            "rounds": point.rounds,
            "milliseconds": report.Figures.of(map(in_ms, seconds[point])),
            "raw_milliseconds": report.Figures.of(map(in_ms, seconds[RAW, point.mib])),
            "asleep_milliseconds": report.Figures.of(map(in_ms, seconds[ASLEEP, point.mib])),
            "of_raw": share(seconds, point, RAW, point.mib),
            "of_asleep": share(seconds, point, ASLEEP, point.mib),
            "best_of_raw": min(seconds[RAW, point.mib]) / min(seconds[point]),
            **beside_raw(seconds, COPIES, point.mib),
            **(beside_raw(seconds, ENTRIES, point.mib) if point.fragmented else {}),
            "gb_per_s": report.Figures.of(rate(point.mib, one) for one in seconds[point]),
        }


def layout_for(most: int, block: int) -> BufferLayout:
    # Twice the blocks for a pool of which every other one is taken, and the eighth that no one instance may hold.
    return BufferLayout(HIDDEN, "bfloat16", 0, block, blocks=-(-most // block) * 16 // 7 + 16)


def take_turns(
    manager: LanguageManager, pipe: Connection, chosen: Sequence[Point], repeat: int, device: str
) -> Seconds:
    """By point, and the engine's alone by how it is waited for and the number of MiB."""
    seconds: Seconds = {
        one: [] for point in chosen for one in (point, *((how, point.mib) for how in (RAW, ASLEEP, ENTRIES, COPIES)))
    }
    scattered = {point.mib: point.block for point in chosen if point.fragmented}
    room, peer = 0, f"{HOST}:{pipe.recv()}"
    copies = Copies(max(point.mib for point in chosen) * MIB)
    for turn in range(repeat + WARM_UP):
        for mib in sorted({point.mib for point in chosen}):
            for how in (RAW, ASLEEP):
                pipe.send((how, mib * MIB))
                seconds[how, mib].append(pipe.recv())
            if mib in scattered:
                pipe.send((ENTRIES, mib * MIB, scattered[mib]))
                seconds[ENTRIES, mib].append(pipe.recv())
            seconds[COPIES, mib].append(copies.time(mib * MIB))
            for point in (one for one in chosen if one.mib == mib):
                room += 1
                seconds[point].append(one_request(manager, pipe, peer, room, point, device))
        if turn < WARM_UP:
            for measured in seconds.values():
                measured.clear()
    return seconds


def one_request(manager: LanguageManager, pipe: Connection, peer: str, room: int, point: Point, device: str) -> float:
    poller = zmq.Poller()
    poller.register(manager.wakeup_fd, zmq.POLLIN)
    with only(manager, point.offered, point.fragmented):
        pipe.send(("room", room, point.rows, point.fragmented))
        assert pipe.recv() == "expecting"
        started = time.perf_counter()
        receiver = MooncakeEmbeddingReceiver(manager, peer, room)
        receiver.start(hint_rows=point.offered * point.block)
        while receiver.poll() not in ENDED:
            poller.poll()
            manager.drain_events()
        if receiver.poll() is Status.SUCCESS and device != "cpu":
            receiver.rows().embeddings.to(device)
        ended = time.perf_counter()
        assert receiver.poll() is Status.SUCCESS, receiver.failure()
        assert receiver.rounds >= point.rounds, (receiver.rounds, point)  # more if they are of half the blocks
        assert pipe.recv() == "ended"
    return ended - started


class Copies:
    """Two copies, and the look at what has come."""

    def __init__(self, most: int) -> None:
        self._source, self._target = np.ones(most, np.uint8), np.ones(most, np.uint8)
        self._shared = np.frombuffer(mmap.mmap(-1, most), np.uint8)  # as the pool is: shared, of ordinary pages
        self._shared[:] = 1

    def time(self, length: int) -> float:
        arrived = threading.Semaphore(0)
        size = length // COPY_PIECES
        pieces = [
            [slice(at, min(at + MIB, start + size)) for at in range(start, start + size, MIB)]
            for start in range(0, length, size)
        ]

        def write() -> None:
            for piece in pieces:
                for part in piece:
                    np.copyto(self._shared[part], self._source[part])
                arrived.release()

        writer = threading.Thread(target=write)
        started = time.perf_counter()
        writer.start()
        for piece in pieces:
            arrived.acquire()
            for part in piece:
                np.copyto(self._target[part], self._shared[part])
                values = self._target[part].view(np.int16)
                assert values.max() <= values.view(np.uint16).max()
        writer.join()
        return time.perf_counter() - started


@contextmanager
def only(manager: LanguageManager | EncodeManager, free: int | None, fragmented: bool) -> Iterator[None]:
    """With so many free blocks, none of them neighbours if that is asked for. No room is under way, so nobody minds."""
    pool = manager.pool
    if fragmented:
        everything = pool.lease(pool.free, "benchmark")
        gaps = everything[1::2][:free]
        pool.give_back(gaps, "benchmark")
        taken = sorted(set(everything) - set(gaps))
    else:
        taken = list(pool.lease(pool.free - free, "benchmark")) if free else []
    yield
    pool.give_back(taken, "benchmark")


def open_language(plane: str, layout: BufferLayout, most: int, device: str) -> LanguageManager:
    limits = ModelLimits(vocabulary=1, modalities=frozenset({1}))
    manager = LanguageManager.open(
        layout, config(plane), host=HOST, ranks=1, max_rows=most, limits=limits, device=device
    )
    manager.start()
    return manager


def config(plane: str) -> RelayConfig:
    return RelayConfig.from_environment({**os.environ, "SGLANG_EMBEDDING_DATA_PLANE": plane})


# ---- the encode side, and the raw engine: in a process of their own


@contextmanager
def encode_process(
    plane: str, layout: BufferLayout, most: int, device: str, target: Callable[..., None] | None = None
) -> Iterator[Connection]:
    """`target`: in place of `encode_instance`."""
    here, there = multiprocessing.Pipe()
    arguments = there, plane, layout, most, device
    process = multiprocessing.Process(target=target or encode_instance, args=arguments, daemon=True)
    process.start()
    yield here
    here.send(("end",))
    process.join()


def encode_instance(pipe: Connection, plane: str, layout: BufferLayout, most: int, device: str) -> None:
    torch.set_num_threads(1)
    registry = MooncakeEmbeddingBootstrapServer(HOST, 0)
    registry.start()
    address = Address(HOST, registry.port)
    manager = EncodeManager.open(layout, config(plane), host=HOST, bootstrap=address, device=device)
    manager.start()
    source = torch.randn(most, layout.width).to(device, torch.bfloat16)
    _, session_id, pointer = pipe.recv()
    memory = torch.ones(most * HIDDEN * 2, dtype=torch.uint8)
    raw = MooncakeDataPlane(HOST, "tcp", receives=False)
    raw.start([Region(memory.data_ptr(), memory.numel())])
    link, engine = raw.link(session_id), raw.make_engine()
    pipe.send(registry.port)
    while (order := pipe.recv())[0] != "end":
        if order[0] in (RAW, ASLEEP, ENTRIES):
            one = [Entry(memory.data_ptr(), pointer, order[1])]
            entries = of_scattered_blocks(one[0], order[2]) if order[0] == ENTRIES else one
            columns = [list(column) for column in zip(*entries, strict=True)]
            started = time.perf_counter()
            if order[0] == ASLEEP:
                link.write(one)
            else:
                assert not engine.batch_transfer_sync_write(session_id, *columns)
            pipe.send(time.perf_counter() - started)
        else:
            _, room, rows, fragmented = order
            with only(manager, None, fragmented):
                serve(manager, pipe, room, source_rows(source[:rows]))
            pipe.send("ended")
    link.close()
    del engine
    raw.close()
    manager.close()
    registry.close()


def of_scattered_blocks(whole: Entry, block: int) -> Iterator[Entry]:
    """An entry for the embeddings of each block, and one for its records."""
    source, target, length = whole
    for start in range(0, length, block * HIDDEN * 2):
        yield Entry(source + start, target + start, block * HIDDEN * 2)
        yield Entry(source, target, block * RECORD_BYTES)


def serve(manager: EncodeManager, pipe: Connection, room: int, source: SourceRows) -> None:
    poller = zmq.Poller()
    poller.register(manager.wakeup_fd, zmq.POLLIN)
    sender = MooncakeEmbeddingSender(manager, room)
    sender.init()
    pipe.send("expecting")
    while sender.poll() not in ENDED:
        poller.poll()
        manager.drain_events()
        if sender.poll() is Status.WAITING_FOR_INPUT:
            sender.send_embedding(source)


def source_rows(made: torch.Tensor) -> SourceRows:
    rows = made.shape[0]
    return SourceRows(
        total=rows,
        fill_ids=torch.zeros(rows, dtype=torch.int32),
        mrope=torch.zeros(rows, 3, dtype=torch.int32),
        items=torch.tensor([[0, 1, 0, 0]], dtype=torch.int32).repeat(rows, 1),
        segments=[(0, made)],
        media_items=1,
        ready=everything_queued_on(made.device),
    )


# ---- what came of it


def show(results: Sequence[Mapping[str, Any]]) -> None:
    columns = "plane", "MiB", "rounds", "block", "pool", "ms", "raw ms", "asleep ms", "of raw", "of asleep", "best"
    table = report.Table("Medians, and the quarters on either side.", *columns)
    for one in results:
        state = "fragmented" if one["fragmented"] else "fresh"
        figures = [
            one[key] for key in ("milliseconds", "raw_milliseconds", "asleep_milliseconds", "of_raw", "of_asleep")
        ]
        table.row(one["plane"], one["mib"], one["rounds"], one["block"], state, *figures, f"{one['best_of_raw']:.2f}")
    shared = [one for one in results if one["plane"] == "shared_memory"]
    scattered = [one for one in results if one["plane"] == "mooncake" and one["fragmented"]]
    for what, those in ((COPIES, shared), (ENTRIES, scattered)):
        if not those:
            continue
        table = report.Table(f"The raw engine, and {what}.", "block", "MiB", f"{what} ms", "raw ms", "of raw")
        for one in {(one["block"], one["mib"]): one for one in those}.values():
            figures = one[f"{what}_milliseconds"], one["raw_milliseconds"], one[f"{what}_of_raw"]
            table.row(one["block"], one["mib"], *figures)


def show_copies(mib: int, device: str, repeat: int) -> None:
    table = report.Table("The device's own copies.", "", "MiB", "ms", "GB/s")
    on_device = torch.empty(mib * MIB, dtype=torch.uint8, device=device)
    on_host = torch.empty_like(on_device, device="cpu").pin_memory()
    for name, target, source in (("to host", on_host, on_device), ("to device", on_device, on_host)):
        seconds: list[float] = []
        for _ in range(repeat + WARM_UP):
            torch.accelerator.synchronize()
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - started)
        figures = (report.Figures.of(f(one) for one in seconds[WARM_UP:]) for f in (in_ms, lambda s: rate(mib, s)))
        table.row(name, mib, *figures)


def in_ms(seconds: float) -> float:
    return 1e3 * seconds


def rate(mib: int, seconds: float) -> float:
    return mib * MIB / seconds / 1e9


def drawing(results: Sequence[Mapping[str, Any]]) -> str:
    lines: dict[str, dict[float, report.Figures]] = {}
    for one in results:
        if one["block"] in (128, 16) and (one["block"] == 128 or one["fragmented"] or len(results) < 10):
            state = f", {one['block']}, fragm." if one["fragmented"] else ""
            name = f"{one['plane'].split('_')[0]}, {one['resumes']} resumes{state}"
            lines.setdefault(name, {})[one["mib"]] = one["of_raw"]
    return report.plot("Whole path beside the raw TCP engine", "MiB", "share of the raw engine's rate", lines)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
