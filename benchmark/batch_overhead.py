"""What the asking of a batch run costs beside a bare loop over aiohttp, against an endpoint that answers at once.

    .venv/bin/python benchmark/batch_overhead.py [--rows 20000] [--concurrency 32] [--rounds 3]

The endpoint is a process of its own, each measurement is one too, and the two kinds take turns. CPU time is that of the
asking process alone, from the first row to the last; memory is by how much its resident set grew at most meanwhile.
`run` builds each request, reads each answer and writes each result to a file; `bare` sends the same requests and
decodes the answers.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test/srt"))

from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.asking.question import chat_request
from embedding_relay.batch.asking.run import Run
from embedding_relay.batch.session.folder import ResultWriter
from embedding_relay.batch.session.records import Asking, Counts
from embedding_relay.batch.tasks import Task
from support.stub_endpoint import stub_endpoint

MIB = 2**20
NO_FOLDER = Path("/nonexistent")


class Cost(NamedTuple):
    rows_per_second: float
    cpu_microseconds: float  # per row
    grown: float  # bytes

    def __str__(self) -> str:
        return f"{self.rows_per_second:>8.0f} {self.cpu_microseconds:>10.0f} {self.grown / MIB:>8.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.rows} rows, {options.concurrency} at once")
    print(f"{'':<12} {'rows/s':>8} {'CPU us/row':>10} {'MiB more':>8}")
    costs: dict[str, list[Cost]] = {"bare": [], "run": []}
    with tempfile.TemporaryDirectory() as scratch, stub_endpoint(Path(scratch)) as stub:
        for kind in ("bare", "run") * options.rounds:
            costs[kind].append(measure(kind, stub.url, options.rows, options.concurrency))
            print(f"{kind:<12} {costs[kind][-1]}", flush=True)
        print(f"{'run, rows*5':<12} {measure('run', stub.url, 5 * options.rows, options.concurrency)}")
    speed = [run.rows_per_second / bare.rows_per_second for bare, run in zip(*costs.values(), strict=True)]
    cpu = [run.cpu_microseconds - bare.cpu_microseconds for bare, run in zip(*costs.values(), strict=True)]
    print(f"run / bare in rows/s: {statistics.median(speed):.2f}, median of {len(speed)} rounds")
    print(f"run - bare in CPU time: {statistics.median(cpu):.0f} us per row")


def measure(kind: str, url: str, rows: int, concurrency: int) -> Cost:
    """In a fresh process, so that no peak is another measurement's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(cost_of, kind, url, rows, concurrency).result()


def cost_of(kind: str, url: str, rows: int, concurrency: int) -> Cost:
    asking = {"bare": ask_barely, "run": ask_in_a_run}[kind]
    # What the imports needed for a moment must not hide what the rows need.
    Path("/proc/self/clear_refs").write_text("5")
    peak, cpu, started = peak_bytes(), time.process_time(), time.perf_counter()
    asyncio.run(asking(url, rows, concurrency))
    seconds = time.perf_counter() - started
    return Cost(rows / seconds, 1e6 * (time.process_time() - cpu) / rows, peak_bytes() - peak)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def tasks(rows: int) -> Iterator[Task]:
    return (Task(row, f"Translate line {row} of the catalogue into English.") for row in range(1, rows + 1))


async def ask_barely(url: str, rows: int, concurrency: int) -> None:
    asking = Asking()
    requests = (chat_request(task, asking, "stub", NO_FOLDER) for task in tasks(rows))

    async def ask_the_next_ones() -> None:
        for path, body in requests:
            async with http.post(url + path, data=msgspec.json.encode(body), headers=headers) as answer:
                msgspec.json.decode(await answer.read())

    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(ask_the_next_ones() for _ in range(concurrency)))


async def ask_in_a_run(url: str, rows: int, concurrency: int) -> None:
    asking = Asking()
    with tempfile.TemporaryDirectory() as scratch, ResultWriter(Path(scratch), 1) as writer:
        async with Endpoint(url) as endpoint:
            run = Run(
                tasks(rows),
                endpoint,
                lambda task: chat_request(task, asking, "stub", NO_FOLDER),
                writer.write,
                concurrency=concurrency,
                retries=0,
                total=rows,
                already=Counts(),
            )
            await run.run()
            assert run.counts.done == rows


if __name__ == "__main__":
    main()
