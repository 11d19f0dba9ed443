"""Received rows that the ranks of one host share: one of them has received and lends them, the others read them there.

The lender takes the memory of its requests from memfds, which the others map once each and read only. When a request is
complete it says so to them, and keeps the rows until each has given them back, which one does by itself when nothing of
that rank refers to them any more. Until then the lender refers to them too: so their memory is not used again.
Nothing here has a name in a file system; when the ranks have ended, in whatever way, nothing is left.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import itertools
import logging
import os
import selectors
import socket
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from embedding_relay.memory.buffers import ReceivedRows, bytes_for, page_locked, rows_in
from embedding_relay.memory.layout import Aux, BufferLayout
from embedding_relay.memory.reuse import ReusedMemory
from embedding_relay.memory.shared_segment import populate, sealed_memory
from embedding_relay.threads import WatchedThread

logger = logging.getLogger(__name__)

_Bytes = NDArray[np.uint8]
GiveRows = Callable[[int, ReceivedRows], None]
"""Called with a request's number and its rows."""

# Every request has memory of its own, so it must not be much for a small one.
_PIECE: Final = 64 << 10
_LONGEST: Final = 16 << 10
_MOST_NUMBERS: Final = 500
"""In one message, which then is shorter than the longest."""

_READ_ONLY: Final = 1  # PROT_READ
_protect: Final = ctypes.CDLL(None).mprotect
_protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


# ---- what they say to each other


class MemoryMade(msgspec.Struct, frozen=True, tag=True):
    """Comes with a descriptor."""

    name: int


class MemoryGone(msgspec.Struct, frozen=True, tag=True):
    name: int


class RowsLent(msgspec.Struct, frozen=True, tag=True):
    number: int
    memory: int
    aux: list[int]


class RowsReturned(msgspec.Struct, frozen=True, tag=True):
    numbers: list[int]


class Closing(msgspec.Struct, frozen=True, tag=True):
    """The end of the connection that follows is no accident."""


Message = MemoryMade | MemoryGone | RowsLent | RowsReturned | Closing


class _Poke:
    """Wakes a thread, also from a finalizer. That may run in the middle of anything, so no lock is taken here."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ours.setblocking(False)
        self._theirs.setblocking(False)

    def fileno(self) -> int:
        return self._ours.fileno()

    def set(self) -> None:
        with contextlib.suppress(OSError):  # it is full, and so the thread wakes anyway; or all is over
            self._theirs.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._ours.recv(_LONGEST)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


def _receive(connection: socket.socket) -> tuple[Message | None, list[int]]:
    """The next message with its descriptors; None at the end of the connection."""
    try:
        said, descriptors, _, _ = socket.recv_fds(
            connection, _LONGEST, 1, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
    except ConnectionError:
        return None, []
    return msgspec.json.decode(said, type=Message) if said else None, list(descriptors)


def _close(connection: socket.socket) -> None:
    """Whoever waits at either end goes on."""
    with contextlib.suppress(OSError):
        connection.send(msgspec.json.encode(Closing()), socket.MSG_DONTWAIT)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Side(abc.ABC):
    """One end of the connections, and the thread that hears what comes and says what there is to say."""

    def __init__(self, connections: Mapping[int, socket.socket]) -> None:
        self._connections = dict(connections)
        self._poke: _Poke | None = None
        self._thread: WatchedThread | None = None
        self._closing = False
        self._on_death: Callable[[str], None] = logger.error

    def _start(self, on_death: Callable[[str], None]) -> None:
        self._on_death = on_death
        self._poke = _Poke()
        self._thread = WatchedThread("relay-shared-rows", self._work, on_death)
        self._thread.start()

    def _wake(self) -> None:
        if self._poke is not None:
            self._poke.set()

    def close(self) -> None:
        """Memory that somebody has mapped stays readable there. Idempotent."""
        self._closing = True
        self._wake()
        for connection in self._connections.values():
            _close(connection)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for connection in self._connections.values():
            connection.close()
        if self._poke is not None:
            self._poke.close()

    def _work(self) -> None:
        """Until all connections are over, or this is closed."""
        assert self._poke is not None
        with selectors.PollSelector() as selector:
            selector.register(self._poke, selectors.EVENT_READ)
            open_ones = dict(self._connections)
            for rank, connection in open_ones.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while open_ones and not self._closing:
                for key, events in selector.select():
                    if key.fileobj is self._poke:
                        self._poke.clear()
                    elif events & selectors.EVENT_READ and not self._hear(key.data):
                        selector.unregister(open_ones.pop(key.data))
                writable = 0 if self._say_all() else selectors.EVENT_WRITE
                for rank, connection in open_ones.items():
                    selector.modify(connection, selectors.EVENT_READ | writable, rank)

    @abc.abstractmethod
    def _hear(self, rank: int) -> bool:
        """Take the message that has come from that rank; whether more may come."""

    @abc.abstractmethod
    def _say_all(self) -> bool:
        """False if what is left has to wait until a connection can take it."""


# ---- the rank that receives


class Lender(_Side):
    """`take` and `lend` are for one thread, and never wait."""

    def __init__(self, borrowers: Mapping[int, socket.socket], limit: int) -> None:
        """`borrowers`: connections, by rank. At most `limit` bytes that nobody uses are kept."""
        super().__init__(borrowers)
        self._memory = ReusedMemory(limit, self._make, _PIECE)
        self._names: dict[int, int] = {}
        """Of memory, by where it is here."""
        self._new_names = itertools.count()
        self._lent: dict[int, tuple[ReceivedRows, set[int]]] = {}
        """Rows that other ranks may read, and which ranks, by number."""
        self._unsaid: deque[tuple[Message, int]] = deque()
        self._on_return: Callable[[], None] = lambda: None

    def start(self, on_return: Callable[[], None], on_death: Callable[[str], None]) -> None:
        """`on_return` is called when rows were given back, `on_death` with what went wrong; in a thread of this."""
        self._on_return = on_return
        self._start(on_death)

    def close(self) -> None:
        super().close()
        while self._unsaid:
            self._close_descriptor(self._unsaid.popleft()[1])
        self._connections.clear()
        self._lent.clear()
        self._memory.clear()

    @property
    def borrowers(self) -> int:
        return len(self._connections)

    @property
    def lent(self) -> int:
        """Requests whose rows some rank has not given back."""
        return len(self._lent)

    def take(self, length: int) -> torch.Tensor:
        """Memory for one request, of any content. Raises MemoryError."""
        return self._memory.take(length)

    def lend(self, number: int, rows: ReceivedRows) -> None:
        """Every borrower may read these, which lie in what `take` gave. Nobody writes to them any more."""
        memory = self._names[rows.fill_ids.data_ptr()]
        self._lent[number] = rows, set(self._connections)
        self._say(RowsLent(number, memory, rows.aux.values()))

    def _make(self, length: int) -> _Bytes:
        try:
            descriptor = sealed_memory(length)
            memory = _map(descriptor)
        except (OSError, RuntimeError) as error:
            raise MemoryError(f"{length} bytes of memory for the ranks of this host cannot be had: {error}") from error
        address, name = memory.ctypes.data, next(self._new_names)
        populate(address, length)
        self._names[address] = name
        weakref.finalize(memory, self._forget, address, name).atexit = False
        self._say(MemoryMade(name), descriptor)
        return memory

    def _forget(self, address: int, name: int) -> None:
        """In a finalizer, just before the memory is unmapped."""
        del self._names[address]
        self._say(MemoryGone(name))

    def _say(self, message: Message, descriptor: int = -1) -> None:
        self._unsaid.append((message, descriptor))
        self._wake()

    # ---- its own thread

    def _hear(self, rank: int) -> bool:
        message, _ = _receive(self._connections[rank])
        if isinstance(message, RowsReturned):
            for number in message.numbers:
                self._returned(number, rank)
            self._on_return()
            return True
        for number in list(self._lent):
            self._returned(number, rank)
        if message is None and not self._closing:
            self._on_death(f"rank {rank}, which takes its rows from this one, is gone")
        return False

    def _returned(self, number: int, rank: int) -> None:
        _, ranks = self._lent[number]
        ranks.discard(rank)
        if not ranks:
            del self._lent[number]

    def _say_all(self) -> bool:
        """Waits here for a rank that does not listen: no rank can go on without it anyway."""
        while self._unsaid and not self._closing:
            message, descriptor = self._unsaid.popleft()
            said = [msgspec.json.encode(message)]
            for connection in self._connections.values():
                with contextlib.suppress(ConnectionError):  # it is gone, which `_hear` finds
                    socket.send_fds(connection, said, [] if descriptor < 0 else [descriptor])
            self._close_descriptor(descriptor)
        return True

    @staticmethod
    def _close_descriptor(descriptor: int) -> None:
        if descriptor >= 0:
            os.close(descriptor)


# ---- a rank that does not


class Borrower(_Side):
    """Hears of rows that another rank has received, and gives them back when nobody here refers to them any more."""

    def __init__(self, connection: socket.socket, layout: BufferLayout, device: torch.device) -> None:
        """`device`: where the model of this rank runs."""
        super().__init__({0: connection})
        self._connection = connection
        self._layout = layout
        self._is_copied = device.type == "cuda"
        self._memories: dict[int, _Bytes] = {}
        self._to_return: deque[int] = deque()
        self._give: GiveRows = lambda _number, _rows: None

    def start(self, give: GiveRows, on_death: Callable[[str], None]) -> None:
        """Both are called in a thread of this: `give` once for each request that is complete."""
        self._give = give
        self._start(on_death)

    def close(self) -> None:
        super().close()
        self._memories.clear()

    # ---- its own thread

    def _hear(self, rank: int) -> bool:
        message, descriptors = _receive(self._connection)
        try:
            match message:
                case MemoryMade(name):
                    self._memories[name] = _map_read_only(descriptors[0])
                case MemoryGone(name):
                    del self._memories[name]
                case RowsLent():
                    self._give(message.number, self._rows(message))
                case None if not self._closing:
                    self._on_death("the rank of this host that receives the rows is gone")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return message is not None and not isinstance(message, Closing)

    def _rows(self, lent: RowsLent) -> ReceivedRows:
        aux = Aux.of(lent.aux)
        used = self._memories[lent.memory][: bytes_for(aux.total, self._layout)]
        weakref.finalize(used, self._unused, lent.number).atexit = False
        rows = rows_in(torch.from_numpy(used), aux, self._layout)
        # A device may still read memory that nothing refers to any more. Torch minds that with its own memory only.
        return page_locked(rows, self._layout) if self._is_copied else rows

    def _unused(self, number: int) -> None:
        """In a finalizer, in any thread."""
        self._to_return.append(number)
        self._wake()

    def _say_all(self) -> bool:
        """Never waits here: the lender may be waiting for us to listen."""
        while self._to_return:
            numbers = [self._to_return.popleft() for _ in range(min(len(self._to_return), _MOST_NUMBERS))]
            try:
                self._connection.send(msgspec.json.encode(RowsReturned(numbers)), socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._to_return.extendleft(reversed(numbers))
                return False
            except ConnectionError:
                return True  # nobody counts any more
        return True


def _map(descriptor: int) -> _Bytes:
    """All of it, until nobody refers to it any more."""
    # Not by Python's mmap, which would keep a descriptor of its own for each.
    length = os.fstat(descriptor).st_size
    memory = torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=length, dtype=torch.uint8)
    return memory.numpy()  # type: ignore[no-any-return]


def _map_read_only(descriptor: int) -> _Bytes:
    """Writing there would end this process: no model may change what others read."""
    memory = _map(descriptor)
    populate(memory.ctypes.data, memory.nbytes, read_only=True)
    # Only now: torch has no tensors that are read-only, and would not map it so.
    if _protect(memory.ctypes.data, memory.nbytes, _READ_ONLY) != 0:
        raise OSError("received rows cannot be protected from being written to")
    return memory
