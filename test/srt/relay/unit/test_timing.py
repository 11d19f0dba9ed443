"""The alarm clock."""

import random

import pytest

from embedding_relay.protocol.timing import Alarms, Timing


def test_alarms_go_off_in_order_and_once() -> None:
    alarms: Alarms[str] = Alarms()
    alarms.set("late", 3.0)
    alarms.set("early", 1.0)
    assert alarms.next() == 1.0
    assert alarms.pop_due(0.9) is None
    assert alarms.pop_due(5.0) == "early"
    assert alarms.pop_due(5.0) == "late"
    assert alarms.pop_due(5.0) is None
    assert alarms.next() is None
    assert len(alarms) == 0


def test_an_alarm_is_moved_by_setting_it_again_and_ends_by_cancelling() -> None:
    alarms: Alarms[int] = Alarms()
    alarms.set(1, 1.0)
    alarms.set(1, 2.0)
    assert alarms.pop_due(1.5) is None
    alarms.set(2, 1.0)
    alarms.cancel(2)
    alarms.cancel(3)
    assert 2 not in alarms
    assert alarms.next() == 2.0


def test_against_a_dictionary() -> None:
    rng = random.Random(7)
    alarms: Alarms[int] = Alarms()
    model: dict[int, float] = {}
    for step in range(20_000):
        key, now = rng.randrange(30), step / 10
        if rng.random() < 0.6:
            model[key] = now + rng.randrange(40)
            alarms.set(key, model[key])
        elif rng.random() < 0.5:
            model.pop(key, None)
            alarms.cancel(key)
        while (due := alarms.pop_due(now)) is not None:
            assert model.pop(due) <= now
        assert all(at > now for at in model.values())
        assert alarms.next() == min(model.values(), default=None)
    assert len(alarms._heap) < 300, "what was overtaken is thrown away in time"


def test_an_alarm_that_is_moved_again_and_again_takes_no_more_space() -> None:
    alarms: Alarms[int] = Alarms()
    for step in range(1000):
        alarms.set(1, 1000.0 + step)
    assert len(alarms._heap) <= 64 + 4
    assert alarms.next() == 1999.0


def test_a_first_word_is_awaited_no_longer_than_everything_else() -> None:
    assert Timing(first_word=30.0, bootstrap=300.0).unasked == 30.0
    assert Timing(first_word=30.0, bootstrap=2.0).unasked == 2.0


def test_the_silence_of_a_peer_covers_every_ping_that_may_fail() -> None:
    assert Timing(heartbeat_interval=5.0, heartbeat_max_failures=2).silence == pytest.approx(15.0)


def test_the_intervals_between_repetitions_double_up_to_the_longest() -> None:
    timing = Timing(repeat_interval=0.5, longest_repeat_interval=5.0)
    assert [timing.until_repeat(times) for times in (0, 1, 2, 3, 4, 5000)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
