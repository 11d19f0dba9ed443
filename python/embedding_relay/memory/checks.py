"""What received rows must be before a scheduler may have them, told in plain values of its model.

Nothing that arrives may raise in a scheduler or in its model: there it would end the instance, and not one request.
With numpy, which is as quick as torch here, and which unit tests and the fuzzer have without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from embedding_relay.memory.layout import Aux

NO_ITEM: Final = -1


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """What the model of a language rank can be given."""

    vocabulary: int
    """Token ids are below it."""
    modalities: frozenset[int]
    """Those that the model can embed, by their numbers in the media column."""
    positions: int | None = None
    """The length of the table that rotary positions of three axes are looked up in; None for a model without such."""
    narrow: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """The width of rows of a modality that has none of the tower's inner layers, where another modality has them."""


@dataclasses.dataclass(frozen=True)
class SmallColumns:
    """All that has arrived of a request but its embeddings."""

    aux: Aux
    fill_ids: NDArray[np.int32]
    mrope: NDArray[np.int32]
    items: NDArray[np.int32]

    def flaw(self, limits: ModelLimits) -> str | None:
        """The first thing that this model could not be given, as a part of a sentence; None if there is none."""
        return self._flaw_of_ids(limits) or self._flaw_of_items(limits) or self._flaw_of_positions(limits)

    def _flaw_of_ids(self, limits: ModelLimits) -> str | None:
        row = _first_outside(self.fill_ids, limits.vocabulary)
        if row is None:
            return None
        return f"row {row} has token id {self.fill_ids[row]}, and this model has ids from 0 to {limits.vocabulary - 1}"

    def _flaw_of_items(self, limits: ModelLimits) -> str | None:
        number = self.aux.media_items
        if not 1 <= number <= self.aux.total:
            return f"there are said to be {number} media items in {self.aux.total} rows"
        # A look at each run of equal rows is a look at all of them, and there are few.
        starts = _first_of_runs(self.items)
        index = self.items[starts, 0]
        if (bad := _first_outside(index - NO_ITEM, number - NO_ITEM)) is not None:
            return f"row {starts[bad]} belongs to media item {index[bad]}, and there are {number}"
        starts, index = starts[index != NO_ITEM], index[index != NO_ITEM]
        absent = np.flatnonzero(np.bincount(index, minlength=number) == 0)
        if absent.size:
            return f"media item {absent[0]} of {number} has no row"
        return self._flaw_of_descriptions(starts, index, limits)

    def _flaw_of_descriptions(
        self, starts: NDArray[np.int64], index: NDArray[np.int32], limits: ModelLimits
    ) -> str | None:
        """`starts` are the first rows of all runs of media rows, `index` says which item each belongs to."""
        _, first = np.unique(index, return_index=True)
        said, known = self.items[starts], self.items[starts[first]]
        differs = np.flatnonzero((said != known[index]).any(axis=1))
        if differs.size:
            one, other = starts[first[index[differs[0]]]], starts[differs[0]]
            return f"rows {one} and {other} describe media item {index[differs[0]]} differently"
        for item, modality in enumerate(known[:, 1].tolist()):
            if modality not in limits.modalities:
                allowed = ", ".join(map(str, sorted(limits.modalities)))
                return f"media item {item} has modality {modality}, and this model has only {allowed or 'none'}"
        return None

    def _flaw_of_positions(self, limits: ModelLimits) -> str | None:
        if limits.positions is None:
            return None  # this model asks for none, so nobody looks at them
        if not self.aux.has_mrope:
            return "they come without the positions that this model needs"
        row = _first_outside(self.mrope, limits.positions)
        if row is not None:
            return f"row {row} is at position {self.mrope[row].tolist()}, and this model has {limits.positions}"
        following = self.aux.total + self.aux.mrope_delta
        if not 0 <= following < limits.positions:
            return f"the first token after them would be at position {following}, and this model has {limits.positions}"
        return None


def _first_of_runs(items: NDArray[np.int32]) -> NDArray[np.int64]:
    """The rows that differ from the one before them, and row 0."""
    # Two comparisons of 64 bits instead of four and a search along each row, which is a hundred times slower.
    halves = np.ascontiguousarray(items).view(np.int64)
    changes = (halves[1:, 0] != halves[:-1, 0]) | (halves[1:, 1] != halves[:-1, 1])
    return np.flatnonzero(np.concatenate((np.ones(1, bool), changes)))


def _first_outside(values: NDArray[np.int32], end: int) -> int | None:
    """The first row with a value that is not in `[0, end)`."""
    # Two quick passes; who is to blame is looked for only when somebody is.
    if values.min() >= 0 and values.max() < end:
        return None
    bad = (values < 0) | (values >= end)
    return int(np.argmax(bad.reshape(len(values), -1).any(axis=1)))
