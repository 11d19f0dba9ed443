"""Requests answered in time, as ever more arrive: an undivided server, SGLang's own split, and a pair of this plugin.

    .venv/bin/python benchmark/trace.py [--candidates undivided split pair ...] [--loads 0.5 1 2] [--requests 32]
                                        [--reuse 0] [--turns 1] [--add] [--quick] [--out FOLDER]

The requests are those of `workload.py`, open loop: pictures, text and answers as a published trace has them, with all
numbers of tokens divided by `--shrink`, and no more than nine pictures in one. Each turn has requests of its own, and
starts the candidates one after the other. Each of these is asked for every request alone, and then, with other pictures
of the same sizes, for all of them at each rate. A rate is a multiple of what the first candidate answers one request
after the other, in the first turn.

A request is answered in time if its first token comes within twice the time that it takes alone, which is the median of
the candidates, so that all have the same limit. One that fails is not, and whatever has no answer ten seconds after the
last arrival is given up. `split, 1` is the split whose encoder takes one request at a time
(SGLANG_ENCODER_MAX_BATCH_SIZE=1), as an encode instance of this plugin does on a CPU. `--reuse` is the share of
pictures that an earlier request of the same rate has shown. `--add` counts the turns that are in the folder already,
with their rates. The client is that of `sglang.bench_serving`; one thread of OpenMP in each process.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import report
import ttft  # sets what must be set before torch is imported
import workload
from report import Figures, Table
from ttft import PAIR, SPLIT, SPLIT_BY_ONE, UNDIVIDED

from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import picture
from embedding_relay.tools.local_cluster import LocalCluster, Options
from support import servers, warm_start

SEED: Final = 4
MOST_PICTURES: Final = 9
"""So many has one request of a hundred; with more, a server without an accelerator would do nothing else."""
PIXELS: Final = 28
"""The side of what becomes one token."""
PATIENCE: Final = 10.0
"""Seconds after the last arrival, in which whoever is not answered is given up."""
ALONE: Final = 0.0
"""In the place of a rate: one request after the other."""


class Outcome(NamedTuple):
    """Of one request: seconds to the first token and to the last; None if it failed."""

    first: float | None
    last: float | None


Asked = dict[float, list[Outcome]]
"""By rate."""


SERVERS: Final[Mapping[str, Callable[[Options], LocalCluster]]] = {
    SPLIT: ttft.sglangs_split,
    PAIR: ttft.pair,
    UNDIVIDED: ttft.undivided,
    SPLIT_BY_ONE: ttft.split_by_one,
}


# ---- what is asked


def shrunk(request: workload.Request, divisor: int) -> workload.Request:
    pictures = tuple(one._replace(tokens=max(4, one.tokens // divisor)) for one in request.pictures)
    text, output = max(2, request.text // divisor), max(2, request.output // divisor)
    return request._replace(pictures=pictures, text=text, output=output)


def sides(tokens: int) -> tuple[int, int]:
    """Of a picture that becomes about so many tokens, in pixels: nearly a square."""
    width = round(tokens**0.5)
    return width * PIXELS, max(1, round(tokens / width)) * PIXELS


def messages(request: workload.Request, salt: int) -> list[dict[str, Any]]:
    """Pictures of another salt are other pictures."""
    parts: list[dict[str, Any]] = []
    for one in request.pictures:
        drawn = picture(*sides(one.tokens), seed=salt * 1_000_000 + one.number)
        buffer = io.BytesIO()
        drawn.save(buffer, "PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    dice = random.Random(f"{salt} {request.at}")
    words = " ".join(dice.choice(("ba", "de", "fi", "go", "lu")) for _ in range(request.text))
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


# ---- the client


async def replay(url: str, model: str, asked: Sequence[tuple[workload.Request, Any]], rate: float) -> list[Outcome]:
    """Each at its time, whatever has become of those before it; without a rate, each when the one before has ended."""
    if rate == ALONE:
        return [await ask(url, model, *one) for one in asked]
    started = time.perf_counter()
    tasks = []
    for request, prompt in asked:
        await asyncio.sleep(max(0.0, started + request.at / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(url, model, request, prompt)))
    _, late = await asyncio.wait(tasks, timeout=PATIENCE)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return [Outcome(None, None) if task in late else task.result() for task in tasks]


async def ask(url: str, model: str, request: workload.Request, prompt: Any) -> Outcome:
    from sglang.benchmark import serving

    wanted = serving.RequestFuncInput(
        prompt=prompt,
        api_url=f"{url}/v1/chat/completions",
        prompt_len=request.media + request.text,
        output_len=request.output,
        model=model,
        lora_name="",
        image_data=None,
        extra_request_body={},
    )
    got = await serving.async_request_openai_chat_completions(wanted)
    if not got.success:
        return Outcome(None, None)
    return Outcome(got.ttft or got.latency, got.latency)  # without a first token, if its text is empty until the end


def ask_all(
    url: str, model: str, drawn: Sequence[workload.Request], rates: Sequence[float], salts: Sequence[int]
) -> Asked:
    from sglang.benchmark import serving

    serving.set_global_args(argparse.Namespace(disable_stream=False, disable_ignore_eos=False, header=None))
    outcomes: Asked = {}
    for rate, salt in zip(rates, salts, strict=True):
        asked = [(request, messages(request, salt)) for request in drawn]
        outcomes[rate] = asyncio.run(replay(url, model, asked, rate))
    return outcomes


# ---- the run


def one_turn(turn: int, options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    model = tiny_model.cached()
    trace = workload.requests(options.requests, SEED + turn, options.reuse, MOST_PICTURES)
    drawn = [shrunk(request, options.shrink) for request in trace]
    outcomes: dict[str, Asked] = {}
    spent: dict[str, float] = {}
    for name in report.from_turn(turn, options.candidates):
        made = SERVERS[name](servers.options(model, options.logs / f"{name}-{turn}"))
        with servers.running(made) as cluster:
            base = 100 * turn
            ask_all(cluster.url, str(model), drawn[:4], [ALONE], [base])  # connections, first passes
            outcomes[name] = ask_all(cluster.url, str(model), drawn, [ALONE], [base + 1])
            rates = found.setdefault("rates", rates_of(outcomes[name][ALONE], options.loads))
            before = ttft.processor_seconds(cluster)
            salts = range(base + 2, base + 2 + len(rates))
            outcomes[name] |= ask_all(cluster.url, str(model), drawn, rates, salts)
            after = ttft.processor_seconds(cluster)
            spent[name] = sum(after.values()) - sum(before.values())
        servers.finish_stopping()
    return {"points": points(outcomes, found["rates"]), "processor_s": spent}


def rates_of(alone: Sequence[Outcome], loads: Sequence[float]) -> list[float]:
    seconds = [one.last for one in alone if one.last is not None]
    return [load * len(seconds) / sum(seconds) for load in loads]


def limits(outcomes: Mapping[str, Asked]) -> list[float]:
    """Of each request, what it takes alone: the median of the candidates. One that fails alone is never in time."""
    by_request = zip(*(asked[ALONE] for asked in outcomes.values()), strict=True)
    return [
        Figures.of(seconds).median if (seconds := [one.first for one in ones if one.first is not None]) else 0.0
        for ones in by_request
    ]


def points(outcomes: Mapping[str, Asked], rates: Sequence[float]) -> list[dict[str, Any]]:
    alone = limits(outcomes)
    found = []
    for name, asked in outcomes.items():
        for rate in (ALONE, *rates):
            seconds = [one.first for one in asked[rate]]
            answered = [one for one in seconds if one is not None]
            found.append(
                {
                    "candidate": name,
                    "rate": rate,
                    "goodput": workload.goodput(seconds, alone, rate),
                    "in_time": sum(workload.in_time(seconds, alone)) / len(seconds),
                    "failed": len(seconds) - len(answered),
                    "median_ms": 1e3 * Figures.of(answered or [0.0]).median,
                }
            )
    return found


# ---- what came of it


def summary(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    measured: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for turn in turns:
        for point in turn["points"]:
            measured.setdefault((point["candidate"], point["rate"]), []).append(point)
    return [
        {
            "candidate": candidate,
            "rate": rate,
            "failed": sum(point["failed"] for point in ones),
            **{name: Figures.of(point[name] for point in ones) for name in ("goodput", "in_time", "median_ms")},
        }
        for (candidate, rate), ones in measured.items()
    ]


def best(turn: Mapping[str, Any], candidate: str) -> float:
    """The most requests in time per second, at whichever rate."""
    return max(point["goodput"] for point in turn["points"] if point["candidate"] == candidate)


def show(results: Mapping[str, Any], candidates: Sequence[str]) -> None:
    by_point = {(one["candidate"], one["rate"]): one for one in results["summary"]}
    rates = results["rates"]
    for title, name, every in (
        ("Requests per second that were answered in time", "goodput", rates),
        ("Their share of those that arrived", "in_time", [ALONE, *rates]),
        ("Time to first token in ms", "median_ms", [ALONE, *rates]),
    ):
        table = Table(title, "requests per second", *candidates)
        for rate in every:
            table.row(f"{rate:.2f}" if rate else "alone", *(by_point[one, rate][name] for one in candidates))
    show_best(results, candidates)


def show_best(results: Mapping[str, Any], candidates: Sequence[str]) -> None:
    columns = "", "in time per second", "of split", "processor ms of a request", "not answered"
    table = Table("The best of all rates, and what the servers spend", *columns)
    turns, asked = results["turns"], results["requests"] * len(results["rates"])
    for one in candidates:
        of_split = [best(turn, one) / best(turn, SPLIT) for turn in turns if SPLIT in candidates]
        spent = Figures.of(1e3 * turn["processor_s"][one] / asked for turn in turns)
        failed = sum(point["failed"] for point in results["summary"] if point["candidate"] == one)
        bests = Figures.of(best(turn, one) for turn in turns)
        table.row(one, bests, Figures.of(of_split) if of_split else "", spent, failed)


def drawing(every: Sequence[Mapping[str, Any]]) -> str:
    lines: dict[str, dict[float, Figures]] = {}
    for one in every:
        if one["rate"] != ALONE:
            lines.setdefault(one["candidate"], {})[one["rate"]] = one["goodput"]
    return report.plot("Requests in time, as more arrive", "requests per second", "in time per second", lines)


def main() -> None:
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and stop the servers on the way out
    facts = report.machine()
    print(report.describe(facts))
    found = report.load(options.out, "trace")["results"] if options.add else {"turns": []}
    warm_start.fork_server()  # imports while this process does
    with ttft.scratch_for_logs(options):
        for _ in range(options.turns):
            found["turns"].append(one_turn(len(found["turns"]), options, found))
    asked = {"requests": options.requests, "reuse": options.reuse, "shrink": options.shrink}
    results = found | asked | {"summary": summary(found["turns"])}
    show(results, options.candidates)
    report.save(options.out, "trace", facts, results, drawing(results["summary"]))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", choices=list(SERVERS), default=[SPLIT, PAIR, UNDIVIDED])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=16)
    parser.add_argument("--reuse", type=float, default=0.0)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--add", action="store_true", help="to the turns that --out has already")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.candidates, options.loads, options.requests, options.turns = [SPLIT, PAIR], [0.5, 1.0], 12, 1
    return options


if __name__ == "__main__":
    main()
