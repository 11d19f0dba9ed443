"""The encode side alone: who is let in, what is sent when, and how rooms end."""

import msgspec
import pytest

from embedding_relay.protocol.effects import (
    DropRows,
    Note,
    ProveGone,
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
    Register,
    StatusReport,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Timing
from support.protocol import (
    BLOCK,
    ROOM,
    TIMING,
    counted,
    encode_side,
    failure_of,
    handshake,
    offer,
    only,
    queued,
    register,
    reported_failures,
    sent,
)

LATER = 1000.0


def side_with(*ranks: int, blocks: int = 8) -> EncodeSide:
    side = encode_side(blocks)
    for rank in ranks or (0,):
        side.receive(register(rank), 0.0)
    return side


def writing(total: int = 20, allocated: int = 8) -> tuple[EncodeSide, TransferEmbeddingChunk]:
    """A room whose first write is under way."""
    side = side_with()
    side.expect(ROOM, 0.0)
    side.receive(offer(allocated, 0, 1), 0.0)
    (chunk,) = only(side.submit(ROOM, total, 0.0), TransferEmbeddingChunk)
    return side, chunk


# ---- getting together


@pytest.mark.parametrize("expect_first", [True, False])
def test_a_room_waits_for_its_own_half_and_for_every_rank(expect_first: bool) -> None:
    side = side_with(0, 1)
    steps = [
        lambda: side.expect(ROOM, 0.0),
        lambda: side.receive(offer(8, 0, 1, rank=0, ranks=2), 0.0),
        lambda: side.receive(offer(8, 0, 1, rank=1, ranks=2), 0.0),
    ]
    *early, last = steps if expect_first else reversed(steps)
    assert [step() for step in early] == [[], []]
    assert last() == [StatusChanged(ROOM, Status.WAITING_FOR_INPUT)]


def test_a_session_must_register_first() -> None:
    side = encode_side()
    (failure,) = reported_failures(side.receive(offer(8), 0.0))
    assert failure == Failure(421, "session language-0:1 is not registered here")
    assert side.is_empty()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 64}, "block_size is 4 at the encode side and 64 at the language side"),
        ({"dtype": "float16"}, "dtype is bfloat16 at the encode side and float16 at the language side"),
        ({"version": 9}, "version is 1 at the encode side and 9 at the language side"),
        ({"deepstack_rows": 3}, "deepstack_rows is 0 at the encode side and 3 at the language side"),
        ({"item_lens": (64, 17)}, "item_lens is (64, 16) at the encode side and (64, 17) at the language side"),
    ],
)
def test_a_mismatch_is_refused_with_both_values(changes: dict[str, object], words: str) -> None:
    side = encode_side()
    (note,) = only(side.receive(register(0, **changes), 0.0), Note)
    assert words in note.text
    side.expect(ROOM, 0.0)
    effects = side.receive(offer(8), 0.0)
    (failure,) = reported_failures(effects)
    assert failure.code == 500
    assert words in failure.text
    assert failure_of(effects) == failure


def test_pools_may_differ_in_size() -> None:
    side = encode_side()
    assert side.receive(register(0, blocks=9000), 0.0) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (offer(4, 8), "block 8, but has only 8 blocks"),
        (offer(9, 0, 1), "space for 9 rows in 2 blocks of 4"),
        (offer(4, 0, ranks=2), ""),
    ],
)
def test_an_offer_that_cannot_be_true_fails_the_room(bad: TransferEmbeddingInfo, words: str) -> None:
    side = side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(offer(4, 0, rank=1, ranks=3), 0.0)
    effects = side.receive(bad, 0.0)
    assert {failure.code for failure in reported_failures(effects)} == {502}
    assert all(words in failure.text for failure in reported_failures(effects))
    assert len(reported_failures(effects)) == 2, "both ranks are told"
    assert failure_of(effects) is not None
    assert side.is_empty()


def test_a_block_cannot_be_offered_to_two_rooms_whose_requests_are_here() -> None:
    side = side_with()
    for room in (1, 2):
        side.expect(room, 0.0)
    side.receive(offer(4, 0, room=1), 0.0)
    (failure,) = reported_failures(side.receive(offer(4, 0, room=2), 0.0))
    assert failure.text == "session language-0:1 offers room 2 block 0, which room 1 has"


def test_a_resume_cannot_take_the_block_of_another_room() -> None:
    side, chunk = writing()
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    side.expect(8, 0.0)
    side.receive(offer(4, 5, room=8), 0.0)
    (failure,) = reported_failures(side.receive(offer(4, 5, sent=8), 0.0))
    assert failure.text == "session language-0:1 offers room 7 block 5, which room 8 has"


def test_an_invented_room_takes_no_block_from_a_real_one() -> None:
    """Anybody can offer blocks in the name of a session, but not make a request arrive."""
    side = side_with()
    side.receive(offer(32, *range(8), room=666), 0.0)
    side.expect(ROOM, 0.0)
    assert side.receive(offer(8, 0, 1), 0.0) == [StatusChanged(ROOM, Status.WAITING_FOR_INPUT)]


def test_blocks_of_a_failed_room_may_be_offered_again() -> None:
    side = side_with()
    for room in (1, 2):
        side.expect(room, 0.0)
    side.receive(offer(4, 0, room=1), 0.0)
    side.refuse(1, Failure(400, "bad"), 0.0)
    assert side.receive(offer(4, 0, room=2), 0.0) == [StatusChanged(2, Status.WAITING_FOR_INPUT)]


def test_a_rank_too_many_is_turned_away_and_the_room_goes_on() -> None:
    side = side_with(0, 1)
    side.receive(offer(8, 0, 1), 0.0)
    (failure,) = reported_failures(side.receive(offer(8, 0, 1, rank=1), 0.0))
    assert "has all of its 1 destinations" in failure.text
    assert not side.is_empty()


# ---- sending


def test_first_and_later_chunks_follow_the_same_rule() -> None:
    side, chunk = writing(total=20, allocated=7)
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


@pytest.mark.parametrize("total", [7, 8, 9])
def test_last_means_that_what_remains_fits(total: int) -> None:
    side, chunk = writing(total=total, allocated=8)
    (report,) = sent(side.transferred(ROOM, chunk.transfer_id, {}, 1.0))
    assert isinstance(report, StatusReport)
    assert report.status is (Status.SUCCESS if total <= 8 else Status.TRANSFERRING)
    assert report.rows == min(total, 8)


def test_a_prompt_longer_than_the_pool_moves_through_a_window_and_is_reported_once_per_chunk() -> None:
    side = side_with(blocks=2)
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
    side = side_with(0, 1)
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


def test_rooms_wait_for_source_blocks_in_order_and_hold_none_meanwhile() -> None:
    side = side_with(blocks=1)
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


@pytest.mark.parametrize("again", [offer(8, 0, 1), offer(8, 4, 5), offer(8, 4, 5, sent=8), offer(8, 4, 5, sent=4)])
def test_nothing_is_sent_twice_while_a_write_is_under_way(again: TransferEmbeddingInfo) -> None:
    side, chunk = writing()
    assert side.receive(again, 0.0) == []
    assert side.submit(ROOM, 20, 0.0) == []
    assert len(sent(side.transferred(ROOM, chunk.transfer_id, {}, 0.0))) == 1


@pytest.mark.parametrize("again", [offer(8, 0, 1), offer(8, 4, 5, sent=7), offer(8, 4, 5, sent=9)])
def test_only_the_resume_that_goes_on_from_here_is_accepted(again: TransferEmbeddingInfo) -> None:
    side, chunk = writing()
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    assert side.receive(again, 0.0) == []
    assert only(side.receive(offer(8, 4, 5, sent=8), 0.0), TransferEmbeddingChunk)
    assert side.receive(offer(8, 4, 5, sent=8), 0.0) == []


def test_a_resume_cannot_be_replaced_while_it_is_served() -> None:
    side = side_with(blocks=1)
    side.expect(ROOM, 0.0)
    side.receive(offer(4, 0), 0.0)
    (chunk,) = only(side.submit(ROOM, 20, 0.0), TransferEmbeddingChunk)
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    (chunk,) = only(side.receive(offer(8, 0, 1, sent=4), 0.0), TransferEmbeddingChunk)
    assert side.receive(offer(8, 6, 7, sent=4), 0.0) == []
    (chunk,) = only(side.transferred(ROOM, chunk.transfer_id, {}, 0.0), TransferEmbeddingChunk)
    assert chunk.destinations[0].blocks == (0, 1)
    assert counted(side) == {"resume_ignored": 1}


def test_wrong_use_by_the_shell_is_refused() -> None:
    side, chunk = writing()
    with pytest.raises(LocalError, match="has no transfer 99"):
        side.transferred(ROOM, 99, {}, 0.0)
    with pytest.raises(LocalError, match="room 8 has no transfer"):
        side.transferred(8, chunk.transfer_id, {}, 0.0)
    with pytest.raises(LocalError, match="with 0 rows"):
        side.submit(8, 0, 0.0)


# ---- how rooms end


def test_a_refusal_reaches_the_language_side_also_if_it_asks_later() -> None:
    side = side_with()
    failure = Failure(400, "the image cannot be decoded")
    side.receive(offer(8, 0, 1, room=1), 0.0)
    assert reported_failures(side.refuse(1, failure, 0.0)) == [failure]
    assert side.refuse(2, failure, 0.0) == []
    assert reported_failures(side.receive(offer(8, 0, 1, room=2), 0.0)) == [failure]
    assert side.expect(2, 0.0) == [StatusChanged(2, Status.FAILED, failure)]


def test_a_failed_write_fails_the_room_and_holds_the_acknowledgement_back() -> None:
    side, chunk = writing()
    effects = side.transferred(ROOM, chunk.transfer_id, {"language-0:1": "code -1"}, 0.0)
    assert reported_failures(effects) == [Failure(502, "the write to language-0:1 failed: code -1")]
    assert only(effects, DropRows) == [DropRows(ROOM)]
    who = register()
    assert side.receive(Abort(ROOM, who.address, who.session_id), 1.0) == []
    assert side.receive(Abort(ROOM, who.address, who.session_id), 2.0) == []
    assert side.session_quiet("language-0:1", 3.0) == [Send(who.address, AbortAck(ROOM))]
    assert side.session_quiet("language-0:1", 4.0) == []
    assert sent(side.receive(Abort(ROOM, who.address, who.session_id), 5.0)) == [AbortAck(ROOM)]


def test_an_abort_during_a_write_is_acknowledged_when_the_write_has_come_back() -> None:
    side, chunk = writing()
    who = register()
    effects = side.receive(Abort(ROOM, who.address, who.session_id), 1.0)
    assert failure_of(effects) == Failure(499, f"room {ROOM} was dropped by the language side")
    assert not only(effects, DropRows), "the write still reads the rows"
    assert side.sizes()["blocks_leased"] == 5
    assert side.receive(Abort(ROOM, who.address, who.session_id), 2.0) == []
    effects = side.transferred(ROOM, chunk.transfer_id, {}, 3.0)
    assert effects == [DropRows(ROOM), Send(who.address, AbortAck(ROOM))]
    assert side.sizes()["blocks_leased"] == 0


def test_an_abort_during_a_write_that_then_fails_waits_for_quiet_too() -> None:
    side, chunk = writing()
    who = register()
    side.receive(Abort(ROOM, who.address, who.session_id), 1.0)
    assert side.transferred(ROOM, chunk.transfer_id, {"language-0:1": "code -1"}, 2.0) == [DropRows(ROOM)]
    assert sent(side.session_quiet("language-0:1", 3.0)) == [AbortAck(ROOM)]


def test_an_abort_says_why_and_the_other_ranks_are_told() -> None:
    side = side_with(0, 1)
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


def test_an_abort_that_overtakes_its_init_keeps_the_room_from_beginning() -> None:
    side = side_with()
    who = register()
    assert sent(side.receive(Abort(ROOM, who.address, who.session_id), 0.0)) == [AbortAck(ROOM)]
    assert [failure.code for failure in reported_failures(side.receive(offer(8, 0, 1), 1.0))] == [499]
    assert failure_of(side.expect(ROOM, 2.0)) is not None
    assert side.submit(ROOM, 20, 3.0) == [DropRows(ROOM)]


def test_an_ended_room_cannot_be_used_again_until_it_is_forgotten() -> None:
    side, chunk = writing(total=8)
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    assert reported_failures(side.receive(offer(8, 0, 1), 1.0)) == [Failure(409, f"room {ROOM} was used before")]
    assert side.receive(offer(8, 0, 1, sent=8), 1.0) == []
    assert side.expect(ROOM, 1.0) == [StatusChanged(ROOM, Status.SUCCESS)], "a late sample of n > 1"
    side.tick(TIMING.remember_ended)
    assert side.expect(ROOM, LATER) == []


def test_a_resume_of_an_unknown_room_is_answered() -> None:
    side = side_with()
    (failure,) = reported_failures(side.receive(offer(8, 0, 1, sent=8), 0.0))
    assert failure == Failure(502, f"room {ROOM} is not under way at this encode instance")


# ---- deadlines


def test_no_request_ever_came() -> None:
    side = side_with()
    side.receive(offer(8, 0, 1), 0.0)
    side.receive(Ping(Address("language", 100), "language-0:1", "x"), TIMING.bootstrap)
    (failure,) = reported_failures(side.tick(TIMING.bootstrap))
    assert failure == Failure(503, f"the request of room {ROOM} did not reach the encode instance within 30 s")


def test_not_every_rank_asked() -> None:
    side = side_with()
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1, ranks=2), 0.0)
    side.receive(Ping(Address("language", 100), "language-0:1", "x"), TIMING.bootstrap)
    assert failure_of(side.tick(29.9)) is None
    assert side.next_wakeup() == 30.0
    assert failure_of(side.tick(30.0)) == Failure(502, f"only 1 of 2 language ranks asked for room {ROOM} within 30 s")


def test_nobody_asked() -> None:
    side = side_with()
    side.expect(ROOM, 5.0)
    side.expect(ROOM, 6.0)
    assert side.next_wakeup() == 15.0
    assert failure_of(side.tick(15.0)) == Failure(503, f"no language instance has asked for room {ROOM} within 10 s")


def test_a_short_bootstrap_deadline_is_short_for_the_first_word_too() -> None:
    side = encode_side(timing=Timing(bootstrap=2.0, first_word=10.0))
    side.expect(ROOM, 0.0)
    assert failure_of(side.tick(2.0)) == Failure(503, f"no language instance has asked for room {ROOM} within 2 s")


def test_after_the_first_word_blocks_may_take_until_the_bootstrap_deadline() -> None:
    side = side_with()
    side.expect(ROOM, 0.0)
    assert side.receive(queued(), 9.0) == []
    for now in (15.0, 29.9):
        keep_alive(side, now)
        assert side.tick(now) == []
    effects = side.tick(30.0)
    failure = Failure(503, f"the language side had no receive blocks for room {ROOM} within 30 s")
    assert failure_of(effects) == failure
    assert reported_failures(effects) == [failure], "the rank that waits is told"
    assert side.is_empty()


def test_one_first_word_is_enough_and_each_rank_is_bound_by_its_own() -> None:
    side = side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(queued(rank=1), 1.0)
    side.receive(offer(8, 0, 1, rank=0, ranks=2), 14.0)
    keep_alive(side, 16.0)
    effects = side.tick(16.0)
    assert failure_of(effects) == Failure(502, "session language-1:1 was silent for 15 s")
    assert [send.to for send in only(effects, Send)] == [Address("language", 100), Address("language", 101)]
    assert side.is_empty()


def test_a_session_that_dies_while_its_room_is_queued_is_noticed() -> None:
    side = side_with()
    side.expect(ROOM, 0.0)
    side.receive(queued(), 1.0)
    assert side.tick(15.9) == []
    assert failure_of(side.tick(16.0)) == Failure(502, "session language-0:1 was silent for 15 s")
    side.tick(16.0 + TIMING.forget_session)
    assert side.sessions() == frozenset(), "nothing binds it any more"


def test_a_queued_room_is_taken_up_as_if_it_had_been_asked_for_at_once() -> None:
    side = side_with()
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


def test_a_first_word_may_come_before_the_request() -> None:
    side = side_with()
    assert side.receive(queued(), 0.0) == []
    assert side.receive(queued(), 1.0) == []
    assert counted(side) == {"queued_repeated": 1}
    keep_alive(side, 25.0)
    assert side.expect(ROOM, 25.0) == []
    keep_alive(side, 30.0)
    assert failure_of(side.tick(30.0)) is not None, "counted from the beginning of the room"

    side = side_with()
    side.receive(queued(), 0.0)
    keep_alive(side, 30.0)
    (failure,) = reported_failures(side.tick(30.0))
    assert failure == Failure(503, f"the request of room {ROOM} did not reach the encode instance within 30 s")


def test_a_first_word_hears_at_once_what_is_wrong() -> None:
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
    side = side_with()
    side.receive(queued(), 0.0)
    refusal = Failure(400, "the image cannot be decoded")
    assert reported_failures(side.refuse(ROOM, refusal, 1.0)) == [refusal]


def test_a_rank_that_leaves_the_queue_is_not_told_what_it_has_said_itself() -> None:
    side = side_with()
    side.expect(ROOM, 0.0)
    side.receive(queued(), 0.0)
    who, failure = register(), Failure(499, "the client is gone")
    assert side.receive(Abort(ROOM, who.address, who.session_id, failure), 1.0) == [
        StatusChanged(ROOM, Status.FAILED, failure),
        Send(who.address, AbortAck(ROOM)),
    ]


def test_whoever_else_is_queued_does_not_matter_to_a_room_that_is_complete() -> None:
    side = side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(queued(rank=1), 0.0)
    side.receive(offer(8, 0, 1), 10.0)
    keep_alive(side, 16.0)
    assert side.tick(16.0) == []
    (failure,) = reported_failures(side.receive(queued(rank=1), 16.0))
    assert "has all of its 1 destinations" in failure.text
    assert not side.is_empty()


def keep_alive(side: EncodeSide, now: float) -> None:
    side.receive(Ping(Address("language", 100), "language-0:1", "x"), now)


def test_the_tower_never_ran() -> None:
    side = side_with()
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 5.0)
    keep_alive(side, 64.9)
    assert side.tick(64.9) == []
    keep_alive(side, 65.0)
    assert failure_of(side.tick(65.0)) == Failure(500, f"the encoder had no rows for room {ROOM} within 60 s")


def test_no_source_block_came_free() -> None:
    side = side_with(blocks=1)
    for room in (1, 2):
        side.expect(room, 0.0)
        side.receive(offer(4, room, room=room), 0.0)
        side.submit(room, 4, 5.0 * room)
    keep_alive(side, 65.0)
    assert failure_of(side.tick(65.0)) == Failure(502, "a write of room 1 did not end within 60 s")
    keep_alive(side, 70.0)
    assert failure_of(side.tick(70.0)) == Failure(503, "no source blocks for room 2 within 60 s")
    assert not side.is_empty(), "the write is still under way"
    assert side.transferred(1, 1, {}, 71.0) == [DropRows(1)]
    assert side.is_empty()


def test_no_resume_came() -> None:
    side, chunk = writing()
    side.transferred(ROOM, chunk.transfer_id, {}, 10.0)
    keep_alive(side, 69.9)
    assert side.tick(69.9) == []
    keep_alive(side, 70.0)
    failure = failure_of(side.tick(70.0))
    assert failure == Failure(502, f"the language side offered no blocks for more rows of room {ROOM} within 60 s")


def test_a_session_that_falls_silent_takes_its_rooms_with_it() -> None:
    side, chunk = writing()
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    keep_alive(side, 8.0)
    assert failure_of(side.tick(22.9)) is None
    assert failure_of(side.tick(23.0)) == Failure(502, "session language-0:1 was silent for 15 s")
    assert side.sizes()["sessions"] == 1


def test_a_rank_that_has_all_its_rows_may_fall_silent() -> None:
    side = side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1, rank=0, ranks=2), 0.0)
    side.receive(offer(4, 0, rank=1, ranks=2), 0.0)
    (chunk,) = only(side.submit(ROOM, 8, 0.0), TransferEmbeddingChunk)
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    for now in (10.0, 20.0, 30.0):
        side.receive(Ping(Address("language", 101), "language-1:1", "encode-1"), now)
        assert side.tick(now) == []
    (chunk,) = only(side.receive(offer(4, 0, rank=1, ranks=2, sent=4), 31.0), TransferEmbeddingChunk)
    assert sent(side.transferred(ROOM, chunk.transfer_id, {}, 32.0)) == [StatusReport(ROOM, Status.SUCCESS, rows=8)]


def test_a_session_without_rooms_is_forgotten_after_a_long_time() -> None:
    side = side_with()
    keep_alive(side, 100.0)
    side.tick(100.0 + TIMING.forget_session - 1)
    assert side.sessions() == {"language-0:1"}
    side.tick(100.0 + TIMING.forget_session)
    assert side.sessions() == frozenset()
    assert side.next_wakeup() is None


def test_silence_of_an_idle_session_harms_no_later_room() -> None:
    side = side_with()
    side.expect(ROOM, LATER)
    side.receive(offer(8, 0, 1), LATER)
    side.tick(LATER + 10)
    assert not side.is_empty()


# ---- strangers

SESSION, KNOWN_AT = "language-0:1", Address("language", 100)
RIVAL_AT = Address("language", 999)
RIVAL = Register(RIVAL_AT, SESSION, (3 << 20, 3 << 21), handshake())


def rival_offer(room: int) -> TransferEmbeddingInfo:
    return TransferEmbeddingInfo(room, RIVAL_AT.host, RIVAL_AT.port, SESSION, (0, 1), 1, 0, 8)


def test_a_second_registration_of_a_session_changes_nothing_before_there_is_proof() -> None:
    side, chunk = writing()
    assert side.receive(RIVAL, 1.0) == [ProveGone(SESSION, KNOWN_AT)]
    assert side.receive(RIVAL, 1.0) == [], "one question at a time"
    assert side.session(SESSION) == register()
    (note,) = only(side.proven(SESSION, KNOWN_AT, False, 2.0), Note)
    assert note.text == "session language-0:1 is claimed from language:999, but language:100 may be alive"
    assert side.session(SESSION) == register()
    assert counted(side) == {"registration_refused": 1}
    assert sent(side.transferred(ROOM, chunk.transfer_id, {}, 3.0)) == [StatusReport(ROOM, Status.TRANSFERRING, rows=8)]
    side.receive(RIVAL, 4.0)
    assert side.proven(SESSION, KNOWN_AT, False, 4.0) == [], "it is said once"


def test_a_process_that_is_proven_gone_makes_way_for_the_one_in_its_place() -> None:
    side, chunk = writing()
    side.receive(RIVAL, 1.0)
    effects = side.proven(SESSION, KNOWN_AT, True, 2.0)
    text = "session language-0:1 has ended: another process is registered in its place"
    assert failure_of(effects) == Failure(502, text)
    assert side.session(SESSION) == RIVAL
    assert side.transferred(ROOM, chunk.transfer_id, {}, 2.0) == [DropRows(ROOM)]
    assert side.is_empty()


def test_no_room_of_a_replaced_session_begins_while_the_others_end() -> None:
    """Its rows would go into the memory of the new process, which has given those blocks to somebody else."""
    side = side_with(blocks=1)
    for room in (1, 2):
        side.expect(room, 0.0)
        side.receive(offer(4, room, room=room), 0.0)
        effects = side.submit(room, 8, 0.0)
        for chunk in only(effects, TransferEmbeddingChunk):
            side.transferred(room, chunk.transfer_id, {}, 0.0)
    assert side.sizes()["waiting_for_blocks"] == 1
    side.receive(RIVAL, 1.0)
    effects = side.proven(SESSION, KNOWN_AT, True, 2.0)
    assert [change.room for change in only(effects, StatusChanged)] == [1, 2]
    assert not only(effects, TransferEmbeddingChunk)


@pytest.mark.parametrize("is_gone", [True, False])
def test_offers_of_a_contender_are_answered_when_it_is_known_who_has_the_session(is_gone: bool) -> None:
    side = side_with()
    side.receive(RIVAL, 1.0)
    assert side.receive(rival_offer(8), 1.0) == []
    misdirected = Failure(421, f"session {SESSION} is not registered here")
    answer = Send(RIVAL_AT, StatusReport(8, Status.FAILED, failure=misdirected), to_stranger=True)
    assert answer in side.proven(SESSION, KNOWN_AT, is_gone, 2.0)
    assert side.sizes()["contenders"] == 0
    side.expect(8, 3.0)
    assert (StatusChanged(8, Status.WAITING_FOR_INPUT) in side.receive(rival_offer(8), 3.0)) is is_gone


def test_an_idle_session_is_not_replaced_without_proof_either() -> None:
    side = side_with()
    assert side.receive(RIVAL, 2 * TIMING.silence) == [ProveGone(SESSION, KNOWN_AT)]


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_session_that_was_forgotten_meanwhile_is_free_for_whoever_registers_then(is_gone: bool) -> None:
    side = side_with()
    now = TIMING.forget_session
    side.receive(RIVAL, now - 1)
    side.tick(now)
    side.proven(SESSION, KNOWN_AT, is_gone, now)
    assert side.session(SESSION) == (RIVAL if is_gone else None)
    side.receive(RIVAL, now)
    assert side.session(SESSION) == RIVAL


def test_only_so_many_sessions_are_looked_into_at_a_time() -> None:
    side = side_with(*range(65))
    rivals = [Register(RIVAL_AT, register(rank).session_id, (3 << 20, 3 << 21), handshake()) for rank in range(65)]
    questions = [only(side.receive(rival, 0.0), ProveGone) for rival in rivals]
    assert [len(asked) for asked in questions] == [1] * 64 + [0]
    assert side.sizes()["contenders"] == 64
    for number in range(100):
        side.receive(rival_offer(number), 0.0)
    assert len(reported_failures(side.proven(SESSION, KNOWN_AT, False, 1.0))) == 64


def test_a_proof_that_nobody_asked_for_is_our_own_mistake() -> None:
    with pytest.raises(LocalError, match="nobody asked"):
        side_with().proven(SESSION, KNOWN_AT, True, 0.0)


def test_what_is_said_in_the_name_of_a_session_from_elsewhere_is_not_the_session_s() -> None:
    side = side_with()
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    side.receive(Ping(RIVAL_AT, SESSION, "encode-1"), 14.0)
    (failure,) = reported_failures(side.receive(rival_offer(8), 14.0))
    assert failure.code == 421
    assert failure_of(side.tick(15.0)) == Failure(502, "session language-0:1 was silent for 15 s")


def test_strangers_cannot_abort_a_room_that_has_all_of_its_ranks() -> None:
    side, chunk = writing()
    assert side.receive(Abort(ROOM, RIVAL_AT, "stranger:1"), 0.0) == []
    assert counted(side) == {"abort_ignored": 1}
    assert sent(side.transferred(ROOM, chunk.transfer_id, {}, 1.0)) == [StatusReport(ROOM, Status.TRANSFERRING, rows=8)]


def test_before_that_anyone_may_abort_because_a_rank_may_never_have_offered() -> None:
    side = side_with()
    side.expect(ROOM, 0.0)
    failure = Failure(503, "no receive blocks within 30 s")
    effects = side.receive(Abort(ROOM, RIVAL_AT, "queued:1", failure), 0.0)
    assert failure_of(effects) == failure
    assert sent(effects) == [AbortAck(ROOM)]


def test_an_idle_session_makes_way_when_there_are_too_many_and_a_busy_one_does_not() -> None:
    side = encode_side(timing=msgspec.structs.replace(TIMING, max_sessions=2))
    side.receive(register(0), 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    side.receive(register(1), 1.0)
    (note,) = only(side.receive(register(2), 2.0), Note)
    assert note.text == "more than 2 sessions: idle ones must register again"
    assert side.sessions() == {"language-0:1", "language-2:1"}
    side.receive(offer(8, 0, 1, rank=2, room=8), 3.0)
    (note,) = only(side.receive(register(3), 4.0), Note)
    assert note.text == "2 sessions are busy: no more are registered"
    assert side.sessions() == {"language-0:1", "language-2:1"}
    assert counted(side) == {"session_displaced": 1, "registration_refused": 1}
    side.tick(TIMING.forget_session)


def test_whoever_was_heard_last_is_displaced_last() -> None:
    side = encode_side(timing=msgspec.structs.replace(TIMING, max_sessions=2))
    side.receive(register(0), 0.0)
    side.receive(register(1), 0.0)
    keep_alive(side, 1.0)
    side.receive(register(2), 2.0)
    assert side.sessions() == {"language-0:1", "language-2:1"}


def test_rooms_that_nobody_expects_are_bounded_in_number_and_the_oldest_gives_way() -> None:
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


def test_rooms_that_nobody_expects_are_bounded_in_blocks() -> None:
    side = encode_side(timing=msgspec.structs.replace(TIMING, max_unexpected_blocks=8))
    side.receive(register(), 0.0)
    assert side.receive(offer(4, 0, 1, 2, 3, 4, room=1), 0.0) == []
    assert len(reported_failures(side.receive(offer(4, 0, 1, 2, 3, room=2), 0.0))) == 1
    assert side.sizes()["unexpected"] == 1


def test_the_same_complaint_is_made_once_and_there_is_an_end_to_complaints() -> None:
    side = encode_side()
    notes = [note for rank in (*range(2000), 7) for note in only(side.receive(register(rank, version=9), 0.0), Note)]
    assert len(notes) == 1000


# ---- others


def test_a_late_registration_from_the_address_of_a_living_session_harms_nobody() -> None:
    side, chunk = writing()
    stale = Register(register().address, "language-of-old:1", (5, 6), handshake())
    assert side.receive(stale, 1.0) == []
    assert sent(side.transferred(ROOM, chunk.transfer_id, {}, 2.0)) == [StatusReport(ROOM, Status.TRANSFERRING, rows=8)]


def test_a_ping_is_answered_with_who_is_here_and_who_was_asked() -> None:
    side = encode_side()
    assert side.receive(Ping(Address("l", 5), "nobody:1", "encode-0"), 0.0) == [
        Send(Address("l", 5), Pong("encode-1", "encode-0"), to_stranger=True)
    ]


def test_answers_to_strangers_are_marked_and_what_a_request_needs_is_not() -> None:
    side = side_with(0, 1)
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


def test_sizes_and_counts_have_names() -> None:
    side, _ = writing()
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
