"""Rows go into blocks and come out of blocks unchanged, wherever the blocks lie."""

import dataclasses
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_relay.memory import buffers as buffers_module
from embedding_relay.memory import layout as columns
from embedding_relay.memory.buffers import EmbeddingBuffers
from embedding_relay.memory.copying import CopyThreads
from embedding_relay.memory.row_cache import HeldRows
from embedding_relay.protocol.errors import LocalError
from support.loopback import small_layout
from support.rows import Spec, difference, items_of, make_rows, without


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    deepstack=st.integers(0, 2),
    block_size=st.sampled_from([1, 16, 128]),
    total=st.integers(1, 700),
    blocks_at_once=st.integers(1, 40),
    seed=st.integers(0, 1_000_000),
    apart=st.booleans(),
)
def test_stage_then_take_is_the_identity(
    dtype: str, deepstack: int, block_size: int, total: int, blocks_at_once: int, seed: int, apart: bool
) -> None:
    """`apart`: the small columns are in columns of their own. What is in those that are not used is somebody else's."""
    layout = small_layout(hidden_size=8, dtype=dtype, deepstack_rows=deepstack, block_size=block_size, blocks=40)
    buffers = EmbeddingBuffers(layout)
    buffers.allocate()
    source = make_rows(layout, Spec(room=1, total=total, seed=seed))
    source.check(layout)
    order = list(range(40))
    random.Random(seed).shuffle(order)
    target, row = None, 0
    while row < total:
        blocks = sorted(order[:blocks_at_once]) if seed % 2 else order[:blocks_at_once]
        rows = min(total - row, len(blocks) * block_size)
        buffers.stage(source, row, rows, blocks, apart=apart)
        for unused in (columns.RECORDS,) if apart else (columns.FILL_IDS, columns.MROPE, columns.ITEMS):
            buffers._small[unused][:] = 7
        if target is None:
            aux = buffers.read_aux(blocks[0])
            target = buffers.make_target(dataclasses.replace(aux, record_bytes=0) if apart else aux)
        buffers.copy_out(target, blocks, row, rows)
        row += rows
    assert target is not None
    assert difference(layout, source, target) is None


def test_what_an_earlier_request_left_in_a_block_does_not_come_out() -> None:
    layout = small_layout(blocks=1)
    buffers = EmbeddingBuffers(layout)
    buffers.allocate()
    full = make_rows(layout, Spec(room=1, total=128))
    buffers.stage(full, 0, 128, [0])
    empty = make_rows(layout, Spec(room=2, total=128))
    empty.segments, empty.items = [], torch.full_like(empty.items, -1)
    empty.check(layout)
    buffers.stage(empty, 0, 128, [0])
    target = buffers.make_target(buffers.read_aux(0))
    buffers.copy_out(target, [0], 0, 128)
    assert not target.embeddings.any()


def test_a_block_whose_aux_row_was_cleared_has_no_rows_until_somebody_writes() -> None:
    layout = small_layout(block_size=32, blocks=3)
    buffers = EmbeddingBuffers(layout)
    buffers.allocate()
    rows = make_rows(layout, Spec(room=1, total=64))
    buffers.stage(rows, 0, 64, [1, 2])
    buffers.clear_aux(1)
    assert buffers.read_aux(1).total == 0
    buffers.stage(rows, 0, 64, [1, 2])
    assert buffers.read_aux(1).total == 64


def test_a_planted_swap_is_seen_by_the_comparison() -> None:
    layout = small_layout(hidden_size=8)
    good = make_rows(layout, Spec(room=1, total=400))
    start = good.segments[-1][0]
    bad = make_rows(layout, Spec(room=1, total=400, swap=(start, start + 1)))
    assert torch.equal(good.fill_ids, bad.fill_ids)
    buffers = EmbeddingBuffers(layout)
    buffers.allocate()
    buffers.stage(bad, 0, 400, [0, 1, 2, 3])
    target = buffers.make_target(buffers.read_aux(0))
    buffers.copy_out(target, [0, 1, 2, 3], 0, 400)
    assert difference(layout, good, target) == f"embeddings: 2 rows differ, the first is {start}"


def test_rows_that_do_not_fit_are_refused() -> None:
    layout = small_layout()
    with pytest.raises(LocalError, match="do not fit"):
        make_rows(small_layout(hidden_size=32), Spec(room=1, total=10)).check(layout)
    with pytest.raises(LocalError, match="do not fit"):
        make_rows(small_layout(dtype="float16"), Spec(room=1, total=10)).check(layout)
    source = make_rows(layout, Spec(room=1, total=10))
    source.items[:, 0] = -1
    with pytest.raises(LocalError, match="item index"):
        source.check(layout)
    source = make_rows(layout, Spec(room=1, total=10))
    source.mrope = source.mrope.T
    with pytest.raises(LocalError, match="shapes"):
        source.check(layout)


def test_rows_of_which_there_is_not_one_or_that_are_no_table_are_refused() -> None:
    layout = small_layout(hidden_size=1)
    source = make_rows(layout, Spec(room=1, total=10))
    source.total, source.segments = 0, []
    source.fill_ids, source.mrope, source.items = source.fill_ids[:0], source.mrope[:0], source.items[:0]
    with pytest.raises(LocalError, match="shapes of 0 rows"):
        source.check(layout)
    source = make_rows(layout, Spec(room=1, total=10))
    source.segments = [(start, rows[:, 0]) for start, rows in source.segments]
    with pytest.raises(LocalError, match="do not fit"):
        source.check(layout)


def test_media_rows_that_are_neighbours_are_one_run() -> None:
    source = make_rows(small_layout(), Spec(room=1, total=20))
    source.segments = [(start, torch.empty(count, 64)) for start, count in ((1, 2), (3, 3), (6, 0), (8, 1), (9, 1))]
    assert source.media_runs == ((1, 6), (8, 10))
    assert source.media_runs is source.media_runs, "workers ask for each of their destinations"


@pytest.mark.parametrize(("deepstack", "wide"), [(0, 16), (2, 48)])
def test_how_many_bytes_had_to_travel(deepstack: int, wide: int) -> None:
    """Text rows have no embeddings; the aux row comes with the first rows only."""
    layout = small_layout(hidden_size=8, deepstack_rows=deepstack, block_size=16, blocks=2)
    buffers = EmbeddingBuffers(layout)
    buffers.allocate()
    source = make_rows(layout, Spec(room=1, total=20))
    is_media = source.items[:, 0] >= 0
    target = buffers.make_target(source.aux)
    for first, rows, aux in ((0, 12, 64), (12, 8, 0)):
        buffers.stage(source, first, rows, [1])
        media = int(is_media[first : first + rows].sum())
        assert buffers.copy_out(target, [1], first, rows) == rows * (4 + 12 + 16) + media * wide + aux


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(["bfloat16", "float32"]),
    deepstack=st.integers(0, 1),
    total=st.integers(1, 700),
    left_out=st.integers(0, 63),
    rows_at_once=st.integers(1, 700),
    seed=st.integers(0, 1_000_000),
)
def test_rows_that_are_held_come_from_elsewhere(
    dtype: str, deepstack: int, total: int, left_out: int, rows_at_once: int, seed: int
) -> None:
    """In any part of a request, cut anywhere; all that is copied from blocks has travelled, and nothing else."""
    layout = small_layout(hidden_size=8, dtype=dtype, deepstack_rows=deepstack, block_size=16, blocks=44)
    buffers = EmbeddingBuffers(layout)
    buffers.allocate()
    spec = Spec(room=1, total=total, seed=seed, salt=0)
    source = make_rows(layout, spec)
    absent = [number for number in range(len(source.segments)) if left_out >> number & 1]
    partial = without(source, items_of(source, spec), absent)
    partial.check(layout)

    def read(row: int, into: Any) -> None:
        [found] = [rows[row - at :] for at, rows in source.segments if at <= row < at + len(rows)]
        into[:] = found[: len(into)].view(torch.uint8).numpy()

    held = [HeldRows(at, at + len(source.segments[n][1]), read) for n in absent for at in [source.segments[n][0]]]
    is_sent = torch.zeros(total, dtype=torch.bool)
    for start, stop in partial.media_runs:
        is_sent[start:stop] = True
    target = buffers.make_target(source.aux)
    for row in range(0, total, rows_at_once):
        count = min(rows_at_once, total - row)
        buffers.stage(partial, row, count, range(44))
        media = int(is_sent[row : row + count].sum()) * buffers.row_bytes
        aux = 64 if row == 0 else 0
        assert buffers.copy_out(target, range(44), row, count, held=held) == count * (4 + 12 + 16) + media + aux
    assert difference(layout, source, target) is None


def test_rows_of_text_have_no_embeddings_whoever_says_that_he_has_them() -> None:
    layout = small_layout(hidden_size=8, block_size=16, blocks=1)
    buffers = EmbeddingBuffers(layout)
    buffers.allocate()
    source = make_rows(layout, Spec(room=1, total=16))
    source.segments, source.items = [], torch.full_like(source.items, -1)
    buffers.stage(source, 0, 16, [0])
    target = buffers.make_target(source.aux)
    buffers.copy_out(target, [0], 0, 16, held=[HeldRows(2, 9, lambda row, into: into.fill(7))])
    assert not target.embeddings.any()


def test_items_that_nobody_has_made_are_accounted_for() -> None:
    layout = small_layout()
    spec = Spec(room=1, total=700, salt=0)
    source = make_rows(layout, spec)
    items = items_of(source, spec)
    assert len(items) > 1
    without(source, items, [0]).check(layout)
    nothing = without(source, items, range(len(items)))
    nothing.check(layout)
    assert (nothing.media_runs, buffers_module.EmbeddingBuffers(layout).segments(nothing)) == ((), [])
    missing = without(source, items, [0])
    missing.absent = ()
    with pytest.raises(LocalError, match="absent items"):
        missing.check(layout)
    twice = without(source, items, [])
    twice.absent = ((0, items[0].runs),)
    with pytest.raises(LocalError, match="absent items"):
        twice.check(layout)


def test_rows_that_will_be_made_need_not_be_there_yet() -> None:
    layout = small_layout()
    source = make_rows(layout, Spec(room=1, total=700))
    second = source.segments[1][0]
    source.segments = source.segments[:1]
    with pytest.raises(LocalError, match="absent items"):
        source.check(layout)
    source.made = second
    source.check(layout)
    source.made = second + 1
    with pytest.raises(LocalError, match="absent items"):
        source.check(layout)


@pytest.mark.parametrize("has_mrope", [True, False])
def test_what_travels_once_arrives(has_mrope: bool) -> None:
    layout = small_layout(blocks=2)
    buffers = EmbeddingBuffers(layout)
    buffers.allocate()
    source = make_rows(layout, Spec(room=1, total=9))
    source.has_mrope, source.mrope_delta = has_mrope, -3
    buffers.stage(source, 0, 9, [1])
    aux = buffers.read_aux(1)
    assert aux == source.aux == buffers.make_target(aux).aux
    assert (aux.total, aux.mrope_delta, aux.has_mrope, aux.media_items) == (9, -3, has_mrope, source.media_items)
    assert (*buffers.pointers, buffers.records[0]) == tuple(region.pointer for region in buffers.regions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_which_embeddings_no_model_may_have(dtype: torch.dtype) -> None:
    """Wherever they are among others, and of either sign; it is found out from their bits."""
    largest = min(1e30, torch.finfo(dtype).max)
    fine = [0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).tiny, 0.99 * largest, -0.99 * largest]
    bad = [math.inf, -math.inf, math.nan, -math.nan]
    if dtype is not torch.float16:
        bad += [1.1e30, -1.1e30, torch.finfo(dtype).max, torch.finfo(dtype).min]
    for value, is_flaw in [*((one, False) for one in fine), *((one, True) for one in bad)]:
        rows = torch.randn(9, 33).to(dtype)
        rows[4, 7] = value
        target = SimpleNamespace(embeddings=rows, flaw=None)
        numbers = buffers_module._as_integers(rows)
        buffers_module._look_at(target, numbers, 0, 9)  # type: ignore[arg-type]
        assert (target.flaw is not None) is is_flaw, (value, target.flaw)
        assert buffers_module._are_small(numbers, dtype) is not is_flaw, "no second look at what is fine"


def test_untouched_blocks_take_no_memory() -> None:
    buffers = EmbeddingBuffers(small_layout(hidden_size=4096, blocks=4096))
    before = _resident()
    buffers.allocate()
    assert sum(region.length for region in buffers.regions) > 4 << 30
    assert _resident() - before < 64 << 20
    buffers.release()
    with pytest.raises(KeyError):
        buffers.read_aux(0)  # a view of it would keep the memory


def _resident() -> int:
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * 4096


# ---- memory that is used again


def test_memory_of_a_request_that_is_over_is_used_for_the_next() -> None:
    buffers = EmbeddingBuffers(small_layout(hidden_size=4096, blocks=4))
    buffers.allocate()
    aux = make_rows(small_layout(), Spec(room=1, total=400)).aux
    first = buffers.make_target(aux)
    pointer, view = first.embeddings.data_ptr(), first.embeddings[7:9]
    assert buffers.make_target(aux).embeddings.data_ptr() != pointer
    del first
    assert buffers.make_target(aux).embeddings.data_ptr() != pointer, "somebody still has a part of it"
    del view
    assert buffers.make_target(aux).embeddings.data_ptr() == pointer


@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_copied_in_pieces_is_looked_at_in_pieces(threads: int) -> None:
    layout = small_layout(hidden_size=8192, blocks=4)
    buffers = EmbeddingBuffers(layout)
    buffers._threads = CopyThreads(threads)
    buffers.allocate()
    source = make_rows(layout, Spec(room=1, total=512))
    source.segments[-1][1][-1, -1] = float("inf")
    buffers.stage(source, 0, 512, [0, 1, 2, 3])
    target = buffers.make_target(source.aux)
    buffers.copy_out(target, [0, 1, 2, 3], 0, 200)
    assert target.flaw is None
    buffers.copy_out(target, [0, 1, 2, 3], 0, 512, begin_row=200)
    assert target.flaw is not None
    assert target.flaw.endswith("to inf")
    assert difference(layout, source, target) is None
    buffers.release()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_is_seen_in_every_type(dtype: str, value: float) -> None:
    layout = small_layout(dtype=dtype, blocks=1)
    buffers = EmbeddingBuffers(layout)
    buffers.allocate()
    source = make_rows(layout, Spec(room=1, total=20))
    source.segments[0][1][0, 0] = value
    buffers.stage(source, 0, 20, [0])
    target = buffers.make_target(source.aux)
    buffers.copy_out(target, [0], 0, 20)
    assert target.flaw is not None
