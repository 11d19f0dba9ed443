"""Room numbers. A test has the same ones whenever it runs, because what is in a request follows from its number."""

from __future__ import annotations

import itertools
import zlib

_numbers = itertools.count(1)


def begin(test: str) -> None:
    """Numbers that no other test has, as far as chance allows."""
    global _numbers
    _numbers = itertools.count(zlib.crc32(test.encode()) << 16 | 1)


def next_room() -> int:
    return next(_numbers)
