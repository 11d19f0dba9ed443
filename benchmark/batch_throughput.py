"""Rows per second of a batch run beside SGLang's own load generator: same server, same requests, in turns.

    .venv/bin/python benchmark/batch_throughput.py [--rows 200] [--concurrency 8] [--rounds 3] [--url http://…]

Without --url it starts an encode instance, a language instance and the router with a tiny generated model. Both kinds
send the same sort of request: so many pictures of one size, a prompt, and so many tokens to answer with. No request is
sent twice, so no cache is better for one than for the other. What counts is the time from the first to the last
request, as `sglang.bench_serving` says it for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.asking.question import chat_request
from embedding_relay.batch.asking.run import Run
from embedding_relay.batch.session.folder import ResultWriter
from embedding_relay.batch.session.records import Asking, Counts
from embedding_relay.batch.tasks import Task
from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.chat_client import chat_body, picture

FAMILY = "qwen2_5_vl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="in each turn of each kind")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1, help="in each row")
    parser.add_argument("--side", type=int, default=112, help="of a picture, in pixels")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--url", help="a server that runs already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, server(options.url, Path(scratch)) as url:
        ratios = list(turns(url, options, Path(scratch)))
    print(f"run / bench_serving: {statistics.median(ratios):.3f}, median of {len(ratios)} rounds")


@contextlib.contextmanager
def server(url: str | None, logs: Path) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with local_cluster.relay(local_cluster.Options(model=tiny_model.cached(FAMILY), logs=logs)) as cluster:
        yield cluster.url


def turns(url: str, options: argparse.Namespace, scratch: Path) -> Iterator[float]:
    kinds = {"bench_serving": bench_serving, "run": batch_run}
    seed = 0
    # One turn of each that does not count: both sides of the pair load and compile on their first requests.
    for turn in range(options.rounds + 1):
        rates = {}
        # Whoever goes first does so every other time.
        for kind in list(kinds)[:: 1 if turn % 2 else -1]:
            seed += 1
            lines = [request(seed * options.rows + row, options) for row in range(options.rows)]
            rates[kind] = options.rows / kinds[kind](url, lines, options.concurrency, scratch)
            print(f"{f'round {turn}' if turn else 'warm-up':<9} {kind:<14} {rates[kind]:>8.2f} rows/s", flush=True)
        if turn:
            yield rates["run"] / rates["bench_serving"]


def request(number: int, options: argparse.Namespace) -> dict[str, Any]:
    pictures = [picture(options.side, options.side, 100 * number + one) for one in range(options.pictures)]
    body = chat_body(pictures, f"Item {number:08}: what is shown here?", ignore_eos=True, stream=False)
    # As SGLang's load generator names the limit.
    return {name: body[name] for name in ("messages", "temperature", "ignore_eos")} | {
        "max_completion_tokens": options.tokens,
        "max_tokens": options.tokens,
    }


def bench_serving(url: str, requests: list[dict[str, Any]], concurrency: int, scratch: Path) -> float:
    """The seconds that it took by its own account."""
    dataset, result = scratch / "requests.jsonl", scratch / "bench.jsonl"
    dataset.write_text("".join(json.dumps(body) + "\n" for body in requests))
    result.unlink(missing_ok=True)
    model = str(tiny_model.cached(FAMILY))
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang-oai-chat", "--base-url", url]
    command += ["--model", model, "--tokenizer", model, "--dataset-name", "openai", "--dataset-path", str(dataset)]
    command += ["--num-prompts", str(len(requests)), "--max-concurrency", str(concurrency), "--disable-stream"]
    command += ["--output-file", str(result), "--disable-tqdm"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stdout + ended.stderr)
    told = json.loads(result.read_text().splitlines()[-1])
    if told["completed"] != len(requests):
        raise SystemExit(f"bench_serving: {told['completed']} of {len(requests)} completed\n{ended.stdout}")
    return float(told["duration"])


def batch_run(url: str, requests: list[dict[str, Any]], concurrency: int, scratch: Path) -> float:
    bodies = [{name: value for name, value in body.items() if name != "max_tokens"} for body in requests]
    return asyncio.run(run_to_its_end(url, bodies, concurrency, scratch))


async def run_to_its_end(url: str, bodies: list[dict[str, Any]], concurrency: int, scratch: Path) -> float:
    tasks = iter([Task(row, body=body) for row, body in enumerate(bodies, 1)])
    asking = Asking()
    async with Endpoint(url) as endpoint:
        model = await endpoint.model()
        with ResultWriter(scratch, 1) as writer:
            run = Run(
                tasks,
                endpoint,
                lambda task: chat_request(task, asking, model, scratch),
                writer.write,
                concurrency=concurrency,
                retries=0,
                total=len(bodies),
                already=Counts(),
            )
            started = time.perf_counter()
            await run.run()
            seconds = time.perf_counter() - started
    if run.counts.done != len(bodies):
        raise SystemExit(f"run: {run.counts.failed} of {len(bodies)} failed")
    return seconds


if __name__ == "__main__":
    main()
