"""Random requests that two processes can make alike: everything follows from a seed."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import torch

from embedding_relay.memory.buffers import ReceivedRows, SourceRows
from embedding_relay.memory.checks import ModelLimits
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.messages import Item

# Of the model that these requests are for. It takes no positions of three axes, so those may be anything.
LIMITS: Final = ModelLimits(vocabulary=2**31 - 1, modalities=frozenset({1}))


@dataclass(frozen=True)
class Spec:
    """A request of `total` rows, text and media mixed as the seed says."""

    room: int
    total: int
    seed: int = 0
    swap: tuple[int, int] | None = None
    """Two media rows that a bad encoder would exchange."""
    held: bool = False
    """The encoder never finishes."""
    item_by_item: bool = False
    """The encoder makes one item at first, and another each time that it is told to."""
    damage: str = ""
    """One of `DAMAGE`: what a hostile encode instance does to its rows before it sends them."""
    like: int | None = None
    """The room of another request, which had the same prompt."""
    salt: int | None = None
    """The language side is told the keys of its items, which differ from those under another salt; None: it is not."""


def make_rows(layout: BufferLayout, spec: Spec) -> SourceRows:
    number = spec.room if spec.like is None else spec.like
    chance = random.Random(f"{number}/{spec.seed}")
    noise = torch.Generator().manual_seed((number * 1_000_003 + spec.seed) % 2**63)
    items = torch.full((spec.total, 4), -1, dtype=torch.int32)
    segments = []
    row, item = chance.randint(0, min(9, spec.total - 1)), 0
    while row < spec.total:
        count = min(chance.choice((1, 7, 64, 300, 1500)), spec.total - row)
        # Any number may come out of a model, so any goes in: comparisons look at bytes. Without the highest bit of its
        # exponent each is a number that a model can be given.
        bits = torch.randint(-(2**15), 2**15, (count, layout.width * _halves(layout)), generator=noise).to(torch.int16)
        bits &= ~0x4000
        segments.append((row, bits.view(getattr(torch, layout.dtype))))
        items[row : row + count] = torch.tensor([item, 1, chance.getrandbits(31), chance.getrandbits(31)])
        row, item = row + count + chance.choice((0, 1, 5, 40)), item + 1
    source = SourceRows(
        total=spec.total,
        fill_ids=torch.randint(0, 2**31 - 1, (spec.total,), generator=noise, dtype=torch.int32),
        mrope=torch.randint(-9, 2**30, (spec.total, 3), generator=noise, dtype=torch.int32),
        items=items,
        segments=segments,
        mrope_delta=-chance.randint(0, spec.total),
        has_mrope=chance.random() < 0.5,
        media_items=item,
    )
    if spec.swap:
        _swap(source, *spec.swap)
    if spec.damage:
        source = Forged(**{field.name: getattr(source, field.name) for field in fields(source)})
        DAMAGE[spec.damage](source)
    return source


def items_of(source: SourceRows, spec: Spec) -> tuple[Item, ...]:
    """As an encode instance would tell of them: each item of these rows is one segment."""
    if spec.salt is None:
        return ()
    items = []
    for start, rows in source.segments:
        key = hashlib.blake2b(rows.view(torch.uint8).numpy().tobytes(), digest_size=16, salt=b"%d" % spec.salt)
        items.append(Item(key.hexdigest(), ((start, start + len(rows)),)))
    return tuple(items)


def without(source: SourceRows, items: Sequence[Item], absent: Iterable[int]) -> SourceRows:
    """What an encoder makes that leaves these items out."""
    absent = sorted(absent)
    segments = [segment for number, segment in enumerate(source.segments) if number not in absent]
    return replace(source, segments=segments, absent=tuple((number, items[number].runs) for number in absent))


def first_items(source: SourceRows, count: int) -> SourceRows:
    """What an encoder has made that has come so far."""
    later = source.segments[count:]
    return replace(source, segments=source.segments[:count], made=later[0][0] if later else None)


class Forged(SourceRows):
    """Sent as they are: a hostile instance does not look at what it sends."""

    def check(self, layout: BufferLayout) -> None:
        pass


def _set(field: str, value: int) -> Callable[[SourceRows], None]:
    return lambda rows: setattr(rows, field, value)


def _put(column: str, axis: int, value: int) -> Callable[[SourceRows], None]:
    """In the last media row: what is wrong comes with the last chunk."""

    def put(rows: SourceRows) -> None:
        row = rows.media_runs[-1][1] - 1
        values = getattr(rows, column)
        values.view(rows.total, -1)[row, axis] = value

    return put


def _put_value(value: float) -> Callable[[SourceRows], None]:
    def put(rows: SourceRows) -> None:
        rows.segments[-1][1][-1, 0] = value

    return put


DAMAGE: Final[dict[str, Callable[[SourceRows], None]]] = {
    "modality": _put("items", 1, 999),
    "item index": _put("items", 0, 2**31 - 1),
    "item hash": _put("items", 2, 7),
    "token id": _put("fill_ids", 0, 2**31 - 1),
    "negative token id": _put("fill_ids", 0, -1),
    "too many items": _set("media_items", 2**31 - 1),
    "no items": _set("media_items", 0),
    "one item too few": lambda rows: setattr(rows, "media_items", rows.media_items + 1),
    "no number": _put_value(math.nan),
    "infinite": _put_value(-math.inf),
    "too large": _put_value(3e38),
}


def _halves(layout: BufferLayout) -> int:
    return 2 if layout.dtype == "float32" else 1


def _swap(source: SourceRows, a: int, b: int) -> None:
    def locate(row: int) -> torch.Tensor:
        return next(values[row - start] for start, values in source.segments if start <= row < start + len(values))

    kept = locate(a).clone()
    locate(a).copy_(locate(b))
    locate(b).copy_(kept)


def difference(layout: BufferLayout, source: SourceRows, received: ReceivedRows) -> str | None:
    """What is not bit for bit the same, or None."""
    embeddings = torch.zeros(source.total, layout.width, dtype=getattr(torch, layout.dtype))
    for start, values in source.segments:
        embeddings[start : start + len(values)] = values
    if received.total != source.total:
        return f"{received.total} rows, not {source.total}"
    for name, want, got in (
        ("fill_ids", source.fill_ids, received.fill_ids),
        ("mrope", source.mrope, received.mrope),
        ("items", source.items, received.items),
        ("embeddings", embeddings, received.embeddings),
    ):
        if want.dtype != got.dtype or want.shape != got.shape:
            return f"{name}: {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
        wrong = (
            want.reshape(source.total, -1).view(torch.uint8) != got.reshape(source.total, -1).view(torch.uint8)
        ).any(1)
        if wrong.any():
            return f"{name}: {int(wrong.sum())} rows differ, the first is {int(wrong.nonzero()[0])}"
    facts = (source.mrope_delta, source.has_mrope, source.media_items)
    if facts != (received.mrope_delta, received.has_mrope, received.media_items):
        return f"facts differ: {facts}"
    return None
