"""Where the milliseconds of one request go: from the client through both halves of a pair to the first token.

    .venv/bin/python benchmark/waterfall.py [--sides 112 224] [--requests 40] [--router] [--quick] [--out FOLDER]

One request at a time; each has a picture that no cache knows. The servers note when what happens (`marks.py`), with the
one clock of this machine. `at` is the median time since the client began to send, `since` the median time since what
happened just before it at the same place. Two places work at the same time, so both together take more than the whole.
`fixed` is what the plugin costs a request beside its tower: from the moment at which both schedulers have parked their
half to the one at which the language scheduler has an ordinary request.
On a CPU a language instance sends the first token before the next forward pass begins, which SGLang's overlap schedule
would run before (`hooks.answer_first`).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import report
import ttft  # it sets the threads of OpenMP
from marks import VARIABLE
from report import Figures, Table

from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import chat_body, data_uri, picture
from embedding_relay.tools.local_cluster import LocalCluster
from support import servers, warm_start

PLACES: Final = ("encode", "language")
WARM_UP: Final = 5
Times = dict[tuple[str, str], float]
"""When things happened to one request, in ms since it was begun: by place and name, the first time each."""


def plugin(folder: Path, name: str = "marks") -> None:
    """Make a module beside this one a plugin that SGLang finds in what this process starts from now on."""
    module = f"relay_benchmark_{name}"
    shutil.copy(Path(__file__).with_name(f"{name}.py"), folder / f"{module}.py")
    facts = folder / f"{module}-0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: relay-benchmark-{name}\nVersion: 0\n")
    (facts / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {module}:install\n")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def first_token(url: str, body: Mapping[str, Any]) -> tuple[int, int]:
    """When the request was begun, and when the first token came, in ns. The rest of the answer is read, too."""
    where = urlsplit(url)
    content = json.dumps({**body, "stream": True}).encode()
    connection = http.client.HTTPConnection(where.hostname or "", where.port)
    began, came = time.monotonic_ns(), 0
    connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"{url} answered {answer.status}: {answer.read()!r}")
    for line in answer:
        if line.startswith(b"data: {") and not came:
            came = time.monotonic_ns()
    connection.close()
    return began, came


def requests(url: str, side: int, count: int, seeds: Iterator[int]) -> list[tuple[int, int]]:
    bodies = [
        chat_body([data_uri(picture(side, side, next(seeds)))], "What is this?", max_tokens=2) for _ in range(count)
    ]
    return [first_token(url, body) for body in bodies]


def times(marks: Mapping[str, Sequence[tuple[int, str]]], began: int, came: int) -> Times:
    found: Times = {}
    for place, noted in marks.items():
        for at, name in noted:
            if began <= at <= came:
                found.setdefault((place, name), (at - began) / 1e6)
    found["client", "first token"] = (came - began) / 1e6
    return found


def read_marks(folder: Path) -> dict[str, list[tuple[int, str]]]:
    marks = {}
    for place in PLACES:
        lines = (line.partition(" ") for line in (folder / place).read_text().splitlines())
        marks[place] = sorted((int(at), name) for at, _, name in lines)
    return marks


def show(side: int, every: Sequence[Times]) -> list[Mapping[str, Any]]:
    names = {name: Figures.of(one[name] for one in every if name in one) for one in every for name in one}
    table = Table(f"One picture of {side}², alone; {len(every)} requests, ms", "at", "where", "what", "since")
    before = dict.fromkeys(PLACES, 0.0)
    rows: list[Mapping[str, Any]] = []
    for (place, name), at in sorted(names.items(), key=lambda item: item[1].median):
        previous = 0.0 if place == "client" else before[place]
        table.row(f"{at.median:.1f}", place, name, f"{at.median - previous:.1f}")
        before[place] = at.median
        rows.append({"side": side, "where": place, "what": name, "at_ms": at})
    fixed = Figures.of(map(fixed_cost, every))
    print(f"\nfixed: {fixed} ms")
    return [*rows, {"side": side, "what": "fixed", "ms": fixed}]


def fixed_cost(one: Times) -> float:
    parked = max(one[place, "scheduler: parked"] for place in PLACES)
    tower = one["encode", "scheduler: tower ends"] - one["encode", "scheduler: tower begins"]
    return one["language", "scheduler: has the request"] - parked - tower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[112, 224, 420])
    parser.add_argument("--requests", type=int, default=40, help="of each size")
    parser.add_argument("--router", action="store_true", help="ask through the router")
    parser.add_argument("--argument", action="append", default=[], help="one more for each server; may be repeated")
    report.add_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sides, arguments.requests = [112], 8
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and stop the servers on the way out
    facts = report.machine()
    print(report.describe(facts))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plugin(folder)
        warm_start.fork_server()
        cluster = ttft.pair(servers.options(tiny_model.cached(), folder / "logs", *arguments.argument))
        for place in PLACES:
            cluster[place].environ[VARIABLE] = str(folder / place)
        with servers.running(cluster):
            measured = measure(cluster, arguments)
            marks = read_marks(folder)
        servers.finish_stopping()
    rows = [
        row for side, asked in measured.items() for row in show(side, [times(marks, *one) for one in asked[WARM_UP:]])
    ]
    report.save(arguments.out, "waterfall", facts, rows)


def measure(cluster: LocalCluster, arguments: argparse.Namespace) -> dict[int, list[tuple[int, int]]]:
    url = cluster.url if arguments.router else cluster["language"].url
    seeds = iter(range(1, 1_000_000))
    return {side: requests(url, side, WARM_UP + arguments.requests, seeds) for side in arguments.sides}


if __name__ == "__main__":
    main()
