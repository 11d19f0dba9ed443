"""What it is worth that a picture is sent once: SGLang's own split and pairs of this plugin see pictures again.

    .venv/bin/python benchmark/reuse.py [--candidates split pair ...] [--reuse 0 0.3 0.7] [--requests 48] [--at-once 8]
                                        [--shrink 8] [--turns 1] [--add] [--quick] [--out FOLDER]

The requests are those of `trace.py`, so many at once, each sent when one before it was answered. `--reuse` is the share
of pictures that an earlier request has shown. Candidates of a turn get the same requests, one candidate after the
other. `split` has SGLang's caches on, that of its encoder too (`--enable-prefix-mm-cache`); `pair` has one encode
instance, `pair, 2 encode` two, `no row cache` is `pair` with SGLANG_EMBEDDING_ROW_CACHE_BYTES=0. Each is asked at its
language instance, which knows its encoders (`--encoder-urls`).

Then a picture as large as the mean of the trace is asked about for the first time, again, and text of its length, one
request at a time. Each prompt begins with words of its own, so that no prefix is in a radix cache. Encode instances are
asked in turn and the number of pictures is odd: with two instances, a picture comes again at the other one.

What went through the tower, and the bytes that moved, is what the instances' metrics say; SGLang's split does not count
bytes. The rows' part of the bytes is what is left without ids, positions and items, which are sent for each row.
`--add` adds to what the folder of an earlier run has.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import signal
import sys
import time
import trace
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import report
import ttft  # sets what must be set before torch is imported
import waterfall
import workload
from report import Figures, Table
from ttft import PAIR, SPLIT

from embedding_relay.memory.layout import BufferLayout
from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import picture
from embedding_relay.tools.local_cluster import LocalCluster, Options, sglang_server
from embedding_relay.tools.local_process import LocalProcess, free_ports
from support import servers, warm_start
from support.questions import FILLER, Question
from support.server_numbers import numbers_of

TWO_ENCODE, NO_CACHE = "pair, 2 encode", "no row cache"
SIDE: Final = 26
"""Of the picture that is asked about again, in tokens: about as many as the trace has in the mean."""
SETTLE_S: Final = 0.5
"""Metrics are brought up to date a quarter of a second after something happens."""
FIRST, AGAIN, TEXT = "first time", "again", "text"
KINDS: Final = (FIRST, AGAIN, TEXT)
GOALS: Final = {0.0: 1.0, 0.3: 1.4, 0.7: 2.0}
"""Requests per second beside those of the split, by the share of pictures that come again."""
MOST_COST: Final = 0.02
"""Of the requests per second, by keeping rows where no picture comes again."""


# ---- candidates


def split(options: Options) -> LocalCluster:
    cluster = ttft.sglangs_split(options)
    cluster["encoder"].command += ("--enable-prefix-mm-cache",)
    return cluster


def pair(options: Options, encode_instances: int = 1, **environ: str) -> LocalCluster:
    language_port, *ports = free_ports(1 + 2 * encode_instances)
    encode = []
    for number, (port, bootstrap_port) in enumerate(zip(ports[::2], ports[1::2], strict=True)):
        mode = ("--disaggregation-mode", "encode", "--disaggregation-bootstrap-port", str(bootstrap_port))
        encode.append(sglang_server(f"encode-{number}" if number else "encode", options, port, *mode))
    mode = ("--disaggregation-mode", "language", "--encoder-urls", *(one.url for one in encode))
    language = sglang_server("language", options, language_port, *mode, environ=environ)
    return LocalCluster(language.url, [[*encode, language]])


SERVERS: Final[Mapping[str, Callable[[Options], LocalCluster]]] = {
    SPLIT: split,
    PAIR: pair,
    TWO_ENCODE: functools.partial(pair, encode_instances=2),
    NO_CACHE: functools.partial(pair, SGLANG_EMBEDDING_ROW_CACHE_BYTES="0"),
}


# ---- what the instances count


def counts(cluster: LocalCluster, layout: BufferLayout) -> dict[str, float]:
    """Since their start: pictures encoded, requests by encode instance, bytes that moved and the rows' part of them."""
    language = numbers_of(cluster["language"])
    encoders = [one for one in cluster.members if one.name.startswith("encode")]
    found = {"encoded": 0.0, "bytes": language.get("bytes_total", 0.0)}
    small = [column for column in layout.columns if not column.media_only]
    each_row = sum(column.bytes_per_row for column in small if not column.per_block)
    each_request = sum(column.bytes_per_row for column in small if column.per_block)
    done = language.get("requests_total{200}", 0.0)
    found["row_bytes"] = found["bytes"] - each_row * language.get("rows_total", 0.0) - each_request * done
    for number, encoder in enumerate(encoders):
        encoded, found[f"asked {number}"] = counts_of(encoder)
        found["encoded"] += encoded
    return found


def counts_of(encoder: LocalProcess) -> tuple[float, float]:
    """Pictures that went through its tower, and requests."""
    numbers = numbers_of(encoder)
    if encoder.name == "encoder":  # SGLang's
        items = numbers.get("sglang:encoder_mm_items_per_request_sum", 0.0)
        hits = numbers.get("sglang:encoder_cache_hit_files_total", 0.0)
        return items - hits, numbers.get("sglang:encoder_mm_items_per_request_count", 0.0)
    return numbers.get("encoded_items_total", 0.0), numbers.get("requests_total{200}", 0.0)


class Watch:
    """What the servers counted, and the time they had, since it was made."""

    def __init__(self, cluster: LocalCluster, layout: BufferLayout) -> None:
        self._cluster, self._layout = cluster, layout
        time.sleep(SETTLE_S)
        self._counts, self._seconds = counts(cluster, layout), self._processor_s()
        self._machine, self._ours = ttft.machine_seconds(), time.process_time()

    def _processor_s(self) -> float:
        return sum(ttft.processor_seconds(self._cluster).values())

    def result(self) -> dict[str, float]:
        spent, ours = self._processor_s() - self._seconds, time.process_time() - self._ours
        worked, there = (now - then for now, then in zip(ttft.machine_seconds(), self._machine, strict=True))
        time.sleep(SETTLE_S)
        counted = {name: now - self._counts[name] for name, now in counts(self._cluster, self._layout).items()}
        return {**counted, "processor_s": spent, "others": max(0.0, (worked - ours - spent) / there)}


# ---- the trace, so many at once


def ask_level(url: str, drawn: Sequence[workload.Request], salt: int, at_once: int) -> dict[str, Any]:
    greedy = {"model": "default", "temperature": 0, "ignore_eos": True}
    asked = [{**greedy, "messages": trace.messages(one, salt), "max_tokens": one.output} for one in drawn]
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as clients:
        times = list(clients.map(functools.partial(ask, url), asked))
    seconds = time.perf_counter() - began
    first = [one for one in times if one is not None]
    shown = sum(len(request.pictures) for request in drawn)
    rate, failed = len(first) / seconds, len(times) - len(first)
    return {"requests_per_s": rate, "failed": failed, "first_ms": first, "shown": shown}


def ask(url: str, body: Mapping[str, Any]) -> float | None:
    """Milliseconds to the first token, once the whole answer is there; None if there is none."""
    try:
        began, came = waterfall.first_token(url, body)
    except (OSError, SystemExit):
        return None
    return (came - began) / 1e6


# ---- one picture again


def bodies(kind: str, pictures: int, salt: int) -> Iterator[dict[str, Any]]:
    """Of another kind the same pictures behind other words."""
    for number in range(pictures):
        dice = random.Random(f"{kind} {salt} {number}")
        front = " ".join(dice.choice(("ba", "de", "fi", "go", "lu")) for _ in range(16))
        side = SIDE * trace.PIXELS
        shown = FILLER.strip() * (SIDE * SIDE + 2) if kind == TEXT else picture(side, side, 1000 * salt + number)
        yield Question(kind, (front, shown, "what is this")).body(max_tokens=2, logprobs=False)


def ask_kind(url: str, kind: str, pictures: int, salt: int) -> list[float]:
    """Milliseconds to the first token of each."""
    times = (waterfall.first_token(url, body) for body in list(bodies(kind, pictures, salt)))
    return [(came - began) / 1e6 for began, came in times]


# ---- the run


def one_turn(arguments: argparse.Namespace, found: dict[str, Any], rotated: int) -> None:
    layout = layout_of(arguments.model)
    for name in report.from_turn(rotated, arguments.candidates):
        turn = 1 + max((one["turn"] for one in found["levels"] if one["candidate"] == name), default=0)
        whose = {"candidate": name, "turn": turn}
        options = servers.options(arguments.model, arguments.logs / f"{name}-{turn}", "--enable-metrics")
        with servers.running(SERVERS[name](options)) as cluster:
            drawn = requests(arguments, turn, 0.0)
            ask_level(cluster.url, drawn[: arguments.at_once], turn, arguments.at_once)  # connections, first passes
            for reuse, salt in zip(arguments.reuse, itertools.count(100 * turn), strict=False):
                watch = Watch(cluster, layout)
                asked = ask_level(cluster.url, requests(arguments, turn, reuse), salt, arguments.at_once)
                found["levels"].append({**whose, "reuse": reuse, **asked, **watch.result()})
            ask_kind(cluster.url, TEXT, 1, 100 * turn)
            for kind in KINDS:
                watch = Watch(cluster, layout)
                first_ms = ask_kind(cluster.url, kind, arguments.pictures, turn)
                found["kinds"].append({**whose, "kind": kind, "first_ms": first_ms, **watch.result()})
        servers.finish_stopping()


def requests(arguments: argparse.Namespace, turn: int, reuse: float) -> list[workload.Request]:
    drawn = workload.requests(arguments.requests, trace.SEED + turn, reuse, trace.MOST_PICTURES)
    return [trace.shrunk(request, arguments.shrink) for request in drawn]


def layout_of(model: Path) -> BufferLayout:
    config = json.loads((model / "config.json").read_text())
    return BufferLayout(config["text_config"]["hidden_size"], "bfloat16", 0, 128, 512)


# ---- what came of it

Runs = Sequence[Mapping[str, Any]]


def of(runs: Runs, **wanted: Any) -> Runs:
    return [one for one in runs if all(one[name] == value for name, value in wanted.items())]


def ratios(runs: Runs, name: str, to: str, measured: Callable[[Mapping[str, Any]], float]) -> str:
    """Of turns in which both were asked the same; empty if there is none."""
    others = {one["turn"]: measured(one) for one in of(runs, candidate=to)}
    mine = [measured(one) / others[one["turn"]] for one in of(runs, candidate=name) if one["turn"] in others]
    return str(Figures.of(mine)) if mine else ""


def show(found: Mapping[str, Any], at_once: int) -> None:
    levels = found["levels"]
    names = [name for name in SERVERS if of(levels, candidate=name)]
    every = sorted({one["reuse"] for one in levels})

    def table(title: str, cell: Callable[[Runs], object], *more: tuple[str, Callable[[Runs], object]]) -> None:
        shown = Table(title, "pictures again", *names, *(column for column, _ in more))
        for reuse in every:
            here = of(levels, reuse=reuse)
            cells = [cell(mine) if (mine := of(here, candidate=name)) else "" for name in names]
            shown.row(f"{100 * reuse:g} %", *cells, *(extra(here) for _, extra in more))

    def beside_split(name: str) -> tuple[str, Callable[[Runs], str]]:
        return f"{name} / split", lambda here: ratios(here, name, SPLIT, lambda one: one["requests_per_s"])

    ours = [beside_split(name) for name in names if name != SPLIT] if SPLIT in names else []
    table(
        f"Requests per second, {at_once} at once", lambda mine: Figures.of(one["requests_per_s"] for one in mine), *ours
    )
    table("Time to first token in ms", lambda mine: Figures.of(one for run in mine for one in run["first_ms"]))
    table("Processor time of the servers for one request in ms", lambda mine: Figures.of(map(processor_ms, mine)))
    table("Pictures through the tower, of those asked for", in_tower)
    table("MB of rows that moved, and of all bytes", moved)
    table("Requests that reached an encoder, of all", reached)
    table("Not answered", lambda mine: sum(one["failed"] for one in mine))
    table("Of the machine, what other work took meanwhile, in %", lambda mine: Figures.of(map(others, mine)))
    show_goals(levels, every)
    show_kinds(found["kinds"])


def processor_ms(run: Mapping[str, Any]) -> float:
    return float(1000 * run["processor_s"] / (len(run["first_ms"]) + run["failed"]))


def others(run: Mapping[str, Any]) -> float:
    return float(100 * run["others"])


def in_tower(mine: Runs) -> str:
    return f"{sum(one['encoded'] for one in mine):g} of {sum(one['shown'] for one in mine):g}"


def reached(mine: Runs) -> str:
    """SGLang's split also answers what its encoder has not seen, as while it takes a busy encoder for a dead one."""
    asked = sum(count for one in mine for name, count in one.items() if name.startswith("asked"))
    return f"{asked:g} of {sum(len(one['first_ms']) + one['failed'] for one in mine)}"


def moved(mine: Runs) -> str:
    rows, every = (sum(one[name] for one in mine) / 1e6 for name in ("row_bytes", "bytes"))
    return f"{rows:.2f} of {every:.2f}" if every else "not counted"


def show_goals(levels: Runs, every: Sequence[float]) -> None:
    """Only what can be said of the candidates that are there."""
    print()
    for reuse in every:
        ratio = ratios(of(levels, reuse=reuse), PAIR, SPLIT, lambda one: one["requests_per_s"])
        if ratio and reuse in GOALS:
            goal = f"goal {GOALS[reuse]:g}"
            print(f"With {100 * reuse:g} % again, a pair has {ratio} times the split's requests per second ({goal}).")
    alone = of(levels, reuse=0.0)
    for what, measured in (
        ("requests per second", lambda one: one["requests_per_s"]),
        ("processor time", processor_ms),
    ):
        if cost := ratios(alone, PAIR, NO_CACHE, measured):
            print(f"With 0 % again, the row cache makes the {what} {cost} times those without (goal {MOST_COST:.0%}).")


def show_kinds(kinds: Runs) -> None:
    columns = (
        "",
        *KINDS,
        "again / first time",
        "again / text",
        "towers",
        "bytes of rows",
        "bytes",
        "by encode instance",
    )
    table = Table(f"A picture of {SIDE * SIDE} rows, alone: time to first token in ms; and what `again` took", *columns)
    for name in dict.fromkeys(one["candidate"] for one in of(kinds, kind=KINDS[-1])):
        mine = {kind: of(kinds, candidate=name, kind=kind) for kind in KINDS}
        first = {kind: Figures.of(ms for one in mine[kind] for ms in one["first_ms"]) for kind in KINDS}
        again = mine[AGAIN]
        pictures = sum(len(one["first_ms"]) for one in again)
        counted = ("encoded", "row_bytes", "bytes", *(key for key in again[0] if key.startswith("asked")))
        total = {key: sum(one[key] for one in again) for key in counted}
        asked = " + ".join(f"{total[key]:g}" for key in counted[3:])
        sizes = [f"{total[key] / pictures:.0f}" if total["bytes"] else "not counted" for key in ("row_bytes", "bytes")]
        beside = [f"{first[AGAIN].median / first[other].median:.2f}" for other in (FIRST, TEXT)]
        table.row(name, *first.values(), *beside, f"{total['encoded']:g} of {pictures}", *sizes, asked)


def plot(levels: Runs, at_once: int) -> str:
    lines = {
        name: {
            100 * reuse: Figures.of(one["requests_per_s"] for one in of(mine, reuse=reuse))
            for reuse in sorted({one["reuse"] for one in mine})
        }
        for name in SERVERS
        if (mine := of(levels, candidate=name))
    }
    return report.plot(f"Requests per second, {at_once} at once", "% of pictures that come again", "per second", lines)


def main() -> None:
    arguments = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and stop the servers on the way out
    facts = report.machine()
    print(report.describe(facts))
    asked = {"requests": arguments.requests, "shrink": arguments.shrink, "at_once": arguments.at_once}
    found = earlier(arguments, asked)
    warm_start.fork_server()  # imports while this process does
    arguments.model = tiny_model.cached()
    with ttft.scratch_for_logs(arguments), report.interruptible(found["levels"]):
        for rotated in range(arguments.turns):
            one_turn(arguments, found, rotated)
    show(found, arguments.at_once)
    report.save(arguments.out, "reuse", facts, found | asked, plot(found["levels"], arguments.at_once))


def earlier(arguments: argparse.Namespace, asked: Mapping[str, int]) -> dict[str, Any]:
    if not arguments.add:
        return {"levels": [], "kinds": []}
    found: dict[str, Any] = report.load(arguments.out, "reuse")["results"]
    if different := [f"--{name.replace('_', '-')} {found[name]}" for name in asked if found[name] != asked[name]]:
        raise SystemExit(f"what is in {arguments.out} was measured with {' '.join(different)}")
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--reuse", type=float, nargs="+", default=sorted(GOALS))
    parser.add_argument("--requests", type=int, default=48, help="of each share in a turn")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--shrink", type=int, default=8, help="divides all numbers of tokens of the trace")
    parser.add_argument("--pictures", type=int, default=9, help="that are asked about again; an odd number")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--add", action="store_true", help="to what --out has already")
    report.add_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.candidates, arguments.reuse = [SPLIT, PAIR], [0.7]
        arguments.requests, arguments.pictures, arguments.turns = 12, 3, 1
    if arguments.pictures % 2 == 0:
        parser.error("--pictures must be odd: with two encode instances, a picture shall come again at the other one")
    return arguments


if __name__ == "__main__":
    main()
