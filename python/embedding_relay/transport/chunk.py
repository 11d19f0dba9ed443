"""One chunk on its way: staged once, written to each of its destinations by that destination's worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from embedding_relay.memory.buffers import EmbeddingBuffers, SourceRows
from embedding_relay.memory.plane import Entry, Link
from embedding_relay.protocol.effects import ChunkDestination, TransferEmbeddingChunk
from embedding_relay.protocol.plan import batches, plan_chunk

Finished = Callable[["ChunkJob"], None]


class ChunkJob:
    """Shared by the workers of its destinations; the last one to finish reports."""

    def __init__(
        self, chunk: TransferEmbeddingChunk, source: SourceRows, buffers: EmbeddingBuffers, finished: Finished
    ) -> None:
        self.chunk = chunk
        self.errors: dict[str, str] = {}
        self.bytes = 0
        self._source = source
        self._buffers = buffers
        self._finished = finished
        self._pending = len(chunk.destinations)
        self._staged = not chunk.window.stage
        self._staging = threading.Lock()
        self._counting = threading.Lock()

    @property
    def rows(self) -> int:
        """Written, to all destinations together."""
        return sum(one.stop_row - one.start_row for one in self.chunk.destinations if one.session_id not in self.errors)

    def write(self, destination: ChunkDestination, pointers: Sequence[int], link: Link) -> None:
        """Raise TransferError if some of it may be missing at the peer; may then be called again."""
        with self._staging:
            self._stage()
        layout = self._buffers.layout
        ranges = plan_chunk(layout.columns, layout.block_size, self.chunk.window, destination, self._source.media_runs)
        here = self._buffers.pointers
        for batch in batches(ranges):
            link.write([Entry(here[r.column] + r.source, pointers[r.column] + r.destination, r.length) for r in batch])
        with self._counting:
            self.bytes += sum(part.length for part in ranges)

    def done(self, session_id: str, problem: str) -> None:
        with self._counting:
            if problem:
                self.errors[session_id] = problem
            self._pending -= 1
            is_last = self._pending == 0
        if is_last:
            self._finished(self)

    def _stage(self) -> None:
        if self._staged:
            return
        if self._source.ready is not None:
            self._source.ready.synchronize()
        window = self.chunk.window
        self._buffers.stage(self._source, window.first_row, window.rows, window.blocks)
        self._staged = True
