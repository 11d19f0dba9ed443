"""What a room and a message cost in processor time: with few rooms in flight and many, with few ranks and many.

    .venv/bin/python benchmark/scale.py [--rooms 10 100 1000 10000] [--repeat 3] [--quick] [--out FOLDER]

`core`: both protocol cores in one process and one thread, their messages encoded and decoded, nothing moved. All rooms
are in flight at a time and each needs three offers. `blocks for all`: every room holds a block. `blocks for 64`: most
of them wait for one. `ranks`: the same cores behind their control threads and real ZMQ sockets, encode ranks in one
process, language ranks in another; no bytes are written. Processor time is that of all threads.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final

import report

from embedding_relay.protocol import codec
from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import (
    CopyOut,
    Deliver,
    EncodeEffect,
    LanguageEffect,
    Resolve,
    Send,
    StatusChanged,
    TransferEmbeddingChunk,
)
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import PROTOCOL_VERSION, Address, Handshake, Register
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Timing
from embedding_relay.transport.loop import ControlLoop

HOST: Final = "127.0.0.1"
BLOCK: Final = 128
OFFERS: Final = 3
ROWS: Final = BLOCK * OFFERS
FEW_BLOCKS: Final = 64
TIMING: Final = Timing(bootstrap=600.0, first_word=600.0, waiting=600.0, heartbeat_interval=600.0)
Do = Callable[[Address, list[bytes]], None]


def handshake(blocks: int) -> Handshake:
    return Handshake(
        version=PROTOCOL_VERSION, block_size=BLOCK, item_lens=(4096,), dtype="bfloat16", deepstack_rows=0, blocks=blocks
    )


class Encode:
    """An encode side whose rows are ready at once and whose writes take no time."""

    def __init__(self, name: str, blocks: int, send: Do) -> None:
        pool = BlockPool(blocks)
        self.core = EncodeSide(handshake=handshake(blocks), instance=name, pool=pool, timing=TIMING, rank=0, ranks=1)
        self._send = send
        self.messages = 0

    def expect(self, room: int, now: float) -> None:
        self._run(self.core.expect(room, now), now)

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        self._run(self.core.receive(codec.decode_to_encode(frames), now), now)

    def tick(self, now: float) -> None:
        self._run(self.core.tick(now), now)

    def next_wakeup(self) -> float | None:
        return self.core.next_wakeup()

    def _run(self, effects: Iterable[EncodeEffect], now: float) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.messages += 1
                self._send(effect.to, codec.encode(effect.message))
            elif isinstance(effect, StatusChanged) and effect.status is Status.WAITING_FOR_INPUT:
                self._run(self.core.submit(effect.room, ROWS, now), now)
            elif isinstance(effect, TransferEmbeddingChunk):
                self._run(self.core.transferred(effect.room, effect.transfer_id, {}, now), now)


class Language:
    """A language side whose copies take no time, and who knows where encode instances are."""

    def __init__(self, address: Address, blocks: int, send: Do, instances: dict[str, Address]) -> None:
        register = Register(address, f"{address.host}:{address.port}", (4096,), handshake(blocks))
        self.core = LanguageSide(
            register=register, pool=BlockPool(blocks), default_tokens=BLOCK, max_rows=ROWS, ranks=1, timing=TIMING
        )
        self._send = send
        self._instances = instances
        self.messages = self.delivered = 0
        self.wanted = 0
        self.done = threading.Event()

    def request(self, room: int, peer: str, now: float) -> None:
        self._run(self.core.request(room, peer, now), now)

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        self._run(self.core.receive(codec.decode_to_language(frames), now), now)

    def tick(self, now: float) -> None:
        self._run(self.core.tick(now), now)

    def next_wakeup(self) -> float | None:
        return self.core.next_wakeup()

    def _run(self, effects: Iterable[LanguageEffect], now: float) -> None:
        waiting = deque(effects)
        while waiting:
            effect = waiting.popleft()
            if isinstance(effect, Send):
                self.messages += 1
                self._send(effect.to, codec.encode(effect.message))
            elif isinstance(effect, Resolve):
                address = self._instances[effect.peer]
                waiting.extend(self.core.peer_resolved(effect.peer, address, effect.peer, now))
            elif isinstance(effect, CopyOut):
                rows = min(effect.capacity, ROWS - effect.first_row)
                waiting.extend(self.core.copied(effect.room, rows, ROWS, now))
            elif isinstance(effect, Deliver):
                self.delivered += 1
                if self.delivered == self.wanted:
                    self.done.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16], help="on either side")
    parser.add_argument("--repeat", type=int, default=3)
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.rooms, options.ranks, options.repeat = [10, 100], [1, 2], 1
    facts = report.machine()
    print(report.describe(facts))
    cores = measure_cores(options.rooms, options.repeat)
    pairs = list(itertools.product(options.ranks, repeat=2))
    ranks = measure_ranks(pairs, 100 if options.quick else 1600, options.repeat)
    report.save(options.out, "scale", facts, {"core": cores, "ranks": ranks}, drawing(cores))


# ---- the cores alone


def measure_cores(numbers: Sequence[int], repeat: int) -> list[dict[str, Any]]:
    table = report.Table("core", "blocks", "rooms in flight", "µs per room", "µs per message")
    results = []
    for kind in ("for all", f"for {FEW_BLOCKS}"):
        costs: dict[int, list[tuple[float, float]]] = {number: [] for number in numbers}
        for _, number in itertools.product(range(repeat), numbers):
            # With few rooms many times over, so that the clock has something to measure.
            often = max(1, 1000 // number)
            once = [core_cost(number, number if kind == "for all" else FEW_BLOCKS) for _ in range(often)]
            rooms, messages = number * often, sum(messages for _, messages in once)
            seconds = sum(seconds for seconds, _ in once)
            costs[number].append((1e6 * seconds / rooms, 1e6 * seconds / messages))
        for number, measured in costs.items():
            per_room, per_message = (report.Figures.of(column) for column in zip(*measured, strict=True))
            table.row(kind, number, per_room, per_message)
            results.append({"blocks": kind, "rooms": number, "per_room": per_room, "per_message": per_message})
    return results


def core_cost(rooms: int, blocks: int) -> tuple[float, int]:
    """(processor seconds, messages) of so many rooms, all in flight at a time."""
    to_encode: deque[list[bytes]] = deque()
    to_language: deque[list[bytes]] = deque()
    encode = Encode("encode", rooms * OFFERS + 1, lambda _, frames: to_language.append(frames))
    known = {"encode": Address(HOST, 1)}
    # An eighth of the pool is left to other encode instances.
    pool = blocks * 8 // 7 + 2
    language = Language(Address(HOST, 2), pool, lambda _, frames: to_encode.append(frames), known)
    clock = itertools.count(1)

    def go_on() -> None:
        while to_encode or to_language:
            now = next(clock) * 1e-6
            for queue, side in ((to_encode, encode), (to_language, language)):
                if queue:
                    side.receive(queue.popleft(), now)
                if (due := side.next_wakeup()) is not None and due <= now:
                    side.tick(now)

    encode.expect(0, 0.0)
    language.request(0, "encode", 0.0)  # an instance is trusted with more than one room when it has delivered one
    go_on()
    encode.messages = language.messages = 0
    started = time.process_time()
    for room in range(1, rooms + 1):
        now = next(clock) * 1e-6
        encode.expect(room, now)
        language.request(room, "encode", now)
    go_on()
    seconds = time.process_time() - started
    assert language.delivered == rooms + 1, language.core.sizes()
    return seconds, encode.messages + language.messages


def drawing(cores: Sequence[dict[str, Any]]) -> str:
    lines: dict[str, dict[float, report.Figures]] = {}
    for one in cores:
        lines.setdefault(f"blocks {one['blocks']}", {})[one["rooms"]] = one["per_room"]
    return report.plot("Processor time of both cores", "rooms in flight", "µs per room", lines)


# ---- ranks over ZMQ


def measure_ranks(pairs: Sequence[tuple[int, int]], rooms: int, repeat: int) -> list[dict[str, Any]]:
    columns = "encode ranks", "language ranks", "µs per room", "µs per message", "rooms/s"
    table = report.Table(f"ranks, {rooms} rooms in flight", *columns)
    results = []
    costs: dict[tuple[int, int], list[tuple[float, ...]]] = {pair: [] for pair in pairs}
    for _, pair in itertools.product(range(repeat), pairs):
        costs[pair].append(ranks_cost(*pair, rooms))
    for (encodes, languages), measured in costs.items():
        figures = [report.Figures.of(column) for column in zip(*measured, strict=True)]
        table.row(encodes, languages, *figures)
        names = "per_room", "per_message", "rooms_per_s"
        pair = {"encode_ranks": encodes, "language_ranks": languages}
        results.append(pair | dict(zip(names, figures, strict=True)))
    return results


class Rank:
    """A side behind its control thread."""

    def __init__(self) -> None:
        self.loop = ControlLoop(HOST, codec.MAX_FRAME_BYTES)
        self.address = self.loop.open()
        self.thread: threading.Thread | None = None

    def run(self, side: Encode | Language) -> None:
        self.thread = threading.Thread(target=self.loop.run, args=(side, lambda: None))
        self.thread.start()

    def close(self) -> None:
        self.loop.stop()
        if self.thread:
            self.thread.join()


def ranks_cost(encodes: int, languages: int, rooms: int) -> tuple[float, float, float]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=encode_ranks, args=(there, encodes, rooms), daemon=True)
    process.start()
    instances: dict[str, Address] = here.recv()
    names = list(instances)
    ranks = [Rank() for _ in range(languages)]
    sides = [Language(rank.address, rooms * 8 // 7 + 2, rank.loop.send, instances) for rank in ranks]
    for rank, side in zip(ranks, sides, strict=True):
        rank.run(side)
    # One room of each pair first: then each is trusted, and connected.
    first = encodes * languages
    run_rooms(here, ranks, sides, names, range(first))
    messages = ask_messages(here) + sum(side.messages for side in sides)
    cpu, started = ask_cpu(here) + time.process_time(), time.perf_counter()
    run_rooms(here, ranks, sides, names, range(first, first + rooms))
    elapsed, cpu = time.perf_counter() - started, ask_cpu(here) + time.process_time() - cpu
    messages = ask_messages(here) + sum(side.messages for side in sides) - messages
    for rank in ranks:
        rank.close()
    here.send(("end", None))
    process.join()
    return 1e6 * cpu / rooms, 1e6 * cpu / messages, rooms / elapsed


def run_rooms(
    pipe: Connection, ranks: Sequence[Rank], sides: Sequence[Language], names: Sequence[str], rooms: range
) -> None:
    pipe.send(("expect", rooms))
    pipe.recv()
    shares = [[room for room in rooms if room // len(names) % len(sides) == number] for number in range(len(sides))]
    for side, share in zip(sides, shares, strict=True):
        side.wanted = side.delivered + len(share)
        side.done.clear()
    for rank, side, share in zip(ranks, sides, shares, strict=True):
        for room in share:
            rank.loop.post(functools.partial(side.request, room, names[room % len(names)]))
    for side, share in zip(sides, shares, strict=True):
        assert not share or side.done.wait(120), side.core.sizes()


def ask_cpu(pipe: Connection) -> float:
    pipe.send(("cpu", None))
    return float(pipe.recv())


def ask_messages(pipe: Connection) -> int:
    pipe.send(("messages", None))
    return int(pipe.recv())


def encode_ranks(pipe: Connection, number: int, rooms: int) -> None:
    ranks = [Rank() for _ in range(number)]
    sides = [Encode(f"encode{n}", (rooms + 1) * OFFERS, rank.loop.send) for n, rank in enumerate(ranks)]
    for rank, side in zip(ranks, sides, strict=True):
        rank.run(side)
    pipe.send({f"encode{n}": rank.address for n, rank in enumerate(ranks)})
    while (order := pipe.recv())[0] != "end":
        if order[0] == "expect":
            for room in order[1]:
                ranks[room % number].loop.post(functools.partial(sides[room % number].expect, room))
            pipe.send("expecting")
        else:
            pipe.send(time.process_time() if order[0] == "cpu" else sum(side.messages for side in sides))
    for rank in ranks:
        rank.close()


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
