"""Where the time of one transfer goes: from the language side's request to the last row, without a model.

    .venv/bin/python benchmark/steps.py [--mib 1 8] [--block 128] [--fragmented] [--plane mooncake] [--requests 60]
                                        [--quick] [--out FOLDER]

One request at a time, in one round, as in `transfer.py`. Both processes note when what happens, with the one clock of
this machine. `at` is the median time since the request, `since` the median time since what happened just before it,
wherever that was. What ends in the same thread in which the step before it ended is that thread's work; all else is
also the time that it took a thread to wake.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import report
import torch
import transfer

from embedding_relay.memory.engine import MooncakeDataPlane
from embedding_relay.memory.plane import Region
from embedding_relay.transport.encode import EncodeManager
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from embedding_relay.transport.workers import ChunkJob

ASKED: Final = "language scheduler: asks for the rows"
# Of what is called, whether its end counts or its beginning, and what that means.
POINTS: Final = (
    (MooncakeEmbeddingReceiver, "start", False, ASKED),
    (LanguageManager, "_request", False, "language control thread: has the request"),
    (LanguageManager, "_request", True, "language control thread: blocks are on offer"),
    (EncodeManager, "receive", False, "encode control thread: has the offer"),
    (EncodeManager, "receive", True, "encode control thread: has taken it"),
    (EncodeManager, "send_embedding", False, "encode scheduler: has heard of it"),
    (EncodeManager, "send_embedding", True, "encode scheduler: has looked at the rows"),
    (EncodeManager, "_submit", False, "encode control thread: has the rows"),
    (EncodeManager, "_submit", True, "encode control thread: has planned the chunk"),
    (ChunkJob, "write", False, "transfer thread: has the chunk"),
    (ChunkJob, "_stage", True, "transfer thread: has staged the small columns"),
    (ChunkJob, "write", True, "transfer thread: everything is written"),
    (EncodeManager, "_transferred", False, "encode control thread: hears of it"),
    (EncodeManager, "_transferred", True, "encode control thread: has reported it"),
    (LanguageManager, "_copy_out", False, "language control thread: has the report of the last rows"),
    (LanguageManager, "_flaw", False, "language control thread: has copied them"),
    (LanguageManager, "_flaw", True, "language control thread: has looked at the small columns"),
    (LanguageManager, "drain_events", True, "language scheduler: has heard of the end"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--fragmented", action="store_true", help="no free block has a free neighbour")
    parser.add_argument("--plane", default="mooncake", choices=["mooncake", "shared_memory"])
    parser.add_argument("--requests", type=int, default=60)
    report.add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = report.machine()
    print(report.describe(facts))
    results: list[dict[str, Any]] = []
    for mib in options.mib[:1] if options.quick else options.mib:
        point = transfer.Point(mib, 0, options.block, options.fragmented)
        results += show(options.plane, mib, measure(options.plane, point, 4 if options.quick else options.requests))
    report.save(options.out, "steps", facts, results)


def measure(plane: str, point: transfer.Point, requests: int) -> list[dict[str, float]]:
    """Of each request, when what happened last, in µs."""
    layout = transfer.layout_for(point.rows, point.block)
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder, "marks")
        target = functools.partial(encode_instance, marks)
        spans: list[tuple[int, int]] = []
        with transfer.encode_process(plane, layout, point.rows, "cpu", target) as pipe, Noting(marks):
            manager = transfer.open_language(plane, layout, point.rows, "cpu")
            memory = torch.zeros(1, dtype=torch.uint8)
            raw = MooncakeDataPlane(transfer.HOST, "tcp")
            raw.start([Region(memory.data_ptr(), memory.numel())])
            pipe.send(("raw", raw.session_id, memory.data_ptr()))
            peer = f"{transfer.HOST}:{pipe.recv()}"
            for room in range(1, requests + transfer.WARM_UP + 1):
                began = time.monotonic_ns()
                transfer.one_request(manager, pipe, peer, room, point, "cpu")
                spans.append((began, time.monotonic_ns()))
            manager.close()
            raw.close()
        noted = sorted(
            (int(at), name) for at, _, name in (line.partition(" ") for line in marks.read_text().splitlines())
        )
    return [of_one(noted, *span) for span in spans[transfer.WARM_UP :]]


def of_one(noted: Sequence[tuple[int, str]], began: int, ended: int) -> dict[str, float]:
    within = [(at, name) for at, name in noted if began <= at <= ended]
    start = next(at for at, name in within if name == ASKED)
    return {name: (at - start) / 1e3 for at, name in within if at >= start}


def show(plane: str, mib: int, every: Sequence[dict[str, float]]) -> Iterator[dict[str, Any]]:
    table = report.Table(f"{mib} MiB, {plane}; {len(every)} requests, µs", "at", "what", "since")
    figures = {name: report.Figures.of(one[name] for one in every if name in one) for *_, name in POINTS}
    ordered = sorted(figures.items(), key=lambda item: item[1].median)
    before = 0.0
    for name, at in ordered:
        table.row(f"{at.median:.0f}", name, f"{at.median - before:.0f}")
        before = at.median
        if name != ASKED:
            yield {"plane": plane, "mib": mib, "what": name, "at_us": at}


# ---- in both processes


def encode_instance(marks: Path, pipe: Connection, *arguments: Any) -> None:
    with Noting(marks):
        transfer.encode_instance(pipe, *arguments)


class Noting:
    """Within it, `POINTS` are noted in a file, to which other processes may write too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before: list[tuple[type, str, Any]] = []

    def __enter__(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        for (owner, method), points in itertools.groupby(POINTS, lambda point: point[:2]):
            names = {at_end: name for _, _, at_end, name in points}
            self._before.append((owner, method, getattr(owner, method)))
            setattr(owner, method, self._noted(getattr(owner, method), names))

    def _noted(self, function: Callable[..., Any], names: dict[bool, str]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noted(*arguments: Any, **options: Any) -> Any:
            self._note(names.get(False))
            result = function(*arguments, **options)
            self._note(names.get(True))
            return result

        return noted

    def _note(self, name: str | None) -> None:
        if name:
            os.write(self._file, f"{time.monotonic_ns()} {name}\n".encode())

    def __exit__(self, *_: object) -> None:
        for owner, method, function in self._before:
            setattr(owner, method, function)
        os.close(self._file)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
