"""Two sides of the relay on this machine: an encode instance in a process of its own, a language rank in this one."""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

import pytest
import torch
import zmq

from embedding_relay.config import AUTO, MOONCAKE, SHARED_MEMORY, RelayConfig
from embedding_relay.memory import buffers
from embedding_relay.memory.checks import ModelLimits
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.memory.plane import Entry
from embedding_relay.observer import Nobody, Numbers, Summary
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.messages import Address, Handshake
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.registry.client import RegistryError, look_up
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from embedding_relay.transport.manager import MooncakeEmbeddingManager
from support.forks import fork, spare_the_collector
from support.leftovers import Leftovers, import_mooncake
from support.rows import LIMITS, Spec, difference, first_items, items_of, make_rows, without
from support.signals import send_signal

torch.set_num_threads(1)  # two processes on two cores; and no pool of native threads that looks like a leak

HOST = "127.0.0.1"
DEFAULTS = RelayConfig()
T = TypeVar("T")

ENDED = (Status.SUCCESS, Status.FAILED)
# More than Mooncake's TCP transport queues for one peer.
TOO_MANY_ENTRIES = 5000


PLANES = (MOONCAKE, SHARED_MEMORY)
_plane = AUTO


@contextmanager
def data_plane(name: str) -> Iterator[None]:
    """Language ranks begin in this plane, unless a test says otherwise. Encode instances take what they are offered."""
    global _plane
    _plane = name
    try:
        yield
    finally:
        _plane = AUTO


def on_the_plane(config: RelayConfig) -> RelayConfig:
    return dataclasses.replace(config, data_plane=_plane) if config.data_plane == AUTO else config


class Watches(Nobody):
    """Keeps what it is told about each transfer that succeeded."""

    def __init__(self) -> None:
        self.summaries: list[Summary] = []

    def succeeded(self, summary: Summary) -> None:
        self.summaries.append(summary)


def small_layout(**changes: Any) -> BufferLayout:
    return BufferLayout(
        **{"hidden_size": 64, "dtype": "bfloat16", "deepstack_rows": 0, "block_size": 128, "blocks": 64, **changes}
    )


# ---- encode


@dataclass
class Died:
    """The last word of a process."""

    of: str


class EncodeInstance:
    """The test's handle of an encode process: a registry and one rank."""

    def __init__(self, layout: BufferLayout, config: RelayConfig, is_older: bool = False) -> None:
        self.layout = layout
        self._pipe, theirs = fork.Pipe()
        self._process = fork.Process(target=_encode_main, args=(theirs, layout, config, is_older), daemon=True)
        self._process.start()
        theirs.close()
        self.port: int = self._pipe.recv()
        self._killed = False

    @property
    def peer(self) -> str:
        return f"{HOST}:{self.port}"

    def expect(self, *specs: Spec) -> None:
        """These requests arrive at the encode instance."""
        self._pipe.send(("expect", specs))

    def refuse(self, room: int, failure: Failure) -> None:
        self._pipe.send(("refuse", room, failure))

    def make_one_more(self, room: int) -> None:
        """Of a request whose rows are sent item by item."""
        self._pipe.send(("make_one_more", room))

    def ask(self, question: str) -> Any:
        with suppress(BrokenPipeError):  # its last word is still to be read
            self._pipe.send((question,))
        answer = self._pipe.recv()
        if isinstance(answer, Died):
            self.kill()
            raise AssertionError(f"the encode process died of this:\n{answer.of}")
        return answer

    def metrics(self) -> Numbers:
        answer: Numbers = self.ask("metrics")
        return answer

    def end_of(self, room: int) -> tuple[Status, Failure | None]:
        """How the encode half of a request ended."""
        deadline = time.monotonic() + 20.0
        while room not in (ends := self.ask("ended")):
            assert time.monotonic() < deadline, f"room {room} has not ended at the encode side"
            time.sleep(0.02)
        end: tuple[Status, Failure | None] = ends[room]
        return end

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        send_signal(self._process.pid, number)

    def kill(self) -> None:
        self._killed = True
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        """Begin to stop: an engine takes a second for it, and the next test need not wait."""
        if not self._killed:
            self._pipe.send(("stop",))
        _stopping.append(self)

    def finish(self) -> None:
        """Hear whether it left anything behind."""
        if not self._killed:
            problem = self._pipe.recv()
            assert problem is None, problem
        self._process.join()
        self._pipe.close()
        self._process.close()


_stopping: list[EncodeInstance] = []


def finish_stopping() -> None:
    while _stopping:
        _stopping.pop().finish()


@contextmanager
def encode_instance(
    layout: BufferLayout, config: RelayConfig = DEFAULTS, *, is_older: bool = False
) -> Iterator[EncodeInstance]:
    """`is_older`: of a version that knows nothing of records."""
    instance = EncodeInstance(layout, config, is_older)
    try:
        yield instance
    finally:
        instance.stop()


def _encode_main(pipe: Connection, layout: BufferLayout, config: RelayConfig, is_older: bool) -> None:
    if is_older:
        Handshake.takes_records = property(lambda self: False)  # type: ignore[assignment, method-assign]
        buffers.RECORD_BYTES = 0  # type: ignore[misc]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)s %(message)s")
    spare_the_collector()
    import_mooncake()
    before = Leftovers.now()
    registry = MooncakeEmbeddingBootstrapServer(HOST, 0, config.keys.registry if config.keys else None)
    registry.start()
    manager = EncodeManager.open(layout, config, host=HOST, bootstrap=Address(HOST, registry.port))
    manager.start()
    _wait_until_announced(Address(HOST, registry.port), config)
    pipe.send(registry.port)
    try:
        _EncodeLoop(pipe, layout, manager).run()
    except Exception:
        pipe.send(Died(traceback.format_exc()))
        raise
    manager.close()
    registry.close()
    try:
        before.assert_same()
    except AssertionError as error:
        pipe.send(str(error))
    else:
        pipe.send(None)


def _wait_until_announced(registry: Address, config: RelayConfig) -> None:
    """A rank tells its registry by itself, as soon as it can."""
    deadline = time.monotonic() + 30
    while True:
        try:
            look_up(registry, 0, config.keys.registry if config.keys else None)
        except RegistryError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


class _EncodeLoop:
    """What a scheduler does, without a model: rows exist as soon as the language side waits for them."""

    def __init__(self, pipe: Connection, layout: BufferLayout, manager: EncodeManager) -> None:
        self._pipe = pipe
        self._layout = layout
        self._manager = manager
        self._senders: list[tuple[MooncakeEmbeddingSender, Spec]] = []
        self._ends: dict[int, tuple[Status, Failure | None]] = {}
        self._made = 0
        """Items that a tower would have been run for."""
        self._items: dict[int, int] = {}
        """Of rooms whose rows are sent item by item, how many are made."""

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._pipe.fileno(), zmq.POLLIN)
        poller.register(self._manager.wakeup_fd, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._manager.wakeup_fd in ready:
                for room in self._manager.drain_events():
                    self._look_at(room)
            if self._pipe.fileno() in ready:
                command, *arguments = self._pipe.recv()
                if command == "stop":
                    return
                getattr(self, f"_{command}")(*arguments)

    def _look_at(self, room: int) -> None:
        for sender, spec in [pair for pair in self._senders if pair[1].room == room]:
            if sender.poll() is Status.WAITING_FOR_INPUT and spec.item_by_item and room not in self._items:
                self._items[room] = 1
                sender.send_embedding(first_items(make_rows(self._layout, spec), 1))
            elif sender.poll() is Status.WAITING_FOR_INPUT and not spec.held and not spec.item_by_item:
                rows = without(make_rows(self._layout, spec), sender.items, sender.held)
                self._made += len(rows.segments)
                sender.send_embedding(rows)
                sender.send_embedding(rows)  # a repeated request to send is skipped
            elif is_final(sender.poll()):
                self._ends[room] = sender.poll(), sender.failure()
                self._senders.remove((sender, spec))

    def _expect(self, specs: Iterable[Spec]) -> None:
        for spec in specs:
            sender = MooncakeEmbeddingSender(self._manager, spec.room)
            self._senders.append((sender, spec))
            sender.init(items_of(make_rows(self._layout, spec), spec))

    def _make_one_more(self, room: int) -> None:
        for sender, spec in self._senders:
            if spec.room == room:
                self._items[room] += 1
                sender.more_rows(first_items(make_rows(self._layout, spec), self._items[room]))

    def _refuse(self, room: int, failure: Failure) -> None:
        MooncakeEmbeddingSender(self._manager, room).refuse(failure)

    def _poison(self) -> None:
        """Have the engine of the first link reject a batch just before its next write, of garbage to the same place."""
        link, *_ = self._manager.plane._links  # type: ignore[attr-defined]
        session_id, pointer, write = link._session_id, self._manager._buffers.pointers[0], link.write_in_turn

        def write_after_rejection(pieces: Iterable[Sequence[Entry]]) -> NoReturn:
            link.write_in_turn = write
            pieces = list(pieces)
            where = [pieces[0][0].destination]
            what = [pointer] * TOO_MANY_ENTRIES, where * TOO_MANY_ENTRIES, [64] * TOO_MANY_ENTRIES
            for _ in range(1000):  # a rejection does not always make it refuse what comes next, nor for long
                while not link._engine.batch_transfer_sync_write(session_id, [pointer], where, [64]):
                    assert link._engine.batch_transfer_sync_write(session_id, *what) == -1
                for _ in write(pieces):
                    pass
            raise AssertionError("no rejection has made the engine refuse a write")

        link.write_in_turn = write_after_rejection
        self._pipe.send(None)

    def _metrics(self) -> None:
        self._pipe.send(self._manager.metrics())

    def _sessions(self) -> None:
        self._pipe.send(self._manager._core.sessions())

    def _address(self) -> None:
        self._pipe.send(self._manager.address)

    def _ended(self) -> None:
        self._pipe.send(dict(self._ends))

    def _encoded(self) -> None:
        self._pipe.send(self._made)


# ---- language


@dataclass
class LanguageRank:
    """A language rank in this process."""

    manager: LanguageManager
    layout: BufferLayout

    def start(
        self, peer: str, *rooms: int, hint_rows: int | None = None, sources: Sequence[str] = ()
    ) -> dict[int, MooncakeEmbeddingReceiver]:
        receivers = {room: MooncakeEmbeddingReceiver(self.manager, peer, room, sources=sources) for room in rooms}
        for receiver in receivers.values():
            receiver.start(hint_rows)
        return receivers

    def wait(self, receivers: Iterable[MooncakeEmbeddingReceiver], timeout: float = 90.0) -> None:
        """Sleep on the manager's descriptor, as a scheduler does, until all of them have ended."""
        receivers = list(receivers)
        wait_until(lambda: all(receiver.poll() in ENDED for receiver in receivers), self.manager, timeout)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 20.0) -> None:
        """Looked at when something has changed, as a scheduler does."""
        wait_until(condition, self.manager, timeout)

    def check(self, receivers: Mapping[int, MooncakeEmbeddingReceiver], specs: Iterable[Spec]) -> None:
        """Every bit is what the encode side had."""
        for spec in specs:
            receiver = receivers[spec.room]
            assert receiver.poll() is Status.SUCCESS, receiver.failure()
            assert difference(self.layout, make_rows(self.layout, spec), receiver.rows()) is None

    def receive(
        self, encode: EncodeInstance, *specs: Spec, hint_rows: int | None = None, sources: Sequence[str] = ()
    ) -> dict[int, MooncakeEmbeddingReceiver]:
        """Move these requests and compare."""
        receivers = self.start(encode.peer, *(spec.room for spec in specs), hint_rows=hint_rows, sources=sources)
        encode.expect(*specs)
        self.wait(receivers.values())
        self.check(receivers, specs)
        return receivers


@contextmanager
def language_rank(
    layout: BufferLayout,
    config: RelayConfig = DEFAULTS,
    *,
    ranks: int = 1,
    max_rows: int = 1_000_000,
    limits: ModelLimits = LIMITS,
    is_older: bool = False,
) -> Iterator[LanguageRank]:
    """`is_older`: of a version that knows nothing of records."""
    config = on_the_plane(config)
    with pytest.MonkeyPatch.context() as patch:
        if is_older:
            patch.setattr(buffers.EmbeddingBuffers, "records", None)
        manager = LanguageManager.open(layout, config, host=HOST, ranks=ranks, max_rows=max_rows, limits=limits)
    if is_older:
        make_target = manager._buffers.make_target
        passing_over = lambda aux: make_target(dataclasses.replace(aux, record_bytes=0))  # noqa: E731
        manager._buffers.make_target = passing_over  # type: ignore[method-assign]
    manager.start()
    try:
        yield LanguageRank(manager, layout)
        assert manager.healthy(), manager.unhealthy_reason
    finally:
        manager.close()
        manager.close()


def wait_until(condition: Callable[[], bool], manager: MooncakeEmbeddingManager, timeout: float) -> None:
    poller = zmq.Poller()
    poller.register(manager.wakeup_fd, zmq.POLLIN)
    deadline = time.monotonic() + timeout
    while not condition():
        left = deadline - time.monotonic()
        assert left > 0, f"nothing came of it within {timeout} s: {manager.metrics()}"
        if poller.poll(left * 1000):
            manager.drain_events()


def settle(metrics: Callable[[], T], want: Callable[[T], bool], patience: float = 20.0) -> None:
    """Wait for the other side's last messages."""
    deadline = time.monotonic() + patience
    while not want(now := metrics()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert want(now), now


def assert_all_given_back(*sides: EncodeInstance | LanguageRank) -> None:
    """S5: pools full, tables empty."""
    for side in sides:
        settle(side.metrics if isinstance(side, EncodeInstance) else side.manager.metrics, _is_as_at_start)


def _is_as_at_start(numbers: Numbers) -> bool:
    tables = ("rooms", "waiting_for_blocks", "transfers", "followed", "sources", "senders", "receivers")
    sizes = numbers.sizes
    return sizes["blocks_free"] == sizes["blocks"] and not any(sizes.get(table, 0) for table in tables)
