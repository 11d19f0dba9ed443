"""SGLang's items <-> the rows that travel, with SGLang's own classes and its own embedding of precomputed rows.

The model is a stand-in: a table of token embeddings and the names of two modalities. It has no layers.
"""

from __future__ import annotations

import dataclasses
from array import array
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_relay.memory.buffers import ReceivedRows
from sglang.srt.disaggregation.multimodal import media
from sglang.srt.managers.mm_utils import embed_mm_inputs
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
    MultimodalProcessorOutput,
)
from support.columns import EDGES, LARGEST, LIMITS, SMALLEST, WHERE, changed, columns
from support.received import TABLE, WIDTH, ModelWithoutLayers, received

VOCABULARY: Final = LIMITS.vocabulary


def embedded(ids: array[int], output: Any) -> torch.Tensor:
    """What SGLang makes of it in front of the model's first layer, for the whole prompt."""
    inputs = MultimodalInputs.from_processor_output(output)
    padded = torch.tensor(output.padded_input_ids, dtype=torch.int64)
    assert len(padded) == len(ids)
    result, _ = embed_mm_inputs([inputs], [0], [len(ids)], padded, TABLE, ModelWithoutLayers())
    return result


ROWS: Final = (-1, 0, 0, 1, -1, 1, 2, -1)


def test_a_request_is_what_its_rows_say() -> None:
    rows = received(columns(*ROWS))
    ids, output = media.request_inputs(rows, LIMITS)
    assert list(ids) == list(range(8))
    assert output.input_ids == list(ids)
    assert [item.offsets for item in output.mm_items] == [[(1, 2)], [(3, 3), (5, 5)], [(6, 6)]]
    assert [item.modality for item in output.mm_items] == [Modality.IMAGE] * 3
    assert [item.is_precomputed_embedding() for item in output.mm_items] == [True] * 3
    media_rows = [row for row, item in enumerate(ROWS) if item >= 0]
    assert [row for row in range(8) if output.padded_input_ids[row] >= VOCABULARY] == media_rows
    assert torch.equal(output.mrope_positions, torch.arange(8).repeat(3, 1))
    assert output.mrope_position_delta.tolist() == [[0]]
    expected = TABLE(torch.arange(8))
    expected[media_rows] = rows.embeddings[media_rows]
    assert torch.equal(embedded(ids, output), expected)


def test_token_ids_are_padded_as_sglang_pads_them() -> None:
    ids, output = media.request_inputs(received(columns(*ROWS)), LIMITS)
    as_sglang = MultimodalProcessorOutput.build_padded_input_ids(list(ids), output.mm_items)
    assert list(output.padded_input_ids) == as_sglang != list(ids)
    assert (type(output.padded_input_ids), output.padded_input_ids.typecode) == (array, "q")


def test_without_positions_sglang_is_given_none() -> None:
    _, output = media.request_inputs(received(changed(columns(0), "has_mrope", 0, 0, 0)), LIMITS)
    assert output.mrope_positions is None
    assert output.mrope_position_delta is None


@pytest.mark.parametrize("content", [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
def test_the_hash_of_an_item_survives_the_way(content: int) -> None:
    item = MultimodalDataItem(modality=Modality.VIDEO, offsets=[(1, 1)])
    item.set_hash(content)
    inputs = SimpleNamespace(mm_items=[item], mrope_positions=None, mrope_position_delta=None)
    req = SimpleNamespace(multimodal_inputs=inputs, origin_input_ids_unpadded=[5, 6])
    sent = media.source_rows(req, {0: torch.ones(1, WIDTH)})
    came = ReceivedRows(2, sent.fill_ids, sent.mrope, sent.items, torch.ones(2, WIDTH), media_items=1)
    _, output = media.request_inputs(came, LIMITS)
    (found,) = output.mm_items
    assert (found.hash, found.pad_value, found.modality) == (content, item.pad_value, Modality.VIDEO)


def test_rows_of_a_modality_without_inner_layers_lose_what_others_have_there() -> None:
    """Sounds, in a model that has rows of its tower's inner layers for pictures."""
    limits = dataclasses.replace(LIMITS, narrow={Modality.AUDIO.value: 2})
    rows = received(columns(-1, 0, 0, modality=Modality.AUDIO.value))
    _, output = media.request_inputs(rows, limits)
    assert torch.equal(output.mm_items[0].precomputed_embeddings, rows.embeddings[1:, :2])
    _, output = media.request_inputs(received(columns(-1, 0, 0)), limits)
    assert output.mm_items[0].precomputed_embeddings.shape == (2, WIDTH)


numbers = st.sampled_from(EDGES) | st.integers(SMALLEST, LARGEST)


@settings(max_examples=200, deadline=None, database=None)
@given(
    runs=st.lists(st.integers(-1, 3), min_size=1, max_size=12),
    damage=st.lists(st.tuples(st.sampled_from(WHERE), st.integers(0, 11), st.integers(0, 3), numbers), max_size=3),
)
def test_what_is_let_through_raises_nowhere_in_sglang(runs: list[int], damage: list[tuple[str, int, int, int]]) -> None:
    small = columns(*runs)
    for where, row, axis, value in damage:
        small = changed(small, where, row % len(runs), axis, value)
    if small.flaw(LIMITS) is None:
        ids, output = media.request_inputs(received(small), LIMITS)
        assert embedded(ids, output).shape == (len(runs), WIDTH)


def test_the_row_that_ended_an_instance_would_still_do_so_if_it_were_let_through() -> None:
    """The check is what stands between it and the scheduler."""
    with pytest.raises(ValueError, match="999"):
        media.request_inputs(received(columns(0, modality=999)), LIMITS)


@pytest.mark.parametrize(
    ("delta", "asked", "left"),
    [(0, None, None), (-3, 70, 70), (5, None, 487), (5, 70, 70), (5, 900, 487), (491, None, 1)],
)
def test_no_token_comes_to_stand_where_the_model_has_no_position(delta: int, asked: int | None, left: int) -> None:
    rows = received(changed(columns(*ROWS), "mrope_delta", 0, 0, delta))
    params = SimpleNamespace(max_new_tokens=asked)
    media.limit_new_tokens(params, rows, LIMITS)
    assert params.max_new_tokens == left


def test_a_model_without_such_positions_has_no_such_limit() -> None:
    params = SimpleNamespace(max_new_tokens=None)
    limits = dataclasses.replace(LIMITS, positions=None)
    media.limit_new_tokens(params, received(changed(columns(0), "mrope_delta", 0, 0, 400)), limits)
    assert params.max_new_tokens is None
