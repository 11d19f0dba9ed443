"""The language side alone: the queue, offers and growth, what reports mean, peers, and the quarantine."""

import pytest

from embedding_relay.protocol.effects import (
    CopyOut,
    Deliver,
    LanguageEffect,
    Note,
    Resolve,
    Send,
    StatusChanged,
)
from embedding_relay.protocol.errors import Failure, LocalError
from embedding_relay.protocol.language.reserve import DefaultReservation
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import (
    Abort,
    AbortAck,
    Address,
    Ping,
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
    ROOM,
    TIMING,
    counted,
    failure_of,
    language_side,
    only,
    queued,
    register,
    sent,
)

PEER = "registry:80"
SECOND = "registry2:80"


def resolved(side: LanguageSide, *rooms: int, now: float = 0.0) -> list[LanguageEffect]:
    for room in rooms or (ROOM,):
        side.request(room, PEER, now)
    return side.peer_resolved(PEER, ENCODE, "encode-1", now)


def offered(side: LanguageSide, *rooms: int) -> dict[int, TransferEmbeddingInfo]:
    """What each room has on offer after its init."""
    offers = [message for message in sent(resolved(side, *rooms)) if isinstance(message, TransferEmbeddingInfo)]
    return {offer.room: offer for offer in offers}


def report(status: Status, rows: int | None, room: int = ROOM) -> StatusReport:
    return StatusReport(room, status, rows)


def copied_chunk(side: LanguageSide, rows: int, total: int, now: float = 0.0) -> list[LanguageEffect]:
    """A chunk arrives that ends at `rows`, and is copied out."""
    last = rows == total
    effects = side.receive(report(Status.SUCCESS if last else Status.TRANSFERRING, rows), now)
    (copy,) = only(effects, CopyOut)
    return side.copied(ROOM, min(copy.capacity, total - copy.first_row), total, now)


def resume_in(effects: list[LanguageEffect]) -> TransferEmbeddingInfo:
    (resume,) = [message for message in sent(effects) if isinstance(message, TransferEmbeddingInfo)]
    return resume


# ---- the beginning


def test_the_peer_is_looked_up_first_while_nothing_is_held() -> None:
    side = language_side()
    assert side.request(1, PEER, 0.0) == [Resolve(PEER)]
    assert side.request(2, PEER, 0.0) == [], "one lookup serves both"
    assert side.sizes()["blocks_leased"] == 0
    effects = side.peer_resolved(PEER, ENCODE, "encode-1", 0.0)
    assert effects[:2] == [
        Send(ENCODE, register()),
        Send(ENCODE, TransferEmbeddingInfo(1, "language", 100, "language-0:1", (0, 1), 1, 0, 8)),
    ]
    assert effects[2] == StatusChanged(1, Status.WAITING_FOR_INPUT)
    assert [type(message) for message in sent(effects)].count(Register) == 1
    assert [message.room for message in sent(side.request(3, PEER, 1.0))] == [3]  # type: ignore[attr-defined]


def test_the_first_offer_is_the_default_or_what_is_free() -> None:
    offers = offered(language_side(blocks=5, default=10), 1, 2, 3)
    assert {room: (len(o.dst_embedding_indices), o.allocated_tokens) for room, o in offers.items()} == {
        1: (3, 10),
        2: (2, 8),
    }


def test_a_hint_replaces_the_default_and_the_context_length_bounds_it() -> None:
    side = language_side(max_rows=12)
    resolved(side)
    (init,) = sent(side.request(8, PEER, 0.0, hint_rows=3))
    assert isinstance(init, TransferEmbeddingInfo)
    assert init.allocated_tokens == 3
    (init,) = sent(side.request(9, PEER, 0.0, hint_rows=100))
    assert isinstance(init, TransferEmbeddingInfo)
    assert init.allocated_tokens == 12


def test_rooms_wait_in_order_and_are_served_as_blocks_come_back() -> None:
    side = language_side(blocks=2)
    assert list(offered(side, 1, 2, 3)) == [1]
    assert side.sizes()["waiting_for_blocks"] == 2
    side.receive(report(Status.SUCCESS, 5, room=1), 0.0)
    effects = side.copied(1, 5, 5, 0.0)
    assert effects[:2] == [Deliver(1, 5, 1), StatusChanged(1, Status.SUCCESS)]
    assert resume_in(effects).room == 2


def test_a_room_is_requested_once() -> None:
    side = language_side()
    resolved(side)
    with pytest.raises(LocalError, match="under way already"):
        side.request(ROOM, PEER, 0.0)
    side.cancel(ROOM, 0.0)
    used = Failure(409, f"room {ROOM} was used before")
    assert side.request(ROOM, PEER, 0.0) == [StatusChanged(ROOM, Status.FAILED, used)], "its quarantine is not over"
    side.receive(AbortAck(ROOM), 0.0)
    assert failure_of(side.request(ROOM, PEER, 0.0)) == used
    side.tick(TIMING.remember_ended)
    assert failure_of(side.request(ROOM, PEER, TIMING.remember_ended)) is None


def test_with_several_ranks_a_room_that_is_looked_up_keeps_a_block() -> None:
    side = language_side(blocks=4, ranks=2)
    side.request(0, SECOND, 0.0)
    side.request(1, SECOND, 0.0)
    effects = resolved(side, 2)
    assert len(resume_in(effects).dst_embedding_indices) == 2, "two are left for rooms 0 and 1"
    assert sent(side.request(3, PEER, 0.0)) == [queued(room=3)]
    effects = side.peer_resolved(SECOND, Address("other", 1), "encode-2", 0.0)
    assert [message.room for message in sent(effects) if isinstance(message, TransferEmbeddingInfo)] == [0]


def test_with_several_ranks_a_cancelled_room_makes_way() -> None:
    side = language_side(blocks=1, ranks=2)
    side.request(1, SECOND, 0.0)
    assert sent(resolved(side, 2)) == [register(blocks=1), queued(room=2)]
    assert resume_in(side.cancel(1, 0.0)).room == 2


def test_alone_a_rank_serves_whoever_is_ready() -> None:
    side = language_side(blocks=1)
    side.request(1, SECOND, 0.0)
    assert resume_in(resolved(side, 2)).room == 2


# ---- the queue, as the encode side sees it


def test_a_room_that_must_wait_for_blocks_says_so_once_and_others_say_nothing() -> None:
    side = language_side(blocks=2)
    assert [type(message) for message in sent(resolved(side, 1, 2, 3))] == [
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
    messages = [type(message) for message in sent(resolved(side, 1, 2))]
    for room in range(3, 9):
        messages += [type(message) for message in sent(side.request(room, PEER, 0.0))]
    assert messages == [Register] + 8 * [TransferEmbeddingInfo]


def waiting_room(room: int = 8) -> LanguageSide:
    """Another peer's room has all blocks, so that this peer has nothing but a room that waits."""
    side = language_side(blocks=2)
    side.request(1, SECOND, 0.0)
    side.peer_resolved(SECOND, Address("other", 1), "encode-2", 0.0)
    assert sent(resolved(side, room)) == [register(blocks=2), queued(room=room)]
    return side


def test_a_peer_of_queued_rooms_alone_is_pinged_and_missed() -> None:
    side = waiting_room()
    for now in (5.0, 10.0):
        assert [send.to for send in only(side.tick(now), Send)] == [Address("other", 1), ENCODE]
        side.receive(Pong("encode-2", "encode-2"), now)
    effects = side.tick(15.0)
    assert Resolve(PEER) in effects
    assert failure_of(effects) is None, "it may be only slow"
    side.receive(Pong("encode-2", "encode-2"), 15.0)
    (ping,) = side.tick(20.0)
    assert isinstance(ping, Send)
    assert ping.to == Address("other", 1), "that it is lost is said once"
    assert failure_of(side.peer_unreachable(PEER, "connection refused", 16.0)) == Failure(
        502, f"encode instance {PEER} cannot be found: connection refused"
    )
    assert side.sizes()["waiting_for_blocks"] == 0


def test_a_peer_of_queued_rooms_alone_is_watched_and_need_not_be_looked_up() -> None:
    assert waiting_room().request(9, PEER, 20.0) == [Send(ENCODE, queued(room=9))]


@pytest.mark.parametrize("instance", ["encode-1", "encode-9"])
def test_a_peer_that_is_found_again_is_told_again(instance: str) -> None:
    side = waiting_room()
    for now in (5.0, 10.0, 15.0):
        side.tick(now)
    assert sent(side.peer_resolved(PEER, ENCODE, instance, 16.0)) == [register(blocks=2), queued(room=8)]


def test_a_peer_that_was_restarted_is_told_of_the_rooms_that_wait_for_it() -> None:
    side = waiting_room()
    assert side.receive(Pong("encode-9", "encode-1"), 1.0) == [Resolve(PEER)]
    where = Address("encode", 2)
    effects = side.peer_resolved(PEER, where, "encode-9", 2.0)
    assert effects == [Send(where, register(blocks=2)), Send(where, queued(room=8))]
    assert sent(side.peer_resolved(PEER, where, "encode-9", 3.0)) == []
    assert sent(side.peer_resolved(PEER, ENCODE, "encode-10", 3.0)) == [register(blocks=2), queued(room=8)]


def test_a_queued_room_ends_with_its_other_half_and_nobody_is_told() -> None:
    side = waiting_room()
    failure = Failure(400, "the image cannot be decoded")
    failed = StatusReport(8, Status.FAILED, failure=failure)
    assert side.receive(failed, 1.0) == [StatusChanged(8, Status.FAILED, failure)]
    assert side.sizes()["waiting_for_blocks"] == 0
    assert side.receive(failed, 1.0) == []
    assert failure_of(side.request(8, PEER, 2.0)) == Failure(409, "room 8 was used before")


def test_what_cannot_be_meant_for_a_queued_room_is_ignored() -> None:
    side = waiting_room()
    for message in (report(Status.TRANSFERRING, None, 8), report(Status.SUCCESS, 5, 8), AbortAck(8)):
        assert side.receive(message, 1.0) == []
    side.request(9, "registry3:80", 1.0)
    failed = StatusReport(9, Status.FAILED, failure=Failure(400, "of old"))
    assert side.receive(failed, 1.0) == [], "nobody has been asked for room 9"
    assert counted(side) == {"status_stale": 2, "ack_ignored": 1, "message_for_unknown_room": 1}


def test_a_queued_room_of_a_forgotten_session_is_announced_again_once() -> None:
    side = waiting_room()
    misdirected = StatusReport(8, Status.FAILED, failure=Failure(421, "who are you?"))
    assert side.receive(misdirected, 0.0) == [Send(ENCODE, register(blocks=2)), Send(ENCODE, queued(room=8))]
    effects = side.receive(misdirected, 0.0)
    assert failure_of(effects) == Failure(502, "who are you?")
    assert [type(message) for message in sent(effects)] == [Abort], "the other half does not know"


def test_a_queued_room_of_a_lost_peer_is_announced_when_it_is_found() -> None:
    side = waiting_room()
    side.receive(Pong("encode-9", "encode-1"), 1.0)
    misdirected = StatusReport(8, Status.FAILED, failure=Failure(421, "who are you?"))
    assert side.receive(misdirected, 1.0) == []
    assert sent(side.peer_resolved(PEER, ENCODE, "encode-9", 2.0)) == [register(blocks=2), queued(room=8)]


def test_an_init_behind_a_first_word_may_be_misdirected_with_it() -> None:
    """Both were on their way when the encode side answered the first that it has forgotten the session."""
    side = language_side(blocks=2)
    resolved(side, 1, ROOM)
    side.receive(report(Status.SUCCESS, 5, room=1), 0.0)
    init = resume_in(side.copied(1, 5, 5, 0.0))
    misdirected = StatusReport(ROOM, Status.FAILED, failure=Failure(421, "who are you?"))
    again = [Send(ENCODE, register(blocks=2)), Send(ENCODE, init)]
    assert side.receive(misdirected, 0.0) == again
    assert side.receive(misdirected, 0.0) == again
    assert failure_of(side.receive(misdirected, 0.0)) == Failure(502, "who are you?")


# ---- rows


def test_one_transfer_of_everything() -> None:
    side = language_side()
    resolved(side)
    assert side.receive(report(Status.SUCCESS, 8), 0.0) == [CopyOut(ROOM, (0, 1), 0, 8, 1000)]
    assert side.copied(ROOM, 8, 8, 0.0) == [Deliver(ROOM, 8, 1), StatusChanged(ROOM, Status.SUCCESS)]
    assert side.is_empty()
    assert side.sizes()["blocks_free"] == 8


def test_a_resume_says_how_far_it_got_and_what_there_is_room_for() -> None:
    side = language_side()
    resolved(side)
    effects = side.receive(report(Status.TRANSFERRING, 8), 0.0)
    assert effects == [StatusChanged(ROOM, Status.TRANSFERRING), CopyOut(ROOM, (0, 1), 0, 8, 1000)]
    resume = resume_in(side.copied(ROOM, 8, 20, 0.0))
    assert (resume.sent_tokens, resume.allocated_tokens, len(resume.dst_embedding_indices)) == (8, 12, 3)
    assert side.receive(report(Status.TRANSFERRING, 8), 0.0) == [], "the same report again"
    effects = side.receive(report(Status.SUCCESS, 20), 0.0)
    assert effects == [CopyOut(ROOM, resume.dst_embedding_indices, 8, 12, 1000)]
    assert only(side.copied(ROOM, 12, 20, 0.0), Deliver) == [Deliver(ROOM, 20, 2)]


def test_reports_without_rows_do_as_long_as_none_is_repeated() -> None:
    side = language_side()
    resolved(side)
    side.receive(report(Status.TRANSFERRING, None), 0.0)
    assert side.receive(report(Status.TRANSFERRING, None), 0.0) == [], "while it is being copied"
    assert resume_in(side.copied(ROOM, 8, 9, 0.0)).sent_tokens == 8
    assert only(side.receive(report(Status.SUCCESS, None), 0.0), CopyOut)
    assert only(side.copied(ROOM, 1, 9, 0.0), Deliver)


@pytest.mark.parametrize(("total", "blocks"), [(9, 1), (12, 1), (13, 2), (16, 2), (17, 3), (1000, 7)])
def test_a_resume_has_no_more_blocks_than_it_needs_and_leaves_one(total: int, blocks: int) -> None:
    side = language_side()
    resolved(side)
    assert len(resume_in(copied_chunk(side, 8, total)).dst_embedding_indices) == blocks


def test_nothing_grows_while_somebody_waits_and_nobody_waits_for_growth() -> None:
    side = language_side(blocks=2)
    resolved(side, ROOM, 8)
    resume = resume_in(copied_chunk(side, 8, 100))
    assert resume.room == ROOM
    assert len(resume.dst_embedding_indices) == 2


def test_blocks_that_are_not_needed_any_more_go_to_who_waits() -> None:
    side = language_side(blocks=2)
    resolved(side, ROOM, 8)
    first, second = (m for m in sent(copied_chunk(side, 8, 9)) if isinstance(m, TransferEmbeddingInfo))
    assert (first.room, len(first.dst_embedding_indices)) == (ROOM, 1)
    assert (second.room, len(second.dst_embedding_indices)) == (8, 1)


@pytest.mark.parametrize(
    ("status", "rows"),
    [(Status.TRANSFERRING, 7), (Status.TRANSFERRING, 9), (Status.SUCCESS, 9)],
)
def test_a_report_that_contradicts_the_offer_fails_the_room(status: Status, rows: int) -> None:
    side = language_side()
    resolved(side)
    failure = failure_of(side.receive(report(status, rows), 0.0))
    assert failure == Failure(502, f"room {ROOM} is said to have {rows} rows, but rows 0..8 were on offer")


@pytest.mark.parametrize(
    ("status", "reported", "rows", "total", "code"),
    [
        (Status.TRANSFERRING, 8, 8, 8, 502),
        (Status.TRANSFERRING, 8, 7, 20, 502),
        (Status.TRANSFERRING, 8, 5, 5, 502),
        (Status.SUCCESS, 8, 8, 20, 502),
        (Status.SUCCESS, 7, 8, 8, 502),
        (Status.SUCCESS, 8, 7, 8, 502),
        (Status.SUCCESS, None, 8, 9, 502),
        (Status.SUCCESS, 8, 0, 0, 502),
        (Status.SUCCESS, 8, 0, -5, 502),
        (Status.TRANSFERRING, 8, 0, 1001, 400),
    ],
)
def test_what_does_not_add_up_never_reaches_the_model(
    status: Status, reported: int | None, rows: int, total: int, code: int
) -> None:
    side = language_side()
    resolved(side)
    side.receive(report(status, reported), 0.0)
    effects = side.copied(ROOM, rows, total, 0.0)
    failure = failure_of(effects)
    assert failure is not None
    assert failure.code == code
    assert [type(message) for message in sent(effects)] == [Abort]
    assert not only(effects, Deliver)
    assert side.sizes()["blocks_quarantined"] == 2


def test_the_true_length_may_not_change() -> None:
    side = language_side()
    resolved(side)
    copied_chunk(side, 8, 20)
    side.receive(report(Status.SUCCESS, 19), 0.0)
    assert failure_of(side.copied(ROOM, 11, 19, 0.0)) == Failure(
        502, f"room {ROOM} has 19 rows, and 20 were announced before"
    )


def test_a_copy_that_fails_fails_the_room() -> None:
    side = language_side()
    resolved(side)
    side.receive(report(Status.SUCCESS, 8), 0.0)
    assert failure_of(side.copy_failed(ROOM, "no memory", 0.0)) == Failure(
        500, f"the rows of room {ROOM} could not be copied: no memory"
    )
    with pytest.raises(LocalError, match="no rows to be copied"):
        side.copied(ROOM, 8, 8, 0.0)


# ---- quarantine


def failed_room(side: LanguageSide) -> list[LanguageEffect]:
    resolved(side)
    return side.receive(StatusReport(ROOM, Status.FAILED, failure=Failure(502, "the write failed")), 0.0)


def test_blocks_of_a_failed_room_are_free_only_when_the_writer_says_so() -> None:
    side = language_side()
    effects = failed_room(side)
    failure = Failure(502, "the write failed")
    assert effects == [
        StatusChanged(ROOM, Status.FAILED, failure),
        Send(ENCODE, Abort(ROOM, Address("language", 100), "language-0:1", failure)),
    ]
    assert side.sizes()["blocks_quarantined"] == 2
    assert side.receive(report(Status.SUCCESS, 8), 0.0) == []
    assert side.receive(AbortAck(ROOM), 0.0) == []
    assert side.sizes()["blocks_free"] == 8
    assert side.receive(AbortAck(ROOM), 0.0) == []
    assert counted(side) == {502: 1, "status_stale": 1, "message_for_unknown_room": 1}


def test_an_abort_is_repeated_ever_more_slowly_and_the_quarantine_is_reported_once() -> None:
    side = language_side()
    failed_room(side)
    aborts, notes = [], []
    for second in range(200):
        side.receive(Pong("encode-1", "encode-1"), float(second))
        effects = side.tick(float(second))
        aborts += [second for message in sent(effects) if isinstance(message, Abort)]
        notes += only(effects, Note)
    assert aborts == [1, 3, 7, 15, 31, 63, 95, 127, 159, 191]
    assert notes == [
        Note(f"2 blocks of room {ROOM} stay in quarantine: {PEER} has not acknowledged its abort for 63 s")
    ]
    assert side.sizes()["quarantine_overdue"] == 1
    assert side.sizes()["blocks_quarantined"] == 2


def test_blocks_that_are_being_read_are_not_free_either() -> None:
    side = language_side()
    resolved(side)
    side.receive(report(Status.TRANSFERRING, 8), 0.0)
    side.cancel(ROOM, 0.0)
    assert side.receive(AbortAck(ROOM), 0.0) == []
    assert side.sizes()["blocks_quarantined"] == 2
    assert side.copied(ROOM, 8, 20, 0.0) == []
    assert side.sizes()["blocks_free"] == 8
    assert side.is_empty()


def test_a_copy_that_fails_after_the_room_has_ended_only_frees_its_blocks() -> None:
    side = language_side()
    resolved(side)
    side.receive(report(Status.TRANSFERRING, 8), 0.0)
    side.cancel(ROOM, 0.0)
    side.receive(AbortAck(ROOM), 0.0)
    assert side.copy_failed(ROOM, "no memory", 0.0) == []
    assert side.is_empty()


def test_cancelling_tells_the_encode_side_why() -> None:
    side = language_side()
    resolved(side)
    assert failure_of(side.cancel(ROOM, 0.0)) == Failure(499, f"the client of room {ROOM} is gone")
    assert side.cancel(ROOM, 0.0) == []
    assert side.cancel(99, 0.0) == []


def test_a_room_that_leaves_the_queue_tells_a_known_peer_but_waits_for_no_answer() -> None:
    side = language_side(blocks=2)
    resolved(side, 1, 2)
    effects = side.cancel(2, 0.0, Failure(503, "busy"))
    assert sent(effects) == [Abort(2, Address("language", 100), "language-0:1", Failure(503, "busy"))]
    side = language_side()
    side.request(1, PEER, 0.0)
    assert sent(side.cancel(1, 0.0)) == []
    assert side.is_empty()


# ---- peers


def test_an_unreachable_registry_fails_those_that_wait_for_it() -> None:
    side = language_side()
    side.request(1, PEER, 0.0)
    side.request(2, SECOND, 0.0)
    effects = side.peer_unreachable(PEER, "connection refused", 0.0)
    assert effects == [
        StatusChanged(1, Status.FAILED, Failure(502, f"encode instance {PEER} cannot be found: connection refused"))
    ]
    assert side.sizes()["peers"] == 1
    assert side.request(3, PEER, 0.0) == [Resolve(PEER)]


def test_a_room_that_ends_while_its_peer_is_looked_up_is_aborted_there_afterwards() -> None:
    side = language_side()
    for room in (1, 2):
        side.request(room, PEER, 0.0)
    gone = Failure(499, "the client of room 1 is gone")
    assert sent(side.cancel(1, 0.0)) == []
    effects = side.peer_resolved(PEER, ENCODE, "encode-1", 1.0)
    who = register()
    assert effects[0] == Send(ENCODE, Abort(1, who.address, who.session_id, gone))
    assert [type(message) for message in sent(effects)] == [Abort, Register, TransferEmbeddingInfo]
    assert sent(side.peer_resolved(PEER, ENCODE, "encode-1", 2.0)) == [], "it is said once"


def test_there_is_nobody_to_be_told_when_the_lookup_fails() -> None:
    side = language_side()
    side.request(1, PEER, 0.0)
    side.cancel(1, 0.0)
    assert side.peer_unreachable(PEER, "connection refused", 1.0) == []
    side.request(2, PEER, 2.0)
    messages = sent(side.peer_resolved(PEER, ENCODE, "encode-1", 3.0))
    assert [type(message) for message in messages] == [Register, TransferEmbeddingInfo]


def test_only_so_many_wait_to_be_told() -> None:
    side = language_side()
    for room in range(10_001):
        side.request(room, PEER, 0.0)
        side.cancel(room, 0.0)
    assert len(sent(side.peer_resolved(PEER, ENCODE, "encode-1", 1.0))) == 10_000


def test_a_peer_that_does_not_fit_is_refused_with_the_reason() -> None:
    side = language_side()
    side.request(1, PEER, 0.0)
    failure = Failure(500, "block_size is 4 here and 8 there")
    assert failure_of(side.peer_refused(PEER, failure, 0.0)) == failure


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


def test_a_session_that_was_forgotten_registers_again_with_the_same_offer_once() -> None:
    side = language_side()
    init = offered(side)[ROOM]
    misdirected = StatusReport(ROOM, Status.FAILED, failure=Failure(421, "who are you?"))
    assert side.receive(misdirected, 0.0) == [Send(ENCODE, register()), Send(ENCODE, init)]
    assert failure_of(side.receive(misdirected, 0.0)) == Failure(502, "who are you?")


def test_after_rows_there_is_no_second_try() -> None:
    side = language_side()
    resolved(side)
    copied_chunk(side, 8, 20)
    misdirected = StatusReport(ROOM, Status.FAILED, failure=Failure(421, "who are you?"))
    assert failure_of(side.receive(misdirected, 0.0)) == Failure(502, "who are you?")


def test_pings_go_out_while_rooms_are_under_way_and_silence_ends_them() -> None:
    side = language_side()
    resolved(side)
    ping = Ping(Address("language", 100), "language-0:1", "encode-1")
    assert side.tick(4.9) == []
    assert side.tick(5.0) == [Send(ENCODE, ping)]
    side.receive(Pong("encode-1", "encode-1"), 6.0)
    assert side.tick(10.0) == [Send(ENCODE, ping)]
    assert side.tick(15.0) == [Send(ENCODE, ping)]
    effects = side.tick(20.0)
    text = f"encode instance {PEER} did not answer for 14 s"
    assert effects[:2] == [Note(text), Resolve(PEER)]
    assert failure_of(effects) == Failure(502, text)
    assert side.sizes()["blocks_quarantined"] == 2


def test_any_word_about_a_room_counts_as_a_pong() -> None:
    side = language_side()
    resolved(side)
    for now in (5.0, 10.0, 15.0, 20.0, 25.0):
        assert [type(message) for message in sent(side.tick(now))] == [Ping]
        side.receive(report(Status.WAITING_FOR_INPUT, None), now + 1)


def lost_peer() -> LanguageSide:
    side = language_side()
    resolved(side)
    for now in (5.0, 10.0, 15.0):
        side.tick(now)
    assert side.sizes()["blocks_quarantined"] == 2
    return side


def test_nothing_is_sent_to_a_lost_peer_until_its_registry_has_answered() -> None:
    side = lost_peer()
    side.peer_unreachable(PEER, "timeout", 16.0)
    assert side.request(8, PEER, 17.0) == [Resolve(PEER)]
    assert [type(m) for m in sent(side.peer_resolved(PEER, ENCODE, "encode-1", 18.0))] == [
        Register,
        TransferEmbeddingInfo,
    ]


def test_silence_is_no_proof_but_a_new_instance_elsewhere_is() -> None:
    side = lost_peer()
    assert side.peer_unreachable(PEER, "timeout", 16.0) == []
    assert side.sizes()["blocks_quarantined"] == 2
    assert Resolve(PEER) in side.tick(40.0)
    side.peer_resolved(PEER, ENCODE, "encode-1", 41.0)
    assert side.sizes()["blocks_quarantined"] == 2, "it was only slow"
    side.peer_resolved(PEER, Address("encode", 2), "encode-2", 42.0)
    assert side.sizes()["blocks_free"] == 8


def test_a_lost_peer_is_forgotten_with_its_last_room() -> None:
    side = lost_peer()
    side.peer_unreachable(PEER, "timeout", 16.0)
    side.receive(AbortAck(ROOM), 17.0)
    assert side.sizes()["peers"] == 0
    assert side.sizes()["blocks_free"] == 8


def test_a_new_instance_at_the_same_address_must_acknowledge() -> None:
    """It may have taken the room over: then it is the one that writes."""
    side = lost_peer()
    side.peer_resolved(PEER, ENCODE, "encode-2", 16.0)
    assert side.sizes()["blocks_quarantined"] == 2
    side.receive(AbortAck(ROOM), 17.0)
    assert side.sizes()["blocks_free"] == 8


def test_proof_of_death_from_outside_frees_the_blocks() -> None:
    side = lost_peer()
    side.peer_unreachable(PEER, "timeout", 16.0)
    side.peer_dead(PEER, 17.0)
    assert side.sizes()["blocks_free"] == 8
    assert side.sizes()["peers"] == 0


def test_a_pong_of_another_instance_ends_the_rooms_of_the_old_one() -> None:
    side = language_side(blocks=2)
    resolved(side, ROOM, 8)
    effects = side.receive(Pong("encode-2", "encode-1"), 1.0)
    assert effects[0] == Resolve(PEER), "room 8 still waits"
    assert failure_of(effects) == Failure(502, f"encode instance {PEER} was restarted")
    side.receive(AbortAck(ROOM), 2.0)
    effects = side.peer_resolved(PEER, Address("encode", 2), "encode-2", 3.0)
    assert [type(message) for message in sent(effects)] == [Register, TransferEmbeddingInfo]


def test_a_peer_that_nobody_has_watched_is_looked_up_again() -> None:
    side = language_side()
    resolved(side, now=100.0)
    copied_chunk(side, 8, 8, now=100.0)
    assert sent(side.request(8, PEER, 115.0)), "its last word is fresh"
    side.receive(report(Status.SUCCESS, 8, room=8), 115.0)
    side.copied(8, 8, 8, 115.0)
    assert side.request(9, PEER, 130.1) == [Resolve(PEER)]
    messages = sent(side.peer_resolved(PEER, ENCODE, "encode-1", 130.1))
    assert [type(message) for message in messages] == [TransferEmbeddingInfo], "it knows us"


def test_an_idle_peer_is_forgotten() -> None:
    side = language_side()
    resolved(side)
    copied_chunk(side, 8, 8)
    side.tick(TIMING.heartbeat_interval)
    assert side.sizes()["peers"] == 1
    side.tick(2 * TIMING.forget_session)
    assert side.sizes()["peers"] == 0
    assert side.next_wakeup() is None


# ---- deadlines


def test_deadlines_say_what_was_waited_for() -> None:
    side = language_side()
    side.request(1, PEER, 0.0)
    assert failure_of(side.tick(30.0)) == Failure(502, f"bootstrap registry {PEER} did not answer within 30 s")
    assert side.request(2, PEER, 31.0) == [Resolve(PEER)], "the next one asks again"

    side = language_side(blocks=2)
    resolved(side, 1, 2)
    side.receive(Pong("encode-1", "encode-1"), 30.0)
    assert failure_of(side.tick(30.0)) == Failure(503, "no receive blocks within 30 s")

    side.receive(report(Status.WAITING_FOR_INPUT, None, room=1), 60.0)
    failure = failure_of(side.tick(60.0))
    assert failure == Failure(502, f"encode instance {PEER} sent no more rows of room 1 within 60 s")

    side = language_side()
    resolved(side)
    side.receive(report(Status.SUCCESS, 8), 10.0)
    assert failure_of(side.tick(70.0)) == Failure(500, f"rows of room {ROOM} were not copied within 60 s")


def test_a_report_moves_the_deadline_too() -> None:
    side = language_side()
    resolved(side)
    side.receive(report(Status.TRANSFERRING, 8), 50.0)
    side.receive(Pong("encode-1", "encode-1"), 109.0)
    assert failure_of(side.tick(109.0)) is None
    assert failure_of(side.tick(110.0)) is not None


def test_progress_moves_the_deadline() -> None:
    side = language_side()
    resolved(side)
    copied_chunk(side, 8, 100, now=50.0)
    side.receive(Pong("encode-1", "encode-1"), 109.0)
    assert failure_of(side.tick(109.0)) is None
    assert failure_of(side.tick(110.0)) is not None


# ---- the default


def test_a_fixed_default_never_changes() -> None:
    reservation = DefaultReservation(1024, 65536)
    reservation.observe(5)
    assert reservation.rows(1000) == 1024


def test_auto_learns_a_high_quantile_within_a_fair_share() -> None:
    reservation = DefaultReservation(None, 40_000)
    assert reservation.rows(1) == 8192
    assert reservation.rows(10) == 4000
    for total in range(1, 101):
        reservation.observe(total)
    assert reservation.rows(1) == 91
    for _ in range(256):
        reservation.observe(30_000)
    assert reservation.rows(1) == 30_000
    assert reservation.rows(4) == 10_000
    assert reservation.rows(100_000) == 1


def test_auto_is_used_for_first_offers() -> None:
    side = language_side(default=None)
    assert offered(side)[ROOM].allocated_tokens == 32
    copied_chunk(side, 5, 5)
    (init,) = sent(side.request(8, PEER, 1.0))
    assert isinstance(init, TransferEmbeddingInfo)
    assert init.allocated_tokens == 5


def test_a_late_failure_cannot_undo_what_has_arrived() -> None:
    """A repeated init of a room that is over is answered with 409; here the success came first."""
    side = language_side()
    resolved(side)
    side.receive(report(Status.SUCCESS, 8), 0.0)
    used = StatusReport(ROOM, Status.FAILED, failure=Failure(409, f"room {ROOM} was used before"))
    assert side.receive(used, 0.0) == []
    assert only(side.copied(ROOM, 8, 8, 0.0), Deliver) == [Deliver(ROOM, 8, 1)]
    assert counted(side) == {"status_stale": 1}


def test_only_so_many_ended_rooms_are_remembered() -> None:
    side = language_side(timing=Timing(max_remembered=3))
    for room in range(5):
        side.request(room, PEER, 0.0)
        side.cancel(room, 0.0)
    assert side.sizes()["remembered"] == 3
    assert side.request(0, PEER, 0.0) == []
