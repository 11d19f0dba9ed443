"""The schedule of a run in a simulated world: what it asks, when, and whom it blames. No time passes here."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.batch.asking.replies import Answered, Away, Broken, Busy, Refused, Reply
from embedding_relay.batch.asking.schedule import LONGEST_HOLD, Backoff, Row, Schedule, Window
from embedding_relay.batch.tasks import Outcome, Result, Task
from support.effort import effort, unhurried

ANSWER = Answered(200, {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]})
BUSY = Busy(503, "503: full")
ERROR = Broken(500, "500: oops")
GATEWAY = Broken(502, "502: nobody behind me")
BROKE = Away("the connection broke", connected=True)
NOBODY = Away("connection refused", connected=False)
DAY = 86_400.0

# What an endpoint does with a row that is asked at a moment: how long it takes, and the reply.
Endpoint = Callable[[Row, float], tuple[float, Reply]]


class World:
    """Drives a schedule as the run does, with the times that the endpoint says instead of real ones."""

    def __init__(
        self,
        rows: int,
        endpoint: Endpoint,
        *,
        concurrency: int = 8,
        retries: int = 5,
        patience: float = 1800.0,
        is_there: Callable[[float], bool] = lambda now: True,
        seed: int = 0,
    ) -> None:
        self.now = 1000.0
        self.schedule = Schedule(
            concurrency=concurrency, retries=retries, patience=patience, dice=random.Random(seed).random
        )
        self.results: dict[int, Result] = {}
        self.asked: list[tuple[float, int]] = []
        self.most_in_flight = self.most_waiting = 0
        self._endpoint = endpoint
        self._is_there = is_there
        self._fresh = iter([Task(row) for row in range(1, rows + 1)])
        self._rows = rows
        self._coming: list[tuple[float, int, Row, Reply]] = []

    def run(self, until: float = DAY) -> None:
        end = self.now + until
        while len(self.results) < self._rows and self.now < end:
            while (row := self.schedule.take(self.now, lambda: next(self._fresh, None))) is not None:
                self.asked.append((self.now, row.task.row))
                seconds, reply = self._endpoint(row, self.now)
                heapq.heappush(self._coming, (self.now + seconds, len(self.asked), row, reply))
            self.most_in_flight = max(self.most_in_flight, len(self._coming))
            self.most_waiting = max(self.most_waiting, len(self.schedule._waiting))
            assert self.schedule.in_flight == len(self._coming)
            self._pass_time()

    def _pass_time(self) -> None:
        moments = [moment for moment, *_ in self._coming[:1]]
        if (look := self.schedule.look_again_at(self.now)) is not None:
            moments.append(look)
        if self.schedule.away:
            moments.append(self.now + 1)
        assert moments, "nothing will ever happen again, and rows are left"
        self.now = max(self.now, min(moments))
        while self._coming and self._coming[0][0] <= self.now:
            _, _, row, reply = heapq.heappop(self._coming)
            if (result := self.schedule.settle(row, reply, self.now)) is not None:
                assert result.row not in self.results
                self.results[result.row] = result
        if self.schedule.away and self._is_there(self.now):
            self.schedule.back()

    def failed(self) -> dict[int, Result]:
        return {row: result for row, result in self.results.items() if result.outcome is Outcome.FAILED}

    def times_asked(self, row: int) -> int:
        return sum(asked == row for _, asked in self.asked)


def well(_row: Row, _now: float) -> tuple[float, Reply]:
    return 1.0, ANSWER


def test_a_healthy_endpoint_is_kept_busy_all_the_time() -> None:
    world = World(80, well, concurrency=8)
    started = world.now
    world.run()
    assert world.now - started == 10
    assert world.most_in_flight == 8
    assert len(world.asked) == 80
    assert not world.failed()
    assert world.schedule.retries == 0


def test_one_row_that_ends_makes_room_for_one() -> None:
    """A window that slides, not batch after batch: a slow row holds up nobody."""
    world = World(50, lambda row, now: (20.0 if row.task.row == 1 else 1.0, ANSWER), concurrency=2)
    started = world.now
    world.run()
    assert world.now - started == 35


# ---- one row's fault


def test_an_error_is_tried_again_and_then_told() -> None:
    world = World(50, lambda row, now: (1.0, ERROR if row.task.row == 3 else ANSWER), retries=2)
    world.run()
    assert list(world.failed()) == [3]
    assert world.results[3].error == "500: oops (tried 3 times)"
    assert world.results[3].http_status == 500
    assert world.schedule.retries == 2


def test_the_last_rows_may_err_without_the_endpoint_being_blamed() -> None:
    world = World(20, lambda row, now: (1.0, ERROR if row.task.row > 15 else ANSWER))
    started = world.now
    world.run()
    assert sorted(world.failed()) == [16, 17, 18, 19, 20]
    assert world.now - started < 200


def test_rows_that_have_erred_before_are_no_reason_to_blame_the_endpoint() -> None:
    """A dozen of them, and at the end there is nothing else left to ask."""
    world = World(48, lambda row, now: (1.0, ERROR if row.task.row % 4 == 0 else ANSWER))
    started = world.now
    world.run()
    assert len(world.failed()) == 12
    assert world.now - started < 200


def test_the_last_status_that_there_was_is_kept() -> None:
    no_answer = Broken(0, "no answer within 600 s")
    world = World(1, lambda row, now: (1.0, ERROR if row.asked == 1 else no_answer), retries=1)
    world.run()
    assert world.results[1].error == "no answer within 600 s (tried 2 times)"
    assert world.results[1].http_status == 500


def test_an_error_that_goes_away_costs_nothing_but_time() -> None:
    world = World(50, lambda row, now: (1.0, ERROR if row.task.row == 3 and row.asked <= 5 else ANSWER))
    world.run()
    assert not world.failed()
    assert world.times_asked(3) == 6


def test_waits_grow_and_are_random_shares_of_their_limit() -> None:
    longest = Backoff(1.0, 60.0, lambda: 1.0)
    assert [longest.wait(tries) for tries in (1, 2, 3, 6, 7, 1000)] == [1, 2, 4, 32, 60, 60]
    assert Backoff(1.0, 60.0, lambda: 0.25).wait(3) == 1


def test_a_refusal_is_final() -> None:
    world = World(10, lambda row, now: (1.0, Refused(400, "400: too long") if row.task.row == 3 else ANSWER))
    world.run()
    assert world.results[3].error == "400: too long"
    assert world.times_asked(3) == 1


# ---- an endpoint that has too much to do


def test_too_much_at_once_is_asked_again_without_losing_tries() -> None:
    """Nobody may have more than two in flight here, and one retry would never be enough."""
    open_until: list[float] = []

    def two_at_once(row: Row, now: float) -> tuple[float, Reply]:
        open_until[:] = [moment for moment in open_until if moment > now]
        if len(open_until) >= 2:
            return 0.01, BUSY
        open_until.append(now + 1.0)
        return 1.0, ANSWER

    world = World(100, two_at_once, concurrency=16, retries=0)
    started = world.now
    world.run()
    assert not world.failed()
    assert world.now - started < 2 * 50


def test_a_storm_of_refusals_is_waited_out_and_then_everything_is_as_before() -> None:
    world = World(2000, lambda row, now: (0.01, BUSY) if 1010 <= now < 1070 else (1.0, ANSWER), concurrency=32)
    world.run()
    assert not world.failed()
    in_storm = [moment for moment, _ in world.asked if 1010 <= moment < 1070]
    assert len(in_storm) < 150
    before = sum(1000 <= moment < 1010 for moment, _ in world.asked)
    calm = 1070 + LONGEST_HOLD
    afterwards = sum(calm + 15 <= moment < calm + 25 for moment, _ in world.asked)
    assert afterwards >= 0.9 * before


def test_the_time_that_an_endpoint_names_is_kept() -> None:
    world = World(20, lambda row, now: (0.1, Busy(429, "429: slowly", 30.0)) if now < 1025 else (0.1, ANSWER))
    world.run()
    assert not world.failed()
    assert not [moment for moment, _ in world.asked if 1001 < moment < 1030]


def test_patience_with_a_full_endpoint_has_an_end() -> None:
    world = World(3, lambda row, now: (0.1, BUSY), patience=1800)
    world.run()
    assert len(world.failed()) == 3
    assert all(result.error.startswith("503: full (asked ") for result in world.results.values())
    assert 1800 < world.now - 1000 < 3600
    assert len(world.asked) < 3 * 1800 / 5


def test_one_row_that_is_told_to_wait_is_not_asked_all_the_time() -> None:
    world = World(3000, lambda row, now: (1.0, Busy(429, "429: not you") if row.task.row == 3 else ANSWER))
    world.run(until=300)
    assert len(world.results) > 1000
    assert 5 < world.times_asked(3) < 50


def test_the_time_of_a_pause_is_not_the_rows() -> None:
    """It was refused for now, then a person paused the run for a night, then it is refused once more."""
    schedule = Schedule(concurrency=1, retries=0, patience=1800)
    row = schedule.take(0.0, lambda: Task(1))
    assert row is not None
    assert schedule.settle(row, BUSY, 1.0) is None
    morning = 8 * 3600.0
    assert schedule.take(morning, lambda: None) is row
    assert schedule.settle(row, BUSY, morning + 1) is None


def test_the_window_halves_once_for_what_was_asked_together() -> None:
    window = Window(32)
    for _ in range(32):
        window.busy(asked_at=5.0, now=6.0)
    assert window.size == 16
    window.busy(asked_at=6.5, now=7.0)
    assert window.size == 8


def test_the_window_grows_by_one_for_each_window_answered() -> None:
    window = Window(32)
    window.busy(asked_at=1.0, now=2.0)
    for answers, size in ((16, 17), (17, 18), (18, 19)):
        for _ in range(answers):
            window.answered()
        assert window.size in (size - 1, size)  # a sum of parts of one
    for _ in range(1000):
        window.answered()
    assert window.size == 32


def test_after_a_storm_the_window_is_soon_half_of_what_it_was() -> None:
    window = Window(32)
    for moment in range(10):
        window.busy(asked_at=moment, now=moment)
    assert window.size == 1
    for _ in range(15):
        window.answered()
    assert window.size == 16
    for _ in range(16):
        window.answered()
    assert window.size in (16, 17)


def test_a_window_that_was_too_large_again_remembers_the_smaller_one() -> None:
    window = Window(32)
    window.busy(asked_at=1, now=2)
    window.answered()
    window.busy(asked_at=3, now=4)
    assert window.size == 8
    for _ in range(8):
        window.answered()
    assert window.size in (8, 9)


# ---- an endpoint that has nothing but errors


def test_a_pair_that_restarts_behind_its_router_costs_no_row_its_tries() -> None:
    """Ten minutes of 502, with rows that may be tried once more only."""
    world = World(500, lambda row, now: (0.05, GATEWAY) if 1010 <= now < 1610 else (1.0, ANSWER), retries=1)
    world.run()
    assert not world.failed()
    assert len([moment for moment, _ in world.asked if 1010 <= moment < 1610]) < 150
    assert world.now < 1610 + LONGEST_HOLD + 500 / 8 + 15


def test_an_endpoint_that_never_gets_well_is_believed_in_the_end() -> None:
    world = World(30, lambda row, now: (0.1, ERROR), patience=600)
    world.run()
    assert len(world.failed()) == 30
    assert 600 < world.now - 1000 < 1800


def test_while_there_are_only_errors_it_is_said() -> None:
    world = World(30, lambda row, now: (0.1, GATEWAY), patience=600)
    world.run(until=300)
    assert world.schedule.trouble(world.now) == "answers with nothing but errors (502: nobody behind me)"


def test_a_row_that_brings_the_pair_down_behind_its_router_is_found() -> None:
    """It crashes within a second whatever runs beside it, and is back after a minute."""
    down_until = 0.0

    def endpoint(row: Row, now: float) -> tuple[float, Reply]:
        nonlocal down_until
        if now < down_until:
            return 0.05, GATEWAY
        if row.task.row == 40:
            down_until = now + 60
            return 0.5, GATEWAY
        return 5.0, ANSWER

    crashes: Endpoint = endpoint

    def shared_fate(row: Row, now: float) -> tuple[float, Reply]:
        """Whoever is being answered when it goes down gets an error as well."""
        seconds, reply = crashes(row, now)
        if row.task.row == 40 and now + 60 == down_until:
            world._coming[:] = [(now + 0.5, order, other, GATEWAY) for _, order, other, _ in world._coming]
            heapq.heapify(world._coming)
        return seconds, reply

    world = World(200, shared_fate, retries=3)
    world.run()
    assert list(world.failed()) == [40]


# ---- an endpoint that is away


def test_an_endpoint_that_is_away_is_waited_for() -> None:
    def there(now: float) -> bool:
        return not 1010 <= now < 5000

    world = World(200, lambda row, now: (1.0, ANSWER) if there(now) else (0.0, NOBODY), retries=0, is_there=there)
    world.run()
    assert not world.failed()
    assert len(world.asked) <= 200 + 8


def test_one_poisonous_row_does_not_stop_the_others() -> None:
    world = World(500, lambda row, now: (0.1, BROKE) if row.task.row == 3 else (1.0, ANSWER), retries=5)
    world.run()
    assert list(world.failed()) == [3]
    assert world.results[3].error == "the connection broke (5 times, and the endpoint was there again each time)"
    assert world.now < 1000 + 500 / 8 + 60


def test_a_row_that_brings_the_endpoint_down_is_found_and_no_other_is_taken_for_it() -> None:
    down_until = 0.0

    def crashing(row: Row, now: float) -> tuple[float, Reply]:
        nonlocal down_until
        if now < down_until:
            return 0.0, NOBODY
        if row.task.row == 3:
            down_until = now + 30
            world._coming[:] = [(now + 0.5, order, other, BROKE) for _, order, other, _ in world._coming]
            heapq.heapify(world._coming)
            return 0.5, BROKE
        return 60.0, ANSWER

    world = World(20, crashing, is_there=lambda now: now >= down_until)
    world.run()
    assert list(world.failed()) == [3]


def test_breaks_without_a_connection_are_nobodys_fault() -> None:
    world = World(5, lambda row, now: (0.0, NOBODY if row.asked < 50 else ANSWER), retries=0)
    world.run()
    assert not world.failed()


def test_an_endpoint_that_seems_to_be_there_and_is_not_is_not_asked_all_the_time() -> None:
    world = World(50, lambda row, now: (0.0, NOBODY))
    world.run(until=3600)
    assert not world.results
    assert len(world.asked) < 50 * 3600 / 30


# ---- whatever happens

REPLIES: list[Reply] = [
    ANSWER,
    ANSWER,
    ANSWER,
    Refused(400, "no"),
    BUSY,
    Busy(429, "", 3.0),
    ERROR,
    GATEWAY,
    BROKE,
    NOBODY,
]


@unhurried
@effort(1000)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 60),
    concurrency=st.integers(1, 20),
    retries=st.integers(0, 6),
    kinds=st.lists(st.sampled_from(REPLIES), min_size=1, max_size=6),
    phase=st.floats(1.0, 400.0),
)
def test_every_row_ends_once_and_nobody_is_pestered(
    seed: int, rows: int, concurrency: int, retries: int, kinds: list[Reply], phase: float
) -> None:
    """An endpoint whose moods change; whatever they are, rows are asked at a bearable rate and all of them end."""
    dice = random.Random(seed)

    def moody(row: Row, now: float) -> tuple[float, Reply]:
        mood = kinds[int(now / phase) % len(kinds)]
        return dice.choice([0.0, 0.01, 1.0, 30.0]), mood if dice.random() < 0.9 else dice.choice(kinds)

    world = World(
        rows,
        moody,
        concurrency=concurrency,
        retries=retries,
        patience=600.0,
        is_there=lambda now: dice.random() < 0.5,
        seed=seed,
    )
    # Nothing else would ever end it: an endpoint that cannot be reached is waited for without an end.
    ends = any(not isinstance(kind, Away) or kind.connected for kind in kinds)
    world.run(until=30 * DAY if ends else 3600.0)
    assert world.most_in_flight <= concurrency
    if ends:
        assert sorted(world.results) == list(range(1, rows + 1))
    elapsed = world.now - 1000
    assert len(world.asked) <= rows * (retries + 8) + concurrency * (elapsed / 5 + 10) + elapsed


def test_memory_does_not_grow_with_the_rows() -> None:
    """When many rows err, new ones are not begun before old ones are done with."""
    world = World(20_000, lambda row, now: (0.001, ERROR if row.task.row % 2 else ANSWER), concurrency=4)
    world.run(until=600)
    assert world.most_waiting <= 16 + 4


@pytest.mark.parametrize("concurrency", [1, 7, 64])
def test_a_suspect_is_asked_alone(concurrency: int) -> None:
    alone: list[int] = []

    def endpoint(row: Row, now: float) -> tuple[float, Reply]:
        if row.task.row == 2:
            if row.is_suspect:
                alone.append(world.schedule.in_flight)
            return 0.1, BROKE
        return 1.0, ANSWER

    world = World(100, endpoint, concurrency=concurrency)
    world.run()
    assert alone == [1, 1, 1]
