"""Host memory that is used again when nobody refers to it any more: a fresh page costs more than a copy into it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

_PIECE: Final = 1 << 20
"""Memory is taken in multiples of this; what is smaller the allocator of the process keeps warm by itself."""
_LINE: Final = 64
# A request is not given memory of which it would leave more than half unused.
_WASTE: Final = 2

_Bytes = NDArray[np.uint8]


class ReusedMemory:
    """Keeps at most `limit` bytes that are not in use. One thread takes; the last reference may go in any thread."""

    def __init__(self, limit: int, make: Callable[[int], _Bytes] | None = None, piece: int = _PIECE) -> None:
        """`make`: memory of another kind than this process's own, which small requests must have too."""
        self._limit = limit
        self._make = make
        self._piece = piece
        # Without a lock: a finalizer may run in the middle of anything, `take` included. A deque needs none.
        self._kept: deque[_Bytes] = deque()

    def take(self, length: int) -> torch.Tensor:
        """Bytes of any content. They come back when no tensor shares them any more."""
        if self._make is None and length < self._piece:
            return torch.empty(length, dtype=torch.uint8)
        memory = self._find(length)
        if memory is None:
            pieces = -(-length // self._piece) * self._piece
            memory = self._make(pieces) if self._make else _aligned(pieces)
        used = memory[:length]
        weakref.finalize(used, self._keep, memory).atexit = False
        return torch.from_numpy(used)

    def _find(self, length: int) -> _Bytes | None:
        """The smallest that will do."""
        fitting = [memory for memory in self._kept if length <= memory.nbytes <= _WASTE * length + self._piece]
        for memory in sorted(fitting, key=lambda one: one.nbytes):
            for _ in range(len(self._kept)):
                kept = self._kept.popleft()
                if kept is memory:
                    return memory
                self._kept.append(kept)
        return None

    def _keep(self, memory: _Bytes) -> None:
        if memory.nbytes > self._limit:
            return
        self._kept.append(memory)
        while self.kept > self._limit:
            self._kept.popleft()  # the longest unused

    @property
    def kept(self) -> int:
        """Bytes that nobody uses."""
        return sum(memory.nbytes for memory in list(self._kept))

    def clear(self) -> None:
        """What is in use is not kept either when it comes back."""
        self._limit = 0
        self._kept.clear()


def _aligned(length: int) -> _Bytes:
    """Where a line of the cache begins: else each part of a copy falls on two of them.

    By numpy, which asks for huge pages, and torch does not: the first touch takes up to five times as long without.
    """
    memory = np.empty(length + _LINE, dtype=np.uint8)
    begin = -memory.ctypes.data % _LINE
    return memory[begin : begin + length]
