"""What a server says about itself at /metrics, and whether anything is left there of its requests."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from embedding_relay.metrics import PREFIX
from embedding_relay.tools.local_process import LocalProcess

# 0 when nothing is under way. What is remembered or kept open for a while on purpose is not among them.
EMPTY_AT_REST: Final = (
    *("rooms", "waiting_rooms", "followed_rooms", "open_requests", "parked_requests", "shared_rooms", "transfers"),
    *("source_rooms", "leased_blocks", "quarantined_blocks", "quarantined_rooms", "unquiet_rooms"),
    *("unexpected_rooms", "contested_sessions"),
    *("sglang:num_running_reqs", "sglang:num_queue_reqs"),
)


def numbers_of(server: LocalProcess) -> dict[str, float]:
    """Ours without their prefix, SGLang's by their whole names; one with a label of its own is `name{label}`."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = [sample.labels[label] for label in ("status_code", "event", "le") if label in sample.labels]
            name = sample.name.removeprefix(PREFIX) + "".join(f"{{{label}}}" for label in own)
            found[name] = found.get(name, 0.0) + sample.value
    return found


def not_at_rest(numbers: Mapping[str, float]) -> list[str]:
    """What is not as it is when nothing is under way."""
    busy = [f"{name} {numbers[name]:g}" for name in EMPTY_AT_REST if numbers.get(name)]
    if numbers["free_blocks"] != numbers["pool_blocks"]:
        busy.append(f"free_blocks {numbers['free_blocks']:g} of {numbers['pool_blocks']:g}")
    return busy


def scheduler_of(server: LocalProcess) -> int:
    """The process that does the work; the others of its group talk HTTP and make text."""
    for pid in server.group_members():
        with suppress(OSError):  # it ended meanwhile
            if b"sglang::scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise RuntimeError(f"{server.name} has no scheduler")
