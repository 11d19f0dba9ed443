"""What proves that nothing more can land, with sockets of this process in the place of an engine's."""

from __future__ import annotations

import os
import queue
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from embedding_relay.memory import quiet
from embedding_relay.memory.handshake import EngineFacts
from embedding_relay.memory.quiet import (
    HeldConnections,
    Prover,
    has_read_everything,
    is_gone,
    is_refused,
    own_sockets,
)
from embedding_relay.protocol.effects import ProveGone
from embedding_relay.protocol.messages import Address

HOST = "127.0.0.1"
RESET = struct.pack("ii", 1, 0)


class Connection:
    """Ours as an engine has it, and the peer's end of it."""

    def __init__(self) -> None:
        self.listener = socket.create_server((HOST, 0))
        self.port: int = self.listener.getsockname()[1]
        self.engines = socket.create_connection((HOST, self.port))
        self.peers, _ = self.listener.accept()

    def close(self) -> None:
        for end in (self.engines, self.peers, self.listener):
            end.close()


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    monkeypatch.setattr(quiet, "_IN_FLIGHT", 0.0)
    monkeypatch.setattr(quiet, "_READ_WITHIN", 0.2)
    before = len(os.listdir("/proc/self/fd"))
    connection = Connection()
    yield connection
    connection.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def held(connection: Connection) -> Iterator[HeldConnections]:
    held = HeldConnections()
    held.hold({(HOST, connection.port)})
    assert held.has_any
    yield held
    held.close()


def gone() -> bool:
    return True


def there() -> bool:
    return False


def nobody_asks() -> bool:
    raise AssertionError("whether the peer is gone matters only when a connection has ended otherwise")


# ---- connections to a peer


def test_a_connection_that_the_peer_reads_to_its_end(connection: Connection, held: HeldConnections) -> None:
    connection.engines.sendall(b"rows")
    connection.engines.close()
    held.end()
    assert len(held) == 1
    assert not held.is_quiet(nobody_asks)
    assert connection.peers.recv(100) == b"rows"
    assert connection.peers.recv(100) == b"", "it was told of the end"
    assert not held.is_quiet(nobody_asks)
    connection.peers.sendall(b"an acknowledgement")
    connection.peers.close()
    assert held.is_quiet(nobody_asks)
    assert held.is_quiet(nobody_asks)


def test_nothing_is_on_its_way_as_long_as_the_engine_lives(connection: Connection, held: HeldConnections) -> None:
    assert held.is_quiet(nobody_asks)


def test_a_reset_proves_nothing_and_goes_on_to_prove_nothing(connection: Connection, held: HeldConnections) -> None:
    connection.engines.close()
    held.end()
    connection.peers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.peers.close()
    assert [held.is_quiet(there) for _ in range(3)] == [False] * 3
    assert held.is_quiet(gone)
    assert held.is_quiet(nobody_asks), "it is settled"


def test_a_reset_that_the_engine_has_read_proves_nothing(connection: Connection, held: HeldConnections) -> None:
    connection.peers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.peers.close()
    with pytest.raises(ConnectionResetError):
        connection.engines.recv(1)
    assert connection.engines.recv(1) == b"", "this is what we would take for the peer's end"
    connection.engines.close()
    held.end()
    assert [held.is_quiet(there) for _ in range(3)] == [False] * 3
    assert held.is_quiet(gone)


def test_one_of_two_connections_was_cut(connection: Connection) -> None:
    """The other's end proves nothing about it."""
    held, second = HeldConnections(), socket.create_connection((HOST, connection.port))
    seconds_peer, _ = connection.listener.accept()
    held.hold({(HOST, connection.port)})
    connection.peers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    for end in (connection.peers, connection.engines, second):
        end.close()
    held.end()
    assert len(held) == 1
    seconds_peer.close()
    assert not held.is_quiet(there)
    assert held.is_quiet(gone)


def test_a_peer_that_closes_first(connection: Connection, held: HeldConnections) -> None:
    connection.peers.close()
    connection.engines.close()
    held.end()
    assert held.is_quiet(nobody_asks)


def test_an_engine_of_whose_connections_we_have_none_proves_nothing(connection: Connection) -> None:
    held = HeldConnections()
    held.hold({(HOST, 1), ("127.0.0.2", connection.port)})
    assert not held.has_any
    held.end()
    assert not held.is_quiet(there)
    assert held.is_quiet(gone)


def test_a_connection_that_somebody_else_has_is_not_ended(connection: Connection, held: HeldConnections) -> None:
    held.end()
    assert not held.has_any
    assert not held.is_quiet(there)
    connection.engines.sendall(b"still there")
    assert connection.peers.recv(100) == b"still there"


def test_what_one_holds_another_does_not(connection: Connection, held: HeldConnections) -> None:
    other = HeldConnections()
    other.hold({(HOST, connection.port)})
    assert not other.has_any
    held.close()
    assert not held.has_any
    other.hold({(HOST, connection.port)})
    assert other.has_any
    other.close()


def test_who_looks_at_descriptors_is_not_seen_by_others_who_look(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look at a socket takes a second descriptor of it for a moment, and nobody holds it by that."""
    is_looking, go_on, goes_to = threading.Event(), threading.Event(), quiet._goes_to

    def look_for_long(copy: socket.socket, addresses: frozenset[tuple[str, int]]) -> bool:
        if addresses == {(HOST, 1)} and goes_to(copy, {(HOST, connection.port)}):
            is_looking.set()
            assert go_on.wait(10)
        return goes_to(copy, addresses)

    monkeypatch.setattr(quiet, "_goes_to", look_for_long)
    other, held = HeldConnections(), HeldConnections()
    looks = threading.Thread(target=other.hold, args=({(HOST, 1)},))
    holds = threading.Thread(target=held.hold, args=({(HOST, connection.port)},))
    looks.start()
    assert is_looking.wait(10)
    holds.start()
    holds.join(0.1)
    go_on.set()
    for thread in (looks, holds):
        thread.join(10)
    assert held.has_any
    connection.engines.close()
    held.end()
    assert len(held) == 1
    held.close()


def test_a_listener_and_datagrams_are_nobodys_connection(connection: Connection) -> None:
    held = HeldConnections()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.connect((HOST, connection.port))
        connection.engines.close()
        held.hold({(HOST, connection.port)})
    assert not held.has_any


def test_an_address_of_ipv4_in_the_clothes_of_ipv6(connection: Connection) -> None:
    held = HeldConnections()
    with socket.socket(socket.AF_INET6) as dual:
        dual.connect((f"::ffff:{HOST}", connection.port))
        connection.engines.close()
        held.hold({(HOST, connection.port)})
        assert held.has_any
    held.close()


def test_what_is_known_to_be_gone_is_forgotten(connection: Connection, held: HeldConnections) -> None:
    connection.engines.close()
    held.end()
    held.end()
    assert not held.is_quiet(there), "one that is not read to its end, and one that we never had"
    held.forget_ended()
    assert held.is_quiet(nobody_asks)


def test_a_number_that_means_something_else_by_now(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the copy it was closed, and given to another socket of ours, or to a file."""
    file = os.open("/dev/null", os.O_RDONLY)
    for descriptor in (file, connection.engines.fileno(), 1 << 20):
        monkeypatch.setattr(quiet, "own_sockets", lambda number=descriptor: {"socket:[1]": [number]})
        HeldConnections().hold({(HOST, connection.port)})
        quiet.shorten_accept(connection.port)
    os.close(file)


def test_all_descriptors_of_a_socket_are_found(connection: Connection) -> None:
    with connection.engines.dup() as second:
        name = os.readlink(f"/proc/self/fd/{second.fileno()}")
        assert sorted(own_sockets()[name]) == sorted([second.fileno(), connection.engines.fileno()])


@pytest.mark.parametrize(("family", "everywhere"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
def test_whoever_accepts_at_a_port_is_woken_and_looks_up_from_then_on(
    family: socket.AddressFamily, everywhere: str
) -> None:
    def patience(end: socket.socket) -> float:
        seconds, microseconds = struct.unpack("ll", end.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
        return float(seconds + microseconds / 1e6)

    engines, anothers = (socket.create_server((everywhere, 0), family=family) for _ in range(2))
    bound = socket.socket(family)
    bound.bind((everywhere, 0))
    with engines, anothers, bound:
        for end in (engines, bound):
            quiet.shorten_accept(end.getsockname()[1])
        assert 0.005 <= patience(engines) < 0.05, "the kernel rounds up"
        assert patience(anothers) == patience(bound) == 0, "for ever"
        engines.settimeout(10)
        woken, _ = engines.accept()
        woken.close()


def test_sockets_of_other_kinds_are_passed_over(connection: Connection) -> None:
    held, (one, other) = HeldConnections(), socket.socketpair()
    with one, other:
        held.hold({(HOST, connection.port)})
        quiet.shorten_accept(1)
        assert has_read_everything(connection.port)
    assert len(held._of_the_engine) == 1
    held.close()


# ---- what has arrived


def test_bytes_that_nobody_has_read_yet_will_land(connection: Connection) -> None:
    assert has_read_everything(connection.port)
    connection.engines.sendall(b"rows")
    connection.engines.close()
    assert not has_read_everything(connection.port)
    assert has_read_everything(1), "they are at another port"
    connection.peers.recv(2)
    assert not has_read_everything(connection.port)
    connection.peers.recv(2)
    assert has_read_everything(connection.port)
    assert has_read_everything(1)


def test_what_is_on_its_way_when_the_writer_is_found_gone_is_waited_for(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet, "_IN_FLIGHT", 0.3)
    network = threading.Timer(0.05, connection.engines.sendall, (b"rows",))
    network.start()
    assert not has_read_everything(connection.port)
    network.join()


def test_a_reset_leaves_what_had_arrived(connection: Connection) -> None:
    connection.engines.sendall(b"rows")
    connection.engines.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.engines.close()
    assert not has_read_everything(connection.port)
    assert connection.peers.recv(100) == b"rows"
    assert has_read_everything(connection.port)


def test_a_connection_that_is_always_in_use_is_read_when_it_has_been_seen_empty(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet, "_READ_WITHIN", 10.0)
    done = threading.Event()

    def write_and_read() -> None:
        while not done.is_set():
            connection.engines.sendall(b"x")
            connection.peers.recv(1)

    user = threading.Thread(target=write_and_read)
    user.start()
    assert has_read_everything(connection.port)
    done.set()
    user.join()


def test_each_connection_has_to_be_seen_empty_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "_IN_FLIGHT", 0.0)
    looks = iter([{"one", "two"}, {"two", "new"}, {"one", "new"}])
    monkeypatch.setattr(quiet, "_unread", lambda port: next(looks))
    assert has_read_everything(15000)


# ---- a port, and an engine


def test_only_a_refusal_is_one(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    address = Address(HOST, connection.port)
    assert not is_refused(address)
    connection.listener.close()
    assert is_refused(address)
    assert not is_refused(Address("x" * 100, 1))
    for error in (TimeoutError, ConnectionResetError, OSError):

        def fail(*_: object, error: type[Exception] = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(socket, "create_connection", fail)
        assert not is_refused(address)


@pytest.mark.parametrize("proven", [True, False, ZeroDivisionError])
def test_whoever_asks_whether_a_process_is_gone_is_answered(
    proven: bool | type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_refused(address: Address) -> bool:
        assert address == Address(HOST, 7)
        if isinstance(proven, bool):
            return proven
        raise proven

    answers: queue.Queue[tuple[ProveGone, bool]] = queue.Queue()
    monkeypatch.setattr(quiet, "is_refused", is_refused)
    prover = Prover(lambda question, is_gone: answers.put((question, is_gone)))
    question = ProveGone("session", Address(HOST, 7))
    prover.ask(question)
    assert answers.get(timeout=10) == (question, proven is True)
    prover.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("relay-proof")] == []


@pytest.mark.parametrize("answer", [ConnectionRefusedError, TimeoutError, ValueError])
@pytest.mark.parametrize("data_port_listens", [True, False])
def test_no_answer_is_no_proof_unless_both_ports_refuse(
    answer: type[Exception], data_port_listens: bool, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(_: Address) -> EngineFacts:
        raise answer

    monkeypatch.setattr(quiet, "ask", ask)
    facts = EngineFacts(frozenset({"tcp"}), connection.port, ())
    if not data_port_listens:
        connection.listener.close()
    is_dead = answer is ConnectionRefusedError and not data_port_listens
    assert is_gone(Address(HOST, 1), facts) is is_dead


def test_another_engine_in_its_place_is_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = EngineFacts(frozenset({"tcp"}), 15000, ((4096, 1),))
    for found in (facts, facts._replace(data_port=15001), facts._replace(regions=((8192, 1),))):
        monkeypatch.setattr(quiet, "ask", lambda _, found=found: found)
        assert is_gone(Address(HOST, 1), facts) is (found != facts)
