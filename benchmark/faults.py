"""Kills and freezes real servers at random moments, again and again, and looks at what became of every client.

    .venv/bin/python benchmark/faults.py [--strikes 5] [--only NAME...] [--seed N] [--logs DIRECTORY]

Two encode instances, a language instance and SGLang's router, with receive buffers so small that every request comes in
many rounds. Each time some clients ask at once, one fault strikes at a moment drawn at random from the time that such a
batch takes, and then: every client must have an answer within the deadline, the right tokens or an error that says what
happened; the instances that were not struck must go on; and once the struck one runs again (what was killed is started
again, nothing else is done), new questions must be answered and all pools and tables be as at the beginning.

It ends with a table and with status 1 if anything was otherwise. The same seed draws the same moments.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import Answer, ask, chat_body, picture, post
from embedding_relay.tools.local_cluster import LocalCluster, Options, router, sglang_server
from embedding_relay.tools.local_numbers import not_at_rest, numbers_of, scheduler_of
from embedding_relay.tools.local_process import LocalProcess, free_ports, wait_all_ready

FAMILY = "qwen2_5_vl"
TOKEN = 28  # pixels, squared

SETTINGS = {
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "6",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "32",
    "SGLANG_EMBEDDING_FIRST_WORD_TIMEOUT": "4",
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "20",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "20",
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "1",
}
SILENCE = 3.0  # seconds: the heartbeat interval, and twice for its failures
# The waits above follow each other at worst, and the router may try once more.
DEADLINE = 60.0
RECOVERY = 90.0  # an instance that was started again loads its model
AT_ONCE = 10

TOLERANCE = 2e-3


# ---- clients


@dataclasses.dataclass(frozen=True)
class Question:
    sizes: tuple[int, ...]  # the side of each picture, in tokens
    seed: int

    def ask(self, url: str) -> Answer:
        pictures = [picture(size * TOKEN, size * TOKEN, self.seed + at) for at, size in enumerate(self.sizes)]
        return ask(url, pictures, "what is this", timeout=2 * DEADLINE)


# Small pictures, because the tower is quadratic on a CPU; many of them, so that there are many rounds.
QUESTIONS = [
    Question((4,), 1),
    Question((8, 8), 10),
    Question((10,) * 6, 20),
    Question((8,) * 12, 40),
    Question((5,) * 32, 60),
    Question((6, 9, 3), 80),
]


def difference(one: Answer, other: Answer) -> float:
    if [token for token, _ in one.logprobs] != [token for token, _ in other.logprobs]:
        return math.inf
    return max(abs(here - there) for (_, here), (_, there) in zip(one.logprobs, other.logprobs, strict=True))


@dataclasses.dataclass
class Outcome:
    """What a client got. No answer at all: it says why."""

    question: Question
    answer: Answer | None
    seconds: float
    problem: str = ""


def ask_one(url: str, question: Question) -> Outcome:
    started = time.monotonic()
    try:
        answer = question.ask(url)
    except OSError as error:
        return Outcome(question, None, time.monotonic() - started, str(error))
    return Outcome(question, answer, answer.seconds)


# ---- the cluster


class Cluster:
    def __init__(self, logs: Path) -> None:
        options = Options(tiny_model.cached(FAMILY), logs, "cpu", ("--enable-metrics",), SETTINGS)
        ports = free_ports(6)
        self.encodes = []
        for index in range(2):
            port, bootstrap = ports[2 * index : 2 * index + 2]
            mode = ("--disaggregation-mode", "encode", "--disaggregation-bootstrap-port", str(bootstrap))
            self.encodes.append(sglang_server(f"encode-{index}", options, port, *mode))
        self.language = sglang_server("language", options, ports[4], "--disaggregation-mode", "language")
        prefill = [(encode.url, ports[2 * index + 1]) for index, encode in enumerate(self.encodes)]
        self.router = router(options, ports[5], prefill, [self.language.url])
        self.bootstrap = ports[1]
        self.all = LocalCluster(self.router.url, [[*self.encodes, self.language], [self.router]])
        self.url = self.router.url

    def unrest(self) -> dict[str, list[str]]:
        """Where pools are not full, or a table has something that belongs to a request."""
        found = {instance.name: not_at_rest(numbers_of(instance)) for instance in (*self.encodes, self.language)}
        return {name: busy for name, busy in found.items() if busy}


def ended(instance: LocalProcess) -> bool:
    return not instance.group_alive()


def wait_until(what: str, condition: Callable[[], bool], seconds: float) -> float:
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise Wrong(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)
    return time.monotonic() - started


class Wrong(Exception):
    """Something that must not happen."""


# ---- the faults


@dataclasses.dataclass(frozen=True)
class Fault:
    """`strike` acts at the random moment; `heal` makes the cluster whole again, and is all that an operator does."""

    name: str
    about: str
    strike: Callable[[Cluster, random.Random], None]
    heal: Callable[[Cluster], None] = lambda cluster: None
    spared: int | None = None  # the encode instance that must go on meanwhile
    unanswered: bool = False  # the router itself is struck: its clients lose their connections


def restart(*names: str) -> Callable[[Cluster], None]:
    def heal(cluster: Cluster) -> None:
        struck = [cluster.all[name] for name in names]
        for process in struck:
            process.kill_group()
            wait_until(f"{process.name} is gone", lambda process=process: ended(process), 10)  # type: ignore[misc]
            process.reap()
            process.start()
        wait_all_ready(struck, RECOVERY)

    return heal


def kill(name: str) -> Callable[[Cluster, random.Random], None]:
    return lambda cluster, _: cluster.all[name].kill_group(signal.SIGKILL)


def kill_scheduler(name: str) -> Callable[[Cluster, random.Random], None]:
    return lambda cluster, _: os.kill(scheduler_of(cluster.all[name]), signal.SIGKILL)


def freeze(pids: Callable[[LocalProcess], list[int]], name: str) -> Callable[[Cluster, random.Random], None]:
    """For a time drawn from below to above what the heartbeat allows; then it goes on, late writes and all."""

    def strike(cluster: Cluster, dice: random.Random) -> None:
        frozen = pids(cluster.all[name])
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(dice.uniform(0.2, 3) * SILENCE)
        finally:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)

    return strike


def scheduler(instance: LocalProcess) -> list[int]:
    return [scheduler_of(instance)]


def front(instance: LocalProcess) -> list[int]:
    """The HTTP process, and with it the bootstrap registry."""
    return [instance.pid]


def everything(instance: LocalProcess) -> list[int]:
    return instance.group_members()


def hang_up(cluster: Cluster, dice: random.Random) -> None:
    """Clients of a stream that leave in its middle, and one that leaves before its first token."""
    question = QUESTIONS[3]
    side = question.sizes[0] * TOKEN
    pictures = [picture(side, side, dice.randrange(1 << 30)) for _ in question.sizes]
    for timeout in (dice.uniform(0.05, 0.5), dice.uniform(0.5, 3)):
        body = chat_body(pictures, "what is this", stream=True, max_tokens=400, ignore_eos=True)
        with suppress(TimeoutError):
            post(f"{cluster.url}/v1/chat/completions", body, timeout=timeout)


FAULTS = (
    Fault("encode killed", "kill -9 of the whole instance", kill("encode-1"), restart("encode-1"), spared=0),
    Fault("encode scheduler killed", "kill -9", kill_scheduler("encode-1"), restart("encode-1"), spared=0),
    Fault("encode scheduler frozen", "SIGSTOP, later SIGCONT", freeze(scheduler, "encode-1"), spared=0),
    Fault("encode instance frozen", "all its processes", freeze(everything, "encode-1"), spared=0),
    Fault("registry unreachable", "its HTTP process frozen", freeze(front, "encode-1"), spared=0),
    Fault("language killed", "kill -9 of the whole instance", kill("language"), restart("language")),
    Fault("language scheduler killed", "kill -9", kill_scheduler("language"), restart("language")),
    Fault("language scheduler frozen", "SIGSTOP, later SIGCONT", freeze(scheduler, "language")),
    Fault("router killed", "kill -9", kill("router"), restart("router"), unanswered=True),
    Fault("clients gone", "in the middle of a stream", hang_up),
)


# ---- one strike


@dataclasses.dataclass
class Report:
    strikes: int = 0
    requests: int = 0
    right: int = 0
    errors: Counter[int] = dataclasses.field(default_factory=Counter)
    cut_off: int = 0
    slowest: float = 0.0
    recovery: list[float] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)


class Range:
    """The cluster, and what each question's answer is when nobody disturbs it."""

    def __init__(self, cluster: Cluster, dice: random.Random) -> None:
        self.cluster = cluster
        self.dice = dice
        # Twice, because the router takes the encode instances in turn: each of them has then seen every picture.
        asked = [(question, question.ask(cluster.url)) for question in QUESTIONS for _ in cluster.encodes]
        self.expected = dict(asked)
        problems = [answer.body for _, answer in asked if not answer.ok]
        assert not problems, problems
        started = time.monotonic()
        outcomes = self._at_once(lambda: None)
        self.batch_seconds = time.monotonic() - started
        problems = [problem for outcome in outcomes if (problem := self.flaw(outcome))]
        assert not problems, problems

    def _at_once(self, act: Callable[[], None]) -> list[Outcome]:
        asked = [self.dice.choice(QUESTIONS) for _ in range(AT_ONCE)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes = [pool.submit(ask_one, self.cluster.url, question) for question in asked]
            act()
            return [outcome.result() for outcome in outcomes]

    def flaw(self, outcome: Outcome, cut_off_is_fine: bool = False) -> str:
        """What is wrong with what a client got; empty if nothing is."""
        answer = outcome.answer
        if outcome.seconds > DEADLINE:
            return f"an answer took {outcome.seconds:.1f} s: {answer.body if answer else outcome.problem}"
        if answer is None:
            return "" if cut_off_is_fine else f"no answer: {outcome.problem}"
        if answer.ok:
            apart = difference(answer, self.expected[outcome.question])
            return "" if apart <= TOLERANCE else f"a wrong answer to {outcome.question}, apart by {apart}"
        if answer.status not in (500, 502, 503) or not str(answer.body).strip():
            return f"status {answer.status}: {answer.body!r}"
        return ""

    def strike(self, fault: Fault, report: Report) -> None:
        moment = self.dice.uniform(0, self.batch_seconds)

        def act() -> None:
            time.sleep(moment)
            fault.strike(self.cluster, self.dice)

        report.strikes += 1
        outcomes = self._at_once(act)
        for outcome in outcomes:
            report.requests += 1
            report.slowest = max(report.slowest, outcome.seconds)
            if flaw := self.flaw(outcome, fault.unanswered):
                report.wrong.append(flaw)
            elif outcome.answer is None:
                report.cut_off += 1
            elif outcome.answer.ok:
                report.right += 1
            else:
                report.errors[outcome.answer.status] += 1
        if fault.spared is not None:
            self._goes_on(self.cluster.encodes[fault.spared], report)
        fault.heal(self.cluster)
        self._recovers(report)

    def _goes_on(self, instance: LocalProcess, report: Report) -> None:
        """A client that tries again gets its tokens while the struck instance is still away."""
        before = instance.log_text().count("status=Success")
        self._one_succeeds(report)
        if (
            instance.log_text().count("status=Success") == before
            and self.cluster.all["encode-1"].group_alive() is False
        ):
            report.wrong.append(f"{instance.name} did not go on")

    def _one_succeeds(self, report: Report) -> float:
        def succeeds() -> bool:
            outcome = ask_one(self.cluster.url, self.dice.choice(QUESTIONS))
            if flaw := self.flaw(outcome):
                report.wrong.append(f"afterwards: {flaw}")
            return outcome.answer is not None and outcome.answer.ok

        return wait_until("a new request succeeds", succeeds, DEADLINE)

    def _recovers(self, report: Report) -> None:
        waited = self._one_succeeds(report)
        served = [encode.log_text().count("status=Success") for encode in self.cluster.encodes]

        def both_serve() -> bool:
            self._one_succeeds(report)
            return all(
                encode.log_text().count("status=Success") > before
                for encode, before in zip(self.cluster.encodes, served, strict=True)
            )

        waited += wait_until("both encode instances serve", both_serve, RECOVERY)
        try:
            waited += wait_until("pools are full and tables empty", lambda: not self.cluster.unrest(), DEADLINE)
        except Wrong as wrong:
            raise Wrong(f"{wrong}: {self.cluster.unrest()}") from None
        report.recovery.append(waited)


# ---- all of it


@contextmanager
def running(logs: Path) -> Iterator[Cluster]:
    cluster = Cluster(logs)
    with cluster.all:
        yield cluster


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strikes", type=int, default=5, help="of each fault")
    parser.add_argument("--only", nargs="*", default=[fault.name for fault in FAULTS], metavar="NAME")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--logs", type=Path, default=None, help="where the servers' logs go")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if fault.name in options.only]
    if len(faults) != len(options.only):
        parser.error(f"faults are: {', '.join(fault.name for fault in FAULTS)}")
    logs = options.logs or Path(tempfile.mkdtemp(prefix="relay-faults-"))
    print(f"seed {options.seed}, logs in {logs}", flush=True)
    reports = {fault.name: Report() for fault in faults}
    with running(logs) as cluster:
        grounds = Range(cluster, random.Random(options.seed))
        print(f"{AT_ONCE} requests at once take {grounds.batch_seconds:.1f} s undisturbed", flush=True)
        for strike in range(options.strikes):
            for fault in faults:
                try:
                    grounds.strike(fault, reports[fault.name])
                except Wrong as wrong:
                    reports[fault.name].wrong.append(str(wrong))
                    print_table(reports)
                    print(f"gave up after {fault.name!r}, strike {strike + 1}: {wrong}", flush=True)
                    return 1
                print_line(fault.name, reports[fault.name])
    print_table(reports)
    return int(any(report.wrong for report in reports.values()))


def print_line(name: str, report: Report) -> None:
    errors = ", ".join(f"{count} x {status}" for status, count in sorted(report.errors.items())) or "none"
    recovery = statistics.median(report.recovery) if report.recovery else math.nan
    print(
        f"{name:<26} strikes {report.strikes:>3}  requests {report.requests:>4}  right {report.right:>4}"
        f"  errors {errors:<18} cut off {report.cut_off:>3}  wrong {len(report.wrong):>2}"
        f"  slowest {report.slowest:>5.1f} s  recovery {recovery:>5.1f} s",
        flush=True,
    )
    for wrong in report.wrong:
        print(f"    {wrong[:500]}", flush=True)


def print_table(reports: dict[str, Report]) -> None:
    print()
    for name, report in reports.items():
        print_line(name, report)
    requests = sum(report.requests for report in reports.values())
    answered = sum(report.right + sum(report.errors.values()) + report.cut_off for report in reports.values())
    slowest = max(report.slowest for report in reports.values())
    print(
        f"\nstrikes {sum(report.strikes for report in reports.values())}, requests {requests}, lost or wrong"
        f" {requests - answered}, slowest answer {slowest:.1f} s, threads left {threading.active_count() - 1}"
    )


if __name__ == "__main__":
    sys.exit(main())
