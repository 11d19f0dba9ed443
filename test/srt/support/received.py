"""Rows that have arrived, and a stand-in for the model that takes them: a table of token embeddings, and no layers."""

from __future__ import annotations

from typing import Any, Final

import torch

from embedding_relay.memory.buffers import ReceivedRows
from embedding_relay.memory.checks import SmallColumns
from support.columns import LIMITS

WIDTH: Final = 3
TABLE: Final = torch.nn.Embedding(LIMITS.vocabulary, WIDTH)


class ModelWithoutLayers:
    """Never asked for features: the rows are there."""

    def get_image_feature(self, items: Any) -> torch.Tensor:
        raise AssertionError("rows are here, and are computed again")

    get_video_feature = get_image_feature


def received(small: SmallColumns) -> ReceivedRows:
    """With embeddings that count up from 1, and zeros where there is text."""
    total = small.aux.total
    is_media = torch.from_numpy(small.items[:, 0] >= 0)
    embeddings = torch.zeros(total, WIDTH)
    embeddings[is_media] = torch.arange(1.0, WIDTH * int(is_media.sum()) + 1).view(-1, WIDTH)
    return ReceivedRows(
        total=total,
        fill_ids=torch.from_numpy(small.fill_ids),
        mrope=torch.from_numpy(small.mrope),
        items=torch.from_numpy(small.items),
        embeddings=embeddings,
        mrope_delta=small.aux.mrope_delta,
        has_mrope=small.aux.has_mrope,
        media_items=small.aux.media_items,
    )
