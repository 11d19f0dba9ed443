"""The data plane over RDMA, engines that do not start, and what is made of each answer over TCP: with stand-ins.

No machine of the tests has RDMA, and no real engine can be made to give each answer. The engines here record what they
are told and move no bytes; the one over TCP has a real connection to its peer's data port, and sends nothing over it.
What Mooncake itself does over TCP is tested in the loopback lane.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any, ClassVar

import pytest

from embedding_relay.memory import engine
from embedding_relay.memory.engine import MooncakeDataPlane, MooncakeLink
from embedding_relay.memory.handshake import EngineFacts
from embedding_relay.memory.plane import Entry, Region, TransferError, Unreachable
from embedding_relay.protocol.errors import LocalError, SettingError
from embedding_relay.protocol.plan import BATCH_LIMIT
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
    made: type[RecordingEngine], link: MooncakeLink, plane: MooncakeDataPlane, theirs: EngineStandIn, ended: list[Any]
) -> None:
    made.batch = -1
    with suppress(TransferError):
        link.write(ROWS)
    link.close()
    assert ended == made.made
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
    assert plane.has_read_everything("a1")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engines that were ended, instead of hurrying each along."""
    ended: list[Any] = []
    monkeypatch.setattr(engine, "_end_quickly", lambda one: ended.append(one) if one is not None else None)
    return ended


def test_one_spare_engine_is_kept_and_no_more(
    made: type[RecordingEngine], plane: MooncakeDataPlane, theirs: EngineStandIn, ended: list[Any]
) -> None:
    links = [plane.link(theirs.session_id) for _ in range(2)]
    for link in links:
        link.write(ROWS)
    for link in links:
        link.close()
    first, second = made.made
    assert ended == [first]
    plane.close()
    assert ended == [first, second]
    plane.close()
    assert ended == [first, second]


def test_an_engine_of_too_many_peers_is_ended(plane: MooncakeDataPlane, ended: list[Any]) -> None:
    sender = plane.take_sender("peer:1", EngineFacts(frozenset(), 0, ()))
    sender.peers = dict.fromkeys(map(str, range(engine._MOST_PEERS)), EngineFacts(frozenset(), 0, ()))
    plane.give_back(sender)
    assert len(ended) == 1
    assert sender.engine is None


def test_a_plane_closes_its_links(
    made: type[RecordingEngine], plane: MooncakeDataPlane, theirs: EngineStandIn, ended: list[Any]
) -> None:
    closed, left = plane.link(theirs.session_id), plane.link(theirs.session_id)
    closed.close()
    assert plane._links == [left]
    closed.close()
    left.write(ROWS)
    plane.close()
    assert plane._links == []
    assert ended == made.made


def test_no_more_entries_than_one_call_may_carry(
    made: type[RecordingEngine], link: MooncakeLink, plane: MooncakeDataPlane
) -> None:
    link.write([])
    with pytest.raises(TransferError, match=f"more than the {BATCH_LIMIT}"):
        link.write([ROWS[0]] * (BATCH_LIMIT + 1))
    assert len(made.made[0].calls) == 2, "only its start"
    link.write([ROWS[0]] * BATCH_LIMIT)


def test_an_engine_that_cannot_be_made_for_a_link_leaves_its_peer_unreachable(
    made: type[RecordingEngine], link: MooncakeLink, plane: MooncakeDataPlane, theirs: EngineStandIn
) -> None:
    link.write(ROWS)
    made.starts = -1
    with pytest.raises(Unreachable, match="does not start"):
        plane.link(theirs.session_id).write(ROWS)


def test_who_does_not_receive_has_no_session(
    made: type[RecordingEngine], plane: MooncakeDataPlane, ended: list[Any]
) -> None:
    receives = MooncakeDataPlane(HOST, "rdma")
    receives.start([])
    assert receives.session_id
    receives.close()
    assert ended == [made.made[1]]
    for one in (plane, receives):
        with pytest.raises(LocalError, match="does not receive"):
            _ = one.session_id


# ---- over TCP


class EngineOverTcp:
    """Mooncake's TransferEngine over TCP, without bytes. Nobody keeps it but the data plane, so that it can end."""

    handshake_port: int
    peers_port: int
    calls: ClassVar[list[tuple[object, ...]]]
    statuses: ClassVar[list[int]]
    """Of what it was given last, look by look; the last for ever."""
    number, connects, connects_again = 7, True, False

    def __init__(self) -> None:
        self.submitted = 0
        self._connections: list[socket.socket] = []

    def __del__(self) -> None:
        for connection in self._connections:
            connection.close()

    def initialize(self, *_: str) -> int:
        return 0

    def get_rpc_port(self) -> int:
        return self.handshake_port

    def register_memory(self, *_: int) -> int:
        return 0

    def transfer_submit_write(self, *what: object) -> int:
        self.calls.append(what)
        self.submitted += 1
        if self.connects and len(self._connections) < 1 + self.connects_again:
            self._connections.append(socket.create_connection((HOST, self.peers_port)))
        return self.number

    def transfer_check_status(self, number: int) -> int:
        assert number == self.number
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


class Peer:
    """The data port of a peer, whose engine is asked at the handshake port of `theirs`."""

    def __init__(self, theirs: EngineStandIn) -> None:
        self.theirs = theirs
        self.listener = socket.create_server((HOST, 0))
        self.port: int = self.listener.getsockname()[1]
        theirs.says |= {"protocol": "tcp", "tcp_data_port": self.port}
        self.connections: list[socket.socket] = []

    def accept(self) -> socket.socket:
        """The connection of an engine; before it comes one by which the port is only tried out."""
        for _ in range(2):
            connection, _ = self.listener.accept()
            self.connections.append(connection)
        connection.settimeout(10)
        return connection

    def close(self) -> None:
        for end in (*self.connections, self.listener):
            end.close()


@pytest.fixture
def peer(theirs: EngineStandIn) -> Iterator[Peer]:
    with closing(Peer(theirs)) as peer:
        yield peer


@pytest.fixture
def over_tcp(
    ours: EngineStandIn, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[type[EngineOverTcp], MooncakeLink]]:
    class Engine(EngineOverTcp):
        handshake_port = int(ours.session_id.rpartition(":")[2])
        peers_port = peer.port
        calls: ClassVar[list[tuple[object, ...]]] = []
        statuses: ClassVar[list[int]] = [0, 0, 1]

    ours.says |= {"protocol": "tcp", "tcp_data_port": 1}
    monkeypatch.setattr(engine, "_engine_class", lambda: Engine)
    monkeypatch.setattr(os, "environ", {})
    plane = MooncakeDataPlane(HOST, "tcp")
    plane.start([])
    yield Engine, plane.link(peer.theirs.session_id)
    plane.close()


OverTcp = tuple[type[EngineOverTcp], MooncakeLink]


def test_over_tcp_the_first_bytes_are_confirmed_before_the_rest_is_sent(over_tcp: OverTcp, peer: Peer) -> None:
    used, link = over_tcp
    for _ in range(2):
        link.write(ROWS)
    session = peer.theirs.session_id
    rows = [(session, *entry) for entry in ROWS]
    assert used.calls == [(session, 100, 200, 8), *rows, *rows]
    assert used.statuses == [1]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"statuses": [0, -1]}, "was not confirmed"),
        ({"statuses": [0]}, "was not confirmed"),
        ({"statuses": [1], "connects": False}, "was not confirmed"),
        ({"number": 0}, "answers us, but not Mooncake"),
    ],
    ids=["failed", "no answer", "a connection that nobody can hold", "not begun"],
)
def test_over_tcp_nothing_follows_a_first_write_that_is_not_confirmed(
    over_tcp: OverTcp, changes: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, link = over_tcp
    monkeypatch.setattr(engine, "_FIRST_WRITE_TIMEOUT", 0.05)
    for name, value in changes.items():
        setattr(used, name, value)
    with pytest.raises(TransferError, match=problem):
        link.write(ROWS)
    assert len(used.calls) == 1


LARGE = [Entry(100, 200, 1 << 20)]


def test_over_tcp_large_pieces_are_on_their_way_while_the_one_before_is_waited_for(over_tcp: OverTcp) -> None:
    used, link = over_tcp
    looks: list[int] = []
    in_turn = link.write_in_turn([ROWS, LARGE, LARGE, LARGE, LARGE])
    for _ in in_turn:
        looks.append(len(used.calls))
    assert looks == [3, 6, 7, 7, 7], "small ones at once, of large ones two more than are waited for"
    assert link._is_proven


@pytest.mark.parametrize(("statuses", "problem"), [([1, 0, -1], "status -1"), ([1, 0], "confirmed nothing for 0.05 s")])
def test_over_tcp_a_large_write_fails_with_its_status_or_when_time_is_up(
    over_tcp: OverTcp, statuses: list[int], problem: str
) -> None:
    used, link = over_tcp
    link._plane.patience = 0.05
    used.statuses = statuses
    with pytest.raises(TransferError, match=problem):
        link.write(LARGE)
    assert not link._is_proven


def test_over_tcp_a_small_write_is_waited_for_awake_at_first(
    over_tcp: OverTcp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so that another thread can have the core."""
    used, link = over_tcp
    link.write(ROWS)
    waits: list[str] = []
    now = iter(range(100))
    monkeypatch.setattr(engine, "_AWAKE_S", 3)
    monkeypatch.setattr(engine.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: waits.append("asleep"))
    monkeypatch.setattr(engine.os, "sched_yield", lambda: waits.append("awake"))
    used.statuses = [0, 0, 0, 1]
    link.write(ROWS[:1])
    assert waits == ["awake", "asleep", "asleep"]


def test_over_tcp_a_large_write_that_mooncake_does_not_take_has_failed(over_tcp: OverTcp) -> None:
    used, link = over_tcp
    link.write(ROWS)
    used.number = 0
    with pytest.raises(TransferError, match="does not take 1048576 bytes"):
        link.write(LARGE)


MANY = [Entry(100 + at, 200 + at, 1 << 16) for at in range(16)]


def test_over_tcp_many_entries_are_divided_between_two_engines_which_are_renewed_and_closed_together(
    over_tcp: OverTcp, peer: Peer
) -> None:
    _, link = over_tcp
    link.write(ROWS)
    peer.accept()
    link.write(MANY)
    second = link._second
    assert second is not None
    assert second._engine is not link._engine
    assert link._engine.submitted == len(ROWS) + second._engine.submitted == 1 + len(ROWS) + len(MANY) // 2
    assert second._is_proven
    link.renew()
    assert (link._sender, second._sender) == (None, None)
    assert not link.is_quiet(), "the peer has not read to the end of either"
    assert not second.is_quiet()
    peer.close()
    peer.theirs.says["buffers"] = [{"addr": 1, "length": 1}]
    assert link.is_quiet(), "its engine is another one"
    link.close()
    assert link._plane._links == []


def test_over_tcp_one_engine_will_do_if_there_is_no_second(over_tcp: OverTcp, monkeypatch: pytest.MonkeyPatch) -> None:
    used, link = over_tcp
    link.write(ROWS)
    monkeypatch.setattr(link._plane, "make_engine", lambda: (_ for _ in ()).throw(SettingError("no more")))
    link.write(MANY)
    assert len(used.calls) == link._engine.submitted == 1 + len(ROWS) + len(MANY)


def fail(over_tcp: OverTcp, peer: Peer) -> socket.socket:
    """A write that fails, after the first; the peer's end of its connection."""
    used, link = over_tcp
    used.statuses = [-1] if link._is_proven else [1, -1]
    with pytest.raises(TransferError, match="status -1"):
        link.write(ROWS)
    used.statuses = [1]
    link.renew()
    return peer.accept()


def test_over_tcp_a_failed_write_is_over_when_the_peer_has_read_to_the_end(over_tcp: OverTcp, peer: Peer) -> None:
    _, link = over_tcp
    link.write(ROWS)
    end = fail(over_tcp, peer)
    assert end.recv(1) == b"", "the old engine is gone, and has told so"
    assert not link.is_quiet()
    end.close()
    assert link.is_quiet()


def test_over_tcp_a_connection_that_came_later_is_waited_for_too(over_tcp: OverTcp, peer: Peer) -> None:
    used, link = over_tcp
    used.connects_again = True
    first = fail(over_tcp, peer)
    second, _ = peer.listener.accept()
    first.close()
    assert not link.is_quiet()
    second.close()
    assert link.is_quiet()


def test_over_tcp_a_failed_write_is_over_when_the_peer_is_gone(over_tcp: OverTcp, peer: Peer) -> None:
    _, link = over_tcp
    end = fail(over_tcp, peer)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
    assert not link.is_quiet(), "something in between may have cut it"
    peer.theirs.says["buffers"] = [{"addr": 1, "length": 1}]
    assert link.is_quiet(), "its engine is another one"


def test_over_tcp_what_was_sent_to_the_predecessor_of_a_peer_is_of_no_interest(over_tcp: OverTcp, peer: Peer) -> None:
    _, link = over_tcp
    fail(over_tcp, peer)
    link.write(ROWS)
    assert not link.is_quiet(), "it is the same engine"
    fail(over_tcp, peer)
    peer.theirs.says["buffers"] = [{"addr": 1, "length": 1}]
    link.write(ROWS)
    assert link.is_quiet()


def test_over_tcp_a_link_that_is_closed_leaves_nothing_open(over_tcp: OverTcp, peer: Peer) -> None:
    used, link = over_tcp
    used.statuses = [-1]
    with pytest.raises(TransferError):
        link.write(ROWS)
    end = peer.accept()
    link.close()
    assert end.recv(1) == b""


def test_over_tcp_it_is_looked_whether_our_engine_has_read_everything(
    over_tcp: OverTcp, ours: EngineStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, link = over_tcp
    asked: list[int] = []
    monkeypatch.setattr(engine, "has_read_everything", lambda port: bool(asked.append(port)))
    assert not link._plane.has_read_everything("a1")
    assert asked == [ours.says["tcp_data_port"]]


# ---- how engines are asked for


@pytest.mark.parametrize(("devices", "is_tcp"), [(["mlx5_0"], False), ([], True)])
def test_rdma_is_used_where_there_is_a_device(
    devices: list[str], is_tcp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_devices", lambda: devices)
    assert MooncakeDataPlane(HOST).is_tcp is is_tcp


def test_what_mooncake_takes_from_the_environment(made: type[RecordingEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    def environment_of(host: str, transport: str, **before: str) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", dict(before))
        with suppress(SettingError):
            MooncakeDataPlane(host, transport).start([])
        return {name: value for name, value in os.environ.items() if before.get(name) != value}

    settings = engine._TCP_SETTINGS
    assert environment_of(HOST, "rdma") == settings
    assert environment_of(HOST, "rdma", MC_TCP_PROTO="1") == settings
    assert environment_of(HOST, "tcp") == {"MC_FORCE_TCP": "1", **settings}
    assert environment_of("::1", "rdma") == {"MC_USE_IPV6": "1", **settings}
    assert environment_of("::1", "tcp", MC_FORCE_TCP="0", MC_USE_IPV6="0") == settings, "an operator's stay"


def test_mooncake_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(SettingError, match=r"cannot be loaded .* install one of the extras"):
        MooncakeDataPlane(HOST, "tcp").start([])


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
    made: type[RecordingEngine],
    ours: EngineStandIn,
    ended: list[Any],
    says: dict[str, object],
    problem: str,
    receives: bool,
) -> None:
    ours.says |= says
    with pytest.raises(SettingError, match=problem):
        MooncakeDataPlane(HOST, "rdma", receives=receives).start([Region(100, 50_000)])
    assert len(made.made[0].calls) == 1, "it gets no memory"
    assert ended == made.made


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


@pytest.mark.parametrize(
    ("asked_for", "there_are", "said"),
    [
        ("", [], r"\(device: any; /sys/class/infiniband has none\)"),
        ("mlx5_7", ["mlx5_1", "mlx5_0"], r"\(device: mlx5_7; /sys/class/infiniband has mlx5_0, mlx5_1\)"),
    ],
)
def test_the_devices_that_there_are_and_the_one_that_was_asked_for_are_named(
    made: type[RecordingEngine], asked_for: str, there_are: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_devices", lambda: there_are)
    made.starts = -1
    with pytest.raises(SettingError, match=said):
        MooncakeDataPlane(HOST, "rdma", asked_for).start([])


def test_memory_that_cannot_be_registered(made: type[RecordingEngine]) -> None:
    made.registers = -7
    with pytest.raises(SettingError, match=r"does not register 50000 bytes of memory \(code -7\)"):
        MooncakeDataPlane(HOST, "rdma").start([Region(100, 50_000)])
