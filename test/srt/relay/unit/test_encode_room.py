"""One room of the encode side: when it begins, which rows it writes where, how aborts end it, and its deadlines."""

from typing import Any

import msgspec
import pytest

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
    Progress,
    StatusReport,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Timing
from support.protocol import (
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
    offer,
    only,
    ping,
    queued,
    register,
    reported_failures,
    sent,
)

# ---- getting together


@pytest.mark.parametrize("expect_first", [True, False])
def test_a_room_waits_for_its_own_half_and_for_every_rank(expect_first: bool) -> None:
    side = encode_side_with(0, 1)
    steps = [
        lambda: side.expect(ROOM, 0.0),
        lambda: side.receive(offer(8, 0, 1, rank=0, ranks=2), 0.0),
        lambda: side.receive(offer(8, 0, 1, rank=1, ranks=2), 0.0),
    ]
    *early, last = steps if expect_first else reversed(steps)
    assert [step() for step in early] == [[], []]
    assert last() == [StatusChanged(ROOM, Status.WAITING_FOR_INPUT)]


def test_ranks_that_disagree_about_their_number_fail_the_room() -> None:
    side = encode_side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(offer(4, 0, rank=1, ranks=3), 0.0)
    effects = side.receive(offer(4, 0, ranks=2), 0.0)
    failure = Failure(502, f"the ranks of room {ROOM} disagree about their number: 3 and 2")
    assert reported_failures(effects) == [failure, failure], "both ranks are told"
    assert failure_of(effects) == failure
    assert side.is_empty()


def test_a_queued_room_is_taken_up_as_if_it_had_been_asked_for_at_once() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(queued(), 1.0)
    assert side.receive(offer(8, 0, 1), 12.0) == [StatusChanged(ROOM, Status.WAITING_FOR_INPUT)]
    assert side.receive(queued(), 13.0) == [], "late"
    (chunk,) = only(side.submit(ROOM, 8, 13.0), TransferEmbeddingChunk)
    assert side.receive(queued(), 13.0) == [], "later"
    assert sent(side.transferred(ROOM, chunk.transfer_id, {}, 14.0)) == [StatusReport(ROOM, Status.SUCCESS, rows=8)]
    assert reported_failures(side.receive(queued(), 15.0)) == [Failure(409, f"room {ROOM} was used before")]
    assert counted(side) == {"queued_repeated": 2, "offer_for_ended_room": 1}
    side.tick(14.0 + TIMING.silence)
    assert side.is_empty()


def test_a_rank_that_was_queued_and_has_offered_blocks_may_not_fall_silent() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(queued(), 1.0)
    side.receive(offer(8, 0, 1), 2.0)
    assert failure_of(side.tick(2.0 + TIMING.silence)) is not None


def test_the_first_message_about_a_room_may_come_before_the_request() -> None:
    side = encode_side_with()
    assert side.receive(queued(), 0.0) == []
    assert side.receive(queued(), 1.0) == []
    assert counted(side) == {"queued_repeated": 1}
    ping(side, 25.0)
    assert side.expect(ROOM, 25.0) == []
    ping(side, 30.0)
    assert failure_of(side.tick(30.0)) is not None, "counted from the beginning of the room"

    side = encode_side_with()
    side.receive(queued(), 0.0)
    ping(side, 30.0)
    (failure,) = reported_failures(side.tick(30.0))
    assert failure == Failure(503, f"the request of room {ROOM} did not reach the encode instance within 30 s")


def test_whoever_else_is_queued_does_not_matter_to_a_room_that_is_complete() -> None:
    side = encode_side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(queued(rank=1), 0.0)
    side.receive(offer(8, 0, 1), 10.0)
    ping(side, 16.0)
    assert side.tick(16.0) == []
    (failure,) = reported_failures(side.receive(queued(rank=1), 16.0))
    assert "has all of its 1 destinations" in failure.text
    assert not side.is_empty()


# ---- sending


def test_first_and_later_chunks_follow_the_same_rule() -> None:
    side, chunk = encode_side_that_writes(total=20, allocated=7)
    (destination,) = chunk.destinations
    assert (destination.start_row, destination.stop_row, destination.with_aux) == (0, 7, True)
    assert chunk.window.stage
    effects = side.transferred(ROOM, chunk.transfer_id, {}, 1.0)
    assert effects == [
        Send(Address("language", 100), StatusReport(ROOM, Status.TRANSFERRING, rows=7)),
        StatusChanged(ROOM, Status.TRANSFERRING),
    ]
    (chunk,) = only(side.receive(offer(7, 2, 3, sent=7), 2.0), TransferEmbeddingChunk)
    (destination,) = chunk.destinations
    assert (destination.start_row, destination.stop_row, destination.with_aux) == (7, 14, False)
    assert not chunk.window.stage, "all rows are in our blocks already"
    assert sent(side.transferred(ROOM, chunk.transfer_id, {}, 3.0)) == [
        StatusReport(ROOM, Status.TRANSFERRING, rows=14)
    ]
    (chunk,) = only(side.receive(offer(8, 0, 1, sent=14), 4.0), TransferEmbeddingChunk)
    assert side.transferred(ROOM, chunk.transfer_id, {}, 5.0) == [
        Send(Address("language", 100), StatusReport(ROOM, Status.SUCCESS, rows=20)),
        StatusChanged(ROOM, Status.SUCCESS),
        DropRows(ROOM),
    ]
    assert side.is_empty()


def test_progress_is_told_to_the_rank_that_it_is_about_while_its_write_is_under_way() -> None:
    side, chunk = encode_side_that_writes(takes_progress=True)
    session = chunk.destinations[0].session_id
    told = side.progressed(ROOM, chunk.transfer_id, session, 4)
    assert told == [Send(Address("language", 100), Progress(ROOM, 4))]
    assert side.progressed(ROOM, chunk.transfer_id + 1, session, 4) == []
    assert side.progressed(ROOM, chunk.transfer_id, "language-7:1", 4) == []
    assert side.progressed(ROOM + 1, chunk.transfer_id, session, 4) == []
    side.transferred(ROOM, chunk.transfer_id, {}, 1.0)
    assert side.progressed(ROOM, chunk.transfer_id, session, 4) == [], "it has been reported"


def test_no_progress_is_told_to_a_rank_that_would_not_understand_it() -> None:
    side, chunk = encode_side_that_writes()
    assert side.progressed(ROOM, chunk.transfer_id, chunk.destinations[0].session_id, 4) == []


def test_no_progress_is_told_of_a_room_that_has_failed() -> None:
    side, chunk = encode_side_that_writes(takes_progress=True)
    side.refuse(ROOM, Failure(500, "the tower is gone"), 0.5)
    assert side.progressed(ROOM, chunk.transfer_id, chunk.destinations[0].session_id, 4) == []


@pytest.mark.parametrize(
    ("records", "apart"),
    [((None, None), True), (((1, 32), None), True), (((1, 32), (1, 36)), True), (((1, 32),) * 2, False)],
)
def test_small_columns_are_staged_apart_if_any_destination_of_the_room_wants_them_so(records: Any, apart: bool) -> None:
    """Whether it takes part in this step or not: it may be written to from what is staged now."""
    side = encode_side()
    for rank in (0, 1):
        side.receive(register(rank, records=records[rank]), 0.0)
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1, ranks=2), 0.0)
    side.receive(offer(4, 2, ranks=2, rank=1), 0.0)
    (chunk,) = only(side.submit(ROOM, 20, 0.0), TransferEmbeddingChunk)
    assert chunk.window.apart is apart


@pytest.mark.parametrize("total", [7, 8, 9])
def test_last_means_that_what_remains_fits(total: int) -> None:
    side, chunk = encode_side_that_writes(total=total, allocated=8)
    (report,) = sent(side.transferred(ROOM, chunk.transfer_id, {}, 1.0))
    assert isinstance(report, StatusReport)
    assert report.status is (Status.SUCCESS if total <= 8 else Status.TRANSFERRING)
    assert report.rows == min(total, 8)


def test_a_prompt_longer_than_the_pool_moves_through_a_window_and_is_reported_once_per_chunk() -> None:
    side = encode_side_with(blocks=2)
    side.expect(ROOM, 0.0)
    side.receive(offer(20, 0, 1, 2, 3, 4), 0.0)
    effects = side.submit(ROOM, 30, 0.0)
    windows = []
    while chunks := only(effects, TransferEmbeddingChunk):
        (chunk,) = chunks
        (destination,) = chunk.destinations
        windows.append((chunk.window.first_row, chunk.window.rows, destination.start_row, destination.stop_row))
        effects = side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    assert windows == [(0, 8, 0, 8), (8, 8, 8, 16), (16, 8, 16, 20)]
    assert sent(effects) == [StatusReport(ROOM, Status.TRANSFERRING, rows=20)]


def test_ranks_wait_for_each_other_and_may_offer_different_amounts() -> None:
    side = encode_side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1, rank=0, ranks=2), 0.0)
    side.receive(offer(4, 5, rank=1, ranks=2), 0.0)
    (chunk,) = only(side.submit(ROOM, 12, 0.0), TransferEmbeddingChunk)
    assert [(d.start_row, d.stop_row) for d in chunk.destinations] == [(0, 8), (0, 4)]
    assert [d.with_aux for d in chunk.destinations] == [True, True]
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    assert side.receive(offer(4, 5, rank=1, ranks=2, sent=4), 0.0) == []
    (chunk,) = only(side.receive(offer(8, 0, 1, rank=0, ranks=2, sent=8), 0.0), TransferEmbeddingChunk)
    assert [(d.start_row, d.stop_row) for d in chunk.destinations] == [(8, 12), (4, 8)]
    reports = sent(side.transferred(ROOM, chunk.transfer_id, {}, 0.0))
    assert reports == [
        StatusReport(ROOM, Status.SUCCESS, rows=12),
        StatusReport(ROOM, Status.TRANSFERRING, rows=8),
    ]
    (chunk,) = only(side.receive(offer(4, 6, rank=1, ranks=2, sent=8), 0.0), TransferEmbeddingChunk)
    assert [(d.session_id, d.start_row, d.stop_row) for d in chunk.destinations] == [("language-1:1", 8, 12)]
    assert only(side.transferred(ROOM, chunk.transfer_id, {}, 0.0), StatusChanged)[-1].status is Status.SUCCESS


@pytest.mark.parametrize("again", [offer(8, 0, 1), offer(8, 4, 5), offer(8, 4, 5, sent=4)])
def test_nothing_is_sent_twice_while_a_write_is_under_way(again: TransferEmbeddingInfo) -> None:
    side, chunk = encode_side_that_writes()
    assert side.receive(again, 0.0) == []
    assert side.submit(ROOM, 20, 0.0) == []
    assert len(sent(side.transferred(ROOM, chunk.transfer_id, {}, 0.0))) == 1


@pytest.mark.parametrize("again", [offer(4, 0), offer(8, 4, 5, sent=7), offer(8, 4, 5, sent=9)])
def test_only_the_resume_that_goes_on_from_here_is_accepted(again: TransferEmbeddingInfo) -> None:
    side, chunk = encode_side_that_writes()
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    assert side.receive(again, 0.0) == []
    assert only(side.receive(offer(8, 4, 5, sent=8), 0.0), TransferEmbeddingChunk)
    assert side.receive(offer(8, 4, 5, sent=8), 0.0) == []


def test_a_resume_cannot_be_replaced_while_it_is_served() -> None:
    side = encode_side_with(blocks=1)
    side.expect(ROOM, 0.0)
    side.receive(offer(4, 0), 0.0)
    (chunk,) = only(side.submit(ROOM, 20, 0.0), TransferEmbeddingChunk)
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    (chunk,) = only(side.receive(offer(8, 0, 1, sent=4), 0.0), TransferEmbeddingChunk)
    assert side.receive(offer(8, 6, 7, sent=4), 0.0) == []
    (chunk,) = only(side.transferred(ROOM, chunk.transfer_id, {}, 0.0), TransferEmbeddingChunk)
    assert chunk.destinations[0].blocks == (0, 1)
    assert counted(side) == {"resume_ignored": 1}


# ---- an offer ahead of the one in use


def encode_side_with_an_offer_ahead(
    total: int = 30,
) -> tuple[EncodeSide, TransferEmbeddingChunk, TransferEmbeddingChunk]:
    """Rows 0 to 7 are being written; there is an offer for 8 to 15, which the workers have too."""
    side, chunk = encode_side_that_writes(total=total)
    (ahead,) = side.receive(offer(8, 2, 3, sent=8), 0.0)
    assert isinstance(ahead, TransferEmbeddingChunk)
    return side, chunk, ahead


def test_what_is_offered_ahead_is_written_as_soon_as_the_offer_before_it_is_used_up() -> None:
    side, chunk, ahead = encode_side_with_an_offer_ahead()
    (part,) = ahead.destinations
    assert (part.blocks, part.first_row, part.start_row, part.stop_row) == ((2, 3), 8, 8, 16)
    assert (part.with_aux, ahead.window.stage) == (False, False)
    effects = side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    assert sent(effects) == [StatusReport(ROOM, Status.TRANSFERRING, rows=8)], "each offer has a report"
    assert not only(effects, TransferEmbeddingChunk), "it is being written"
    (third,) = side.receive(offer(8, 0, 1, sent=16), 0.0)
    assert isinstance(third, TransferEmbeddingChunk)
    assert third.destinations[0].blocks == (0, 1), "the next one ahead, in the blocks of the first"
    effects = side.transferred(ROOM, ahead.transfer_id, {}, 0.0)
    assert sent(effects) == [StatusReport(ROOM, Status.TRANSFERRING, rows=16)]
    assert counted(side) == {}


def test_an_offer_ahead_that_was_there_before_the_rows_is_with_the_workers_at_once() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    assert side.receive(offer(8, 2, 3, sent=8), 0.0) == []
    first, ahead = only(side.submit(ROOM, 30, 0.0), TransferEmbeddingChunk)
    assert [chunk.destinations[0].start_row for chunk in (first, ahead)] == [0, 8]
    assert [chunk.window.stage for chunk in (first, ahead)] == [True, False]


@pytest.mark.parametrize("first_fails", [True, False])
def test_a_room_that_fails_waits_for_both_writes(first_fails: bool) -> None:
    side, chunk, ahead = encode_side_with_an_offer_ahead()
    errors = {SESSION: "code -1"} if first_fails else {}
    if not first_fails:
        side.receive(Abort(ROOM, KNOWN_AT, SESSION), 0.0)
    effects = side.transferred(ROOM, chunk.transfer_id, errors, 0.0)
    assert [failure.code for failure in reported_failures(effects)] == ([502] if first_fails else [])
    assert not only(effects, DropRows), "they are still read"
    assert not side.is_empty()
    effects = side.transferred(ROOM, ahead.transfer_id, {}, 0.0)
    assert only(effects, DropRows)
    assert [send.message for send in only(effects, Send)] == ([] if first_fails else [AbortAck(ROOM)])
    assert side.is_empty()


def test_an_abort_between_two_writes_that_fail_is_acknowledged_when_nothing_of_both_can_land() -> None:
    side, chunk, ahead = encode_side_with_an_offer_ahead()
    side.transferred(ROOM, chunk.transfer_id, {SESSION: "code -1"}, 0.0)
    assert side.receive(Abort(ROOM, KNOWN_AT, SESSION), 1.0) == []
    side.transferred(ROOM, ahead.transfer_id, {SESSION: "code -1"}, 2.0)
    assert side.session_quiet(SESSION, 3.0) == [Send(KNOWN_AT, AbortAck(ROOM))]


def test_an_abort_is_not_acknowledged_while_a_write_is_with_the_workers_whatever_is_proven() -> None:
    side, chunk, ahead = encode_side_with_an_offer_ahead()
    side.transferred(ROOM, chunk.transfer_id, {SESSION: "code -1"}, 0.0)
    assert side.receive(Abort(ROOM, KNOWN_AT, SESSION), 1.0) == []
    assert side.session_quiet(SESSION, 2.0) == [], "of the first"
    effects = side.transferred(ROOM, ahead.transfer_id, {}, 3.0)
    assert [send.message for send in only(effects, Send)] == [AbortAck(ROOM)]


def test_the_end_of_a_chunk_that_takes_several_steps_brings_the_offer_ahead_along() -> None:
    side = encode_side_with(blocks=3)
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    (first,) = only(side.submit(ROOM, 30, 0.0), TransferEmbeddingChunk)
    (second,) = only(side.receive(offer(8, 2, 3, sent=8), 0.0), TransferEmbeddingChunk)
    side.transferred(ROOM, first.transfer_id, {}, 0.0)
    assert side.receive(offer(8, 0, 1, sent=16), 0.0) == [], "rows 8 to 11 do not end their chunk"
    last, ahead = only(side.transferred(ROOM, second.transfer_id, {}, 0.0), TransferEmbeddingChunk)
    assert [(part.start_row, part.stop_row) for part in (*last.destinations, *ahead.destinations)] == [
        (12, 16),
        (16, 24),
    ]


def test_an_offer_ahead_of_the_same_blocks_waits_for_the_write_to_them() -> None:
    side, chunk = encode_side_that_writes(total=30)
    assert side.receive(offer(8, 1, 2, sent=8), 0.0) == []
    assert only(side.transferred(ROOM, chunk.transfer_id, {}, 0.0), TransferEmbeddingChunk)


def test_a_room_is_over_when_it_is_told_so_and_not_when_it_is_closed() -> None:
    side, *_ = encode_side_with_an_offer_ahead()
    assert not side.is_over(ROOM)
    side.receive(Abort(ROOM, KNOWN_AT, SESSION), 0.0)
    assert side.is_over(ROOM)
    assert side.is_over(ROOM + 1), "nobody knows it"


def test_rows_that_are_not_staged_or_not_made_are_not_ahead() -> None:
    side = encode_side_with(blocks=3)
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    side.submit(ROOM, 30, 0.0)
    (ahead,) = only(side.receive(offer(8, 2, 3, sent=8), 0.0), TransferEmbeddingChunk)
    assert ahead.destinations[0].stop_row == 12, "as far as the window goes"
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    side.submit(ROOM, 30, 0.0, ready=8)
    assert side.receive(offer(8, 2, 3, sent=8), 0.0) == []


@pytest.mark.parametrize("wrong", [offer(8, 2, 3, sent=7), offer(8, 2, 3, sent=9), offer(8, 2, 3, sent=16)])
def test_an_offer_ahead_begins_exactly_where_the_one_in_use_ends(wrong: TransferEmbeddingInfo) -> None:
    side, chunk = encode_side_that_writes(total=30)
    assert side.receive(wrong, 0.0) == []
    assert not only(side.transferred(ROOM, chunk.transfer_id, {}, 0.0), TransferEmbeddingChunk)
    assert counted(side) == {"resume_ignored": 1}


@pytest.mark.parametrize("ready", [8, 30])
def test_there_is_one_offer_ahead_at_most_and_it_is_not_replaced(ready: int) -> None:
    """Whether the workers have it already, or its rows are not made yet."""
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    (chunk,) = only(side.submit(ROOM, 30, 0.0, ready=ready), TransferEmbeddingChunk)
    effects = side.receive(offer(8, 2, 3, sent=8), 0.0)
    for other in (offer(8, 2, 3, sent=8), offer(4, 4, sent=8), offer(8, 4, 5, sent=16)):
        assert side.receive(other, 0.0) == []
    assert counted(side) == {"resume_ignored": 3}
    assert not only(side.transferred(ROOM, chunk.transfer_id, {}, 0.0), TransferEmbeddingChunk)
    effects += side.more_rows(ROOM, 30, 0.0)
    (chunk,) = only(effects, TransferEmbeddingChunk)
    assert chunk.destinations[0].blocks == (2, 3)
    assert not only(side.transferred(ROOM, chunk.transfer_id, {}, 0.0), TransferEmbeddingChunk)


def test_an_offer_ahead_waits_until_its_room_has_begun() -> None:
    """It claims its blocks, and before the request is here anybody could do that in anybody's name."""
    side = encode_side_with()
    side.receive(offer(8, 0, 1), 0.0)
    assert side.receive(offer(8, 2, 3, sent=8), 0.0) == []
    assert counted(side) == {"resume_ignored": 1}
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 2, 3, sent=8), 0.0)
    assert len(only(side.submit(ROOM, 30, 0.0), TransferEmbeddingChunk)) == 2


def test_a_chunk_with_offers_ahead_begins_when_all_ranks_have_one() -> None:
    side = encode_side_with(0, 1)
    side.expect(ROOM, 0.0)
    for rank in (0, 1):
        side.receive(offer(8, 0, 1, rank=rank, ranks=2), 0.0)
    (chunk,) = only(side.submit(ROOM, 30, 0.0), TransferEmbeddingChunk)
    side.receive(offer(8, 2, 3, sent=8, rank=0, ranks=2), 0.0)
    assert not only(side.transferred(ROOM, chunk.transfer_id, {}, 0.0), TransferEmbeddingChunk)
    side.receive(offer(8, 0, 1, sent=16, rank=0, ranks=2), 0.0)
    (chunk,) = only(side.receive(offer(4, 0, sent=8, rank=1, ranks=2), 0.0), TransferEmbeddingChunk)
    assert [(part.start_row, part.stop_row) for part in chunk.destinations] == [(8, 16), (8, 12)]


def test_what_was_offered_ahead_and_not_needed_is_free_for_other_rooms() -> None:
    side, chunk = encode_side_that_writes(total=8)
    assert side.receive(offer(8, 2, 3, sent=8), 0.0) == []
    side.expect(9, 0.0)
    assert failure_of(side.receive(offer(8, 2, 3, room=9), 0.0)) is not None, "not yet"
    assert sent(side.transferred(ROOM, chunk.transfer_id, {}, 0.0)) == [StatusReport(ROOM, Status.SUCCESS, rows=8)]
    side.expect(10, 0.0)
    assert only(side.receive(offer(8, 2, 3, room=10), 0.0), StatusChanged)


def test_blocks_that_are_offered_again_ahead_stay_those_of_the_room() -> None:
    """The offer that is used up had some of them too."""
    side, chunk = encode_side_that_writes(total=30)
    side.receive(offer(8, 1, 2, sent=8), 0.0)
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    side.expect(9, 0.0)
    failure = failure_of(side.receive(offer(4, 1, room=9), 0.0))
    assert failure is not None
    assert failure.text == f"session {SESSION} offers room 9 block 1, which room {ROOM} has"
    side.expect(10, 0.0)
    assert failure_of(side.receive(offer(4, 0, room=10), 0.0)) is None


def test_a_flaw_of_an_offer_ahead_fails_the_room_when_the_write_has_come_back() -> None:
    side, chunk = encode_side_that_writes(total=30)
    effects = side.receive(offer(8, 2, 99, sent=8), 0.0)
    (failure,) = reported_failures(effects)
    assert "has only 8 blocks" in failure.text
    assert not side.is_empty()
    assert only(side.transferred(ROOM, chunk.transfer_id, {}, 0.0), DropRows)
    assert side.is_empty()


def test_of_two_offers_whose_reports_were_lost_the_last_is_answered_and_that_says_all() -> None:
    side, chunk, ahead = encode_side_with_an_offer_ahead(total=24)
    init, second, third = offer(8, 0, 1), offer(8, 2, 3, sent=8), offer(8, 0, 1, sent=16)
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    assert side.receive(init, 1.0) == side.receive(second, 1.0) == [], "the next report is on its way"
    side.transferred(ROOM, ahead.transfer_id, {}, 2.0)
    assert side.receive(init, 3.0) == []
    assert sent(side.receive(second, 3.0)) == [StatusReport(ROOM, Status.TRANSFERRING, rows=16)]
    (chunk,) = only(side.receive(third, 4.0), TransferEmbeddingChunk)
    side.transferred(ROOM, chunk.transfer_id, {}, 5.0)
    assert side.receive(second, 6.0) == []
    assert sent(side.receive(third, 6.0)) == [StatusReport(ROOM, Status.SUCCESS, rows=24)], "the room is over"


def test_an_offer_ahead_does_not_move_the_deadline_of_the_write_under_way() -> None:
    side, _ = encode_side_that_writes(total=30)
    side.receive(offer(8, 2, 3, sent=8), 30.0)
    ping(side, 59.0)
    assert failure_of(side.tick(60.0)) == Failure(502, f"a write of room {ROOM} did not end within 60 s")


# ---- an offer comes again because its answer may be lost


def test_an_offer_that_was_answered_gets_the_same_report_again_and_nothing_is_written() -> None:
    side, chunk = encode_side_that_writes(total=20)
    init, resume = offer(8, 0, 1), offer(12, 0, 1, 2, sent=8)
    (first,) = sent(side.transferred(ROOM, chunk.transfer_id, {}, 0.0))
    assert side.receive(init, 1.0) == side.receive(init, 2.0) == [Send(KNOWN_AT, first)]
    (chunk,) = only(side.receive(resume, 3.0), TransferEmbeddingChunk)
    assert side.receive(init, 4.0) == side.receive(resume, 4.0) == [], "it is being written"
    (last, *_) = sent(side.transferred(ROOM, chunk.transfer_id, {}, 5.0))
    assert last == StatusReport(ROOM, Status.SUCCESS, rows=20)
    assert side.is_empty()
    assert sent(side.receive(resume, 6.0)) == [last], "the room is over, and its end may have been lost"
    assert counted(side) == {"report_repeated": 3, "init_repeated": 1, "resume_ignored": 1}


def test_a_rank_that_has_everything_is_told_again_while_its_room_goes_on_for_another() -> None:
    side = encode_side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1, rank=0, ranks=2), 0.0)
    side.receive(offer(4, 0, rank=1, ranks=2), 0.0)
    (chunk,) = only(side.submit(ROOM, 8, 0.0), TransferEmbeddingChunk)
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    success = Send(KNOWN_AT, StatusReport(ROOM, Status.SUCCESS, rows=8))
    assert side.receive(offer(8, 0, 1, rank=0, ranks=2), 1.0) == [success]
    assert side.receive(offer(8, 0, 1, rank=0, ranks=2, sent=8), 1.0) == [], "there are no more rows for it"
    assert counted(side) == {"report_repeated": 1, "resume_ignored": 1}
    (chunk,) = only(side.receive(offer(4, 0, rank=1, ranks=2, sent=4), 2.0), TransferEmbeddingChunk)
    side.transferred(ROOM, chunk.transfer_id, {}, 3.0)
    assert sent(side.receive(offer(8, 0, 1, rank=0, ranks=2), 4.0)) == [success.message]


def test_a_repeated_offer_does_not_move_a_deadline() -> None:
    side, chunk = encode_side_that_writes()
    side.transferred(ROOM, chunk.transfer_id, {}, 10.0)
    side.receive(offer(8, 0, 1), 69.0)
    assert failure_of(side.tick(70.0)) is not None


def test_another_offer_than_the_one_that_was_answered_is_no_repetition() -> None:
    """A room number that is used again must not be told that its rows are there."""
    side, chunk = encode_side_that_writes(total=8)
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    used = Failure(409, f"room {ROOM} was used before")
    for other in (offer(4, 0), offer(8, 0, 1, rank=1), msgspec.structs.replace(offer(8, 0, 1), dst_port=999)):
        assert reported_failures(side.receive(other, 1.0)) == [used]
    assert side.receive(offer(8, 0, 1, sent=8), 1.0) == []


# ---- aborts


def test_an_abort_during_a_write_is_acknowledged_when_the_write_has_come_back() -> None:
    side, chunk = encode_side_that_writes()
    who = register()
    effects = side.receive(Abort(ROOM, who.address, who.session_id), 1.0)
    assert failure_of(effects) == Failure(499, f"room {ROOM} was dropped by the language side")
    assert not only(effects, DropRows), "the write still reads the rows"
    assert side.sizes()["blocks_leased"] == 5
    assert side.receive(Abort(ROOM, who.address, who.session_id), 2.0) == []
    assert side.refuse(ROOM, Failure(499, "the client is gone"), 2.0) == [], "it has ended already"
    effects = side.transferred(ROOM, chunk.transfer_id, {}, 3.0)
    assert effects == [DropRows(ROOM), Send(who.address, AbortAck(ROOM))]
    assert side.sizes()["blocks_leased"] == 0


def test_an_abort_says_why_and_the_other_ranks_are_told() -> None:
    side = encode_side_with(0, 1)
    side.expect(ROOM, 0.0)
    for rank in (0, 1):
        side.receive(offer(8, 0, 1, rank=rank, ranks=2), 0.0)
    who, failure = register(0), Failure(503, "no receive blocks within 30 s")
    effects = side.receive(Abort(ROOM, who.address, who.session_id, failure), 0.0)
    assert effects == [
        StatusChanged(ROOM, Status.FAILED, failure),
        Send(Address("language", 101), StatusReport(ROOM, Status.FAILED, failure=failure)),
        Send(who.address, AbortAck(ROOM)),
    ]


def test_a_rank_that_leaves_the_queue_is_not_told_what_it_has_said_itself() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(queued(), 0.0)
    who, failure = register(), Failure(499, "the client is gone")
    assert side.receive(Abort(ROOM, who.address, who.session_id, failure), 1.0) == [
        StatusChanged(ROOM, Status.FAILED, failure),
        Send(who.address, AbortAck(ROOM)),
    ]


def test_strangers_cannot_abort_a_room_that_has_all_of_its_ranks() -> None:
    side, chunk = encode_side_that_writes()
    assert side.receive(Abort(ROOM, RIVAL_AT, "stranger:1"), 0.0) == []
    assert counted(side) == {"abort_ignored": 1}
    assert sent(side.transferred(ROOM, chunk.transfer_id, {}, 1.0)) == [StatusReport(ROOM, Status.TRANSFERRING, rows=8)]


def test_before_that_anyone_may_abort_because_a_rank_may_never_have_offered() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    failure = Failure(503, "no receive blocks within 30 s")
    effects = side.receive(Abort(ROOM, RIVAL_AT, "queued:1", failure), 0.0)
    assert failure_of(effects) == failure
    assert sent(effects) == [AbortAck(ROOM)]


# ---- deadlines


def test_no_request_ever_came() -> None:
    side = encode_side_with()
    side.receive(offer(8, 0, 1), 0.0)
    side.receive(Ping(Address("language", 100), "language-0:1", "x"), TIMING.bootstrap)
    (failure,) = reported_failures(side.tick(TIMING.bootstrap))
    assert failure == Failure(503, f"the request of room {ROOM} did not reach the encode instance within 30 s")


def test_not_every_rank_asked() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1, ranks=2), 0.0)
    side.receive(Ping(Address("language", 100), "language-0:1", "x"), TIMING.bootstrap)
    assert failure_of(side.tick(29.9)) is None
    assert side.next_wakeup() == 30.0
    assert failure_of(side.tick(30.0)) == Failure(502, f"only 1 of 2 language ranks asked for room {ROOM} within 30 s")


def test_nobody_asked() -> None:
    side = encode_side_with()
    side.expect(ROOM, 5.0)
    side.expect(ROOM, 6.0)
    assert side.next_wakeup() == 15.0
    assert failure_of(side.tick(15.0)) == Failure(503, f"no language instance has asked for room {ROOM} within 10 s")


def test_a_short_bootstrap_deadline_is_short_for_the_first_message_too() -> None:
    side = encode_side(timing=Timing(bootstrap=2.0, first_word=10.0))
    side.expect(ROOM, 0.0)
    assert failure_of(side.tick(2.0)) == Failure(503, f"no language instance has asked for room {ROOM} within 2 s")


def test_after_the_first_message_blocks_may_take_until_the_bootstrap_deadline() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    assert side.receive(queued(), 9.0) == []
    for now in (15.0, 29.9):
        ping(side, now)
        assert side.tick(now) == []
    effects = side.tick(30.0)
    failure = Failure(503, f"the language side had no receive blocks for room {ROOM} within 30 s")
    assert failure_of(effects) == failure
    assert reported_failures(effects) == [failure], "the rank that waits is told"
    assert side.is_empty()


def test_the_tower_never_ran() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 5.0)
    ping(side, 64.9)
    assert side.tick(64.9) == []
    ping(side, 65.0)
    assert failure_of(side.tick(65.0)) == Failure(500, f"the encoder had no rows for room {ROOM} within 60 s")


def test_no_source_block_came_free() -> None:
    side = encode_side_with(blocks=1)
    for room in (1, 2):
        side.expect(room, 0.0)
        side.receive(offer(4, room, room=room), 0.0)
        side.submit(room, 4, 5.0 * room)
    ping(side, 65.0)
    assert failure_of(side.tick(65.0)) == Failure(502, "a write of room 1 did not end within 60 s")
    ping(side, 70.0)
    assert failure_of(side.tick(70.0)) == Failure(503, "no source blocks for room 2 within 60 s")
    assert not side.is_empty(), "the write is still under way"
    assert side.transferred(1, 1, {}, 71.0) == [DropRows(1)]
    assert side.is_empty()


def test_no_resume_came() -> None:
    side, chunk = encode_side_that_writes()
    side.transferred(ROOM, chunk.transfer_id, {}, 10.0)
    ping(side, 69.9)
    assert side.tick(69.9) == []
    ping(side, 70.0)
    failure = failure_of(side.tick(70.0))
    assert failure == Failure(502, f"the language side offered no blocks for more rows of room {ROOM} within 60 s")


# ---- rows that are made in steps


def side_with_some_rows(ready: int, **changes: object) -> tuple[EncodeSide, list[TransferEmbeddingChunk]]:
    """Of 20 rows those before `ready` are made, and the language rank has space for 8."""
    side = encode_side()
    side.receive(register(**changes), 0.0)
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    return side, only(side.submit(ROOM, 20, 0.0, ready=ready), TransferEmbeddingChunk)


def test_a_step_ends_at_what_is_made_and_the_chunk_goes_on_with_more() -> None:
    side, [step] = side_with_some_rows(3, takes_progress=True)
    assert (step.window.rows, step.destinations[0].stop_row) == (3, 3)
    assert side.transferred(ROOM, 1, {}, 1.0) == [Send(KNOWN_AT, Progress(ROOM, 3))], "no report: more is to come"
    [step] = only(side.more_rows(ROOM, 7, 2.0), TransferEmbeddingChunk)
    assert (step.window.first_row, step.window.rows, step.window.stage) == (3, 4, True)
    assert (step.destinations[0].first_row, step.destinations[0].start_row, step.destinations[0].stop_row) == (0, 3, 7)
    assert side.more_rows(ROOM, 20, 3.0) == [], "a write is under way"
    [told, step] = side.transferred(ROOM, 2, {}, 4.0)
    assert told == Send(KNOWN_AT, Progress(ROOM, 7))
    assert (step.destinations[0].start_row, step.destinations[0].stop_row) == (7, 8)
    assert sent(side.transferred(ROOM, 3, {}, 5.0)) == [StatusReport(ROOM, Status.TRANSFERRING, 8)]


def test_who_takes_no_progress_is_told_when_its_offer_is_full() -> None:
    side, _ = side_with_some_rows(3)
    assert side.transferred(ROOM, 1, {}, 1.0) == []
    side.more_rows(ROOM, 20, 2.0)
    assert sent(side.transferred(ROOM, 2, {}, 3.0)) == [StatusReport(ROOM, Status.TRANSFERRING, 8)]


def test_as_long_as_nothing_is_made_a_room_takes_no_source_blocks() -> None:
    side, steps = side_with_some_rows(0)
    assert steps == []
    assert side.sizes()["blocks_leased"] == side.sizes()["waiting_for_blocks"] == 0
    assert only(side.more_rows(ROOM, 1, 0.0), TransferEmbeddingChunk)


def test_rows_that_come_between_two_offers_are_written_with_the_next() -> None:
    side, _ = side_with_some_rows(8)
    side.transferred(ROOM, 1, {}, 1.0)
    assert side.receive(offer(8, 0, 1, sent=8), 2.0) == [], "none of these rows is made"
    [step] = only(side.more_rows(ROOM, 20, 3.0), TransferEmbeddingChunk)
    assert (step.destinations[0].start_row, step.destinations[0].stop_row) == (8, 16)


def test_a_room_waits_for_its_encoder_anew_with_all_that_it_makes() -> None:
    side, _ = side_with_some_rows(3)
    side.transferred(ROOM, 1, {}, 10.0)
    side.more_rows(ROOM, 5, 50.0)
    side.transferred(ROOM, 2, {}, 51.0)
    side.more_rows(ROOM, 5, 60.0)
    ping(side, 110.0)
    assert failure_of(side.tick(119.9)) is None
    failure = failure_of(side.tick(120.0))
    text = f"the encoder made no more rows of room {ROOM} within 60 s: 5 of 20 are there"
    assert failure == Failure(500, text)


def test_rows_do_not_extend_the_deadline_for_the_other_half() -> None:
    side = encode_side_with(0)
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1, ranks=2), 0.0)
    side.submit(ROOM, 20, 5.0, ready=0)
    side.more_rows(ROOM, 10, 29.0)
    ping(side, 29.0)
    assert failure_of(side.tick(30.0)) == Failure(502, f"only 1 of 2 language ranks asked for room {ROOM} within 30 s")


def test_rows_of_a_room_that_is_over_are_dropped() -> None:
    side, _ = side_with_some_rows(3)
    side.refuse(ROOM, Failure(400, "the second image cannot be decoded"), 1.0)
    assert side.more_rows(ROOM, 7, 1.0) == [], "the write under way needs them"
    assert only(side.transferred(ROOM, 1, {}, 2.0), DropRows)
    assert side.more_rows(ROOM, 9, 3.0) == [DropRows(ROOM)]


@pytest.mark.parametrize("ready", [2, 21])
def test_rows_are_neither_unmade_nor_more_than_there_are(ready: int) -> None:
    side, _ = side_with_some_rows(3)
    with pytest.raises(LocalError, match=f"rows before {ready} of 20 are made, after 3"):
        side.more_rows(ROOM, ready, 0.0)


def test_more_rows_of_a_room_that_has_none_are_our_own_fault() -> None:
    side = encode_side_with(0)
    side.expect(ROOM, 0.0)
    with pytest.raises(LocalError, match="has no rows yet"):
        side.more_rows(ROOM, 3, 0.0)


def test_of_two_ranks_each_gets_what_is_made_and_both_reports_wait() -> None:
    side = encode_side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(offer(4, 0, rank=0, ranks=2), 0.0)
    side.receive(offer(8, 0, 1, rank=1, ranks=2), 0.0)
    [step] = only(side.submit(ROOM, 20, 0.0, ready=6), TransferEmbeddingChunk)
    assert [part.stop_row for part in step.destinations] == [4, 6]
    assert sent(side.transferred(ROOM, 1, {}, 0.0)) == []
    [step] = only(side.more_rows(ROOM, 20, 0.0), TransferEmbeddingChunk)
    assert [(part.session_id, part.start_row, part.stop_row) for part in step.destinations] == [("language-1:1", 6, 8)]
    assert [report.rows for report in sent(side.transferred(ROOM, 2, {}, 0.0))] == [4, 8]  # type: ignore[attr-defined]
