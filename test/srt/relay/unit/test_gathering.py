"""How long a pass of the tower waits for requests that are on their way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.gathering import Gathering
from embedding_relay.testing.plane import Clock
from support.effort import effort

TICK = 1 / 1024
"""So that sums are exact."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gathering(clock: Clock) -> Gathering:
    """Passes take ten ticks here, and all of them on a core."""
    gathering = Gathering(clock)
    gathering.passed(10 * TICK, 10 * TICK)
    return gathering


def test_nobody_is_waited_for_who_is_not_known_to_come(gathering: Gathering) -> None:
    assert gathering.seconds_left() == 0
    gathering.came(2)
    assert gathering.seconds_left() > 0
    gathering.came(0)
    assert gathering.seconds_left() == 0


def test_nothing_waits_before_a_pass_has_shown_what_is_saved() -> None:
    gathering = Gathering()
    gathering.came(5)
    assert gathering.seconds_left() == 0


def test_where_cores_are_idle_a_pass_waits_for_all_as_long_as_a_pass_takes(gathering: Gathering, clock: Clock) -> None:
    gathering.came(5)
    assert gathering.seconds_left() == 10 * TICK
    clock.now += 9 * TICK
    assert gathering.seconds_left() == TICK
    gathering.came(4)
    assert gathering.seconds_left() == TICK
    clock.now += TICK
    assert gathering.seconds_left() == 0


def test_where_they_are_busy_it_waits_for_each_as_long(clock: Clock) -> None:
    gathering = Gathering(clock)
    gathering.passed(10 * TICK, 4 * TICK)
    gathering.came(9)
    for _ in range(5):
        assert gathering.seconds_left() == 10 * TICK
        clock.now += 9 * TICK
        gathering.came(9)
    assert gathering.seconds_left() == TICK, "of ten and six times six"


def test_nothing_waits_longer_than_a_fifth_of_a_second(clock: Clock) -> None:
    """Also if the first pass of all, which compiles, took a minute."""
    gathering = Gathering(clock)
    gathering.passed(60.0, 1.0)
    gathering.came(9)
    assert gathering.seconds_left() == pytest.approx(0.2)


def test_the_next_pass_waits_anew(gathering: Gathering, clock: Clock) -> None:
    gathering.came(5)
    assert gathering.seconds_left() == 10 * TICK
    clock.now += 8 * TICK
    gathering.nothing_waits()
    gathering.came(5)
    assert gathering.seconds_left() == 10 * TICK


def test_what_passes_take_is_learned(gathering: Gathering) -> None:
    for _ in range(50):
        gathering.passed(2 * TICK, 2 * TICK)
    gathering.came(1)
    assert gathering.seconds_left() == pytest.approx(2 * TICK, rel=0.01)


@effort()
@given(st.data())
def test_no_pass_waits_longer_than_it_may_whatever_is_promised(data: st.DataObject) -> None:
    clock = Clock()
    gathering = Gathering(clock)
    longest = st.floats(0, 0.3)
    slowest = most_waited = 0.0
    for _ in range(data.draw(st.integers(1, 20))):
        took = data.draw(longest)
        computed = data.draw(st.floats(0, took))
        slowest, most_waited = max(slowest, took), max(most_waited, took - computed)
        gathering.passed(took, computed)
    waits_since = None
    for _ in range(data.draw(st.integers(1, 30))):
        gathering.came(data.draw(st.integers(0, 9)))
        left = gathering.seconds_left()
        assert 0 <= left <= slowest + 1e-6
        if left:
            waits_since = clock.now if waits_since is None else waits_since
            assert clock.now + left - waits_since <= min(0.2, slowest + 6 * most_waited) + 1e-6
        else:
            gathering.nothing_waits()
            waits_since = None
        clock.now += data.draw(longest)
