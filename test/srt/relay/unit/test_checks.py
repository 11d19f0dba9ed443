"""Each thing that received rows must be before a scheduler may have them, and the sentence that says what is wrong."""

import dataclasses

import pytest

from support.columns import LARGEST, LIMITS, SMALLEST, changed, columns

GOOD = columns(-1, 0, 0, 1, -1, 1, 2, -1)


def test_what_a_correct_peer_sends_is_let_through() -> None:
    """One item may lie in several places, neighbours stay two items, and text rows may say anything but an item."""
    assert GOOD.flaw(LIMITS) is None
    assert columns(0).flaw(LIMITS) is None
    assert columns(2, 0, 1, 0).flaw(LIMITS) is None
    assert changed(GOOD, "items", 0, 1, 999).flaw(LIMITS) is None


@pytest.mark.parametrize("token", [-1, 1000, LARGEST, SMALLEST])
def test_a_token_id_outside_of_the_vocabulary(token: int) -> None:
    wrong = changed(GOOD, "fill_ids", 4, 0, token).flaw(LIMITS)
    assert wrong == f"row 4 has token id {token}, and this model has ids from 0 to 999"


@pytest.mark.parametrize("item", [-2, 3, LARGEST, SMALLEST])
def test_an_item_that_is_not_one_of_them(item: int) -> None:
    wrong = changed(GOOD, "items", 3, 0, item).flaw(LIMITS)
    assert wrong == f"row 3 belongs to media item {item}, and there are 3"


def test_an_item_without_rows() -> None:
    assert changed(GOOD, "items", 6, 0, -1).flaw(LIMITS) == "media item 2 of 3 has no row"
    assert columns(0, 2, 2).flaw(LIMITS) == "media item 1 of 3 has no row"


@pytest.mark.parametrize("number", [0, -1, 9, LARGEST])
def test_a_number_of_items_that_cannot_be(number: int) -> None:
    wrong = changed(GOOD, "media_items", 0, 0, number).flaw(LIMITS)
    assert wrong == f"there are said to be {number} media items in 8 rows"


def test_no_item_at_all() -> None:
    assert columns(-1, -1).flaw(LIMITS) == "there are said to be 0 media items in 2 rows"


@pytest.mark.parametrize("modality", [0, 3, 999, -1, LARGEST])
def test_a_modality_that_the_model_does_not_have(modality: int) -> None:
    """This is the row that ended a language instance."""
    wrong = columns(-1, 0, 0, modality=modality).flaw(LIMITS)
    assert wrong == f"media item 0 has modality {modality}, and this model has only 1, 2"


def test_a_model_without_any_modality() -> None:
    nothing = dataclasses.replace(LIMITS, modalities=frozenset())
    assert GOOD.flaw(nothing) == "media item 0 has modality 1, and this model has only none"


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_an_item_that_is_described_in_two_ways(axis: int) -> None:
    wrong = changed(GOOD, "items", 5, axis, 2).flaw(LIMITS)
    assert wrong == "rows 3 and 5 describe media item 1 differently"
    wrong = changed(GOOD, "items", 2, axis, 2).flaw(LIMITS)
    assert wrong == "rows 1 and 2 describe media item 0 differently"


@pytest.mark.parametrize("position", [-1, 500, LARGEST, SMALLEST])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_position_outside_of_the_table(position: int, axis: int) -> None:
    wrong = changed(GOOD, "mrope", 6, axis, position).flaw(LIMITS)
    place = [6, 6, 6]
    place[axis] = position
    assert wrong == f"row 6 is at position {place}, and this model has 500"


@pytest.mark.parametrize("delta", [492, -9, LARGEST, SMALLEST])
def test_a_step_that_leads_out_of_the_table(delta: int) -> None:
    wrong = changed(GOOD, "mrope_delta", 0, 0, delta).flaw(LIMITS)
    assert wrong == f"the first token after them would be at position {8 + delta}, and this model has 500"
    for last in (-8, 491):
        assert changed(GOOD, "mrope_delta", 0, 0, last).flaw(LIMITS) is None


def test_positions_that_are_missing() -> None:
    assert changed(GOOD, "has_mrope", 0, 0, 0).flaw(LIMITS) == "they come without the positions that this model needs"


def test_nobody_looks_at_positions_that_the_model_does_not_use() -> None:
    without = dataclasses.replace(LIMITS, positions=None)
    for where, value in (("has_mrope", 0), ("mrope", -5), ("mrope_delta", LARGEST)):
        assert changed(GOOD, where, 0, 0, value).flaw(without) is None
