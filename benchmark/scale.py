"""What a room and a message cost in processor time: with few rooms in flight and many, with few ranks and many.

    .venv/bin/python benchmark/scale.py [--rooms 10 100 1000 10000] [--ranks 1 4 16] [--repeat 3] [--quick]
        [--out FOLDER]

`core`: the protocol cores of all ranks in one process and one thread, their messages encoded and decoded, nothing
moved. All rooms are in flight at a time and each needs three blocks. `for all`: there is a block for every room. `for
64`: most rooms wait for one.
`ranks`: the same cores behind their control threads and real ZMQ sockets, each rank in a process of its own, with a
block for each room; no bytes are written. Processor time is that of all threads.
`turns`: one core of each side in each process, without threads or sockets, and one room in flight. The processes take
turns, a room each, so this is what it costs to find the processor's caches full of somebody else's memory.
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
from typing import Any, Final, TypeVar

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
COLUMNS: Final = "per_room", "per_message", "messages"
Costs = tuple[float, float, float]  # what these name
P = TypeVar("P")
Do = Callable[[Address, list[bytes]], None]
Share = list[tuple[int, str]]  # rooms, and the names of their encode instances


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


class Cores:
    """Ranks of both sides in one thread; what they send arrives in the order in which it was sent."""

    def __init__(self, encodes: int, languages: int, encode_blocks: int, blocks: int) -> None:
        self._queue: deque[tuple[Address, list[bytes]]] = deque()
        self._clock = itertools.count(1)
        instances = {f"encode{number}": Address(HOST, 1 + number) for number in range(encodes)}
        self._encode = [Encode(name, encode_blocks, self._send) for name in instances]
        addresses = [Address(HOST, 1001 + number) for number in range(languages)]
        self._language = [Language(address, blocks, self._send, instances) for address in addresses]
        self._sides: dict[Address, Encode | Language] = dict(
            zip([*instances.values(), *addresses], [*self._encode, *self._language], strict=True)
        )

    def _send(self, to: Address, frames: list[bytes]) -> None:
        self._queue.append((to, frames))

    @property
    def messages(self) -> int:
        return sum(side.messages for side in self._sides.values())

    def run(self, rooms: range) -> None:
        """All in flight at a time, from their beginning to their end."""
        wanted = sum(side.delivered for side in self._language) + len(rooms)
        for room in rooms:
            encode, language = places(room, len(self._encode), len(self._language))
            now = self._now()
            self._encode[encode].expect(room, now)
            self._language[language].request(room, f"encode{encode}", now)
        while self._queue:
            to, frames = self._queue.popleft()
            side, now = self._sides[to], self._now()
            side.receive(frames, now)
            if (due := side.next_wakeup()) is not None and due <= now:
                side.tick(now)
        assert sum(side.delivered for side in self._language) == wanted

    def _now(self) -> float:
        return next(self._clock) * 1e-6


def places(room: int, encodes: int, languages: int) -> tuple[int, int]:
    """Each pair of ranks gets as many rooms as any other."""
    return room % encodes, room // encodes % languages


def pool_for(rooms: int) -> int:
    """Blocks for so many rooms at a time: an eighth of a pool is left to other encode instances."""
    return rooms * 8 // 7 + 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16], help="on either side")
    parser.add_argument("--repeat", type=int, default=3)
    report.add_options(parser)
    options = parser.parse_args()
    many = 1600
    if options.quick:
        options.rooms, options.ranks, options.repeat, many = [10, 100], [1, 2], 1, 100
    facts = report.machine()
    print(report.describe(facts))
    pairs = list(itertools.product(options.ranks, repeat=2))
    cores = measure_cores(options.rooms, options.repeat)
    results = {
        "core": cores,
        "core_ranks": measure_ranks("core, ranks in one thread", core_ranks_cost, pairs, many, options.repeat),
        "ranks": measure_ranks("ranks", ranks_cost, pairs, many, options.repeat),
        "turns": measure_turns(options.ranks, many, options.repeat),
    }
    report.save(options.out, "scale", facts, results, drawing(cores))


def by_turns(points: Sequence[P], repeat: int, cost: Callable[[P], tuple[float, ...]]) -> dict[P, list[report.Figures]]:
    costs: dict[P, list[tuple[float, ...]]] = {point: [] for point in points}
    for _, point in itertools.product(range(repeat), points):
        costs[point].append(cost(point))
    return {point: [report.Figures.of(column) for column in zip(*of, strict=True)] for point, of in costs.items()}


def of_one(seconds: float, messages: int, rooms: int) -> Costs:
    return 1e6 * seconds / rooms, 1e6 * seconds / messages, messages / rooms


# ---- the cores alone


def measure_cores(numbers: Sequence[int], repeat: int) -> list[dict[str, Any]]:
    columns = "blocks", "rooms in flight", "µs per room", "µs per message", "messages per room"
    table = report.Table("core", *columns)
    results = []
    for kind in ("for all", f"for {FEW_BLOCKS}"):
        cost = functools.partial(repeated_core_cost, most=None if kind == "for all" else FEW_BLOCKS)
        for number, figures in by_turns(numbers, repeat, cost).items():
            table.row(kind, number, *figures)
            point: dict[str, Any] = {"blocks": kind, "rooms": number}
            results.append(point | dict(zip(COLUMNS, figures, strict=True)))
    return results


def repeated_core_cost(rooms: int, most: int | None) -> Costs:
    """With few rooms many times over, so that the clock has something to measure."""
    often = max(1, 1000 // rooms)
    seconds, messages = zip(*(core_cost(1, 1, rooms, most or rooms) for _ in range(often)), strict=True)
    return of_one(sum(seconds), sum(messages), rooms * often)


def core_cost(encodes: int, languages: int, rooms: int, blocks: int) -> tuple[float, int]:
    """(processor seconds, messages) of rooms that are all in flight; `blocks` are those of a language rank."""
    first = encodes * languages
    cores = Cores(encodes, languages, (rooms // encodes + languages + 1) * OFFERS, pool_for(blocks))
    cores.run(range(first))  # an instance is trusted with more than one room when it has delivered one
    before = cores.messages
    started = time.process_time()
    cores.run(range(first, first + rooms))
    return time.process_time() - started, cores.messages - before


def core_ranks_cost(encodes: int, languages: int, rooms: int) -> Costs:
    return of_one(*core_cost(encodes, languages, rooms, rooms // languages), rooms)


def drawing(cores: Sequence[dict[str, Any]]) -> str:
    lines: dict[str, dict[float, report.Figures]] = {}
    for one in cores:
        lines.setdefault(f"blocks {one['blocks']}", {})[one["rooms"]] = one["per_room"]
    return report.plot("Processor time of both cores", "rooms in flight", "µs per room", lines)


# ---- ranks over ZMQ


def measure_ranks(
    title: str, cost: Callable[[int, int, int], Costs], pairs: Sequence[tuple[int, int]], rooms: int, repeat: int
) -> list[dict[str, Any]]:
    columns = "encode ranks", "language ranks", "µs per room", "µs per message", "messages per room"
    table = report.Table(f"{title}, {rooms} rooms in flight", *columns)
    results = []
    for (encodes, languages), figures in by_turns(pairs, repeat, lambda pair: cost(*pair, rooms)).items():
        table.row(encodes, languages, *figures)
        ranks: dict[str, Any] = {"encode_ranks": encodes, "language_ranks": languages}
        results.append(ranks | dict(zip(COLUMNS, figures, strict=True)))
    return results


def ranks_cost(encodes: int, languages: int, rooms: int) -> Costs:
    encode = [Rank(encode_rank, f"encode{number}", rooms) for number in range(encodes)]
    instances = {rank.name: rank.pipe.recv() for rank in encode}
    blocks = pool_for(rooms // languages)
    language = [Rank(language_rank, f"language{number}", blocks, instances) for number in range(languages)]
    # One room of each pair first: then each is trusted, and connected.
    first = encodes * languages
    run_rooms(encode, language, range(first))
    before = numbers_of(encode + language)
    run_rooms(encode, language, range(first, first + rooms))
    cpu, messages = (after - earlier for after, earlier in zip(numbers_of(encode + language), before, strict=True))
    for rank in encode + language:
        rank.end()
    return of_one(cpu, messages, rooms)


def run_rooms(encode: list[Rank], language: list[Rank], rooms: range) -> None:
    shares: dict[Rank, list[tuple[int, str]]] = {rank: [] for rank in encode + language}
    for room in rooms:
        instance, number = places(room, len(encode), len(language))
        shares[encode[instance]].append((room, ""))
        shares[language[number]].append((room, encode[instance].name))
    for side in (encode, language):  # nobody is asked before it expects
        for rank in side:
            rank.pipe.send(shares[rank])
        for rank in side:
            rank.pipe.recv()


def numbers_of(ranks: Sequence[Rank]) -> tuple[float, int]:
    """(processor seconds, messages) of all of them since they began."""
    for rank in ranks:
        rank.pipe.send("numbers")
    seconds, messages = zip(*(rank.pipe.recv() for rank in ranks), strict=True)
    return sum(seconds), sum(messages)


class Rank:
    """A process of its own, as in SGLang: in one interpreter, ranks would wait for each other."""

    def __init__(self, work: Callable[..., None], name: str, *arguments: object) -> None:
        self.name = name
        self.pipe, there = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=work, args=(there, name, *arguments), daemon=True)
        self._process.start()
        there.close()

    def end(self) -> None:
        self.pipe.send("end")
        self._process.join()
        self.pipe.close()


def encode_rank(pipe: Connection, name: str, rooms: int) -> None:
    loop = ControlLoop(HOST, codec.MAX_FRAME_BYTES)
    pipe.send(loop.open())
    side = Encode(name, (rooms + 1) * OFFERS, loop.send)

    def expect(share: Share) -> None:
        for room, _ in share:
            loop.post(functools.partial(side.expect, room))

    serve(pipe, loop, side, expect)


def language_rank(pipe: Connection, _: str, blocks: int, instances: dict[str, Address]) -> None:
    loop = ControlLoop(HOST, codec.MAX_FRAME_BYTES)
    side = Language(loop.open(), blocks, loop.send, instances)

    def run(share: Share) -> None:
        side.wanted = side.delivered + len(share)
        side.done.clear()
        for room, instance in share:
            loop.post(functools.partial(side.request, room, instance))
        assert not share or side.done.wait(120), side.core.sizes()

    serve(pipe, loop, side, run)


def serve(pipe: Connection, loop: ControlLoop, side: Encode | Language, work: Callable[[Share], None]) -> None:
    """Do what comes through the pipe, beside the control thread."""
    thread = threading.Thread(target=loop.run, args=(side, lambda: None))
    thread.start()
    while (order := pipe.recv()) != "end":
        if order == "numbers":
            pipe.send((time.process_time(), side.messages))
        else:
            work(order)
            pipe.send(None)
    loop.stop()
    thread.join()


# ---- processes that take turns


def measure_turns(numbers: Sequence[int], rooms: int, repeat: int) -> list[dict[str, Any]]:
    table = report.Table("turns, one room in flight", "processes", "µs per room", "µs of it in the cores")
    results = []
    for number, (per_room, in_cores) in by_turns(numbers, repeat, lambda number: turns_cost(number, rooms)).items():
        table.row(number, per_room, in_cores)
        results.append({"processes": number, "per_room": per_room, "in_cores": in_cores})
    return results


def turns_cost(processes: int, rooms: int) -> tuple[float, float]:
    """Processor microseconds of a room: all, and those of the cores without what it takes to hand over the turn."""
    turns = [multiprocessing.Pipe(duplex=False) for _ in range(processes)]
    share = rooms // processes
    ranks = [
        Rank(take_turns, "", turns[number][0], turns[(number + 1) % processes][1], share) for number in range(processes)
    ]
    for rank in ranks:
        rank.pipe.recv()  # it is ready
    turns[0][1].send_bytes(b"")
    totals = [sum(column) for column in zip(*(rank.pipe.recv() for rank in ranks), strict=True)]
    for rank in ranks:
        rank.end()
    for ends in turns:
        for end in ends:
            end.close()
    whole, in_cores = (1e6 * total / (share * processes) for total in totals)
    return whole, in_cores


def take_turns(pipe: Connection, _: str, mine: Connection, next_one: Connection, rooms: int) -> None:
    cores = Cores(1, 1, OFFERS, pool_for(1))
    for room in range(rooms):
        cores.run(range(room, room + 1))
    pipe.send("ready")
    in_cores, started = 0.0, time.process_time()
    for room in range(rooms, 2 * rooms):
        mine.recv_bytes()
        before = time.process_time()
        cores.run(range(room, room + 1))
        in_cores += time.process_time() - before
        next_one.send_bytes(b"")
    pipe.send((time.process_time() - started, in_cores))
    pipe.recv()


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
