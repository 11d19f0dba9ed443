"""What a soak looks at: memory, descriptors and threads of every process of a cluster, and its published numbers."""

from __future__ import annotations

import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_numbers import not_at_rest, numbers_of
from embedding_relay.tools.local_process import LocalProcess

MIB: Final = 2**20
SETTLED: Final = 8.0
# asyncio's pool of an HTTP server starts a thread when two tasks happen to coincide, keeps it, and stops at this many.
POOLED_THREADS: Final = min(32, (os.cpu_count() or 1) + 4)
"""Longer than an HTTP connection is kept for another request."""
HALVES: Final = ("encode", "language")

# Kept at rest, and never more of it for the same pair.
KEPT: Final = ("sessions", "peers", "workers", "connections", "pool_blocks")


# ---- processes


class Holding(NamedTuple):
    """What one process has at one moment.

    `memory` is anonymous and shared memory. The pages of files (libraries, weights) are left out: how many of them
    count as ours depends on what else runs on the machine.
    """

    memory: int
    descriptors: int
    threads: int


def processes_of(cluster: LocalCluster) -> dict[str, int]:
    """Name -> pid of every process, told apart by what each is called."""
    found: dict[str, int] = {}
    for member in cluster.members:
        for pid in sorted(member.group_members()):
            if (role := _role(pid, member)) is not None:
                found[f"{member.name} {role}".strip()] = pid
    return found


def _role(pid: int, member: LocalProcess) -> str | None:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    if pid == member.pid:
        return "http" if member.name in HALVES else ""
    if words.startswith("sglang::"):
        return re.sub(r"[^a-z].*", "", words.removeprefix("sglang::"))
    return None  # Python's own helpers of a process, which hold nothing


def holding(pid: int) -> Holding:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(re.findall(r"(\w+):\s+(\d+)", status))
    memory = 1024 * (int(fields["RssAnon"]) + int(fields["RssShmem"]))
    return Holding(memory, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]))


# ---- all of it, over time


@dataclass(frozen=True)
class Moment:
    at: float
    processes: Mapping[str, Holding]
    numbers: Mapping[str, Mapping[str, float]]

    @property
    def unrest(self) -> list[str]:
        """What is not as it is when nothing is under way."""
        return [f"{half}: {what}" for half, numbers in self.numbers.items() for what in not_at_rest(numbers)]

    @property
    def held_open(self) -> dict[str, tuple[int, int]]:
        return {name: (held.descriptors, held.threads) for name, held in self.processes.items()}

    def more_than(self, before: Moment) -> list[str]:
        """What there is more of than there was, of that which time does not take away again."""
        found = []
        for name, held in self.processes.items():
            for what, allowed in (("descriptors", 0), ("threads", POOLED_THREADS if name.endswith(" http") else 0)):
                was, now = getattr(before.processes[name], what), getattr(held, what)
                if now > was + allowed:
                    found.append(f"{name}: {now} {what}, {was} before")
        for half, numbers in self.numbers.items():
            for what in KEPT:
                was, now = before.numbers[half].get(what, 0), numbers.get(what, 0)
                if now > was:
                    found.append(f"{half}: {now:g} {what}, {was:g} before")
        return found


class Watch:
    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.pids = processes_of(cluster)
        self.moments: list[Moment] = []

    def look(self) -> Moment:
        numbers = {half: numbers_of(self._cluster[half]) for half in HALVES}
        held = {name: holding(pid) for name, pid in self.pids.items()}
        return Moment(time.monotonic(), held, numbers)

    def sample(self) -> Moment:
        self.moments.append(self.look())
        return self.moments[-1]

    def rest(self, before: Moment | None, patience: float) -> Moment:
        """The first moment at which nothing is under way, nothing has changed for a while, and nothing has come on top.

        Or the last one that there was time for.
        """
        deadline = time.monotonic() + patience
        moment = self.look()
        unchanged_since = moment.at
        while moment.at < deadline:
            time.sleep(0.5)
            previous, moment = moment, self.look()
            if moment.unrest or moment.held_open != previous.held_open:
                unchanged_since = moment.at
            elif moment.at - unchanged_since >= SETTLED and not (before and moment.more_than(before)):
                break
        return moment


# ---- growth


class Growth(NamedTuple):
    """A straight line through points: by how much it rises from the first to the last, and how sure that is."""

    rise: float
    uncertainty: float

    @property
    def certain(self) -> float:
        return max(0.0, self.rise - self.uncertainty)


def growth(points: Sequence[tuple[float, float]]) -> Growth:
    """`uncertainty` is three standard errors, wider by what neighbouring points have in common."""
    times, values = zip(*points, strict=True)
    slope, offset = statistics.linear_regression(times, values)
    residuals = [value - (offset + slope * at) for at, value in points]
    spread = math.sqrt(sum(residual**2 for residual in residuals) / (len(points) - 2))
    scatter = math.sqrt(sum((at - statistics.fmean(times)) ** 2 for at in times))
    length = times[-1] - times[0]
    return Growth(slope * length, 3 * spread / scatter * length * _widened(residuals))


def _widened(residuals: Sequence[float]) -> float:
    """Memory moves in steps, so a sample tells little that the one before did not: they count as fewer."""
    total = sum(residual**2 for residual in residuals)
    if total == 0:
        return 1.0
    pairs = itertools.pairwise(residuals)
    likeness = min(0.95, max(0.0, sum(one * other for one, other in pairs) / total))
    return math.sqrt((1 + likeness) / (1 - likeness))


def second_half(moments: Sequence[Moment]) -> Sequence[Moment]:
    middle = (moments[0].at + moments[-1].at) / 2
    return [moment for moment in moments if moment.at >= middle]


def memory_growth(moments: Iterable[Moment], process: str) -> Growth:
    return growth([(moment.at, moment.processes[process].memory) for moment in moments])
