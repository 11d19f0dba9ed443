"""What an encode rank knows of a language rank: does it fit, which blocks are on offer to whom, which writes failed."""

import pytest

from embedding_relay.protocol.effects import (
    DropRows,
    Note,
    Send,
    StatusChanged,
)
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.messages import (
    Abort,
    AbortAck,
    Ping,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from support.protocol import (
    KNOWN_AT,
    RIVAL_AT,
    ROOM,
    SESSION,
    counted,
    encode_side,
    encode_side_that_writes,
    encode_side_with,
    failure_of,
    offer,
    only,
    register,
    reported_failures,
    rival_offer,
    sent,
)

# ---- the handshake


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 64}, "block_size is 4 at the encode side and 64 at the language side"),
        ({"dtype": "float16"}, "dtype is bfloat16 at the encode side and float16 at the language side"),
        ({"version": 9}, "version is 1 at the encode side and 9 at the language side"),
        ({"deepstack_rows": 3}, "deepstack_rows is 0 at the encode side and 3 at the language side"),
        ({"item_lens": (64, 17)}, "item_lens is (64, 16) at the encode side and (64, 17) at the language side"),
        ({"model": (("name", "b"),)}, "model name is a at the encode side and b at the language side"),
        ({"model": ()}, "model name is a at the encode side and unknown at the language side"),
        (
            {"model": (("name", "a"), ("layers", "3"))},
            "model layers is unknown at the encode side and 3 at the language side",
        ),
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
    assert counted(side) == {"handshake_refused": 1, 500: 1}


def test_of_a_model_that_is_another_altogether_a_few_differences_are_named() -> None:
    facts = tuple((f"fact{number}", "9") for number in range(20))
    (note,) = only(encode_side().receive(register(0, model=facts), 0.0), Note)
    assert note.text.count(" at the language side") == 5
    assert note.text.endswith("; and 16 more")


def test_pools_may_differ_in_size() -> None:
    side = encode_side()
    assert side.receive(register(0, blocks=9000), 0.0) == []


# ---- blocks on offer


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (offer(4, 8), "block 8, but has only 8 blocks"),
        (offer(4, 8, 0), "block 8, but has only 8 blocks"),
        (offer(9, 0, 1), "space for 9 rows in 2 blocks of 4"),
    ],
)
def test_an_offer_that_cannot_be_true_fails_the_room(bad: TransferEmbeddingInfo, words: str) -> None:
    side = encode_side_with(0, 1)
    side.expect(ROOM, 0.0)
    side.receive(offer(4, 0, rank=1, ranks=3), 0.0)
    effects = side.receive(bad, 0.0)
    assert {failure.code for failure in reported_failures(effects)} == {502}
    assert all(words in failure.text for failure in reported_failures(effects))
    assert len(reported_failures(effects)) == 2, "both ranks are told"
    assert failure_of(effects) is not None
    assert side.is_empty()


@pytest.mark.parametrize("bad", [offer(4, 8, sent=8), offer(9, 0, 1, sent=8)])
def test_a_resume_that_cannot_be_true_fails_the_room_too(bad: TransferEmbeddingInfo) -> None:
    side, chunk = encode_side_that_writes()
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    (failure,) = reported_failures(side.receive(bad, 0.0))
    assert failure.code == 502
    assert side.is_empty()


def test_a_block_cannot_be_offered_to_two_rooms_whose_requests_are_here() -> None:
    side = encode_side_with()
    for room in (1, 2):
        side.expect(room, 0.0)
    side.receive(offer(4, 0, room=1), 0.0)
    (failure,) = reported_failures(side.receive(offer(4, 0, room=2), 0.0))
    assert failure.text == "session language-0:1 offers room 2 block 0, which room 1 has"


@pytest.mark.parametrize("blocks", [(0, 5, 6), (5, 0, 6), (5, 6, 0)])
def test_no_block_of_an_offer_may_be_another_room_s(blocks: tuple[int, ...]) -> None:
    side = encode_side_with()
    for room in (1, 2):
        side.expect(room, 0.0)
    side.receive(offer(4, 0, room=1), 0.0)
    (failure,) = reported_failures(side.receive(offer(12, *blocks, room=2), 0.0))
    assert failure.text == "session language-0:1 offers room 2 block 0, which room 1 has"


def test_an_offer_that_is_refused_claims_nothing() -> None:
    side = encode_side_with()
    for room in (1, 2, 3):
        side.expect(room, 0.0)
    side.receive(offer(4, 0, room=1), 0.0)
    side.receive(offer(8, 5, 0, room=2), 0.0)
    assert side.receive(offer(4, 5, room=3), 0.0) == [StatusChanged(3, Status.WAITING_FOR_INPUT)]


def test_a_resume_cannot_take_the_block_of_another_room() -> None:
    side, chunk = encode_side_that_writes()
    side.transferred(ROOM, chunk.transfer_id, {}, 0.0)
    side.expect(8, 0.0)
    side.receive(offer(4, 5, room=8), 0.0)
    (failure,) = reported_failures(side.receive(offer(4, 5, sent=8), 0.0))
    assert failure.text == "session language-0:1 offers room 7 block 5, which room 8 has"


def test_an_invented_room_takes_no_block_from_a_real_one() -> None:
    """Anybody can offer blocks in the name of a session, but not make a request arrive."""
    side = encode_side_with()
    side.receive(offer(32, *range(8), room=666), 0.0)
    side.expect(ROOM, 0.0)
    assert side.receive(offer(8, 0, 1), 0.0) == [StatusChanged(ROOM, Status.WAITING_FOR_INPUT)]


def test_blocks_of_a_failed_room_may_be_offered_again() -> None:
    side = encode_side_with()
    for room in (1, 2):
        side.expect(room, 0.0)
    side.receive(offer(4, 0, room=1), 0.0)
    side.refuse(1, Failure(400, "bad"), 0.0)
    assert side.receive(offer(4, 0, room=2), 0.0) == [StatusChanged(2, Status.WAITING_FOR_INPUT)]


# ---- who speaks for a session


def test_what_is_said_in_the_name_of_a_session_from_elsewhere_is_not_the_session_s() -> None:
    side = encode_side_with()
    side.expect(ROOM, 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    side.receive(Ping(RIVAL_AT, SESSION, "encode-1"), 14.0)
    (failure,) = reported_failures(side.receive(rival_offer(8), 14.0))
    assert failure.code == 421
    assert failure_of(side.tick(15.0)) == Failure(502, "session language-0:1 was silent for 15 s")


# ---- writes that failed


def test_a_failed_write_fails_the_room_and_holds_the_acknowledgement_back() -> None:
    side, chunk = encode_side_that_writes()
    effects = side.transferred(ROOM, chunk.transfer_id, {"language-0:1": "code -1"}, 0.0)
    assert reported_failures(effects) == [Failure(502, "the write to language-0:1 failed: code -1")]
    assert only(effects, DropRows) == [DropRows(ROOM)]
    who = register()
    assert side.receive(Abort(ROOM, who.address, who.session_id), 1.0) == []
    assert side.receive(Abort(ROOM, who.address, who.session_id), 2.0) == []
    assert side.session_quiet("language-0:1", 3.0) == [Send(who.address, AbortAck(ROOM))]
    assert side.session_quiet("language-0:1", 4.0) == []
    assert sent(side.receive(Abort(ROOM, who.address, who.session_id), 5.0)) == [AbortAck(ROOM)]


def test_an_abort_during_a_write_that_then_fails_waits_for_quiet_too() -> None:
    side, chunk = encode_side_that_writes()
    who = register()
    side.receive(Abort(ROOM, who.address, who.session_id), 1.0)
    assert side.transferred(ROOM, chunk.transfer_id, {"language-0:1": "code -1"}, 2.0) == [DropRows(ROOM)]
    assert sent(side.session_quiet("language-0:1", 3.0)) == [AbortAck(ROOM)]


def test_no_acknowledgement_goes_to_an_address_at_which_a_failed_write_may_still_land() -> None:
    """Another session may name that address in its abort: the rank there would take the answer for its own."""
    side, chunk = encode_side_that_writes()
    side.transferred(ROOM, chunk.transfer_id, {"language-0:1": "code -1"}, 0.0)
    assert side.receive(Abort(ROOM, KNOWN_AT, "stranger:1"), 1.0) == []
    assert sent(side.receive(Abort(ROOM, RIVAL_AT, "stranger:1"), 1.0)) == [AbortAck(ROOM)]
    assert side.session_quiet("language-0:1", 2.0) == [], "the rank itself has not asked yet"
    assert sent(side.receive(Abort(ROOM, KNOWN_AT, "language-0:1"), 3.0)) == [AbortAck(ROOM)]
