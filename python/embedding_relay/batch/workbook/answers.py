"""What the answers look like in any kind of file: the names and order of their columns, matched row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from embedding_relay.batch.errors import NotWhatWasSaved
from embedding_relay.batch.tasks import Result
from embedding_relay.batch.workbook.analysis import Analysis
from embedding_relay.batch.workbook.limits import GIB, Limits
from embedding_relay.batch.workbook.naming import unique

NAMES: Final = ("answer", "status", "error", "prompt_tokens", "completion_tokens")
# What was uploaded has passed its limits; with the answers it may become larger than that.
OURS: Final = Limits(
    expanded_bytes=64 * GIB, members=10**9, rows=10**9, columns=10**9, cell_chars=2 * GIB, part_bytes=GIB
)


def values(result: Result) -> tuple[str, str, str, int, int]:
    """In the order of NAMES."""
    return result.answer, result.outcome.value, result.error, result.prompt_tokens, result.completion_tokens


def answer_names(analysis: Analysis) -> tuple[str, ...]:
    taken = [column.name for column in analysis.columns]
    return tuple(unique(name, taken) for name in NAMES)


class Ascending:
    """Results, taken in the order of the rows while the file is written or read."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results = iter(results)
        self._next = next(self._results, None)

    def before(self, row: int) -> Iterator[Result]:
        """Those of the rows up to, and without, `row`."""
        while self._next is not None and self._next.row < row:
            yield self._pop()

    def at(self, row: int) -> Result | None:
        return self._pop() if self._next is not None and self._next.row == row else None

    def rest(self) -> Iterator[Result]:
        while self._next is not None:
            yield self._pop()

    def expect_none(self) -> None:
        """Raise if a result is left whose row the file does not have: it was paid for and would be lost."""
        if self._next is not None:
            raise NotWhatWasSaved(f"there is an answer to row {self._next.row}, and no such row")

    def _pop(self) -> Result:
        result = self._next
        assert result is not None
        self._next = next(self._results, None)
        if self._next is not None and self._next.row <= result.row:
            raise ValueError(f"the result of row {self._next.row} comes after the one of row {result.row}")
        return result
