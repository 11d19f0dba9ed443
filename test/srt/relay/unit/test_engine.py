"""The data plane over RDMA, and engines that do not start: with stand-ins, because no machine of the tests has RDMA.

The engine here records what it is told and moves no bytes. What the data plane does over TCP is tested with Mooncake
itself, in the loopback lane.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import ClassVar

import pytest

from embedding_relay.memory import engine
from embedding_relay.memory.engine import MooncakeDataPlane, MooncakeLink
from embedding_relay.memory.handshake import EngineFacts
from embedding_relay.memory.plane import Entry, Region, TransferError, Unreachable
from embedding_relay.protocol.errors import SettingError
from support.engine_stand_in import EngineStandIn

HOST = "127.0.0.1"
ROWS = [Entry(100, 200, 5000), Entry(6000, 7000, 10)]


class RecordingEngine:
    """Mooncake's TransferEngine, as far as the data plane uses it over RDMA."""

    made: ClassVar[list[RecordingEngine]]
    handshake_port: int
    starts, registers, first_write, batch = 0, 0, 0, 0
    """Codes that the calls return."""

    def __init__(self) -> None:
        self.made.append(self)
        self.calls: list[tuple[object, ...]] = []

    def initialize(self, *arguments: str) -> int:
        self.calls.append(arguments)
        return self.starts

    def get_rpc_port(self) -> int:
        return self.handshake_port

    def register_memory(self, pointer: int, length: int) -> int:
        self.calls.append((pointer, length))
        return self.registers

    def transfer_sync_write(self, *what: object) -> int:
        self.calls.append(what)
        return self.first_write

    def batch_transfer_sync_write(self, *what: object) -> int:
        self.calls.append(what)
        return self.batch


@pytest.fixture
def ours() -> Iterator[EngineStandIn]:
    """What answers at our own engine's handshake port."""
    with closing(EngineStandIn(HOST)) as ours:
        ours.says |= {"protocol": "rdma", "tcp_data_port": 0}
        yield ours


@pytest.fixture
def theirs() -> Iterator[EngineStandIn]:
    with closing(EngineStandIn(HOST)) as theirs:
        theirs.says |= {"protocol": "rdma", "tcp_data_port": 0}
        yield theirs


@pytest.fixture
def made(ours: EngineStandIn, monkeypatch: pytest.MonkeyPatch) -> type[RecordingEngine]:
    class Engine(RecordingEngine):
        made: ClassVar[list[RecordingEngine]] = []
        handshake_port = int(ours.session_id.rpartition(":")[2])

    monkeypatch.setattr(engine, "_engine_class", lambda: Engine)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return Engine


@pytest.fixture
def plane(made: type[RecordingEngine]) -> Iterator[MooncakeDataPlane]:
    plane = MooncakeDataPlane(HOST, "rdma", "mlx5_0", receives=False)
    plane.start([Region(100, 50_000)])
    yield plane
    plane.close()


@pytest.fixture
def link(plane: MooncakeDataPlane, theirs: EngineStandIn) -> MooncakeLink:
    return plane.link(theirs.session_id)


def test_the_first_bytes_go_alone_and_once(
    made: type[RecordingEngine], link: MooncakeLink, theirs: EngineStandIn
) -> None:
    for _ in range(2):
        link.write(ROWS)
    batch = (theirs.session_id, [100, 6000], [200, 7000], [5000, 10])
    [used] = made.made
    assert used.calls == [
        (HOST, "P2PHANDSHAKE", "rdma", "mlx5_0"),
        (100, 50_000),
        (theirs.session_id, 100, 200, 8),
        batch,
        batch,
    ]
    assert link.is_quiet()


def test_less_than_the_first_bytes(made: type[RecordingEngine], link: MooncakeLink, theirs: EngineStandIn) -> None:
    link.write([Entry(1, 2, 3)])
    assert made.made[0].calls[-2] == (theirs.session_id, 1, 2, 3)


def test_a_first_write_that_fails_is_followed_by_nothing(made: type[RecordingEngine], link: MooncakeLink) -> None:
    made.first_write = -1
    with pytest.raises(TransferError, match="first write"):
        link.write(ROWS)
    assert len(made.made[0].calls) == 3
    link.renew()
    made.first_write = 0
    link.write(ROWS)
    assert len(made.made) == 2, "the engine of a failed write is not used again"
    assert link.is_quiet(), "a queue pair that was destroyed sends nothing"


def test_after_a_failed_write_the_way_is_proven_again(
    made: type[RecordingEngine], link: MooncakeLink, plane: MooncakeDataPlane
) -> None:
    link.write(ROWS)
    made.batch = -1
    with pytest.raises(TransferError, match="5010 bytes"):
        link.write(ROWS)
    link.renew()
    made.batch = 0
    link.write(ROWS)
    assert [len(engine.calls) for engine in made.made] == [5, 4]
    assert plane.renewals == 1


def test_an_engine_with_an_unfinished_write_is_not_kept_for_others(
    made: type[RecordingEngine], link: MooncakeLink, plane: MooncakeDataPlane, theirs: EngineStandIn
) -> None:
    made.batch = -1
    with suppress(TransferError):
        link.write(ROWS)
    link.close()
    made.batch = 0
    plane.link(theirs.session_id).write(ROWS)
    assert len(made.made) == 2


def test_the_engine_of_an_idle_link_is_kept_for_the_next_peer(
    made: type[RecordingEngine], link: MooncakeLink, plane: MooncakeDataPlane
) -> None:
    link.write(ROWS)
    link.close()
    with closing(EngineStandIn(HOST)) as another:
        another.says |= {"protocol": "rdma", "tcp_data_port": 0}
        plane.link(another.session_id).write(ROWS)
    assert len(made.made) == 1


def test_an_engine_is_not_kept_for_ever(
    made: type[RecordingEngine], plane: MooncakeDataPlane, theirs: EngineStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps a connection to each peer that it has written to."""
    monkeypatch.setattr(engine, "ask", lambda _: EngineFacts(frozenset({"rdma"}), 0, ()))
    for number in range(engine._MOST_PEERS + 1):
        link = plane.link(f"{HOST}:{1 + number}")
        link.write(ROWS)
        link.close()
    assert [len({call[0] for call in used.calls[2:]}) for used in made.made] == [engine._MOST_PEERS, 1]


def test_an_engine_that_knew_the_predecessor_of_a_peer_is_ended(
    made: type[RecordingEngine], link: MooncakeLink, plane: MooncakeDataPlane, theirs: EngineStandIn
) -> None:
    link.write(ROWS)
    link.close()
    theirs.says["buffers"] = [{"addr": 1, "length": 1}]
    ended: list[int] = []
    made.get_rpc_port = lambda self: ended.append(1) or self.handshake_port  # type: ignore[method-assign, func-returns-value]
    plane.link(theirs.session_id).write(ROWS)
    assert len(made.made) == 2
    assert len(ended) == 2, "one asks what the new one is, and one is for the end of the old one"


def test_a_peer_over_tcp_is_not_written_to_over_rdma(
    made: type[RecordingEngine], link: MooncakeLink, theirs: EngineStandIn
) -> None:
    theirs.says["protocol"] = "tcp"
    theirs.says["tcp_data_port"] = 1
    with pytest.raises(Unreachable, match="moves bytes over tcp, and this side does not"):
        link.write(ROWS)
    assert len(made.made[0].calls) == 2
    link.renew()
    assert link.is_quiet()


def test_nothing_of_a_gone_writer_waits_here_over_rdma(plane: MooncakeDataPlane) -> None:
    assert plane.has_read_everything()


# ---- engines that do not start


@pytest.mark.parametrize("receives", [True, False])
@pytest.mark.parametrize(
    ("says", "problem"),
    [
        ({"protocol": "tcp", "tcp_data_port": 1}, "runs over tcp, and was asked for rdma"),
        ({"protocol": "nvlink"}, "runs over nvlink, and was asked for rdma"),
        ({"protocol": ["rdma", "tcp"], "tcp_data_port": 1}, "runs over rdma, tcp, and was asked for rdma"),
        ({"protocol": ""}, "runs over nothing, and was asked for rdma"),
        ({"protocol": None}, "cannot be used: its answer is not an engine's"),
    ],
)
def test_an_engine_that_is_not_what_it_should_be(
    made: type[RecordingEngine], ours: EngineStandIn, says: dict[str, object], problem: str, receives: bool
) -> None:
    ours.says |= says
    with pytest.raises(SettingError, match=problem):
        MooncakeDataPlane(HOST, "rdma", receives=receives).start([Region(100, 50_000)])
    assert len(made.made[0].calls) == 1, "it gets no memory"


def test_an_engine_asked_for_tcp_that_is_not(made: type[RecordingEngine]) -> None:
    with pytest.raises(SettingError, match=r"runs over rdma, and was asked for tcp$"):
        MooncakeDataPlane(HOST, "tcp").start([])


def test_an_engine_over_several_transports_that_has_what_was_asked_for(
    made: type[RecordingEngine], ours: EngineStandIn
) -> None:
    ours.says["protocol"] = "rdma,hip"
    plane = MooncakeDataPlane(HOST, "rdma")
    plane.start([])
    assert plane.session_id == ours.session_id
    plane.close()


def test_an_engine_that_does_not_start(made: type[RecordingEngine]) -> None:
    made.starts = -1
    with pytest.raises(SettingError, match=rf"does not start on {HOST}, and was asked for rdma \(device: any;"):
        MooncakeDataPlane(HOST, "rdma").start([])


def test_memory_that_cannot_be_registered(made: type[RecordingEngine]) -> None:
    made.registers = -7
    with pytest.raises(SettingError, match=r"does not register 50000 bytes of memory \(code -7\)"):
        MooncakeDataPlane(HOST, "rdma").start([Region(100, 50_000)])
