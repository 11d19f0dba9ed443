"""Proofs that no earlier write can still land at a peer: its process is gone, or has read our connections to the end.

Mooncake's `-1` does not stop a write: bytes lie in socket buffers, and the peer's engine writes them to its memory when
it gets to them, even after our engine is gone. But the peer's engine closes its end of a connection when it has read
our end-of-file, and not before. So we keep the engine's connections open past the engine's own end, send that
end-of-file ourselves, and wait for the peer's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from embedding_relay.protocol.effects import ProveGone
from embedding_relay.protocol.messages import Address

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT: Final = 2.0
_PROBE_THREADS: Final = 4
_TCP_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_LOOPBACK: Final = {socket.AF_INET: ("0.0.0.0", "127.0.0.1"), socket.AF_INET6: ("::", "::1")}
_FIVE_MILLISECONDS: Final = struct.pack("ll", 0, 5000)

# ---- its process is gone


def is_refused(address: Address) -> bool:
    """Whether its machine refuses a connection to it: the process that listened there is gone."""
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


class Prover:
    """Finds out whether processes of other machines are gone, in threads of its own: the control thread never waits.

    How many questions wait is bounded by the protocol core, which asks them.
    """

    def __init__(self, answer: Callable[[ProveGone, bool], None]) -> None:
        """`answer` is called in one of these threads, and is told whether the process is known to be gone."""
        self._answer = answer
        self._pool = ThreadPoolExecutor(_PROBE_THREADS, thread_name_prefix="relay-proof")

    def ask(self, question: ProveGone) -> None:
        self._pool.submit(self._find_out, question)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _find_out(self, question: ProveGone) -> None:
        proven = False
        try:
            proven = is_refused(question.address)
        except BaseException:  # whatever it was: who waits for this answer must get one
            logger.exception("relay: whether the process at %s is gone could not be found out", question.address)
        self._answer(question, proven)


# ---- it has read our connections to their end


def own_sockets() -> dict[str, int]:
    """The sockets of this process: what the kernel calls them, and a descriptor of each."""
    sockets = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                sockets[target] = int(name)
    return sockets


def shorten_accept(port: int) -> None:
    """Have our thread that accepts connections at this port, on all addresses, look up every few milliseconds."""
    for descriptor in own_sockets().values():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as listener:
            if listener.family in _LOOPBACK and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                every, loopback = _LOOPBACK[listener.family]
                if listener.getsockname()[:2] == (every, port):
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _FIVE_MILLISECONDS)
                    # The timeout holds from the next wait on; a connection ends this one.
                    socket.create_connection((loopback, port), timeout=_PROBE_TIMEOUT).close()


class HeldConnections:
    """TCP connections of an engine, kept open by descriptors of our own for longer than the engine lives."""

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}
        self._any_has_ended = False

    def hold_new(self, before: frozenset[str]) -> None:
        """Hold what was opened since `before`; it may be more than the engine's."""
        for name, descriptor in own_sockets().items():
            if name not in before and name not in self._held:
                with contextlib.suppress(OSError):
                    connection = socket.socket(fileno=os.dup(descriptor))
                    if _is_tcp_connection(connection):
                        self._held[name] = connection
                    else:
                        connection.close()

    def end_those_of_the_engine(self) -> None:
        """After the engine is gone: what only we hold now was the engine's; what others hold too is theirs."""
        ours = {connection.fileno() for connection in self._held.values()}
        in_use = {name for name, descriptor in _all_descriptors() if descriptor not in ours}
        for name in [name for name in self._held if name in in_use]:
            self._held.pop(name).close()
        for connection in self._held.values():
            connection.setblocking(False)
            with contextlib.suppress(OSError):  # it ended already; reading tells
                connection.shutdown(socket.SHUT_WR)

    def are_drained(self) -> bool:
        """Whether the peer has closed every one of them. Having held none proves nothing."""
        for name, connection in list(self._held.items()):
            if _has_ended(connection):
                self._held.pop(name).close()
                self._any_has_ended = True
        return self._any_has_ended and not self._held

    def __len__(self) -> int:
        return len(self._held)

    def close(self) -> None:
        for connection in self._held.values():
            connection.close()
        self._held.clear()


def _all_descriptors() -> Iterator[tuple[str, int]]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/self/fd/{name}"), int(name)


def _is_tcp_connection(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False  # it listens, or was never connected
    return connection.family in _TCP_FAMILIES and connection.type == socket.SOCK_STREAM


def _has_ended(connection: socket.socket) -> bool:
    """Read what the peer still says, acknowledgements of writes, up to its end-of-file."""
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True  # reset: the peer has closed it without reading on
    except OSError:
        return False  # a timeout, for example, says nothing about the peer
    return True
