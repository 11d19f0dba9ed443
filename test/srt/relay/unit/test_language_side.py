"""The language side finds the room or the peer that something is about, and shares the receive blocks out."""

import pytest

from embedding_relay.protocol.effects import (
    Deliver,
    Resolve,
    StatusChanged,
)
from embedding_relay.protocol.errors import Failure, LocalError
from embedding_relay.protocol.messages import (
    AbortAck,
    Address,
    Pong,
    Queued,
    Register,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Timing
from support.protocol import (
    ENCODE,
    PEER,
    ROOM,
    SECOND,
    TIMING,
    failure_of,
    first_offers,
    language_side,
    offer_in,
    queued,
    register,
    report,
    request_and_resolve,
    sent,
)

# ---- the queue for receive blocks


def test_the_first_offer_is_the_default_or_what_is_free() -> None:
    offers = first_offers(language_side(blocks=5, default=10), 1, 2, 3)
    assert {room: (len(o.dst_embedding_indices), o.allocated_tokens) for room, o in offers.items()} == {
        1: (3, 10),
        2: (2, 8),
    }


def test_a_hint_replaces_the_default_and_the_context_length_bounds_it() -> None:
    side = language_side(max_rows=12)
    request_and_resolve(side)
    (init,) = sent(side.request(8, PEER, 0.0, hint_rows=3))
    assert isinstance(init, TransferEmbeddingInfo)
    assert init.allocated_tokens == 3
    (init,) = sent(side.request(9, PEER, 0.0, hint_rows=100))
    assert isinstance(init, TransferEmbeddingInfo)
    assert init.allocated_tokens == 12


def test_rooms_wait_in_order_and_are_served_as_blocks_come_back() -> None:
    side = language_side(blocks=2)
    assert list(first_offers(side, 1, 2, 3)) == [1]
    assert side.sizes()["waiting_for_blocks"] == 2
    side.receive(report(Status.SUCCESS, 5, room=1), 0.0)
    effects = side.copied(1, 5, 5, 0.0)
    assert effects[:2] == [Deliver(1, 5, 1), StatusChanged(1, Status.SUCCESS)]
    assert offer_in(effects).room == 2


def test_with_several_ranks_a_room_that_is_looked_up_keeps_a_block() -> None:
    side = language_side(blocks=4, ranks=2)
    side.request(0, SECOND, 0.0)
    side.request(1, SECOND, 0.0)
    effects = request_and_resolve(side, 2)
    assert len(offer_in(effects).dst_embedding_indices) == 2, "two are left for rooms 0 and 1"
    assert sent(side.request(3, PEER, 0.0)) == [queued(room=3)]
    effects = side.peer_resolved(SECOND, Address("other", 1), "encode-2", 0.0)
    assert [message.room for message in sent(effects) if isinstance(message, TransferEmbeddingInfo)] == [0]


def test_with_several_ranks_a_cancelled_room_keeps_no_block() -> None:
    side = language_side(blocks=1, ranks=2)
    side.request(1, SECOND, 0.0)
    assert sent(request_and_resolve(side, 2)) == [register(blocks=1), queued(room=2)]
    assert offer_in(side.cancel(1, 0.0)).room == 2


def test_alone_a_rank_serves_whoever_is_ready() -> None:
    side = language_side(blocks=1)
    side.request(1, SECOND, 0.0)
    assert offer_in(request_and_resolve(side, 2)).room == 2


def test_a_room_that_must_wait_for_blocks_says_so_once_and_others_say_nothing() -> None:
    side = language_side(blocks=2)
    assert [type(message) for message in sent(request_and_resolve(side, 1, 2, 3))] == [
        Register,
        TransferEmbeddingInfo,
        Queued,
        Queued,
    ]
    assert sent(side.request(4, PEER, 1.0)) == [queued(room=4)]
    side.receive(report(Status.SUCCESS, 5, room=1), 2.0)
    (init,) = sent(side.copied(1, 5, 5, 2.0))
    assert isinstance(init, TransferEmbeddingInfo)
    assert init.room == 2


def test_there_is_no_extra_message_while_blocks_are_free() -> None:
    side = language_side(blocks=8, default=4)
    messages = [type(message) for message in sent(request_and_resolve(side, 1, 2))]
    for room in range(3, 9):
        messages += [type(message) for message in sent(side.request(room, PEER, 0.0))]
    assert messages == [Register] + 8 * [TransferEmbeddingInfo]


# ---- from this instance


def test_a_room_is_requested_once() -> None:
    side = language_side()
    request_and_resolve(side)
    with pytest.raises(LocalError, match="under way already"):
        side.request(ROOM, PEER, 0.0)
    side.cancel(ROOM, 0.0)
    used = Failure(409, f"room {ROOM} was used before")
    assert side.request(ROOM, PEER, 0.0) == [StatusChanged(ROOM, Status.FAILED, used)], "its quarantine is not over"
    side.receive(AbortAck(ROOM), 0.0)
    assert failure_of(side.request(ROOM, PEER, 0.0)) == used
    side.tick(TIMING.remember_ended)
    assert failure_of(side.request(ROOM, PEER, TIMING.remember_ended)) is None


def test_cancelling_tells_the_encode_side_why() -> None:
    side = language_side()
    request_and_resolve(side)
    assert failure_of(side.cancel(ROOM, 0.0)) == Failure(499, f"the client of room {ROOM} is gone")
    assert side.cancel(ROOM, 0.0) == []
    assert side.cancel(99, 0.0) == []


def test_only_so_many_ended_rooms_are_remembered() -> None:
    side = language_side(timing=Timing(max_remembered=3))
    for room in range(5):
        side.request(room, PEER, 0.0)
        side.cancel(room, 0.0)
    side.peer_unreachable(PEER, "connection refused", 0.0)
    assert side.sizes()["remembered"] == 3
    assert side.request(0, PEER, 0.0) == [Resolve(PEER)]


def test_a_copy_that_nobody_asked_for_is_our_own_mistake() -> None:
    side = language_side()
    for answer in (lambda: side.copied(ROOM, 8, 8, 0.0), lambda: side.copy_failed(ROOM, "no memory", 0.0)):
        with pytest.raises(LocalError, match=f"room {ROOM} has no rows to be copied"):
            answer()


# ---- about peers


def test_answers_about_unknown_peers_are_ignored() -> None:
    side = language_side()
    assert side.peer_resolved(PEER, ENCODE, "encode-1", 0.0) == []
    assert side.peer_unreachable(PEER, "", 0.0) == []
    assert side.peer_dead(PEER, 0.0) == []
    assert side.receive(Pong("encode-9", "encode-8"), 0.0) == []
    side.request(ROOM, PEER, 0.0)
    side.cancel(ROOM, 0.0)
    assert side.sizes()["peers"] == 1, "its lookup is still under way"
    assert side.peer_unreachable(PEER, "connection refused", 0.0) == []
    assert side.sizes()["peers"] == 0
