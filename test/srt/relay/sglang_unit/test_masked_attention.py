"""What replaces torch's attention in a tower on a CPU: its bits are torch's, and it is used where it can be."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sglang.srt.disaggregation.multimodal import masked_attention
from sglang.srt.disaggregation.multimodal.masked_attention import MaskedAttention
from support import towers
from support.repo import REPO

MODE = "encode"
pytestmark = pytest.mark.usefixtures("mode")

TORCHS_OWN = functional.scaled_dot_product_attention


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an instance on few cores, and far quicker beside other tests
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plain() -> Iterator[mock.Mock]:
    """Torch's own, which notes its calls. By its name the compiler of torch finds it."""
    noting = mock.Mock(side_effect=TORCHS_OWN, __name__=TORCHS_OWN.__name__)
    with mock.patch.object(functional, "scaled_dot_product_attention", noting):
        yield noting


@pytest.fixture
def attention(plain: mock.Mock) -> MaskedAttention:
    return MaskedAttention()


def as_sglang_has_them(rows: int, heads: int = 4, width: int = 32, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """Query, key and value, which are not contiguous."""
    one = torch.randn(rows, 3, heads, width).to(dtype)
    return [part.reshape(1, rows, heads, width).transpose(1, 2) for part in one.unbind(1)]


def hiding(lengths: list[int]) -> torch.Tensor:
    """The mask of sequences that do not see each other."""
    mask = torch.zeros(1, sum(lengths), sum(lengths), dtype=torch.bool)
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        mask[:, start:stop, start:stop] = True
    return mask


def attend(args: list[Any], mask: torch.Tensor | None, **more: Any) -> torch.Tensor:
    rows: torch.Tensor = functional.scaled_dot_product_attention(*args, attn_mask=mask, **more)
    return rows


SHAPES = st.fixed_dictionaries(
    {
        "lengths": st.one_of(
            st.lists(st.integers(1, 90).map(lambda merged: 4 * merged), min_size=1, max_size=5),
            st.integers(1, 9).map(lambda windows: [64] * windows),
        ),
        "heads_width": st.sampled_from([(1, 16), (4, 32), (16, 64), (16, 72), (16, 80), (5, 128)]),
        "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        "scale": st.sampled_from([None, 0.05, 1.0]),
        "at_once": st.sampled_from([1, 100_000, masked_attention._WEIGHTS_AT_ONCE]),
        "size": st.sampled_from([0.1, 1.0, 8.0]),
        "threads": st.sampled_from([1, 2]),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=120, deadline=None)
@given(shape=SHAPES)
def test_the_bits_are_torchs(shape: dict[str, Any]) -> None:
    torch.manual_seed(shape["seed"])
    torch.set_num_threads(shape["threads"])
    args = as_sglang_has_them(sum(shape["lengths"]), *shape["heads_width"], shape["dtype"])
    args = [shape["size"] * one for one in args]
    mask, scale = hiding(shape["lengths"]), shape["scale"]
    expected = TORCHS_OWN(*args, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=scale)
    made = MaskedAttention()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(masked_attention, "_WEIGHTS_AT_ONCE", shape["at_once"])
        got = made._computed(*args, made._look_at(mask).added, scale)
    torch.set_num_threads(1)
    assert got.dtype is expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", towers.FAMILIES)
def test_a_tower_has_the_same_rows_and_calls_torchs_own_once_for_each_kind(
    family: str, attention: MaskedAttention, plain: mock.Mock
) -> None:
    with towers.tower(family) as tower:
        for sizes in ([(8, 8)], [(16, 16)], [(4, 6), (12, 20), (2, 2)], [(26, 30)]):
            pictures = [tower.picture(*size) for size in sizes]
            before = plain.call_count
            expected = tower(pictures)
            layers = plain.call_count - before
            for most in (2, 0, 0):  # one over windows and one over pictures are compared, and then all believed
                before = plain.call_count
                with attention:
                    assert torch.equal(tower(pictures), expected)
                assert plain.call_count - before <= most < layers
    assert attention.is_equal


def test_torchs_function_is_back_when_a_pass_has_failed(attention: MaskedAttention, plain: mock.Mock) -> None:
    args, seen = as_sglang_has_them(24), []

    def fails() -> None:
        with attention:
            seen.append(functional.scaled_dot_product_attention)
            attend(args, hiding([8, 16]))
            raise ValueError("this picture")

    with pytest.raises(ValueError, match="this picture"):
        fails()
    assert seen != [plain]
    assert functional.scaled_dot_product_attention is plain
    assert not attention._masks
    assert not attention._weights.numel()


ROWS = 24
OTHERS: dict[str, dict[str, Any]] = {
    "no mask": {"mask": None},
    "a mask for each head": {"mask": hiding([8, 16]).expand(4, ROWS, ROWS)},
    "a mask of four dimensions": {"mask": hiding([8, 16])[None]},
    "a mask that is added": {"mask": torch.zeros(1, ROWS, ROWS, dtype=torch.bfloat16)},
    "a row that sees nothing": {"mask": hiding([8, 16]) & (torch.arange(ROWS) != 3)[:, None]},
    "fewer heads for keys": {"mask": hiding([8, 16]), "enable_gqa": True},
    "two sequences": {"mask": hiding([8, 16]), "twice": True},
    "float64": {"mask": hiding([8, 16]), "dtype": torch.float64},
}


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_else_is_left_to_torch(what: str, attention: MaskedAttention, plain: mock.Mock) -> None:
    more = dict(OTHERS[what])
    mask, twice = more.pop("mask"), more.pop("twice", False)
    args = as_sglang_has_them(ROWS, dtype=more.pop("dtype", torch.bfloat16))
    if more.get("enable_gqa"):
        args[1:] = [one[:, :2] for one in args[1:]]
    if twice:
        args = [torch.cat([one, one]) for one in args]
    expected = TORCHS_OWN(*args, attn_mask=mask, **more)
    with attention:
        got = [attend(args, mask, **more) for _ in range(2)]
    assert all(torch.equal(one, expected) for one in got)
    assert plain.call_count == 2


def test_other_bits_are_never_given_to_the_tower(
    attention: MaskedAttention, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    args, mask = as_sglang_has_them(ROWS), hiding([8, 16])
    expected = attend(args, mask)
    computed = attention._computed
    monkeypatch.setattr(attention, "_computed", lambda *given: torch.nextafter(computed(*given), torch.tensor(9.0)))
    with caplog.at_level(logging.WARNING), attention:
        got = [attend(args, mask) for _ in range(3)]
    assert all(torch.equal(one, expected) for one in got)
    assert [record.getMessage() for record in caplog.records] == [
        "the vision tower's attention is torch's own from now on, and slower: its replacement had other bits for"
        f" {ROWS} rows in 4 heads of 32"
    ]


def test_no_numbers_are_equal_to_no_numbers(attention: MaskedAttention) -> None:
    """Pixels that overflow are no reason to be slower for everybody else."""
    args = as_sglang_has_them(ROWS)
    args[0][0, 0, 0, 0] = math.inf
    with attention:
        got = attend(args, hiding([8, 16]))
    assert torch.isnan(got).any()
    assert attention.is_equal


def test_a_mask_is_looked_at_once_and_few_large_ones_are_kept(
    attention: MaskedAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_attention, "_WEIGHTS_AT_ONCE", 3 * ROWS**2)
    args, masks = as_sglang_has_them(ROWS), [hiding([8, 16]) for _ in range(5)]
    with attention:
        for mask in masks:
            attend(args, mask)
            attend(args, mask)
        kept = [known.given for known in attention._masks]
    assert len(kept) == 3
    assert all(one is other for one, other in zip(kept, masks[-3:], strict=True))


def test_the_benchmark_compares_both() -> None:
    command = [sys.executable, REPO / "benchmark" / "attention.py", "--quick", "--families", "qwen2_5_vl"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    rows = [line for line in ran.stdout.splitlines() if line.startswith(("| 112²", "| 224²"))]
    assert len(rows) == 2
    assert all(row.endswith("| yes |") for row in rows)
