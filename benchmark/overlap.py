"""Time to first token where tower, wire and prefill work at the same time, beside their sum and the longest of them.

    sudo .venv/bin/python benchmark/overlap.py [--candidates neither progressive ...] [--cases wire tower ...]
                                               [--pictures 8] [--requests 3] [--turns 1] [--add] [--quick]
                                               [--out FOLDER]

A pair on two hosts: network namespaces of this machine, with a link whose rate is limited (`tc`), which needs root. The
device is simulated by waiting (`waits.py`): each call of the tower and each prefill takes a given time, far above what
the tiny model takes by itself. Rows are those of Qwen3-VL-8B in float32: 64 KiB with three inner layers. Requests come
one at a time, with pictures that no cache knows.

Candidates are the same pair with other settings: `neither` hands over rows when all are made, `progressive` those of
each picture when they are made (SGLANG_EMBEDDING_PROGRESSIVE), `with prefill` also prefills the prompt up to the last
picture that is there (SGLANG_EMBEDDING_PREFIX_PREFILL). A case says which of the stages is the longest. What each stage
takes is that of `neither`, where one follows the other: `longest` is what nothing can be faster than, and `at least`
adds to it one picture's part of the two other stages, which cannot begin before, or end after, that of a picture.
`--add` adds to what the folder of an earlier run has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import report
import waterfall  # it sets the threads of OpenMP
from report import Figures, Table
from waits import NOTES, PREFILL, PREFILL_MS, TOWER, TOWER_MS, VARIABLE, WAITS, WIRE

from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import chat_body, data_uri, picture
from embedding_relay.tools.local_cluster import LocalCluster, Options, sglang_server
from embedding_relay.tools.local_process import free_ports
from embedding_relay.tools.tiny_families import common, qwen
from support import servers, warm_start
from support.namespaces import Host, hosts

STAGES: Final = (TOWER, WIRE, PREFILL)
PATCH: Final = 16
SIDE: Final = 16 * PATCH
"""Of a picture in pixels: 256 tokens, one for each patch."""
FAMILY: Final = "wide"
BURST: Final = "512kb"
POOL: Final = {
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "32",  # blocks of 8 MiB: one request at a time needs no more
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "4096",
}

NEITHER, PROGRESSIVE, WITH_PREFILL = "neither", "progressive", "with prefill"
SETTINGS: Final = {
    name: {"SGLANG_EMBEDDING_PROGRESSIVE": rows, "SGLANG_EMBEDDING_PREFIX_PREFILL": prefix}
    for name, rows, prefix in ((NEITHER, "0", "0"), (PROGRESSIVE, "1", "0"), (WITH_PREFILL, "1", "1"))
}


class Case(NamedTuple):
    tower_ms: float
    """Of each picture."""
    prefill_ms: float
    """Of each thousand tokens."""
    rate: float
    """Of the link, in MB/s."""

    def __str__(self) -> str:
        return (
            f"tower {self.tower_ms:g} ms a picture, prefill {self.prefill_ms:g} ms per 1000 tokens, {self.rate:g} MB/s"
        )


CASES: Final = {
    WIRE: Case(100, 400, 50),
    TOWER: Case(400, 400, 500),
    PREFILL: Case(100, 1500, 500),
    "all alike": Case(340, 1300, 50),
}
"""By the stage that is the longest."""
WARM_UP: Final = Case(0, 0, 500)

Measured = dict[tuple[str, str, int], list[dict[str, float]]]
"""By candidate, case and number of pictures: what each request took in ms, by stage and until its first token."""
FIRST: Final = "first token"


# ---- two hosts


def check_hosts() -> None:
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"not measured: {' and '.join(missing)} of iproute2 limit the link between the two hosts")
    if os.geteuid() != 0:
        raise SystemExit("not measured: the two hosts are network namespaces, which need root")


def limit(host: Host, rate: float) -> None:
    """What leaves this host, in MB/s."""
    shaped = ("tbf", "rate", f"{8 * rate:g}mbit", "burst", BURST, "latency", "100ms")
    command = host.command(["tc", "qdisc", "replace", "dev", "eth0", "root", *shaped])
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        raise SystemExit(f"not measured: this kernel limits no link ({ended.stderr.strip()})")


def wide_model(folder: Path) -> Path:
    """Rows as wide as those of Qwen3-VL-8B, from a tower and for a language model that are small.

    In float32, which many processors multiply faster than bfloat16; and without merged patches, because on a CPU a pass
    over all pictures compares each patch with every other.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    size = common.Size(hidden=4096, layers=3, vision_hidden=64)

    def build(ids: common.Ids, vocabulary: int, _: common.Size) -> Any:
        narrow = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 32}
        text = common.text(ids, vocabulary, size, rope_parameters=common.mrope()) | narrow
        more = {"num_position_embeddings": 2304, "deepstack_visual_indexes": [1, 2, 3], "spatial_merge_size": 1}
        vision = common.qwen_vision(size, patch_size=PATCH, **more)
        places = {f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")}
        return Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config=text,
                vision_config=vision,
                vision_start_token_id=ids["<|vision_start|>"],
                vision_end_token_id=ids["<|vision_end|>"],
                tie_word_embeddings=False,
                dtype="bfloat16",
                **places,
            )
        )

    processor = qwen._qwen_processor("Qwen3VLProcessor", PATCH, "Qwen3VL", merge_size=1)
    tiny_model.FAMILIES[FAMILY] = dataclasses.replace(qwen.FAMILIES["qwen3_vl"], build=build, processor=processor)
    return tiny_model.make(folder / FAMILY, FAMILY)


def pair_on(encode_host: Host, language_host: Host, options: Options) -> LocalCluster:
    encode_port, language_port, bootstrap_port = free_ports(3)
    encode_url = f"http://{encode_host.address}:{encode_port}"
    modes = {
        "encode": (encode_host, encode_port, ("encode", "--disaggregation-bootstrap-port", str(bootstrap_port))),
        "language": (language_host, language_port, ("language", "--encoder-urls", encode_url)),
    }
    members = []
    for name, (host, port, mode) in modes.items():
        arguments = ("--disaggregation-mode", *mode, "--host", host.address)
        server = sglang_server(name, options, port, *arguments)
        server.command = tuple(host.command(server.command))
        server.url = f"http://{host.address}:{port}"
        members.append(server)
    return LocalCluster(members[-1].url, [members])


# ---- one measurement


def ask(url: str, folder: Path, pictures: int, seeds: Iterator[int]) -> dict[str, float]:
    body = chat_body(
        [data_uri(picture(SIDE, SIDE, next(seeds))) for _ in range(pictures)], "What is this?", max_tokens=2
    )
    began, came = waterfall.first_token(url, body)
    notes = map(json.loads, (folder / NOTES).read_text().splitlines())
    return stages_of(notes, began, came)


def stages_of(notes: Iterator[Mapping[str, Any]], began: int, came: int) -> dict[str, float]:
    """In ms; a stage that several calls make is as long as all of them together."""
    found = dict.fromkeys(STAGES, 0.0)
    for note in notes:
        if began <= note["began"] <= came:
            found[note["stage"]] += (note["ended"] - note["began"]) / 1e6
    return found | {FIRST: (came - began) / 1e6}


def one_turn(turn: int, arguments: argparse.Namespace, hosted: Sequence[Host], measured: Measured) -> None:
    for name in report.from_turn(turn, arguments.candidates):
        logs = arguments.logs / f"{name}-{turn}"
        environ = {**POOL, **SETTINGS[name], VARIABLE: str(arguments.folder)}
        cluster = pair_on(*hosted, servers.options(arguments.model, logs, "--dtype", "float32", **environ))
        seeds = itertools.count(1_000_000 * turn + 1)
        tell(arguments.folder, hosted[0], WARM_UP)
        with servers.running(cluster):
            for pictures in (1, max(arguments.pictures)):  # connections, first passes of the models
                ask(cluster.url, arguments.folder, pictures, seeds)
            for case, pictures in itertools.product(arguments.cases, arguments.pictures):
                tell(arguments.folder, hosted[0], CASES[case])
                taken = [ask(cluster.url, arguments.folder, pictures, seeds) for _ in range(arguments.requests)]
                measured.setdefault((name, case, pictures), []).extend(taken)
        servers.finish_stopping()


def tell(folder: Path, host: Host, case: Case) -> None:
    written = folder / f"{WAITS}.new"
    written.write_text(json.dumps({TOWER_MS: case.tower_ms, PREFILL_MS: case.prefill_ms}))
    written.replace(folder / WAITS)
    limit(host, case.rate)


# ---- what came of it


class Point(NamedTuple):
    """Of one case and number of pictures."""

    case: str
    pictures: int
    stages: Mapping[str, Figures]
    first: Mapping[str, Figures]
    """By candidate."""

    @property
    def sum(self) -> float:
        return sum(one.median for one in self.stages.values())

    @property
    def longest(self) -> float:
        return max(one.median for one in self.stages.values())

    @property
    def least(self) -> float:
        """Of what works picture by picture."""
        return self.longest + (self.sum - self.longest) / self.pictures

    def __str__(self) -> str:
        return f"{self.case}, {self.pictures}"


def points(measured: Measured) -> list[Point]:
    found = []
    for case, pictures in dict.fromkeys((case, pictures) for _, case, pictures in measured):
        asked = {name: measured[name, case, pictures] for name in SETTINGS if (name, case, pictures) in measured}
        alone = asked.get(NEITHER) or next(iter(asked.values()))
        stages = {stage: Figures.of(one[stage] for one in alone) for stage in STAGES}
        first = {name: Figures.of(one[FIRST] for one in every) for name, every in asked.items()}
        found.append(Point(case, pictures, stages, first))
    return found


def show(every: Sequence[Point]) -> None:
    for case in dict.fromkeys(point.case for point in every):
        print(f"\n{case}: {CASES[case]}")
    table = Table("Each stage by itself, in ms", "longest, pictures", *STAGES, "sum", "longest")
    for point in every:
        stages = (point.stages[stage] for stage in STAGES)
        table.row(point, *stages, f"{point.sum:.0f}", f"{point.longest:.0f}")
    names = [name for name in SETTINGS if any(name in point.first for point in every)]
    table = Table("Time to first token in ms", "longest, pictures", *names)
    for point in every:
        table.row(point, *(point.first.get(name, "") for name in names))
    for title, against in (("sum of the stages", "sum"), ("longest stage", "longest")):
        table = Table(f"Time to first token, of the {title}", "longest, pictures", *names, "at least")
        for point in every:
            whole = getattr(point, against)
            ratios = (f"{point.first[name].median / whole:.2f}" if name in point.first else "" for name in names)
            table.row(point, *ratios, f"{point.least / whole:.2f}")


def plot(every: Sequence[Point]) -> str:
    groups = {
        str(point): {
            "sum of the stages": Figures.of([point.sum]),
            **point.first,
            "longest stage": Figures.of([point.longest]),
        }
        for point in every
    }
    title = "Time to first token; tower and prefill are simulated by waiting"
    return report.bars(title, "longest stage, number of pictures", "ms", groups)


def main() -> None:
    arguments = parsed()
    check_hosts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and stop the servers on the way out
    facts = report.machine()
    print(report.describe(facts))
    measured = earlier(arguments)
    first = max((len(every) // arguments.requests for every in measured.values()), default=0)
    with contextlib.ExitStack() as undo:
        arguments.folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        arguments.logs = arguments.folder if arguments.out is None else arguments.out / "logs"
        arguments.model = wide_model(arguments.folder)
        waterfall.plugin(arguments.folder, "waits")
        warm_start.fork_server()  # it finds the plugin, and imports while the network is made
        hosted = undo.enter_context(hosts(2))
        with report.interruptible(measured):
            for turn in range(first, first + arguments.turns):
                one_turn(turn, arguments, hosted, measured)
    every = points(measured)
    show(every)
    report.save(arguments.out, "overlap", facts, summary(measured, every), plot(every))


def summary(measured: Measured, every: Sequence[Point]) -> dict[str, Any]:
    asked = [
        {"candidate": name, "case": case, "pictures": pictures, "requests": taken}
        for (name, case, pictures), taken in measured.items()
    ]
    return {
        "cases": {name: case._asdict() for name, case in CASES.items()},
        "asked": asked,
        "points": [one._asdict() for one in every],
    }


def earlier(arguments: argparse.Namespace) -> Measured:
    if not arguments.add:
        return {}
    found = report.load(arguments.out, "overlap")["results"]["asked"]
    return {(one["candidate"], one["case"], one["pictures"]): one["requests"] for one in found}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--pictures", type=int, nargs="+", default=[8])
    parser.add_argument("--requests", type=int, default=3, help="of each case in a turn")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--add", action="store_true", help="to what --out has already")
    report.add_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.candidates, arguments.cases = [NEITHER, PROGRESSIVE], [TOWER]
        arguments.pictures, arguments.requests, arguments.turns = [2], 1, 1
    return arguments


if __name__ == "__main__":
    main()
