"""Whose items go through the tower next: shares, groups, what is left out, and what a request keeps of its rows.

The tower only says here what fits into a pass; nothing is encoded, and the transfer is a list.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch

from embedding_relay.gathering import Gathering
from sglang.srt.disaggregation.multimodal.roles import Part
from sglang.srt.disaggregation.multimodal.tower import VisionTower
from sglang.srt.disaggregation.multimodal.turns import EncodeRequest, Turns
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

GROUP: Final = 4
"""Tokens, as many as each picture has unless a test says otherwise."""


class Sender:
    has_forgotten = False

    def __init__(self) -> None:
        self.room = 7
        self.held: tuple[int, ...] = ()
        self.given: list[tuple[str, Any]] = []

    def send_embedding(self, source: Any) -> None:
        self.given.append(("send", source))

    def more_rows(self, source: Any) -> None:
        self.given.append(("more", source))


def request(number: int, *sizes: int, starts: list[int] | None = None) -> EncodeRequest:
    """With a picture of each size, in this order and with a token between them, or where `starts` says."""
    items, at = [], 1
    for index, size in enumerate(sizes):
        start = at if starts is None else starts[index]
        item = MultimodalDataItem(
            modality=Modality.IMAGE, offsets=[(start, start + size - 1)], feature=torch.zeros(1, 1)
        )
        item.set_hash(1 + 100 * number + index)
        items.append(item)
        at += size + 1
    total = 1 + max(item.offsets[0][1] + 1 for item in items)
    inputs = MultimodalInputs(mm_items=items)
    req = SimpleNamespace(multimodal_inputs=inputs, origin_input_ids_unpadded=[0] * total)
    return EncodeRequest(req, Sender(), number)  # type: ignore[arg-type]


def rows(tokens: int) -> torch.Tensor:
    return torch.zeros(tokens, 2)


@pytest.fixture
def turns() -> Turns:
    return Turns(VisionTower(None, "cpu", 1, group_tokens=GROUP))


def encode(turns: Turns, parts: tuple[Part, ...]) -> None:
    for one, indexes in turns.take(parts):
        one.take(indexes, [rows(one.tokens([index])) for index in indexes])
        one.hand_over()
    turns.pop_finished()


def numbers(parts: tuple[Part, ...]) -> list[tuple[int, tuple[int, ...]]]:
    return [(part.number, part.items) for part in parts]


# ---- turns


def test_a_request_goes_group_by_group_in_the_order_of_its_prompt(turns: Turns) -> None:
    turns.add([request(1, 4, 4, 4, starts=[20, 1, 10])])
    seen = []
    while parts := turns.next_batch():
        seen += numbers(parts)
        encode(turns, parts)
    assert seen == [(1, (1,)), (1, (2,)), (1, (0,))]


def test_small_items_go_together(turns: Turns) -> None:
    turns.add([request(1, 1, 1, 2, 9, 1)])
    assert numbers(turns.next_batch()) == [(1, (0, 1, 2))]


def test_a_small_request_is_not_behind_all_of_a_large_one(turns: Turns) -> None:
    turns.add([request(1, *[4] * 28)])
    encode(turns, turns.next_batch())
    encode(turns, turns.next_batch())
    turns.add([request(2, 4)])
    encode(turns, turns.next_batch())
    encode(turns, turns.next_batch())
    assert [one.number for one in turns.queue] == [1], "the small one had one of the next two turns"


def test_requests_take_turns(turns: Turns) -> None:
    turns.add([request(1, 4, 4, 4), request(2, 4, 4, 4)])
    order = []
    while parts := turns.next_batch():
        order += [part.number for part in parts]
        encode(turns, parts)
    assert order == [1, 2, 1, 2, 1, 2]


def test_a_request_of_large_pictures_waits_longer_for_its_next_turn(turns: Turns) -> None:
    """What counts is what the tower has done for it, not how often it was asked."""
    turns.add([request(1, 12, 12), request(2, *[4] * 6)])
    order = []
    while parts := turns.next_batch():
        order += [part.number for part in parts]
        encode(turns, parts)
    assert order == [1, 2, 2, 2, 1, 2, 2, 2]


def test_a_large_request_is_not_starved_by_small_ones_that_keep_coming(turns: Turns) -> None:
    large = request(1, *[4] * 50)
    turns.add([large])
    for number in range(2, 102):
        turns.add([request(number, 4)])
        encode(turns, turns.next_batch())
    made = 50 - len(large.left)
    assert made >= 10, "the others alone would fill all turns: it is one of a few that wait, and has its share"


@pytest.fixture
def whole() -> Turns:
    """Of a tower that takes whole requests, and small ones together."""
    return Turns(VisionTower(None, "cpu", 8))


def test_a_small_request_is_not_behind_many_large_ones_that_are_not_divided(whole: Turns) -> None:
    whole.add([request(number, *[4] * 28) for number in range(60)])
    encode(whole, whole.next_batch())
    whole.add([request(100, 4), request(101, 4)])
    assert [part.number for part in whole.next_batch()] == [100, 101]


def test_large_requests_have_half_of_the_tokens_while_small_ones_keep_coming(whole: Turns) -> None:
    whole.add([request(number, *[4] * 7) for number in range(10)])
    served = {True: 0, False: 0}
    for number in range(100, 900, 8):
        whole.add([request(number + at, 4) for at in range(8)])
        parts = whole.next_batch()
        for part in parts:
            served[part.number >= 100] += 4 * len(part.items)
        encode(whole, parts)
        if served[False] == 280:
            break
    assert served[False] == 280, "all large ones have had their turn"
    assert 240 <= served[True] <= 320, "and small ones as much"


def test_a_class_that_did_not_wait_has_saved_nothing_up(whole: Turns) -> None:
    for number in range(50):
        whole.add([request(number, 4)])
        encode(whole, whole.next_batch())
    whole.add([request(number, *[4] * 7) for number in range(50, 60)])
    whole.add([request(100, 4)])
    first, second = [], []
    for order in (first, second):
        parts = whole.next_batch()
        order += [part.number for part in parts]
        encode(whole, parts)
    assert 100 in (*first, *second)


def test_whoever_comes_late_has_no_claim_to_what_others_had_before(turns: Turns) -> None:
    turns.add([request(1, *[4] * 40)])
    for _ in range(20):
        encode(turns, turns.next_batch())
    turns.add([request(2, *[4] * 40)])
    order = []
    for _ in range(8):
        parts = turns.next_batch()
        order += [part.number for part in parts]
        encode(turns, parts)
    assert sorted(order) == [1] * 4 + [2] * 4


def test_on_an_accelerator_a_pass_has_groups_of_several_requests() -> None:
    turns = Turns(VisionTower(None, "cuda", 9, group_tokens=GROUP))
    turns.add([request(1, 4, 4), request(2, 4), request(3, 4)])
    assert numbers(turns.next_batch()) == [(1, (0,)), (2, (0,))]


def test_undivided_requests_go_in_the_order_in_which_they_came() -> None:
    turns = Turns(VisionTower(None, "cpu", 1))
    order = []
    for number in range(1, 4):
        turns.add([request(number, 4, 4)])
    turns.add([request(4, 4)])
    while parts := turns.next_batch():
        order += numbers(parts)
        encode(turns, parts)
    assert order == [(1, (0, 1)), (2, (0, 1)), (3, (0, 1)), (4, (0,))]


def test_those_that_come_or_go_in_this_turn_count(turns: Turns) -> None:
    turns.add([request(1, 4)])
    assert numbers(turns.next_batch([request(2, 4)], {1})) == [(2, (0,))]


def test_a_request_that_is_over_by_now_is_not_encoded(turns: Turns) -> None:
    turns.add([request(1, 4), request(2, 4)])
    parts = turns.next_batch()
    turns.queue = [one for one in turns.queue if one.number != 1]
    assert turns.take(parts) == []


# ---- what nobody needs


def test_what_everybody_has_is_left_out(turns: Turns) -> None:
    one = request(1, 4, 4, 4)
    one.sender.held = (1,)
    turns.add([one])
    parts = turns.next_batch()
    assert parts == (Part(1, (0,), (1,)),)
    encode(turns, parts)
    assert numbers(turns.next_batch()) == [(1, (2,))]


def test_a_promise_that_comes_while_the_tower_works_counts_for_what_is_left(turns: Turns) -> None:
    one = request(1, 4, 4, 4)
    turns.add([one])
    encode(turns, turns.next_batch())
    one.sender.held = (0, 2)
    parts = turns.next_batch()
    assert parts == (Part(1, (1,), (2,)),)
    encode(turns, parts)
    assert turns.queue == []
    source = one.sender.given[-1][1]  # type: ignore[attr-defined]
    assert ([number for number, _ in source.absent], source.made) == ([2], None)


def test_a_request_of_which_everything_is_there_needs_no_room_in_any_pass(turns: Turns) -> None:
    first, second = request(1, 4), request(2, 4, 4)
    second.sender.held = (0, 1)
    turns.add([first, second])
    assert turns.next_batch() == (Part(2, (), (0, 1)), Part(1, (0,)))
    assert turns.next_batch(may_begin=False) == (Part(2, (), (0, 1)),)
    encode(turns, turns.next_batch())
    assert turns.tower.totals == {"media_items": 2, "encoded_items": 0, "left_out_items": 2}
    (what, source) = second.sender.given[0]  # type: ignore[attr-defined]
    assert (what, list(source.segments), source.made) == ("send", [], None)


def test_a_request_with_rows_here_goes_on_while_no_other_may_begin(turns: Turns) -> None:
    """Its room cannot end without them, and while it does not end its rows are here."""
    turns.add([request(1, 4, 4)])
    encode(turns, turns.next_batch())
    turns.add([request(2, 4)])
    assert numbers(turns.next_batch(may_begin=False)) == [(1, (1,))]
    assert turns.next_batch(over={1}, may_begin=False) == ()


# ---- what a request has


def test_rows_are_handed_over_as_they_are_made(turns: Turns) -> None:
    one = request(1, 4, 4, 4)
    turns.add([one])
    while parts := turns.next_batch():
        encode(turns, parts)
    given = one.sender.given  # type: ignore[attr-defined]
    assert [what for what, _ in given] == ["send", "more", "more"]
    assert [source.made for _, source in given] == [6, 11, None]
    assert [[start for start, _ in source.segments] for _, source in given] == [[1], [1, 6], [1, 6, 11]]


def test_pixels_are_let_go_item_by_item() -> None:
    one = request(1, 4, 4)
    one.take([0], [rows(4)])
    assert [item.feature is None for item in one.items] == [True, False]


def test_what_a_request_will_have_is_told_by_what_is_made() -> None:
    one = request(1, 4, 4, 8, 4)
    assert one.bytes == 0
    one.leave_out([3])
    one.take([0], [rows(4)])
    assert one.bytes == 16 * 2 * 4
    one.take([1, 2], [rows(4), rows(8)])
    assert one.bytes == 16 * 2 * 4


class Event:
    def __init__(self) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def test_no_more_than_two_groups_of_a_request_are_queued_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one with many pictures would have the device to itself, however the requests take turns."""
    events = [Event() for _ in range(4)]
    made = iter(events)
    monkeypatch.setattr("sglang.srt.disaggregation.multimodal.media.everything_queued_on", lambda device: next(made))
    one = request(1, *[4] * 4)
    for index in range(4):
        one.wait_for_device()
        one.take([index], [rows(4)])
        one.hand_over()
    assert [event.waited for event in events] == [1, 1, 0, 0]


@pytest.mark.parametrize(("asks_for_more", "left"), [(False, []), (True, [2])])
def test_a_request_that_failed_hands_nothing_over_any_more(asks_for_more: bool, left: list[int]) -> None:
    one = request(1, 4, 4, 4)
    one.take([0], [rows(4)])
    one.hand_over()
    one.fail([1], asks_for_more=asks_for_more)
    assert (one.left, one.rows) == (left, {})
    one.take(one.left, [rows(4) for _ in one.left])
    one.hand_over()
    assert len(one.sender.given) == 1  # type: ignore[attr-defined]


# ---- a pass of small requests waits for those that are on their way


@pytest.fixture
def busy() -> Turns:
    """Passes take nine tokens, and time stands still: what waits for one that is to come, waits."""
    turns = Turns(VisionTower(None, "cpu", 9))
    turns.gathering = Gathering(lambda: 0.0)
    turns.gathering.passed(1.0, 1.0)
    turns.gathering.came(3)
    return turns


def test_a_pass_with_room_waits_for_one_that_is_on_its_way(busy: Turns) -> None:
    busy.add([request(1, 3)])
    assert numbers(busy.next_batch()) == []
    busy.add([request(2, 3)])
    assert numbers(busy.next_batch()) == []
    busy.add([request(3, 3)])
    assert numbers(busy.next_batch()) == [(1, (0,)), (2, (0,)), (3, (0,))], "there is no room for one more"


@pytest.mark.parametrize("sizes", [(5,), (9,), (10,)])
def test_a_pass_without_room_for_one_more_like_these_begins(busy: Turns, sizes: tuple[int, ...]) -> None:
    busy.add([request(1, *sizes)])
    assert numbers(busy.next_batch()) == [(1, (0,))]


def test_a_pass_behind_which_others_wait_already_begins(busy: Turns) -> None:
    busy.add([request(1, 3), request(2, 8)])
    assert numbers(busy.next_batch()) == [(1, (0,))]


def test_nobody_waits_for_one_that_does_not_come(busy: Turns) -> None:
    busy.add([request(1, 3)])
    assert numbers(busy.next_batch()) == []
    busy.gathering.came(0)
    assert numbers(busy.next_batch()) == [(1, (0,))]


def test_what_needs_no_tower_does_not_wait_for_those_that_do(busy: Turns) -> None:
    held, waiting = request(1, 3), request(2, 3)
    held.sender.held = (0,)
    busy.add([held, waiting])
    assert busy.next_batch() == (Part(1, (), (0,)),)


def test_where_passes_are_not_shared_nothing_waits(busy: Turns) -> None:
    for tower in (VisionTower(None, "cuda", 9), VisionTower(None, "cpu", 1)):
        busy.tower = tower
        busy.queue.clear()
        busy.add([request(1, 3)])
        assert numbers(busy.next_batch()) == [(1, (0,))]
    passes = VisionTower(None, "cpu", 9)
    passes._passes.are_equal = False
    busy.tower = passes
    assert numbers(busy.next_batch()) == [(1, (0,))]


def test_what_cannot_share_a_pass_does_not_wait_for_one(busy: Turns) -> None:
    sound, old = request(1, 3), request(2, 3)
    sound.items[0].modality = Modality.AUDIO
    old.items[0].feature = torch.zeros(1, 3, 4, 4)  # a picture, and not its patches
    for one in (sound, old):
        busy.queue.clear()
        busy.add([one])
        assert numbers(busy.next_batch()) == [(one.number, (0,))]


def test_a_request_that_has_begun_does_not_wait(busy: Turns) -> None:
    """Its language half holds blocks."""
    one = request(1, 3)
    one.hand_over()
    busy.add([one])
    assert numbers(busy.next_batch()) == [(1, (0,))]


def test_only_small_requests_say_what_waiting_saves(busy: Turns) -> None:
    busy.gathering = Gathering(lambda: 0.0)
    busy.came(request(1, 10), 3)
    busy.passed([request(2, 3), request(3, 10)], 1.0, 1.0)
    busy.passed([request(2, 3)], 0.125, 0.125)
    assert busy.gathering.seconds_left() == 0
    busy.came(request(4, 3), 3)
    assert busy.gathering.seconds_left() == 0.125
