"""Time to first token and requests per second: an undivided server, SGLang's own split, and a pair of this plugin.

    .venv/bin/python benchmark/ttft.py [--candidates split pair ...] [--sides 112 224] [--at-once 1 8] [--images 1 8]
                                       [--turns 2] [--rounds 4] [--add] [--quick] [--out FOLDER]

In each turn the servers of all candidates are started. A point is asked of one candidate after the other, for some
rounds, so that the machine is to all of them what it is at that time; the servers of the others stand still (SIGSTOP)
and cost nothing. On a card, whose memory may not be enough for all, each candidate is started and asked alone.
Pictures are new to every cache. `pair` is asked through SGLang's router; `no router` are the same two servers, of which
the language instance knows its encode instance (`--encoder-urls`) and is asked itself. Asked only if they are named:
`split, 1`, the split whose encoder takes one request at a time (SGLANG_ENCODER_MAX_BATCH_SIZE=1), so that its rows are
those of an undivided server; `as made`, a pair whose rows travel as they are made (SGLANG_EMBEDDING_PROGRESSIVE=1);
`prefix`, one whose language instance begins with them too (SGLANG_EMBEDDING_PREFIX_PREFILL=1). The client is
`sglang.bench_serving`. One thread of OpenMP in each process. The medians of a point are those of all its requests, its
rates those of the rounds, and a ratio the median of the ratios of each round. `--add` adds to what the folder of an
earlier run has: further turns, or other points. What other work takes of the machine is noted of each point: where that
is much, read no ratio that is near 1.
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

    def rounds(self, wanted: int) -> int:
        return wanted if self.side <= 300 else 1

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


ALL: Final = tuple(one for _, candidates in SERVERS.values() for one in candidates)


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
    """On a CPU all servers are there at once, and a point is asked of one candidate after the other, round by round."""
    names = report.from_turn(turn, [name for name in SERVERS if set(SERVERS[name][1]) & set(arguments.candidates)])
    # An accelerator may not have memory for all.
    for together in [names] if arguments.device == servers.CPU else [[name] for name in names]:
        with contextlib.ExitStack() as started:
            clusters = {name: started.enter_context(standing_still(turn, name, arguments)) for name in together}
            asked = [
                Asked(one, clusters[name], itertools.count(1000 * (len(ALL) * turn + ALL.index(one)) + 1))
                for name in together
                for one in SERVERS[name][1]
                if one in arguments.candidates
            ]
            ask_in_rounds(asked, arguments, measured)
            for name, cluster in clusters.items():
                with awake(cluster):
                    idle.setdefault(name, []).append(idle_share(cluster))
        servers.finish_stopping()


class Asked(NamedTuple):
    candidate: str
    cluster: LocalCluster
    seeds: Iterator[int]
    """Of pictures. Candidates may be the same servers, whose caches know what one of them was asked."""

    @property
    def url(self) -> str:
        return url_of(self.candidate, self.cluster)


def ask_in_rounds(asked: Sequence[Asked], arguments: argparse.Namespace, measured: Measured) -> None:
    model = arguments.model
    for one in asked:
        with awake(one.cluster):
            ask(one.url, model, Point(112, 1, 4), 8, next(one.seeds))  # connections, first passes of the models
    for point in points(arguments):
        requests, rounds = point.requests(arguments.quick), point.rounds(arguments.rounds)
        if before := point.before(arguments.quick):
            for one in asked:
                with awake(one.cluster):
                    ask(one.url, model, point, before, next(one.seeds))
        for number in range(rounds):
            for one in report.from_turn(number, asked):
                with awake(one.cluster):
                    ask(one.url, model, point, point.at_once, next(one.seeds))  # they have just stood still
                    run = ask_and_note(one.cluster, one.url, model, point, requests, next(one.seeds))
                measured.setdefault((one.candidate, point), []).append(run)


@contextlib.contextmanager
def standing_still(turn: int, name: str, arguments: argparse.Namespace) -> Iterator[LocalCluster]:
    """The servers of a candidate, ready and stopped; they go on before they are told to end."""
    options = servers.options(arguments.model, arguments.logs / f"{name}-{turn}", *arguments.argument)
    if arguments.device != servers.CPU:  # what servers are forked from has imported all of SGLang for a CPU
        options = dataclasses.replace(options, device=arguments.device, process=LocalProcess)
    with servers.running(SERVERS[name][0](options)) as cluster:
        signal_all(cluster, signal.SIGSTOP)
        try:
            yield cluster
        finally:
            signal_all(cluster, signal.SIGCONT)


@contextlib.contextmanager
def awake(cluster: LocalCluster) -> Iterator[None]:
    signal_all(cluster, signal.SIGCONT)
    try:
        yield
    finally:
        signal_all(cluster, signal.SIGSTOP)


def signal_all(cluster: LocalCluster, number: signal.Signals) -> None:
    for member in cluster.members:
        member.kill_group(number)


def time_to_first(runs: Sequence[Run]) -> Figures:
    return Figures.of(1000 * one for run in runs for one in run["ttfts"] if one)


def rate(runs: Sequence[Run]) -> Figures:
    return Figures.of(run["request_throughput"] for run in runs)


def spent(runs: Sequence[Run]) -> Figures:
    """Of all servers, in ms for each request; one that waits in a loop spends all the time there is."""
    return Figures.of(1000 * sum(run[SPENT].values()) / run["completed"] for run in runs)


def others(runs: Sequence[Run]) -> Figures:
    return Figures.of(100 * run[OTHERS] for run in runs)


def ratio(figures_of: Callable[[Sequence[Run]], Figures], ours: Sequence[Run], theirs: Sequence[Run]) -> Figures | str:
    """Of the runs of each round, between which the machine had little time to change."""
    if not ours or len(ours) != len(theirs):
        return ""  # an earlier run, to which this one was added, had other candidates
    return Figures.of(
        figures_of([one]).median / figures_of([other]).median for one, other in zip(ours, theirs, strict=True)
    )


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
            runs = {one: measured.get((one, point), []) for one in candidates}
            ratios = [ratio(figures_of, runs[one], runs[other]) for one, other in compared]
            table.row(point, *(figures_of(runs[one]) if runs[one] else "" for one in candidates), *ratios)


def plot(measured: Measured, candidates: Sequence[str], every: Sequence[Point], at_once: int) -> str:
    fewest = min(point.images for point in every)
    shown = [point for point in every if point.images == fewest and point.at_once == at_once]
    shown = [point for point in shown if point.side <= LARGE] or shown  # beside the largest, all others look alike
    lines = {
        one: {point.side: time_to_first(measured[one, point]) for point in shown if (one, point) in measured}
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
    results = {"points": [summary(*one, runs) for one, runs in measured.items()], "idle": idle}
    drawn = plot(measured, arguments.candidates, every, min(point.at_once for point in every))
    report.save(arguments.out, "ttft", facts, results, drawn)


def summary(candidate: str, point: Point, runs: Sequence[Run]) -> Mapping[str, Any]:
    return {
        "candidate": candidate,
        **point._asdict(),
        "first_token_ms": time_to_first(runs),
        "requests_per_s": rate(runs),
        "processor_ms": spent(runs),
        "others_percent": others(runs),
        "runs": [{name: run[name] for name in KEPT} for run in runs],
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
    parser.add_argument("--turns", type=int, default=2, help="in each the servers are started anew")
    parser.add_argument("--rounds", type=int, default=4, help="of each point in a turn; of large pictures one")
    parser.add_argument("--add", action="store_true", help="to what --out has already")
    parser.add_argument("--model", type=Path, help="a folder; otherwise the tiny one")
    parser.add_argument("--device", choices=(servers.CPU, "accelerator"), default=servers.CPU, help="of the servers")
    parser.add_argument("--argument", action="append", default=[], help="one more for each server; may be repeated")
    report.add_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.candidates, arguments.turns, arguments.rounds = [SPLIT, PAIR], 1, 1
        arguments.sides, arguments.at_once, arguments.images = [112], [1, 8], [1]
    arguments.model = arguments.model or tiny_model.cached()
    return arguments


if __name__ == "__main__":
    main()
