"""Time to first token and requests per second: an undivided server, SGLang's own split, and a pair of this plugin.

    .venv/bin/python benchmark/ttft.py [--candidates split pair ...] [--sides 112 224] [--at-once 1 8] [--images 1 8]
                                       [--turns 2] [--add] [--quick] [--out FOLDER]

In each turn the candidates are started one after the other and asked about the same pictures, which no cache knows;
what is idle beside them costs nothing, because nothing is there. `pair` is asked through SGLang's router, `no router`
are the same two servers, of which the language instance knows its encode instance (`--encoder-urls`) and is asked
itself: about other pictures, because its caches know the first. Asked only if they are named: `split, 1`, the split
whose encoder takes one request at a time (SGLANG_ENCODER_MAX_BATCH_SIZE=1), so that its rows are those of an undivided
server; `as made`, a pair whose rows travel as they are made (SGLANG_EMBEDDING_PROGRESSIVE=1); `prefix`, one whose
language instance begins with them too (SGLANG_EMBEDDING_PREFIX_PREFILL=1). The client is `sglang.bench_serving`. One
thread of OpenMP in each process. The medians of a point are those of all its requests in all turns, its rates those of
the turns. `--add` adds to what the folder of an earlier run has: further turns, or other points. What other work takes
of the machine is noted of each point: where that is much, read no ratio that is near 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # several processes share the machine; also those that servers are forked from
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "srt"))
warnings.simplefilter("ignore")

import report  # noqa: E402
from report import Figures, Table  # noqa: E402

from embedding_relay.config import PREFIX_PREFILL, PROGRESSIVE  # noqa: E402
from embedding_relay.tools import local_cluster, tiny_model  # noqa: E402
from embedding_relay.tools.local_cluster import LocalCluster, Options, sglang_server  # noqa: E402
from embedding_relay.tools.local_process import LocalProcess, free_ports  # noqa: E402
from support import servers, warm_start  # noqa: E402

UNDIVIDED, SPLIT, PAIR, NO_ROUTER = "undivided", "split", "pair", "no router"
SPLIT_BY_ONE: Final = "split, 1"
AS_MADE, PREFIX = "as made", "prefix"
LARGE: Final = 600
"""Above this side several at once are left out: the tower's mask, which is over a whole batch, would take gigabytes."""
IDLE_S: Final = 3.0
TOKENS: Final = 4
SPENT: Final = "processor_seconds"
OTHERS: Final = "others_share"
KEPT: Final = ("ttfts", "request_throughput", "completed", SPENT, OTHERS)
"""Of what `bench_serving` says of a run, and of what is noted beside it."""


class Point(NamedTuple):
    side: int
    images: int
    at_once: int

    def requests(self, quick: bool) -> int:
        if self.side > LARGE:
            return 3
        return max(3 if quick else 10, self.at_once * (2 if quick or self.side > 300 else 4))

    def before(self, quick: bool) -> int:
        """Requests that are not measured: what several of them make of a batch is compiled when it first occurs."""
        return 0 if quick or self.side > 300 else 12 * self.at_once

    def __str__(self) -> str:
        return f"{self.side}²{f' x {self.images}' if self.images > 1 else ''}, {self.at_once} at once"


Run = Mapping[str, Any]
Measured = dict[tuple[str, Point], list[Run]]


# ---- candidates


def undivided(options: Options) -> LocalCluster:
    return local_cluster.undivided(options)


def sglangs_split(options: Options) -> LocalCluster:
    encoder_port, language_port, bootstrap_port = free_ports(3)
    transfer = ("--encoder-transfer-backend", "zmq_to_scheduler")
    encoder = sglang_server("encoder", options, encoder_port, "--encoder-only", *transfer)
    where = ("--encoder-urls", encoder.url, "--encoder-bootstrap-port", str(bootstrap_port))
    language = sglang_server("language", options, language_port, "--language-only", *transfer, *where)
    # Asleep, its scheduler would not hear of embeddings that come, and look for them once a second.
    language.command = tuple(word for word in language.command if word != "--sleep-on-idle")
    return LocalCluster(language.url, [[encoder, language]])


def split_by_one(options: Options) -> LocalCluster:
    environ = {**options.environ, "SGLANG_ENCODER_MAX_BATCH_SIZE": "1"}
    return sglangs_split(dataclasses.replace(options, environ=environ))


def pair(options: Options) -> LocalCluster:
    encode_port, language_port, router_port, bootstrap_port = free_ports(4)
    bootstrap = ("--disaggregation-bootstrap-port", str(bootstrap_port))
    encode = sglang_server("encode", options, encode_port, "--disaggregation-mode", "encode", *bootstrap)
    knows = ("--encoder-urls", encode.url)
    language = sglang_server("language", options, language_port, "--disaggregation-mode", "language", *knows)
    front = local_cluster.router(options, router_port, [(encode.url, bootstrap_port)], [language.url])
    return LocalCluster(front.url, [[encode, language, front]])


def pair_as(progressive: bool, prefix_prefill: bool, options: Options) -> LocalCluster:
    """Whatever is the default."""
    settings = {PROGRESSIVE: str(int(progressive)), PREFIX_PREFILL: str(int(prefix_prefill))}
    return pair(dataclasses.replace(options, environ={**options.environ, **settings}))


SERVERS: Final[Mapping[str, tuple[Callable[[Options], LocalCluster], Sequence[str]]]] = {
    UNDIVIDED: (undivided, (UNDIVIDED,)),
    SPLIT: (sglangs_split, (SPLIT,)),
    SPLIT_BY_ONE: (split_by_one, (SPLIT_BY_ONE,)),
    PAIR: (functools.partial(pair_as, False, False), (PAIR, NO_ROUTER)),
    AS_MADE: (functools.partial(pair_as, True, False), (AS_MADE,)),
    PREFIX: (functools.partial(pair_as, True, True), (PREFIX,)),
}


def url_of(candidate: str, cluster: LocalCluster) -> str:
    return cluster["language"].url if candidate == NO_ROUTER else cluster.url


# ---- one measurement


def ask(url: str, model: Path, point: Point, requests: int, seed: int) -> Run:
    """What `bench_serving` writes down of one run."""
    from sglang.benchmark import serving

    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, "result.jsonl")
        arguments = {
            "backend": "sglang-oai-chat",
            "base-url": url,
            "model": model,
            "tokenizer": model,
            "dataset-name": "image",
            "image-resolution": f"{point.side}x{point.side}",
            "image-format": "png",
            "image-count": point.images,
            "random-input-len": 16,
            "random-output-len": TOKENS,
            "random-range-ratio": 1,
            "num-prompts": requests,
            "max-concurrency": point.at_once,
            "warmup-requests": 0,  # it would warm up with the first picture that is to be measured
            "seed": seed,
            "output-file": written,
        }
        command = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        told = ["bench_serving", *command, "--output-details", "--disable-tqdm"]
        with mock.patch.object(sys, "argv", told), silence():
            serving.cli_main()
        result: Mapping[str, Any] = json.loads(written.read_text())
    if any(result["errors"]):
        raise SystemExit(f"{url} failed: {next(filter(None, result['errors']))}")
    return result


@contextlib.contextmanager
def silence() -> Iterator[None]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield


def idle_share(cluster: LocalCluster) -> float:
    """Of one core, that servers take which nobody asks."""
    before = sum(processor_seconds(cluster).values())
    time.sleep(IDLE_S)
    return (sum(processor_seconds(cluster).values()) - before) / IDLE_S


def machine_seconds() -> tuple[float, float]:
    """Of all cores together, since the start of the machine: how long they worked, and how long they were there."""
    user, nice, system, idle, io_wait, *more = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    worked = user + nice + system + sum(more)
    ticks = os.sysconf("SC_CLK_TCK")
    return worked / ticks, (worked + idle + io_wait) / ticks


def ask_and_note(cluster: LocalCluster, url: str, model: Path, point: Point, requests: int, seed: int) -> Run:
    before, began, ours = processor_seconds(cluster), machine_seconds(), time.process_time()
    result = ask(url, model, point, requests, seed)
    taken = {name: after - before[name] for name, after in processor_seconds(cluster).items()}
    ours = time.process_time() - ours + sum(taken.values())
    worked, there = (after - earlier for after, earlier in zip(machine_seconds(), began, strict=True))
    return {**result, SPENT: taken, OTHERS: max(0.0, (worked - ours) / there)}


def processor_seconds(cluster: LocalCluster) -> dict[str, float]:
    """By member of the cluster: what its processes have had."""
    ticks = dict.fromkeys((member.name for member in cluster.members), 0)
    for member in cluster.members:
        for pid in member.group_members():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks[member.name] += int(fields[11]) + int(fields[12])
    return {name: count / os.sysconf("SC_CLK_TCK") for name, count in ticks.items()}


# ---- the run


def points(arguments: argparse.Namespace) -> list[Point]:
    every = itertools.product(arguments.sides, arguments.images, arguments.at_once)
    return [
        point
        for point in itertools.starmap(Point, every)
        # Several pictures in a request are measured at the smallest size.
        if (point.side <= LARGE or point.at_once == 1) and (point.images == 1 or point.side == min(arguments.sides))
    ]


def one_turn(turn: int, arguments: argparse.Namespace, measured: Measured, idle: dict[str, list[float]]) -> None:
    model = arguments.model or tiny_model.cached()
    names = [name for name in SERVERS if set(SERVERS[name][1]) & set(arguments.candidates)]
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        make, candidates = SERVERS[name]
        options = servers.options(model, arguments.logs / f"{name}-{turn}", *arguments.argument)
        if arguments.device != servers.CPU:  # what servers are forked from has imported all of SGLang for a CPU
            options = dataclasses.replace(options, device=arguments.device, process=LocalProcess)
        with servers.running(make(options)) as cluster:
            for number, candidate in enumerate(one for one in candidates if one in arguments.candidates):
                url = url_of(candidate, cluster)
                seeds = itertools.count(1000 * (2 * turn + number) + 1)
                ask(url, model, Point(112, 1, 4), 8, next(seeds))  # connections, first passes of the models
                for point in points(arguments):
                    if before := point.before(arguments.quick):
                        ask(url, model, point, before, next(seeds))
                    requests = point.requests(arguments.quick)
                    run = ask_and_note(cluster, url, model, point, requests, next(seeds))
                    measured.setdefault((candidate, point), []).append(run)
            idle.setdefault(name, []).append(idle_share(cluster))
        servers.finish_stopping()


def time_to_first(measured: Measured, candidate: str, point: Point) -> Figures:
    return Figures.of(1000 * one for result in measured[candidate, point] for one in result["ttfts"] if one)


def rate(measured: Measured, candidate: str, point: Point) -> Figures:
    return Figures.of(result["request_throughput"] for result in measured[candidate, point])


def spent(measured: Measured, candidate: str, point: Point) -> Figures:
    """Of all servers, in ms for each request; one that waits in a loop spends all the time there is."""
    every = measured[candidate, point]
    return Figures.of(1000 * sum(result[SPENT].values()) / result["completed"] for result in every)


def others(measured: Measured, candidate: str, point: Point) -> Figures:
    return Figures.of(100 * result[OTHERS] for result in measured[candidate, point])


def show(measured: Measured, candidates: Sequence[str], every: Sequence[Point]) -> None:
    for title, figures_of in (
        ("Time to first token in ms", time_to_first),
        ("Requests per second", rate),
        ("Processor time of the servers for one request in ms", spent),
        ("Of the machine, what other work took meanwhile, in %", others),
    ):
        is_ours = figures_of in (time_to_first, rate)
        compared = [
            (one, other)
            for other, ours in ((SPLIT, (PAIR, NO_ROUTER)), (SPLIT_BY_ONE, (PAIR,)), (PAIR, (AS_MADE, PREFIX)))
            for one in candidates
            if is_ours and other in candidates and one in ours
        ]
        table = Table(title, "pictures", *candidates, *(f"{one} / {other}" for one, other in compared))
        for point in every:
            # An earlier run, to which this one was added, may have had other candidates.
            figures = {one: figures_of(measured, one, point) for one in candidates if (one, point) in measured}
            ratios = [
                f"{figures[one].median / figures[other].median:.2f}" if {one, other} <= figures.keys() else ""
                for one, other in compared
            ]
            table.row(point, *(figures.get(one, "") for one in candidates), *ratios)


def plot(measured: Measured, candidates: Sequence[str], every: Sequence[Point], at_once: int) -> str:
    shown = [point for point in every if point.images == 1 and point.at_once == at_once and point.side <= LARGE]
    lines = {
        one: {point.side: time_to_first(measured, one, point) for point in shown if (one, point) in measured}
        for one in candidates
    }
    return report.plot(f"Time to first token, {at_once} at once", "side of a picture", "ms", lines)


def main() -> None:
    arguments = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and stop the servers on the way out
    facts = report.machine()
    print(report.describe(facts))
    measured, idle = earlier(arguments)
    first = max(map(len, idle.values()), default=0)
    if arguments.device == servers.CPU:
        warm_start.fork_server()  # imports while this process does
    with scratch_for_logs(arguments):
        for turn in range(first, first + arguments.turns):
            one_turn(turn, arguments, measured, idle)
    every = sorted({point for _, point in measured})
    show(measured, arguments.candidates, every)
    for name, shares in idle.items():
        print(
            f"\nThe servers of `{name}` take {100 * Figures.of(shares).median:.1f} % of a core while nobody asks them."
        )
    results = {"points": [summary(measured, *one) for one in measured], "idle": idle}
    drawn = plot(measured, arguments.candidates, every, min(point.at_once for point in every))
    report.save(arguments.out, "ttft", facts, results, drawn)


def summary(measured: Measured, candidate: str, point: Point) -> Mapping[str, Any]:
    return {
        "candidate": candidate,
        **point._asdict(),
        "first_token_ms": time_to_first(measured, candidate, point),
        "requests_per_s": rate(measured, candidate, point),
        "processor_ms": spent(measured, candidate, point),
        "others_percent": others(measured, candidate, point),
        "runs": [{name: run[name] for name in KEPT} for run in measured[candidate, point]],
    }


def earlier(arguments: argparse.Namespace) -> tuple[Measured, dict[str, list[float]]]:
    """What this run adds to."""
    if not arguments.add:
        return {}, {}
    found = report.load(arguments.out, "ttft")["results"]
    names = (*Point._fields, "candidate", "runs")
    read = [[one[name] for name in names] for one in found["points"]]
    return {(candidate, Point(*where)): runs for *where, candidate, runs in read}, found["idle"]


@contextlib.contextmanager
def scratch_for_logs(arguments: argparse.Namespace) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as scratch:
        arguments.logs = Path(scratch) if arguments.out is None else arguments.out / "logs"
        yield


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = (UNDIVIDED, SPLIT, PAIR, NO_ROUTER)
    parser.add_argument("--candidates", nargs="+", choices=(*usual, SPLIT_BY_ONE, AS_MADE, PREFIX), default=list(usual))
    parser.add_argument("--sides", type=int, nargs="+", default=[112, 224, 420, 1120])
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="to what --out has already")
    parser.add_argument("--model", type=Path, help="a folder; otherwise the tiny one")
    parser.add_argument("--device", choices=(servers.CPU, "accelerator"), default=servers.CPU, help="of the servers")
    parser.add_argument("--argument", action="append", default=[], help="one more for each server; may be repeated")
    report.add_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.candidates, arguments.turns = [SPLIT, PAIR], 1
        arguments.sides, arguments.at_once, arguments.images = [112], [1, 8], [1]
    return arguments


if __name__ == "__main__":
    main()
