"""Which bytes go where: geometry only. Offsets are relative to a column's base; whoever writes adds the addresses."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

import msgspec

from embedding_relay.protocol.effects import ChunkDestination, Window
from embedding_relay.protocol.errors import LocalError
from embedding_relay.protocol.messages import Run

T = TypeVar("T")

BATCH_LIMIT: Final = 512


class Column(msgspec.Struct, frozen=True):
    """One buffer. `bytes_per_row` is per token, or per block if `per_block`; `media_only` leaves text rows out."""

    name: str
    bytes_per_row: int
    per_block: bool = False
    media_only: bool = False


class Extent(msgspec.Struct, frozen=True):
    """Rows in blocks of one pool: row `first_row` of the room is at offset 0 of the first block."""

    blocks: tuple[int, ...]
    first_row: int


class Segment(NamedTuple):
    """Media rows of a room that lie in one piece of memory, at `pointer`, row `first_row` at offset 0."""

    pointer: int
    first_row: int
    rows: int


class Range(NamedTuple):
    """`length` bytes of one column, contiguous on both sides."""

    column: int
    source: int
    destination: int
    length: int


class _Piece(NamedTuple):
    """`rows` rows, contiguous on both sides; places are counted in rows from the beginning of the pool."""

    source: int
    destination: int
    rows: int


def plan_writes(
    columns: Sequence[Column],
    block_size: int,
    source: Extent,
    destination: Extent,
    start_row: int,
    stop_row: int,
    media_runs: Iterable[Run],
    with_aux: bool,
) -> list[Range]:
    """The fewest ranges that bring rows `[start_row, stop_row)` over; `with_aux` adds the first block's aux row."""
    everything = _pieces(block_size, source, destination, [(start_row, stop_row)])
    media = _pieces(block_size, source, destination, _clipped(media_runs, start_row, stop_row))
    ranges: list[Range] = []
    for index, column in enumerate(columns):
        size = column.bytes_per_row
        if column.per_block:
            if with_aux:
                ranges.append(Range(index, source.blocks[0] * size, destination.blocks[0] * size, size))
            continue
        pieces = media if column.media_only else everything
        ranges.extend(Range(index, p.source * size, p.destination * size, p.rows * size) for p in pieces)
    return ranges


def plan_chunk(
    columns: Sequence[Column],
    block_size: int,
    window: Window,
    destination: ChunkDestination,
    media_runs: Iterable[Run],
) -> list[Range]:
    """The ranges of one destination of a `TransferEmbeddingChunk`."""
    return plan_writes(
        columns,
        block_size,
        Extent(window.blocks, window.first_row),
        Extent(destination.blocks, destination.first_row),
        destination.start_row,
        destination.stop_row,
        without(media_runs, destination.left_out),
        destination.with_aux,
    )


def plan_media(
    column: int,
    bytes_per_row: int,
    block_size: int,
    segments: Iterable[Segment],
    destination: ChunkDestination,
    start: int,
    stop: int,
) -> list[Range]:
    """The ranges that bring media rows of `[start, stop)` over from where they are, and not from blocks: their sources
    are addresses. As in `plan_chunk`, what the destination has is left out.
    """
    extent = Extent(destination.blocks, destination.first_row)
    ranges: list[Range] = []
    for segment in segments:
        here = max(start, segment.first_row), min(stop, segment.first_row + segment.rows)
        for row, end in without([here], destination.left_out):
            while row < end:
                place, left = _place(block_size, extent, row)
                rows = min(end - row, left)
                source = segment.pointer + (row - segment.first_row) * bytes_per_row
                ranges.append(Range(column, source, place * bytes_per_row, rows * bytes_per_row))
                row += rows
    return _joined(ranges)


def _joined(ranges: Iterable[Range]) -> list[Range]:
    joined: list[Range] = []
    for one in ranges:
        last = joined[-1] if joined else None
        if last and (last.source + last.length, last.destination + last.length) == (one.source, one.destination):
            joined[-1] = last._replace(length=last.length + one.length)
        else:
            joined.append(one)
    return joined


def batches(ranges: Sequence[T], limit: int = BATCH_LIMIT) -> Iterator[Sequence[T]]:
    """The engine takes only so many entries in one call."""
    for start in range(0, len(ranges), limit):
        yield ranges[start : start + limit]


def without(runs: Iterable[Run], left_out: Sequence[Run]) -> Iterator[Run]:
    """The runs without the rows of those that are left out, which are in order and disjoint."""
    for start, stop in runs:
        first = bisect.bisect_left(left_out, start, key=lambda run: run[1])
        for gap_start, gap_stop in left_out[first:]:
            if gap_start >= stop:
                break
            if start < gap_start:
                yield start, gap_start
            start = max(start, gap_stop)
        if start < stop:
            yield start, stop


def _clipped(runs: Iterable[Run], start: int, stop: int) -> list[Run]:
    """The part of the runs within `[start, stop)`, sorted, without overlaps, neighbours merged."""
    clipped: list[Run] = []
    for first, last in sorted(runs):
        first, last = max(first, start), min(last, stop)
        if first >= last:
            continue
        if clipped and clipped[-1][1] >= first:
            first, last = clipped[-1][0], max(last, clipped.pop()[1])
        clipped.append((first, last))
    return clipped


def _pieces(block_size: int, source: Extent, destination: Extent, runs: Iterable[Run]) -> list[_Piece]:
    pieces: list[_Piece] = []
    for start, stop in runs:
        row = start
        while row < stop:
            here, here_left = _place(block_size, source, row)
            there, there_left = _place(block_size, destination, row)
            rows = min(stop - row, here_left, there_left)
            pieces.append(_Piece(here, there, rows))
            row += rows
    return _merged(pieces)


def _merged(pieces: list[_Piece]) -> list[_Piece]:
    """Sorted first: rows that are far apart in the room may be neighbours in both pools."""
    merged: list[_Piece] = []
    for piece in sorted(pieces):
        last = merged[-1] if merged else None
        if last and (last.source + last.rows, last.destination + last.rows) == (piece.source, piece.destination):
            merged[-1] = last._replace(rows=last.rows + piece.rows)
        else:
            merged.append(piece)
    return merged


def _place(block_size: int, extent: Extent, row: int) -> tuple[int, int]:
    """Where in the pool the row is, and how many rows are left in its block."""
    index, offset = divmod(row - extent.first_row, block_size)
    if not 0 <= index < len(extent.blocks):
        raise LocalError(f"row {row} is not in {len(extent.blocks)} blocks from row {extent.first_row} on")
    return extent.blocks[index] * block_size + offset, block_size - offset
