"""The moments of recent requests: kept in order, bounded, and read while others note more."""

from __future__ import annotations

import threading

from embedding_relay import recorder
from embedding_relay.recorder import Moment, Recorder


def test_what_is_noted_of_a_room_is_told_in_order_of_time() -> None:
    held = Recorder(100)
    held.note(7, recorder.COPIED, 3.0, first_row=16, rows=8)
    held.note(8, recorder.PARKED, 1.5)
    held.note(7, recorder.PARKED, 1.0)
    assert held.moments(7) == [Moment(1.0, recorder.PARKED), Moment(3.0, recorder.COPIED, 16, 8)]
    assert held.moments(9) == []


def test_the_clock_is_read_for_who_names_no_time() -> None:
    held = Recorder(100)
    held.note(7, "a", 0.5)
    held.note(7, "b")
    held.note(7, "c")
    first, second, third = (moment.at for moment in held.moments(7))
    assert first == 0.5 < second <= third


def test_the_oldest_moments_make_way() -> None:
    held = Recorder(3)
    for number in range(5):
        held.note(number, "a", float(number))
    assert [room for room, _ in held.latest(10)] == [4, 3, 2]
    assert held.moments(1) == []


def test_a_recorder_that_is_off_notes_nothing() -> None:
    held = Recorder(0)
    held.note(7, "a")
    held.follow(7, lambda: [Moment(1.0, "b")])
    assert not held.is_on
    assert held.moments(7) == []
    assert held.latest(10) == []


def test_a_long_reason_is_cut() -> None:
    held = Recorder(3)
    held.note(7, recorder.FAILED, text="x" * 10_000)
    assert len(held.moments(7)[0].text) == 300


def test_what_others_note_is_read_when_somebody_asks() -> None:
    held, noted = Recorder(100), [Moment(2.0, "b")]
    held.note(7, "a", 1.0)
    held.note(7, "c", 3.0)
    held.follow(7, lambda: noted)
    held.follow(7, lambda: [Moment(9.0, "of a second sample")])
    assert [moment.what for moment in held.moments(7)] == ["a", "b", "c"]
    noted.append(Moment(4.0, "d"))
    assert [moment.what for moment in held.moments(7)] == ["a", "b", "c", "d"]


def test_no_more_rooms_are_followed_than_anybody_would_ask_about() -> None:
    held = Recorder(100)
    for room in range(recorder._MOST_FOLLOWED + 5):
        held.follow(room, lambda: [Moment(1.0, "a")])
    assert held.moments(4) == []
    assert held.moments(5) == [Moment(1.0, "a")]
    assert len(held._followed) == recorder._MOST_FOLLOWED


def test_the_latest_rooms_are_those_that_began_last() -> None:
    held = Recorder(100)
    held.note(1, "a", 1.0)
    held.note(2, "a", 2.0)
    held.note(1, "b", 5.0)
    held.note(3, "b", 4.0)
    held.follow(3, lambda: [Moment(1.5, "a")])
    assert held.latest(2) == [(2, 2.0), (3, 1.5)]


def test_reading_while_others_note() -> None:
    held, over = Recorder(50), threading.Event()

    def note() -> None:
        while not over.is_set():
            held.note(7, "a")

    noting = [threading.Thread(target=note) for _ in range(2)]
    for thread in noting:
        thread.start()
    try:
        for _ in range(300):
            assert len(held.moments(7)) <= 50
            held.latest(5)
    finally:
        over.set()
        for thread in noting:
            thread.join()
