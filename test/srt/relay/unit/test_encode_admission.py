"""Who is a session of an encode rank: registrations, two that claim one session, how many there may be, and silence."""

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
from embedding_relay.protocol.errors import Failure, LocalError
from embedding_relay.protocol.messages import (
    Address,
    Ping,
    Register,
    StatusReport,
)
from embedding_relay.protocol.status import Status
from support.protocol import (
    KNOWN_AT,
    RIVAL,
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
    rival_offer,
    sent,
)

# ---- two registrations of one session


def test_a_second_registration_of_a_session_changes_nothing_before_there_is_proof() -> None:
    side, chunk = encode_side_that_writes()
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


def test_a_process_that_is_proven_gone_is_replaced_by_the_new_one() -> None:
    side, chunk = encode_side_that_writes()
    side.receive(RIVAL, 1.0)
    effects = side.proven(SESSION, KNOWN_AT, True, 2.0)
    text = "session language-0:1 has ended: another process is registered in its place"
    assert failure_of(effects) == Failure(502, text)
    assert side.session(SESSION) == RIVAL
    assert side.transferred(ROOM, chunk.transfer_id, {}, 2.0) == [DropRows(ROOM)]
    assert side.is_empty()


def test_blocks_of_the_rooms_of_a_replaced_session_go_to_the_next_that_waits() -> None:
    side = encode_side_with(0, 1, blocks=1)
    for room, rank in ((1, 0), (2, 1)):
        side.expect(room, 0.0)
        side.receive(offer(4, room, room=room, rank=rank), 0.0)
        for chunk in only(side.submit(room, 8, 0.0), TransferEmbeddingChunk):
            side.transferred(room, chunk.transfer_id, {}, 0.0)
    side.receive(RIVAL, 1.0)
    (chunk,) = only(side.proven(SESSION, KNOWN_AT, True, 2.0), TransferEmbeddingChunk)
    assert chunk.room == 2


def test_a_session_is_served_on_while_somebody_claims_it_from_its_own_address() -> None:
    side = encode_side_with()
    assert side.receive(msgspec.structs.replace(RIVAL, address=KNOWN_AT), 1.0) == [ProveGone(SESSION, KNOWN_AT)]
    side.expect(ROOM, 1.0)
    assert side.receive(offer(8, 0, 1), 1.0) == [StatusChanged(ROOM, Status.WAITING_FOR_INPUT)]


def test_no_room_of_a_replaced_session_begins_while_the_others_end() -> None:
    """Its rows would go into the memory of the new process, which has given those blocks to somebody else."""
    side = encode_side_with(blocks=1)
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
    side = encode_side_with()
    side.receive(RIVAL, 1.0)
    assert side.receive(rival_offer(8), 1.0) == []
    (failure,) = reported_failures(side.receive(msgspec.structs.replace(rival_offer(9), dst_port=777), 1.0))
    assert failure.code == 421, "somebody else, who need not wait"
    misdirected = Failure(421, f"session {SESSION} is not registered here")
    answer = Send(RIVAL_AT, StatusReport(8, Status.FAILED, failure=misdirected), to_stranger=True)
    assert answer in side.proven(SESSION, KNOWN_AT, is_gone, 2.0)
    assert side.sizes()["contenders"] == 0
    side.expect(8, 3.0)
    assert (StatusChanged(8, Status.WAITING_FOR_INPUT) in side.receive(rival_offer(8), 3.0)) is is_gone


def test_an_idle_session_is_not_replaced_without_proof_either() -> None:
    side = encode_side_with()
    assert side.receive(RIVAL, 2 * TIMING.silence) == [ProveGone(SESSION, KNOWN_AT)]


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_session_that_was_forgotten_meanwhile_is_free_for_whoever_registers_then(is_gone: bool) -> None:
    side = encode_side_with()
    now = TIMING.forget_session
    side.receive(RIVAL, now - 1)
    side.tick(now)
    side.proven(SESSION, KNOWN_AT, is_gone, now)
    assert side.session(SESSION) == (RIVAL if is_gone else None)
    side.receive(RIVAL, now)
    assert side.session(SESSION) == RIVAL


def test_proof_about_one_address_says_nothing_about_who_has_the_session_from_another() -> None:
    """While the proof was sought, the session was forgotten, and a third process has registered it."""
    side = encode_side_with()
    now = TIMING.forget_session
    side.receive(RIVAL, now - 1)
    side.tick(now)
    third = msgspec.structs.replace(RIVAL, address=Address("language", 777))
    side.receive(third, now)
    assert side.session(SESSION) == third
    side.expect(ROOM, now)
    side.receive(msgspec.structs.replace(rival_offer(ROOM), dst_port=777), now)
    effects = side.proven(SESSION, KNOWN_AT, True, now)
    assert failure_of(effects) is None, "its rooms go on"
    assert side.session(SESSION) == third
    assert counted(side) == {"registration_refused": 1}


def test_only_so_many_sessions_are_looked_into_at_a_time() -> None:
    side = encode_side_with(*range(65))
    rivals = [Register(RIVAL_AT, register(rank).session_id, (3 << 20, 3 << 21), handshake()) for rank in range(65)]
    questions = [only(side.receive(rival, 0.0), ProveGone) for rival in rivals]
    assert [len(asked) for asked in questions] == [1] * 64 + [0]
    assert counted(side) == {"registration_refused": 1}
    assert side.sizes()["contenders"] == 64
    for number in range(100):
        side.receive(rival_offer(number), 0.0)
    assert len(reported_failures(side.proven(SESSION, KNOWN_AT, False, 1.0))) == 64


def test_a_proof_that_nobody_asked_for_is_our_own_mistake() -> None:
    with pytest.raises(LocalError, match="nobody asked"):
        encode_side_with().proven(SESSION, KNOWN_AT, True, 0.0)


def test_a_late_registration_from_the_address_of_a_live_session_changes_nothing_for_it() -> None:
    side, chunk = encode_side_that_writes()
    stale = Register(register().address, "language-old:1", (5, 6), handshake())
    assert side.receive(stale, 1.0) == []
    assert sent(side.transferred(ROOM, chunk.transfer_id, {}, 2.0)) == [StatusReport(ROOM, Status.TRANSFERRING, rows=8)]


# ---- how many there may be


def test_an_idle_session_is_displaced_when_there_are_too_many_and_a_busy_one_is_not() -> None:
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
    ping(side, 1.0)
    side.receive(register(2), 2.0)
    assert side.sessions() == {"language-0:1", "language-2:1"}


def test_the_same_problem_is_logged_once_and_the_number_of_log_lines_is_bounded() -> None:
    side = encode_side()
    notes = [note for rank in (*range(2000), 7) for note in only(side.receive(register(rank, version=9), 0.0), Note)]
    assert len(notes) == 1000


# ---- silence


def test_the_rooms_of_a_session_that_falls_silent_fail() -> None:
    side, chunk = encode_side_that_writes()
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    ping(side, 8.0)
    assert failure_of(side.tick(22.9)) is None
    assert failure_of(side.tick(23.0)) == Failure(502, "session language-0:1 was silent for 15 s")
    assert side.sizes()["sessions"] == 1


def test_one_first_message_is_enough_and_the_silence_of_each_rank_that_sent_one_counts() -> None:
    side = encode_side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(queued(rank=1), 1.0)
    side.receive(offer(8, 0, 1, rank=0, ranks=2), 14.0)
    ping(side, 16.0)
    effects = side.tick(16.0)
    assert failure_of(effects) == Failure(502, "session language-1:1 was silent for 15 s")
    assert [send.to for send in only(effects, Send)] == [Address("language", 100), Address("language", 101)]
    assert side.is_empty()


def test_a_session_that_dies_while_its_room_is_queued_is_noticed() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(queued(), 1.0)
    assert side.next_wakeup() == 16.0
    assert side.tick(15.9) == []
    assert failure_of(side.tick(16.0)) == Failure(502, "session language-0:1 was silent for 15 s")
    side.tick(16.0 + TIMING.forget_session)
    assert side.sessions() == frozenset(), "nothing binds it any more"


def test_a_rank_that_has_all_its_rows_may_fall_silent() -> None:
    side = encode_side_with(0, 1)
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
    side = encode_side_with()
    ping(side, 100.0)
    side.tick(100.0 + TIMING.forget_session - 1)
    assert side.sessions() == {"language-0:1"}
    side.tick(100.0 + TIMING.forget_session)
    assert side.sessions() == frozenset()
    assert side.next_wakeup() is None


def test_silence_of_an_idle_session_fails_no_later_room() -> None:
    side = encode_side_with()
    side.expect(ROOM, 1000.0)
    side.receive(offer(8, 0, 1), 1000.0)
    side.tick(1010.0)
    assert not side.is_empty()
