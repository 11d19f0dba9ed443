"""The data plane as an interface: memory that peers may write to, links that write to theirs, and what both promise."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from embedding_relay.protocol.errors import RelayError

WRITE_TIMEOUT: Final = 30.0
LEAST_WRITE_TIMEOUT: Final = 5.0
"""Seconds for which nothing of a write may be confirmed: Mooncake's own default, and the least that it takes."""


class TransferError(RelayError):
    """A write was not confirmed. It may still land, whole or in part: see `Link.renew` and `Link.is_quiet`."""


class Unreachable(TransferError):
    """Nothing was written, nor will be: the peer's engine does not answer. To try again at once is of no use."""


class Region(NamedTuple):
    """Memory of ours that the engine may read from or write to."""

    pointer: int
    length: int


class Entry(NamedTuple):
    """One contiguous copy: from an address here to an address there."""

    source: int
    destination: int
    length: int


def private_memory(length: int) -> mmap.mmap:
    """Memory of this process alone; untouched pages cost nothing."""
    return mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Link(Protocol):
    """Writes to one peer session. Used by one thread at a time, and independent of every other link."""

    def write(self, entries: Sequence[Entry]) -> None:
        """Return when every byte is in the peer's memory; raise `TransferError` when that is not certain.

        At most `plan.BATCH_LIMIT` entries. As long as nothing has been written to the peer over this link (again, after
        `renew`), the first few bytes go alone: a peer that does not answer is an error within seconds.
        """

    def write_in_turn(self, pieces: Iterable[Sequence[Entry]]) -> Iterator[None]:
        """As if `write` were called with each of them, and go on each time when it is in the peer's memory.

        Some later ones may be on their way by then: whoever stops in between has to `renew` the link. Here none is.
        """
        for entries in pieces:
            self.write(entries)
            yield

    def renew(self) -> None:
        """After a failed write: stop sending what is left of it, and make the link usable again.

        Its sources are not read any more.
        """

    def is_quiet(self) -> bool:
        """Whether it is proven that nothing written before the last `renew` can still land at the peer."""

    def close(self) -> None: ...


class DataPlane(Protocol):
    """One per process side. `start` and `close` open and close everything; links outlive neither."""

    on_death: Callable[[str], None]
    """Called with what has ended a thread of the plane, in that thread. Whoever starts the plane may set it."""

    @property
    def renewals(self) -> int:
        """How often a link was renewed."""

    @property
    def reads_any_memory(self) -> bool:
        """Whether its links write from memory that is not registered, too."""

    @property
    def session_id(self) -> str:
        """The name under which peers write to the registered memory; known after `start`."""

    @property
    def memory_name(self) -> str:
        """By which writers on this host find the memory of `allocate`; empty if it is not shared."""

    @property
    def mapped(self) -> int:
        """Peers with which memory is shared."""

    def allocate(self, length: int) -> mmap.mmap:
        """Memory that `start` can register. It is there until nobody refers to it any more."""

    def start(self, regions: Sequence[Region]) -> None:
        """Register `regions` once, for as long as this lives."""

    def link(self, session_id: str, memory_name: str = "") -> Link:
        """`memory_name`: what the peer has as its own, if it has said so."""

    def has_read_everything(self, writer: str) -> bool:
        """Whether nothing can land here any more that the process of this instance wrote, which seems to be gone.

        May take seconds.
        """

    def close(self) -> None: ...
