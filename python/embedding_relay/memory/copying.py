"""Large copies are divided among a few threads, where a machine has the cores for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from embedding_relay.cores import usable_cores

T = TypeVar("T")

# A quarter of the cores at most, because the model on a CPU and the data plane's own threads need the others; and
# memory is not read faster by more than a few.
_CORES_PER_THREAD: Final = 4
_MOST_THREADS: Final = 4
# In what lengths large copies are cut, and what is not worth a second thread.
PIECE_BYTES: Final = 1 << 20
_SMALL: Final = 4 << 20


class CopyThreads:
    """They are there from the first large copy on, until `close`. Any thread may use them."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or max(1, min(_MOST_THREADS, usable_cores() // _CORES_PER_THREAD))
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), thread_name_prefix="relay-copy")

    def run(self, copy: Callable[[Sequence[T]], None], pieces: Sequence[T], length: int) -> None:
        """Have `copy` called with groups of neighbours that together are all `pieces`, and wait until that is done.

        `length`: how many bytes they have.
        """
        if length < _SMALL or self._threads == 1:
            copy(pieces)
            return
        size = -(-len(pieces) // self._threads)
        first, *others = [pieces[start : start + size] for start in range(0, len(pieces), size)]
        running = [self._pool.submit(copy, group) for group in others]
        try:
            copy(first)
        finally:
            # Whatever has gone wrong, nobody copies any more when this returns.
            failures = [one.exception() for one in running]
        for failure in failures:
            if failure is not None:
                raise failure

    def close(self) -> None:
        self._pool.shutdown()
