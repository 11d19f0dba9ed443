"""Mixed traffic for half an hour, with clients that hang up and an encode instance that freezes: does anything grow?

    .venv/bin/python benchmark/soak.py [--minutes 30] [--clients 4] [--seed N] [--no-faults]

A real pair and router on this machine's CPU, with a pool so small that every picture takes several rounds. Each answer
is checked: against what the undisturbed pair answered to the same prompt, or for the refusal that it must be. After a
warm-up, and again at the end, everything is let come to rest, and the two rests are compared. It fails, and names what,
when an answer was wrong, when a block or an entry of a table has not come back, when a process has more descriptors or
threads, or when its memory grew.

Memory that grows is told from memory that moves: a line is laid through the second half of the samples, when caches
and allocators have found their size, and its rise counts as far as it exceeds three standard errors of its own. What is
left may be up to the allowance (--allow-mib): glibc's arenas go on fragmenting for a while, in steps of a few MiB, and
no shorter form of a test can tell that from a leak. So the longer the run the smaller a leak it finds; the last lines
say how many bytes per request would have been noticed in this one.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NoReturn

from soak_faults import Disturbances, Freezer
from soak_traffic import Clients, Prompt, Target, burst, learn_prompts, outcomes_table
from soak_verdict import Verdict
from soak_watch import MIB, Watch

from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.local_cluster import LocalCluster, Options
from embedding_relay.tools.local_process import ProcessFailed

HEARTBEAT: Final = 2
MISSED: Final = 2
SILENCE: Final = HEARTBEAT * (MISSED + 1)
SMALL_POOL: Final = {
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "12",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "32",
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "20",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "20",
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": str(HEARTBEAT),
    "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": str(MISSED),
}
# A breaker that opens at a fault would keep the traffic away from what is to be watched.
ROUTER_ARGUMENTS: Final = ("--disable-circuit-breaker",)
PIXELS_PER_TOKEN: Final = {"qwen2_5_vl": 28, "qwen3_vl": 32}

SAMPLE_EVERY: Final = 2.0
SAY_EVERY: Final = 30.0
# An unused worker is kept for a minute and a half, a connection of the router for less.
REST_PATIENCE: Final = 150.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of traffic, after the warm-up")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--family", choices=tiny_model.FAMILIES, default="qwen2_5_vl")
    parser.add_argument("--no-faults", action="store_true", help="freeze nothing")
    parser.add_argument("--allow-mib", type=float, default=8.0, help="growth of one process that is no failure")
    arguments = parser.parse_args()
    # By name: a shell starts what it puts into the background with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    with tempfile.TemporaryDirectory(prefix="relay-soak-", ignore_cleanup_errors=True) as logs:
        options = Options(
            model=tiny_model.cached(arguments.family),
            logs=Path(logs),
            device="cpu",
            arguments=("--enable-metrics",),
            environ=SMALL_POOL,
        )
        say(f"seed {arguments.seed}, {arguments.minutes:g} minutes, {arguments.clients} clients")
        try:
            with local_cluster.relay(options, router_arguments=ROUTER_ARGUMENTS) as cluster:
                problems = Soak(cluster, arguments).run()
        except ProcessFailed as failure:
            problems = [str(failure)]
    for problem in problems:
        print(f"FAILED {problem}")
    print("FAILED" if problems else "nothing grew, and every answer was right")
    return 1 if problems else 0


def _interrupted(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


_started = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _started:6.0f} s] {text}", flush=True)


class Soak:
    def __init__(self, cluster: LocalCluster, arguments: argparse.Namespace) -> None:
        self.cluster = cluster
        self.arguments = arguments
        self.watch = Watch(cluster)
        self.disturbances = Disturbances()
        self.problems: list[str] = []

    def run(self) -> list[str]:
        minutes, seed = self.arguments.minutes, self.arguments.seed
        prompts = learn_prompts(self.cluster.url, PIXELS_PER_TOKEN[self.arguments.family], of_each=3)
        say("warming up")
        burst(self.cluster.url, prompts["images"][0], 8 * self.arguments.clients)
        self.problems += self._traffic(prompts, max(40.0, 6 * minutes), f"{seed} warm-up").wrong
        first = self.watch.rest(None, REST_PATIENCE)
        say("at rest; from here on nothing may grow")
        clients = self._traffic(prompts, 60 * minutes, str(seed))
        say("coming to rest")
        verdict = Verdict(first, self.watch.rest(first, REST_PATIENCE), self.watch.moments, self.arguments.allow_mib)
        print(*verdict.number_table(), "", *verdict.process_table(), "", sep="\n")
        print(f"a leak of {verdict.smallest_leak():,.0f} bytes per picture would have been noticed")
        return [*self.problems, *clients.wrong, *verdict.problems()]

    def _traffic(self, prompts: dict[str, list[Prompt]], seconds: float, seed: str) -> Clients:
        clients = Clients(self._target(), prompts, self.arguments.clients, seed, self.disturbances)
        freezer = Freezer(
            self.watch.pids["encode scheduler"], SILENCE, self.disturbances, random.Random(f"{seed} faults")
        )
        with contextlib.nullcontext() if self.arguments.no_faults else freezer:
            clients.start()
            try:
                self._sample(clients, time.monotonic() + seconds)
            finally:
                clients.stop()
        for line in outcomes_table(clients.outcomes):
            say(line)
        say(f"encode scheduler frozen: {dict(freezer.freezes)}")
        return clients

    def _target(self) -> Target:
        encode, language = self.cluster["encode"], self.cluster["language"]
        port = int(encode.command[encode.command.index("--disaggregation-bootstrap-port") + 1])
        return Target(self.cluster.url, encode.url, language.url, port)

    def _sample(self, clients: Clients, until: float) -> None:
        self.watch.moments.clear()
        say_at, said = 0.0, 0
        while (now := time.monotonic()) < until:
            moment = self.watch.sample()
            if now >= say_at:
                say_at = now + SAY_EVERY
                memory = ", ".join(f"{name} {held.memory / MIB:.0f}" for name, held in moment.processes.items())
                say(f"{clients.asked} answers, {len(clients.wrong)} wrong; MiB: {memory}")
            for problem in clients.wrong[said:]:
                say(f"WRONG {problem}")
                said += 1
            time.sleep(SAMPLE_EVERY)


if __name__ == "__main__":
    sys.exit(main())
