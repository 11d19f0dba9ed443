"""The encode instances that a language rank knows: looked up, told of rooms, pinged, lost, found again, forgotten."""

from collections.abc import Sequence

import pytest

from embedding_relay.protocol.effects import (
    ClearAux,
    LanguageEffect,
    Note,
    Resolve,
    Send,
    StatusChanged,
)
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import (
    Abort,
    AbortAck,
    Address,
    Ping,
    Pong,
    Register,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from support.protocol import (
    ENCODE,
    PEER,
    ROOM,
    SECOND,
    TIMING,
    failure_of,
    language_side,
    only,
    queued,
    receive_chunk,
    register,
    report,
    request_and_resolve,
    sent,
    waiting_room,
)


def pings(effects: Sequence[LanguageEffect]) -> list[Send]:
    return [send for send in only(effects, Send) if isinstance(send.message, Ping)]


# ---- lookups


def test_the_peer_is_looked_up_first_while_nothing_is_held() -> None:
    side = language_side()
    assert side.request(1, PEER, 0.0) == [Resolve(PEER)]
    assert side.request(2, PEER, 0.0) == [], "one lookup serves both"
    assert side.sizes()["blocks_leased"] == 0
    effects = side.peer_resolved(PEER, ENCODE, "encode-1", 0.0)
    assert effects[:4] == [
        Send(ENCODE, register()),
        ClearAux(0),
        Send(ENCODE, TransferEmbeddingInfo(1, "language", 100, "language-0:1", (0, 1), 1, 0, 8)),
        StatusChanged(1, Status.WAITING_FOR_INPUT),
    ]
    assert [type(message) for message in sent(effects)].count(Register) == 1
    assert [message.room for message in sent(side.request(3, PEER, 1.0))] == [3]  # type: ignore[attr-defined]


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


def test_a_peer_that_does_not_fit_is_refused_with_the_reason() -> None:
    side = language_side()
    side.request(1, PEER, 0.0)
    failure = Failure(500, "block_size is 4 here and 8 there")
    assert failure_of(side.peer_refused(PEER, failure, 0.0)) == failure


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
    assert sent(side.peer_resolved(PEER, ENCODE, "encode-1", 2.0)) == [], "it is under way"
    assert [message for message in sent(side.tick(2.0)) if isinstance(message, Abort)] == sent(effects)[:1], "again"
    side.receive(AbortAck(1), 2.5)
    assert side.sizes()["quarantined_rooms"] == 0


def test_rooms_that_wait_for_a_lookup_are_served_by_the_next_one() -> None:
    side = language_side(blocks=2)
    side.request(1, PEER, 0.0)
    side.request(2, PEER, 10.0)
    assert failure_of(side.tick(30.0)) is not None
    assert side.request(3, PEER, 31.0) == [Resolve(PEER)]
    effects = side.peer_resolved(PEER, ENCODE, "encode-1", 32.0)
    assert [message.room for message in sent(effects) if isinstance(message, TransferEmbeddingInfo)] == [2]


def test_a_room_that_nobody_could_be_told_of_ends_alone_and_disturbs_no_later_one() -> None:
    side = language_side()
    side.request(1, PEER, 0.0)
    side.request(2, PEER, 10.0)
    side.cancel(2, 10.0)
    assert failure_of(side.tick(30.0)) is not None, "the registry has not answered room 1"
    assert side.request(3, PEER, 35.0) == [Resolve(PEER)]
    assert side.tick(40.0) == [], "nobody waits for room 2"
    effects = side.peer_resolved(PEER, ENCODE, "encode-1", 41.0)
    assert [type(message) for message in sent(effects)] == [Register, TransferEmbeddingInfo]


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


def test_a_peer_that_nobody_has_watched_is_looked_up_again() -> None:
    side = language_side()
    request_and_resolve(side, now=100.0)
    receive_chunk(side, 8, 8, now=100.0)
    assert sent(side.request(8, PEER, 115.0)), "its last word is fresh"
    side.receive(report(Status.SUCCESS, 8, room=8), 115.0)
    side.copied(8, 8, 8, 115.0)
    assert side.request(9, PEER, 130.1) == [Resolve(PEER)]
    messages = sent(side.peer_resolved(PEER, ENCODE, "encode-1", 130.1))
    assert [type(message) for message in messages] == [TransferEmbeddingInfo], "it knows us"


# ---- pings


def test_pings_go_out_while_rooms_are_under_way_and_silence_ends_them() -> None:
    side = language_side()
    request_and_resolve(side)
    ping = Ping(Address("language", 100), "language-0:1", "encode-1")
    assert pings(side.tick(4.9)) == []
    assert pings(side.tick(5.0)) == [Send(ENCODE, ping)]
    side.receive(Pong("encode-1", "encode-1"), 6.0)
    assert pings(side.tick(10.0)) == [Send(ENCODE, ping)]
    assert pings(side.tick(15.0)) == [Send(ENCODE, ping)]
    effects = side.tick(20.0)
    text = f"encode instance {PEER} did not answer for 14 s"
    assert effects[:2] == [Note(text), Resolve(PEER)]
    assert failure_of(effects) == Failure(502, text)
    assert side.sizes()["blocks_quarantined"] == 2


def test_any_word_about_a_room_counts_as_a_pong() -> None:
    side = language_side()
    request_and_resolve(side)
    for now in (5.0, 10.0, 15.0, 20.0, 25.0):
        assert len(pings(side.tick(now))) == 1
        side.receive(report(Status.WAITING_FOR_INPUT, None), now + 1)


def test_a_peer_of_queued_rooms_alone_is_pinged_and_missed() -> None:
    side = waiting_room()
    for now in (5.0, 10.0):
        assert [send.to for send in pings(side.tick(now))] == [Address("other", 1), ENCODE]
        side.receive(Pong("encode-2", "encode-2"), now)
    effects = side.tick(15.0)
    assert Resolve(PEER) in effects
    assert failure_of(effects) is None, "it may be only slow"
    side.receive(Pong("encode-2", "encode-2"), 15.0)
    effects = side.tick(20.0)
    assert [send.to for send in pings(effects)] == [Address("other", 1)]
    assert not only(effects, Note), "that it is lost is said once"
    assert failure_of(side.peer_unreachable(PEER, "connection refused", 16.0)) == Failure(
        502, f"encode instance {PEER} cannot be found: connection refused"
    )
    assert side.sizes()["waiting_for_blocks"] == 0


def test_a_peer_of_queued_rooms_alone_is_watched_and_need_not_be_looked_up() -> None:
    assert waiting_room().request(9, PEER, 20.0) == [Send(ENCODE, queued(room=9))]


def test_an_idle_peer_is_forgotten() -> None:
    side = language_side()
    request_and_resolve(side)
    receive_chunk(side, 8, 8)
    side.tick(TIMING.heartbeat_interval)
    assert side.sizes()["peers"] == 1
    side.tick(2 * TIMING.forget_session)
    assert side.sizes()["peers"] == 0
    assert side.next_wakeup() is None


# ---- lost, and found again


def lost_peer() -> LanguageSide:
    side = language_side()
    request_and_resolve(side)
    for now in (5.0, 10.0, 15.0):
        side.tick(now)
    assert side.sizes()["blocks_quarantined"] == 2
    return side


def test_nothing_is_sent_to_a_lost_peer_until_its_registry_has_answered() -> None:
    side = lost_peer()
    side.peer_unreachable(PEER, "timeout", 16.0)
    side.receive(AbortAck(ROOM), 16.5)
    assert side.request(8, PEER, 17.0) == [Resolve(PEER)]
    assert [type(m) for m in sent(side.peer_resolved(PEER, ENCODE, "encode-1", 18.0))] == [
        Register,
        TransferEmbeddingInfo,
    ]


def test_rooms_of_a_lost_peer_wait_for_its_lookup_however_long_its_blocks_are_in_quarantine() -> None:
    side = lost_peer()
    side.peer_unreachable(PEER, "timeout", 16.0)
    for now in range(20, 100):
        side.tick(float(now))
        side.peer_unreachable(PEER, "timeout", float(now))
    assert side.sizes()["quarantine_overdue"] == 1
    assert side.request(8, PEER, 100.0) == [Resolve(PEER)]


def test_a_lost_peer_is_forgotten_with_its_last_room() -> None:
    side = lost_peer()
    side.peer_unreachable(PEER, "timeout", 16.0)
    side.receive(AbortAck(ROOM), 17.0)
    assert side.sizes()["peers"] == 0
    assert side.sizes()["blocks_free"] == 8
    assert side.tick(2000.0) == [], "nobody is pinged any more"
    assert side.next_wakeup() is None


@pytest.mark.parametrize("instance", ["encode-1", "encode-9"])
def test_a_peer_that_is_found_again_is_told_again(instance: str) -> None:
    side = waiting_room()
    for now in (5.0, 10.0, 15.0):
        side.tick(now)
    assert sent(side.peer_resolved(PEER, ENCODE, instance, 16.0)) == [register(blocks=2), queued(room=8)]


# ---- what proves that nothing more can land


def test_silence_is_no_proof_but_a_new_instance_elsewhere_is() -> None:
    side = lost_peer()
    assert side.peer_unreachable(PEER, "timeout", 16.0) == []
    assert side.sizes()["blocks_quarantined"] == 2
    assert Resolve(PEER) in side.tick(40.0)
    side.peer_resolved(PEER, ENCODE, "encode-1", 41.0)
    assert side.sizes()["blocks_quarantined"] == 2, "it was only slow"
    side.peer_resolved(PEER, Address("encode", 2), "encode-2", 42.0)
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


def test_a_dead_peer_of_queued_rooms_is_looked_up_again() -> None:
    side = waiting_room()
    assert side.peer_dead(PEER, 1.0) == [Resolve(PEER)]
    assert sent(side.peer_resolved(PEER, ENCODE, "encode-9", 2.0)) == [register(blocks=2), queued(room=8)]


# ---- restarts


def test_a_pong_of_another_instance_ends_the_rooms_of_the_old_one() -> None:
    side = language_side(blocks=2)
    request_and_resolve(side, ROOM, 8)
    effects = side.receive(Pong("encode-2", "encode-1"), 1.0)
    assert effects[0] == Resolve(PEER), "room 8 still waits"
    assert failure_of(effects) == Failure(502, f"encode instance {PEER} was restarted")
    side.receive(AbortAck(ROOM), 2.0)
    effects = side.peer_resolved(PEER, Address("encode", 2), "encode-2", 3.0)
    assert [type(message) for message in sent(effects)] == [Register, TransferEmbeddingInfo]


def test_a_peer_that_was_restarted_is_told_of_the_rooms_that_wait_for_it() -> None:
    side = waiting_room()
    assert side.receive(Pong("encode-9", "encode-1"), 1.0) == [Resolve(PEER)]
    where = Address("encode", 2)
    effects = side.peer_resolved(PEER, where, "encode-9", 2.0)
    assert effects == [Send(where, register(blocks=2)), Send(where, queued(room=8))]
    assert sent(side.peer_resolved(PEER, where, "encode-9", 3.0)) == []
    assert sent(side.peer_resolved(PEER, ENCODE, "encode-10", 3.0)) == [register(blocks=2), queued(room=8)]
