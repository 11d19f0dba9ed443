"""The requests that benchmarks draw are like those of the published trace, and a late one is not counted as good."""

from __future__ import annotations

import importlib.util
import itertools
import random
import statistics
import sys
from typing import Any

import pytest

from support.repo import REPO


def load(name: str) -> Any:
    """A script of `benchmark/`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, REPO / "benchmark" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # named tuples look for their module
    spec.loader.exec_module(module)
    return module


workload = load("workload")
REQUESTS = workload.requests(20_000, seed=1)
PICTURES = [picture for request in REQUESTS for picture in request.pictures]


def quantiles(values: list[int], *shares: float) -> list[int]:
    ordered = sorted(values)
    return [ordered[int(share * len(ordered))] for share in shares]


@pytest.mark.parametrize(
    ("values", "mean", "known"),
    [
        ([len(request.pictures) for request in REQUESTS], 1.6, {0.5: 1, 0.85: 2, 0.9: 3, 0.99: 9}),
        ([picture.tokens for picture in PICTURES], 650, {0.25: 234, 0.5: 540, 0.75: 1196, 0.9: 1224, 0.99: 1271}),
        ([request.text for request in REQUESTS], 572, {0.5: 106, 0.75: 1032, 0.9: 1914, 0.99: 3064}),
        ([request.output for request in REQUESTS], 130, {0.5: 100, 0.9: 264, 0.99: 587}),
    ],
    ids=["pictures", "picture tokens", "text", "output"],
)
def test_what_is_drawn_has_the_published_figures(values: list[int], mean: float, known: dict[float, int]) -> None:
    assert statistics.fmean(values) == pytest.approx(mean, rel=0.06)
    assert quantiles(values, *known) == pytest.approx(list(known.values()), rel=0.12)


def test_a_sixth_of_the_pictures_have_the_most_frequent_size() -> None:
    sizes = [picture.tokens for picture in PICTURES]
    assert statistics.mode(sizes) == 1196
    assert sizes.count(1196) / len(sizes) == pytest.approx(0.155, abs=0.01)


def test_arrivals_begin_at_nothing_are_in_order_and_have_a_mean_gap_of_one() -> None:
    times = workload.arrivals(500, random.Random(3))
    assert times[0] == 0
    assert times == sorted(times)
    assert len(times) == 500
    assert 1 - 60 / 500 < times[-1] / 500 <= 1  # the gap after the last belongs to the mean too


def test_arrivals_come_in_bursts() -> None:
    gaps = [
        after - before
        for seed in range(20)
        for times in [workload.arrivals(500, random.Random(seed))]
        for before, after in itertools.pairwise(times)
    ]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) > 1.2  # those of a Poisson process have 1


def test_the_same_seed_gives_the_same_requests_and_another_one_others() -> None:
    assert workload.requests(50, seed=1) == workload.requests(50, seed=1)
    assert workload.requests(50, seed=1) != workload.requests(50, seed=2)


def test_without_reuse_no_picture_comes_twice() -> None:
    numbers = [picture.number for picture in PICTURES]
    assert len(set(numbers)) == len(numbers)


def test_with_reuse_so_many_pictures_have_been_shown_before() -> None:
    pictures = [picture for request in workload.requests(5000, seed=1, reuse=0.3) for picture in request.pictures]
    assert 1 - len({picture.number for picture in pictures}) / len(pictures) == pytest.approx(0.3, abs=0.02)
    assert len({picture.number for picture in pictures}) == len(set(pictures))  # one number, one size


def test_a_request_has_no_more_pictures_than_it_may() -> None:
    assert max(len(request.pictures) for request in workload.requests(2000, seed=1, most_pictures=9)) == 9


def test_a_request_that_is_late_or_failed_is_not_good() -> None:
    alone = [1.0, 1.0, 1.0, 0.1]
    assert workload.in_time([2.0, 2.001, None, 0.2], alone) == [True, False, False, True]


def test_goodput_is_the_share_in_time_of_what_arrived() -> None:
    assert workload.goodput([1.0, 5.0, None, 1.5], [1.0] * 4, rate=8.0) == 4.0
    assert workload.goodput([None, None], [1.0] * 2, rate=8.0) == 0.0
