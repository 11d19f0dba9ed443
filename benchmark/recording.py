"""What it costs to note the moments of requests for `sglang-relay trace`, and to read them again.

    .venv/bin/python benchmark/recording.py [--quick] [--out FOLDER]

The moments are those of one half of a request of one round, and of one of nine rounds, as `transport/` notes them; what
SGLang notes itself costs nothing until somebody asks. Next to the request stands the time of the whole transfer of a
megabyte in docs/performance.md, for comparison: `benchmark/steps.py` prints it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, Final

import report

from embedding_relay import recorder
from embedding_relay.config import RelayConfig
from embedding_relay.recorder import Recorder

ROUNDS: Final = (1, 9)


def note_one_half(held: Recorder, room: int, rounds: int) -> None:
    """As the language half does, which notes more than the other."""
    held.note(room, recorder.PARKED, 1.0)
    for number in range(rounds):
        held.note(room, recorder.OFFERED, first_row=128 * number, rows=128)
        held.note(room, recorder.COPY_BEGAN, 1.0, first_row=128 * number, rows=128)
        held.note(room, recorder.COPIED, first_row=128 * number, rows=128)
    held.note(room, recorder.COMPLETE, rows=128 * rounds, rounds=rounds, size=1 << 20)
    held.note(room, recorder.HANDED_OVER)
    held.follow(room, list)


def each_us(work: Callable[[int], object], times: int) -> Iterator[float]:
    """In microseconds of CPU time, by nine turns."""
    for _ in range(9):
        began = time.process_time()  # whoever else computes on this machine does not count
        for number in range(times):
            work(number)
        yield (time.process_time() - began) / times * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    report.add_options(parser)
    options = parser.parse_args()
    times = 200 if options.quick else 20_000
    facts = report.machine()
    print(report.describe(facts))
    results: list[dict[str, Any]] = []
    table = report.Table("Recording, µs of CPU time", "what", "on", "off")

    def measured(what: str, work: Callable[[Recorder, int], object], times: int) -> None:
        on, off = (
            report.Figures.of(each_us(functools.partial(work, Recorder(most)), times))
            for most in (RelayConfig.trace_events, 0)
        )
        table.row(what, on, off)
        results.append({"what": what, "on_us": on, "off_us": off})

    measured("one moment", lambda held, number: held.note(number, recorder.COPIED, first_row=1, rows=2), times)
    for rounds in ROUNDS:
        what = f"one half of a request of {rounds} round{'s' if rounds > 1 else ''}"
        measured(what, lambda held, number, rounds=rounds: note_one_half(held, number, rounds), times // 10)

    tracemalloc.start()
    full = Recorder(RelayConfig.trace_events)
    for room in range(RelayConfig.trace_events // 4):
        note_one_half(full, room, 1)
    mib = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    rooms = len({room for room, _ in full._copy()})
    read = statistics.median(each_us(full.moments, 3)) / 1000
    print(f"\nfull: {RelayConfig.trace_events} moments of {rooms} requests of one round, {mib:.1f} MiB; ", end="")
    print(f"to read one request of them takes {read:.1f} ms")
    report.save(options.out, "recording", facts, results)


if __name__ == "__main__":
    main()
