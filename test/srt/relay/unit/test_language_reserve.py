"""How many rows the language side reserves before the length of a request is known."""

from embedding_relay.protocol.language.reserve import DefaultReservation
from embedding_relay.protocol.messages import (
    TransferEmbeddingInfo,
)
from support.protocol import (
    ENCODE,
    PEER,
    ROOM,
    SECOND,
    first_offers,
    language_side,
    receive_chunk,
    sent,
)


def test_a_fixed_default_never_changes() -> None:
    reservation = DefaultReservation(1024, 65536)
    reservation.observe(5)
    assert reservation.rows(1000) == 1024


def test_auto_learns_a_high_quantile_within_a_fair_share() -> None:
    reservation = DefaultReservation(None, 160_000, 128)
    assert reservation.rows(1) == 8192
    assert reservation.rows(40) == 4000
    assert reservation.rows(0) == 8192
    for total in range(1, 101):
        reservation.observe(total)
    assert reservation.rows(1) == 91
    for _ in range(256):
        reservation.observe(30_000)
    assert reservation.rows(1) == reservation.rows(16) == 10_000, "for fifteen more there is as much"
    assert reservation.rows(32) == 5_000
    assert reservation.rows(100_000) == 128, "a block"


def test_of_the_first_requests_the_longest_is_learned() -> None:
    reservation = DefaultReservation(None, 40_000)
    learned = []
    for total in (5, 7, 6):
        reservation.observe(total)
        learned.append(reservation.rows(1))
    assert learned == [5, 7, 7]


def test_auto_shares_the_pool_with_the_rooms_that_may_come() -> None:
    side = language_side(blocks=96, default=None)
    side.request(1, PEER, 0.0, hint_rows=4)
    side.peer_resolved(PEER, ENCODE, "encode-1", 0.0)
    side.request(2, SECOND, 0.0)
    (init,) = sent(side.peer_resolved(SECOND, ENCODE, "encode-2", 0.0))[1:]
    assert isinstance(init, TransferEmbeddingInfo)
    assert init.allocated_tokens == 24, "a sixteenth of 96 blocks"


def test_auto_is_used_for_first_offers() -> None:
    side = language_side(blocks=96, default=None)
    assert first_offers(side)[ROOM].allocated_tokens == 24, "a sixteenth of 96 blocks of four rows"
    receive_chunk(side, 5, 5)
    (init,) = sent(side.request(8, PEER, 1.0))
    assert isinstance(init, TransferEmbeddingInfo)
    assert init.allocated_tokens == 5
