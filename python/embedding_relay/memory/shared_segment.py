"""Memory that processes of one user on one host share: made and handed out by one of them, mapped by others.

It is a memfd: memory with no name in any file system. So nothing is left of it when its last process has ended, in
whatever way, and no size of a /dev/shm limits it. Who wants it connects to a local socket, which is reached by a random
name and only from the same kernel and network namespace; the kernel says for either end which user the other one is.
What comes through that socket is then the same memory: no two hosts and no two segments can be taken for each other.

The connection stays for as long as the memory is mapped. Its end is how the owner knows that a process can write no
more: the kernel closes it when the last thread of the process is past its last instruction, and not before.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from embedding_relay.memory.copying import PIECE_BYTES, CopyThreads
from embedding_relay.memory.plane import Entry, Unreachable
from embedding_relay.protocol.errors import LocalError, RelayError
from embedding_relay.threads import WatchedThread

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT: Final = 2.0
_AGAIN_AFTER: Final = 1.0
_LONGEST_NAME: Final = 64
_LONGEST_ANSWER: Final = 1024
# Whoever is of our user may connect, and a connection costs a descriptor.
_MOST_CONNECTIONS: Final = 1024
_BASE: Final = struct.Struct("<Q")
_PEER: Final = struct.Struct("3i")
_BYTES_PER_BLOCK: Final = 512  # of st_blocks, whatever the file system

# Nobody can take away memory that others have mapped: they would be killed by their next access to it.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# Of madvise, since Linux 5.14; an older kernel refuses it, and pages come one by one.
_POPULATE_READ: Final = 22
_POPULATE_WRITE: Final = 23

# One and the same function. The second keeps the interpreter's lock: to get it back may take longer than a small copy.
_copy: Final = ctypes.CDLL(None).memmove
_copy_small: Final = ctypes.PyDLL(None).memmove
_advise: Final = ctypes.CDLL(None).madvise
for _function in (_copy, _copy_small):
    _function.argtypes, _function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
_advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_SMALL: Final = 256 << 10


class NotShared(RelayError):
    """This memory cannot be mapped here, and why. To try again is of no use as long as both processes live."""


def socket_name(name: str) -> str:
    return f"\0sglang-embedding-relay-{name}"


def is_our_user(connection: socket.socket) -> bool:
    """The kernel notes whose process is at the other end when it begins to listen or to connect."""
    _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return bool(user == os.geteuid())


def check_user() -> None:
    """Raise NotShared where the kernel shows foreign users under our own number: those that a user namespace lacks."""
    with open("/proc/sys/kernel/overflowuid") as unknown, open("/proc/self/uid_map") as known:
        if int(unknown.read()) == os.geteuid() and int(known.read().split()[2]) != (1 << 32) - 1:
            raise NotShared(f"in this user namespace user {os.geteuid()} may be anybody")


def _has_hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def sealed_memory(length: int) -> int:
    """Its descriptor. All of it is there, as zeros, and can neither shrink nor grow; raises OSError."""
    descriptor = os.memfd_create("sglang-embedding-relay", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, length)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def populate(address: int, length: int, *, read_only: bool = False) -> None:
    """Have the pages of a mapping there now, and not one by one as each is first used."""
    _advise(address, length, _POPULATE_READ if read_only else _POPULATE_WRITE)


# ---- made and handed out


class Segment:
    """The memory, and a thread that hands it out."""

    def __init__(self) -> None:
        self.name = secrets.token_hex(16)
        """By which it is asked for."""
        self._fd = -1
        self._base = 0
        self._owner = b""
        self._listener: socket.socket | None = None
        self._thread: WatchedThread | None = None
        self._writers: dict[socket.socket, str] = {}
        """Who has the memory, or has connected and not yet said who it is: that one's name is empty."""
        self._closing = False
        self._lock = threading.Lock()

    def allocate(self, length: int) -> mmap.mmap:
        """All of it now, as zeros: memory that is lacking is an error here, and not a signal to whoever writes first.

        Raises OSError. The mapping is gone when nobody refers to it any more.
        """
        self._fd = sealed_memory(length)
        try:
            memory = mmap.mmap(self._fd, length, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except BaseException:
            self.close()
            raise
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return memory

    def open(self, owner: str, on_death: Callable[[str], None]) -> None:
        """From here on others may have it, and hear whose it is; raises OSError."""
        if self._fd < 0:
            raise LocalError("a segment is allocated before it is handed out")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(socket_name(self.name))
            listener.listen()
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        self._owner = owner.encode("ascii")
        self._listener = listener
        self._thread = WatchedThread("relay-shared-memory", self._hand_out, on_death)
        self._thread.start()

    def close(self) -> None:
        """Whoever has mapped the memory keeps it, and hears that its owner is gone."""
        if self._listener is not None and self._thread is not None:
            self._closing = True
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread
            self._thread.join()
            self._listener.close()
        self._listener = self._thread = None
        with self._lock:
            for connection in self._writers:
                connection.close()
            self._writers.clear()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    @property
    def writers(self) -> int:
        """How many processes have it."""
        with self._lock:
            return sum(map(bool, self._writers.values()))

    def may_be_written_by(self, writer: str) -> bool:
        """Whether a process of this name has it, and lives."""
        with self._lock:
            return any(name == writer and not _has_hung_up(connection) for connection, name in self._writers.items())

    # ---- its own thread

    def _hand_out(self) -> None:
        assert self._listener is not None
        with selectors.PollSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is not self._listener:
                        self._hear(key.fileobj, selector)  # type: ignore[arg-type]
                    elif not self._accept(selector):
                        return

    def _accept(self, selector: selectors.PollSelector) -> bool:
        """Whether we go on."""
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return not self._closing
        except OSError as error:
            logger.warning("relay: a process that asks for our memory cannot be heard: %s", error)
            time.sleep(_AGAIN_AFTER)
            return True
        connection.setblocking(False)
        if not is_our_user(connection) or len(self._writers) >= _MOST_CONNECTIONS:
            connection.close()
            return True
        with self._lock:
            self._writers[connection] = ""
        selector.register(connection, selectors.EVENT_READ)
        return True

    def _hear(self, connection: socket.socket, selector: selectors.PollSelector) -> None:
        """Its name, and then its end. Whoever has the memory is never forgotten before that, whatever else it says."""
        try:
            said = connection.recv(_LONGEST_NAME)
            is_over = not said
            if said and not self._writers[connection]:
                self._hand_to(connection, said)
        except (OSError, ValueError):
            is_over = True
        if is_over:
            selector.unregister(connection)
            with self._lock:
                del self._writers[connection]
            connection.close()

    def _hand_to(self, connection: socket.socket, said: bytes) -> None:
        if not said.isalnum():
            raise ValueError("that is no name")
        writer = said.decode("ascii")
        with self._lock:  # before it can write
            self._writers[connection] = writer
        socket.send_fds(connection, [_BASE.pack(self._base) + self._owner], [self._fd])
        logger.info("relay: encode rank %s writes to our memory directly", writer)


# ---- mapped


class MappedSegment:
    """Somebody else's memory, and the connection that says whether its owner lives."""

    def __init__(self, connection: socket.socket, memory: mmap.mmap, base: int) -> None:
        """`base`: where the owner has it, in whose addresses it is written to."""
        self._connection = connection
        self._memory: mmap.mmap | None = memory
        self._length = len(memory)
        self._base = base
        self._first: ctypes.c_char | None = ctypes.c_char.from_buffer(memory)
        self._here = ctypes.addressof(self._first)

    def populate(self) -> None:
        """Have its pages mapped now, and not one by one as they are first written to."""
        populate(self._here, self._length)

    def write(self, entries: Sequence[Entry], threads: CopyThreads) -> None:
        """Copy; raises Unreachable if nothing was, because it must not be."""
        if _has_hung_up(self._connection):
            raise Unreachable("the process whose memory this is has gone")
        shift = self._here - self._base
        for _, destination, length in entries:
            if not 0 <= destination - self._base <= self._length - length:
                raise Unreachable(f"{length} bytes at {destination:#x} are not in the memory that the peer shares")
        threads.run(_copy_each, list(_cut(entries, shift)), sum(entry.length for entry in entries))

    def close(self) -> None:
        """The connection ends when nothing can be written here any more: its end is proof of that."""
        if self._memory is not None:
            self._first = None
            self._memory.close()
            self._memory = None
            self._connection.close()


def _cut(entries: Iterable[Entry], shift: int) -> Iterator[Entry]:
    """None longer than what another thread may have; `shift`: from their addresses there to those here."""
    for source, destination, length in entries:
        for at in range(0, length, PIECE_BYTES):
            yield Entry(source + at, destination + shift + at, min(PIECE_BYTES, length - at))


def _copy_each(entries: Iterable[Entry]) -> None:
    for source, destination, length in entries:
        (_copy if length > _SMALL else _copy_small)(destination, source, length)


def attach(name: str, owner: str, writer: str) -> MappedSegment:
    """Map the segment of this name, as `writer`, unless it is not `owner` who says that it has it.

    Raises NotShared if this process cannot have it, and Unreachable if its owner does not answer.
    """
    check_user()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_ANSWER_TIMEOUT)
    try:
        segment = _attach(connection, socket_name(name), owner, writer)
    except BaseException as error:
        connection.close()
        if isinstance(error, (BlockingIOError, TimeoutError)):
            raise Unreachable("the process whose memory this is does not answer") from error
        if isinstance(error, OSError):
            raise NotShared(f"it cannot be mapped: {error}") from error
        raise
    segment.populate()
    return segment


def _attach(connection: socket.socket, address: str, owner: str, writer: str) -> MappedSegment:
    try:
        connection.connect(address)
    except ConnectionRefusedError:
        raise NotShared("it is on another host, or in another network namespace of this one") from None
    if not is_our_user(connection):
        raise NotShared("another user has it")
    try:
        connection.send(writer.encode("ascii"))
        said, descriptors, _, _ = socket.recv_fds(connection, _LONGEST_ANSWER, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        said, descriptors = b"", []
    with contextlib.ExitStack() as closing:
        for descriptor in descriptors:
            closing.callback(os.close, descriptor)
        if len(said) < _BASE.size or len(descriptors) != 1:
            raise NotShared("its process does not hand it out to this one")
        if said[_BASE.size :] != owner.encode("ascii"):  # whose blocks would then be written to in its name?
            raise NotShared("it belongs to another rank")
        connection.setblocking(False)
        return MappedSegment(connection, _map(descriptors[0]), *_BASE.unpack_from(said))


def _map(descriptor: int) -> mmap.mmap:
    """What would end us when we write to it is not mapped: memory that can shrink, or is not there yet."""
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise NotShared("it could be taken away under us")
    facts = os.fstat(descriptor)
    if not 0 < facts.st_size <= facts.st_blocks * _BYTES_PER_BLOCK:
        raise NotShared("not all of it is there")
    return mmap.mmap(descriptor, facts.st_size)
