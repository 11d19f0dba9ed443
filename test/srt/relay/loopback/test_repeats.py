"""What a language rank keeps of a room, and finds for the next one; and two processes in which a picture comes again.

The first part is without threads and without a peer. Here, because rows are torch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from embedding_relay.config import RelayConfig
from embedding_relay.memory.buffers import ReceivedRows
from embedding_relay.protocol.messages import Item
from embedding_relay.transport import repeats as module
from embedding_relay.transport.repeats import Flaw, Repeats, default_bytes
from support.loopback import assert_all_given_back, encode_instance, language_rank, settle, small_layout
from support.rows import Spec, make_rows

WIDTH = 4
ROW_BYTES = 4 * WIDTH


def received(column: list[int], seed: int = 0) -> ReceivedRows:
    """`column`: the item of each row; -1 is text."""
    total = len(column)
    items = torch.full((total, 4), -1, dtype=torch.int32)
    items[:, 0] = torch.tensor(column)
    numbers = torch.Generator().manual_seed(seed)
    return ReceivedRows(
        total,
        torch.zeros(total, dtype=torch.int32),
        torch.zeros(total, 3, dtype=torch.int32),
        items,
        torch.rand(total, WIDTH, generator=numbers),
    )


def item(name: str, *runs: tuple[int, int]) -> Item:
    return Item(name * 32 if name else "", runs)


def keys(names: str) -> tuple[str, ...]:
    return tuple(name * 32 for name in names)


def make() -> Repeats:
    return Repeats(1 << 20, ROW_BYTES)


def had(
    repeats: Repeats, room: int, items: tuple[Item, ...], rows: ReceivedRows, sources: tuple[str, ...] = ()
) -> None:
    """A room that has come and gone."""
    repeats.begin(room, sources)
    repeats.look_up(room, items)
    repeats.end(room, rows)


def read(held: Any, start: int, stop: int) -> Any:
    into = np.empty((stop - start, ROW_BYTES), dtype=np.uint8)
    held.read(start, into)
    return into


def test_rows_of_one_room_are_found_for_the_next() -> None:
    repeats, rows = make(), received([-1, 0, 0, -1, 0, 1, -1])
    had(repeats, 1, (item("a", (1, 3), (4, 5)), item("b", (5, 6))), rows)
    repeats.begin(2)
    wanted = item("a", (7, 8), (9, 11))
    assert repeats.look_up(2, (item("c", (0, 1)), wanted)) == keys("a")
    first, second = repeats.held_rows(2, [wanted])
    assert (first[:2], second[:2]) == ((7, 8), (9, 11))
    there = rows.embedding_bytes
    assert np.array_equal(read(first, 7, 8), there[1:2])
    assert np.array_equal(read(second, 9, 11), there[[2, 4]])
    assert np.array_equal(read(second, 10, 11), there[4:5])
    assert repeats.filled_rows(2) == 3
    repeats.end(2, received([-1] * 7 + [0, -1, 0, 0]))
    assert repeats.sizes()["row_cache_items"] == 2, "what is not told row by row is not kept"
    assert repeats.totals() == {
        "row_cache_hits": 1,
        "row_cache_misses": 3,
        "row_cache_saved": 3 * ROW_BYTES,
        "row_cache_evictions": 0,
    }


@pytest.mark.parametrize(
    ("runs", "column"),
    [
        (((1, 3),), [-1, 0, 0, 0]),
        (((1, 3),), [-1, 0, 1, -1]),
        (((0, 2),), [-1, 0, 0, -1]),
        (((1, 3),), [-1, 0]),
        (((1, 2), (3, 4)), [-1, 0, 0, -1]),
        (((1, 2),), [-1, -1, 0, -1]),
    ],
)
def test_an_item_whose_rows_are_told_in_two_ways_is_not_kept(
    runs: tuple[tuple[int, int], ...], column: list[int]
) -> None:
    repeats = make()
    had(repeats, 1, (item("a", *runs),), received(column))
    assert repeats.sizes()["row_cache_items"] == 0


def test_an_item_without_a_key_is_not_kept() -> None:
    repeats = make()
    had(repeats, 1, (item("", (0, 2)),), received([0, 0]), ("source",))
    assert repeats.sizes()["row_cache_items"] == 0
    assert repeats.totals()["row_cache_misses"] == 0
    assert repeats.begin(2, ["source"]) == ()


def test_a_picture_is_promised_by_what_its_client_calls_it() -> None:
    repeats = make()
    had(repeats, 1, (item("a", (0, 1)), item("b", (1, 2))), received([0, 1]), ("one", ""))
    assert repeats.begin(2, ["", "two", "one"]) == keys("a")
    assert repeats.look_up(2, (item("a", (0, 1)), item("b", (1, 2)))) == keys("b"), "the first is no news"


def test_who_is_who_is_not_guessed_where_numbers_differ() -> None:
    repeats = make()
    had(repeats, 1, (item("a", (0, 1)), item("b", (1, 2))), received([0, 1]), ("one",))
    assert repeats.begin(2, ["one"]) == ()


def test_rows_of_another_number_are_refused() -> None:
    repeats = make()
    had(repeats, 1, (item("a", (0, 2)),), received([0, 0]))
    repeats.begin(2)
    repeats.look_up(2, (item("a", (0, 3)),))
    with pytest.raises(Flaw, match="3 rows of an item were left out because they are kept here, but 2 are"):
        repeats.held_rows(2, [item("a", (0, 3))])
    with pytest.raises(Flaw, match="but none are"):
        repeats.held_rows(2, [item("b", (0, 2))])
    assert repeats.filled_rows(2) == 0


def test_a_room_that_fails_keeps_nothing_and_holds_nothing() -> None:
    repeats = make()
    had(repeats, 1, (item("a", (0, 2)),), received([0, 0]))
    repeats.begin(2)
    repeats.look_up(2, (item("a", (0, 2)), item("b", (2, 3))))
    repeats.end(2)
    repeats.end(2)
    assert repeats.sizes()["row_cache_items"] == 1
    assert repeats._cache._pinned_blocks == 0
    assert repeats.look_up(2, (item("a", (0, 2)),)) == (), "of a room that is over nothing is kept back"
    assert repeats._cache._pinned_blocks == 0


def test_what_is_forgotten_does_not_come_back_with_a_room_under_way() -> None:
    repeats, rows = make(), received([0, 0])
    had(repeats, 1, (item("a", (0, 2)),), rows, ("one",))
    for room, name in ((2, "a"), (3, "b")):
        repeats.begin(room, ("one",))
        repeats.look_up(room, (item(name, (0, 2)),))
    repeats.forget()
    [held] = repeats.held_rows(2, [item("a", (0, 2))])
    assert np.array_equal(read(held, 0, 2), rows.embedding_bytes), "it was promised"
    for room in (2, 3):
        repeats.end(room, rows)
    assert repeats.sizes() == {"row_cache_items": 0, "row_cache_bytes": 0}
    assert repeats.begin(4, ("one",)) == ()


def test_the_size_is_a_part_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, size in ((0, 0), (1 << 30, 64 << 20), (1 << 40, 4 << 30)):
        monkeypatch.setattr(module, "available_bytes", lambda free=free: free)
        assert default_bytes() == size


# ---- two processes

LAYOUT = small_layout()
MADE = make_rows(LAYOUT, Spec(room=1, total=700))
ITEMS = len(MADE.segments)
MEDIA = sum(rows.nbytes for _, rows in MADE.segments)
NAMES = tuple(f"picture {number}" for number in range(ITEMS))


def again(room: int, salt: int = 0) -> Spec:
    """The same prompt each time; under another salt its keys are others."""
    return Spec(room=room, total=700, like=1, salt=salt)


@pytest.mark.parametrize("deepstack", [0, 2])
def test_a_picture_that_comes_again_neither_travels_nor_is_made(deepstack: int) -> None:
    layout = small_layout(deepstack_rows=deepstack)
    media = MEDIA * (1 + deepstack)
    with encode_instance(layout) as encode, language_rank(layout) as language:

        def receive(spec: Spec) -> tuple[int, int]:
            """How many bytes it took, and for how many items a tower."""
            before = encode.ask("encoded")
            [receiver] = language.receive(encode, spec, sources=NAMES).values()
            return receiver.bytes, encode.ask("encoded") - before

        whole = receive(again(1))
        assert whole[1] == ITEMS
        assert receive(again(2)) == (whole[0] - media, 0)
        assert receive(again(3, salt=7)) == whole
        counted = {"row_cache_hits": ITEMS, "row_cache_misses": 2 * ITEMS, "row_cache_saved": media}
        settle(language.manager.metrics, lambda numbers: numbers.totals.items() >= counted.items())
        language.manager.forget_rows()
        assert receive(again(4)) == whole
        assert_all_given_back(encode, language)
        assert language.manager._repeats._cache._pinned_blocks == 0


def test_a_picture_is_known_from_its_rows_alone() -> None:
    """Nobody says what its client calls it: it is promised when the encode side has told of it, in time or not."""
    with encode_instance(LAYOUT) as encode, language_rank(LAYOUT) as language:
        whole = language.receive(encode, again(1))[1].bytes
        settle(language.manager.metrics, lambda numbers: numbers.sizes["row_cache_items"] == ITEMS)
        later = [language.receive(encode, again(room))[room].bytes for room in range(2, 6)]
        assert {whole - MEDIA <= size <= whole for size in later} == {True}
        assert_all_given_back(encode, language)


def test_an_instance_that_keeps_nothing_gets_everything() -> None:
    config = RelayConfig(row_cache_bytes=0)
    with encode_instance(LAYOUT) as encode, language_rank(LAYOUT, config) as language:
        sizes = [language.receive(encode, again(room), sources=NAMES)[room].bytes for room in (1, 2)]
        assert sizes[0] == sizes[1]
        assert language.manager.metrics().totals["row_cache_misses"] == 0, "it is not even told"
