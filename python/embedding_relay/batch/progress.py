"""The progress bar of `sglang-relay batch run`: bar and count stay in view on 80 columns, whatever there is to say."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from embedding_relay.batch.session.records import Counts, Session

# What stands before the bar. On 80 columns it leaves room for the count, the time and a short bar.
LONGEST: Final = 14
# After so long without trouble, trouble is new: in seconds, and as a part of the time after which it gives up.
QUIET_SECONDS: Final = 5.0
QUIET_PART: Final = 0.1
FORMAT: Final = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """`with` it, `show` it every moment. Why nothing is asked is said once, above the bar, in a line of its own."""

    def __init__(
        self, rows: int, give_up_after: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from tqdm import tqdm  # a workbook that cannot be used needs none

        self._bar = tqdm(total=rows, bar_format=FORMAT, dynamic_ncols=True)
        self._give_up_after = give_up_after
        self._clock = clock
        self._told = ""
        self._finished = 0
        self._troubled_since: float | None = None
        self._quiet_since: float | None = None
        self.given_up = ""  # why, once it has lasted too long

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, session: Session) -> None:
        execution = session.execution
        if not execution.total:
            self._describe(session.split.message or "analysed")
            return
        counts = execution.counts
        self._tell(counts)
        self._watch(counts)
        self._bar.total = execution.total
        self._bar.n = counts.done + counts.failed
        rate = f"{counts.rate:.1f} rows/s" if counts.rate and not counts.trouble else ""
        failed = f"{counts.failed} failed" if counts.failed else ""
        self._bar.set_postfix_str(", ".join(filter(None, (failed, rate))), refresh=False)
        self._describe(counts.trouble or execution.message)

    def _describe(self, text: str) -> None:
        self._bar.set_description_str(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")

    def _tell(self, counts: Counts) -> None:
        if counts.trouble and counts.trouble != self._told:
            self._told = counts.trouble
            self._bar.write(self._sentence(counts), file=sys.stderr)
        elif self._told and counts.done + counts.failed > self._finished:
            self._told = ""
            self._bar.write("the endpoint answers again", file=sys.stderr)

    def _sentence(self, counts: Counts) -> str:
        """Without how often it is asked again, which changes: this line stays."""
        limit = "" if self._give_up_after is None else f", up to {self._give_up_after:g} s"
        return f"{counts.waiting.partition(';')[0]}; waiting for it{limit}"

    def _watch(self, counts: Counts) -> None:
        """How long there has been trouble and no row has come to its end. A moment of hope is no end of it."""
        now, finished = self._clock(), counts.done + counts.failed
        if not counts.waiting:
            self._quiet_since = now if self._quiet_since is None else self._quiet_since
        elif self._quiet_since is not None:
            if now - self._quiet_since > max(QUIET_SECONDS, QUIET_PART * (self._give_up_after or 0.0)):
                self._troubled_since = None
            self._quiet_since = None
        if finished != self._finished:
            self._finished, self._troubled_since = finished, None
        if not counts.waiting:
            return
        if self._troubled_since is None:
            self._troubled_since = now
        if self._give_up_after is not None and now - self._troubled_since >= self._give_up_after:
            self.given_up = f"gave up after {self._give_up_after:g} s: {counts.waiting.partition(';')[0]}"
