"""What has grown between the two rests of a soak, as a table and as a list of failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from soak_watch import HALVES, MIB, Moment, memory_growth, second_half

REMEMBERED_FOR: Final = 600.0
FEWEST_SAMPLES: Final = 10


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
