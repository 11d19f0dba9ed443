"""The registered buffers of one rank: a row per token, in blocks; and how requests are copied into and out of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from embedding_relay.memory import device as devices
from embedding_relay.memory import layout as columns
from embedding_relay.memory.copying import PIECE_BYTES, CopyThreads
from embedding_relay.memory.device import HOST, Synchronizes
from embedding_relay.memory.layout import Aux, BufferLayout
from embedding_relay.memory.plane import Region, private_memory
from embedding_relay.memory.reuse import ReusedMemory
from embedding_relay.memory.row_cache import HeldRows
from embedding_relay.protocol.errors import LocalError
from embedding_relay.protocol.messages import RECORD_BYTES, Run
from embedding_relay.protocol.plan import Column, Segment

logger = logging.getLogger(__name__)

# No model makes such embeddings, and sums of larger ones end up as infinite: in a model as something that is no number,
# on which its sampler raises. A little more than 1e30, because bfloat16 has only a little more.
_LARGEST_VALUE: Final = 1.01e30
# By type: how to see its numbers as integers, and as which one the largest that is finite and below 1e30 is seen.
_AS_INTEGERS: Final = {
    torch.bfloat16: (torch.int16, np.uint16, 0x7149),
    torch.float16: (torch.int16, np.uint16, 0x7BFF),
    torch.float32: (torch.int32, np.uint32, 0x7149F2C9),
}

_PAGE: Final = 4096


# Where the embedding of a row comes from. From 0 on: the held rows with this number.
_BLOCKS: Final = -1
_NOWHERE: Final = -2


class _Piece(NamedTuple):
    """`rows` rows: from row `at` of the buffer on, and from row `row` of the request on."""

    at: int
    row: int
    rows: int
    source: int


_Span = tuple[int, int, int]
"""Row of the buffer, row of the request, count."""


@dataclasses.dataclass
class SourceRows:
    """One request as the encode side made it. Nobody writes to it any more, until the room is over."""

    total: int
    fill_ids: torch.Tensor
    mrope: torch.Tensor
    items: torch.Tensor
    segments: Sequence[tuple[int, torch.Tensor]]
    """(first row, rows of embedding and deepstack values), in order; with those that are absent they are the media rows
    before `made`.
    """
    mrope_delta: int = 0
    has_mrope: bool = False
    media_items: int = 0
    absent: tuple[tuple[int, tuple[Run, ...]], ...] = ()
    """Items that every language rank has already, by their number, and their rows: nobody has made them."""
    made: int | None = None
    """Rows before which everything is made that ever will be; None if there is nothing left to be made."""
    ready: Synchronizes | None = None
    """What must have happened before the segments may be read, if they are still being made on a device.

    `EmbeddingBuffers.stage` is their only reader.
    """

    def check(self, layout: BufferLayout) -> None:
        """Refuse what the buffers could only take in part, or in another type."""
        dtype = getattr(torch, layout.dtype)
        for _, rows in self.segments:
            if rows.dtype != dtype or rows.dim() != 2 or rows.shape[1] != layout.width:
                raise LocalError(f"rows of {rows.dtype} and shape {tuple(rows.shape)} do not fit {layout}")
        shapes = (self.fill_ids.shape, self.mrope.shape, self.items.shape)
        if self.total < 1 or shapes != ((self.total,), (self.total, 3), (self.total, columns.ITEM_VALUES)):
            raise LocalError(f"{shapes} are not the shapes of {self.total} rows")
        absent = [run for _, runs in self.absent for run in runs]
        media = np.zeros(self.total, dtype=np.int32)
        for start, stop in (*self.media_runs, *absent):
            media[start:stop] += 1
        made = self.total if self.made is None else self.made
        if not np.array_equal(media[:made], self.items.numpy()[:made, 0] >= 0):
            raise LocalError("the rows with an item index are not the rows of the segments and of absent items")

    @property
    def device(self) -> torch.device:
        return devices.device_of(rows for _, rows in self.segments)

    @property
    def aux(self) -> Aux:
        return Aux(self.total, self.mrope_delta, self.has_mrope, self.media_items, RECORD_BYTES)

    @functools.cached_property
    def in_host_memory(self) -> list[Segment] | None:
        """The segments, if others can read them where they are."""
        if self.device.type != HOST.type or not all(rows.is_contiguous() for _, rows in self.segments):
            return None
        return [Segment(rows.data_ptr(), first_row, rows.shape[0]) for first_row, rows in self.segments]

    @functools.cached_property
    def media_runs(self) -> tuple[tuple[int, int], ...]:
        """`[start, stop)` of the media rows that are made, neighbours merged."""
        runs: list[tuple[int, int]] = []
        for start, rows in self.segments:
            stop = start + rows.shape[0]
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            if stop > start:
                runs.append((start, stop))
        return tuple(runs)


@dataclasses.dataclass
class ReceivedRows:
    """One request as the language side got it: tensors of the final length, filled from the front."""

    total: int
    fill_ids: torch.Tensor
    mrope: torch.Tensor
    items: torch.Tensor
    embeddings: torch.Tensor
    """Embedding and deepstack values per row, as the model's own encoder returns them; zero for text rows."""
    mrope_delta: int = 0
    has_mrope: bool = False
    media_items: int = 0
    flaw: str | None = None
    """What is wrong with the embeddings that are here, as a part of a sentence."""
    has_records: bool = False
    """Its small columns come side by side."""

    @property
    def aux(self) -> Aux:
        record_bytes = RECORD_BYTES if self.has_records else 0
        return Aux(self.total, self.mrope_delta, self.has_mrope, self.media_items, record_bytes)

    @property
    def columns(self) -> tuple[torch.Tensor, ...]:
        return self.fill_ids, self.mrope, self.items, self.embeddings

    @functools.cached_property
    def small(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """The same memory: what is in a record, column by column."""
        return self.fill_ids.numpy()[:, None], self.mrope.numpy(), self.items.numpy()

    @functools.cached_property
    def integers(self) -> NDArray[Any]:
        """The same memory: embeddings as what `_AS_INTEGERS` says."""
        return _as_integers(self.embeddings)

    @property
    def embedding_bytes(self) -> NDArray[np.uint8]:
        """The same memory: a line of bytes for each row."""
        lines: NDArray[np.uint8] = self.embeddings.view(torch.uint8).numpy()
        return lines


# Of `ReceivedRows`, one behind the other: 32-bit numbers per row, and then the embeddings. Of a record, side by side.
_IN_RECORDS: Final = (columns.FILL_IDS, columns.MROPE, columns.ITEMS)
_NUMBERS: Final = (1, columns.MROPE_AXES, columns.ITEM_VALUES)
_BORDERS: Final = (0, *itertools.accumulate(_NUMBERS))
_LINE: Final = 64


def bytes_for(rows: int, layout: BufferLayout) -> int:
    return _start_of_embeddings(rows) + rows * layout.width * columns.DTYPE_BYTES[layout.dtype]


def _start_of_embeddings(rows: int) -> int:
    return -(-rows * sum(_NUMBERS) * columns.INT32 // _LINE) * _LINE


def rows_in(memory: torch.Tensor, aux: Aux, layout: BufferLayout) -> ReceivedRows:
    """A request whose tensors lie in these bytes, `bytes_for` its rows."""
    numbers = torch.split(
        memory[: aux.total * sum(_NUMBERS) * columns.INT32].view(torch.int32), [aux.total * count for count in _NUMBERS]
    )
    embeddings = memory[_start_of_embeddings(aux.total) : bytes_for(aux.total, layout)]
    return ReceivedRows(
        total=aux.total,
        fill_ids=numbers[0],
        mrope=numbers[1].view(-1, columns.MROPE_AXES),
        items=numbers[2].view(-1, columns.ITEM_VALUES),
        embeddings=embeddings.view(getattr(torch, layout.dtype)).view(-1, layout.width),
        mrope_delta=aux.mrope_delta,
        has_mrope=aux.has_mrope,
        media_items=aux.media_items,
        has_records=aux.has_records,
    )


def _pinned_memory(length: int) -> torch.Tensor:
    return torch.empty(length, dtype=torch.uint8, pin_memory=True)  # which torch itself uses again


def page_locked(rows: ReceivedRows, layout: BufferLayout) -> ReceivedRows:
    """A copy from which a device can read beside other work: torch uses its memory again when the device has.

    The rows themselves, if no such memory is left: from other memory, torch copies before it returns.
    """
    try:
        memory = _pinned_memory(bytes_for(rows.total, layout))
    except RuntimeError as error:
        logger.warning("relay: %d rows go to the device from memory that is not page-locked: %s", rows.total, error)
        return rows
    copy = rows_in(memory, rows.aux, layout)
    for here, there in zip(copy.columns, rows.columns, strict=True):
        here.copy_(there)
    return copy


class EmbeddingBuffers:
    """Host memory for `layout.blocks` blocks, one contiguous region per column.

    `device`: where the model of this rank runs. Memory that is copied to it or from it is page-locked.
    """

    def __init__(self, layout: BufferLayout, device: torch.device = HOST) -> None:
        self.layout = layout
        self._is_pinned = device.type == "cuda"
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        self._memory: dict[str, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}
        # The same memory: the columns of integers as (block, row, value), and embeddings as what `_AS_INTEGERS` says.
        # One call of numpy's takes all blocks of a chunk, and a tenth of the time of one of torch's.
        self._small: dict[str, NDArray[np.int32]] = {}
        self._wide: dict[str, NDArray[Any]] = {}
        self._pinned: list[torch.Tensor] = []
        self._threads = CopyThreads()
        self._targets = ReusedMemory(self.total_bytes)
        self._take: Callable[[int], torch.Tensor] = _pinned_memory if self._is_pinned else self._targets.take

    def allocate(self, take: Callable[[int], mmap.mmap] = private_memory) -> None:
        """Each column has pages of its own in what `take` gives."""
        starts = [0, *itertools.accumulate(-(-length // _PAGE) * _PAGE for _, length in self.layout.memory)]
        pool = take(starts.pop())
        for (column, length), start in zip(self.layout.memory, starts, strict=True):
            memory = torch.frombuffer(pool, dtype=torch.uint8, count=length, offset=start)
            dtype = self._dtype if column.media_only else torch.int32
            self._memory[column.name] = memory
            if self._is_pinned and column.media_only and devices.pin(memory):
                self._pinned.append(memory)
            values = column.bytes_per_row // dtype.itemsize
            self._rows[column.name] = memory.view(dtype).view(-1, values)
            if column.media_only:
                self._wide[column.name] = _as_integers(self._rows[column.name])
            else:
                self._small[column.name] = self._rows[column.name].numpy().reshape(self.layout.blocks, -1, values)

    @property
    def total_bytes(self) -> int:
        """Of the pool. No more is kept for received rows either: no more than that is under way at a time."""
        return self.layout.pool_bytes

    def release(self) -> None:
        self._threads.close()
        while self._pinned:
            devices.unpin(self._pinned.pop())
        self._memory.clear()
        self._rows.clear()
        self._small.clear()
        self._wide.clear()
        self._targets.clear()

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(Region(memory.data_ptr(), memory.numel()) for memory in self._memory.values())

    @property
    def pointers(self) -> tuple[int, ...]:
        """Of the columns that a registration has in its frame."""
        return self.pointers_of(self.layout.columns)

    def pointers_of(self, chosen: Iterable[Column]) -> tuple[int, ...]:
        return tuple(self._memory[column.name].data_ptr() for column in chosen)

    @property
    def records(self) -> tuple[int, int]:
        """What the handshake says of them."""
        return self._memory[columns.RECORDS].data_ptr(), RECORD_BYTES

    def segments(self, source: SourceRows) -> list[Segment] | None:
        """Where the embeddings lie, if they can be sent from there: in host memory, each row as in the buffers."""
        return None if self.layout.deepstack_rows else source.in_host_memory

    def stage(
        self,
        source: SourceRows,
        first_row: int,
        rows: int,
        blocks: Sequence[int],
        *,
        with_media: bool = True,
        apart: bool = False,
    ) -> None:
        """Copy rows `[first_row, first_row + rows)` of the source into `blocks`, and the aux row into the first.

        `apart`: the small columns not only as records.
        """
        if source.ready is not None:
            source.ready.synchronize()
        with devices.copies_from(source.device):
            self._copy_in(source, first_row, rows, blocks, source.segments if with_media else (), apart)

    def _copy_in(
        self,
        source: SourceRows,
        first_row: int,
        rows: int,
        blocks: Sequence[int],
        segments: Sequence[tuple[int, torch.Tensor]],
        apart: bool,
    ) -> None:
        self._small[columns.AUX][blocks[0]] = source.aux.values()
        there, places = slice(first_row, first_row + rows), np.array(blocks)
        values = source.fill_ids.numpy()[there, None], source.mrope.numpy()[there], source.items.numpy()[there]
        self._put(columns.RECORDS, places, np.concatenate(values, axis=1))
        for column, given in zip(_IN_RECORDS, values, strict=True) if apart else ():
            self._put(column, places, given)
        for at, row, count in self._spans(blocks, first_row, rows) if segments else ():
            for start, values in segments:
                low, high = max(row, start), min(row + count, start + values.shape[0])
                if low < high:
                    self._write_media(at + low - row, values[low - start : high - start])

    def _put(self, column: str, blocks: NDArray[np.int64], given: NDArray[np.int32]) -> None:
        """Into rows of these blocks, from the first row of the first one on."""
        pool, size = self._small[column], self.layout.block_size
        whole, left = divmod(len(given), size)
        pool[blocks[:whole]] = given[: whole * size].reshape(whole, size, given.shape[1])
        if left:
            pool[blocks[whole], :left] = given[whole * size :]

    def _write_media(self, at: int, values: torch.Tensor) -> None:
        hidden, stop = self.layout.hidden_size, at + values.shape[0]
        self._rows[columns.EMBEDDINGS][at:stop].copy_(values[:, :hidden], non_blocking=True)
        if self.layout.deepstack_rows:
            self._rows[columns.DEEPSTACK][at:stop].copy_(values[:, hidden:], non_blocking=True)

    def read_aux(self, block: int) -> Aux:
        return Aux.of(self._small[columns.AUX][block, 0].tolist())

    def clear_aux(self, block: int) -> None:
        """From here on `read_aux` finds 0 rows there, until somebody writes."""
        self._small[columns.AUX][block] = 0

    def make_target(self, aux: Aux) -> ReceivedRows:
        """Tensors of the final length: nothing is copied again when more rows arrive."""
        return rows_in(self._take(bytes_for(aux.total, self.layout)), aux, self.layout)

    def make_targets_in(self, take: Callable[[int], torch.Tensor]) -> None:
        """From here on targets lie in what `take` gives, whatever the device."""
        self._take = take

    def for_the_model(self, target: ReceivedRows) -> ReceivedRows:
        """The same rows where the device of this rank's model can read them at full speed."""
        return page_locked(target, self.layout) if self._is_pinned else target

    def copy_out(
        self,
        target: ReceivedRows,
        blocks: Sequence[int],
        first_row: int,
        rows: int,
        begin_row: int = 0,
        held: Sequence[HeldRows] = (),
    ) -> int:
        """Copy rows in `blocks` to their place in the target; return how many bytes had to travel for them.

        Row `first_row` is at offset 0 of the first block. What is before `begin_row` has been copied already. Of `held`
        rows embedding and deepstack values are not in the blocks: they are read from there.
        """
        begin, stop = max(first_row, begin_row), first_row + rows
        if begin >= stop:
            return 0
        spans = list(self._spans(blocks, first_row, rows, begin_row))
        received = self._small_columns(target.has_records, spans)
        for column, values in zip(target.small, received, strict=True):
            column[begin:stop] = values
        runs = _sources(target.small[-1][begin:stop, 0], begin, held)
        length = (stop - begin) * self.row_bytes
        copy = functools.partial(self._copy_embeddings, target, held)
        self._threads.run(copy, list(self._pieces(spans, runs)), length)
        media_rows = sum(count for count, source in runs if source == _BLOCKS)
        return self._bytes(stop - begin, media_rows, with_aux=begin_row <= first_row == 0)

    def _small_columns(self, as_records: bool, spans: Sequence[_Span]) -> Sequence[NDArray[np.int32]]:
        names = (columns.RECORDS,) if as_records else _IN_RECORDS
        found = [_rows_of(self._small[name], spans) for name in names]
        if not as_records:
            return found
        return [found[0][:, low:high] for low, high in itertools.pairwise(_BORDERS)]

    def _copy_embeddings(self, target: ReceivedRows, held: Sequence[HeldRows], pieces: Sequence[_Piece]) -> None:
        """Neighbours in the target, looked at while they are still in this processor's cache."""
        values, looked_at = target.integers, pieces[0].row
        last = pieces[-1].row + pieces[-1].rows
        for at, row, count, source in pieces:
            stop = row + count
            if source == _BLOCKS:
                self._read_media(values[row:stop], at)
            elif source == _NOWHERE:
                # It did not travel: what lies in its place belongs to some earlier request.
                values[row:stop] = 0
            else:
                held[source].read(row, values[row:stop].view(np.uint8))
            if stop - looked_at >= self._piece_rows or stop == last:
                _look_at(target, values, looked_at, stop)
                looked_at = stop

    @functools.cached_property
    def _piece_rows(self) -> int:
        return max(1, PIECE_BYTES // self.row_bytes)

    @property
    def row_bytes(self) -> int:
        """Of embeddings and deepstack values."""
        return int(self.layout.width * self._dtype.itemsize)

    def _pieces(self, spans: Iterable[_Span], runs: Iterable[tuple[int, int]]) -> Iterator[_Piece]:
        """Spans cut where the source changes, and long ones."""
        coming = iter(runs)
        left, source = 0, _NOWHERE
        for at, row, count in spans:
            while count:
                if not left:
                    left, source = next(coming)
                length = min(count, left, self._piece_rows)
                yield _Piece(at, row, length, source)
                at, row, count, left = at + length, row + length, count - length, left - length

    def _bytes(self, rows: int, media_rows: int, with_aux: bool) -> int:
        aux, small, media = self._widths
        return aux * with_aux + small * rows + media * media_rows

    @functools.cached_property
    def _widths(self) -> tuple[int, int, int]:
        """Bytes of the aux row, of a row's small columns, and of its media columns."""
        aux = sum(column.bytes_per_row for column in self.layout.columns if column.per_block)
        media = sum(column.bytes_per_row for column in self.layout.columns if column.media_only)
        return aux, sum(column.bytes_per_row for column in self.layout.columns) - aux - media, media

    def _read_media(self, values: NDArray[Any], at: int) -> None:
        """`values`: where to, as integers."""
        hidden, stop = self.layout.hidden_size, at + len(values)
        values[:, :hidden] = self._wide[columns.EMBEDDINGS][at:stop]
        if self.layout.deepstack_rows:
            values[:, hidden:] = self._wide[columns.DEEPSTACK][at:stop]

    def _spans(self, blocks: Sequence[int], first_row: int, rows: int, begin_row: int = 0) -> Iterator[_Span]:
        """One for each run of neighbouring blocks, from `begin_row` on."""
        size = self.layout.block_size
        index, row, stop = 0, first_row, first_row + rows
        while row < stop:
            begin = index
            while index + 1 < len(blocks) and blocks[index + 1] == blocks[index] + 1:
                index += 1
            index += 1
            count = min((index - begin) * size, stop - row)
            skipped = min(max(0, begin_row - row), count)
            if skipped < count:
                yield blocks[begin] * size + skipped, row + skipped, count - skipped
            row += count


def _rows_of(pool: NDArray[np.int32], spans: Sequence[_Span]) -> NDArray[np.int32]:
    rows = pool.reshape(-1, pool.shape[-1])
    parts = [rows[at : at + count] for at, _, count in spans]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _as_integers(values: torch.Tensor) -> NDArray[Any]:
    """The same memory."""
    numbers: NDArray[Any] = values.view(_AS_INTEGERS[values.dtype][0]).numpy()
    return numbers


def _look_at(target: ReceivedRows, as_integers: NDArray[Any], start: int, stop: int) -> None:
    """At rows `[start, stop)` of the target, given as integers too."""
    if target.flaw is not None or _are_small(as_integers[start:stop], target.embeddings.dtype):
        return
    low, high = (extreme.item() for extreme in torch.aminmax(target.embeddings[start:stop]))
    if not (low >= -_LARGEST_VALUE and high <= _LARGEST_VALUE):  # false for what is no number too
        target.flaw = f"rows {start} to {stop - 1} have embeddings from {low} to {high}"


def _are_small(numbers: NDArray[Any], dtype: torch.dtype) -> bool:
    """Whether all are well below the limit; if not, it takes another look. Half as long as to compare them as numbers.

    As integers, floating-point numbers of one sign are in the order of their amounts, with infinities and what is no
    number behind all others. The sign is the highest bit: among signed integers the largest is the largest positive
    number, among unsigned ones the most negative number.
    """
    _, unsigned, bits = _AS_INTEGERS[dtype]
    sign = 1 << (8 * numbers.itemsize - 1)
    return bool(numbers.max() <= bits and numbers.view(unsigned).max() <= sign + bits)


def _sources(item_of: NDArray[np.int32], begin: int, held: Sequence[HeldRows]) -> list[tuple[int, int]]:
    """Where the rows' embeddings come from: how many from where, and so on.

    A row that is no item's has none, whoever says that he has it.
    """
    if not held and item_of.min() >= 0:
        return [(len(item_of), _BLOCKS)]
    sources = np.full(len(item_of), _BLOCKS, dtype=np.int32)
    for number, rows in enumerate(held):
        sources[max(0, rows.start - begin) : max(0, rows.stop - begin)] = number
    sources[item_of < 0] = _NOWHERE
    borders = [0, *(np.flatnonzero(sources[1:] != sources[:-1]) + 1).tolist(), len(sources)]
    return [(stop - start, int(sources[start])) for start, stop in itertools.pairwise(borders)]
