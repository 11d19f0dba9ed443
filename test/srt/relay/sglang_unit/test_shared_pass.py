"""A pass of the tower for several requests on a CPU: the bits of each are those that it has alone."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from sglang.srt.disaggregation.multimodal.masked_attention import MaskedAttention
from sglang.srt.disaggregation.multimodal.shared_pass import SharedPasses
from support import towers
from support.towers import Tower

MODE = "encode"
pytestmark = pytest.mark.usefixtures("mode")

SIDES = (2, 6, 8, 10, 16)
"""In patches. A plain pass has other bits from 6 on."""


@pytest.fixture(scope="module", params=towers.FAMILIES)
def made(request: pytest.FixtureRequest) -> Iterator[Tower]:
    with towers.tower(request.param) as made:
        yield made


@pytest.fixture
def tower(made: Tower) -> Tower:
    made.calls.clear()
    return made


@pytest.mark.parametrize("side", SIDES)
def test_equal_pictures(tower: Tower, side: int) -> None:
    requests = [[tower.picture(side, side)] for _ in range(4)]
    assert believed(tower, requests)


def test_pictures_of_all_sizes_and_several_in_a_request(tower: Tower) -> None:
    for _ in range(4):
        sides = torch.randint(1, 8, (5, 2)) * 2
        pictures = [tower.picture(*size) for size in sides.tolist()]
        assert believed(tower, [pictures[:1], pictures[1:4], pictures[4:]])


def believed(tower: Tower, requests: list[list[Any]]) -> bool:
    """Whether the pass had the bits of those alone, which is what it is compared with."""
    passes, attention = SharedPasses(), MaskedAttention()
    with attention:  # as `tower.py` has it
        rows = passes.encode(tower, requests)
    assert attention.is_equal
    assert torch.equal(rows, torch.cat([tower(items) for items in requests]))
    return passes.are_equal


def test_a_plain_pass_has_other_bits(made: Tower) -> None:
    """Or the tests above show nothing. The order of sums is that of the processor, so some size has to differ."""
    pictures = [[made.picture(side, side) for _ in range(4)] for side in SIDES]
    differ = [not torch.equal(made(four), torch.cat([made([one]) for one in four])) for four in pictures]
    assert any(differ)


def test_the_first_passes_are_compared_and_the_others_are_one_call(tower: Tower) -> None:
    passes, requests = SharedPasses(), [[tower.picture(4, 4)], [tower.picture(4, 6), tower.picture(2, 2)]]
    for _ in range(4):
        passes.encode(tower, requests)
    assert tower.calls == [3, 1, 2] * 4
    passes.encode(tower, requests)
    assert tower.calls[12:] == [3]


def test_a_tower_with_other_bits_takes_one_request_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    def mixes_requests(items: list[Any]) -> torch.Tensor:
        rows = torch.cat([item.feature for item in items])
        return rows - rows.mean()

    items = [SimpleNamespace(feature=torch.full((2, 3), value)) for value in (1.0, 5.0)]
    passes = SharedPasses()
    for _ in range(2):  # what the model gets is right from the first pass on
        assert torch.equal(passes.encode(mixes_requests, [[items[0]], [items[1]]]), torch.zeros(4, 3))
    assert not passes.are_equal
    assert "one request at a time from now on: with 2 together" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("is_bad_alone", [True, False])
def test_a_pass_that_fails_is_the_fault_of_a_request_or_the_last_one(
    is_bad_alone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def encode(items: list[Any]) -> torch.Tensor:
        if len(items) == 2 or (is_bad_alone and items[0].feature[0, 0] == 5.0):
            raise ValueError("not these")
        rows: torch.Tensor = items[0].feature
        return rows

    items = [SimpleNamespace(feature=torch.full((2, 3), value)) for value in (1.0, 5.0)]
    passes = SharedPasses()
    if is_bad_alone:
        with pytest.raises(ValueError, match="not these"):
            passes.encode(encode, [[items[0]], [items[1]]])
        assert passes.are_equal
    else:
        rows = passes.encode(encode, [[items[0]], [items[1]]])
        assert torch.equal(rows, torch.cat([item.feature for item in items]))
        assert not passes.are_equal
        assert "the pass failed (ValueError: not these)" in caplog.text


@pytest.mark.parametrize("hides", [True, False])
def test_attention_is_divided_only_if_its_mask_hides_the_requests_from_each_other(hides: bool) -> None:
    mask = torch.ones(1, 6, 6, dtype=torch.bool)
    if hides:
        mask[:, :2, 2:] = mask[:, 2:, :2] = False

    def attend(items: list[Any]) -> torch.Tensor:
        rows = torch.cat([item.feature for item in items])[None, None]
        own = mask if len(items) == 2 else torch.ones(1, *rows.shape[-2:-1] * 2, dtype=torch.bool)
        return functional.scaled_dot_product_attention(rows, rows, rows, attn_mask=own)[0, 0]

    passes = SharedPasses()
    passes.encode(attend, [[SimpleNamespace(feature=torch.randn(rows, 8))] for rows in (2, 4)])
    assert passes.are_equal == hides


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv3d", "scaled_dot_product_attention"])
def test_a_model_that_has_taken_a_function_from_elsewhere_takes_one_request_at_a_time(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if its bits were equal so far."""
    from_elsewhere, kept = getattr(functional, name), dict(vars(functional))
    shape = {"conv2d": (1, 1, 1, 8), "conv3d": (1, 1, 1, 1, 8)}.get(name, (1, 8))

    def encode(items: list[Any]) -> torch.Tensor:
        for item in items:
            rows = item.feature.reshape(-1, *shape[1:])
            more = [rows[:1]] * (2 if name.startswith("scaled") else 1)
            from_elsewhere(rows, *more)
            getattr(functional, name)(rows, *more)
        return torch.cat([item.feature for item in items])

    passes = SharedPasses()
    passes.encode(encode, [[SimpleNamespace(feature=torch.randn(rows, 8))] for rows in (2, 4)])
    assert not passes.are_equal
    assert f"it calls {name} in a way of its own" in caplog.text
    assert vars(functional) == kept
