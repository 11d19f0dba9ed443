"""For tests: a clock that the test advances, and a data plane that moves real bytes between memories of this process.

What the data plane does not reproduce: time (a write lands at once, or when the test says so), bandwidth, an entry torn
in the middle, entries of one call landing in another order, and a source that is read again after a failed write (what
lands late is what was there when the write began, as with bytes that wait in a socket).
"""

from __future__ import annotations

import ctypes
import enum
import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from embedding_relay.memory.plane import Entry, Link, Region, TransferError, private_memory
from embedding_relay.protocol.errors import LocalError
from embedding_relay.protocol.plan import BATCH_LIMIT


class Clock:
    """Stands still until the test moves it."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance_to(self, at: float) -> None:
        self.now = max(self.now, at)


class Fault(enum.Enum):
    """What becomes of the next write to a session. Each of them raises `TransferError`."""

    NOTHING_LANDS = enum.auto()
    HALF_LANDS = enum.auto()
    LANDS_LATE = enum.auto()
    """Seen with a stopped peer: the call fails, and every byte lands when the peer goes on."""


class _LateWrite(NamedTuple):
    source: str
    destination: str
    entry: Entry
    label: object
    content: bytes


class MemoryFabric:
    """What connects the data planes of one test."""

    def __init__(self) -> None:
        self.planes: dict[str, MemoryDataPlane] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.label: object = None
        """Whatever a test wants handed back when the bytes of a write arrive."""
        self.on_landing: Callable[[object, str, Entry], None] | None = None
        """Called before bytes arrive: (label, session, where). For tests that check what is written where."""
        self._late: list[_LateWrite] = []

    def fail_next(self, session_id: str, fault: Fault) -> None:
        """The next write to this session goes wrong; several wait in line."""
        self.faults.setdefault(session_id, []).append(fault)

    def pop_fault(self, session_id: str) -> Fault | None:
        waiting = self.faults.get(session_id)
        return waiting.pop(0) if waiting else None

    def is_quiet(self, source: str, destination: str) -> bool:
        return not any((late.source, late.destination) == (source, destination) for late in self._late)

    def land_late(self) -> int:
        """Everything that was written late arrives now; return how many entries that were."""
        late, self._late = self._late, []
        for write in late:
            self.land(write.destination, write.entry, write.label, write.content)
        return len(late)

    def kill(self, session_id: str) -> None:
        """The process is gone: nothing of it can land any more, and nothing can land in it."""
        self.planes.pop(session_id, None)
        self.faults.pop(session_id, None)
        self._late = [late for late in self._late if session_id not in (late.source, late.destination)]

    def delay(self, source: str, destination: str, entry: Entry) -> None:
        plane = self.planes.get(destination)
        if plane is None or not plane.holds(entry.destination, entry.length):
            return
        content = ctypes.string_at(entry.source, entry.length)
        self._late.append(_LateWrite(source, destination, entry, self.label, content))

    def land(self, destination: str, entry: Entry, label: object, content: bytes | None = None) -> None:
        plane = self.planes.get(destination)
        if plane is None:
            raise TransferError(f"there is no session {destination}")
        if not plane.holds(entry.destination, entry.length):
            raise TransferError(f"{destination} has not registered {entry.length} bytes at {entry.destination:#x}")
        if self.on_landing:
            self.on_landing(label, destination, entry)
        if content is None:
            ctypes.memmove(entry.destination, entry.source, entry.length)
        else:
            ctypes.memmove(entry.destination, content, entry.length)


class MemoryDataPlane:
    """A `memory.plane.DataPlane`: addresses are real, and nothing outside the registered regions can be touched."""

    def __init__(self, fabric: MemoryFabric, session_id: str) -> None:
        self.fabric = fabric
        self.renewals = 0
        self.on_death: Callable[[str], None] = print
        self.reads_any_memory = False
        self._session_id = session_id
        self._regions: tuple[Region, ...] = ()

    @property
    def session_id(self) -> str:
        return self._session_id

    memory_name = ""
    mapped = 0

    def allocate(self, length: int) -> mmap.mmap:
        return private_memory(length)

    def start(self, regions: Sequence[Region]) -> None:
        self._regions = tuple(regions)
        self.fabric.planes[self._session_id] = self

    def link(self, session_id: str, memory_name: str = "") -> MemoryLink:
        return MemoryLink(self, session_id)

    def has_read_everything(self, writer: str) -> bool:
        return True  # a process that is killed takes along what it has yet to write: see `MemoryFabric.kill`

    def close(self) -> None:
        self.fabric.kill(self._session_id)

    def holds(self, address: int, length: int) -> bool:
        return any(r.pointer <= address and address + length <= r.pointer + r.length for r in self._regions)

    def check(self, address: int, length: int) -> None:
        if not self.holds(address, length):
            raise LocalError(f"{length} bytes at {address:#x} are not in the registered memory of {self._session_id}")


class MemoryLink(Link):
    """A `memory.plane.Link`."""

    def __init__(self, plane: MemoryDataPlane, session_id: str) -> None:
        self._plane = plane
        self._peer = session_id

    def write(self, entries: Sequence[Entry]) -> None:
        if len(entries) > BATCH_LIMIT:
            raise TransferError(f"{len(entries)} entries are more than the {BATCH_LIMIT} that one call may carry")
        fabric, me = self._plane.fabric, self._plane.session_id
        fault = fabric.pop_fault(self._peer)
        landing = entries
        if fault is Fault.NOTHING_LANDS or fault is Fault.LANDS_LATE:
            landing = ()
        elif fault is Fault.HALF_LANDS:
            landing = entries[: len(entries) // 2]
        for entry in entries:
            self._plane.check(entry.source, entry.length)
        for entry in landing:
            fabric.land(self._peer, entry, fabric.label)
        if fault is Fault.LANDS_LATE:
            for entry in entries:
                fabric.delay(me, self._peer, entry)
        if fault is not None:
            raise TransferError(f"the write to {self._peer} failed on purpose: {fault.name}")

    def renew(self) -> None:
        """What is on its way to the peer stays on its way."""
        self._plane.renewals += 1

    def is_quiet(self) -> bool:
        return self._plane.fabric.is_quiet(self._plane.session_id, self._peer)

    def close(self) -> None:
        """There is nothing to close."""
