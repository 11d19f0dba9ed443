"""Media that somebody has processed or encoded already: what passes, and what only looks like them.

SGLang's tokenizer manager, processor and loaders are real; support/tokenizing.py says what is not there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.preparing import refusal
from support.tokenizing import IMAGE, TokenizerManagerWithoutScheduler

MODE = "encode"


def precomputed(rows: Any, **more: Any) -> dict[str, Any]:
    grid = torch.tensor([[1, 4, 4]])
    return {"format": "precomputed_embedding", "feature": rows, "image_grid_thw": grid, **more}


@pytest.mark.parametrize(
    "given",
    [
        precomputed([[0.5] * 256] * 4),
        {"format": "precomputed_embedding"},
        {"format": "processor_output", "pixel_values": [[0.5] * 1176] * 16, "image_grid_thw": [[1, 4, 4]]},
        {"format": "processor_output", "precomputed_embeddings": [[0.5] * 256] * 4},
        {"format": ["unhashable"]},
    ],
)
def test_precomputed_media_in_json_are_refused(manager: TokenizerManagerWithoutScheduler, given: Any) -> None:
    for media in (given, [given], [[given]]):
        assert "only a caller in the same process" in refusal(manager, text=f"{IMAGE}a", image_data=media)


def test_precomputed_embeddings_of_another_number_or_width_are_refused(
    manager: TokenizerManagerWithoutScheduler,
) -> None:
    ids = [1, *[manager.mm_processor.mm_tokens.image_token_id] * 4, 2]
    for shape in ((3, 256), (4, 255), (4, 2, 128), (0, 256)):
        words = refusal(manager, input_ids=ids, image_data=[precomputed(torch.zeros(shape))])
        assert "4 placeholder tokens" in words


@pytest.mark.parametrize("key", ["feature", "precomputed_embeddings"])
def test_precomputed_embeddings_pass(manager: TokenizerManagerWithoutScheduler, key: str) -> None:
    ids = [1, *[manager.mm_processor.mm_tokens.image_token_id] * 4, 2]
    rows = torch.arange(4 * 256).reshape(4, 256) / 1000
    given = precomputed(rows)
    if key == "precomputed_embeddings":
        given = {"format": "processor_output", key: rows, "image_grid_thw": given["image_grid_thw"]}
    (item,) = manager.prepare(input_ids=ids, image_data=[given]).mm_inputs.mm_items
    assert torch.equal(getattr(item, key).float(), rows.to(getattr(item, key).dtype).float())
    assert item.offsets == [(1, 4)]
