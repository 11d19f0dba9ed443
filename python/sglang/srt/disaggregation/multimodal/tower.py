"""The vision tower of an encode instance: which requests go through it together, and what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, groupby
from typing import Any, Final

import torch

from sglang.srt.disaggregation.multimodal import parts
from sglang.srt.disaggregation.multimodal.masked_attention import MaskedAttention
from sglang.srt.disaggregation.multimodal.shared_pass import SharedPasses

# A tower on an accelerator wants full batches. On a CPU small requests share what a pass costs whatever its size, and
# large ones would gain nothing (`shared_pass`).
_ACCELERATOR_BATCH_TOKENS: Final = 16384
_CPU_BATCH_TOKENS: Final = 128

# The items of one request go together, as they do in an undivided server that has seen none of them: encoded apart,
# they would differ in their last bits. Or, if rows shall travel as they are made, in groups of about so many tokens:
# enough to fill an accelerator; on a CPU, where a larger pass is not a cheaper one, enough for what any pass costs.
_ACCELERATOR_GROUP_TOKENS: Final = 2048
_CPU_GROUP_TOKENS: Final = 128


class VisionTower:
    """Turns the multimodal items of requests into rows; equal items are encoded once and remembered by SGLang."""

    def __init__(
        self, model: Any, device: str, batch_tokens: int, width: int = 0, group_tokens: int | None = None
    ) -> None:
        self.model = model
        self.device = device
        self.batch_tokens = batch_tokens
        self.width = width
        """Of the rows that travel."""
        self.group_tokens = group_tokens
        """A request's items go through it in groups that have as many, or one item more; None: all together."""
        self.totals: Final = {"media_items": 0, "encoded_items": 0, "left_out_items": 0}
        """Items that were asked for, those that went through the tower, and those that nobody needed any more."""
        self.name = type(model).__name__
        self._passes = SharedPasses() if device == "cpu" else None
        self._attention = MaskedAttention() if device == "cpu" else contextlib.nullcontext()

    @classmethod
    def of(cls, scheduler: Any, *, progressive: bool = False) -> VisionTower:
        device = str(scheduler.device)
        on_cpu = device == "cpu"
        tokens = _CPU_BATCH_TOKENS if on_cpu else _ACCELERATOR_BATCH_TOKENS
        if on_cpu and scheduler.tp_size > 1:
            tokens = 1  # each rank would compare for itself, and the passes of all must be the same
        group = _CPU_GROUP_TOKENS if on_cpu else _ACCELERATOR_GROUP_TOKENS
        part = parts.media_part(scheduler.tp_worker.model_runner.model)
        width = scheduler.model_config.hidden_size * (1 + parts.deepstack_rows(part))
        return cls(part, device, tokens, width, group if progressive else None)

    def has_room(self, groups: Sequence[list[Any]]) -> bool:
        """On a CPU, for one more like these. What an accelerator gains by waiting for one, nobody has seen."""
        if self._passes is None or not all(map(self._may_share, groups)):
            return False
        tokens = sum(map(item_tokens, chain(*groups)))
        return tokens * (len(groups) + 1) <= self.batch_tokens * len(groups)

    def group(self, items: Sequence[Any]) -> int:
        """How many of a request's items, from the first one on, go through the tower at a time."""
        if self.group_tokens is None:
            return len(items)
        ends = accumulate(map(item_tokens, items))
        return next((count for count, end in enumerate(ends, 1) if end >= self.group_tokens), len(items))

    def next_batch(self, groups: Iterable[list[Any]]) -> list[list[Any]]:
        """The longest beginning that fits the token budget; at least one. They are of as many requests."""
        batch: list[list[Any]] = []
        tokens = 0
        for items in groups:
            tokens += sum(map(item_tokens, items))
            if batch and (tokens > self.batch_tokens or not all(map(self._may_share, (batch[0], items)))):
                break
            batch.append(items)
        return batch

    def _may_share(self, items: list[Any]) -> bool:
        """A pass with others: on a CPU those that are a row for each patch, which can be told apart there."""
        if self._passes is None:
            return True
        return self._passes.are_equal and not any(
            item.is_audio() or getattr(item.feature, "ndim", 2) != 2 for item in items
        )

    @torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is left out of the type check
    def encode(self, groups: list[list[Any]]) -> list[list[torch.Tensor]]:
        """For every group, of a request of its own, one tensor per item; none holds the memory of another group's.

        The tower's own result has the rows of the whole batch, and would stay until the slowest reader of any is done.
        """
        items = list(chain(*groups))
        self.totals["media_items"] += len(items)
        embeddings = {
            id(item): item.precomputed_embeddings.to(self.device)
            for item in items
            if item.precomputed_embeddings is not None  # somebody has encoded it already
        }
        missing = [[item for item in group if id(item) not in embeddings] for group in groups]
        for modality in {item.modality for group in missing for item in group}:
            same = [[item for item in group if item.modality is modality] for group in missing]
            same = [group for group in same if group]
            for item, rows in zip(chain(*same), self._encode_items(same), strict=True):
                embeddings[id(item)] = rows if len(groups) == 1 else rows.clone()
        return [[self._filled_up(embeddings[id(item)]) for item in group] for group in groups]

    def forget(self) -> None:
        """What SGLang remembers by its hash was made by weights that may not be here any more."""
        from sglang.srt.managers import mm_schedule

        mm_schedule.embedding_cache.clear()

    def wait_for_device(self) -> None:
        """Until nothing that was started on it reads weights or pixels."""
        torch.get_device_module(self.device).synchronize()

    def _encode_items(self, requests: list[list[Any]]) -> list[torch.Tensor]:
        """The items of each request, all of one modality. SGLang calls the tower for what is not in its cache."""
        from sglang.srt.managers.mm_schedule import _get_chunked_prefill_embedding

        items = list(chain(*requests))
        places = [[place for item in of_request for place in item.offsets] for of_request in requests]
        rows, _ = _get_chunked_prefill_embedding(
            self._function_for(items[0].modality, requests),
            items,
            items_size=[0, *accumulate(map(len, requests))],
            prefix_length=[0] * len(requests),
            extend_length=[max(end for _, end in of_request) + 1 for of_request in places],
            items_offset_list=places,
            input_ids=torch.empty(0, dtype=torch.int64, device=self.device),
        )
        lengths = [item_tokens(item) for item in items]
        if rows is None or len(rows) != sum(lengths):
            made = 0 if rows is None else len(rows)
            raise RuntimeError(f"{sum(lengths)} placeholder tokens, but the tower made {made} rows")
        return list(torch.split(rows, lengths))

    def _filled_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Audio has no rows of inner layers where images have them: zeros travel in their place."""
        missing = self.width - rows.shape[1]
        return torch.nn.functional.pad(rows, (0, missing)) if missing > 0 else rows

    def _function_for(self, modality: Any, requests: list[list[Any]]) -> Any:
        name = f"get_{modality.name.lower()}_feature"
        function = getattr(self.model, name, None)
        if function is None:
            raise RuntimeError(f"{self.name} has no {name}")
        request_of = {id(item): number for number, of_request in enumerate(requests) for item in of_request}

        def counted(items: list[Any]) -> Any:
            self.totals["encoded_items"] += len(items)
            with self._attention:
                if self._passes is None or len(requests) == 1:
                    return function(items)
                groups = [list(group) for _, group in groupby(items, key=lambda item: request_of[id(item)])]
                return self._passes.encode(function, groups)

        return counted


def item_tokens(item: Any) -> int:
    return sum(end - start + 1 for start, end in item.offsets)


def release_pixels(items: list[Any]) -> None:
    """Of items that are made."""
    from sglang.srt.managers.schedule_batch import MultimodalInputs

    MultimodalInputs(mm_items=items).release_features()
