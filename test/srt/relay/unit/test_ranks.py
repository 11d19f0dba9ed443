"""When all ranks of an instance have a room, and when none of them will: what the first rank makes of their reports."""

from __future__ import annotations

import random

import pytest

from embedding_relay.protocol.errors import BAD_GATEWAY, INTERNAL, Failure
from embedding_relay.transport.ranks import Agreement, RoomEnded

LOST = Failure(BAD_GATEWAY, "the encode instance is gone")
PATIENCE = 30.0


@pytest.fixture
def agreement() -> Agreement:
    return Agreement(2, PATIENCE)


def test_a_rank_that_is_alone_decides_at_once() -> None:
    agreement = Agreement(1, PATIENCE)
    agreement.begin(0)
    agreement.hear(0, RoomEnded(0), now=0.0)
    assert agreement.take_decided(0.0) == ((0, None),)
    assert len(agreement) == 0


def test_a_room_is_there_when_it_is_there_on_every_rank(agreement: Agreement) -> None:
    agreement.begin(7)
    agreement.hear(1, RoomEnded(7), now=0.0)
    agreement.hear(1, RoomEnded(7), now=0.0)
    assert agreement.take_decided(0.0) == ()
    agreement.hear(0, RoomEnded(7), now=1.0)
    assert agreement.take_decided(1.0) == ((7, None),)
    assert agreement.take_decided(1.0) == ()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("other_has_it", [False, True])
def test_a_room_that_fails_on_one_rank_fails_on_all(agreement: Agreement, rank: int, other_has_it: bool) -> None:
    agreement.begin(7)
    if other_has_it:
        agreement.hear(1 - rank, RoomEnded(7), now=0.0)
    agreement.hear(rank, RoomEnded(7, LOST), now=0.0)
    assert agreement.take_decided(0.0) == ((7, LOST),)
    agreement.hear(1 - rank, RoomEnded(7), now=1.0)
    assert agreement.take_decided(1.0) == ()


def test_what_is_said_about_another_use_of_a_room_changes_nothing(agreement: Agreement) -> None:
    agreement.hear(1, RoomEnded(3, LOST), now=0.0)
    agreement.begin(3)
    assert agreement.take_decided(0.0) == ()
    assert len(agreement) == 1


def test_rooms_are_decided_in_the_order_in_which_the_last_rank_has_them(agreement: Agreement) -> None:
    for number in (1, 2, 3):
        agreement.begin(number)
    for number in (3, 1, 2):
        agreement.hear(0, RoomEnded(number), now=0.0)
    for number in (2, 3):
        agreement.hear(1, RoomEnded(number), now=0.0)
    assert [number for number, _ in agreement.take_decided(0.0)] == [2, 3]


def test_a_rank_that_never_says_anything_is_not_waited_for_for_ever(agreement: Agreement) -> None:
    agreement.begin(7)
    agreement.hear(0, RoomEnded(7), now=10.0)
    assert agreement.take_decided(10.0 + PATIENCE - 0.1) == ()
    ((number, failure),) = agreement.take_decided(10.0 + PATIENCE)
    assert number == 7
    assert failure is not None
    assert failure.code == INTERNAL
    assert failure.text.startswith("rank 1 of the language instance")
    assert len(agreement) == 0


def test_a_room_that_no_rank_has_may_take_as_long_as_its_own_deadlines(agreement: Agreement) -> None:
    agreement.begin(7)
    assert agreement.take_decided(1e9) == ()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_room_is_decided_once_whatever_the_order_of_reports(ranks: int) -> None:
    for seed in range(200):
        dice = random.Random(seed)
        agreement, rooms = Agreement(ranks, PATIENCE), range(dice.randint(1, 6))
        said = [(rank, room, LOST if dice.random() < 0.1 else None) for rank in range(ranks) for room in rooms]
        dice.shuffle(said)
        for room in rooms:
            agreement.begin(room)
        decided = []
        for rank, room, failure in said:
            agreement.hear(rank, RoomEnded(room, failure), now=0.0)
            decided += agreement.take_decided(0.0)
        assert sorted(room for room, _ in decided) == list(rooms)
        failed = {room for _, room, failure in said if failure is not None}
        assert {room for room, failure in decided if failure is not None} == failed
        assert len(agreement) == 0
