"""SGLang's wrapper around any model of `transformers`, on a language instance: made to take rows instead of pixels."""

from __future__ import annotations

from typing import Any

import torch


def take_rows(part: Any) -> None:
    """Let its forward pass put the rows of a batch where their placeholders are, as SGLang's other classes do.

    The wrapper would hand pixels to the model of `transformers` and have it insert what its own tower makes of them.
    """
    plain = part._forward_hidden_states
    embeddings = _Embeddings(part)

    def forward(input_ids: Any, positions: Any, forward_batch: Any, input_embeds: Any = None) -> Any:
        if input_embeds is None and forward_batch.contains_mm_inputs() and not forward_batch.forward_mode.is_decode():
            from sglang.srt.managers.mm_utils import prepare_mm_inputs

            input_embeds = prepare_mm_inputs(input_ids, forward_batch, embeddings, {}, multimodal_model=part)
            if part._uses_mrope_positions() and forward_batch.mrope_positions is not None:
                positions = forward_batch.mrope_positions
        return plain(input_ids, positions, forward_batch, input_embeds)

    part._forward_hidden_states = forward


class _Embeddings:
    """What SGLang's routine wants of a language model: a way to its embeddings."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def get_input_embeddings(self) -> Any:
        table, scale = self._part.model.get_input_embeddings(), self._part.embed_scale
        return table if scale is None else _Scaled(table, scale)


class _Scaled:
    """Embeddings of a class that multiplies those of its tokens, but not the rows of its media."""

    def __init__(self, table: Any, scale: float) -> None:
        self._table, self._scale = table, scale
        self.num_embeddings = table.num_embeddings

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self._table(ids) * self._scale
