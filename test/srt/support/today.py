"""What a day tests of many parameters of one claim: another part each day, so that all have had theirs within days.

`RELAY_EVERYTHING=1` has all of them. A claim that has only one test is tested every day.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import Final, TypeVar

T = TypeVar("T")

EVERYTHING: Final = bool(os.environ.get("RELAY_EVERYTHING"))


def todays(every: Sequence[T], count: int, day: datetime.date | None = None) -> list[T]:
    """So many of them, in turn. All machines have the same day."""
    if EVERYTHING:
        return list(every)
    first = (day or datetime.datetime.now(datetime.UTC).date()).toordinal() * count
    return [every[(first + number) % len(every)] for number in range(count)]
