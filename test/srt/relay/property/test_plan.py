"""Plans executed on bytes: each lands exactly once, where it belongs, and nowhere else; no fewer ranges would do."""

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import ChunkDestination, Window
from embedding_relay.protocol.errors import LocalError
from embedding_relay.protocol.messages import Run
from embedding_relay.protocol.plan import Column, Extent, Range, Segment, batches, plan_chunk, plan_media
from support.effort import effort, unhurried

pytestmark = unhurried

COLUMNS = (
    Column("embeddings", 3, media_only=True),
    Column("ids", 2),
    Column("aux", 5, per_block=True),
    Column("items", 1),
)


@st.composite
def leases(draw: st.DrawFn, blocks_needed: int) -> tuple[int, tuple[int, ...]]:
    """(blocks in the pool, blocks of one room), scattered as use scatters them."""
    count = blocks_needed + draw(st.integers(0, 8))
    if draw(st.booleans()):
        return count, tuple(draw(st.permutations(range(count)))[:blocks_needed])
    pool = BlockPool(count)
    others = pool.lease(count - blocks_needed, "others") if count > blocks_needed else ()
    mine = pool.lease(blocks_needed, "me")
    returned = draw(st.sets(st.sampled_from(others))) if others else set()
    pool.give_back(returned, "others")
    pool.give_back(mine, "me")
    return count, pool.lease(blocks_needed, "me")


@dataclasses.dataclass(frozen=True)
class Side:
    """Where the rows are at one end, and how large that pool is."""

    count: int
    extent: Extent


@dataclasses.dataclass(frozen=True)
class Transfer:
    block_size: int
    source: Side
    destination: Side
    start: int
    stop: int
    runs: list[tuple[int, int]]
    with_aux: bool
    left_out: tuple[Run, ...]

    def plan(self) -> list[Range]:
        here, there = self.source.extent, self.destination.extent
        window = Window(here.first_row, self.stop - here.first_row, here.blocks, stage=True)
        destination = ChunkDestination(
            "there", there.blocks, there.first_row, self.start, self.stop, self.with_aux, self.left_out
        )
        return plan_chunk(COLUMNS, self.block_size, window, destination, self.runs)


@st.composite
def left_outs(draw: st.DrawFn, start: int, stop: int) -> tuple[Run, ...]:
    """In order and disjoint; some are neighbours."""
    edges = sorted(draw(st.sets(st.integers(start, stop), max_size=8)))
    return tuple(run for run in itertools.pairwise(edges) if draw(st.booleans()))


def is_among(row: int, runs: Sequence[Run]) -> bool:
    return any(first <= row < last for first, last in runs)


@st.composite
def transfers(draw: st.DrawFn) -> Transfer:
    block_size = draw(st.integers(1, 7))
    start = draw(st.integers(0, 40))
    stop = start + draw(st.integers(1, 40))
    sides = []
    for _ in range(2):
        first_row = draw(st.integers(0, start))
        count, blocks = draw(leases(-(-(stop - first_row) // block_size) + draw(st.integers(0, 2))))
        sides.append(Side(count, Extent(blocks, first_row)))
    runs = draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), max_size=5))
    runs = [(min(run), max(run)) for run in runs]
    return Transfer(block_size, *sides, start, stop, runs, draw(st.booleans()), draw(left_outs(start, stop)))


def place(extent: Extent, block_size: int, row: int) -> int:
    index, offset = divmod(row - extent.first_row, block_size)
    return extent.blocks[index] * block_size + offset


def content(column: int, place_of_row: int, width: int) -> bytes:
    """Different for every row and every column, and never the value of untouched memory."""
    return bytes(1 + (column * 89 + place_of_row * 7 + byte * 3) % 255 for byte in range(width))


def expected(transfer: Transfer, column: int) -> bytes:
    """Row by row, in the simplest way."""
    source, destination, size = transfer.source.extent, transfer.destination.extent, transfer.block_size
    width = COLUMNS[column].bytes_per_row
    if COLUMNS[column].per_block:
        memory = [bytes(width)] * transfer.destination.count
        if transfer.with_aux:
            memory[destination.blocks[0]] = content(column, source.blocks[0], width)
        return b"".join(memory)
    memory = [bytes(width)] * (transfer.destination.count * size)
    for row in range(transfer.start, transfer.stop):
        is_media = is_among(row, transfer.runs) and not is_among(row, transfer.left_out)
        if is_media or not COLUMNS[column].media_only:
            memory[place(destination, size, row)] = content(column, place(source, size, row), width)
    return b"".join(memory)


@given(transfers())
@effort(400)
def test_every_byte_lands_exactly_once_and_nowhere_else(transfer: Transfer) -> None:
    ranges = transfer.plan()
    for index, column in enumerate(COLUMNS):
        rows_per_block = 1 if column.per_block else transfer.block_size
        width = column.bytes_per_row
        source = b"".join(content(index, at, width) for at in range(transfer.source.count * rows_per_block))
        memory = bytearray(transfer.destination.count * rows_per_block * width)
        for _, here, there, length in (r for r in ranges if r.column == index):
            assert length > 0
            assert 0 <= here <= here + length <= len(source)
            assert 0 <= there <= there + length <= len(memory)
            assert not any(memory[there : there + length]), "a byte is written twice"
            memory[there : there + length] = source[here : here + length]
        assert bytes(memory) == expected(transfer, index)


@given(transfers())
@effort(400)
def test_no_two_ranges_could_be_one(transfer: Transfer) -> None:
    for one, other in itertools.permutations(transfer.plan(), 2):
        follows = one.source + one.length == other.source and one.destination + one.length == other.destination
        assert not (one.column == other.column and follows)


@given(transfers(), st.integers(1, 200))
@effort(100)
def test_rows_outside_the_blocks_are_an_error_and_never_a_write(transfer: Transfer, beyond: int) -> None:
    size, blocks = transfer.block_size, transfer.destination.extent.blocks
    too_far = transfer.destination.extent.first_row + len(blocks) * size + beyond
    with pytest.raises(LocalError, match="is not in"):
        dataclasses.replace(transfer, stop=too_far).plan()
    before = dataclasses.replace(transfer.source, extent=Extent(transfer.source.extent.blocks, transfer.start + 1))
    with pytest.raises(LocalError, match="is not in"):
        dataclasses.replace(transfer, source=before).plan()


@given(st.lists(st.integers()), st.integers(1, 20))
@effort(100)
def test_batches_are_full_and_keep_the_order(entries: Sequence[int], limit: int) -> None:
    parts = list(batches(entries, limit))
    assert list(itertools.chain(*parts)) == entries
    assert all(len(part) == limit for part in parts[:-1])
    assert all(0 < len(part) <= limit for part in parts)


@effort(200)
@given(data=st.data(), block_size=st.integers(1, 9), bytes_per_row=st.integers(1, 4))
def test_media_rows_go_from_where_they_are_to_their_place(
    data: st.DataObject, block_size: int, bytes_per_row: int
) -> None:
    """Every byte of the media rows asked for once, in as few ranges as the two sides allow; but what is left out."""
    blocks = tuple(data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True)))
    offered = len(blocks) * block_size
    first = data.draw(st.integers(0, 20))
    start = data.draw(st.integers(first, first + offered - 1))
    stop = data.draw(st.integers(start + 1, first + offered))
    segments, row = list[Segment](), 0
    for gap, rows, is_joined in data.draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.booleans()), max_size=6)
    ):
        end = segments[-1].pointer + segments[-1].rows * bytes_per_row if segments else 1_000_000
        row += gap
        segments.append(Segment(end if is_joined else end + 7, row, rows))
        row += rows
    left_out = data.draw(left_outs(start, stop))
    destination = ChunkDestination("there", blocks, first, start, stop, with_aux=False, left_out=left_out)
    ranges = plan_media(5, bytes_per_row, block_size, segments, destination, start, stop)
    moved = [(r.source + at, r.destination + at) for r in ranges for at in range(r.length)]
    wanted = []
    for segment in segments:
        for number in range(max(start, segment.first_row), min(stop, segment.first_row + segment.rows)):
            if is_among(number, left_out):
                continue
            block, offset = divmod(number - first, block_size)
            source = segment.pointer + (number - segment.first_row) * bytes_per_row
            place = (blocks[block] * block_size + offset) * bytes_per_row
            wanted += [(source + at, place + at) for at in range(bytes_per_row)]
    assert moved == wanted
    assert {r.column for r in ranges} <= {5}
    for one, other in itertools.pairwise(ranges):
        assert (one.source + one.length, one.destination + one.length) != (other.source, other.destination)
