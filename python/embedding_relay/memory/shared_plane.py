"""The data plane between ranks of one host: writers copy into the memory of readers. All others use Mooncake.

Nothing is ever on its way here. A write is over when the copy is, in the thread that does it, so there is no write that
has failed and may still land; and a writer that is stopped in the middle of a copy acknowledges nothing. What is left
is to know that a process that answers no more has ended: its connection to the segment says so.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from embedding_relay.memory.copying import CopyThreads
from embedding_relay.memory.plane import DataPlane, Entry, Link, Region, Unreachable, private_memory
from embedding_relay.memory.shared_segment import MappedSegment, NotShared, Segment, attach, check_user
from embedding_relay.protocol.errors import SettingError

logger = logging.getLogger(__name__)

_ONLY: Final = "SGLANG_EMBEDDING_DATA_PLANE=shared_memory allows nothing else"
# A pause before the next piece, in which the thread that is told of this one can run. Without it Linux may leave that
# thread on the core of the copy although another is idle, and the reader hears of the piece milliseconds later.
_LET_IN: Final = 30e-6
# Which plane a session uses is said once. Sessions come and go, and strangers invent some.
_MOST_SAID: Final = 1000


class SharedMemoryDataPlane:
    """What `plane.DataPlane` promises, for each peer by the faster plane that the two have in common."""

    def __init__(self, other: DataPlane | None, writer: str = "") -> None:
        """`other`: for peers whose memory cannot be shared; without it nothing is moved to or from them.

        `writer`: the name of this process, if it is one that writes to others; whoever has none is written to.
        """
        self._other = other
        self._writer = writer
        self.on_death: Callable[[str], None] = logger.error
        self._segment = None if writer else Segment()
        self._mapped: set[SharedMemoryLink] = set()
        self.threads = CopyThreads()
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def allocate(self, length: int) -> mmap.mmap:
        if self._segment is not None:
            try:
                check_user()
                return self._segment.allocate(length)
            except (OSError, NotShared) as error:
                self._do_without(f"{length} bytes of memory cannot be shared with encode ranks of this host: {error}")
        return self._other.allocate(length) if self._other else private_memory(length)

    def start(self, regions: Sequence[Region]) -> None:
        if self._other is not None:
            self._other.start(regions)
        if self._segment is not None:
            try:
                self._segment.open(self.session_id, lambda reason: self.on_death(reason))
            except OSError as error:
                self._do_without(f"our memory cannot be handed to encode ranks of this host: {error}")

    def _do_without(self, why: str) -> None:
        if self._other is None:
            raise SettingError(f"{why}; {_ONLY}")
        logger.warning("relay: %s. All rows come over Mooncake", why)
        if self._segment is not None:
            self._segment.close()
        self._segment = None

    @property
    def session_id(self) -> str:
        if self._other is not None:
            return self._other.session_id
        return f"shared-memory-{self.memory_name}"

    @property
    def memory_name(self) -> str:
        return self._segment.name if self._segment else ""

    @property
    def mapped(self) -> int:
        with self._lock:
            return self._segment.writers if self._segment else len(self._mapped)

    @property
    def renewals(self) -> int:
        return self._other.renewals if self._other else 0

    @property
    def reads_any_memory(self) -> bool:
        return self._other is None or self._other.reads_any_memory

    def has_read_everything(self, writer: str) -> bool:
        if self._segment is not None and self._segment.may_be_written_by(writer):
            return False
        return self._other is None or self._other.has_read_everything(writer)

    def close(self) -> None:
        for link in list(self._mapped):
            link.close()
        self.threads.close()
        if self._segment is not None:
            self._segment.close()
        if self._other is not None:
            self._other.close()

    # ---- links

    def link(self, session_id: str, memory_name: str = "") -> Link:
        return PairLink(self, session_id, memory_name)

    def choose(self, session_id: str, memory_name: str) -> Link:
        """The faster link that there can be. Raises Unreachable if there is none, or nobody knows yet."""
        try:
            if not memory_name:
                raise NotShared("it shares no memory")
            link = SharedMemoryLink(self, attach(memory_name, session_id, self._writer))
        except NotShared as reason:
            if self._other is None:
                raise Unreachable(f"rows for {session_id} cannot be written: {reason}; {_ONLY}") from reason
            self._say_once(f"relay: rows for {session_id} go over Mooncake: {reason}")
            return self._other.link(session_id)
        with self._lock:
            self._mapped.add(link)
        self._say_once(f"relay: rows for {session_id} go through shared memory")
        return link

    def _say_once(self, text: str) -> None:
        with self._lock:
            if text in self._said or len(self._said) >= _MOST_SAID:
                return
            self._said.add(text)
        logger.info(text)

    def forget(self, link: SharedMemoryLink) -> None:
        with self._lock:
            self._mapped.discard(link)


class PairLink:
    """To one peer, by the plane that the first write finds out to be possible. One thread calls every method."""

    def __init__(self, plane: SharedMemoryDataPlane, session_id: str, memory_name: str) -> None:
        self._plane = plane
        self._session_id = session_id
        self._memory_name = memory_name
        self._link: Link | None = None

    def write(self, entries: Sequence[Entry]) -> None:
        for _ in self.write_in_turn([entries]):
            pass

    def write_in_turn(self, pieces: Iterable[Sequence[Entry]]) -> Iterator[None]:
        if self._link is None:
            self._link = self._plane.choose(self._session_id, self._memory_name)
        try:
            yield from self._link.write_in_turn(pieces)
        except Unreachable:
            if isinstance(self._link, SharedMemoryLink):  # the next write finds out what there is now
                self._link.close()
                self._link = None
            raise

    def renew(self) -> None:
        if self._link is not None:
            self._link.renew()

    def is_quiet(self) -> bool:
        return self._link is None or self._link.is_quiet()

    def close(self) -> None:
        if self._link is not None:
            self._link.close()


class SharedMemoryLink(Link):
    """Writes to a peer's memory by copying."""

    def __init__(self, plane: SharedMemoryDataPlane, segment: MappedSegment) -> None:
        self._plane = plane
        self._segment = segment

    def write(self, entries: Sequence[Entry]) -> None:
        self._segment.write(entries, self._plane.threads)

    def write_in_turn(self, pieces: Iterable[Sequence[Entry]]) -> Iterator[None]:
        for number, entries in enumerate(pieces):
            if number:
                time.sleep(_LET_IN)
            self.write(entries)
            yield

    def renew(self) -> None:
        """There is nothing that could be on its way."""

    def is_quiet(self) -> bool:
        return True

    def close(self) -> None:
        self._segment.close()
        self._plane.forget(self)
