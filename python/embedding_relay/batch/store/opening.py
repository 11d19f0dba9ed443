"""Which store an address means: Redis for a URL, diskcache for a directory. Only the one that is meant is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedding_relay.batch.store.contract import Store

if TYPE_CHECKING:
    from embedding_relay.batch.store.mirror import Mirror


def open_store(where: str) -> Store:
    """`redis://…` (and `rediss://`, `unix://`) is Redis; anything else is a directory for diskcache."""
    if where.partition(":")[0] in ("redis", "rediss", "unix"):
        from embedding_relay.batch.store.redis_store import RedisStore

        return RedisStore(where)
    from embedding_relay.batch.store.disk_store import DiskStore

    return DiskStore.open(where)


def open_mirror(url: str) -> Mirror | None:
    """None where all workers share the directory with the files."""
    if not url:
        return None
    from embedding_relay.batch.store.mirror import Mirror

    return Mirror.open(url)
