"""A burst of requests with many pictures on a host with little memory to spare, and small requests all the while.

    .venv/bin/python benchmark/burst.py [--requests 200] [--pictures 28] [--side 224] [--spare 8]
                                        [--candidates limited unlimited] [--quick] [--out FOLDER]

Real servers and the real router, a tiny model, on the CPU. All servers run in a control group of their own, which may
take `--spare` GiB more than they have when they are ready; what goes beyond that ends the run, as the kernel would end
a server. Where no control group can be made (that takes root), what the servers hold is added up instead, and the limit
is set by SGLANG_EMBEDDING_ADMISSION_MIB to what it would be with so much to spare; the head of the table says so.

`limited` has the default of SGLANG_EMBEDDING_ADMISSION_MIB, `unlimited` is 0. The requests of the burst come at once; a
small request with one picture follows every half second until the last of the burst has its answer. The router does
not try again what was refused, so that each refusal is counted. `--quick` has an instance of this process in place of
the servers: who is let in is decided by the same code, preparation and tower are a clock.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

os.environ["OMP_NUM_THREADS"] = "1"  # several processes share the machine; also those that servers are forked from
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import aiohttp
import report
from aiohttp import web
from PIL import Image
from report import Table

from embedding_relay.admission import Gate, Limits, Refused
from embedding_relay.config import ADMISSION, ADMISSION_TIMEOUT
from embedding_relay.media_costs import IMAGE, MediaCosts, sources
from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.chat_client import chat_body
from embedding_relay.tools.local_cluster import LocalCluster

GIB: Final = 2**30
MIB: Final = 2**20
UNLIMITED_BYTES: Final = 2**62
LIMITED, UNLIMITED = "limited", "unlimited"
SMALL_SIDE: Final = 112
BETWEEN_SMALL_S: Final = 0.5
LOOK_S: Final = 0.05
LONGEST_START_S: Final = 30.0
"""Of requests before those that count."""
SERVERS: Final = ("encode", "language")


class Outcome(NamedTuple):
    status: int
    """0 for one that has no answer."""
    seconds: float
    retry_after: str | None = None


class Host(Protocol):
    """Where the servers are: what they hold, and what they may."""

    url: str
    limit: int

    def held(self) -> int:
        """Bytes, now."""

    def is_well(self) -> bool:
        """All that was started is still there."""


# ---- memory


class ControlGroup:
    """Of version 2 or version 1. Whoever is started while `joined` belongs to it."""

    def __init__(self) -> None:
        root = Path("/sys/fs/cgroup")
        self._is_second = (root / "cgroup.controllers").exists()
        self._outside = root if self._is_second else root / "memory"
        self.path = self._outside / f"relay-burst-{os.getpid()}"
        self._limit, self._held = (
            ("memory.max", "memory.current") if self._is_second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )

    def make(self) -> bool:
        try:
            self.path.mkdir()
            self.held()
        except (OSError, ValueError):
            return False
        return True

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        home = self._home()
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (home / "cgroup.procs").write_text(str(os.getpid()))

    def _home(self) -> Path:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == ("" if self._is_second else "memory"):
                inside = self._outside / path.lstrip("/")
                return inside if inside.exists() else self._outside
        return self._outside

    def held(self) -> int:
        return int((self.path / self._held).read_text())

    def set_limit(self, limit: int) -> None:
        (self.path / self._limit).write_text(str(limit))

    def remove(self) -> None:
        for _ in range(100):
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)  # until its last process is gone


def held_by(cluster: LocalCluster) -> int:
    """What all processes of the servers hold, memory that several share counted once."""
    found = 0
    for pid in itertools.chain.from_iterable(cluster[name].group_members() for name in SERVERS):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            found += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found


class RealHost:
    """Servers that are ready; from now on they may take `spare` bytes more than they have."""

    def __init__(self, cluster: LocalCluster, group: ControlGroup | None, spare: int) -> None:
        self.url = cluster.url
        self._cluster = cluster
        self._group = group
        self.limit = self.held() + spare
        if group is not None:
            group.set_limit(self.limit)

    def held(self) -> int:
        return self._group.held() if self._group is not None else held_by(self._cluster)

    def is_well(self) -> bool:
        return all(member.returncode() is None for member in self._cluster.members)


@contextlib.contextmanager
def control_group() -> Iterator[ControlGroup | None]:
    """With a process in it that has imported SGLang, from which servers are forked. None if there can be no group."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "srt"))
    from support import servers, warm_start

    group = ControlGroup()
    is_made = group.make()
    with group.joined() if is_made else contextlib.nullcontext():
        warm = warm_start.fork_server()
    try:
        yield group if is_made else None
    finally:
        servers.finish_stopping()
        warm.stop()
        if is_made:
            group.remove()


@contextlib.contextmanager
def real_host(
    candidate: str, options: argparse.Namespace, folder: Path, group: ControlGroup | None
) -> Iterator[RealHost]:
    from support import servers

    halves: list[dict[str, str]] = [{ADMISSION: "0"}] * 2 if candidate == UNLIMITED else [{}] * 2
    if group is None and candidate == LIMITED:
        halves = [{ADMISSION: str(int(options.spare * GIB * part / MIB))} for part in (1 / 2, 1 / 4)]
    made = local_cluster.relay(
        servers.options(tiny_model.cached(), folder, **{ADMISSION_TIMEOUT: str(options.patience)}),
        encode_environ=halves[0],
        language_environ=halves[1],
        router_arguments=("--disable-retries", "--max-payload-size", str(GIB)),
    )
    with servers.running(made):
        host = RealHost(made, group, int(options.spare * GIB))
        try:
            yield host
        finally:
            pids = [pid for member in made.members for pid in member.group_members()]
            made.stop(grace=0)
            for pid in pids:  # pixels on their way to the scheduler, which SGLang removes when they have arrived
                for left in Path("/dev/shm").glob(f"sgl_shm_mm_{pid}_*"):
                    left.unlink(missing_ok=True)
            if group is not None:
                group.set_limit(UNLIMITED_BYTES)


# ---- in place of the servers


class StandIn:
    """One instance in this process: its memory is a number, and its tower a clock."""

    def __init__(self, candidate: str, spare: int) -> None:
        self.url = ""
        self.limit = spare
        self._held = 0
        self._costs = MediaCosts()
        limits = Limits(spare // 2 if candidate == LIMITED else 2**60, spare, 512, 0.5, ADMISSION)
        self._gate = Gate(limits)
        self._tower = asyncio.Lock()

    def held(self) -> int:
        return self._held

    def is_well(self) -> bool:
        return True

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        parts = body["messages"][0]["content"]
        media = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        guess = self._costs.guess(list(sources(media, IMAGE)))
        cost = 3 * guess.prepared + guess.beside
        try:
            async with self._gate.admitted(cost):
                self._held += cost
                async with self._tower:
                    await asyncio.sleep(0.01 * len(media))
                self._held -= cost
        except Refused as refused:
            headers = {"Retry-After": str(refused.retry_after)} if refused.retry_after else {}
            return web.Response(status=refused.failure.code, text=refused.failure.text, headers=headers)
        return web.Response(text="{}")


@contextlib.asynccontextmanager
async def stand_in(candidate: str, spare: int) -> AsyncIterator[StandIn]:
    host = StandIn(candidate, spare)
    app = web.Application(client_max_size=GIB)
    app.router.add_post("/v1/chat/completions", host.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host.url = site.name if not site.name.endswith(":0") else "http://{}:{}".format(*runner.addresses[0][:2])
    try:
        yield host
    finally:
        await runner.cleanup()


# ---- the client


def photo(side: int, seed: int) -> str:
    """Noise, of which a JPEG has as many bytes as it has of a photo."""
    small = Image.frombytes("RGB", (side // 4, side // 4), random.Random(seed).randbytes(3 * (side // 4) ** 2))
    held = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(held, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()


def question(side: int, seeds: Sequence[int]) -> bytes:
    images = [photo(side, seed) for seed in seeds]
    return json.dumps(chat_body(images, "what is this", max_tokens=2, logprobs=False)).encode()


async def ask(session: aiohttp.ClientSession, host: Host, body: bytes) -> Outcome:
    started = time.monotonic()
    try:
        url, headers = f"{host.url}/v1/chat/completions", {"Content-Type": "application/json"}
        async with session.post(url, data=body, headers=headers) as reply:
            await reply.read()
            return Outcome(reply.status, time.monotonic() - started, reply.headers.get("Retry-After"))
    except (aiohttp.ClientError, TimeoutError, ConnectionError):
        return Outcome(0, time.monotonic() - started)


class Run(NamedTuple):
    burst: list[Outcome]
    small: list[Outcome]
    peak: int
    """Bytes above what was held before."""
    seconds: float
    ended: str
    """Why before its time; "" if not."""


async def run(host: Host, options: argparse.Namespace) -> Run:
    """The burst at once, small requests beside it, and somebody who looks after the memory."""
    seeds = itertools.count()
    bodies = [question(options.side, list(itertools.islice(seeds, options.pictures))) for _ in range(options.requests)]
    timeout = aiohttp.ClientTimeout(total=options.seconds + LONGEST_START_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for _ in range(2):  # connections, first passes
            await ask(session, host, question(SMALL_SIDE, [next(seeds)]))
        before, started = host.held(), time.monotonic()
        burst = [asyncio.create_task(ask(session, host, body)) for body in bodies]
        small: list[asyncio.Task[Outcome]] = []
        looking, answered = asyncio.create_task(watch(host)), asyncio.create_task(asyncio.wait(burst))
        while not looking.done() and not answered.done():
            small.append(asyncio.create_task(ask(session, host, question(SMALL_SIDE, [next(seeds)]))))
            await asyncio.wait([looking, answered], timeout=BETWEEN_SMALL_S, return_when="FIRST_COMPLETED")
            if time.monotonic() - started > options.seconds:
                break
        late = "" if answered.done() else f"after {options.seconds:g} s"
        ended = looking.result()[1] if looking.done() else late
        if ended:
            for one in (*burst, *small):
                one.cancel()
        outcomes = await asyncio.gather(*burst, *small, return_exceptions=True)
        looking.cancel()
        peak = (await looking)[0]
        seconds = time.monotonic() - started
    kept = [one if isinstance(one, Outcome) else Outcome(0, seconds) for one in outcomes]
    return Run(kept[: len(burst)], kept[len(burst) :], max(peak, host.held()) - before, seconds, ended)


async def watch(host: Host) -> tuple[int, str]:
    """The most that was held, and why the run must end, if it must."""
    peak = 0
    try:
        while True:
            held = await asyncio.to_thread(host.held)
            peak = max(peak, held)
            if held >= host.limit * 0.99:
                return peak, "its memory was used up"
            if not host.is_well():
                return peak, "a server was killed"
            await asyncio.sleep(LOOK_S)
    except asyncio.CancelledError:
        return peak, ""


# ---- what came of it


def summary(candidate: str, one: Run) -> dict[str, Any]:
    statuses = Counter(outcome.status for outcome in one.burst)
    refused = [outcome for outcome in one.burst if outcome.status in (503, 400)]
    small = [outcome.seconds for outcome in one.small if outcome.status == 200]
    return {
        "candidate": candidate,
        "requests": len(one.burst),
        "answered": statuses[200],
        "refused": len(refused),
        "with_retry_after": sum(outcome.retry_after is not None for outcome in refused),
        "other": {str(status): number for status, number in statuses.items() if status not in (200, 503, 400)},
        "peak_mib": one.peak / MIB,
        "small": len(one.small),
        "small_answered": len(small),
        "small_median_s": report.Figures.of(small or [0.0]).median,
        "small_longest_s": max(small, default=0.0),
        "seconds": one.seconds,
        "ended": one.ended,
    }


def show(results: Sequence[dict[str, Any]], title: str) -> None:
    columns = "", "answered", "refused", "of them with Retry-After", "without an answer", "peak MiB", "seconds"
    table = Table(title, *columns, "small: answered", "median s", "longest s")
    for one in results:
        without = sum(one["other"].values())
        small = f"{one['small_answered']} of {one['small']}"
        name = one["candidate"] + (f" (ended: {one['ended']})" if one["ended"] else "")
        cells = name, one["answered"], one["refused"], one["with_retry_after"], without, f"{one['peak_mib']:,.0f}"
        table.row(
            *cells, f"{one['seconds']:.0f}", small, f"{one['small_median_s']:.2f}", f"{one['small_longest_s']:.2f}"
        )
        if one["other"]:
            print(f"<!-- {one['candidate']}: other statuses {one['other']} -->")


def measured(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    with control_group() as group:
        for candidate in options.candidates:
            with real_host(candidate, options, folder / candidate, group) as host:
                found = summary(candidate, asyncio.run(run(host, options)))
            print(f"{candidate}: {json.dumps(found)}", file=sys.stderr, flush=True)
            yield found


async def measured_quickly(candidate: str, options: argparse.Namespace) -> dict[str, Any]:
    async with stand_in(candidate, int(options.spare * GIB)) as host:
        return summary(candidate, await run(host, options))


def main() -> None:
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and stop the servers on the way out
    facts = report.machine()
    print(report.describe(facts))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out / "logs" if options.out is not None else Path(scratch)
        if options.quick:
            results = [asyncio.run(measured_quickly(candidate, options)) for candidate in options.candidates]
        else:
            results = list(measured(options, folder))
    title = f"{options.requests} requests with {options.pictures} pictures of {options.side}²"
    title += f", {options.spare:g} GiB to spare"
    show(results, title)
    report.save(options.out, "burst", facts, {"title": title, "summary": results})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", choices=(LIMITED, UNLIMITED), default=[LIMITED, UNLIMITED])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=28)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that a request waits for memory")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which whoever has no answer is given up")
    parser.add_argument("--spare", type=float, default=8.0, help="GiB that the servers may take")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.requests, options.pictures, options.side, options.spare = 12, 4, 56, 0.004
    return options


if __name__ == "__main__":
    main()
