"""What a Mooncake engine says of itself at its handshake port: over what it moves bytes, and which memory it knows.

Every engine tells its peers so before they write to it. Its Python interface does not: an engine that was asked for
RDMA and has none moves bytes over TCP, and says so nowhere else. So we ask as a peer would.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Final, NamedTuple

import msgspec

from embedding_relay.protocol.messages import Address

_CONNECT_TIMEOUT: Final = 2.0
# An engine answers one question at a time, and whoever connects and says nothing holds it up for five seconds.
_ANSWER_TIMEOUT: Final = 6.0

_LENGTH: Final = struct.Struct("<Q")
_TELL_ME: Final = b"\x01{}"  # the kind of question, and what we say of ourselves: nothing
_LONGEST_ANSWER: Final = 4 << 20
# Before, a write over TCP was done when it had left, and nobody knew when it arrived, or whether it did.
_CONFIRMS_WRITES: Final = 2


class _Region(msgspec.Struct, frozen=True):
    addr: int
    length: int


class _Answer(msgspec.Struct, frozen=True):
    protocol: str | list[str]
    tcp_data_port: int = 0
    tcp_data_host: str = ""
    tcp_proto_version: int = 1
    buffers: tuple[_Region, ...] = ()


class EngineFacts(NamedTuple):
    """Two engines never have the same: of one that has died, another may have the port, but not the memory too."""

    protocols: frozenset[str]
    data_port: int
    """Where it takes connections over which its memory is written, if that is done over TCP."""
    regions: tuple[tuple[int, int], ...]
    data_host: str = ""
    """Where that port is; an older engine does not say it."""

    @property
    def is_tcp(self) -> bool:
        return "tcp" in self.protocols

    @property
    def spoken(self) -> str:
        return ", ".join(sorted(self.protocols)) or "nothing"


def address_of(session_id: str) -> Address:
    """Where the engine with this name listens. Raises ValueError if that is no name of one."""
    host, _, port = session_id.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise ValueError(f"{session_id!r} is not the name of a Mooncake session")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))


def ask(engine: Address) -> EngineFacts:
    """Raises OSError if nobody answers in time, and ValueError if the answer is not an engine's."""
    with socket.create_connection((engine.host, engine.port), timeout=_CONNECT_TIMEOUT) as connection:
        deadline = time.monotonic() + _ANSWER_TIMEOUT
        connection.sendall(_LENGTH.pack(len(_TELL_ME)) + _TELL_ME)
        (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, deadline))
        if not 0 < length <= _LONGEST_ANSWER:
            raise ValueError(f"it answers with {length} bytes, which no engine does")
        return _understand(_receive(connection, length, deadline))


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < length:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(length - len(received))
        if not part:
            raise ConnectionResetError("it hung up in the middle of its answer")
        received += part
    return bytes(received)


def _understand(answer: bytes) -> EngineFacts:
    try:
        said = msgspec.json.decode(answer[1:], type=_Answer)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ValueError(f"its answer is not an engine's: {error}") from error
    protocols = said.protocol.split(",") if isinstance(said.protocol, str) else said.protocol
    facts = EngineFacts(
        frozenset(filter(None, protocols)),
        said.tcp_data_port,
        tuple((region.addr, region.length) for region in said.buffers),
        said.tcp_data_host,
    )
    if facts.is_tcp and not 0 < facts.data_port < 65536:
        raise ValueError(f"it names no port for its data, but {facts.data_port}")
    if facts.is_tcp and said.tcp_proto_version < _CONFIRMS_WRITES:
        raise ValueError("it does not confirm writes: Mooncake does since 0.3.12")
    return facts


def find_data_port(engine: Address, facts: EngineFacts) -> frozenset[tuple[str, int]]:
    """All addresses by which an engine of this process may connect to it. Raises OSError if that cannot be done."""
    host, port = engine.host, facts.data_port
    if facts.data_host not in ("", host):
        # Whoever names a session names the machine; it does not get to send our rows to yet another one.
        raise ValueError(f"it wants its data sent to {facts.data_host[:100]!r}")
    with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return frozenset((str(address[0]), port) for _, _, _, _, address in found)
