"""Rooms that language ranks ask for before their request is here: how many of them an encode rank keeps."""

import msgspec

from embedding_relay.protocol.effects import (
    StatusChanged,
)
from embedding_relay.protocol.encode.unexpected import UnexpectedRooms
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Timing
from support.protocol import (
    ROOM,
    TIMING,
    encode_side,
    encode_side_with,
    offer,
    queued,
    register,
    reported_failures,
)


def test_rooms_that_nobody_expects_are_bounded_in_number_and_the_oldest_ends() -> None:
    side = encode_side(timing=msgspec.structs.replace(TIMING, max_unexpected_rooms=2))
    side.receive(register(), 0.0)
    side.expect(ROOM, 0.0)
    for room in (ROOM, 1, 2):
        side.receive(offer(4, room, room=room), 0.0)
    assert side.sizes()["unexpected"] == 2
    (failure,) = reported_failures(side.receive(offer(4, 3, room=3), 0.0))
    assert failure == Failure(503, "no request of room 1 has come, and too many rooms wait for theirs")
    assert side.expect(2, 0.0) == [StatusChanged(2, Status.WAITING_FOR_INPUT)]
    assert side.sizes()["unexpected"] == 1
    assert side.sizes()["rooms"] == 3


def test_rooms_that_are_only_queued_are_counted_unless_their_request_is_here() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(queued(), 0.0)
    assert side.sizes()["unexpected"] == 0
    side.receive(queued(room=8), 0.0)
    assert side.sizes()["unexpected"] == 1


def test_rooms_that_nobody_expects_are_bounded_in_blocks() -> None:
    side = encode_side(timing=msgspec.structs.replace(TIMING, max_unexpected_blocks=8))
    side.receive(register(), 0.0)
    assert side.receive(offer(4, 0, 1, 2, 3, 4, room=1), 0.0) == []
    assert len(reported_failures(side.receive(offer(4, 0, 1, 2, 3, room=2), 0.0))) == 1
    assert side.sizes()["unexpected"] == 1


def test_all_offers_of_a_room_are_counted_and_go_with_it() -> None:
    unexpected = UnexpectedRooms(Timing(max_unexpected_rooms=9, max_unexpected_blocks=4))
    for room in (1, 2, 1):
        unexpected.add(room, 2)
    assert unexpected.one_too_many() == 1, "six blocks, and room 1 is the oldest"
    unexpected.discard(1)
    unexpected.discard(1)
    assert unexpected.one_too_many() is None
    assert len(unexpected) == 1


def test_as_many_as_are_allowed_are_kept_and_what_has_gone_counts_no_more() -> None:
    unexpected = UnexpectedRooms(Timing(max_unexpected_rooms=2, max_unexpected_blocks=4))
    unexpected.add(1, 2)
    unexpected.add(2, 2)
    assert unexpected.one_too_many() is None
    for room in (1, 2, 3):
        unexpected.discard(room)
    unexpected.add(4, 5)
    assert unexpected.one_too_many() == 4
