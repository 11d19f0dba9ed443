"""Proofs that no earlier write can still land at a peer: it has read our connections to the end, or is gone.

Mooncake's `-1` does not stop a write: bytes lie in socket buffers, and the peer's engine writes them to its memory when
it gets to them, even after our engine is gone. But the peer's engine closes its end of a connection when it has read
our end-of-file, and not before. So we keep the engine's connections open past the engine's own end, send that
end-of-file ourselves, and wait for the peer's.

Any other end of a connection proves nothing by itself. A reset, a time-out or a firewall may end it for us while the
peer's kernel still has bytes that its engine has yet to read. Then only the end of that engine is proof.

The other way around, a writer that is gone has left bytes in our kernel, which our engine has yet to read.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import logging
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from embedding_relay.memory.handshake import EngineFacts, ask
from embedding_relay.protocol.effects import ProveGone
from embedding_relay.protocol.messages import Address

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT: Final = 2.0
_PROBE_THREADS: Final = 4
_IN_FLIGHT: Final = 1.0
_READ_WITHIN: Final = 5.0
_LOOK_EVERY: Final = 0.01
_LOOPBACK: Final = {socket.AF_INET: ("0.0.0.0", "127.0.0.1"), socket.AF_INET6: ("::", "::1")}
_FIVE_MILLISECONDS: Final = struct.pack("ll", 0, 5000)

# ---- the sockets of this process

# To look at a socket takes a second descriptor of it, which nobody else who looks may take for somebody's.
_looking: Final = threading.Lock()


def own_sockets() -> dict[str, list[int]]:
    """What the kernel calls them, and all descriptors of each."""
    sockets: dict[str, list[int]] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                sockets.setdefault(target, []).append(int(name))
    return sockets


def _tcp_sockets() -> Iterator[tuple[str, int, socket.socket]]:
    """Name, number of descriptors, and one more descriptor, which is closed when the caller goes on."""
    with _looking:
        for name, descriptors in own_sockets().items():
            if (copy := _duplicate(name, descriptors[0])) is not None:
                with copy:
                    if copy.family in _LOOPBACK and copy.type == socket.SOCK_STREAM:
                        yield name, len(descriptors), copy


def _duplicate(name: str, descriptor: int) -> socket.socket | None:
    """None if its number means something else by now."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None
    try:
        if os.readlink(f"/proc/self/fd/{copy}") == name:
            return socket.socket(fileno=copy)
    except OSError:
        pass
    os.close(copy)
    return None


def _listens(connection: socket.socket) -> bool:
    return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def shorten_accept(port: int) -> None:
    """Have our thread that accepts connections at this port, on all addresses, look up every few milliseconds."""
    for _, _, listener in _tcp_sockets():
        every, loopback = _LOOPBACK[listener.family]
        if listener.getsockname()[:2] == (every, port) and _listens(listener):
            with contextlib.suppress(OSError):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _FIVE_MILLISECONDS)
                # The timeout holds from the next wait on; a connection ends this one.
                socket.create_connection((loopback, port), timeout=_PROBE_TIMEOUT).close()


# ---- it is gone


def is_refused(address: Address) -> bool:
    """Whether its machine refuses a connection to it: nobody listens there any more.

    Of the process that did, this says that it takes no new connections. It may still read from those that it has.
    """
    try:
        socket.create_connection((address.host, address.port), timeout=_PROBE_TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    except (OSError, UnicodeError):
        return False  # no answer proves nothing
    return False


def is_gone(engine: Address, facts: EngineFacts) -> bool:
    """Whether the engine that said this of itself is gone, and with it whatever its connections had yet to deliver.

    Another one answers in its place, or nobody listens at either of its ports. To be asked only about connections that
    have ended already: a living engine may be hidden by a firewall that refuses, but not one that is read from.
    """
    try:
        return ask(engine) != facts
    except ConnectionRefusedError:
        return is_refused(Address(engine.host, facts.data_port))
    except (OSError, ValueError):
        return False  # no answer proves nothing


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


# ---- nothing of it is left here


def has_read_everything(data_port: int) -> bool:
    """Whether our engine has read what had arrived at its data port a second from now, from whomever. Takes seconds.

    To be asked when a writer is gone: its kernel sent what it had left, and a healthy network has brought it by then.
    Whose connection is whose, nobody can tell; so every one that had unread bytes has to be seen without, or closed.
    """
    time.sleep(_IN_FLIGHT)
    deadline, unread = time.monotonic() + _READ_WITHIN, _unread(data_port)
    while unread and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY)
        unread &= _unread(data_port)
    return not unread


def _unread(data_port: int) -> set[str]:
    """Connections at our port with bytes in the kernel. One that was reset keeps them, and they will be read."""
    return {
        name
        for name, _, connection in _tcp_sockets()
        if connection.getsockname()[1] == data_port and not _listens(connection) and _has_unread(connection)
    }


def _has_unread(connection: socket.socket) -> bool:
    count = fcntl.ioctl(connection, termios.FIONREAD, struct.pack("i", 0))
    return struct.unpack("i", count) != (0,)


# ---- it has read our connections to their end


class HeldConnections:
    """TCP connections of the engines of one link, kept open by descriptors of our own for longer than an engine lives.

    They are told from all others of this process by where they go: to the data port of one engine of one peer.
    """

    def __init__(self) -> None:
        self._of_the_engine: dict[str, socket.socket] = {}
        self._ending: dict[str, socket.socket] = {}
        """Those of engines that are gone, to which we have sent an end-of-file."""
        self._lost = False
        """One has ended otherwise than by the peer's end-of-file, or was never seen."""

    def hold(self, data_port: Collection[tuple[str, int]]) -> None:
        """Whatever this process has open to these addresses, and nobody holds yet: that would have two descriptors."""
        for name, descriptors, connection in _tcp_sockets():
            if descriptors == 1 and _goes_to(connection, data_port):
                self._of_the_engine[name] = socket.socket(fileno=connection.detach())

    @property
    def has_any(self) -> bool:
        return bool(self._of_the_engine)

    def end(self) -> None:
        """The engine is gone: what only we have now was the engine's, what others have too is theirs."""
        with _looking:
            descriptors, before = own_sockets(), len(self._ending)
        for name, connection in self._of_the_engine.items():
            is_ours = descriptors[name] == [connection.fileno()]
            if is_ours and _end(connection):
                self._ending[name] = connection
            else:
                self._lost |= is_ours
                connection.close()
        self._of_the_engine.clear()
        self._lost |= len(self._ending) == before

    def is_quiet(self, is_gone: Callable[[], bool]) -> bool:
        """Whether nothing of the engines that are gone can land at the peer. `is_gone` may take seconds."""
        for name, connection in list(self._ending.items()):
            end = _look_for_end(connection)
            if end is not _End.NOT_YET:
                self._ending.pop(name).close()
                self._lost |= end is _End.CUT
        if self._ending or (self._lost and not is_gone()):
            return False
        self._lost = False
        return True

    def forget_ended(self) -> None:
        """The peer's engine, to which they went, is known to be gone."""
        for connection in self._ending.values():
            connection.close()
        self._ending.clear()
        self._lost = False

    def __len__(self) -> int:
        """How many the peer has yet to read to their end."""
        return len(self._ending)

    def close(self) -> None:
        for connection in self._of_the_engine.values():
            connection.close()
        self._of_the_engine.clear()
        self.forget_ended()


def _goes_to(connection: socket.socket, addresses: Collection[tuple[str, int]]) -> bool:
    try:
        host, port = connection.getpeername()[:2]
    except OSError:
        return False  # it listens, or is not connected
    return (host.removeprefix("::ffff:"), port) in addresses


class _End(enum.Enum):
    NOT_YET = enum.auto()
    READ = enum.auto()
    """The peer closed it: what it has not read by now it will never read."""
    CUT = enum.auto()
    """Nobody knows what the peer has of it, and what it will read."""


def _end(connection: socket.socket) -> bool:
    """Whether it was still there to be told of the end. If not, how it ended was told to the engine, and not to us."""
    connection.setblocking(False)
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        return False
    return True


def _look_for_end(connection: socket.socket) -> _End:
    """Read what the peer still says, acknowledgements of writes, up to its end-of-file."""
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return _End.NOT_YET
    except OSError:
        return _End.CUT  # and every later look would read an end-of-file, which is not the peer's
    return _End.READ
