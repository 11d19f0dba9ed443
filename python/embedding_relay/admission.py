"""Who may take memory of an instance now, who waits for it, and who is refused: by what each request costs, in bytes.

Two lines, because a small request must not stand behind large ones. An eighth of the limit is kept for small requests,
and a large one never waits for a small one that came after it. Within a line it is first come, first served. So each
request waits for older ones only, at every instance alike, and no two instances can wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Protocol

from embedding_relay.protocol.errors import BAD_REQUEST, UNAVAILABLE, Failure

logger = logging.getLogger(__name__)

_SMALL: Final = 32
"""A request is small that costs no more than this part of the limit."""
_KEPT: Final = 8
"""This part of the limit is for small requests only."""
_LONGEST_RETRY: Final = 60
_LOOK: Final = 1.0
_MOST_ASKED: Final = 128
_MIB: Final = 2**20


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


@dataclasses.dataclass(frozen=True)
class Limits:
    bytes: int
    """That all requests may cost together."""
    largest: int
    """That one may cost which is let in alone, if that is more."""
    waiting: int
    """Requests that wait at a time."""
    patience: float
    """Seconds that one of them waits at most."""
    name: str
    """Of the setting, for those who are refused."""


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request, from the time that it asks until it is over."""

    cost: int
    size: Size
    since: float
    rooms: tuple[int, ...] = ()
    is_in: bool = False
    is_extra: bool = False
    """Let in beyond the limit, because others wait for it elsewhere."""
    on_entry: Callable[[], None] | None = None
    """Called once, when it is let in after it had to wait."""

    @property
    def has_waited(self) -> bool:
        return self.on_entry is not None


class Refused(Exception):
    """What the client is told, and after how many seconds it may ask again; None if it never need."""

    def __init__(self, failure: Failure, retry_after: int | None = None) -> None:
        super().__init__(failure.text)
        self.failure = failure
        self.retry_after = retry_after


class Account:
    """Pure: `now` is an argument, and whoever is let in is told through its ticket."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.taken = dict.fromkeys(Size, 0)
        """Bytes of those who are in."""
        self.lines: dict[Size, list[Ticket]] = {size: [] for size in Size}
        self.moved_at = 0.0
        """When somebody was let in or left."""
        self._inside: set[Ticket] = set()
        self._last_wait = 1.0

    @property
    def waiting(self) -> int:
        return sum(map(len, self.lines.values()))

    @property
    def kept(self) -> int:
        return self.limits.bytes // _KEPT

    def size_of(self, cost: int) -> Size:
        return Size.SMALL if cost * _SMALL <= self.limits.bytes else Size.LARGE

    def enter(self, cost: int, now: float, rooms: Sequence[int] = ()) -> Ticket:
        """In, or in line. Raises Refused for what can never be let in, and when the line is full."""
        most = max(self.limits.bytes, self.limits.largest)
        if cost > most:
            text = (
                f"this request would take {_mib(cost)} of the memory of this instance,"
                f" which gives one request no more than {_mib(most)} ({self.limits.name})"
            )
            raise Refused(Failure(BAD_REQUEST, text))  # of a 413 `sglang-router` makes a 500, which it tries again
        size = self.size_of(cost)
        ticket = Ticket(cost, size, now, tuple(rooms))
        if not self.lines[size] and self._fits(ticket):
            self._let_in(ticket, now)
        elif self.waiting >= self.limits.waiting:
            raise self._too_many(f"{self.waiting} requests wait for it already")
        else:
            self.lines[size].append(ticket)
        return ticket

    def correct(self, ticket: Ticket, cost: int, now: float) -> None:
        """What it really costs from now on: less than was thought lets others in, more keeps others out."""
        if ticket in self._inside:
            self.taken[ticket.size] += cost - ticket.cost
            ticket.cost = cost
            self._serve(now)

    def leave(self, ticket: Ticket, now: float) -> None:
        """It is over, or does not wait any longer. Harmless when repeated."""
        if ticket in self._inside:
            self._inside.discard(ticket)
            self.taken[ticket.size] -= ticket.cost
            self.moved_at = now
        elif ticket in self.lines[ticket.size]:
            self.lines[ticket.size].remove(ticket)
        self._serve(now)

    def refusal_of_late(self, now: float) -> Refused:
        """For a ticket that has waited for as long as it may."""
        return self._too_many(f"this one has waited for {self.limits.patience:g} s")

    def let_in_extra(self, rooms: Sequence[int], now: float) -> bool:
        """The oldest that waits with one of these rooms, beyond the limit: but one at a time."""
        if any(ticket.is_extra for ticket in self._inside):
            return False
        wanted = set(rooms)
        waiting = sorted((one for line in self.lines.values() for one in line), key=lambda one: one.since)
        for ticket in waiting:
            if wanted.intersection(ticket.rooms):
                self.lines[ticket.size].remove(ticket)
                ticket.is_extra = True
                self._let_in(ticket, now)
                return True
        return False

    def _fits(self, ticket: Ticket) -> bool:
        small, large, limit = self.taken[Size.SMALL], self.taken[Size.LARGE], self.limits.bytes
        if ticket.size is Size.SMALL:
            in_its_own = small + ticket.cost <= self.kept
            return in_its_own or (not self.lines[Size.LARGE] and small + large + ticket.cost <= limit)
        if large == 0 and ticket.cost > limit - self.kept:
            return small <= self.kept  # alone among the large ones, for it can never be otherwise
        return large + max(small, self.kept) + ticket.cost <= limit

    def _serve(self, now: float) -> None:
        for size, line in self.lines.items():
            while line and self._fits(line[0]):
                assert line[0].size is size
                self._let_in(line.pop(0), now)

    def _let_in(self, ticket: Ticket, now: float) -> None:
        ticket.is_in = True
        self._inside.add(ticket)
        self.taken[ticket.size] += ticket.cost
        self.moved_at = now
        if now > ticket.since:
            self._last_wait = now - ticket.since
        if ticket.on_entry is not None:
            ticket.on_entry()

    def _too_many(self, why: str) -> Refused:
        text = (
            f"the requests of this instance take all of the {_mib(self.limits.bytes)} of memory that they may"
            f" ({self.limits.name}), and {why}"
        )
        retry_after = min(_LONGEST_RETRY, max(1, math.ceil(self._last_wait)))
        return Refused(Failure(UNAVAILABLE, text), retry_after)


def _mib(count: int) -> str:
    return f"{count / _MIB:,.0f} MiB" if count >= _MIB else f"{count:,} bytes"


# ---- in an event loop


class Watcher(Protocol):
    """What is told of who comes and goes, by the name of its class: metrics."""

    def let_in(self, name: str, waited: float) -> None: ...

    def refused(self, name: str) -> None: ...

    def stands(self, name: str, taken: int, waiting: int) -> None: ...


class Gate:
    """An account whose requests wait in an event loop."""

    def __init__(
        self,
        limits: Limits,
        watcher: Watcher | None = None,
        ask_offered: Callable[[list[int]], None] | None = None,
        name: str = "",
    ) -> None:
        """`ask_offered`: asks which of these rooms are waited for, while nobody moves; `name`: of all its requests."""
        self.account = Account(limits)
        self._watcher = watcher
        self._ask_offered = ask_offered
        self._name = name
        self._asking: asyncio.Task[None] | None = None
        self._asked = 0

    @contextlib.asynccontextmanager
    async def admitted(self, cost: int, rooms: Sequence[int] = ()) -> AsyncIterator[Ticket]:
        """Raises Refused. However the request ends, its bytes are given back."""
        clock = asyncio.get_running_loop().time
        ticket = None
        try:
            ticket = self.account.enter(cost, clock(), rooms)
            if not ticket.is_in:
                await self._wait(ticket)
        except BaseException as error:
            if ticket is not None:
                self.account.leave(ticket, clock())
            if self._watcher is not None and isinstance(error, Refused):
                self._watcher.refused(self._name_of(self.account.size_of(cost)))
            self._tell_stands()
            raise
        if self._watcher is not None:
            self._watcher.let_in(self._name_of(ticket.size), clock() - ticket.since)
        self._tell_stands()
        try:
            yield ticket
        finally:
            self.account.leave(ticket, clock())
            self._tell_stands()

    def correct(self, ticket: Ticket, cost: int) -> None:
        self.account.correct(ticket, cost, asyncio.get_running_loop().time())
        self._tell_stands()

    def let_in_offered(self, rooms: Sequence[int]) -> None:
        """The other halves of these have blocks, which those who are in may be waiting for."""
        if self._is_still() and self.account.let_in_extra(rooms, asyncio.get_running_loop().time()):
            logger.info("relay admission: a request is let in beyond the limit, because its language instance waits")

    async def _wait(self, ticket: Ticket) -> None:
        loop = asyncio.get_running_loop()
        entered: asyncio.Future[None] = loop.create_future()
        ticket.on_entry = lambda: None if entered.done() else entered.set_result(None)
        self._tell_stands()
        if self._asking is None and self._ask_offered is not None:
            self._asking = loop.create_task(self._keep_asking())
        try:
            await asyncio.wait_for(entered, self.account.limits.patience)
        except TimeoutError:
            if not ticket.is_in:
                raise self.account.refusal_of_late(loop.time()) from None

    def _is_still(self) -> bool:
        return asyncio.get_running_loop().time() - self.account.moved_at >= _LOOK

    async def _keep_asking(self) -> None:
        """Which of those that wait are waited for: a part of them at a time, so that each has its turn."""
        assert self._ask_offered is not None
        while self.account.waiting:
            await asyncio.sleep(_LOOK)
            rooms = [room for line in self.account.lines.values() for ticket in line for room in ticket.rooms]
            if rooms and self._is_still():
                first = self._asked % len(rooms)
                self._asked = first + _MOST_ASKED
                self._ask_offered([*rooms[first:], *rooms[:first]][:_MOST_ASKED])
        self._asking = None

    def _tell_stands(self) -> None:
        if self._watcher is None:
            return
        taken, waiting = self.account.taken, {size: len(line) for size, line in self.account.lines.items()}
        if self._name:
            self._watcher.stands(self._name, sum(taken.values()), sum(waiting.values()))
            return
        for size in Size:
            self._watcher.stands(size.value, taken[size], waiting[size])

    def _name_of(self, size: Size) -> str:
        return self._name or size.value
