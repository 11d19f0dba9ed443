"""Proofs that nothing more can land at a peer: its process is gone, or the kernel knows the connection as drained.

Mooncake's `-1` does not stop a write: bytes lie in socket buffers, and the peer's engine writes them to its memory when
it gets to them, even after our engine is gone. But the peer closes its end only after it has read everything up to our
end-of-file, and our kernel knows when it did: the connection is then in TIME_WAIT (or the peer had closed first).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Final, NamedTuple

from sglang.srt.disaggregation.multimodal.protocol.messages import Address

_TABLES: Final = ("/proc/self/net/tcp", "/proc/self/net/tcp6")

_PROBE_TIMEOUT: Final = 2.0

_LISTEN: Final = "0A"
# TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING: in all of them the peer has closed its end.
_PEER_CLOSED: Final = frozenset({"06", "08", "09", "0B"})


def is_refused(address: Address) -> bool:
    """Whether its machine says that nobody listens there: the process that did is gone."""
    try:
        socket.create_connection((address.host, address.port), timeout=_PROBE_TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    except (OSError, UnicodeError):
        return False  # no answer proves nothing
    return False


def is_gone(session_id: str) -> bool:
    """Whether the process that had this Mooncake session is gone: its engine listened for as long as it lived."""
    host, _, port = session_id.rpartition(":")
    if not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
        return False
    return is_refused(Address(host.removeprefix("[").removesuffix("]"), int(port)))


class Connection(NamedTuple):
    """Both ends, as the kernel prints them."""

    local: str
    remote: str


class _Row(NamedTuple):
    connection: Connection
    state: str
    inode: str


def _rows() -> Iterator[_Row]:
    for table in _TABLES:
        try:
            with open(table) as lines:
                next(lines)
                for line in lines:
                    fields = line.split()
                    yield _Row(Connection(fields[1], fields[2]), fields[3], fields[9])
        except OSError:
            continue  # no IPv6, or no /proc: then nothing is proven


def _own_sockets() -> set[str]:
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
    return inodes


def open_connections() -> frozenset[Connection]:
    """Every TCP connection that this process holds right now."""
    own = _own_sockets()
    return frozenset(row.connection for row in _rows() if row.inode in own and row.state != _LISTEN)


class ClosedConnections:
    """Connections that we have closed, until it is proven that the peer has read them to their end."""

    def __init__(self, connections: frozenset[Connection]) -> None:
        self._waiting = set(connections)
        # Not having seen a connection proves nothing about the one that carried the write.
        self._proven = bool(connections)

    def is_quiet(self) -> bool:
        if self._proven and self._waiting:
            ended = {row.connection for row in _rows() if row.state in _PEER_CLOSED}
            self._waiting -= ended
        return self._proven and not self._waiting
