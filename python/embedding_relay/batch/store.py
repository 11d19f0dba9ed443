"""What workers share: small values under keys, changed atomically, and claims that run out by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class StoreAway(Exception):
    """The store cannot be reached, or cannot write, just now. Nothing is known to have changed."""


class Store(Protocol):
    """Two implementations, one contract (test/srt/batch/test_stores.py). Every method is safe from any process."""

    def create(self, key: str, value: bytes, seconds: float) -> bool:
        """Keep `value` for `seconds`, unless the key is there already; the answer is whether it was kept."""

    def get(self, key: str) -> bytes | None: ...

    def change(self, key: str, seconds: float, by: Callable[[bytes], bytes]) -> bytes | None:
        """Replace the value by what `by` makes of it, as one step that no other worker can come between.

        `by` may be called more than once, so it must do nothing else. What it raises is raised here, and then nothing
        has changed. The value lives for `seconds` from now. None when there is no such key.
        """

    def delete(self, key: str) -> bool:
        """Whether it was there."""

    def keys(self, prefix: str) -> list[str]: ...

    def claim(self, name: str, holder: str, seconds: float) -> bool:
        """Become, or stay, the only holder of `name` for `seconds` from now; False while somebody else is."""

    def release(self, name: str, holder: str) -> None:
        """Give `name` up, if this holder has it."""

    def close(self) -> None: ...


def open_store(where: str) -> Store:
    """`redis://…` (and `rediss://`, `unix://`) is Redis; anything else is a directory for diskcache."""
    if where.partition(":")[0] in ("redis", "rediss", "unix"):
        from embedding_relay.batch.redis_store import RedisStore

        return RedisStore(where)
    from embedding_relay.batch.disk_store import DiskStore

    return DiskStore(where)
