"""Mixed traffic, with clients that hang up and an encode instance that freezes, after which nothing may have grown.

A real pair and router on this machine's CPU, with a pool so small that every picture takes several rounds. Each answer
is checked: against what the undisturbed pair answered to the same prompt, or for the refusal that it must be. After a
warm-up, and again at the end, everything is let come to rest, and the two rests are compared. It fails, and names what,
when an answer was wrong, when a block or an entry of a table has not come back, when a process has more descriptors or
threads, or when its memory grew. The last lines say how many bytes per request would have been noticed in this run: the
longer it is the smaller a leak it finds (conftest.py has the settings).
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.local_cluster import LocalCluster, Options
from stress.growth import MIB, Verdict, Watch
from stress.traffic import Clients, Disturbances, Prompt, Target, burst, learn_prompts, outcomes_table
from support import servers
from support.questions import PIXELS_PER_TOKEN
from support.warm_start import WarmProcess

SEED: Final = int(os.environ.get("RELAY_STRESS_SEED", random.SystemRandom().randrange(10**6)))
MINUTES: Final = float(os.environ.get("RELAY_SOAK_MINUTES", 1))
CLIENTS: Final = int(os.environ.get("RELAY_SOAK_CLIENTS", 4))
FAMILY: Final = os.environ.get("RELAY_SOAK_FAMILY", "qwen2_5_vl")
FREEZES: Final = os.environ.get("RELAY_SOAK_FREEZES", "1") != "0"
ALLOWED_MIB: Final = float(os.environ.get("RELAY_SOAK_ALLOW_MIB", 8))

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

WARM_UP: Final = max(40.0, 6 * MINUTES)
SAMPLE_EVERY: Final = 2.0
SAY_EVERY: Final = 30.0
# An unused worker is kept for a minute and a half, a connection of the router for less.
REST_PATIENCE: Final = 150.0
_started = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _started:6.0f} s] {text}", flush=True)


@pytest.fixture
def pair(logs: Path) -> Iterator[LocalCluster]:
    # Without what makes the servers of other tests collect garbage less often, and their memory move more.
    arguments = ("--enable-metrics",)
    options = Options(tiny_model.cached(FAMILY), logs / "soak", servers.CPU, arguments, SMALL_POOL, WarmProcess)
    with servers.running(local_cluster.relay(options)) as cluster:
        yield cluster


@pytest.mark.timeout(900 + WARM_UP + 60 * MINUTES)
def test_nothing_grows_and_every_answer_is_right(pair: LocalCluster) -> None:
    say(f"RELAY_STRESS_SEED={SEED}, {MINUTES:g} minutes, {CLIENTS} clients")
    assert Soak(pair).run() == []


class Soak:
    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.watch = Watch(cluster)
        self.disturbances = Disturbances()

    def run(self) -> list[str]:
        """What was wrong, and what has grown."""
        prompts = learn_prompts(self.cluster.url, PIXELS_PER_TOKEN[FAMILY], of_each=3)
        say("warming up")
        burst(self.cluster.url, prompts["images"][0], 8 * CLIENTS)
        warm_up = self._traffic(prompts, WARM_UP, f"{SEED} warm-up")
        first = self.watch.rest(None, REST_PATIENCE)
        say("at rest; from here on nothing may grow")
        clients = self._traffic(prompts, 60 * MINUTES, str(SEED))
        say("coming to rest")
        verdict = Verdict(first, self.watch.rest(first, REST_PATIENCE), self.watch.moments, ALLOWED_MIB)
        print(*verdict.number_table(), "", *verdict.process_table(), "", sep="\n")
        print(f"a leak of {verdict.smallest_leak():,.0f} bytes per picture would have been noticed")
        return [*warm_up.wrong, *clients.wrong, *verdict.problems()]

    def _traffic(self, prompts: dict[str, list[Prompt]], seconds: float, seed: str) -> Clients:
        clients = Clients(self._target(), prompts, CLIENTS, seed, self.disturbances)
        freezer = Freezer(self.watch.pids["encode scheduler"], self.disturbances, random.Random(f"{seed} faults"))
        with freezer if FREEZES else contextlib.nullcontext():
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


class Freezer:
    """Stops a process and lets it go on, in turn for less and for more than its heartbeats allow."""

    def __init__(self, pid: int, disturbances: Disturbances, dice: random.Random) -> None:
        self.freezes: collections.Counter[str] = collections.Counter()
        self._pid = pid
        self._disturbances = disturbances
        self._dice = dice
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Freezer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The process goes on, whatever has happened."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._dice.uniform(4.0, 12.0)):
            self._freeze("short", self._dice.uniform(0.1, SILENCE / 3), contextlib.nullcontext())
            if self._over.wait(self._dice.uniform(4.0, 12.0)):
                return
            self._freeze("long", SILENCE + self._dice.uniform(1.0, 4.0), self._disturbances.span())

    def _freeze(self, kind: str, seconds: float, span: contextlib.AbstractContextManager[None]) -> None:
        with span:
            os.kill(self._pid, signal.SIGSTOP)
            try:
                self._over.wait(seconds)
            finally:
                os.kill(self._pid, signal.SIGCONT)
        self.freezes[kind] += 1
