"""Media that a caller within the process has already processed or encoded: what they must be, and their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def check(media: Any, feature_names: Iterable[str]) -> None:
    """ValueError for what only looks like such media: JSON has no tensors, and SGLang's code would fail on lists."""
    for item in media if isinstance(media, list) else [media]:
        if isinstance(item, list):
            check(item, feature_names)
        elif isinstance(item, Mapping) and "format" in item:
            names = [name for name in ("feature", "precomputed_embeddings", *feature_names) if name in item]
            if not names or not all(isinstance(item[name], torch.Tensor) for name in names):
                raise ValueError(
                    "precomputed media are tensors, which only a caller in the same process can hand over:"
                    " send the picture, video or audio itself"
                )


def check_rows(inputs: Any, config: Any) -> None:
    """ValueError for embeddings that are not one row for each placeholder token, as wide as the model's."""
    for item in inputs.mm_items if inputs is not None else ():
        given = item.feature if item.is_precomputed_embedding() else item.precomputed_embeddings
        if not isinstance(given, torch.Tensor):
            continue
        tokens, width = sum(end - start + 1 for start, end in item.offsets or ()), _width(config, item)
        if given.shape[-1:] != (width,) or given.numel() != tokens * width:
            shape = tuple(given.shape)
            raise ValueError(f"embeddings of shape {shape} for {tokens} placeholder tokens of width {width}")
        if given is item.precomputed_embeddings:
            item.precomputed_embeddings = given.reshape(tokens, -1).to(config.dtype)


def row_bytes(item: Any, config: Any) -> int:
    """What the rows of this item take that its tower will make."""
    tokens = sum(end - start + 1 for start, end in item.offsets or ())
    return int(tokens * _width(config, item) * config.dtype.itemsize)


def _width(config: Any, item: Any) -> int:
    """Of a row: with the features of inner layers of the vision tower, if the model takes those."""
    whole = config.hf_config
    vision = getattr(getattr(whole, "thinker_config", whole), "vision_config", None)
    inner = () if item.is_audio() else getattr(vision, "deepstack_visual_indexes", ())
    return int(config.hidden_size * (1 + len(inner)))
