"""SGLang's multimodal items <-> the rows that travel: which rows belong to which item, and back."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from embedding_relay.memory.buffers import ReceivedRows, SourceRows
from embedding_relay.memory.checks import NO_ITEM, ModelLimits
from embedding_relay.memory.device import device_of, everything_queued_on
from embedding_relay.protocol.messages import Item, Run
from sglang.srt.disaggregation.multimodal.item_keys import ItemKeys

_HASH_HALF: Final = 32
_HASH_MASK: Final = (1 << _HASH_HALF) - 1


def manifest_items(req: Any, keys: ItemKeys) -> tuple[Item, ...]:
    """What the language side is told of the items of a request, in their order."""
    items = [(keys.key(item, req), _runs_of(item)) for item in req.multimodal_inputs.mm_items]
    return tuple(Item(key, runs) for key, runs in items) if all(runs for _, runs in items) else ()


def source_rows(req: Any, embeddings: Mapping[int, torch.Tensor], absent: Collection[int] = ()) -> SourceRows:
    """Everything the language side needs of a request; `embeddings` has the rows of an item by its number.

    Those of `absent` are at every language rank already. What is neither here nor there is not made yet.
    Called on the stream on which the tower ran: what it has queued there is what the rows are ready after.
    """
    media = req.multimodal_inputs
    total = len(req.origin_input_ids_unpadded)
    segments: list[tuple[int, torch.Tensor]] = []
    missing = []
    for number, item in enumerate(media.mm_items):
        if number in embeddings:
            runs = _runs_of(item)
            pieces = torch.split(embeddings[number], [stop - start for start, stop in runs])
            segments += zip((start for start, _ in runs), pieces, strict=True)
        elif number not in absent:
            missing.append(min(start for start, _ in item.offsets))
    segments.sort(key=lambda segment: segment[0])
    mrope = media.mrope_positions
    delta = media.mrope_position_delta
    return SourceRows(
        total=total,
        fill_ids=torch.from_numpy(np.array(req.origin_input_ids_unpadded, dtype=np.int32)),
        mrope=torch.zeros(total, 3, dtype=torch.int32) if mrope is None else mrope.to("cpu", torch.int32).t(),
        mrope_delta=0 if delta is None else int(delta.item()),
        has_mrope=mrope is not None,
        items=torch.from_numpy(_item_table(total, media.mm_items)),
        segments=segments,
        media_items=len(media.mm_items),
        absent=tuple((number, _runs_of(media.mm_items[number])) for number in sorted(absent)),
        made=min(missing, default=None),
        ready=everything_queued_on(device_of(embeddings.values())),
    )


def _runs_of(item: Any) -> tuple[Run, ...]:
    return tuple((start, end + 1) for start, end in item.offsets)


def _item_table(total: int, items: list[Any]) -> NDArray[np.int32]:
    """With numpy, like all that is small here: a call of torch's takes three times as long, and a prompt has dozens."""
    table = np.zeros((total, 4), dtype=np.int32)
    table[:, 0] = NO_ITEM
    for index, item in enumerate(items):
        halves = [item.hash & _HASH_MASK, item.hash >> _HASH_HALF]
        for start, end in item.offsets:
            table[start : end + 1] = index, item.modality.value, *map(_signed, halves)
    return table


def _signed(half: int) -> int:
    return half - (1 << _HASH_HALF) if half >> (_HASH_HALF - 1) else half


def request_inputs(rows: ReceivedRows, limits: ModelLimits) -> tuple[array[int], Any]:
    """The expanded token ids and SGLang's own description of precomputed media, for one use of the rows."""
    from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput

    # The scheduler does nothing else meanwhile, so nothing goes over token ids one by one that need not.
    input_ids = rows.fill_ids.numpy().astype(np.int64)
    items = _items(rows, limits)
    output = MultimodalProcessorOutput(
        mm_items=items, input_ids=input_ids.tolist(), padded_input_ids=_array(_padded(input_ids, items))
    )
    if rows.has_mrope:
        output.mrope_positions = rows.mrope.t().to(torch.int64)
        output.mrope_position_delta = torch.tensor([[rows.mrope_delta]])
    return _array(input_ids), output


def _array(ids: NDArray[np.int64]) -> array[int]:
    """SGLang makes one of whatever it is given, and of an array quickest."""
    made = array("q")
    made.frombytes(ids.tobytes())
    return made


def _padded(input_ids: NDArray[np.int64], items: list[Any]) -> NDArray[np.int64]:
    """As SGLang pads a list, from the items' own offsets.

    Padded here: models that pad by themselves need token ids that only a processor knows.
    """
    padded = input_ids.copy()
    for item in items:
        values = np.array(getattr(item, "pad_values", None) or [item.pad_value], dtype=np.int64)
        for start, end in item.offsets:
            padded[start : end + 1] = values[np.arange(end - start + 1) % len(values)]
    return padded


def limit_new_tokens(sampling_params: Any, rows: ReceivedRows, limits: ModelLimits) -> None:
    """Let no token come to stand at a position that the model does not have.

    SGLang counts tokens for that. Where positions run ahead of tokens (a slow video; or a peer says so) it is too late.
    """
    if limits.positions is None or rows.mrope_delta <= 0:
        return
    left = limits.positions - rows.total - rows.mrope_delta
    asked = sampling_params.max_new_tokens
    sampling_params.max_new_tokens = left if asked is None else min(asked, left)


def _items(rows: ReceivedRows, limits: ModelLimits) -> list[Any]:
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputFormat

    runs: dict[int, list[tuple[int, int]]] = {}
    table = rows.items.numpy()
    for index, start, end in _runs(table[:, 0]):
        runs.setdefault(index, []).append((start, end))
    items = []
    for index in sorted(runs):
        offsets = runs[index]
        _, modality, low, high = table[offsets[0][0]].tolist()
        parts = [rows.embeddings[start : end + 1, : limits.narrow.get(modality)] for start, end in offsets]
        item = MultimodalDataItem(
            modality=Modality(modality),
            offsets=offsets,
            format=MultimodalInputFormat.PRECOMPUTED_EMBEDDING,
            precomputed_embeddings=parts[0] if len(parts) == 1 else torch.cat(parts),
        )
        item.set_hash((low & _HASH_MASK) | ((high & _HASH_MASK) << _HASH_HALF))
        items.append(item)
    return items


def _runs(index: NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """(item, first row, last row) of every run of rows that belong to one item: neighbours stay two items."""
    ends = [*np.flatnonzero(index[1:] != index[:-1]).tolist(), len(index) - 1]
    starts = [0, *(end + 1 for end in ends)]
    found = zip(index[ends].tolist(), starts, ends, strict=False)
    return [(value, start, end) for value, start, end in found if value != NO_ITEM]
