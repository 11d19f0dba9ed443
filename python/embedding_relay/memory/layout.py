"""The columns of the buffers, a row per token: their order and widths, and what both sides must agree on. No torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Final

from embedding_relay.protocol.errors import SettingError
from embedding_relay.protocol.messages import PROTOCOL_VERSION, RECORD_BYTES, Handshake
from embedding_relay.protocol.plan import Column

DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}

INT32: Final = 4
ITEM_VALUES: Final = 4
MROPE_AXES: Final = 3

EMBEDDINGS: Final = "input_embeddings"
FILL_IDS: Final = "fill_ids"
MROPE: Final = "mrope_positions"
AUX: Final = "aux_datas"
DEEPSTACK: Final = "deepstack_embeddings"
ITEMS: Final = "media_items"
RECORDS: Final = "records"

_AUX_VALUES: Final = 16
_FLAG_HAS_MROPE: Final = 1


@dataclasses.dataclass(frozen=True)
class Aux:
    """What travels once per request, in the aux row of its first block."""

    total: int
    mrope_delta: int
    has_mrope: bool
    media_items: int
    record_bytes: int = 0
    """Of each record, for language ranks that take records of this length. 0: whoever wrote this knows of none."""

    def values(self) -> list[int]:
        """The row: 32-bit numbers, those that have no meaning yet are zero."""
        flags = _FLAG_HAS_MROPE if self.has_mrope else 0
        used = [self.total, self.mrope_delta, flags, self.media_items, self.record_bytes]
        return used + [0] * (_AUX_VALUES - len(used))

    @classmethod
    def of(cls, values: Sequence[int]) -> Aux:
        total, mrope_delta, flags, media_items, record_bytes = values[:5]
        return cls(total, mrope_delta, bool(flags & _FLAG_HAS_MROPE), media_items, record_bytes)

    @property
    def has_records(self) -> bool:
        return self.record_bytes == RECORD_BYTES


@dataclasses.dataclass(frozen=True)
class BufferLayout:
    """What a model and the settings make of the buffers; equal on both sides, but for the number of blocks."""

    hidden_size: int
    dtype: str
    deepstack_rows: int
    block_size: int
    blocks: int
    model: tuple[tuple[str, str], ...] = ()
    """What else tells this model from others, by name."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise SettingError(f"embeddings of dtype {self.dtype} cannot be transferred, only {', '.join(DTYPE_BYTES)}")

    @property
    def width(self) -> int:
        """Elements per row as the model hands them out: the embedding, then its deepstack rows."""
        return self.hidden_size * (1 + self.deepstack_rows)

    @functools.cached_property
    def columns(self) -> tuple[Column, ...]:
        row = self.hidden_size * DTYPE_BYTES[self.dtype]
        columns = [
            Column(name=EMBEDDINGS, bytes_per_row=row, per_block=False, media_only=True),
            Column(name=FILL_IDS, bytes_per_row=INT32, per_block=False, media_only=False),
            Column(name=MROPE, bytes_per_row=MROPE_AXES * INT32, per_block=False, media_only=False),
            Column(name=AUX, bytes_per_row=_AUX_VALUES * INT32, per_block=True, media_only=False),
        ]
        if self.deepstack_rows:
            columns.append(
                Column(name=DEEPSTACK, bytes_per_row=self.deepstack_rows * row, per_block=False, media_only=True)
            )
        columns.append(Column(name=ITEMS, bytes_per_row=ITEM_VALUES * INT32, per_block=False, media_only=False))
        return tuple(columns)

    @functools.cached_property
    def short_columns(self) -> tuple[Column, ...]:
        """All but the media columns, for whoever takes records: ids, positions and items side by side. Every piece of a
        column is an entry of a transfer, and a small entry takes as long as a large one.
        """
        aux = next(column for column in self.columns if column.name == AUX)
        # The aux row says that there are records, so it is written behind them.
        return Column(name=RECORDS, bytes_per_row=RECORD_BYTES), aux

    @functools.cached_property
    def item_lens(self) -> tuple[int, ...]:
        """Bytes per block of each buffer."""
        return tuple(map(self.block_bytes, self.columns))

    def block_bytes(self, column: Column) -> int:
        return column.bytes_per_row * (1 if column.per_block else self.block_size)

    @functools.cached_property
    def memory(self) -> tuple[tuple[Column, int], ...]:
        """Everything that a pool has memory for, and how many bytes: the columns, and records behind them."""
        columns = *self.columns, self.short_columns[0]
        return tuple((column, self.blocks * self.block_bytes(column)) for column in columns)

    @property
    def pool_bytes(self) -> int:
        return sum(length for _, length in self.memory)

    def handshake(self) -> Handshake:
        return Handshake(
            version=PROTOCOL_VERSION,
            block_size=self.block_size,
            item_lens=self.item_lens,
            dtype=self.dtype,
            deepstack_rows=self.deepstack_rows,
            blocks=self.blocks,
            model=self.model,
        )
