"""Which plane a pair of ranks uses: shared memory where the two can have it, the other one else, and what is said."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

from embedding_relay.memory import shared_plane
from embedding_relay.memory.plane import Entry, Region, TransferError, Unreachable, private_memory
from embedding_relay.memory.shared_plane import SharedMemoryDataPlane
from embedding_relay.memory.shared_segment import NotShared, Segment
from embedding_relay.protocol.errors import SettingError
from support.segment_processes import address_of

SIZE = 1 << 16
Planes = Callable[..., SharedMemoryDataPlane]


class Other:
    """In the place of Mooncake: notes what it is told, and moves nothing."""

    session_id, renewals, memory_name, mapped = "127.0.0.1:1", 5, "", 0

    def __init__(self) -> None:
        self.on_death = print
        self.reads_any_memory = True
        self.told: list[Any] = []
        self.has_read, self.quiet = True, True
        self.problem: Exception | None = None

    def allocate(self, length: int) -> mmap.mmap:
        self.told.append(("allocate", length))
        return private_memory(length)

    def start(self, regions: Sequence[Region]) -> None:
        self.told.append(("start", len(regions)))

    def link(self, session_id: str, memory_name: str = "") -> Any:
        self.told.append(("link", session_id))
        return self

    def write_in_turn(self, pieces: Iterable[Sequence[Entry]]) -> Iterator[None]:
        for entries in pieces:
            self.told.append(("write", len(entries)))
            if self.problem is not None:
                raise self.problem
            yield

    def renew(self) -> None:
        self.told.append("renew")

    def is_quiet(self) -> bool:
        return self.quiet

    def has_read_everything(self, writer: str) -> bool:
        return self.has_read

    def close(self) -> None:
        self.told.append("close")


@pytest.fixture
def planes() -> Iterator[Planes]:
    """Planes that are closed when the test has ended."""
    made: list[SharedMemoryDataPlane] = []

    def make(other: Any = None, writer: str = "") -> SharedMemoryDataPlane:
        made.append(SharedMemoryDataPlane(other, writer))
        return made[-1]

    yield make
    for plane in made:
        plane.close()


class Pair:
    """A language rank's plane that has started, an encode rank's, and rows for the first at the second."""

    def __init__(self, planes: Planes, reads_other: Any = None, writes_other: Any = None) -> None:
        self.reader, self.writer = planes(reads_other), planes(writes_other, "a1")
        self.memory = self.reader.allocate(SIZE)
        self.reader.start([Region(address_of(self.memory), SIZE)])
        self.source = self.writer.allocate(SIZE)
        self.source[:] = b"\1" * SIZE
        self.writer.start([Region(address_of(self.source), SIZE)])
        self.rows = [Entry(address_of(self.source), address_of(self.memory), SIZE)]

    def link(self) -> Any:
        return self.writer.link(self.reader.session_id, self.reader.memory_name)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.INFO and "rows" in record.message]


# ---- a pair that can share memory


def test_rows_are_copied_into_the_peers_memory(planes: Planes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pair = Pair(planes, Other(), Other())
    for _ in range(2):
        pair.memory[:] = bytes(SIZE)
        with closing(pair.link()) as link:
            link.write(pair.rows)
            assert pair.memory[:] == b"\1" * SIZE
            assert (pair.writer.mapped, pair.reader.mapped) == (1, 1)
            assert link.is_quiet()
            link.renew()
            assert pair.writer.renewals == 5, "those of the other plane, of which this is none"
        assert pair.writer.mapped == 0
    assert said(caplog) == ["relay: rows for 127.0.0.1:1 go through shared memory"], "once"


def test_a_pair_that_must_share_needs_no_other_plane(planes: Planes) -> None:
    pair = Pair(planes)
    assert pair.reader.session_id == f"shared-memory-{pair.reader.memory_name}"
    assert pair.reader.renewals == 0
    with closing(pair.link()) as link:
        link.write(pair.rows)
        assert pair.memory[:] == b"\1" * SIZE


def test_a_link_that_has_written_nothing_is_quiet_and_closes(planes: Planes) -> None:
    link = Pair(planes).link()
    link.renew()
    assert link.is_quiet()
    link.close()


def test_an_address_outside_of_the_memory_fails_and_nothing_is_owed(planes: Planes) -> None:
    pair = Pair(planes)
    with closing(pair.link()) as link:
        with pytest.raises(Unreachable, match="not in the memory that the peer shares"):
            link.write([pair.rows[0]._replace(length=SIZE + 1)])
        assert link.is_quiet()
        link.write(pair.rows)


def test_a_plane_that_closes_closes_its_links(planes: Planes) -> None:
    pair = Pair(planes)
    pair.link().write(pair.rows)
    pair.writer.close()
    assert pair.writer.mapped == 0


# ---- a pair that cannot


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "it shares no memory"),
        ("0" * 32, "it is on another host, or in another network namespace of this one"),
    ],
)
def test_rows_go_another_way_where_memory_cannot_be_shared(
    name: str, reason: str, planes: Planes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    other = Other()
    pair = Pair(planes, Other(), other)
    for _ in range(2):
        link = pair.writer.link("10.0.0.2:15001", name)
        link.write(pair.rows)
        other.quiet = False
        assert not link.is_quiet()
        link.renew()
        link.close()
    assert other.told.count(("write", 1)) == other.told.count("renew") == other.told.count("close") == 2
    assert said(caplog) == [f"relay: rows for 10.0.0.2:15001 go over Mooncake: {reason}"]
    with pytest.raises(Unreachable, match=f"rows for x cannot be written: {reason}; .*=shared_memory allows"):
        planes(None, "a2").link("x", name).write(pair.rows)


def test_nobody_has_rows_written_to_another_rank(planes: Planes, caplog: pytest.LogCaptureFixture) -> None:
    """A stranger may register with any name and any addresses that it has heard of."""
    caplog.set_level(logging.INFO)
    pair = Pair(planes, Other(), other := Other())
    with closing(pair.writer.link("10.0.0.9:1", pair.reader.memory_name)) as link:
        link.write(pair.rows)
    assert not any(pair.memory[:])
    assert ("link", "10.0.0.9:1") in other.told
    assert said(caplog) == ["relay: rows for 10.0.0.9:1 go over Mooncake: it belongs to another rank"]


def test_what_is_said_has_an_end(planes: Planes, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shared_plane, "_MOST_SAID", 3)
    plane = planes(Other(), "a1")
    for number in range(9):
        plane.link(f"10.0.0.2:{number}").write([])
    assert len(said(caplog)) == len(plane._said) == 3


def test_an_owner_that_does_not_answer_is_asked_again(planes: Planes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows do not take the slower way for good because it was stopped for a moment."""
    pair, attach = Pair(planes, Other(), other := Other()), shared_plane.attach

    def silent(*_: str) -> Any:
        raise Unreachable("no answer")

    monkeypatch.setattr(shared_plane, "attach", silent)
    with closing(pair.link()) as link:
        with pytest.raises(Unreachable, match="no answer"):
            link.write(pair.rows)
        monkeypatch.setattr(shared_plane, "attach", attach)
        link.write(pair.rows)
        assert pair.memory[:] == b"\1" * SIZE
    assert ("link", "127.0.0.1:1") not in other.told


def test_when_the_owner_is_gone_the_next_write_looks_what_there_is(planes: Planes) -> None:
    pair = Pair(planes, Other(), other := Other())
    with closing(pair.link()) as link:
        link.write(pair.rows)
        pair.reader.close()
        with pytest.raises(Unreachable, match="has gone"):
            link.write(pair.rows)
        assert pair.writer.mapped == 0
        other.problem = Unreachable("nor does Mooncake")
        with pytest.raises(Unreachable, match="nor does Mooncake"):
            link.write(pair.rows)
        other.problem = TransferError("it may still land")
        with pytest.raises(TransferError, match="may still land"):
            link.write(pair.rows)
        assert other.told.count(("link", "127.0.0.1:1")) == 1, "it may owe a proof, and is kept"


# ---- memory that cannot be had


def no_memory(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def no_user() -> None:
    raise NotShared("anybody may be anybody")


@pytest.mark.parametrize(
    ("where", "what", "problem", "reason"),
    [
        (Segment, "allocate", no_memory, "65536 bytes of memory cannot be shared .*No space left"),
        (shared_plane, "check_user", no_user, "cannot be shared with encode ranks of this host: anybody may be"),
        (Segment, "open", no_memory, "our memory cannot be handed to encode ranks of this host: .*No space left"),
    ],
)
def test_without_such_memory_a_rank_starts_as_it_did_before_or_not_at_all(
    where: Any,
    what: str,
    problem: Callable[..., Any],
    reason: str,
    planes: Planes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(where, what, problem)
    plane = planes(other := Other())
    segment = plane._segment
    assert segment is not None
    memory = plane.allocate(SIZE)
    plane.start([Region(address_of(memory), SIZE)])
    assert (plane.memory_name, plane.mapped) == ("", 0)
    assert segment._fd < 0, "it is closed"
    assert plane.session_id == "127.0.0.1:1"
    assert ("start", 1) in other.told
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    ctypes.memset(address_of(memory), 1, SIZE)
    plane.close()
    assert other.told[-1] == "close"
    with pytest.raises(SettingError, match=rf"{reason}.*SGLANG_EMBEDDING_DATA_PLANE=shared_memory allows nothing else"):
        Pair(planes)


def test_memory_that_the_other_plane_cannot_read_is_not_read_in_place(planes: Planes) -> None:
    """A chunk may go to several peers, in different ways, and its rows lie in one place."""
    other = Other()
    assert planes(None, "a1").reads_any_memory
    assert planes(other, "a1").reads_any_memory
    other.reads_any_memory = False
    assert not planes(other, "a1").reads_any_memory


# ---- is a writer gone?


def test_a_writer_is_gone_when_it_has_the_memory_no_more_and_the_other_plane_agrees(planes: Planes) -> None:
    pair = Pair(planes, other := Other(), Other())
    link = pair.link()
    link.write(pair.rows)
    assert not pair.reader.has_read_everything("a1")
    assert pair.reader.has_read_everything("a2")
    link.close()
    assert pair.reader.has_read_everything("a1")
    other.has_read = False
    assert not pair.reader.has_read_everything("a1")


def test_without_another_plane_the_memory_alone_decides(planes: Planes) -> None:
    pair = Pair(planes)
    with closing(pair.link()) as link:
        link.write(pair.rows)
        assert not pair.reader.has_read_everything("a1")
    assert pair.reader.has_read_everything("a1")
    assert pair.writer.has_read_everything("a1"), "nobody writes to an encode rank"
