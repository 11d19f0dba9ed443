"""The vision tower of an encode instance: which requests go through it together, and what comes out."""

from __future__ import annotations

from itertools import accumulate, chain, groupby
from typing import Any, Final

import torch

from sglang.srt.disaggregation.multimodal import parts
from sglang.srt.disaggregation.multimodal.shared_pass import SharedPasses

# A tower on an accelerator wants full batches. On a CPU small requests share what a pass costs whatever its size, and
# large ones would gain nothing (`shared_pass`). The items of one request always go together, as they do in an undivided
# server: encoded apart, they would differ in their last bits.
_ACCELERATOR_BATCH_TOKENS: Final = 16384
_CPU_BATCH_TOKENS: Final = 128


class VisionTower:
    """Turns the multimodal items of requests into rows; equal items are encoded once and remembered by SGLang."""

    def __init__(self, model: Any, device: str, batch_tokens: int, width: int = 0) -> None:
        self.model = model
        self.device = device
        self.batch_tokens = batch_tokens
        self.width = width
        """Of the rows that travel."""
        self.totals: Final = {"media_items": 0, "encoded_items": 0}
        """Items that were asked for, and those that went through the tower."""
        self.name = type(model).__name__
        self._passes = SharedPasses() if device == "cpu" else None

    @classmethod
    def of(cls, scheduler: Any) -> VisionTower:
        device = str(scheduler.device)
        tokens = _CPU_BATCH_TOKENS if device == "cpu" else _ACCELERATOR_BATCH_TOKENS
        if device == "cpu" and scheduler.tp_size > 1:
            tokens = 1  # each rank would compare for itself, and the passes of all must be the same
        part = parts.media_part(scheduler.tp_worker.model_runner.model)
        return cls(part, device, tokens, scheduler.model_config.hidden_size * (1 + parts.deepstack_rows(part)))

    def next_batch(self, reqs: list[Any]) -> list[Any]:
        """The longest beginning of the queue that fits the token budget; always at least one."""
        batch, tokens = reqs[:1], _tokens(reqs[0])
        for req in reqs[1:]:
            tokens += _tokens(req)
            if tokens > self.batch_tokens or not all(map(self._may_share, (batch[0], req))):
                break
            batch.append(req)
        return batch

    def _may_share(self, req: Any) -> bool:
        """A pass with others: on a CPU those that are a row for each patch, which can be told apart there."""
        if self._passes is None:
            return True
        items = req.multimodal_inputs.mm_items
        return self._passes.are_equal and not any(
            item.is_audio() or getattr(item.feature, "ndim", 2) != 2 for item in items
        )

    @torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is left out of the type check
    def encode(self, reqs: list[Any]) -> list[list[torch.Tensor]]:
        """For every request one tensor per item, in the order of its items; no request's tensors hold another's memory.

        The tower's own result has the rows of the whole batch, and would stay until the slowest reader of any is done.
        """
        items = [item for req in reqs for item in req.multimodal_inputs.mm_items]
        self.totals["media_items"] += len(items)
        embeddings = {
            id(item): item.precomputed_embeddings.to(self.device)
            for item in items
            if item.precomputed_embeddings is not None  # somebody has encoded it already
        }
        missing = [[item for item in req.multimodal_inputs.mm_items if id(item) not in embeddings] for req in reqs]
        for modality in {item.modality for of_request in missing for item in of_request}:
            same = [[item for item in of_request if item.modality is modality] for of_request in missing]
            same = [of_request for of_request in same if of_request]
            for item, rows in zip(chain(*same), self._encode_items(same), strict=True):
                embeddings[id(item)] = rows if len(reqs) == 1 else rows.clone()
        return [[self._filled_up(embeddings[id(item)]) for item in req.multimodal_inputs.mm_items] for req in reqs]

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
            if self._passes is None or len(requests) == 1:
                return function(items)
            groups = [list(group) for _, group in groupby(items, key=lambda item: request_of[id(item)])]
            return self._passes.encode(function, groups)

        return counted


def item_tokens(item: Any) -> int:
    return sum(end - start + 1 for start, end in item.offsets)


def _tokens(req: Any) -> int:
    return sum(map(item_tokens, req.multimodal_inputs.mm_items))
