"""Kills and freezes real servers at random moments, again and again, and looks at what became of every client.

Two encode instances, a language instance and SGLang's router, with receive buffers so small that every request comes in
many rounds. Each time some clients ask at once, one fault strikes at a moment drawn at random from the time that such a
batch takes, and then: every client must have an answer within the deadline, the right tokens or an error that says what
happened; the instances that were not struck must go on; and once the struck one runs again (what was killed is started
again, nothing else is done), new questions must be answered and all pools and tables be as at the beginning.

It ends with a table. The same seed draws the same moments (conftest.py has the settings).
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import Answer, chat_body, post
from embedding_relay.tools.local_cluster import LocalCluster, router, sglang_server
from embedding_relay.tools.local_process import LocalProcess, ProcessFailed, free_ports, wait_all_ready
from support import servers
from support.questions import TOLERANCE, Question, difference, squares
from support.server_numbers import not_at_rest, numbers_of, scheduler_of
from support.today import EVERYTHING

SEED: Final = int(os.environ.get("RELAY_STRESS_SEED", random.SystemRandom().randrange(10**6)))
STRIKES: Final = int(os.environ.get("RELAY_STRIKES", 0))
# Without RELAY_STRIKES or RELAY_EVERYTHING: one strike of each kind; the others differ in who is struck.
DAILY: Final = ("encode killed", "encode scheduler frozen", "language scheduler killed", "clients gone")

FAMILY: Final = "qwen2_5_vl"
# The ways that rows can take from a writer that is struck, or to a reader: one of them in each run.
PLANE: Final = random.Random(SEED).choice(("mooncake", "shared_memory"))
SETTINGS: Final = {
    "SGLANG_EMBEDDING_DATA_PLANE": PLANE,
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "6",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "32",
    "SGLANG_EMBEDDING_FIRST_WORD_TIMEOUT": "4",
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "20",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "20",
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "1",
}
SILENCE: Final = 3.0  # seconds: the heartbeat interval, and twice for its failures
# The waits above follow each other at worst, and the router may try once more.
DEADLINE: Final = 60.0
RECOVERY: Final = 90.0  # an instance that was started again loads its model
AT_ONCE: Final = 10

# Above all deadlines of one strike, so that whichever passes is named.
pytestmark = pytest.mark.timeout(900)


# ---- the cluster and its faults


class Cluster:
    def __init__(self, logs: Path) -> None:
        options = servers.options(tiny_model.cached(FAMILY), logs, "--enable-metrics", **SETTINGS)
        ports = free_ports(6)
        self.encodes = []
        for index in range(2):
            port, bootstrap = ports[2 * index : 2 * index + 2]
            mode = ("--disaggregation-mode", "encode", "--disaggregation-bootstrap-port", str(bootstrap))
            self.encodes.append(sglang_server(f"encode-{index}", options, port, *mode))
        self.language = sglang_server("language", options, ports[4], "--disaggregation-mode", "language")
        prefill = [(encode.url, ports[2 * index + 1]) for index, encode in enumerate(self.encodes)]
        self.router = router(options, ports[5], prefill, [self.language.url])
        self.all = LocalCluster(self.router.url, [[*self.encodes, self.language], [self.router]])
        self.url = self.router.url

    def under_way(self) -> dict[str, list[str]]:
        """Where pools are not full, or a table has something that belongs to a request."""
        found = {instance.name: not_at_rest(numbers_of(instance)) for instance in (*self.encodes, self.language)}
        return {name: busy for name, busy in found.items() if busy}

    def successes(self) -> list[int]:
        """How many requests each encode instance has served."""
        return [encode.log_text().count("status=Success") for encode in self.encodes]


@dataclasses.dataclass(frozen=True)
class Fault:
    """`strike` acts at the random moment; `heal` makes the cluster whole again, and is all that an operator does."""

    name: str
    strike: Callable[[Cluster, random.Random], None]
    heal: Callable[[Cluster], None] = lambda cluster: None
    spared: int | None = None  # the encode instance that must go on meanwhile
    unanswered: bool = False  # the router itself is struck: its clients lose their connections


def restart(*names: str) -> Callable[[Cluster], None]:
    def heal(cluster: Cluster) -> None:
        struck = [cluster.all[name] for name in names]
        for process in struck:
            process.kill_group()
            wait_until(f"{process.name} is gone", lambda process=process: not process.group_alive(), 10)  # type: ignore[misc]
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


def http_process(instance: LocalProcess) -> list[int]:
    """And with it the bootstrap registry."""
    return [instance.pid]


def everything(instance: LocalProcess) -> list[int]:
    return instance.group_members()


def hang_up(cluster: Cluster, dice: random.Random) -> None:
    """Clients of a stream that leave in its middle, and one that leaves before its first token."""
    pictures = [squares(FAMILY, 8, 8, dice.randrange(1 << 30)) for _ in range(12)]
    for timeout in (dice.uniform(0.05, 0.5), dice.uniform(0.5, 3)):
        body = chat_body(pictures, "what is this", stream=True, max_tokens=400, ignore_eos=True)
        with suppress(TimeoutError):
            post(f"{cluster.url}/v1/chat/completions", body, timeout=timeout)


FAULTS: Final = (
    Fault("encode killed", kill("encode-1"), restart("encode-1"), spared=0),
    Fault("encode scheduler killed", kill_scheduler("encode-1"), restart("encode-1"), spared=0),
    Fault("encode scheduler frozen", freeze(scheduler, "encode-1"), spared=0),
    Fault("encode instance frozen", freeze(everything, "encode-1"), spared=0),
    Fault("registry unreachable", freeze(http_process, "encode-1"), spared=0),
    Fault("language killed", kill("language"), restart("language")),
    Fault("language scheduler killed", kill_scheduler("language"), restart("language")),
    Fault("language scheduler frozen", freeze(scheduler, "language")),
    Fault("router killed", kill("router"), restart("router"), unanswered=True),
    Fault("clients gone", hang_up),
)


# ---- the clients


def pictures(count: int, side: int, seed: int) -> Question:
    """So many pictures of `side * side` tokens each."""
    images = [squares(FAMILY, side, side, seed + at) for at in range(count)]
    return Question(f"{count} of {side}", (*images, "what is this"))


# Small pictures, because the tower is quadratic on a CPU; many of them, so that there are many rounds.
QUESTIONS: Final = (
    pictures(1, 4, seed=1),
    pictures(2, 8, seed=10),
    pictures(6, 10, seed=20),
    pictures(12, 8, seed=40),
    pictures(32, 5, seed=60),
    Question(
        "6, 9 and 3", (*(squares(FAMILY, side, side, 80 + at) for at, side in enumerate((6, 9, 3))), "what is this")
    ),
)


@dataclasses.dataclass
class Outcome:
    """What a client got. No answer at all: `problem` says why."""

    question: Question
    answer: Answer | None
    seconds: float
    problem: str = ""


def ask(url: str, question: Question) -> Outcome:
    started = time.monotonic()
    try:
        answer = post(f"{url}/v1/chat/completions", question.body(), timeout=2 * DEADLINE)
    except OSError as error:
        return Outcome(question, None, time.monotonic() - started, str(error))
    return Outcome(question, answer, answer.seconds)


# ---- one strike


class NotRecovered(Exception):
    """Something did not happen in time: the cluster is not whole again."""


def wait_until(what: str, condition: Callable[[], bool], seconds: float) -> float:
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise NotRecovered(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)
    return time.monotonic() - started


@dataclasses.dataclass
class Report:
    """What all strikes of one fault led to."""

    strikes: int = 0
    requests: int = 0
    right: int = 0
    errors: Counter[int] = dataclasses.field(default_factory=Counter)
    cut_off: int = 0
    slowest: float = 0.0
    recovery: list[float] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def count(self, outcome: Outcome, flaw: str) -> None:
        self.requests += 1
        self.slowest = max(self.slowest, outcome.seconds)
        if flaw:
            self.wrong.append(flaw)
        elif outcome.answer is None:
            self.cut_off += 1
        elif outcome.answer.ok:
            self.right += 1
        else:
            self.errors[outcome.answer.status] += 1


class Trial:
    """The cluster, what each question's answer is when nobody disturbs it, and what the strikes so far have led to."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.reports: dict[str, Report] = {}
        self.not_recovered: str | None = None
        # Twice, because the router takes the encode instances in turn: each of them has then seen every picture.
        asked = [(question.name, question.ask(cluster.url)) for question in QUESTIONS for _ in cluster.encodes]
        self.expected = dict(asked)
        problems = [answer.body for _, answer in asked if not answer.ok]
        assert not problems, problems
        started = time.monotonic()
        outcomes = self._at_once(random.Random(SEED), lambda: None)
        self.batch_seconds = time.monotonic() - started
        problems = [problem for outcome in outcomes if (problem := self.flaw(outcome))]
        assert not problems, problems

    def _at_once(self, dice: random.Random, act: Callable[[], None]) -> list[Outcome]:
        asked = [dice.choice(QUESTIONS) for _ in range(AT_ONCE)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes = [pool.submit(ask, self.cluster.url, question) for question in asked]
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
            apart = difference(answer, self.expected[outcome.question.name])
            return "" if apart <= TOLERANCE else f"a wrong answer to {outcome.question.name}, apart by {apart}"
        if answer.status not in (500, 502, 503) or not str(answer.body).strip():
            return f"status {answer.status}: {answer.body!r}"
        return ""

    def strike(self, fault: Fault, dice: random.Random) -> list[str]:
        """Strike once and let the cluster recover; what was wrong."""
        report = self.reports.setdefault(fault.name, Report())
        wrong_before = len(report.wrong)
        report.strikes += 1
        try:
            self._strike(fault, dice, report)
        except (NotRecovered, ProcessFailed) as problem:
            self.not_recovered = f"{fault.name!r}, strike {report.strikes}: {problem}"
            report.wrong.append(str(problem))
        return report.wrong[wrong_before:]

    def _strike(self, fault: Fault, dice: random.Random, report: Report) -> None:
        moment = dice.uniform(0, self.batch_seconds)

        def act() -> None:
            time.sleep(moment)
            fault.strike(self.cluster, dice)

        for outcome in self._at_once(dice, act):
            report.count(outcome, self.flaw(outcome, fault.unanswered))
        if fault.spared is not None:
            self._goes_on(fault.spared, dice, report)
        fault.heal(self.cluster)
        self._recovers(dice, report)

    def _goes_on(self, spared: int, dice: random.Random, report: Report) -> None:
        """A client that tries again gets its tokens while the struck instance is still away."""
        before = self.cluster.successes()[spared]
        self._one_succeeds(dice, report)
        if self.cluster.successes()[spared] == before and not self.cluster.all["encode-1"].group_alive():
            report.wrong.append(f"{self.cluster.encodes[spared].name} did not go on")

    def _one_succeeds(self, dice: random.Random, report: Report) -> float:
        def succeeds() -> bool:
            outcome = ask(self.cluster.url, dice.choice(QUESTIONS))
            if flaw := self.flaw(outcome):
                report.wrong.append(f"afterwards: {flaw}")
            return outcome.answer is not None and outcome.answer.ok

        return wait_until("a new request succeeds", succeeds, DEADLINE)

    def _recovers(self, dice: random.Random, report: Report) -> None:
        waited = self._one_succeeds(dice, report)
        before = self.cluster.successes()

        def both_serve() -> bool:
            self._one_succeeds(dice, report)
            return all(now > then for now, then in zip(self.cluster.successes(), before, strict=True))

        waited += wait_until("both encode instances serve", both_serve, RECOVERY)
        try:
            waited += wait_until("pools are full and tables empty", lambda: not self.cluster.under_way(), DEADLINE)
        except NotRecovered as problem:
            raise NotRecovered(f"{problem}: {self.cluster.under_way()}") from None
        report.recovery.append(waited)


# ---- all of it


@pytest.fixture(scope="module")
def trial(logs: Path) -> Iterator[Trial]:
    cluster = Cluster(logs / "strikes")
    with servers.running(cluster.all):
        trial = Trial(cluster)
        print(f"\nRELAY_STRESS_SEED={SEED}, rows go by {PLANE}", flush=True)
        print(f"{AT_ONCE} requests at once take {trial.batch_seconds:.1f} s undisturbed", flush=True)
        yield trial
    print_table(trial.reports)


STRUCK: Final = [fault for fault in FAULTS if STRIKES or EVERYTHING or fault.name in DAILY]


@pytest.mark.parametrize("fault", STRUCK, ids=[fault.name.replace(" ", "-") for fault in STRUCK])
@pytest.mark.parametrize("strike", range(1, max(STRIKES, 1) + 1))
def test_every_client_gets_an_answer_whatever_is_struck(trial: Trial, fault: Fault, strike: int) -> None:
    """The dice are this strike's own: with the same seed it draws the same moments, also when it runs alone."""
    assert trial.not_recovered is None, f"the cluster did not recover from {trial.not_recovered}"
    wrong = trial.strike(fault, random.Random(f"{SEED} {strike} {fault.name}"))
    print_line(fault.name, trial.reports[fault.name])
    assert wrong == []


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
    slowest = max((report.slowest for report in reports.values()), default=0.0)
    print(
        f"\nstrikes {sum(report.strikes for report in reports.values())}, requests {requests}, lost or wrong"
        f" {requests - answered}, slowest answer {slowest:.1f} s, threads left {threading.active_count() - 1}"
    )
