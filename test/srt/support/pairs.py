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
from embedding_relay.tools.local_process import LocalProcess
from support import servers

# What a test reads: numbers at rest, and whether a prefix was in the cache.
REPORT: Final = ("--enable-metrics", "--enable-cache-report")

# For everything in the small pair that waits for somebody who does not come; longer than its largest picture takes.
DEADLINE: Final = 10
# Of the small pair, so that one request can be too long for it.
CONTEXT: Final = 1200
# Of the small pair, so that a test can fill it.
MOST_WAITING: Final = 12


@dataclass(frozen=True)
class Settings:
    """Of one pair. Tests that name equal settings get the same pair."""

    family: str
    block_size: int
    blocks: int
    default: int
    """Rows of the first round."""
    arguments: tuple[str, ...] = REPORT
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
        return servers.options(model, logs / self.name, *self.arguments, **pool, **dict(self.environ))


# So small that every request with an image resumes, and impatient.
SMALL: Final = Settings(
    *("qwen2_5_vl", 16, 4, 16),
    arguments=(*REPORT, "--context-length", str(CONTEXT)),
    environ=(
        ("SGLANG_EMBEDDING_MAX_WAITING_REQUESTS", str(MOST_WAITING)),
        # Longer: where both halves wait from the same moment on, the one whose answer is compared must give up first.
        ("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", str(DEADLINE + 3)),
        ("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", str(DEADLINE)),
    ),
)
# Its family has the wider rows, those with deepstack. Most requests need no resume, a burst of them needs many.
LARGE: Final = Settings("qwen3_vl", 128, 8, 256, arguments=(*REPORT, "--tokenizer-worker-num", "2"))
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

    def __getitem__(self, name: str) -> LocalProcess:
        return self.cluster[name]


@contextmanager
def running(settings: Settings, logs: Path) -> Iterator[Pair]:
    with servers.running(local_cluster.relay(settings.options(logs))) as cluster:
        yield Pair(settings, cluster)
