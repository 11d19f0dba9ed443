"""Plans executed on bytes: every byte lands exactly once, where it belongs, and nowhere else; no fewer ranges would do."""

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from support.effort import effort

from sglang.srt.disaggregation.multimodal.blocks import BlockPool
from sglang.srt.disaggregation.multimodal.protocol.plan import Column, Extent, Range, batches, plan_writes

COLUMNS = (
    Column("embeddings", 3, media_only=True),
    Column("ids", 2),
    Column("aux", 5, per_block=True),
    Column("items", 1),
)
AUX = 2
UNTOUCHED = 0


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


@st.composite
def transfers(draw: st.DrawFn) -> dict[str, object]:
    block_size = draw(st.integers(1, 7))
    start = draw(st.integers(0, 40))
    stop = start + draw(st.integers(1, 40))
    sides = []
    for _ in range(2):
        first_row = draw(st.integers(0, start))
        count, blocks = draw(leases(-(-(stop - first_row) // block_size) + draw(st.integers(0, 2))))
        sides.append((count, Extent(blocks, first_row)))
    runs = draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), max_size=5))
    return {
        "block_size": block_size,
        "sides": sides,
        "start": start,
        "stop": stop,
        "runs": [(min(run), max(run)) for run in runs],
        "with_aux": draw(st.booleans()),
    }


def place(extent: Extent, block_size: int, row: int) -> int:
    index, offset = divmod(row - extent.first_row, block_size)
    return extent.blocks[index] * block_size + offset


def content(column: int, place_of_row: int, width: int) -> bytes:
    """Different for every row and every column, and never the value of untouched memory."""
    return bytes(1 + (column * 89 + place_of_row * 7 + byte * 3) % 255 for byte in range(width))


def expected(transfer: dict[str, object], column: int) -> bytes:
    """Row by row, without any cleverness."""
    (_, source), (count, destination) = transfer["sides"]  # type: ignore[misc]
    size, start, stop = transfer["block_size"], transfer["start"], transfer["stop"]
    width = COLUMNS[column].bytes_per_row
    if COLUMNS[column].per_block:
        memory = [bytes(width)] * count
        if transfer["with_aux"]:
            memory[destination.blocks[0]] = content(column, source.blocks[0], width)
        return b"".join(memory)
    memory = [bytes(width)] * (count * size)
    for row in range(start, stop):  # type: ignore[call-overload]
        is_media = any(first <= row < last for first, last in transfer["runs"])  # type: ignore[attr-defined]
        if is_media or not COLUMNS[column].media_only:
            memory[place(destination, size, row)] = content(column, place(source, size, row), width)  # type: ignore[arg-type]
    return b"".join(memory)


def plan_of(transfer: dict[str, object]) -> list[Range]:
    (_, source), (_, destination) = transfer["sides"]  # type: ignore[misc]
    return plan_writes(
        COLUMNS,
        transfer["block_size"],  # type: ignore[arg-type]
        source,
        destination,
        transfer["start"],  # type: ignore[arg-type]
        transfer["stop"],  # type: ignore[arg-type]
        transfer["runs"],  # type: ignore[arg-type]
        transfer["with_aux"],  # type: ignore[arg-type]
    )


@given(transfers())
@effort(1000)
def test_every_byte_lands_exactly_once_and_nowhere_else(transfer: dict[str, object]) -> None:
    (count, _), (destination_count, _) = transfer["sides"]  # type: ignore[misc]
    ranges = plan_of(transfer)
    for index, column in enumerate(COLUMNS):
        rows_per_block = 1 if column.per_block else transfer["block_size"]
        width = column.bytes_per_row
        source = b"".join(content(index, at, width) for at in range(count * rows_per_block))  # type: ignore[operator]
        memory = bytearray(destination_count * rows_per_block * width)  # type: ignore[operator]
        for _, here, there, length in (r for r in ranges if r.column == index):
            assert length > 0
            assert 0 <= here <= here + length <= len(source)
            assert 0 <= there <= there + length <= len(memory)
            assert not any(memory[there : there + length]), "a byte is written twice"
            memory[there : there + length] = source[here : here + length]
        assert bytes(memory) == expected(transfer, index)


@given(transfers())
@effort(1000)
def test_no_two_ranges_could_be_one(transfer: dict[str, object]) -> None:
    for one, other in itertools.permutations(plan_of(transfer), 2):
        follows = one.source + one.length == other.source and one.destination + one.length == other.destination
        assert not (one.column == other.column and follows)


@given(st.lists(st.integers()), st.integers(1, 20))
@effort(100)
def test_batches_are_full_and_keep_the_order(entries: Sequence[int], limit: int) -> None:
    parts = list(batches(entries, limit))
    assert list(itertools.chain(*parts)) == entries
    assert all(len(part) == limit for part in parts[:-1])
    assert all(0 < len(part) <= limit for part in parts)
