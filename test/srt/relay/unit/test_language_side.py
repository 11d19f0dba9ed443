"""The language side finds the room or the peer that something is about, and shares the receive blocks out."""

from collections.abc import Sequence

import msgspec
import pytest

from embedding_relay.protocol.effects import (
    Deliver,
    LanguageEffect,
    Resolve,
    StatusChanged,
)
from embedding_relay.protocol.errors import Failure, LocalError
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import (
    Abort,
    AbortAck,
    Address,
    Pong,
    Queued,
    Register,
    StatusReport,
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
    counted,
    failure_of,
    first_offers,
    language_side,
    language_side_with_proven_peer,
    offer_in,
    only,
    queued,
    register,
    report,
    request_and_resolve,
    sent,
)

# ---- the queue for receive blocks


def test_the_first_offer_is_the_default_or_what_is_free() -> None:
    side = language_side_with_proven_peer(blocks=5, default=10)
    offers = {room: offer_in(side.request(room, PEER, 0.0)) for room in (1, 2)}
    assert {room: (len(o.dst_embedding_indices), o.allocated_tokens) for room, o in offers.items()} == {
        1: (3, 10),
        2: (2, 8),
    }
    assert sent(side.request(3, PEER, 0.0)) == [queued(room=3)]


def test_a_hint_replaces_the_default_and_the_context_length_bounds_it() -> None:
    side = language_side_with_proven_peer(max_rows=12)
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


@pytest.mark.parametrize("how", ["cancelled", "not found"])
def test_with_several_ranks_a_room_that_has_ended_keeps_no_block(how: str) -> None:
    side = language_side(blocks=1, ranks=2)
    side.request(1, SECOND, 0.0)
    assert sent(request_and_resolve(side, 2)) == [register(blocks=1), queued(room=2)]
    effects = side.cancel(1, 0.0) if how == "cancelled" else side.peer_unreachable(SECOND, "connection refused", 0.0)
    assert offer_in(effects).room == 2


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
    side = language_side_with_proven_peer(blocks=8, default=4)
    messages = [message for room in range(1, 8) for message in sent(side.request(room, PEER, 0.0))]
    assert [type(message) for message in messages] == 7 * [TransferEmbeddingInfo]


# ---- what one peer may have


def offered(effects: Sequence[LanguageEffect]) -> list[int]:
    """The rooms of the inits among the effects."""
    return [message.room for message in sent(effects) if isinstance(message, TransferEmbeddingInfo)]


def blocks_offered(effects: Sequence[LanguageEffect]) -> tuple[int, ...]:
    offers = [message for message in sent(effects) if isinstance(message, TransferEmbeddingInfo)]
    return offers[0].dst_embedding_indices if offers else ()


def find_second(side: LanguageSide, *rooms: int, now: float = 0.0) -> list[LanguageEffect]:
    """Rooms are requested from another peer, which is found."""
    for room in rooms:
        side.request(room, SECOND, now)
    return side.peer_resolved(SECOND, Address("other", 1), "encode-2", now)


def test_eight_requests_to_a_dead_data_plane_leave_the_pool_to_a_healthy_peer() -> None:
    """Its control plane lives: rooms are under way until their writes fail, and then nobody acknowledges."""
    side = language_side(blocks=8, default=4)
    assert offered(request_and_resolve(side, *range(1, 9))) == [1]
    assert side.sizes()["held_back"] == 7
    assert offered(find_second(side, 101)) == [101]
    side.receive(report(Status.SUCCESS, 4, room=101), 1.0)
    side.copied(101, 4, 4, 1.0)
    effects = side.receive(StatusReport(1, Status.FAILED, failure=Failure(502, "the write failed")), 2.0)
    assert offered(effects) == [], "no second one while the first is in quarantine"
    served = [room for room in range(102, 110) if offered(side.request(room, SECOND, 3.0))]
    assert len(served) == 7, "everything else"
    assert side.sizes()["blocks_quarantined"] == 1


def test_rooms_of_a_peer_that_never_proves_itself_fail_soon_and_name_it() -> None:
    side = language_side(blocks=8, default=4, timing=msgspec.structs.replace(TIMING, bootstrap=300.0))
    request_and_resolve(side, 1, 2, 3)
    side.receive(StatusReport(1, Status.FAILED, failure=Failure(502, "the write failed")), 0.0)
    failures: list[Failure | None] = []
    for second in range(0, 70, 5):
        side.receive(Pong("encode-1", "encode-1"), float(second))
        for change in only(side.tick(float(second)), StatusChanged):
            failures.append(change.failure)
            assert second >= TIMING.quarantine
    text = f"no receive blocks: encode instance {PEER} has 1 blocks of failed requests in quarantine"
    assert failures == [Failure(502, text)] * 2
    effects = side.request(4, PEER, 70.0)
    assert failure_of(effects) == Failure(502, text), "at once, so that a router can try another"
    assert [type(message) for message in sent(effects)] == [Abort], "the other half need not wait"
    side.receive(AbortAck(1), 71.0)
    assert offered(side.request(5, PEER, 72.0)) == [5], "and now it may try again"


def test_a_room_whose_time_is_up_while_another_one_tries_says_so() -> None:
    side = language_side(blocks=8, default=4, timing=msgspec.structs.replace(TIMING, bootstrap=14.0))
    request_and_resolve(side, 1, 2)
    failure = failure_of(side.tick(14.0))
    assert failure == Failure(
        502, f"no receive blocks within 14 s: encode instance {PEER} has delivered no rows yet, and only room 1 may try"
    )


def test_all_rooms_of_a_peer_go_on_when_it_has_delivered_its_first_rows() -> None:
    side = language_side(blocks=8, default=4)
    request_and_resolve(side, 1, 2, 3)
    side.receive(report(Status.TRANSFERRING, 4, room=1), 0.0)
    effects = side.copied(1, 4, 9, 0.0)
    assert sorted(offered(effects)) == [1, 2, 3]
    assert side.sizes()["held_back"] == 0


def test_rows_that_do_not_add_up_prove_nothing() -> None:
    side = language_side(blocks=8, default=4)
    request_and_resolve(side, 1, 2)
    side.receive(report(Status.TRANSFERRING, 4, room=1), 0.0)
    assert offered(side.copied(1, 3, 9, 0.0)) == []


@pytest.mark.parametrize("instance", ["encode-1", "encode-9"])
def test_an_instance_that_was_lost_or_restarted_proves_itself_again(instance: str) -> None:
    side = language_side_with_proven_peer(blocks=8, default=4)
    side.request(9, PEER, 1.0)
    assert Resolve(PEER) in [effect for now in (6.0, 11.0, 16.0) for effect in side.tick(now)], "silent for too long"
    side.peer_resolved(PEER, ENCODE, instance, 22.0)
    side.receive(AbortAck(9), 22.0)
    assert [bool(offered(side.request(room, PEER, 23.0))) for room in (1, 2, 3)] == [True, False, False]


def test_an_instance_that_had_nothing_to_do_is_looked_up_again_and_need_not_prove_itself() -> None:
    side = language_side_with_proven_peer(blocks=8, default=4)
    now = 2 * TIMING.silence
    for room in (1, 2, 3):
        side.request(room, PEER, now)
    assert offered(side.peer_resolved(PEER, ENCODE, "encode-1", now)) == [1, 2, 3]


def test_an_instance_that_was_replaced_without_being_missed_proves_itself_too() -> None:
    side = language_side_with_proven_peer(blocks=8, default=4)
    side.peer_resolved(PEER, ENCODE, "encode-9", 1.0)
    assert [bool(offered(side.request(room, PEER, 2.0))) for room in (1, 2, 3)] == [True, False, False]


def test_rows_of_the_instance_before_do_not_prove_the_one_that_is_there_now() -> None:
    side = language_side(blocks=8, default=4)
    request_and_resolve(side, 1)
    side.receive(report(Status.SUCCESS, 4, room=1), 0.0)
    side.peer_resolved(PEER, ENCODE, "encode-9", 1.0)
    side.copied(1, 4, 4, 1.0)
    side.receive(AbortAck(1), 1.0)
    assert [bool(offered(side.request(room, PEER, 2.0))) for room in (2, 3)] == [True, False]


def test_the_next_room_tries_when_the_first_ends_or_takes_too_long() -> None:
    """Its other half may never come, and then no rows either."""
    side = language_side(blocks=8, default=4, timing=msgspec.structs.replace(TIMING, bootstrap=300.0, waiting=300.0))
    request_and_resolve(side, 1, 2, 3, 4)
    side.cancel(1, 0.0)
    assert offered(side.receive(AbortAck(1), 0.5)) == [2]
    began: list[tuple[int, float]] = []
    for tenth in range(10, 1000):
        now = tenth / 10
        side.receive(Pong("encode-1", "encode-1"), now)
        began += [(room, now) for room in offered(side.tick(now)) if room in (3, 4) and room not in dict(began)]
    assert [room for room, _ in began] == [3, 4]
    assert 0.5 + TIMING.trial <= began[0][1] <= 0.5 + TIMING.trial + TIMING.longest_repeat_interval
    assert began[0][1] + TIMING.trial <= began[1][1]


def test_a_peer_leaves_an_eighth_of_the_pool_to_others() -> None:
    side = language_side_with_proven_peer(blocks=16, default=4)
    assert sum(bool(offered(side.request(room, PEER, 1.0))) for room in range(1, 20)) == 14
    assert side.sizes()["held_back"] == 5
    assert offered(find_second(side, 100)) == [100]
    side.receive(report(Status.SUCCESS, 4, room=100), 1.0)
    side.copied(100, 4, 4, 1.0)
    assert [bool(offered(side.request(room, SECOND, 1.0))) for room in (101, 102, 103)] == [True, True, False]
    side.receive(report(Status.SUCCESS, 4, room=1), 2.0)
    assert offered(side.copied(1, 4, 4, 2.0)) == [15], "the first of those that wait"


def test_requests_with_many_items_leave_an_eighth_to_those_with_few() -> None:
    side = language_side_with_proven_peer(blocks=16, default=4)
    assert sum(bool(offered(side.request(room, PEER, 1.0, items=5))) for room in range(1, 20)) == 12
    assert side.sizes()["held_back"] == 7
    assert [bool(offered(side.request(room, PEER, 1.0, items=4))) for room in (31, 32, 33)] == [True, True, False]
    assert side.sizes()["held_back"] == 8, "now all that the peer may have is held"
    side.receive(report(Status.SUCCESS, 4, room=31), 2.0)
    assert offered(side.copied(31, 4, 4, 2.0)) == [33], "what one with few had is nothing for those with many"
    side.receive(report(Status.SUCCESS, 4, room=1), 2.0)
    assert offered(side.copied(1, 4, 4, 2.0)) == [13], "the first of those that wait"


def test_those_with_few_items_divide_what_the_others_leave_them() -> None:
    side = language_side_with_proven_peer(blocks=512, default=256)
    many = [len(blocks_offered(side.request(room, PEER, 1.0, items=28))) for room in range(1, 10)]
    assert many == [64] * 6 + [0] * 3
    few = [len(blocks_offered(side.request(room, PEER, 1.0))) for room in range(11, 61)]
    assert few[:4] == [8, 7, 6, 5]
    assert sum(few) <= 64
    assert sum(map(bool, few)) > 20, "many small requests find blocks beside each other"
    assert side.sizes()["blocks_free"] >= 64, "and an eighth is there for other peers"


def test_one_with_many_items_that_grows_leaves_what_is_for_those_with_few() -> None:
    side = language_side_with_proven_peer(blocks=16, default=4)
    for room in range(1, 15):
        side.request(room, PEER, 1.0, items=28)
    side.receive(report(Status.TRANSFERRING, 4, room=1), 1.0)
    assert len(offer_in(side.copied(1, 4, 1000, 1.0)).dst_embedding_indices) == 1
    assert offered(side.request(31, PEER, 2.0)) == [31]


def test_those_with_many_items_leave_an_eighth_whoever_their_peers_are() -> None:
    side = language_side_with_proven_peer(blocks=16, default=4)
    find_second(side, 100)
    side.receive(report(Status.SUCCESS, 4, room=100), 1.0)
    side.copied(100, 4, 4, 1.0)
    first = [bool(offered(side.request(room, PEER, 1.0, items=9))) for room in range(1, 15)]
    second = [bool(offered(side.request(room, SECOND, 1.0, items=9))) for room in range(101, 110)]
    assert (sum(first), sum(second)) == (12, 2)
    assert side.sizes()["held_back"] == 2 + 7
    assert offered(side.request(31, PEER, 1.0)) == [31]
    assert offered(side.request(131, SECOND, 1.0)) == [131]


def test_a_large_request_with_one_item_beside_one_with_many_leaves_an_eighth_of_a_share() -> None:
    side = language_side_with_proven_peer(blocks=512, default=100_000, max_rows=100_000)
    side.request(9, PEER, 1.0, items=9, hint_rows=4)
    offers = [len(blocks_offered(side.request(room, PEER, 1.0))) for room in (1, 2, 3)]
    assert offers == [383, 8, 7]


def test_among_requests_with_few_items_each_has_what_is_left() -> None:
    side = language_side_with_proven_peer(blocks=512, default=256)
    assert [len(blocks_offered(side.request(room, PEER, 1.0))) for room in range(1, 9)] == [64] * 7 + [0]


def test_blocks_of_a_request_with_many_items_that_failed_count_until_they_come_back() -> None:
    side = language_side_with_proven_peer(blocks=16, default=4)
    for room in range(1, 14):
        side.request(room, PEER, 1.0, items=9)
    side.cancel(1, 2.0)
    assert side.sizes()["held_back"] == 1
    assert offered(side.receive(AbortAck(1), 3.0)) == [13]


def test_one_with_many_items_that_leaves_the_queue_holds_nobody_back() -> None:
    side = language_side_with_proven_peer(blocks=16, default=4)
    for room in range(1, 15):
        side.request(room, PEER, 1.0, items=9)
    assert side.sizes()["held_back"] == 2
    side.cancel(14, 2.0)
    assert side.sizes()["held_back"] == 1


def test_growth_stays_within_the_share_and_is_not_stopped_by_rooms_that_are_held_back() -> None:
    side = language_side_with_proven_peer(blocks=16, default=4)
    find_second(side, 100, 101)
    assert side.sizes()["held_back"] == 1, "room 101, until room 100 has rows"
    side.request(1, PEER, 1.0)
    side.receive(report(Status.TRANSFERRING, 4, room=1), 1.0)
    resume = offer_in(side.copied(1, 4, 1000, 1.0))
    assert len(resume.dst_embedding_indices) == 14


def test_a_proven_peer_with_more_than_an_eighth_of_the_pool_in_quarantine_gets_no_more() -> None:
    side = language_side_with_proven_peer(blocks=16, default=4)
    for room in (1, 2, 3):
        side.request(room, PEER, 1.0)
    side.cancel(1, 1.0)
    side.cancel(2, 1.0)
    assert offered(side.request(4, PEER, 2.0)) == [4]
    side.cancel(3, 2.0)
    assert offered(side.request(5, PEER, 2.0)) == []
    assert offered(side.receive(AbortAck(2), 3.0)) == [5]
    for room in (1, 3):
        side.receive(AbortAck(room), 4.0)
    side.cancel(4, 5.0)
    side.cancel(5, 5.0)
    assert offered(side.request(6, PEER, 5.0)) == [6], "what was released counts no more"


def test_rooms_of_a_lost_peer_with_a_quarantine_hold_up_nobody() -> None:
    side = language_side(blocks=8, default=4)
    request_and_resolve(side, 1)
    for now in (5.0, 10.0, 15.0):
        side.tick(now)
    side.request(2, PEER, 16.0)
    assert side.sizes()["blocks_quarantined"] == 1
    assert offered(find_second(side, 101, now=16.0)) == [101]


def test_rooms_of_a_busy_peer_wait_on_although_one_of_its_quarantines_is_overdue() -> None:
    patient = msgspec.structs.replace(TIMING, bootstrap=300.0, waiting=300.0)
    side = language_side_with_proven_peer(blocks=16, default=4, timing=patient)
    for room in range(1, 15):
        side.request(room, PEER, 0.0)
    side.cancel(1, 0.0)
    for second in range(80):
        side.receive(Pong("encode-1", "encode-1"), float(second))
        side.tick(float(second))
    assert side.sizes()["quarantine_overdue"] == 1
    assert sent(side.request(20, PEER, 80.0)) == [queued(room=20)]
    assert side.sizes()["held_back"] == 1, "it has all that one may have"


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


@pytest.mark.parametrize("room", [-1, 1 << 63, 1 << 64])
def test_a_room_that_no_message_can_be_about_is_refused_at_once(room: int) -> None:
    side = language_side()
    failure = Failure(400, f"room {room} is not from 0 to {(1 << 63) - 1}")
    assert side.request(room, PEER, 0.0) == [StatusChanged(room, Status.FAILED, failure)]
    assert side.cancel(room, 0.0) == []
    assert side.sizes()["peers"] == side.sizes()["remembered"] == 0
    assert counted(side) == {400: 1}


def test_the_largest_room_is_served() -> None:
    assert list(first_offers(language_side(), (1 << 63) - 1)) == [(1 << 63) - 1]


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
