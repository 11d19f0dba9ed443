"""The pairs of encode and language instance of the e2e lane: each serves all modules that name its settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from embedding_relay.tools import local_cluster, tiny_model
from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_process import LocalProcess, free_ports
from support import adapters, servers
from support.patience import wait_until
from support.server_numbers import not_at_rest, numbers_of

# What a test reads: numbers at rest, and whether a prefix was in the cache.
REPORT: Final = ("--enable-metrics", "--enable-cache-report")

# For everything in the small pair that waits for somebody who does not come; longer than its largest picture takes.
DEADLINE: Final = 10
# Of the small pair, so that one request can be too long for it.
CONTEXT: Final = 1200
# Of the small pair, so that a test can fill it.
MOST_WAITING: Final = 12
# Of the small pair and its undivided server, so that the language model takes a long prompt in several pieces, ...
CHUNK: Final = 256
# ... that requests wait for others, ...
MOST_RUNNING: Final = 8
# ... and that those that run together need more of the KV pool than there is. What one module asks for fits in.
KV_TOKENS: Final = 3000
# The name of the LoRA adapter that they have.
ADAPTER: Final = "tiny"


@dataclass(frozen=True)
class Settings:
    """Of one pair. Tests that name equal settings get the same pair."""

    family: str
    block_size: int
    blocks: int
    default: int
    """Rows of the first round."""
    arguments: tuple[str, ...] = REPORT
    adapter: bool = False
    """Whether the servers that generate have a LoRA adapter. The encode instance has none, and need not know."""
    tokenizer_workers: int = 1
    """Of each half. An undivided server has one: others of its workers would load no plugin, and so no video."""
    environ: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.family}-{self.blocks}x{self.block_size}"

    def rounds(self, rows: int) -> int:
        """That so many rows take, alone: at a resume a request may take more blocks, but never the last free one."""
        later = max(self.default, (self.blocks - 1) * self.block_size)
        return 1 + math.ceil(max(0, rows - self.default) / later)

    def options(self, logs: Path) -> local_cluster.Options:
        pool = {
            "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": str(self.block_size),
            "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": str(self.blocks),
            "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": str(self.default),
        }
        model = tiny_model.cached(self.family)
        workers = ("--tokenizer-worker-num", str(self.tokenizer_workers))
        return servers.options(model, logs / self.name, *self.arguments, *workers, **pool, **dict(self.environ))

    def undivided(self, logs: Path) -> local_cluster.Options:
        """Of a server with the same flags that this pair is compared with."""
        model = tiny_model.cached(self.family)
        return servers.options(model, logs, *self.arguments, *self.generating(logs))

    def generating(self, logs: Path) -> tuple[str, ...]:
        """Flags of the servers that generate."""
        if not self.adapter:
            return ()
        adapter = adapters.make(logs / f"adapter-{self.family}", tiny_model.cached(self.family))
        return ("--lora-paths", f"{ADAPTER}={adapter}", "--lora-backend", "torch_native", "--max-loras-per-batch", "2")


# So small that every request with an image resumes, and impatient; and with everything that SGLang's scheduler offers.
SMALL: Final = Settings(
    *("qwen2_5_vl", 16, 4, 16),
    arguments=(
        *(*REPORT, "--context-length", str(CONTEXT), "--chunked-prefill-size", str(CHUNK), "--enable-mixed-chunk"),
        *("--max-total-tokens", str(KV_TOKENS), "--max-running-requests", str(MOST_RUNNING)),
        # Admitted as if nobody generated much: then the pool runs out.
        *("--schedule-conservativeness", "0.01", "--enable-priority-scheduling"),
        # Random weights may prefer white space for ever.
        "--constrained-json-disable-any-whitespace",
    ),
    adapter=True,
    environ=(
        ("SGLANG_EMBEDDING_DATA_PLANE", "mooncake"),  # on one host, where the large pair's rows take the shorter way
        ("SGLANG_EMBEDDING_MAX_WAITING_REQUESTS", str(MOST_WAITING)),
        # Longer: where both halves wait from the same moment on, the one whose answer is compared must give up first.
        ("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", str(DEADLINE + 3)),
        ("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", str(DEADLINE)),
    ),
)
# Its family has the wider rows, those with deepstack. Most requests need no resume, a burst of them needs many.
LARGE: Final = Settings("qwen3_vl", 128, 8, 256, tokenizer_workers=2)
# Compared with the undivided server only when asked for.
OTHERS: Final = (Settings("qwen2_5_vl", 128, 64, 256), Settings("qwen3_vl", 16, 4, 16))


@dataclass(frozen=True)
class Pair:
    settings: Settings
    cluster: LocalCluster

    @property
    def url(self) -> str:
        """The router's."""
        return self.cluster.url

    @property
    def family(self) -> str:
        return self.settings.family

    @property
    def bootstrap_port(self) -> int:
        """Of the encode instance."""
        command = self["encode"].command
        return int(command[command.index("--disaggregation-bootstrap-port") + 1])

    def __getitem__(self, name: str) -> LocalProcess:
        return self.cluster[name]

    def wait_until_at_rest(self) -> None:
        """Nothing is left of any request, on either half."""
        for server in (self["encode"], self["language"]):
            wait_until(lambda server=server: not not_at_rest(numbers_of(server)))  # type: ignore[misc]


@contextmanager
def running(settings: Settings, logs: Path) -> Iterator[Pair]:
    cluster = local_cluster.relay(settings.options(logs), language_arguments=settings.generating(logs))
    with servers.running(cluster) as started:
        yield Pair(settings, started)


@contextmanager
def undivided(logs: Path) -> Iterator[dict[str, LocalProcess]]:
    """By family, the servers that pairs are compared with. They start together: one alone would leave a core idle."""
    members = {
        settings.family: local_cluster.sglang_server(
            f"undivided-{settings.family}", settings.undivided(logs), *free_ports(1)
        )
        for settings in (SMALL, LARGE)
    }
    with servers.running(LocalCluster("", [list(members.values())])):
        yield members
