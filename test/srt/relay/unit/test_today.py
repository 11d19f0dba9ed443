"""What a day leaves out, another day has."""

from __future__ import annotations

import datetime

import pytest

from support import today

DAY = datetime.date(2026, 11, 26)


@pytest.mark.parametrize(("many", "count"), [(2, 1), (17, 2), (4, 4), (5, 3)])
def test_all_have_had_their_day_within_days(many: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(today, "EVERYTHING", False)
    days = [today.todays(range(many), count, DAY + datetime.timedelta(after)) for after in range(-(-many // count))]
    assert all(len(day) == count for day in days)
    assert set().union(*days) == set(range(many))


def test_everything_is_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(today, "EVERYTHING", True)
    assert today.todays("abc", 1, DAY) == ["a", "b", "c"]
