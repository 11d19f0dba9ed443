"""Whole requests from one process to another: every bit, and as many rounds as the specification says."""

import dataclasses
import logging
import re
from collections.abc import Iterator

import pytest
import torch

from embedding_relay.config import MOONCAKE, SHARED_MEMORY, RelayConfig
from embedding_relay.memory.layout import Aux
from support.loopback import (
    ENDED,
    EncodeInstance,
    LanguageRank,
    assert_all_given_back,
    encode_instance,
    language_rank,
    settle,
    small_layout,
)
from support.planes import both_planes, only
from support.rooms import next_room
from support.rows import DAMAGE, Spec, difference, make_rows

DEFAULT_1024 = RelayConfig(default_allocate_tokens=1024)
AS_THEY_COME = RelayConfig(default_allocate_tokens=512, prefix_prefill=True)
"""The scheduler is told of rows that are copied."""
LAYOUT = small_layout()


@pytest.fixture(scope="module")
def encode() -> Iterator[EncodeInstance]:
    with encode_instance(LAYOUT) as instance:
        yield instance


def requests(number: int, total: int) -> list[Spec]:
    return [Spec(next_room(), total) for _ in range(number)]


ROUNDS = [
    # default, length, rounds
    (1024, 500, 1),
    (1024, 1024, 1),
    (1024, 1025, 2),
    (1024, 2000, 2),
    (1200, 2000, 2),
]


@both_planes
@pytest.mark.parametrize(("block_size", "deepstack", "dtype"), [(16, 0, "float16"), (128, 2, "float32")])
def test_the_scenarios_of_the_specification(block_size: int, deepstack: int, dtype: str) -> None:
    layout = small_layout(block_size=block_size, blocks=8192 // block_size, deepstack_rows=deepstack, dtype=dtype)
    with encode_instance(layout) as encode, language_rank(layout, DEFAULT_1024) as language:
        for default, total, rounds in ROUNDS:
            [spec] = requests(1, total)
            received = language.receive(encode, spec, hint_rows=None if default == 1024 else default)
            assert received[spec.room].rounds == rounds, (default, total)
        assert_all_given_back(encode, language)


def test_ten_thousand_rows_take_ten_rounds_or_fewer(encode: EncodeInstance) -> None:
    [spec] = requests(1, 10_000)
    with language_rank(small_layout(blocks=12), DEFAULT_1024) as language:
        received = language.receive(encode, spec)
        assert 2 <= received[spec.room].rounds <= 10
        assert_all_given_back(encode, language)


@only(MOONCAKE)
def test_a_hundred_thousand_rows_through_one_block_of_sixteen() -> None:
    layout = small_layout(hidden_size=16, block_size=16, blocks=1)
    with encode_instance(layout) as encode, language_rank(layout) as language:
        [spec] = requests(1, 100_000)
        received = language.receive(encode, spec)
        assert received[spec.room].rounds == 6250
        assert_all_given_back(encode, language)


@both_planes
def test_sixty_four_requests_share_eight_blocks(encode: EncodeInstance) -> None:
    with language_rank(small_layout(blocks=8), DEFAULT_1024) as language:
        language.receive(encode, *requests(64, 2000))
        assert_all_given_back(encode, language)


@both_planes
@pytest.mark.parametrize(("encode_is_older", "language_is_older"), [(True, False), (False, True)])
def test_a_peer_that_knows_nothing_of_records_gets_and_sends_its_columns_apart(
    encode_is_older: bool, language_is_older: bool
) -> None:
    layout = small_layout(blocks=12, deepstack_rows=1)
    with (
        encode_instance(layout, is_older=encode_is_older) as encode,
        language_rank(layout, DEFAULT_1024, is_older=language_is_older) as language,
    ):
        language.receive(encode, *requests(3, 3000))
        assert_all_given_back(encode, language)


@both_planes
def test_ranks_of_one_room_that_differ_in_records_get_the_same_rows(encode: EncodeInstance) -> None:
    """They are at different rows, too."""
    [spec] = requests(1, 3000)
    with (
        language_rank(small_layout(blocks=2), ranks=2) as one,
        language_rank(small_layout(blocks=5), ranks=2, is_older=True) as other,
    ):
        started = [(rank, rank.start(encode.peer, spec.room)) for rank in (one, other)]
        encode.expect(spec)
        for rank, receivers in started:
            rank.wait(receivers.values())
            rank.check(receivers, [spec])
        assert_all_given_back(encode, one, other)


@both_planes
def test_rows_travel_as_they_are_made(encode: EncodeInstance) -> None:
    """The scheduler hears of rows that are in their place while the encoder makes others, wherever offers end."""
    spec = Spec(next_room(), 3000, like=1, item_by_item=True)
    starts = [start for start, _ in make_rows(LAYOUT, spec).segments]
    with language_rank(small_layout(blocks=4), AS_THEY_COME) as language:
        (receiver,) = (receivers := language.start(encode.peer, spec.room)).values()
        encode.expect(spec)
        for first_missing in starts[1:]:
            language.wait_for(lambda row=first_missing: receiver.copied == row)  # type: ignore[misc]
            assert receiver.poll() not in ENDED
            assert receiver.target is not None
            whole = make_rows(LAYOUT, spec)
            assert torch.equal(receiver.target.items[:first_missing], whole.items[:first_missing])
            encode.make_one_more(spec.room)
        language.wait([receiver])
        language.check(receivers, [spec])
        assert_all_given_back(encode, language)


@only(SHARED_MEMORY)
def test_a_request_that_is_dropped_between_two_of_its_items_leaves_nothing(encode: EncodeInstance) -> None:
    spec = Spec(next_room(), 3000, like=1, item_by_item=True)
    with language_rank(small_layout(), AS_THEY_COME) as language:
        (receiver,) = language.start(encode.peer, spec.room).values()
        encode.expect(spec)
        language.wait_for(lambda: receiver.copied > 0)
        receiver.abort()
        encode.end_of(spec.room)
        encode.make_one_more(spec.room)
        assert_all_given_back(encode, language)


@both_planes
def test_large_blocks_are_on_offer_in_two_halves() -> None:
    """All four blocks for the first 1024 rows, then two at a time; undivided they would take three rounds."""
    layout = small_layout(hidden_size=2048, block_size=256, blocks=4)
    with encode_instance(layout) as encode, language_rank(layout, DEFAULT_1024) as language:
        [spec] = requests(1, 3000)
        received = language.receive(encode, spec)
        assert received[spec.room].rounds == 1 + 4
        assert_all_given_back(encode, language)


@both_planes
def test_an_encode_pool_smaller_than_one_request() -> None:
    with encode_instance(small_layout(blocks=3)) as encode, language_rank(LAYOUT, DEFAULT_1024) as language:
        language.receive(encode, *requests(8, 2000))
        assert_all_given_back(encode, language)


def test_a_pair_that_may_only_share_memory_opens_no_engine(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sharing = dataclasses.replace(DEFAULT_1024, data_plane=SHARED_MEMORY)
    with encode_instance(LAYOUT, sharing) as encode, language_rank(LAYOUT, sharing) as language:
        language.receive(encode, *requests(4, 3000))
        for side in (language.manager, encode):
            settle(side.metrics, lambda m: m.sizes["mapped"] == 1)
        assert_all_given_back(encode, language)
    assert not [record for record in caplog.records if "Mooncake" in record.message]


@pytest.mark.parametrize(
    ("writes", "reads", "reason"),
    [
        (MOONCAKE, SHARED_MEMORY, "'shared-memory-[0-9a-f]{32}' is not the name of a Mooncake session"),
        (SHARED_MEMORY, MOONCAKE, "cannot be written: it shares no memory; .*=shared_memory allows nothing else"),
    ],
)
def test_a_pair_without_a_common_plane_fails_its_requests_and_says_why(writes: str, reads: str, reason: str) -> None:
    one, other = (dataclasses.replace(DEFAULT_1024, data_plane=plane) for plane in (writes, reads))
    with encode_instance(LAYOUT, one) as encode, language_rank(LAYOUT, other) as language:
        [spec] = requests(1, 500)
        receivers = language.start(encode.peer, spec.room)
        encode.expect(spec)
        language.wait(receivers.values())
        failure = receivers[spec.room].failure()
        assert failure is not None
        assert failure.code == 502
        assert re.search(reason, failure.text)
        assert_all_given_back(encode, language)


@both_planes
def test_two_language_ranks_receive_the_same_rows(encode: EncodeInstance) -> None:
    """TP 1 to TP 2: both ranks register, and each gets every row, though one of them has little room."""
    specs = requests(3, 2000)
    with (
        language_rank(LAYOUT, DEFAULT_1024, ranks=2) as roomy,
        language_rank(small_layout(blocks=2), DEFAULT_1024, ranks=2) as tight,
    ):
        started = [(rank, rank.start(encode.peer, *(spec.room for spec in specs))) for rank in (roomy, tight)]
        encode.expect(*specs)
        for rank, receivers in started:
            rank.wait(receivers.values())
            rank.check(receivers, specs)
        assert_all_given_back(encode, roomy, tight)


@both_planes
def test_a_language_rank_with_two_encode_instances(encode: EncodeInstance) -> None:
    with encode_instance(LAYOUT) as other, language_rank(LAYOUT) as language:
        for instance in (encode, other, encode):
            language.receive(instance, *requests(1, 3000))
        assert_all_given_back(other, language)


@both_planes
def test_a_planted_swap_does_not_pass(encode: EncodeInstance) -> None:
    """The comparison of all these tests is one that can fail."""
    [good] = requests(1, 2000)
    start = make_rows(LAYOUT, good).segments[-1][0]
    with language_rank(LAYOUT, DEFAULT_1024) as language:
        receivers = language.start(encode.peer, good.room)
        encode.expect(Spec(good.room, 2000, swap=(start, start + 1)))
        language.wait(receivers.values())
        problem = difference(LAYOUT, make_rows(LAYOUT, good), receivers[good.room].rows())
        assert problem == f"embeddings: 2 rows differ, the first is {start}"


@pytest.fixture(scope="module")
def language() -> Iterator[LanguageRank]:
    with language_rank(small_layout(blocks=12), DEFAULT_1024) as rank:
        yield rank


@pytest.mark.parametrize("damage", DAMAGE)
def test_rows_that_no_model_may_have_fail_their_room_only(
    encode: EncodeInstance, language: LanguageRank, damage: str
) -> None:
    """A hostile encode instance: what it sends is looked at before a scheduler can trip over it."""
    [bad], [good] = requests(1, 5000), requests(1, 3000)
    receivers = language.start(encode.peer, bad.room, good.room)
    encode.expect(Spec(bad.room, bad.total, damage=damage), good)
    language.wait(receivers.values())
    failure = receivers[bad.room].failure()
    assert failure is not None
    assert failure.code == 502
    assert failure.text.startswith(f"encode instance {encode.peer} sent rows of room {bad.room} that cannot be used: ")
    language.check(receivers, [good])
    assert_all_given_back(encode, language)


@pytest.mark.parametrize(("total", "code"), [(2**31 - 1, 400), (0, 502), (-5, 502)])
def test_a_length_that_cannot_be_takes_no_memory(
    encode: EncodeInstance, language: LanguageRank, monkeypatch: pytest.MonkeyPatch, total: int, code: int
) -> None:
    [bad] = requests(1, 5000)
    made: list[Aux] = []
    monkeypatch.setattr(language.manager._buffers, "make_target", made.append)
    read = Aux(total, mrope_delta=0, has_mrope=False, media_items=1)
    monkeypatch.setattr(language.manager._buffers, "read_aux", lambda block: read)
    receivers = language.start(encode.peer, bad.room)
    encode.expect(bad)
    language.wait(receivers.values())
    failure = receivers[bad.room].failure()
    assert failure is not None
    assert failure.code == code
    assert made == []
    assert_all_given_back(encode, language)
