"""Does anything grow? Memory, descriptors, threads and published numbers of a cluster over time, and the verdict.

Memory that grows is told from memory that moves: a line is laid through the second half of the samples, when caches
and allocators have found their size, and its rise counts as far as it exceeds three standard errors of its own. What is
left may be up to an allowance: glibc's arenas go on fragmenting for a while, in steps of a few MiB, and no short test
can tell that from a leak. So the longer the run the smaller a leak it finds.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_process import LocalProcess
from support.server_numbers import not_at_rest, numbers_of

MIB: Final = 2**20
HALVES: Final = ("encode", "language")

# Longer than an HTTP connection is kept for another request.
SETTLED: Final = 8.0
# asyncio's pool of an HTTP server starts a thread when two tasks happen to coincide, keeps it, and stops at this many.
POOLED_THREADS: Final = min(32, (os.cpu_count() or 1) + 4)
# The sides forget a room that is over after this long.
REMEMBERED_FOR: Final = 600.0
FEWEST_SAMPLES: Final = 10

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


# ---- the verdict


@dataclass(frozen=True)
class Verdict:
    """`first` and `last` are the rests before and after, `moments` the samples between them."""

    first: Moment
    last: Moment
    moments: Sequence[Moment]
    allowed_mib: float

    def problems(self) -> list[str]:
        return [
            *(f"at rest before: {what}" for what in self.first.unrest),
            *(f"at rest after: {what}" for what in self.last.unrest),
            *self.last.more_than(self.first),
            *self._remembered(),
            *self._memory(),
            *self._rounds(),
        ]

    def _memory(self) -> Iterator[str]:
        if len(second_half(self.moments)) < FEWEST_SAMPLES:
            yield f"only {len(self.moments)} samples: too few to tell whether memory grew"
            return
        for name in self.last.processes:
            grown = memory_growth(second_half(self.moments), name)
            if grown.certain > self.allowed_mib * MIB:
                rise = f"{grown.rise / MIB:.1f} (+-{grown.uncertainty / MIB:.1f}) MiB"
                yield f"{name}: memory grew by {rise} in the second half"

    def _remembered(self) -> Iterator[str]:
        """Rooms that are over are remembered for ten minutes, and no longer."""
        since = self.last.at - REMEMBERED_FOR
        for half in HALVES:
            earlier = [moment for moment in (self.first, *self.moments) if moment.at < since]
            recent = self._ended(self.last, half) - (self._ended(earlier[-1], half) if earlier else 0)
            remembered = self.last.numbers[half]["remembered_rooms"]
            if remembered > recent:
                yield f"{half}: {remembered:g} rooms are remembered, {recent:g} ended in the last {REMEMBERED_FOR:g} s"

    @staticmethod
    def _ended(moment: Moment, half: str) -> float:
        return sum(value for name, value in moment.numbers[half].items() if name.startswith("requests_total{"))

    def _rounds(self) -> Iterator[str]:
        if single := self.last.numbers["language"]["request_rounds_bucket{1.0}"]:
            yield f"{single:g} requests came over in one round: the pool is too large for this test"

    # ---- tables

    def process_table(self) -> Iterator[str]:
        yield f"{'':<22} {'MiB at rest':>15} {'rise in 2nd half':>18} {'descriptors':>12} {'threads':>10}"
        for name, last in self.last.processes.items():
            first, grown = self.first.processes[name], memory_growth(second_half(self.moments), name)
            memory = f"{first.memory / MIB:.1f} -> {last.memory / MIB:.1f}"
            rise = f"{grown.rise / MIB:+.2f} +-{grown.uncertainty / MIB:.2f}"
            descriptors = f"{first.descriptors} -> {last.descriptors}"
            yield f"{name:<22} {memory:>15} {rise:>18} {descriptors:>12} {f'{first.threads} -> {last.threads}':>10}"

    def number_table(self) -> Iterator[str]:
        for half in HALVES:
            first, last = self.first.numbers[half], self.last.numbers[half]
            for name, value in sorted(last.items()):
                if name.startswith("sglang:") or "_bucket{" in name or name.endswith("_created"):
                    continue
                yield f"{half:<9} {name:<34} {first.get(name, 0):>14g} -> {value:g}"

    def smallest_leak(self) -> float:
        """Bytes per request of the whole pair that this run would have called a failure."""
        late = second_half(self.moments)
        requests = self._ended(late[-1], "language") - self._ended(late[0], "language")
        unsure = max(memory_growth(late, name).uncertainty for name in self.last.processes)
        return (self.allowed_mib * MIB + unsure) / max(requests, 1)
