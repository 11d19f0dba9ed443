"""The data plane of the tests moves real bytes, and fails as the real one was seen to fail."""

import ctypes

import pytest

from embedding_relay.memory.plane import DataPlane, Entry, Region, TransferError
from embedding_relay.protocol.errors import LocalError
from embedding_relay.protocol.plan import BATCH_LIMIT
from embedding_relay.testing.plane import Clock, Fault, MemoryDataPlane, MemoryFabric


class Side:
    def __init__(self, fabric: MemoryFabric, name: str, content: bytes) -> None:
        self.memory = bytearray(content)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.plane: DataPlane = MemoryDataPlane(fabric, name)
        self.plane.start([Region(self.address, len(self.memory))])


@pytest.fixture
def fabric() -> MemoryFabric:
    return MemoryFabric()


@pytest.fixture
def sides(fabric: MemoryFabric) -> tuple[Side, Side]:
    return Side(fabric, "a:1", b"0123456789"), Side(fabric, "b:1", b"..........")


def entries(a: Side, b: Side) -> list[Entry]:
    return [Entry(a.address + 1, b.address + 5, 3), Entry(a.address + 8, b.address, 2)]


def test_bytes_move(sides: tuple[Side, Side]) -> None:
    a, b = sides
    link = a.plane.link("b:1")
    link.write(entries(a, b))
    assert bytes(b.memory) == b"89...123.."
    assert link.is_quiet()


def test_nothing_outside_the_registered_memory_is_touched(sides: tuple[Side, Side]) -> None:
    a, b = sides
    before = bytes(b.memory)
    for bad in (Entry(a.address, b.address + 9, 2), Entry(a.address, b.address - 1, 1)):
        with pytest.raises(TransferError, match="b:1 has not registered"):
            a.plane.link("b:1").write([bad])
    for bad in (Entry(a.address - 1, b.address, 1), Entry(a.address, b.address, 11)):
        with pytest.raises(LocalError, match="not in the registered memory"):
            a.plane.link("b:1").write([bad])
    assert bytes(b.memory) == before


def test_too_many_entries_are_refused(sides: tuple[Side, Side]) -> None:
    a, b = sides
    with pytest.raises(TransferError, match="more than the 512"):
        a.plane.link("b:1").write(entries(a, b)[:1] * (BATCH_LIMIT + 1))


@pytest.mark.parametrize(
    ("fault", "seen", "in_the_end"),
    [
        (Fault.NOTHING_LANDS, b"..........", b".........."),
        (Fault.HALF_LANDS, b".....123..", b".....123.."),
        (Fault.LANDS_LATE, b"..........", b"89...123.."),
    ],
)
def test_faults(fabric: MemoryFabric, sides: tuple[Side, Side], fault: Fault, seen: bytes, in_the_end: bytes) -> None:
    a, b = sides
    link = a.plane.link("b:1")
    fabric.fail_next("b:1", fault)
    with pytest.raises(TransferError, match=fault.name):
        link.write(entries(a, b))
    link.renew()
    assert bytes(b.memory) == seen
    assert link.is_quiet() is (fault is not Fault.LANDS_LATE)
    a.memory[:] = b"xxxxxxxxxx"
    fabric.land_late()
    assert bytes(b.memory) == in_the_end
    assert link.is_quiet()
    link.write([])
    link.close()


def test_a_dead_session_gets_nothing(fabric: MemoryFabric, sides: tuple[Side, Side]) -> None:
    a, b = sides
    fabric.fail_next("b:1", Fault.LANDS_LATE)
    with pytest.raises(TransferError):
        a.plane.link("b:1").write(entries(a, b))
    b.plane.close()
    assert fabric.land_late() == 0
    with pytest.raises(TransferError, match="no session b:1"):
        a.plane.link("b:1").write(entries(a, b))


def test_the_clock_never_goes_back() -> None:
    clock = Clock(5.0)
    clock.advance_to(7.0)
    clock.advance_to(6.0)
    assert clock() == clock.now == 7.0
