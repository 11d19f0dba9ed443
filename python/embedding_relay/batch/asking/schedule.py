"""Which row is asked next, and when, decided from the replies so far and the time. Pure: no clock, loop or socket."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Final

from embedding_relay.batch.asking.replies import Answered, Away, Broken, Busy, Refused, Reply, failure, result_of
from embedding_relay.batch.tasks import Result, Task

# Of the time between two failures no more than this counts: the run may have been paused, or the endpoint was away.
LONGEST_STEP: Final = 180.0
# After errors for so many rows, none of which had met one before, and no other answer, the endpoint is to blame.
BLAMED_AFTER: Final = 8
# How long a row is asked again that an overloaded endpoint refuses, and how long an endpoint may answer with nothing
# but errors before its rows are charged for them.
PATIENCE_SECONDS: Final = 1800.0
LONGEST_BACKOFF: Final = 60.0
# The longest pause of the whole run: a recovered endpoint should not stand idle for long.
LONGEST_HOLD: Final = 30.0
# Rows that wait for another try are kept in memory. With so many of them for each request that may be in flight, no
# new row is begun.
MOST_WAITING: Final = 4
# A row that was in flight so often when the endpoint went down is asked alone: if this row crashes the endpoint, the
# rows beside it must not be blamed.
SUSPECT_AFTER: Final = 2


class Row:
    """A task that is being asked, and what has happened to it so far."""

    __slots__ = (
        *("task", "asked", "asked_at", "during_errors"),
        *("faults", "unreached", "breaks", "falls", "busy", "trouble", "http_status"),
    )

    def __init__(self, task: Task) -> None:
        self.task = task
        self.asked = 0
        self.asked_at = 0.0
        self.during_errors = False
        self.faults = 0  # errors that were charged to this row: they use up its retries
        self.unreached = 0  # tries that found no endpoint
        self.breaks = 0  # tries whose connection broke
        self.falls = 0  # times that the endpoint went down while this row was in flight
        self.busy = 0  # replies that the endpoint is overloaded
        self.trouble = Trouble()
        self.http_status = 0

    @property
    def is_suspect(self) -> bool:
        return self.falls >= SUSPECT_AFTER


class Schedule:
    """`take` a row to ask it, `settle` it with its reply; a row that gets no result by that comes again later."""

    def __init__(
        self,
        *,
        concurrency: int,
        retries: int,
        patience: float = PATIENCE_SECONDS,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self.in_flight = 0
        self.limit = concurrency  # that is set from outside: other runs want their share
        self.retries = 0
        self.away = ""  # why the endpoint cannot be reached, while it cannot
        self._window = Window(concurrency)
        self._blame = Blame(patience)
        self._allowed_faults = retries
        self._allowed_breaks = max(retries, SUSPECT_AFTER + 1)
        self._patience = patience
        self._backoff = Backoff(1.0, LONGEST_BACKOFF, dice)
        self._hold_backoff = Backoff(0.25, LONGEST_HOLD, dice)
        self._waiting: list[tuple[float, int, Row]] = []
        self._most_waiting = max(MOST_WAITING * concurrency, 16)
        self._order = itertools.count()
        self._held_at = self._hold_until = float("-inf")
        self._hold_reason = ""
        self._holds_in_a_row = 0
        self._one_alone = False

    # ---- which row, and when

    def take(self, now: float, fresh: Callable[[], Task | None]) -> Row | None:
        """The row to ask now, if one may be asked. `fresh` gives the next task that was never asked, if any."""
        if self.away or self._one_alone or now < self._hold_until or self.in_flight >= self._most_in_flight():
            return None
        row = self._next(now, fresh)
        if row is not None:
            self.in_flight += 1
            self.retries += row.asked > 0
            row.asked += 1
            row.asked_at = now
            row.during_errors = self._blame.is_on_endpoint
        return row

    def _most_in_flight(self) -> int:
        return min(self.limit, 1 if self._blame.is_on_endpoint else self._window.size)

    def _next(self, now: float, fresh: Callable[[], Task | None]) -> Row | None:
        if self._waiting and self._waiting[0][0] <= now:
            row = self._waiting[0][2]
            if row.is_suspect and self.in_flight:
                return None
            self._one_alone = row.is_suspect
            heapq.heappop(self._waiting)
            return row
        if len(self._waiting) >= self._most_waiting:
            return None
        task = fresh()
        return Row(task) if task is not None else None

    @property
    def is_idle(self) -> bool:
        """Nothing in flight and nothing that waits for another try."""
        return not self.in_flight and not self._waiting

    def look_again_at(self, now: float) -> float | None:
        """When `take` may give a row that it does not give now, even if no reply comes until then."""
        if self.away:
            return None
        if now < self._hold_until:
            return self._hold_until
        if self._waiting and self._waiting[0][0] > now:
            return self._waiting[0][0]
        return None

    def trouble(self, now: float) -> str:
        """What the endpoint does instead of answering, when that is why little or nothing is asked."""
        if self._blame.is_on_endpoint or (now < self._hold_until and not self.in_flight):
            return self._hold_reason
        return ""

    # ---- what the replies mean

    def settle(self, row: Row, reply: Reply, now: float) -> Result | None:
        """The row's result, or None when it will be asked again."""
        self._landed()
        if not isinstance(reply, Away):
            row.http_status = reply.status or row.http_status
        match reply:
            case Answered():
                self._answered()
                return result_of(row.task, reply)
            case Refused():
                self._answered()
                return failure(row.task, reply.reason, reply.status, reply.body)
            case Busy():
                return self._busy(row, reply, now)
            case Broken():
                return self._broken(row, reply, now)
            case Away():
                return self._unreachable(row, reply, now)

    def unaskable(self, row: Row, reason: str) -> Result:
        """No request could be made of this row."""
        self._landed()
        return failure(row.task, reason)

    def back(self) -> None:
        """The endpoint answers again."""
        self.away = ""

    def _landed(self) -> None:
        self.in_flight -= 1
        self._one_alone = False

    def _answered(self) -> None:
        self._window.answered()
        self._blame.recovered()
        self._holds_in_a_row = 0

    def _busy(self, row: Row, reply: Busy, now: float) -> Result | None:
        row.trouble.failed(now)
        row.busy += 1
        if row.trouble.seconds >= self._patience:
            minutes = row.trouble.seconds / 60
            reason = f"{reply.reason} (asked {row.busy} times in {minutes:.0f} minutes)"
            return failure(row.task, reason, reply.status, reply.body)
        trouble = f"is overloaded ({reply.reason})"
        self._window.busy(row.asked_at, now)
        self._hold(row, now, trouble)
        named = reply.retry_after or 0.0
        self._hold_for(named, now, trouble)
        self._later(row, now + max(named, self._hold_backoff.wait(row.busy)))
        return None

    def _broken(self, row: Row, reply: Broken, now: float) -> Result | None:
        self._blame.error(row.task.row, row.faults > 0, now)
        if self._blame.is_on_endpoint:
            if not row.during_errors:
                row.falls += 1
            self._hold(row, now, f"answers with nothing but errors ({reply.reason})")
            self._later(row, now)
            return None
        row.faults += 1
        if row.faults > self._allowed_faults:
            return failure(row.task, f"{reply.reason} ({_tried(row.asked)})", row.http_status, reply.body)
        self._later(row, now + self._backoff.wait(row.faults))
        return None

    def _unreachable(self, row: Row, reply: Away, now: float) -> Result | None:
        self.away = reply.reason
        row.unreached += 1
        # There was an endpoint to connect to, so this row itself may be what made the connection break.
        row.breaks += reply.connected
        row.falls += reply.connected
        if row.breaks >= self._allowed_breaks:
            reason = f"{reply.reason} ({row.breaks} times, and the endpoint was there again each time)"
            return failure(row.task, reason, row.http_status)
        self._later(row, now + (self._backoff.wait(row.unreached - 1) if row.unreached > 1 else 0.0))
        return None

    def _hold(self, row: Row, now: float, trouble: str) -> None:
        """Ask nothing for a while, longer each time. Rows that were asked before the last such pause do not count."""
        if row.asked_at >= self._held_at:
            self._held_at = now
            self._holds_in_a_row += 1
            self._hold_for(self._hold_backoff.wait(self._holds_in_a_row), now, trouble)

    def _hold_for(self, seconds: float, now: float, trouble: str) -> None:
        if now + seconds > self._hold_until:
            self._hold_until, self._hold_reason = now + seconds, trouble

    def _later(self, row: Row, due: float) -> None:
        heapq.heappush(self._waiting, (due, next(self._order), row))


def _tried(times: int) -> str:
    return "tried once" if times == 1 else f"tried {times} times"


# ---- how long to wait, how many at once, and who is to blame for an error


class Backoff:
    """A wait that doubles with every try, up to a limit; a random share of it, so that rows do not return together."""

    def __init__(self, first: float, most: float, dice: Callable[[], float] = random.random) -> None:
        self._first = first
        self._most = most
        self._dice = dice

    def wait(self, tries: int) -> float:
        """`tries` is 1 after the first failure."""
        return self._dice() * min(self._most, self._first * 2.0 ** min(tries - 1, 30))


class Trouble:
    """How long something has been failing: the time between its failures, long gaps cut short."""

    __slots__ = ("_at", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._at: float | None = None

    def failed(self, now: float) -> None:
        if self._at is not None:
            self.seconds += min(now - self._at, LONGEST_STEP)
        self._at = now


class Window:
    """How many requests may be in flight: halved when the endpoint is overloaded, one more for each window answered.

    Up to half of what it was before the refusals began, it grows by one for each answer instead: the endpoint could
    take that many, and with slow rows it would take minutes to reach that again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = float(most)
        self._quick_below = 0.0
        self._shrunk_at = float("-inf")
        self._shrinking = False

    @property
    def size(self) -> int:
        return int(self._size)

    def answered(self) -> None:
        self._shrinking = False
        if self._size < self._most:
            step = 1.0 if self._size < self._quick_below else 1 / self._size
            self._size = min(self._size + step, self._most)

    def busy(self, asked_at: float, now: float) -> None:
        """A refusal of what was asked before the window last shrank says nothing about its size now."""
        if asked_at < self._shrunk_at:
            return
        if not self._shrinking:
            self._quick_below = self._size / 2
        self._size = max(1.0, self._size / 2)
        self._shrunk_at = now
        self._shrinking = True


class Blame:
    """Tells an endpoint that answers everything with errors from rows that cause errors.

    A pair that restarts behind its router answers every row with an error for minutes, and that must not use up their
    retries. But not for ever: an endpoint that does not recover is one that cannot answer these rows.
    """

    def __init__(self, patience: float) -> None:
        self._most = patience
        self.recovered()

    def recovered(self) -> None:
        self._rows: set[int] = set()
        self._trouble = Trouble()

    def error(self, row: int, erred_before: bool, now: float) -> None:
        self._trouble.failed(now)
        if not erred_before and len(self._rows) < BLAMED_AFTER:
            self._rows.add(row)

    @property
    def is_on_endpoint(self) -> bool:
        return len(self._rows) >= BLAMED_AFTER and self._trouble.seconds < self._most
