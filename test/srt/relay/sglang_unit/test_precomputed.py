"""Media that somebody has processed or encoded already: what passes, and what only looks like them.

SGLang's tokenizer manager, processor and loaders are real; support/tokenizing.py says what is not there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang.srt.disaggregation.multimodal import precomputed
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputFormat
from support.preparing import refusal
from support.tokenizing import IMAGE, TokenizerManagerWithoutScheduler

MODE = "encode"


def encoded(rows: Any, **more: Any) -> dict[str, Any]:
    grid = torch.tensor([[1, 4, 4]])
    return {"format": "precomputed_embedding", "feature": rows, "image_grid_thw": grid, **more}


@pytest.mark.parametrize(
    "given",
    [
        encoded([[0.5] * 256] * 4),
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
        words = refusal(manager, input_ids=ids, image_data=[encoded(torch.zeros(shape))])
        assert "4 placeholder tokens" in words


@pytest.mark.parametrize("key", ["feature", "precomputed_embeddings"])
def test_precomputed_embeddings_pass(manager: TokenizerManagerWithoutScheduler, key: str) -> None:
    ids = [1, *[manager.mm_processor.mm_tokens.image_token_id] * 4, 2]
    rows = torch.arange(4 * 256).reshape(4, 256) / 1000
    given = encoded(rows)
    if key == "precomputed_embeddings":
        given = {"format": "processor_output", key: rows, "image_grid_thw": given["image_grid_thw"]}
    (item,) = manager.prepare(input_ids=ids, image_data=[given]).mm_inputs.mm_items
    assert torch.equal(getattr(item, key).float(), rows.to(getattr(item, key).dtype).float())
    assert item.offsets == [(1, 4)]


@pytest.mark.parametrize(
    ("modality", "width"),
    [(Modality.IMAGE, 12), (Modality.VIDEO, 12), (Modality.AUDIO, 4)],
    ids=lambda value: str(value),
)
def test_only_what_is_seen_has_features_of_inner_layers(modality: Modality, width: int) -> None:
    """In a model whose thinker takes them, as Qwen3-Omni's does."""
    vision = SimpleNamespace(deepstack_visual_indexes=[1, 2])
    thinker = SimpleNamespace(thinker_config=SimpleNamespace(vision_config=vision))
    config = SimpleNamespace(hf_config=thinker, hidden_size=4, dtype=torch.float32)
    for wide in (4, 12):
        item = MultimodalDataItem(
            modality=modality,
            offsets=[(0, 1)],
            format=MultimodalInputFormat.PRECOMPUTED_EMBEDDING,
            feature=torch.zeros(2, wide),
        )
        inputs = SimpleNamespace(mm_items=[item])
        if wide == width:
            precomputed.check_rows(inputs, config)
        else:
            with pytest.raises(ValueError, match=f"of width {width}"):
                precomputed.check_rows(inputs, config)
