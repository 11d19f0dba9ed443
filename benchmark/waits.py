"""A plugin of SGLang that `overlap.py` gives to its servers: tower and prefill take as long as they are told to.

A device is simulated by waiting, in the thread that made the call, for what the call has not taken by itself. How long
each call took is noted, and each write of rows to another instance too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

VARIABLE: Final = "RELAY_BENCHMARK_WAITS"
"""The environment variable that names a folder with both files; without it nothing waits and nothing is noted."""
WAITS: Final = "waits.json"
"""Read at each call, so that the same servers can be given other times."""
NOTES: Final = "stages"

TOWER, WIRE, PREFILL = "tower", "wire", "prefill"
TOWER_MS: Final = "tower_ms"
"""For each item that is not in SGLang's cache."""
PREFILL_MS: Final = "prefill_ms"
"""For each thousand tokens that are not in SGLang's cache."""

_Original = Callable[..., Any]


def install() -> None:
    """Called by SGLang in each process of a server."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    stages = Stages(Path(path))
    for target, around in stages.targets().items():
        HookRegistry.register(target, around, HookType.AROUND)


class Stages:
    def __init__(self, folder: Path) -> None:
        self._waits = folder / WAITS
        self._notes = os.open(folder / NOTES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def targets(self) -> dict[str, Callable[..., Any]]:
        return {
            "sglang.srt.disaggregation.multimodal.tower.VisionTower.encode": self.encode,
            "sglang.srt.managers.scheduler.Scheduler.run_batch": self.run_batch,
            "embedding_relay.transport.workers.ChunkJob.write": self.write,
        }

    def encode(self, original: _Original, tower: Any, *arguments: Any) -> Any:
        began, before = time.monotonic_ns(), tower.totals["encoded_items"]
        result = original(tower, *arguments)
        items = tower.totals["encoded_items"] - before
        self._end(TOWER, began, items, items * self._told()[TOWER_MS])
        return result

    def run_batch(self, original: _Original, scheduler: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        began = time.monotonic_ns()
        tokens = batch.extend_num_tokens if batch.forward_mode.is_extend() else 0
        result = original(scheduler, batch, *arguments, **options)
        if tokens:
            self._end(PREFILL, began, tokens, tokens * self._told()[PREFILL_MS] / 1000)
        return result

    def write(self, original: _Original, job: Any, *arguments: Any) -> None:
        began, before = time.monotonic_ns(), job.bytes
        original(job, *arguments)
        self._end(WIRE, began, job.bytes - before, 0.0)

    def _told(self) -> dict[str, float]:
        told: dict[str, float] = json.loads(self._waits.read_text())
        return told

    def _end(self, stage: str, began: int, amount: int, least_ms: float) -> None:
        time.sleep(max(0.0, (began + least_ms * 1e6 - time.monotonic_ns()) / 1e9))
        note = {"stage": stage, "began": began, "ended": time.monotonic_ns(), "amount": int(amount)}
        os.write(self._notes, f"{json.dumps(note)}\n".encode())
