"""Rows go into blocks and come out of blocks unchanged, wherever the blocks lie."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_relay.memory.buffers import EmbeddingBuffers
from embedding_relay.protocol.errors import LocalError
from support.loopback import small_layout
from support.rows import Spec, difference, make_rows


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    deepstack=st.integers(0, 2),
    block_size=st.sampled_from([1, 16, 128]),
    total=st.integers(1, 700),
    blocks_at_once=st.integers(1, 40),
    seed=st.integers(0, 1_000_000),
)
def test_stage_then_take_is_the_identity(
    dtype: str, deepstack: int, block_size: int, total: int, blocks_at_once: int, seed: int
) -> None:
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
        buffers.stage(source, row, rows, blocks)
        if target is None:
            target = buffers.make_target(buffers.read_aux(blocks[0]))
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


def test_untouched_blocks_take_no_memory() -> None:
    buffers = EmbeddingBuffers(small_layout(hidden_size=4096, blocks=4096))
    before = _resident()
    buffers.allocate()
    assert sum(region.length for region in buffers.regions) > 4 << 30
    assert _resident() - before < 64 << 20
    buffers.release()


def _resident() -> int:
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * 4096
