"""What messages say of themselves; their frames are tested with the codec."""

import pytest

from embedding_relay.protocol.messages import Address, Item, Run, flaw_of_items
from support.protocol import KEY, KNOWN_AT, SESSION, offer


def test_an_address_is_written_as_a_url_has_it() -> None:
    assert str(Address("10.0.0.2", 4711)) == "10.0.0.2:4711"
    assert str(Address("fe80::1", 4711)) == "[fe80::1]:4711"


def test_rows_that_were_sent_make_an_offer_a_resume() -> None:
    assert not offer(8).is_resume
    assert offer(8, sent=8).is_resume


def test_an_offer_says_who_makes_it() -> None:
    assert (offer(8).address, offer(8).session_id) == (KNOWN_AT, SESSION)


def test_an_item_knows_its_rows() -> None:
    item = Item(KEY, ((2, 5), (8, 9)))
    assert item.rows == 4
    assert [row for row in range(12) if item.overlaps(row, row + 1)] == [2, 3, 4, 8]
    assert item.overlaps(0, 3)
    assert not item.overlaps(5, 8)


@pytest.mark.parametrize(
    ("runs", "flaw"),
    [
        ([((0, 2), (2, 3)), ((3, 4),)], ""),
        ([((5, 9),), ((0, 5),)], ""),
        ([((2, 3), (0, 1))], "not in order"),
        ([((0, 3), (2, 4))], "not in order"),
        ([((0, 3),), ((2, 4),)], "another item's too"),
        ([((3, 3),)], "rows 3 to 3 are none"),
        ([((4, 3),)], "rows 4 to 3 are none"),
    ],
)
def test_items_share_no_row_and_each_is_in_order(runs: list[tuple[Run, ...]], flaw: str) -> None:
    found = flaw_of_items(Item(KEY, one) for one in runs)
    assert flaw in found
    assert bool(flaw) is bool(found)
