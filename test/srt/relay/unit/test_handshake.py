"""What an engine says of itself, and what is made of answers that no engine gives."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from embedding_relay.memory import handshake
from embedding_relay.memory.handshake import EngineFacts, address_of, ask, find_data_port
from embedding_relay.protocol.messages import Address

HOST = "127.0.0.1"
TCP = {
    "buffers": [{"addr": (1 << 64) - 4096, "length": 4096, "name": "127.0.0.1:16842"}],
    "name": "127.0.0.1:16842",
    "protocol": "tcp",
    "tcp_data_host": HOST,
    "tcp_data_port": 15132,
    "tcp_proto_version": 2,
    "timestamp": "2026-11-26 13:11:11.895326",
}
RDMA = {
    "buffers": [{"addr": 4096, "length": 1, "rkey": [7], "lkey": [8]}],
    "devices": [{"gid": "fe80", "lid": 0, "name": "mlx5_0"}],
    "protocol": "rdma",
    "tcp_data_port": 0,
}


@contextmanager
def engine_that_does(serve: Callable[[socket.socket], object]) -> Iterator[Address]:
    """Somebody at a port, who is asked once."""
    with socket.create_server((HOST, 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                serve(connection)

        thread = threading.Thread(target=answer)
        thread.start()
        yield Address(HOST, listener.getsockname()[1])
        thread.join(10)


def framed(body: bytes) -> bytes:
    return struct.pack("<Q", len(body) + 1) + b"\x01" + body


def answers(body: bytes | dict[str, object]) -> Callable[[socket.socket], object]:
    content = body if isinstance(body, bytes) else framed(json.dumps(body).encode())

    def serve(connection: socket.socket) -> None:
        assert connection.recv(11, socket.MSG_WAITALL) == struct.pack("<Q", 3) + b"\x01{}"
        connection.sendall(content)

    return serve


def test_an_engine_over_tcp() -> None:
    with engine_that_does(answers(TCP)) as address:
        facts = ask(address)
    assert facts == EngineFacts(frozenset({"tcp"}), 15132, (((1 << 64) - 4096, 4096),), HOST)
    assert facts.is_tcp
    assert facts.spoken == "tcp"


@pytest.mark.parametrize(
    ("protocol", "protocols"), [("rdma", {"rdma"}), ("rdma,hip", {"rdma", "hip"}), (["rdma", "hip"], {"rdma", "hip"})]
)
def test_an_engine_over_rdma(protocol: object, protocols: set[str]) -> None:
    with engine_that_does(answers(RDMA | {"protocol": protocol})) as address:
        facts = ask(address)
    assert facts.protocols == protocols
    assert not facts.is_tcp


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (struct.pack("<Q", 1 << 40), "1099511627776 bytes"),
        (struct.pack("<Q", 0), "0 bytes"),
        (framed(b"no json"), "not an engine's"),
        (framed(b"\xff" * 10), "not an engine's"),
        (framed(b"[" * 100_000), "not an engine's"),
        (framed(b"[]"), "not an engine's"),
        (framed(b"{}"), "not an engine's"),
        (TCP | {"protocol": None}, "not an engine's"),
        (TCP | {"buffers": [{"addr": "here", "length": 1}]}, "not an engine's"),
        (TCP | {"tcp_data_port": 0}, "no port for its data, but 0"),
        (TCP | {"tcp_data_port": 65536}, "no port for its data, but 65536"),
        (TCP | {"tcp_data_port": 10**30}, "no port for its data, but 10"),
        (TCP | {"tcp_proto_version": 1}, "does not confirm writes: Mooncake does since 0.3.12"),
        ({name: TCP[name] for name in TCP if name != "tcp_proto_version"}, "does not confirm writes"),
    ],
)
def test_answers_that_no_engine_gives(answer: bytes | dict[str, object], problem: str) -> None:
    with engine_that_does(answers(answer)) as address, pytest.raises(ValueError, match=problem):
        ask(address)


def test_who_hangs_up_has_not_answered() -> None:
    with engine_that_does(answers(framed(b"{}")[:5])) as address, pytest.raises(OSError, match="hung up"):
        ask(address)


def test_who_answers_a_byte_at_a_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "_ANSWER_TIMEOUT", 0.2)
    given_up = threading.Event()

    def drip(connection: socket.socket) -> None:
        while not given_up.wait(0.02):
            connection.sendall(b"\x00" if connection.getsockname() else b"")

    started = time.monotonic()
    with engine_that_does(lambda connection: (connection.sendall(struct.pack("<Q", 1 << 20)), drip(connection))) as at:
        with pytest.raises(TimeoutError):
            ask(at)
        given_up.set()
    assert time.monotonic() - started < 5


def test_an_answer_in_pieces_is_read_to_its_end_and_no_further() -> None:
    class Pieces:
        """As much of a socket as is used."""

        left = b"0123456789"
        patience = 0.0

        def settimeout(self, seconds: float) -> None:
            self.patience = seconds

        def recv(self, most: int) -> bytes:
            piece, self.left = self.left[: min(3, most)], self.left[min(3, most) :]
            return piece

    connection: Any = Pieces()
    assert handshake._receive(connection, 8, time.monotonic() + 10) == b"01234567"
    assert 9 < connection.patience < 10, "what is left of the whole"


def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "_ANSWER_TIMEOUT", 0.1)
    silent = socket.create_server((HOST, 0))
    with silent, pytest.raises(TimeoutError):
        ask(Address(HOST, silent.getsockname()[1]))


def test_data_is_not_sent_to_another_machine_than_the_session_names() -> None:
    with engine_that_does(lambda _: None) as address:
        facts = EngineFacts(frozenset({"tcp"}), address.port, (), "192.0.2.1")
        with pytest.raises(ValueError, match=r"data sent to '192\.0\.2\.1'"):
            find_data_port(address, facts)
        assert find_data_port(address, facts._replace(data_host=HOST)) == {(HOST, address.port)}


def test_the_data_port_by_all_names_of_the_host() -> None:
    with engine_that_does(lambda _: None) as address:
        facts = EngineFacts(frozenset({"tcp"}), address.port, ())
        assert (HOST, address.port) in find_data_port(Address("localhost", 1), facts)


@pytest.mark.parametrize(
    ("session_id", "address"),
    [
        ("10.0.0.1:15000", Address("10.0.0.1", 15000)),
        ("[::1]:1", Address("::1", 1)),
        ("gpu-7:65535", Address("gpu-7", 65535)),
    ],
)
def test_names_of_sessions(session_id: str, address: Address) -> None:
    assert address_of(session_id) == address


@pytest.mark.parametrize(
    "session_id", ["", "host", "host:", ":1", "host:0", "host:65536", "host:٣", "host:-1", "h:1e3"]
)
def test_what_is_no_name_of_a_session(session_id: str) -> None:
    with pytest.raises(ValueError, match="Mooncake session"):
        address_of(session_id)
