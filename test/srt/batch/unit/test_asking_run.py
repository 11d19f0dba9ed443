"""The rate at which rows come to their end, and a row that becomes due at an awkward moment."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from embedding_relay.batch.asking import run
from embedding_relay.batch.asking.replies import Answered, Broken, Reply
from embedding_relay.batch.asking.run import Pace, Run
from embedding_relay.batch.session.records import Counts
from embedding_relay.batch.tasks import Result, Task


class FailsOnce:
    """An endpoint without a connection."""

    url = "http://nowhere"

    def __init__(self) -> None:
        self._replies = iter([Broken(500, "once"), Answered(200, {"choices": [{"message": {"content": "yes"}}]})])

    async def ask(self, path: str, body: bytes) -> Reply:
        return next(self._replies)


@pytest.mark.parametrize("after", [0.005, 0.015, 0.025, 0.035])
def test_a_row_that_becomes_due_while_the_run_looks_is_asked(after: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the time is asked for, it is a hundredth later; the row is due between two of these moments."""
    moments = itertools.count(1)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(moments) / 100))
    results: list[Result] = []
    endpoint: Any = FailsOnce()
    asked = Run(
        iter([Task(1, "a prompt")]),
        endpoint,
        lambda task: ("/", {}),
        results.append,
        concurrency=1,
        retries=2,
        total=1,
        already=Counts(),
        dice=lambda: after,
    )

    async def to_its_end() -> None:
        async with asyncio.timeout(20):
            await asked.run()

    asyncio.run(to_its_end())
    assert [result.row for result in results] == [1]


def test_the_rate_is_that_of_the_last_minute() -> None:
    pace = Pace(0.0)
    assert pace.rate(0.0) == 0.0
    for second in range(1, 101):
        pace.row_ended(float(second))
    assert pace.rate(100.0) == pytest.approx(1.0)
    for tenth in range(1000, 2000):
        pace.row_ended(tenth / 10)
    assert pace.rate(200.0) == pytest.approx(10.0, rel=0.05)


def test_slow_rows_have_a_rate_too() -> None:
    pace = Pace(0.0)
    for row in range(1, 21):
        pace.row_ended(row * 120.0 + 60 * (row % 2))
    assert pace.rate(20 * 120.0) == pytest.approx(1 / 120, rel=0.1)


def test_a_burst_does_not_make_the_rate() -> None:
    pace = Pace(0.0)
    for second in range(1, 51):
        pace.row_ended(float(second))
    for tenth in range(501, 551):
        pace.row_ended(tenth / 10)
    assert pace.rate(55.0) == pytest.approx(100 / 55, rel=0.05)


def test_a_rate_goes_down_when_nothing_comes() -> None:
    pace = Pace(0.0)
    for second in range(1, 61):
        pace.row_ended(float(second))
    assert pace.rate(120.0) < 0.6
