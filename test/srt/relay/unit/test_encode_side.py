"""The encode side finds the room or the session that a message is about: who is answered, and what they are told."""

import msgspec
import pytest

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import (
    DropRows,
    Send,
    StatusChanged,
    TransferEmbeddingChunk,
)
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.errors import Failure, LocalError
from embedding_relay.protocol.messages import (
    Abort,
    AbortAck,
    Address,
    Ping,
    Pong,
    Queued,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from support.protocol import (
    BLOCK,
    KNOWN_AT,
    RIVAL_AT,
    ROOM,
    SESSION,
    TIMING,
    counted,
    encode_side,
    encode_side_that_writes,
    encode_side_with,
    failure_of,
    handshake,
    offer,
    only,
    ping,
    queued,
    register,
    reported_failures,
    sent,
)

# ---- messages that are about no room under way


def test_a_session_must_register_first() -> None:
    side = encode_side()
    (failure,) = reported_failures(side.receive(offer(8), 0.0))
    assert failure == Failure(421, "session language-0:1 is not registered here")
    assert side.is_empty()


def test_a_resume_of_an_unknown_room_is_answered() -> None:
    side = encode_side_with()
    (failure,) = reported_failures(side.receive(offer(8, 0, 1, sent=8), 0.0))
    assert failure == Failure(502, f"room {ROOM} is not under way at this encode instance")


@pytest.mark.parametrize("message", [queued(), offer(8), offer(8, sent=8)])
def test_who_asks_one_rank_for_the_room_of_another_is_told_so_at_once(message: Queued | TransferEmbeddingInfo) -> None:
    side = EncodeSide(handshake=handshake(), instance="encode-1", pool=BlockPool(8), timing=TIMING, rank=0, ranks=2)
    side.receive(register(0), 0.0)
    (failure,) = reported_failures(side.receive(message, 0.0))
    assert failure == Failure(502, f"room {ROOM} is at rank 1 of this encode instance, and rank 0 was asked")
    assert side.is_empty()


def test_an_abort_is_acknowledged_by_whichever_rank_has_it() -> None:
    """It holds nothing up, and whoever asked the wrong rank must get its blocks back."""
    side = EncodeSide(handshake=handshake(), instance="encode-1", pool=BlockPool(8), timing=TIMING, rank=0, ranks=2)
    side.receive(register(0), 0.0)
    assert AbortAck(ROOM) in sent(side.receive(Abort(ROOM, KNOWN_AT, SESSION), 0.0))


def test_a_rank_too_many_is_turned_away_and_the_room_goes_on() -> None:
    side = encode_side_with(0, 1)
    side.receive(offer(8, 0, 1), 0.0)
    (failure,) = reported_failures(side.receive(offer(8, 0, 1, rank=1), 0.0))
    assert "has all of its 1 destinations" in failure.text
    assert not side.is_empty()


def test_the_first_message_about_a_room_is_answered_at_once_if_something_is_wrong() -> None:
    side = encode_side()
    misdirected = Failure(421, "session language-0:1 is not registered here")
    assert reported_failures(side.receive(queued(), 0.0)) == [misdirected]
    assert side.is_empty()
    side.receive(register(0, block_size=64), 0.0)
    side.expect(ROOM, 0.0)
    effects = side.receive(queued(), 0.0)
    (failure,) = reported_failures(effects)
    assert (failure.code, failure_of(effects)) == (500, failure)
    assert reported_failures(side.receive(queued(), 0.0)) == [failure]
    side = encode_side_with()
    side.receive(queued(), 0.0)
    refusal = Failure(400, "the image cannot be decoded")
    assert reported_failures(side.refuse(ROOM, refusal, 1.0)) == [refusal]


def test_an_abort_that_overtakes_its_init_keeps_the_room_from_beginning() -> None:
    side = encode_side_with()
    who = register()
    assert sent(side.receive(Abort(ROOM, who.address, who.session_id), 0.0)) == [AbortAck(ROOM)]
    assert [failure.code for failure in reported_failures(side.receive(offer(8, 0, 1), 1.0))] == [499]
    assert failure_of(side.expect(ROOM, 2.0)) is not None
    assert side.submit(ROOM, 20, 3.0) == [DropRows(ROOM)]


def test_a_ping_is_answered_with_who_is_here_and_who_was_asked() -> None:
    side = encode_side()
    assert side.receive(Ping(Address("l", 5), "nobody:1", "encode-0"), 0.0) == [
        Send(Address("l", 5), Pong("encode-1", "encode-0"), to_stranger=True)
    ]


def test_answers_to_strangers_are_marked_and_what_a_request_needs_is_not() -> None:
    side = encode_side_with(0, 1)
    assert [answer.to_stranger for answer in only(side.receive(offer(8, 0, 1, room=666), 0.0), Send)] == []
    keep = Ping(KNOWN_AT, SESSION, "encode-1")
    assert [answer.to_stranger for answer in only(side.receive(keep, 0.0), Send)] == [True], "no request of its is here"
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    assert [answer.to_stranger for answer in only(side.receive(keep, 0.0), Send)] == [False]
    assert [answer.to_stranger for answer in only(side.receive(offer(8, 0, 1, rank=1), 0.0), Send)] == [True]
    assert [answer.to_stranger for answer in only(side.refuse(666, Failure(400, "bad"), 0.0), Send)] == [True]
    assert [answer.to_stranger for answer in only(side.refuse(ROOM, Failure(400, "bad"), 0.0), Send)] == [False]
    assert [answer.to_stranger for answer in only(side.receive(keep, 0.0), Send)] == [True]


def test_who_asks_in_vain_for_a_room_is_not_answered_at_the_address_of_one_of_its_ranks() -> None:
    """The rank there would take the answer for one about its own room, and end it."""
    side = encode_side_with(0, 1)
    for rank in (0, 1):
        side.receive(offer(8, 0, 1, rank=rank, ranks=2), 0.0)
    for message in (
        Queued(ROOM, KNOWN_AT, "stranger:1"),
        msgspec.structs.replace(offer(8, 0), mooncake_session_id="s:1"),
    ):
        assert side.receive(message, 0.0) == []
    (failure,) = reported_failures(side.receive(Queued(ROOM, RIVAL_AT, "stranger:1"), 0.0))
    assert failure.code == 421
    assert counted(side) == {"offer_turned_away": 3}


def test_a_room_is_settled_when_all_of_its_ranks_have_asked_or_it_is_over() -> None:
    side = encode_side_with(0, 1)
    assert not side.is_settled(ROOM)
    side.receive(offer(8, 0, 1, rank=0, ranks=2), 0.0)
    assert not side.is_settled(ROOM)
    side.receive(offer(8, 0, 1, rank=1, ranks=2), 0.0)
    assert side.is_settled(ROOM)
    side.refuse(ROOM, Failure(400, "bad"), 0.0)
    assert side.is_settled(ROOM)


@pytest.mark.parametrize("room", [-1, 1 << 63, 1 << 64])
def test_a_room_that_no_message_can_be_about_is_refused_at_once(room: int) -> None:
    side = encode_side_with()
    failure = Failure(400, f"room {room} is not from 0 to {(1 << 63) - 1}")
    assert side.expect(room, 0.0) == [StatusChanged(room, Status.FAILED, failure)]
    assert side.submit(room, 8, 0.0) == [DropRows(room)], "the tower was quicker than the refusal"
    assert side.refuse(room, Failure(499, "gone"), 0.0) == []
    assert side.is_empty()
    assert side.sizes()["remembered"] == 0
    assert counted(side) == {400: 1}


# ---- rooms that are over


def test_a_refusal_reaches_the_language_side_also_if_it_asks_later() -> None:
    side = encode_side_with()
    failure = Failure(400, "the image cannot be decoded")
    side.receive(offer(8, 0, 1, room=1), 0.0)
    assert reported_failures(side.refuse(1, failure, 0.0)) == [failure]
    assert side.refuse(2, failure, 0.0) == []
    assert reported_failures(side.receive(offer(8, 0, 1, room=2), 0.0)) == [failure]
    assert side.expect(2, 0.0) == [StatusChanged(2, Status.FAILED, failure)]


def test_an_ended_room_cannot_be_used_again_until_it_is_forgotten() -> None:
    side, chunk = encode_side_that_writes(total=8)
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    assert reported_failures(side.receive(offer(4, 0), 1.0)) == [Failure(409, f"room {ROOM} was used before")]
    assert side.receive(offer(8, 0, 1, sent=8), 1.0) == []
    assert side.expect(ROOM, 1.0) == [StatusChanged(ROOM, Status.SUCCESS)], "a late sample of n > 1"
    side.tick(TIMING.remember_ended)
    assert side.expect(ROOM, 1000.0) == []


def test_a_refusal_of_a_room_that_is_over_changes_nothing() -> None:
    side = encode_side_with()
    first = Failure(400, "the image cannot be decoded")
    side.refuse(ROOM, first, 0.0)
    assert side.refuse(ROOM, Failure(500, "later"), 1.0) == []
    assert reported_failures(side.receive(offer(8, 0, 1), 2.0)) == [first]
    assert counted(side) == {400: 1, "offer_for_ended_room": 1}


# ---- the queue for source blocks, and the transport


def test_rooms_wait_for_source_blocks_in_order_and_hold_none_meanwhile() -> None:
    side = encode_side_with(blocks=1)
    chunks = {}
    for room in (1, 2, 3):
        side.expect(room, 0.0)
        side.receive(offer(4, room, room=room), 0.0)
        chunks[room] = only(side.submit(room, 4, 0.0), TransferEmbeddingChunk)
    assert [len(chunks[room]) for room in (1, 2, 3)] == [1, 0, 0]
    assert side.sizes()["waiting_for_blocks"] == 2
    (second,) = only(side.transferred(1, 1, {}, 0.0), TransferEmbeddingChunk)
    assert second.room == 2
    side.refuse(3, Failure(499, "gone"), 0.0)
    side.transferred(2, second.transfer_id, {}, 0.0)
    assert side.sizes()["blocks_free"] == 1
    assert side.is_empty()


@pytest.mark.parametrize("how", ["aborted", "out of time"])
def test_source_blocks_of_a_room_that_ends_go_to_the_next(how: str) -> None:
    side = encode_side_with(blocks=1)
    for room in (1, 2):
        side.expect(room, 0.0)
        side.receive(offer(4, room, room=room), 0.0)
        for chunk in only(side.submit(room, 8, float(room)), TransferEmbeddingChunk):
            side.transferred(room, chunk.transfer_id, {}, 1.0)
    ping(side, 61.0)
    effects = side.receive(Abort(1, KNOWN_AT, SESSION), 61.0) if how == "aborted" else side.tick(61.0)
    (chunk,) = only(effects, TransferEmbeddingChunk)
    assert chunk.room == 2


def test_wrong_use_by_the_transport_is_refused() -> None:
    side, chunk = encode_side_that_writes()
    with pytest.raises(LocalError, match="has no transfer 99"):
        side.transferred(ROOM, 99, {}, 0.0)
    with pytest.raises(LocalError, match="room 8 has no transfer"):
        side.transferred(8, chunk.transfer_id, {}, 0.0)
    with pytest.raises(LocalError, match="with 0 rows"):
        side.submit(8, 0, 0.0)


def test_sizes_and_counts_have_names() -> None:
    side, _ = encode_side_that_writes()
    assert side.sizes() == {
        "rooms": 1,
        "unexpected": 0,
        "waiting_for_blocks": 0,
        "transfers": 1,
        "remembered": 0,
        "sessions": 1,
        "contenders": 0,
        "unquiet": 0,
        "blocks_free": 8 - 20 // BLOCK,
        "blocks_leased": 20 // BLOCK,
        "blocks_quarantined": 0,
    }
    side.refuse(ROOM, Failure(400, "bad"), 0.0)
    assert counted(side) == {400: 1}
