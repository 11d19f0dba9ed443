"""The encode side alone: who is let in, what is sent when, and how rooms end."""

import pytest

from sglang.srt.disaggregation.multimodal.protocol.effects import (
    DropRows,
    Note,
    Send,
    StatusChanged,
    TransferEmbeddingChunk,
)
from sglang.srt.disaggregation.multimodal.protocol.encode_side import EncodeSide
from sglang.srt.disaggregation.multimodal.protocol.errors import Failure, LocalError
from sglang.srt.disaggregation.multimodal.protocol.messages import (
    Abort,
    AbortAck,
    Address,
    Ping,
    Pong,
    Register,
    StatusReport,
    TransferEmbeddingInfo,
)
from sglang.srt.disaggregation.multimodal.protocol.status import Status
from support.protocol import (
    BLOCK,
    ROOM,
    TIMING,
    encode_side,
    failure_of,
    handshake,
    offer,
    only,
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


def test_a_block_cannot_be_offered_to_two_rooms() -> None:
    side = side_with()
    side.receive(offer(4, 0, room=1), 0.0)
    (failure,) = reported_failures(side.receive(offer(4, 0, room=2), 0.0))
    assert failure.text == "session language-0:1 offers room 2 block 0, which room 1 has"


def test_blocks_of_a_failed_room_may_be_offered_again() -> None:
    side = side_with()
    side.receive(offer(4, 0, room=1), 0.0)
    side.refuse(1, Failure(400, "bad"), 0.0)
    assert side.receive(offer(4, 0, room=2), 0.0) == []


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
    assert side.counts() == {"resume_ignored": 1}


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
    side.expect(ROOM, 0.0)
    assert failure_of(side.tick(30.0)) == Failure(502, f"only 0 of ? language ranks asked for room {ROOM} within 30 s")


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
    assert failure == Failure(502, f"the language side offered no room for more rows of room {ROOM} within 60 s")


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


def test_the_same_session_with_other_buffers_is_another_process() -> None:
    side, chunk = writing()
    other = Register(register().address, register().session_id, (3 << 20, 3 << 21), handshake())
    assert failure_of(side.receive(other, 1.0)) == Failure(
        502, "session language-0:1 was registered again with other buffers"
    )
    assert side.session("language-0:1") == other
    assert side.transferred(ROOM, chunk.transfer_id, {}, 2.0) == [DropRows(ROOM)]
    assert side.is_empty()


def test_a_late_registration_from_the_address_of_a_living_session_harms_nobody() -> None:
    side, chunk = writing()
    stale = Register(register().address, "language-of-old:1", (5, 6), handshake())
    assert side.receive(stale, 1.0) == []
    assert sent(side.transferred(ROOM, chunk.transfer_id, {}, 2.0)) == [StatusReport(ROOM, Status.TRANSFERRING, rows=8)]


def test_a_ping_is_answered_with_who_is_here_and_who_was_asked() -> None:
    side = encode_side()
    assert side.receive(Ping(Address("l", 5), "nobody:1", "encode-0"), 0.0) == [
        Send(Address("l", 5), Pong("encode-1", "encode-0"))
    ]


def test_sizes_and_counts_have_names() -> None:
    side, _ = writing()
    assert side.sizes() == {
        "rooms": 1,
        "waiting_for_blocks": 0,
        "transfers": 1,
        "remembered": 0,
        "sessions": 1,
        "unquiet": 0,
        "blocks_free": 8 - 20 // BLOCK,
        "blocks_leased": 20 // BLOCK,
        "blocks_quarantined": 0,
    }
    side.refuse(ROOM, Failure(400, "bad"), 0.0)
    assert side.counts() == {"failed_400": 1}
