"""Memory that is handed from one process to another: who gets it, what is not taken, and what its end proves."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import logging
import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedding_relay.memory import shared_segment
from embedding_relay.memory.copying import CopyThreads
from embedding_relay.memory.plane import Entry, Unreachable
from embedding_relay.memory.shared_segment import NotShared, Segment, attach, check_user
from embedding_relay.protocol.errors import LocalError
from support.segment_processes import (
    SIZE,
    address_of,
    ask_as_another_user,
    ask_from_another_network,
    own,
    process,
    write_for_ever,
)
from support.signals import send_signal

ALONE = CopyThreads(1)

Owned = tuple[Segment, mmap.mmap]


@pytest.fixture
def owned() -> Iterator[Owned]:
    segment = Segment()
    memory = segment.allocate(SIZE)
    segment.open("s1", print)
    yield segment, memory
    segment.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def ones() -> Iterator[int]:
    """The address of a megabyte of ones."""
    memory = mmap.mmap(-1, SIZE)
    memory[:] = b"\1" * SIZE
    yield address_of(memory)
    del memory


# ---- one process writes to the memory of another


def test_what_is_written_is_there(owned: Owned, ones: int) -> None:
    segment, memory = owned
    base = address_of(memory)
    mapped = attach(segment.name, "s1", "a1")
    mapped.write([Entry(ones, base + 10, 5), Entry(ones, base + SIZE - 7, 7)], ALONE)
    assert memory[:].count(1) == 12
    assert (memory[10:15], memory[-7:]) == (b"\1" * 5, b"\1" * 7)
    mapped.write([Entry(ones, base, SIZE)], ALONE)
    assert memory[:] == b"\1" * SIZE, "a large one, which is copied without the interpreter's lock"
    mapped.close()
    mapped.close()


@pytest.mark.parametrize("where", [-1, SIZE - 7, SIZE, -(1 << 40), 1 << 63])
def test_nothing_is_written_outside_of_the_memory(owned: Owned, ones: int, where: int) -> None:
    """A registration names any addresses that it likes."""
    segment, memory = owned
    mapped = attach(segment.name, "s1", "a1")
    with pytest.raises(Unreachable, match=r"8 bytes at .* are not in the memory that the peer shares"):
        mapped.write([Entry(ones, address_of(memory), 8), Entry(ones, address_of(memory) + where, 8)], ALONE)
    assert not any(memory[:]), "not even what comes before it"
    mapped.close()


def test_the_memory_is_all_there_before_anybody_writes(owned: Owned) -> None:
    segment, _ = owned
    assert os.fstat(segment._fd).st_blocks * 512 >= SIZE
    for change in (SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(segment._fd, change)


def test_memory_that_is_lacking_is_an_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Segment().allocate(SIZE)
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_is_handed_out_when_there_is_some() -> None:
    with pytest.raises(LocalError, match="allocated before"):
        Segment().open("s1", print)


def test_a_name_that_is_taken_leaves_nothing_open(owned: Owned) -> None:
    other = Segment()
    other.allocate(SIZE)
    other.name = owned[0].name
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="in use"):
        other.open("s1", print)
    assert len(os.listdir("/proc/self/fd")) == before
    other.close()


def test_nothing_of_it_is_in_a_file_system(owned: Owned) -> None:
    segment, _ = owned
    assert os.readlink(f"/proc/self/fd/{segment._fd}").startswith("/memfd:")
    assert not [path for path in Path("/dev/shm").iterdir() if segment.name in path.name]


def test_closing_gives_everything_back() -> None:
    before = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    segment = Segment()
    memory = segment.allocate(SIZE)
    segment.open("s1", print)
    mapped = attach(segment.name, "s1", "a1")
    segment.close()
    segment.close()
    assert segment.writers == 0
    mapped.close()
    del memory
    assert (len(os.listdir("/proc/self/fd")), set(threading.enumerate())) == before


# ---- who may have it


def test_another_user_does_not_get_it(owned: Owned, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, _ = owned
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(NotShared, match="another user has it"):
        attach(segment.name, "s1", "a1")
    until(lambda: not segment._writers)
    assert segment.writers == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_process_of_another_user_is_turned_away_by_the_owner(owned: Owned) -> None:
    """Whoever does not ask whose memory it is gets none of it either."""
    with process(ask_as_another_user, owned[0].name) as (_, answer):
        assert answer == "its process does not hand it out to this one"
    assert owned[0].writers == 0


@pytest.mark.parametrize(
    ("number", "overflow", "uid_map", "may_share"),
    [
        (1000, 65534, "0 1000 1", True),
        (65534, 65534, "0 0 4294967295", True),
        (65534, 65534, "65534 1000 1", False),
    ],
)
def test_where_foreign_users_have_our_number_nothing_is_shared(
    number: int, overflow: int, uid_map: str, may_share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"/proc/sys/kernel/overflowuid": f"{overflow}\n", "/proc/self/uid_map": f"  {uid_map}\n"}

    monkeypatch.setattr(os, "geteuid", lambda: number)
    monkeypatch.setattr(shared_segment, "open", lambda path: io.StringIO(files[path]), raising=False)
    if may_share:
        check_user()
    else:
        with pytest.raises(NotShared, match="user 65534 may be anybody"):
            check_user()


def test_a_name_that_nobody_has_is_of_another_host() -> None:
    with pytest.raises(NotShared, match="on another host, or in another network namespace"):
        attach("0" * 32, "s1", "a1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a network namespace")
def test_two_network_namespaces_are_two_hosts(owned: Owned) -> None:
    """As containers of one host are that share no network: whoever has the name does not find the memory."""
    with process(ask_from_another_network, owned[0].name) as (_, answer):
        assert answer == "it is on another host, or in another network namespace of this one"


@pytest.mark.parametrize("said", [b"", b"no name\n", b"\xff" * 8])
def test_who_does_not_say_its_name_gets_nothing(owned: Owned, said: bytes) -> None:
    segment, _ = owned
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.connect(shared_segment.socket_name(segment.name))
    if said:
        stranger.send(said)
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):  # as which its end may come
            assert socket.recv_fds(stranger, 64, 4)[:2] == (b"", [])
    assert segment.writers == 0
    stranger.close()
    until(lambda: not segment._writers)


def test_there_is_a_limit_to_connections(owned: Owned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_segment, "_MOST_CONNECTIONS", 1)
    mapped = attach(owned[0].name, "s1", "a1")
    with pytest.raises(NotShared, match="does not hand it out"):
        attach(owned[0].name, "s1", "a2")
    mapped.close()


def test_it_goes_on_when_no_descriptor_is_left_for_a_connection(
    owned: Owned, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    segment, _ = owned
    monkeypatch.setattr(shared_segment, "_AGAIN_AFTER", 0.01)
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def accept_or_fail(listener: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_or_fail)
    with caplog.at_level(logging.WARNING):
        attach(segment.name, "s1", "a1").close()
    assert "Too many open files" in caplog.text


# ---- what is not mapped


class Impostor:
    """Listens under a name of its own, and answers as it is told."""

    def __init__(self, message: bytes, *descriptors: int) -> None:
        self.name = os.urandom(16).hex()
        self._answer = message, descriptors
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(shared_segment.socket_name(self.name))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(64)
            message, descriptors = self._answer
            if message:
                socket.send_fds(connection, [message], descriptors)

    def close(self) -> None:
        self._thread.join()
        self._listener.close()


BASE = struct.pack("<Q", 4096) + b"s1"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def memfd(*, length: int = SIZE, is_there: bool = True, seals: int = SEALS) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    if is_there:
        os.posix_fallocate(descriptor, 0, length)
    else:
        os.ftruncate(descriptor, length)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def read_only() -> int:
    whole = memfd()
    descriptor = os.open(f"/proc/self/fd/{whole}", os.O_RDONLY)
    os.close(whole)
    return descriptor


def a_file() -> int:
    return os.open("/etc/passwd", os.O_RDONLY)


@pytest.mark.parametrize(
    ("message", "make", "reason"),
    [
        (b"", memfd, "does not hand it out"),
        (b"short", memfd, "does not hand it out"),
        (BASE + b"0", memfd, "it belongs to another rank"),
        (BASE[:8], memfd, "it belongs to another rank"),
        (BASE, None, "does not hand it out"),
        (BASE, lambda: memfd(seals=fcntl.F_SEAL_GROW), "could be taken away under us"),
        (BASE, lambda: memfd(seals=fcntl.F_SEAL_SHRINK), "could be taken away under us"),
        (BASE, lambda: memfd(is_there=False), "not all of it is there"),
        (BASE, lambda: memfd(is_there=False, length=0), "not all of it is there"),
        (BASE, read_only, "cannot be mapped"),
        (BASE, a_file, "cannot be mapped"),
    ],
)
def test_what_would_end_us_or_is_no_memory_is_not_mapped(
    message: bytes, make: Callable[[], int] | None, reason: str
) -> None:
    descriptors = [make()] if make else []
    impostor = Impostor(message, *descriptors)
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    with pytest.raises(NotShared, match=reason):
        attach(impostor.name, "s1", "a1")
    impostor.close()
    for descriptor in descriptors:
        os.close(descriptor)


def test_what_is_refused_leaves_nothing_open() -> None:
    given = memfd(is_there=False)
    before = len(os.listdir("/proc/self/fd"))
    impostor = Impostor(BASE, given, given)
    with pytest.raises(NotShared):
        attach(impostor.name, "s1", "a1")
    impostor.close()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(given)


def test_an_owner_that_does_not_answer_is_not_taken_for_one_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be stopped for a moment: which way its rows go is not settled by that."""
    monkeypatch.setattr(shared_segment, "_ANSWER_TIMEOUT", 0.05)
    name = os.urandom(16).hex()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(shared_segment.socket_name(name))
        silent.listen(0)
        for _ in range(3):  # later ones find no place in the queue
            with pytest.raises(Unreachable, match="does not answer"):
                attach(name, "s1", "a1")


# ---- what the end of a connection proves


def test_who_has_it_may_write_until_it_has_given_it_back(owned: Owned, caplog: pytest.LogCaptureFixture) -> None:
    segment, _ = owned
    with caplog.at_level(logging.INFO):
        mapped = attach(segment.name, "s1", "a1")
        until(lambda: "encode rank a1 writes to our memory directly" in caplog.text)
    assert segment.may_be_written_by("a1")
    assert not segment.may_be_written_by("a2")
    assert segment.writers == 1
    mapped.close()
    assert not segment.may_be_written_by("a1"), "at once, whenever the thread gets to it"
    until(lambda: segment.writers == 0)


def test_what_was_given_back_is_mapped_no_more_before_its_owner_hears_of_it(
    owned: Owned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is the proof that nothing can be written there."""
    mapped, seen, close = attach(owned[0].name, "s1", "a1"), [mappings()], socket.socket.close

    def close_and_look(connection: socket.socket) -> None:
        seen.append(mappings())
        close(connection)

    monkeypatch.setattr(socket.socket, "close", close_and_look)
    mapped.close()
    assert seen[0] == 2, "the owner's own, and that of the writer"
    assert seen[1:2] == [1]


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:sglang-embedding-relay")


def test_two_with_one_name_are_both_waited_for(owned: Owned) -> None:
    segment, _ = owned
    first, second = attach(segment.name, "s1", "a1"), attach(segment.name, "s1", "a1")
    first.close()
    assert segment.may_be_written_by("a1")
    second.close()
    assert not segment.may_be_written_by("a1")


def test_whatever_a_writer_says_it_is_not_forgotten(owned: Owned) -> None:
    segment, _ = owned
    mapped = attach(segment.name, "s1", "a1")
    for _ in range(5):
        mapped._connection.send(b"another name")
    until(lambda: not _has_unread(segment))
    assert segment.may_be_written_by("a1")
    assert segment.writers == 1
    mapped.close()
    until(lambda: segment.writers == 0)


def _has_unread(segment: Segment) -> bool:
    [connection] = segment._writers
    try:
        return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def test_a_writer_whose_owner_is_gone_writes_nothing(owned: Owned, ones: int) -> None:
    segment, memory = owned
    mapped = attach(segment.name, "s1", "a1")
    segment.close()
    with pytest.raises(Unreachable, match="has gone"):
        mapped.write([Entry(ones, address_of(memory), 8)], ALONE)
    assert not any(memory[:])
    mapped.close()


def test_a_stopped_writer_may_still_write_and_a_killed_one_cannot(owned: Owned) -> None:
    """S3: a stopped process goes on in the middle of its copy, and nothing but its end is proof."""
    segment, memory = owned
    with process(write_for_ever, segment.name, address_of(memory)) as (writer, _):
        assert writer.pid is not None
        send_signal(writer.pid, signal.SIGSTOP)
        stopped_at = memory[:]
        assert segment.may_be_written_by("a1")
        os.kill(writer.pid, signal.SIGCONT)
        until(lambda: memory[:] != stopped_at)
        assert segment.may_be_written_by("a1")
        os.kill(writer.pid, signal.SIGKILL)
        until(lambda: not segment.may_be_written_by("a1"))
        proven_at = memory[:]
        time.sleep(0.05)
        assert memory[:] == proven_at


def test_memory_outlives_its_owner_for_those_who_have_mapped_it(ones: int) -> None:
    """An encode rank in the middle of a copy is not ended by the end of the language rank."""
    with process(own) as (_, (name, base)):
        mapped = attach(name, "s1", "a1")
        mapped.write([Entry(ones, base, SIZE)], ALONE)
    ctypes.memset(mapped._here, 7, SIZE)
    assert ctypes.string_at(mapped._here, SIZE) == b"\7" * SIZE
    with pytest.raises(Unreachable, match="has gone"):
        mapped.write([Entry(ones, base, SIZE)], ALONE)
    mapped.close()
