"""What an operator can set about batch sessions: filled in from the command line, handed to each worker process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.url_rules import UrlRules

DAY: Final = 86_400.0
MIB: Final = 2**20

CACHE_DIR: Final = "SESSION_CACHE_DIR"
API_KEY: Final = "SESSION_API_KEY"
ENDPOINT_API_KEY: Final = "SESSION_ENDPOINT_API_KEY"
STORE: Final = "SESSION_STORE"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    endpoint: str
    cache_dir: Path
    store: str = ""  # a Redis URL; "" is diskcache in `cache_dir`
    files: str = ""  # a URL for fsspec, where machines share no file system; "" is `cache_dir` alone
    host: str = "127.0.0.1"
    port: int = 8600
    workers: int = 4
    concurrency: int = 32
    # Of all workers together: runs at the same time, and requests in flight in all of them; 0 is as many as these runs
    # may have with the concurrency above.
    max_runs: int = 8
    max_in_flight: int = 0
    retries: int = 5
    request_seconds: float = 600.0
    batch_rows: int = 256
    keep_seconds: float = 7 * DAY
    upload_mib: int = 200
    expanded_mib: int = 2048
    rows: int = 1_000_000
    allow_private_urls: bool = False
    allowed_media_domains: tuple[str, ...] = ()
    api_key: str = ""
    endpoint_api_key: str = ""
    # A worker that has not renewed its lease for so long counts as dead, and another takes over its work.
    lease_seconds: float = 10.0
    scan_seconds: float = 2.0

    @property
    def limits(self) -> Limits:
        return Limits(upload_bytes=self.upload_mib * MIB, expanded_bytes=self.expanded_mib * MIB, rows=self.rows)

    @property
    def url_rules(self) -> UrlRules:
        return UrlRules(allowed_domains=self.allowed_media_domains, allow_private=self.allow_private_urls)

    @property
    def most_in_flight(self) -> int:
        return self.max_in_flight or self.max_runs * self.concurrency

    @property
    def store_place(self) -> str:
        return self.store or str(self.cache_dir / "store")

    @property
    def sessions_dir(self) -> Path:
        return self.cache_dir / "sessions"


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    if set_by_hand := environ.get(CACHE_DIR):
        return Path(set_by_hand)
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-embedding-relay" / "batch"


def default_store(environ: Mapping[str, str] = os.environ) -> str:
    return environ.get(STORE, "")


def from_environment(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The keys: everybody on the machine can read a command line, so they are not options."""
    return {
        "api_key": environ.get(API_KEY, ""),
        "endpoint_api_key": environ.get(ENDPOINT_API_KEY, ""),
    }
