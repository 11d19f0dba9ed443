"""What messages say of themselves; their frames are tested with the codec."""

from embedding_relay.protocol.messages import Address
from support.protocol import KNOWN_AT, SESSION, offer


def test_an_address_is_written_as_a_url_has_it() -> None:
    assert str(Address("10.0.0.2", 4711)) == "10.0.0.2:4711"
    assert str(Address("fe80::1", 4711)) == "[fe80::1]:4711"


def test_rows_that_were_sent_make_an_offer_a_resume() -> None:
    assert not offer(8).is_resume
    assert offer(8, sent=8).is_resume


def test_an_offer_says_who_makes_it() -> None:
    assert (offer(8).address, offer(8).session_id) == (KNOWN_AT, SESSION)
