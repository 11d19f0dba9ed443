"""Rooms that are over: how long they are remembered, and how many."""

from embedding_relay.protocol.ended import EndedRooms, Ending
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Timing

S, F = Status.SUCCESS, Status.FAILED


def test_ended_rooms_are_forgotten_in_the_order_of_their_ends() -> None:
    ended, failure = EndedRooms(Timing(remember_ended=10.0)), Failure(400, "a bad image")
    assert ended.next() is None
    ended.succeed(1, 0.0, 8)
    ended.fail(2, failure, 5.0)
    assert ended.get(1) == Ending(S, None, 10.0, 8)
    assert ended.next() == 10.0
    ended.forget_due(9.9)
    assert len(ended) == 2
    ended.forget_due(10.0)
    assert ended.get(1) is None
    assert ended.get(2) == Ending(F, failure, 15.0)


def test_the_oldest_of_too_many_ended_rooms_is_forgotten_and_a_second_end_counts_anew() -> None:
    ended = EndedRooms(Timing(max_remembered=2))
    for room in (1, 2, 1, 3):
        ended.succeed(room, float(room), 8)
    assert [ended.get(room) is not None for room in (1, 2, 3)] == [True, False, True]
