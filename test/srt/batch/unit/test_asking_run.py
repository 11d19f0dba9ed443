"""The rate at which rows come to their end."""

from __future__ import annotations

import pytest

from embedding_relay.batch.asking.run import Pace


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
