"""The items of a room of the encode side: who is told of them, what promises are worth, what is left out for whom."""

import pytest

from embedding_relay.protocol.effects import HeldByAll, TransferEmbeddingChunk
from embedding_relay.protocol.encode.items import PromptItems
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.errors import LocalError
from embedding_relay.protocol.messages import (
    MAX_ITEMS,
    MAX_RUNS,
    Abort,
    AbortAck,
    Address,
    Have,
    Item,
    Manifest,
    StatusReport,
)
from embedding_relay.protocol.status import Status
from support.protocol import (
    ITEM,
    KEY,
    KNOWN_AT,
    OTHER_KEY,
    ROOM,
    SESSION,
    counted,
    encode_side,
    encode_side_with,
    have,
    offer,
    only,
    register,
    reported_failures,
    sent,
)

OTHER = Item(OTHER_KEY, ((6, 9), (10, 12)))
ITEMS = (ITEM, OTHER, Item("", ((12, 14),)))


def side_that_knows(*ranks: int) -> EncodeSide:
    """These ranks keep rows, and are registered."""
    side = encode_side()
    for rank in ranks or (0,):
        side.receive(register(rank, takes_manifest=True), 0.0)
    return side


# ---- who is told


def test_a_rank_is_told_once_when_the_request_and_its_first_offer_are_here() -> None:
    manifest = Manifest(ROOM, ITEMS)
    side = side_that_knows()
    assert sent(side.expect(ROOM, 0.0, ITEMS)) == []
    assert sent(side.receive(offer(8, 0, 1), 0.0)) == [manifest]
    assert sent(side.expect(ROOM, 0.0, ITEMS)) == []
    side = side_that_knows()
    assert sent(side.receive(offer(8, 0, 1), 0.0)) == []
    assert sent(side.expect(ROOM, 0.0, ITEMS)) == [manifest]


def test_who_keeps_no_rows_is_not_told() -> None:
    side = encode_side_with(0)
    side.expect(ROOM, 0.0, ITEMS)
    assert sent(side.receive(offer(8, 0, 1), 0.0)) == []


@pytest.mark.parametrize(
    "items",
    [
        (),
        (Item("", ((0, 4),)),),
        (Item(KEY, ((0, 4),)), Item(OTHER_KEY, ((3, 6),))),
        tuple(Item(KEY, ((row, row + 1),)) for row in range(MAX_ITEMS + 1)),
        (Item(KEY, tuple((2 * row, 2 * row + 1) for row in range(MAX_RUNS + 1))),),
    ],
    ids=["none", "no key", "overlap", "too many items", "too many runs"],
)
def test_of_what_cannot_be_told_nothing_is_and_nothing_is_left_out(items: tuple[Item, ...]) -> None:
    side = side_that_knows()
    side.receive(have(KEY), 0.0)
    side.expect(ROOM, 0.0, items)
    assert sent(side.receive(offer(8, 0, 1), 0.0)) == []
    [chunk] = only(side.submit(ROOM, 1 << 17, 0.0), TransferEmbeddingChunk)
    assert chunk.destinations[0].left_out == ()


# ---- promises


@pytest.mark.parametrize("when", ["before the request", "before the offer", "after it"])
def test_a_promise_before_the_first_row_is_planned_leaves_the_item_out(when: str) -> None:
    side = side_that_knows()
    effects = side.receive(have(KEY), 0.0) if when == "before the request" else []
    effects += side.expect(ROOM, 0.0, ITEMS)
    effects += side.receive(have(KEY), 0.0) if when == "before the offer" else []
    effects += side.receive(offer(20, 0, 1, 2, 3, 4), 0.0)
    effects += side.receive(have(KEY), 0.0) if when == "after it" else []
    assert only(effects, HeldByAll) == [HeldByAll(ROOM, (0,))]
    [chunk] = only(side.submit(ROOM, 20, 0.0, absent=(0,)), TransferEmbeddingChunk)
    assert chunk.destinations[0].left_out == ((2, 5),)
    assert sent(side.transferred(ROOM, 1, {}, 0.0)) == [StatusReport(ROOM, Status.SUCCESS, 20, held=(ITEM,))]


def test_what_is_planned_is_decided_whatever_is_promised_later() -> None:
    side = side_that_knows()
    side.expect(ROOM, 0.0, ITEMS)
    side.receive(offer(8, 0, 1), 0.0)
    [first] = only(side.submit(ROOM, 20, 0.0), TransferEmbeddingChunk)
    assert (first.destinations[0].stop_row, first.destinations[0].left_out) == (8, ())
    side.receive(have(KEY, OTHER_KEY), 0.0)
    assert sent(side.transferred(ROOM, 1, {}, 0.0)) == [StatusReport(ROOM, Status.TRANSFERRING, 8)]
    [second] = only(side.receive(offer(12, 0, 1, 2, sent=8), 0.0), TransferEmbeddingChunk)
    assert second.destinations[0].left_out == (), "rows 6 and 7 of the item were written"


def test_an_item_goes_on_in_a_later_chunk_as_it_began() -> None:
    side = side_that_knows()
    side.receive(have(OTHER_KEY), 0.0)
    side.expect(ROOM, 0.0, ITEMS)
    side.receive(offer(8, 0, 1), 0.0)
    [first] = only(side.submit(ROOM, 20, 0.0), TransferEmbeddingChunk)
    assert first.destinations[0].left_out == ((6, 8),)
    report = StatusReport(ROOM, Status.TRANSFERRING, 8, held=(OTHER,))
    assert sent(side.transferred(ROOM, 1, {}, 0.0)) == [report]
    assert sent(side.receive(offer(8, 0, 1), 0.0)) == [report], "the answer to a repeated offer names it too"
    [second] = only(side.receive(offer(12, 0, 1, 2, sent=8), 0.0), TransferEmbeddingChunk)
    assert second.destinations[0].left_out == ((8, 9), (10, 12))
    done = StatusReport(ROOM, Status.SUCCESS, 20, held=(OTHER,))
    assert sent(side.transferred(ROOM, 2, {}, 0.0)) == [done]
    assert sent(side.receive(offer(12, 0, 1, 2, sent=8), 0.0)) == [done], "and so after the end of the room"


def test_each_rank_is_left_out_what_it_has_promised_itself() -> None:
    side = side_that_knows(0, 1)
    side.expect(ROOM, 0.0, ITEMS)
    effects = []
    for rank, keys in ((0, (KEY, OTHER_KEY)), (1, (OTHER_KEY,))):
        effects += side.receive(have(*keys, rank=rank), 0.0)
        effects += side.receive(offer(20, 0, 1, 2, 3, 4, rank=rank, ranks=2), 0.0)
    assert only(effects, HeldByAll) == [HeldByAll(ROOM, (1,))]
    assert only(side.receive(have(KEY, rank=1), 0.0), HeldByAll) == [HeldByAll(ROOM, (0, 1))]
    assert only(side.receive(have(KEY, rank=1), 0.0), HeldByAll) == []
    [chunk] = only(side.submit(ROOM, 20, 0.0, absent=(0, 1)), TransferEmbeddingChunk)
    assert [part.left_out for part in chunk.destinations] == [((2, 5), (6, 9), (10, 12))] * 2


def test_nothing_is_absent_that_a_rank_may_need() -> None:
    side = side_that_knows()
    side.expect(ROOM, 0.0, ITEMS)
    side.receive(offer(8, 0, 1), 0.0)
    with pytest.raises(LocalError, match="items \\[0\\] are absent"):
        side.submit(ROOM, 20, 0.0, absent=(0,))


def test_items_that_do_not_fit_the_rows_are_our_own_fault() -> None:
    side = side_that_knows()
    side.expect(ROOM, 0.0, ITEMS)
    with pytest.raises(LocalError, match="10 rows, and items up to row 14"):
        side.submit(ROOM, 10, 0.0)


def test_when_everything_is_made_the_encoder_is_told_no_more() -> None:
    side = side_that_knows()
    side.expect(ROOM, 0.0, ITEMS)
    side.receive(offer(1, 0), 0.0)
    side.submit(ROOM, 20, 0.0)
    assert only(side.receive(have(KEY), 0.0), HeldByAll) == []


@pytest.mark.parametrize("is_asked", [False, True])
def test_items_that_are_forgotten_are_sent_whatever_was_and_is_promised(is_asked: bool) -> None:
    side = side_that_knows()
    side.expect(ROOM, 0.0, ITEMS)
    side.receive(have(KEY), 0.0)
    if is_asked:
        side.receive(offer(20, 0, 1, 2, 3, 4), 0.0)
    side.forget_items(ROOM)
    side.forget_items(ROOM + 1)
    effects = [] if is_asked else side.receive(offer(20, 0, 1, 2, 3, 4), 0.0)
    effects += side.receive(have(KEY, OTHER_KEY), 0.0)
    assert (only(effects, HeldByAll), [one for one in sent(effects) if isinstance(one, Manifest)]) == ([], [])
    [chunk] = only(side.submit(ROOM, 20, 0.0), TransferEmbeddingChunk)
    assert chunk.destinations[0].left_out == ()
    assert sent(side.transferred(ROOM, 1, {}, 0.0)) == [StatusReport(ROOM, Status.SUCCESS, 20)]


def test_what_has_been_handed_over_stays_what_it_is() -> None:
    side = side_that_knows()
    side.expect(ROOM, 0.0, ITEMS)
    side.receive(have(KEY), 0.0)
    side.receive(offer(8, 0, 1), 0.0)
    side.submit(ROOM, 20, 0.0, absent=(0,), ready=1)
    side.forget_items(ROOM)
    side.transferred(ROOM, 1, {}, 0.0)
    [chunk] = only(side.more_rows(ROOM, 20, 0.0), TransferEmbeddingChunk)
    assert chunk.destinations[0].left_out == ((2, 5),)


# ---- promises that are worth nothing


def test_a_promise_of_somebody_else_is_ignored_and_counted() -> None:
    side = side_that_knows()
    nobody = Have(ROOM, Address("stranger", 1), "s:1", (KEY,))
    in_another_name = Have(ROOM, Address("stranger", 1), SESSION, (KEY,))
    for message in (nobody, in_another_name):
        assert side.receive(message, 0.0) == []
    assert side.sizes()["rooms"] == 0
    side.receive(register(1), 0.0)
    side.expect(ROOM, 0.0, ITEMS)
    side.receive(offer(8, 0, 1), 0.0)
    assert side.receive(have(KEY, rank=1), 0.0) == [], "a rank that is not part of the room"
    [chunk] = only(side.submit(ROOM, 20, 0.0), TransferEmbeddingChunk)
    assert chunk.destinations[0].left_out == ()
    assert counted(side) == {"promise_ignored": 3}


def test_a_promise_for_a_room_that_is_over_is_ignored() -> None:
    side = side_that_knows()
    assert sent(side.receive(Abort(ROOM, KNOWN_AT, SESSION), 0.0)) == [AbortAck(ROOM)]
    assert side.receive(have(KEY), 0.0) == []
    assert counted(side)["promise_ignored"] == 1


def test_a_promise_of_a_process_that_is_gone_does_not_hold_for_who_has_its_session_now() -> None:
    side = side_that_knows()
    side.receive(have(KEY), 0.0)
    side.expect(ROOM, 0.0, ITEMS)
    new = register()
    side.receive(type(new)(Address("language", 999), SESSION, new.buffer_pointers, new.handshake), 0.0)
    side.proven(SESSION, KNOWN_AT, True, 0.0)
    assert side.is_empty(), "the room has failed, and the new process hears so when it asks"


def test_rooms_that_are_only_promised_for_are_bounded_and_forgotten() -> None:
    side = side_that_knows()
    for number in range(3):
        side.receive(have(f"{number:032x}", room=number), 0.0)
    assert (side.sizes()["rooms"], side.sizes()["unexpected"]) == (3, 3)
    side.tick(30.0)
    assert (side.sizes()["rooms"], side.sizes()["unexpected"]) == (0, 0)


def test_no_session_has_more_promised_than_a_prompt_has_items() -> None:
    items = PromptItems()
    blocks = items.promise(SESSION, (f"{number:032x}" for number in range(MAX_ITEMS)))
    assert blocks >= MAX_ITEMS
    items.promise(SESSION, (KEY,))
    items.expect((ITEM,))
    assert items.leave_out(SESSION, {}, 0, 9) == ()
    items.promise(SESSION, (KEY,))
    assert items.leave_out(SESSION, {}, 0, 9) == ITEM.runs, "what is not in the prompt does not count any more"


def test_an_item_that_goes_to_somebody_is_not_absent_though_it_is_promised_later() -> None:
    items, decided = PromptItems(), dict[int, bool]()
    items.expect((ITEM, OTHER))
    assert items.leave_out(SESSION, decided, 0, 4) == ()
    items.promise(SESSION, (KEY, OTHER_KEY))
    assert items.newly_held_by_all({SESSION: decided}) == (1,)


def test_who_is_let_go_has_promised_nothing() -> None:
    items = PromptItems()
    items.expect((ITEM,))
    items.promise(SESSION, (KEY,))
    items.promise("another", (KEY,))
    items.keep_only([SESSION])
    assert items.sessions == {SESSION}
    items.forget()
    assert items.sessions == set()


def test_a_refused_session_promises_nothing() -> None:
    side = encode_side()
    side.receive(register(dtype="float16"), 0.0)
    assert side.receive(have(KEY), 0.0) == []
    assert side.sizes()["rooms"] == 0
    assert reported_failures(side.receive(offer(8, 0, 1), 0.0))[0].code == 500
