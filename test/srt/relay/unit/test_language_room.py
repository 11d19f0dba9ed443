"""One room of the language side: the queue, reports, copies, what does not add up, quarantine, and its deadlines."""

import pytest

from embedding_relay.protocol.effects import (
    ClearAux,
    CopyAhead,
    CopyOut,
    Deliver,
    LanguageEffect,
    LookUp,
    Note,
    Resolve,
    Send,
    StatusChanged,
)
from embedding_relay.protocol.errors import Failure, LocalError, not_registered
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import (
    MAX_ITEMS,
    Abort,
    AbortAck,
    Address,
    Have,
    Item,
    Manifest,
    Ping,
    Pong,
    Progress,
    StatusReport,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from support.protocol import (
    ENCODE,
    ITEM,
    KEY,
    OTHER_KEY,
    PEER,
    ROOM,
    SESSION,
    counted,
    failure_of,
    first_offers,
    language_side,
    language_side_with_two_offers,
    offer_in,
    only,
    queued,
    receive_chunk,
    register,
    report,
    request_and_resolve,
    sent,
    waiting_room,
)

# ---- queued


def test_a_queued_room_ends_with_its_other_half_and_nobody_is_told() -> None:
    side = waiting_room()
    failure = Failure(400, "the image cannot be decoded")
    failed = StatusReport(8, Status.FAILED, failure=failure)
    assert side.receive(failed, 1.0) == [StatusChanged(8, Status.FAILED, failure)]
    assert side.sizes()["waiting_for_blocks"] == 0
    assert side.receive(failed, 1.0) == []
    assert failure_of(side.request(8, PEER, 2.0)) == Failure(409, "room 8 was used before")


def test_that_somebody_elses_session_is_not_registered_is_none_of_its_business() -> None:
    """Anybody can ask for its room in a session of their own, and have the answers sent here: they are not its own."""
    side = waiting_room()
    for _ in range(5):
        stranger = StatusReport(8, Status.FAILED, failure=not_registered("stranger-0:1"))
        assert side.receive(stranger, 1.0) == []
    assert counted(side) == {"status_stale": 5}
    assert sent(side.receive(StatusReport(8, Status.FAILED, failure=not_registered(SESSION)), 1.0))


def test_what_cannot_be_meant_for_a_queued_room_is_ignored() -> None:
    side = waiting_room()
    for message in (report(Status.TRANSFERRING, None, 8), report(Status.SUCCESS, 5, 8), AbortAck(8)):
        assert side.receive(message, 1.0) == []
    side.request(9, "registry3:80", 1.0)
    failed = StatusReport(9, Status.FAILED, failure=Failure(400, "an old one"))
    assert side.receive(failed, 1.0) == [], "nobody has been asked for room 9"
    assert counted(side) == {"status_stale": 2, "ack_ignored": 1, "message_for_unknown_room": 1}


# ---- progress


def test_rows_that_are_here_before_their_report_may_be_copied() -> None:
    side = language_side(default=8)
    blocks = offer_in(request_and_resolve(side)).dst_embedding_indices
    assert side.receive(Progress(ROOM, 3), 1.0) == [CopyAhead(ROOM, blocks, 0, 3, 1000)]
    assert side.receive(Progress(ROOM, 5), 1.0) == [CopyAhead(ROOM, blocks, 0, 5, 1000)]
    resume = offer_in(receive_chunk(side, 8, 20))
    assert resume.sent_tokens == 8, "only a report says what has been received"
    assert side.receive(Progress(ROOM, 10), 2.0) == [CopyAhead(ROOM, resume.dst_embedding_indices, 8, 10, 1000)]


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 1 << 40])
def test_progress_that_is_late_or_does_not_fit_the_offer_is_ignored(rows: int) -> None:
    """What is all of the offer, or more, is for a report to say."""
    side = language_side(default=8)
    request_and_resolve(side)
    side.receive(Progress(ROOM, 3), 1.0)
    assert side.receive(Progress(ROOM, rows), 1.0) == []
    assert counted(side) == {"status_stale": 1}


def test_no_progress_is_taken_while_a_report_is_copied_out_nor_before_an_offer() -> None:
    side = language_side(default=8)
    request_and_resolve(side)
    side.receive(report(Status.TRANSFERRING, 8), 1.0)
    assert side.receive(Progress(ROOM, 4), 1.0) == []
    waiting = waiting_room()
    assert waiting.receive(Progress(8, 1), 1.0) == []


def test_a_room_with_rows_of_an_instance_that_has_forgotten_it_does_not_go_on_with_those_of_another() -> None:
    side = language_side(default=8)
    request_and_resolve(side)
    side.receive(Progress(ROOM, 3), 1.0)
    failed = StatusReport(ROOM, Status.FAILED, failure=not_registered(SESSION))
    assert failure_of(side.receive(failed, 2.0)) == Failure(502, not_registered(SESSION).text)


ABORTED_IN_QUEUE = Abort(2, Address("language", 100), "language-0:1", Failure(503, "busy"))


def test_a_room_that_leaves_the_queue_tells_its_peer_until_that_has_heard_it() -> None:
    side = language_side(blocks=2)
    request_and_resolve(side, 1, 2)
    effects = side.cancel(2, 0.0, ABORTED_IN_QUEUE.failure)
    assert effects == [StatusChanged(2, Status.FAILED, ABORTED_IN_QUEUE.failure), Send(ENCODE, ABORTED_IN_QUEUE)]
    assert ABORTED_IN_QUEUE in sent(side.tick(1.0))
    assert side.sizes()["quarantined_rooms"] == 1
    side.receive(AbortAck(2), 1.5)
    assert side.sizes()["quarantined_rooms"] == side.sizes()["blocks_quarantined"] == 0
    assert ABORTED_IN_QUEUE not in sent(side.tick(4.0))


def test_it_holds_nothing_and_does_not_wait_for_ever_to_be_heard() -> None:
    side = language_side(blocks=2)
    request_and_resolve(side, 1, 2)
    side.cancel(2, 0.0, ABORTED_IN_QUEUE.failure)
    times = []
    for second in range(20):
        side.receive(Pong("encode-1", "encode-1"), float(second))
        times += [second for message in sent(side.tick(float(second))) if message == ABORTED_IN_QUEUE]
    assert times == [1, 3, 7]
    assert side.sizes()["quarantined_rooms"] == 0


def test_a_room_whose_peer_is_not_found_ends_alone() -> None:
    side = language_side()
    side.request(1, PEER, 0.0)
    assert sent(side.cancel(1, 0.0)) == []
    assert side.tick(30.0) == []
    assert side.is_empty()


# ---- a session that the encode side has forgotten


def test_a_queued_room_of_a_forgotten_session_is_announced_again_once() -> None:
    side = waiting_room()
    misdirected = StatusReport(8, Status.FAILED, failure=not_registered(SESSION))
    assert side.receive(misdirected, 0.0) == [Send(ENCODE, register(blocks=2)), Send(ENCODE, queued(room=8))]
    effects = side.receive(misdirected, 0.0)
    assert failure_of(effects) == Failure(502, not_registered(SESSION).text)
    assert [type(message) for message in sent(effects)] == [Abort], "the other half does not know"


def test_a_queued_room_of_a_lost_peer_is_announced_when_it_is_found() -> None:
    side = waiting_room()
    side.receive(Pong("encode-9", "encode-1"), 1.0)
    misdirected = StatusReport(8, Status.FAILED, failure=not_registered(SESSION))
    assert side.receive(misdirected, 1.0) == []
    assert sent(side.peer_resolved(PEER, ENCODE, "encode-9", 2.0)) == [register(blocks=2), queued(room=8)]


def test_an_init_right_behind_a_queued_message_may_be_misdirected_with_it() -> None:
    """Both were on their way when the encode side answered the first that it has forgotten the session."""
    side = language_side(blocks=2)
    request_and_resolve(side, 1, ROOM)
    side.receive(report(Status.SUCCESS, 5, room=1), 0.0)
    init = offer_in(side.copied(1, 5, 5, 0.0))
    misdirected = StatusReport(ROOM, Status.FAILED, failure=not_registered(SESSION))
    again = [Send(ENCODE, register(blocks=2)), Send(ENCODE, init)]
    assert side.receive(misdirected, 0.0) == again
    assert side.receive(misdirected, 0.0) == again
    assert failure_of(side.receive(misdirected, 0.0)) == Failure(502, not_registered(SESSION).text)


def test_a_session_that_was_forgotten_registers_again_with_the_same_offer_once() -> None:
    side = language_side()
    init = first_offers(side)[ROOM]
    misdirected = StatusReport(ROOM, Status.FAILED, failure=not_registered(SESSION))
    assert side.receive(misdirected, 0.0) == [Send(ENCODE, register()), Send(ENCODE, init)]
    assert failure_of(side.receive(misdirected, 0.0)) == Failure(502, not_registered(SESSION).text)


@pytest.mark.parametrize("copied", [True, False])
def test_after_rows_there_is_no_second_try(copied: bool) -> None:
    side = language_side()
    request_and_resolve(side)
    if copied:
        receive_chunk(side, 8, 20)
    else:
        side.receive(report(Status.TRANSFERRING, 8), 0.0)
    misdirected = StatusReport(ROOM, Status.FAILED, failure=not_registered(SESSION))
    assert failure_of(side.receive(misdirected, 0.0)) == Failure(502, not_registered(SESSION).text)


# ---- no answer


def repeated(side: LanguageSide, *seconds: int) -> list[tuple[int, object]]:
    """What was sent again about rooms, and when."""
    found: list[tuple[int, object]] = []
    for second in seconds:
        side.receive(Pong("encode-1", "encode-1"), float(second))
        side.receive(Pong("encode-2", "encode-2"), float(second))
        messages = [send.message for send in only(side.tick(float(second)), Send) if send.to == ENCODE]
        found += [(second, message) for message in messages if not isinstance(message, Ping)]
    return found


def test_an_offer_is_repeated_at_growing_intervals_until_it_is_answered() -> None:
    side = language_side()
    init = first_offers(side)[ROOM]
    assert repeated(side, *range(50)) == [(second, init) for second in (1, 3, 7, 15, 31, 47)]
    side.receive(report(Status.TRANSFERRING, 8), 50.0)
    assert repeated(side, *range(50, 60)) == [], "nothing is on its way while rows are copied"
    resume = offer_in(side.copied(ROOM, 8, 20, 60.0))
    assert repeated(side, *range(60, 70)) == [(61, resume), (63, resume), (67, resume)]
    side.receive(report(Status.SUCCESS, 20), 70.0)
    side.copied(ROOM, 12, 20, 70.0)
    assert repeated(side, *range(70, 100)) == []
    assert counted(side) == {"offer_repeated": 9}


def test_a_repeated_offer_does_not_move_the_deadline() -> None:
    side = language_side()
    request_and_resolve(side)
    repeated(side, *range(60))
    assert failure_of(side.tick(60.0)) == Failure(
        502, f"encode instance {PEER} sent no more rows of room {ROOM} within 60 s"
    )


def test_that_a_room_is_queued_is_repeated_too() -> None:
    side = waiting_room()
    assert repeated(side, *range(20)) == [(second, queued(room=8)) for second in (1, 3, 7, 15)]


def test_a_room_whose_peer_is_lost_says_nothing_until_it_is_found_again() -> None:
    side = waiting_room()
    side.receive(Pong("encode-9", "encode-1"), 0.5)
    assert repeated(side, 1, 2, 3) == []
    side.peer_resolved(PEER, ENCODE, "encode-9", 4.0)
    assert repeated(side, 5) == [(5, queued(room=8))]


def test_each_message_may_be_answered_that_the_session_is_not_registered_and_no_answer_makes_another() -> None:
    side = language_side()
    init = first_offers(side)[ROOM]
    misdirected = StatusReport(ROOM, Status.FAILED, failure=not_registered(SESSION))
    repeated(side, 1)
    again = [Send(ENCODE, register()), Send(ENCODE, init)]
    assert side.receive(misdirected, 2.0) == side.receive(misdirected, 2.0) == again
    assert failure_of(side.receive(misdirected, 2.0)) == Failure(502, not_registered(SESSION).text)


def test_an_offer_begins_with_an_aux_row_that_says_nothing() -> None:
    """Else a report about rows that nobody wrote would find the length that the block's last owner left."""
    side = language_side()
    assert only(request_and_resolve(side), ClearAux) == [ClearAux(0)]
    assert only(side.tick(1.0), ClearAux) == [], "a write may have begun"


# ---- rows


def test_one_transfer_of_everything() -> None:
    side = language_side()
    request_and_resolve(side)
    assert side.receive(report(Status.SUCCESS, 8), 0.0) == [CopyOut(ROOM, (0, 1), 0, 8, 1000)]
    assert side.copied(ROOM, 8, 8, 0.0) == [Deliver(ROOM, 8, 1), StatusChanged(ROOM, Status.SUCCESS)]
    assert side.is_empty()
    assert side.sizes()["blocks_free"] == 8


def test_a_resume_says_how_many_rows_have_arrived_and_how_much_space_there_is() -> None:
    side = language_side()
    request_and_resolve(side)
    effects = side.receive(report(Status.TRANSFERRING, 8), 0.0)
    assert effects == [StatusChanged(ROOM, Status.TRANSFERRING), CopyOut(ROOM, (0, 1), 0, 8, 1000)]
    resume = offer_in(side.copied(ROOM, 8, 20, 0.0))
    assert (resume.sent_tokens, resume.allocated_tokens, len(resume.dst_embedding_indices)) == (8, 12, 3)
    assert side.receive(report(Status.TRANSFERRING, 8), 0.0) == [], "the same report again"
    effects = side.receive(report(Status.SUCCESS, 20), 0.0)
    assert effects == [CopyOut(ROOM, resume.dst_embedding_indices, 8, 12, 1000)]
    assert only(side.copied(ROOM, 12, 20, 0.0), Deliver) == [Deliver(ROOM, 20, 2)]


def test_reports_without_rows_do_as_long_as_none_is_repeated() -> None:
    side = language_side()
    request_and_resolve(side)
    side.receive(report(Status.TRANSFERRING, None), 0.0)
    assert side.receive(report(Status.TRANSFERRING, None), 0.0) == [], "while it is being copied"
    assert offer_in(side.copied(ROOM, 8, 9, 0.0)).sent_tokens == 8
    assert only(side.receive(report(Status.SUCCESS, None), 0.0), CopyOut)
    assert only(side.copied(ROOM, 1, 9, 0.0), Deliver)


@pytest.mark.parametrize(("total", "blocks"), [(9, 1), (12, 1), (13, 2), (16, 2), (17, 3), (1000, 7)])
def test_a_resume_has_no_more_blocks_than_it_needs_and_leaves_one(total: int, blocks: int) -> None:
    side = language_side()
    request_and_resolve(side)
    assert len(offer_in(receive_chunk(side, 8, total)).dst_embedding_indices) == blocks


def test_nothing_grows_while_somebody_waits_and_nobody_waits_for_growth() -> None:
    side = language_side(blocks=2)
    request_and_resolve(side, ROOM, 8)
    resume = offer_in(receive_chunk(side, 8, 100))
    assert resume.room == ROOM
    assert len(resume.dst_embedding_indices) == 2


def test_blocks_that_are_not_needed_any_more_go_to_the_room_that_waits() -> None:
    side = language_side(blocks=2)
    request_and_resolve(side, ROOM, 8)
    first, second = (m for m in sent(receive_chunk(side, 8, 9)) if isinstance(m, TransferEmbeddingInfo))
    assert (first.room, len(first.dst_embedding_indices)) == (ROOM, 1)
    assert (second.room, len(second.dst_embedding_indices)) == (8, 1)


# ---- two offers


def test_half_of_the_blocks_is_on_offer_while_the_other_half_is_copied_out() -> None:
    side = language_side_with_two_offers()
    assert side.receive(report(Status.TRANSFERRING, 32), 0.0) == [CopyOut(ROOM, (2, 3), 24, 8, 1000)]
    resume = offer_in(side.copied(ROOM, 8, 100, 0.0))
    assert (resume.sent_tokens, resume.allocated_tokens, resume.dst_embedding_indices) == (40, 8, (2, 3))
    assert side.receive(report(Status.TRANSFERRING, 40), 0.0) == [CopyOut(ROOM, (0, 1), 32, 8, 1000)]
    assert offer_in(side.copied(ROOM, 8, 100, 0.0)).dst_embedding_indices == (0, 1)
    assert counted(side) == {}


def offers_after_the_first(side: LanguageSide, total: int, takes_offer_ahead: bool = True) -> list[tuple[int, int]]:
    """From which row on how many blocks are offered, when everything that was on offer has been copied out."""
    init = offer_in(request_and_resolve(side, takes_offer_ahead=takes_offer_ahead))
    messages = sent(receive_chunk(side, init.allocated_tokens, total))
    offers = [message for message in messages if isinstance(message, TransferEmbeddingInfo)]
    return [(offer.sent_tokens, len(offer.dst_embedding_indices)) for offer in offers]


@pytest.mark.parametrize(
    ("blocks", "total", "offers"),
    [
        (1, 100, [(4, 1)]),
        (2, 100, [(8, 1), (12, 1)]),
        (3, 100, [(12, 2), (20, 1)]),
        (3, 24, [(12, 3)]),
        (3, 25, [(12, 2), (20, 1)]),
        (3, 13, [(12, 1)]),
    ],
)
def test_blocks_are_divided_unless_they_take_all_that_is_left(
    blocks: int, total: int, offers: list[tuple[int, int]]
) -> None:
    side = language_side(blocks=blocks, default=blocks * 4)
    assert offers_after_the_first(side, total) == offers


@pytest.mark.parametrize(("takes_offer_ahead", "smallest_half"), [(False, 160), (True, 161)])
def test_blocks_are_not_divided_for_a_peer_of_another_version_nor_if_their_halves_are_small(
    takes_offer_ahead: bool, smallest_half: int
) -> None:
    """A block has 80 bytes. With 160, and a peer that takes an offer ahead, there would be two offers."""
    side = language_side(blocks=4, default=16, smallest_half=smallest_half)
    assert offers_after_the_first(side, 100, takes_offer_ahead) == [(16, 4)]


@pytest.mark.parametrize(("status", "total"), [(Status.TRANSFERRING, 100), (Status.SUCCESS, 38)])
def test_a_report_of_the_second_offer_is_one_of_the_first_too(status: Status, total: int) -> None:
    """The other one was lost. An offer goes out before rows are copied, because somebody waits for it."""
    side = language_side_with_two_offers(total)
    assert side.receive(report(status, min(40, total)), 0.0) == [CopyOut(ROOM, (2, 3), 24, 8, 1000)]
    effects = side.copied(ROOM, 8, total, 0.0)
    assert effects[-1] == CopyOut(ROOM, (0, 1), 32, 8, 1000)
    assert len(sent(effects)) == (1 if total > 40 else 0)
    effects = side.copied(ROOM, min(8, total - 32), total, 0.0)
    assert only(effects, Deliver) == ([] if total > 40 else [Deliver(ROOM, total, 4)])


def test_a_report_that_comes_while_rows_are_copied_waits_for_their_end() -> None:
    side = language_side_with_two_offers(total=39)
    assert only(side.receive(report(Status.TRANSFERRING, 32), 0.0), CopyOut)
    assert side.receive(report(Status.SUCCESS, 39), 1.0) == []
    failed = StatusReport(ROOM, Status.FAILED, failure=Failure(409, "used before"))
    for late in (report(Status.TRANSFERRING, 32), report(Status.SUCCESS, 39), failed):
        assert side.receive(late, 1.0) == []
    assert side.copied(ROOM, 8, 39, 2.0) == [CopyOut(ROOM, (0, 1), 32, 8, 1000)]
    assert only(side.copied(ROOM, 7, 39, 3.0), Deliver)
    assert side.is_empty()
    assert side.sizes()["blocks_free"] == 4
    assert counted(side) == {"status_stale": 3}


def test_blocks_that_no_rows_are_left_for_are_given_back_before_the_end() -> None:
    side = language_side_with_two_offers(total=38)
    side.receive(report(Status.TRANSFERRING, 32), 0.0)
    assert sent(side.copied(ROOM, 8, 38, 0.0)) == []
    assert side.sizes()["blocks_free"] == 2
    assert [message.sent_tokens for message in offers_repeated(side)] == [32]
    assert only(receive_chunk(side, 38, 38), Deliver)


def offers_repeated(side: LanguageSide) -> list[TransferEmbeddingInfo]:
    return [message for _, message in repeated(side, 1) if isinstance(message, TransferEmbeddingInfo)]


def test_both_offers_are_repeated_in_their_order() -> None:
    side = language_side_with_two_offers()
    assert [message.sent_tokens for message in offers_repeated(side)] == [24, 32]
    assert counted(side) == {"offer_repeated": 2}


@pytest.mark.parametrize(
    ("status", "rows"),
    [(Status.TRANSFERRING, 28), (Status.TRANSFERRING, 36), (Status.TRANSFERRING, 41), (Status.SUCCESS, 41)],
)
def test_a_report_that_contradicts_both_offers_fails_the_room(status: Status, rows: int) -> None:
    side = language_side_with_two_offers()
    failure = failure_of(side.receive(report(status, rows), 0.0))
    assert failure == Failure(502, f"room {ROOM} is said to have {rows} rows, but rows 24..40 were on offer")


@pytest.mark.parametrize(
    ("status", "rows", "total"),
    [
        (Status.SUCCESS, 28, 100),
        (Status.SUCCESS, 32, 38),
        (Status.SUCCESS, 38, 100),
        (Status.SUCCESS, 38, 39),
        (Status.SUCCESS, None, 39),
        (Status.TRANSFERRING, 40, 39),
    ],
)
def test_reports_of_two_offers_that_do_not_add_up_never_reach_the_model(
    status: Status, rows: int | None, total: int
) -> None:
    side = language_side_with_two_offers(total)
    effects = side.receive(report(status, rows), 0.0)
    while copies := only(effects, CopyOut):
        (copy,) = copies
        effects = side.copied(ROOM, min(copy.capacity, total - copy.first_row), total, 0.0)
    failure = failure_of(effects)
    assert failure is not None
    assert "does not add up" in failure.text
    assert not only(effects, Deliver)


def test_rows_are_copied_ahead_of_the_first_offer_only() -> None:
    side = language_side_with_two_offers()
    assert side.receive(Progress(ROOM, 28), 0.0) == [CopyAhead(ROOM, (2, 3), 24, 28, 1000)]
    assert side.receive(Progress(ROOM, 36), 0.0) == [], "the report of the first is not here yet, or lost"
    receive_chunk(side, 32, 100)
    assert side.receive(Progress(ROOM, 36), 0.0) == [CopyAhead(ROOM, (0, 1), 32, 36, 1000)]


@pytest.mark.parametrize("copying", [False, True])
def test_the_blocks_of_both_offers_wait_for_the_proof_when_the_room_fails(copying: bool) -> None:
    side = language_side_with_two_offers()
    if copying:
        side.receive(report(Status.TRANSFERRING, 32), 0.0)
    side.cancel(ROOM, 0.0)
    assert side.sizes()["blocks_quarantined"] == 4
    side.receive(AbortAck(ROOM), 0.0)
    if copying:
        assert side.sizes()["blocks_quarantined"] == 4, "rows are being read"
        side.copied(ROOM, 8, 100, 0.0)
    assert side.sizes()["blocks_free"] == 4
    assert side.is_empty()


# ---- what does not add up


@pytest.mark.parametrize(
    ("status", "rows"),
    [(Status.TRANSFERRING, 7), (Status.TRANSFERRING, 9), (Status.SUCCESS, 9)],
)
def test_a_report_that_contradicts_the_offer_fails_the_room(status: Status, rows: int) -> None:
    side = language_side()
    request_and_resolve(side)
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
    request_and_resolve(side)
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
    request_and_resolve(side)
    receive_chunk(side, 8, 20)
    side.receive(report(Status.SUCCESS, 19), 0.0)
    assert failure_of(side.copied(ROOM, 11, 19, 0.0)) == Failure(
        502, f"room {ROOM} has 19 rows, and 20 were announced before"
    )


def test_a_copy_that_fails_fails_the_room() -> None:
    side = language_side()
    request_and_resolve(side)
    side.receive(report(Status.SUCCESS, 8), 0.0)
    assert failure_of(side.copy_failed(ROOM, "no memory", 0.0)) == Failure(
        500, f"the rows of room {ROOM} could not be copied: no memory"
    )
    with pytest.raises(LocalError, match="no rows to be copied"):
        side.copied(ROOM, 8, 8, 0.0)


def test_rows_that_no_model_may_have_fail_the_room_and_their_sender_is_told() -> None:
    side = language_side()
    request_and_resolve(side)
    side.receive(report(Status.TRANSFERRING, 8), 0.0)
    effects = side.refuse_rows(ROOM, "row 3 has token id 5", 0.0)
    failure = Failure(502, f"encode instance {PEER} sent rows of room {ROOM} that cannot be used: row 3 has token id 5")
    assert failure_of(effects) == failure
    assert [abort.failure for abort in sent(effects) if isinstance(abort, Abort)] == [failure]
    assert side.sizes()["blocks_quarantined"] == 2
    side.receive(AbortAck(ROOM), 0.0)
    assert side.is_empty()


def test_a_late_failure_cannot_undo_what_has_arrived() -> None:
    """A repeated init of a room that is over is answered with 409; here the success came first."""
    side = language_side()
    request_and_resolve(side)
    side.receive(report(Status.SUCCESS, 8), 0.0)
    used = StatusReport(ROOM, Status.FAILED, failure=Failure(409, f"room {ROOM} was used before"))
    assert side.receive(used, 0.0) == []
    assert only(side.copied(ROOM, 8, 8, 0.0), Deliver) == [Deliver(ROOM, 8, 1)]
    assert counted(side) == {"status_stale": 1}


# ---- quarantine


def failed_room(side: LanguageSide) -> list[LanguageEffect]:
    request_and_resolve(side)
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
    assert (side.sizes()["rooms"], side.sizes()["quarantined_rooms"]) == (0, 1)
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
    assert aborts == [1, 3, 7, 15, 31, 47, 63, 79, 95, 111, 127, 143, 159, 175, 191]
    assert notes == [
        Note(f"2 blocks of room {ROOM} stay in quarantine: {PEER} has not acknowledged its abort for 63 s")
    ]
    assert side.sizes()["quarantine_overdue"] == 1
    assert side.sizes()["blocks_quarantined"] == 2


def test_blocks_that_are_being_read_are_not_free_either() -> None:
    side = language_side()
    request_and_resolve(side)
    side.receive(report(Status.TRANSFERRING, 8), 0.0)
    side.cancel(ROOM, 0.0)
    assert side.receive(AbortAck(ROOM), 0.0) == []
    assert side.sizes()["blocks_quarantined"] == 2
    assert sent(side.tick(1.0)) == [], "its end was heard"
    assert side.copied(ROOM, 8, 20, 0.0) == []
    assert side.sizes()["blocks_free"] == 8
    assert side.is_empty()


@pytest.mark.parametrize("end", ["copied", "failed", "refused"])
def test_blocks_that_were_read_last_go_to_the_room_that_waits(end: str) -> None:
    side = language_side(blocks=2)
    request_and_resolve(side, ROOM, 8)
    side.receive(report(Status.TRANSFERRING, 8), 0.0)
    side.cancel(ROOM, 0.0)
    assert sent(side.receive(AbortAck(ROOM), 0.0)) == []
    if end == "copied":
        effects = side.copied(ROOM, 8, 20, 0.0)
    elif end == "failed":
        effects = side.copy_failed(ROOM, "no memory", 0.0)
    else:
        effects = side.refuse_rows(ROOM, "row 3 has token id 5", 0.0)
    assert offer_in(effects).room == 8


def test_a_copy_that_fails_after_the_room_has_ended_only_frees_its_blocks() -> None:
    side = language_side()
    request_and_resolve(side)
    side.receive(report(Status.TRANSFERRING, 8), 0.0)
    side.cancel(ROOM, 0.0)
    side.receive(AbortAck(ROOM), 0.0)
    assert side.copy_failed(ROOM, "no memory", 0.0) == []
    assert side.is_empty()


# ---- deadlines


def test_deadlines_say_what_was_waited_for() -> None:
    side = language_side()
    side.request(1, PEER, 0.0)
    assert failure_of(side.tick(30.0)) == Failure(502, f"bootstrap registry {PEER} did not answer within 30 s")
    assert side.request(2, PEER, 31.0) == [Resolve(PEER)], "the next one asks again"

    side = language_side(blocks=2)
    request_and_resolve(side, 1, 2)
    side.receive(Pong("encode-1", "encode-1"), 30.0)
    assert failure_of(side.tick(30.0)) == Failure(503, "no receive blocks within 30 s")

    side.receive(report(Status.WAITING_FOR_INPUT, None, room=1), 60.0)
    failure = failure_of(side.tick(60.0))
    assert failure == Failure(502, f"encode instance {PEER} sent no more rows of room 1 within 60 s")

    side = language_side()
    request_and_resolve(side)
    side.receive(report(Status.SUCCESS, 8), 10.0)
    assert failure_of(side.tick(70.0)) == Failure(500, f"rows of room {ROOM} were not copied within 60 s")


def test_a_report_moves_the_deadline_too() -> None:
    side = language_side()
    request_and_resolve(side)
    side.receive(report(Status.TRANSFERRING, 8), 50.0)
    side.receive(Pong("encode-1", "encode-1"), 109.0)
    assert failure_of(side.tick(109.0)) is None
    assert failure_of(side.tick(110.0)) is not None


def test_progress_moves_the_deadline() -> None:
    side = language_side()
    request_and_resolve(side)
    receive_chunk(side, 8, 100, now=50.0)
    side.receive(Pong("encode-1", "encode-1"), 109.0)
    assert failure_of(side.tick(109.0)) is None
    assert failure_of(side.tick(110.0)) is not None


# ---- items whose rows are kept


def promise(*keys: str) -> Have:
    return Have(ROOM, register().address, SESSION, keys)


def held_report(status: Status, rows: int, *held: Item) -> StatusReport:
    return StatusReport(ROOM, status, rows, held=held)


def test_what_is_kept_is_promised_before_the_first_offer() -> None:
    messages = sent(request_and_resolve(language_side(), takes_have=True, held=(KEY, OTHER_KEY, KEY)))
    assert messages[1:] == [promise(KEY, OTHER_KEY), messages[-1]]
    assert isinstance(messages[-1], TransferEmbeddingInfo)


def test_a_peer_that_takes_no_promises_gets_none_and_may_hold_nothing() -> None:
    side = language_side()
    assert len(sent(request_and_resolve(side, held=(KEY,)))) == 2
    assert side.receive(Manifest(ROOM, (ITEM,)), 0.0) == [LookUp(ROOM, (ITEM,))], "what comes can be kept"
    assert side.holds(ROOM, [KEY], 0.0) == []
    failure = failure_of(side.receive(held_report(Status.SUCCESS, 8, ITEM), 0.0))
    assert failure == Failure(502, f"room {ROOM}: an item is said to be kept here that was not promised: {KEY}")


def test_a_manifest_is_looked_up_once_and_answered_with_all_that_is_promised() -> None:
    side = language_side()
    request_and_resolve(side, takes_have=True, held=(KEY,))
    items = (ITEM, Item(OTHER_KEY, ((6, 7),)))
    assert side.receive(Manifest(ROOM, items), 0.0) == [LookUp(ROOM, items)]
    assert side.receive(Manifest(ROOM, items), 0.0) == []
    assert side.holds(ROOM, [KEY], 0.0) == [], "that is no news"
    assert sent(side.holds(ROOM, [OTHER_KEY], 0.0)) == [promise(KEY, OTHER_KEY)]
    assert counted(side) == {"status_stale": 1}


def test_no_more_is_promised_than_a_prompt_has_items() -> None:
    side = language_side()
    keys = [f"{number:032x}" for number in range(MAX_ITEMS + 1)]
    [_, said, _] = sent(request_and_resolve(side, takes_have=True, held=keys))
    assert said == promise(*keys[:MAX_ITEMS])
    assert side.holds(ROOM, [KEY], 0.0) == []


def test_a_room_that_is_queued_or_over_promises_nothing() -> None:
    side = waiting_room()
    assert side.receive(Manifest(8, (ITEM,)), 0.0) == []
    assert side.holds(8, [KEY], 0.0) == []
    assert side.holds(99, [KEY], 0.0) == []
    side = language_side()
    request_and_resolve(side, takes_have=True)
    side.cancel(ROOM, 0.0)
    assert side.holds(ROOM, [KEY], 0.0) == []


def test_a_promise_is_repeated_before_the_offer_that_is() -> None:
    side = language_side()
    request_and_resolve(side, takes_have=True, held=(KEY,))
    again = sent(side.tick(1.0))
    assert again == [promise(KEY), again[-1]]
    unknown = StatusReport(ROOM, Status.FAILED, failure=not_registered(SESSION))
    assert sent(side.receive(unknown, 1.0)) == [register(), promise(KEY), again[-1]]


def test_held_items_are_copied_out_from_elsewhere_with_the_rows_that_they_are_among() -> None:
    side = language_side(blocks=2)
    request_and_resolve(side, takes_have=True, held=(KEY, OTHER_KEY))
    other = Item(OTHER_KEY, ((7, 9), (11, 13)))
    [first] = only(side.receive(held_report(Status.TRANSFERRING, 8, ITEM, other), 0.0), CopyOut)
    assert first.held == (ITEM, other)
    side.copied(ROOM, 8, 15, 0.0)
    [second] = only(side.receive(held_report(Status.SUCCESS, 15, ITEM, other), 0.0), CopyOut)
    assert (second.first_row, second.held) == (8, (other,))
    assert only(side.copied(ROOM, 7, 15, 0.0), Deliver)


def test_a_report_of_two_offers_says_what_is_held_of_both() -> None:
    side = language_side(blocks=4, default=16)
    request_and_resolve(side, takes_offer_ahead=True, takes_have=True, held=(KEY,))
    item = Item(KEY, ((20, 26), (30, 34)))
    side.receive(held_report(Status.TRANSFERRING, 16), 0.0)
    side.copied(ROOM, 16, 100, 0.0)
    [first] = only(side.receive(held_report(Status.TRANSFERRING, 32, item), 0.0), CopyOut)
    assert (first.first_row, first.held) == (16, (item,))
    [second] = only(side.copied(ROOM, 8, 100, 0.0), CopyOut)
    assert (second.first_row, second.held) == (24, (item,))


def test_a_held_item_ends_within_the_prompt() -> None:
    side = language_side(blocks=2, max_rows=30)
    request_and_resolve(side, takes_have=True, held=(KEY,))
    beyond = held_report(Status.TRANSFERRING, 8, Item(KEY, ((20, 24),)))
    assert failure_of(side.receive(beyond, 0.0)) is None, "how long the prompt is, is not known yet"
    text = f"room {ROOM}: an item is said to end at row 24, and there are at most 20 rows"
    assert failure_of(side.copied(ROOM, 8, 20, 0.0)) == Failure(502, text)


def test_a_held_item_ends_within_the_longest_prompt() -> None:
    side = language_side(blocks=2, max_rows=30)
    request_and_resolve(side, takes_have=True, held=(KEY,))
    failure = failure_of(side.receive(held_report(Status.TRANSFERRING, 8, Item(KEY, ((20, 31),))), 0.0))
    assert failure == Failure(502, f"room {ROOM}: an item is said to end at row 31, and there are at most 30 rows")


def test_when_the_length_is_known_a_held_item_beyond_it_is_refused_at_once() -> None:
    side = language_side(blocks=2)
    request_and_resolve(side, takes_have=True, held=(KEY,))
    side.receive(held_report(Status.TRANSFERRING, 8), 0.0)
    side.copied(ROOM, 8, 15, 0.0)
    failure = failure_of(side.receive(held_report(Status.SUCCESS, 15, Item(KEY, ((9, 16),))), 0.0))
    assert failure is not None
    assert failure.code == 502


def test_where_something_is_promised_nothing_is_copied_ahead_of_the_report() -> None:
    side = language_side()
    request_and_resolve(side, takes_have=True)
    assert only(side.receive(Progress(ROOM, 3), 0.0), CopyAhead)
    side.holds(ROOM, [KEY], 0.0)
    assert side.receive(Progress(ROOM, 5), 0.0) == []
