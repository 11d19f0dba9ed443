"""The small columns of received requests: good ones, one value of them changed, and what they must be, said slowly."""

import dataclasses
from typing import Final

import numpy as np

from embedding_relay.memory.checks import ModelLimits, SmallColumns
from embedding_relay.memory.layout import Aux

LIMITS: Final = ModelLimits(vocabulary=1000, modalities=frozenset({1, 2}), positions=500)
LARGEST: Final = 2**31 - 1
SMALLEST: Final = -(2**31)
# What a column may be made to hold, beside anything else: the edges of every limit.
EDGES: Final = (SMALLEST, -2, -1, 0, 1, 2, 3, 4, 5, 499, 500, 501, 999, 1000, LARGEST)
WHERE: Final = ("fill_ids", "mrope", "items", "media_items", "mrope_delta", "has_mrope")


def columns(*runs: int, total: int = 0, modality: int = 1) -> SmallColumns:
    """A request with a row per number: the media item that it belongs to, or -1 for text."""
    rows = [*runs, *[-1] * (total - len(runs))]
    items = np.array([(item, modality, 7 * item, -7 * item) if item >= 0 else (-1, 0, 0, 0) for item in rows], np.int32)
    number = max(rows) + 1
    positions = np.repeat(np.arange(len(rows), dtype=np.int32)[:, None], 3, axis=1)
    aux = Aux(total=len(rows), mrope_delta=0, has_mrope=True, media_items=number)
    return SmallColumns(aux, np.arange(len(rows), dtype=np.int32) % 1000, positions, items)


def changed(good: SmallColumns, where: str, row: int, axis: int, value: int) -> SmallColumns:
    """The same with one number changed; `row` and `axis` count for columns only."""
    if where in ("fill_ids", "mrope", "items"):
        column = getattr(good, where).copy()
        if column.ndim == 1:
            column[row] = value
        else:
            column[row, axis % column.shape[1]] = value
        return dataclasses.replace(good, **{where: column})
    field: int | bool = bool(value & 1) if where == "has_mrope" else value
    return dataclasses.replace(good, aux=dataclasses.replace(good.aux, **{where: field}))


def is_safe(received: SmallColumns, limits: ModelLimits) -> bool:
    """Every rule for every row, one at a time, as a person would check them."""
    aux, described = received.aux, {}
    for token in received.fill_ids.tolist():
        if not 0 <= token < limits.vocabulary:
            return False
    for item, *description in received.items.tolist():
        if item == -1:
            continue
        if not 0 <= item < aux.media_items or description[0] not in limits.modalities:
            return False
        if described.setdefault(item, description) != description:
            return False
    if not described or len(described) != aux.media_items:
        return False
    if limits.positions is None:
        return True
    positions = [position for row in received.mrope.tolist() for position in row]
    positions.append(aux.total + aux.mrope_delta)
    return aux.has_mrope and all(0 <= position < limits.positions for position in positions)
