"""What the threads of several instances on one host do to each other: requests per second, in turns within one run.

    .venv/bin/python benchmark/threads.py [--side 224] [--at-once 8] [--requests 32] [--turns 3] [--undivided]

A pair of instances and a router for each way to wait and to divide, all running throughout (8 GB of memory each, so
name two or three with `--ways`); each turn asks them one after the other, with pictures that no cache knows. Ratios are
to the first line. The way 0 is what torch and its OpenMP do by themselves. `--undivided` asks one ordinary server per
way instead: what a rule for two costs who is alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.chat_client import ask, data_uri, picture
from embedding_relay.tools.local_cluster import LocalCluster, Options

CORES = len(os.sched_getaffinity(0))
# libgomp's own number of rounds; named, it counts as the operator's word, which the plugin leaves alone.
SPINS = {"GOMP_SPINCOUNT": "300000"}
SLEEPS = {"OMP_WAIT_POLICY": "PASSIVE"}


def threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count)}


WAYS = {
    "spin, all cores each": SPINS | threads(CORES),
    "sleep, all cores each": SLEEPS | threads(CORES),
    "spin, half of them each": SPINS | threads(max(1, CORES // 2)),
    "sleep, half of them each": SLEEPS | threads(max(1, CORES // 2)),
    "as the plugin decides": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=224, help="of a picture, in pixels")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32, help="per turn and way")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--undivided", action="store_true")
    known = ", ".join(f"{number}: {name}" for number, name in enumerate(WAYS))
    parser.add_argument("--ways", type=int, nargs="+", default=[0, 4], help=known)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and stop the servers on the way out
    names = [list(WAYS)[number] for number in arguments.ways]
    model = tiny_model.cached()
    seeds = itertools.count(1)
    rates: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        clusters = {}
        for number, name in enumerate(names):
            cluster = cluster_of(WAYS[name], Path(scratch, str(number)), model, arguments.undivided)
            clusters[name] = stack.enter_context(cluster)
            rate(cluster, arguments.side, arguments.at_once, arguments.at_once, seeds)  # warm
        for turn in range(arguments.turns):
            for name, cluster in clusters.items():
                rates[name].append(rate(cluster, arguments.side, arguments.at_once, arguments.requests, seeds))
                print(f"turn {turn + 1}, {name}: {rates[name][-1]:.2f}/s", flush=True)
    kind = "one undivided server" if arguments.undivided else "a pair and its router"
    print(f"{kind} on {CORES} cores, pictures of {arguments.side} x {arguments.side}, {arguments.at_once} at once")
    print(f"{'':<26} {'median/s':>9} {'lowest':>7} {'highest':>8} {'ratio':>6}")
    first = statistics.median(rates[names[0]])
    for name, seen in rates.items():
        median = statistics.median(seen)
        print(f"{name:<26} {median:>9.2f} {min(seen):>7.2f} {max(seen):>8.2f} {median / first:>6.2f}")


def cluster_of(environ: dict[str, str], logs: Path, model: Path, undivided: bool) -> LocalCluster:
    # On the CPU also where there is an accelerator: the rule is for instances that compute on cores.
    options = Options(model=model, logs=logs, device="cpu", environ=environ)
    return local_cluster.undivided(options) if undivided else local_cluster.relay(options)


def rate(cluster: LocalCluster, side: int, at_once: int, requests: int, seeds: itertools.count[int]) -> float:
    """Answers per second. The pictures are made before the clock starts."""
    uris = [data_uri(picture(side, side, seed=next(seeds))) for _ in range(requests)]

    def answered(uri: str) -> None:
        answer = ask(cluster.url, [uri], "What is this?")
        if not answer.ok:
            raise SystemExit(f"{cluster.url} answered {answer.status}: {answer.body}")

    with ThreadPoolExecutor(at_once) as clients:
        started = time.monotonic()
        list(clients.map(answered, uris))
        return requests / (time.monotonic() - started)


if __name__ == "__main__":
    main()
