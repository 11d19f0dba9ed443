"""The store for the workers of one machine: a diskcache (SQLite) file."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, cast

import diskcache

from embedding_relay.batch.store.contract import CLAIM_KEPT, StoreAway, Watch, claim_of, holder_of

# Waiting for another worker's transaction; they take well under a millisecond.
PATIENCE_SECONDS = 60.0
# By SQLite's codes, of which longer ones begin with a shorter one.
REASONS = {
    "SQLITE_FULL": "its disk is full",
    "SQLITE_READONLY": "its file cannot be written",
    "SQLITE_CANTOPEN": "its file cannot be opened",
    "SQLITE_PERM": "its file cannot be opened",
    "SQLITE_CORRUPT": "its file is damaged",
    "SQLITE_NOTADB": "its file is damaged",
    "SQLITE_IOERR": "its disk fails",
}


class DiskStore:
    def __init__(self, cache: diskcache.Cache) -> None:
        self._cache = cache
        self._watch = Watch()

    @classmethod
    def open(cls, directory: str) -> DiskStore:
        with _mapped():
            return cls(
                diskcache.Cache(
                    directory,
                    timeout=PATIENCE_SECONDS,
                    # Nothing is evicted: a session that vanished would be the bug that this service exists for.
                    eviction_policy="none",
                    size_limit=2**62,
                    # diskcache puts large values into files of their own, and reports one that is replaced while it is
                    # being read as a key that does not exist.
                    disk_min_file_size=2**62,
                )
            )

    def create(self, key: str, value: bytes, seconds: float) -> bool:
        with self._transaction() as cache:
            return bool(cache.add(key, value, expire=seconds))

    def get(self, key: str) -> bytes | None:
        with _mapped():
            return cast("bytes | None", self._cache.get(key, retry=True))

    def change(self, key: str, seconds: float, by: Callable[[bytes], bytes]) -> bytes | None:
        with self._transaction() as cache:
            before = cast("bytes | None", cache.get(key))
            if before is None:
                return None
            after = by(before)
            cache.set(key, after, expire=seconds)
            return after

    def delete(self, key: str) -> bool:
        with self._transaction() as cache:
            return bool(cache.delete(key))

    def keys(self, prefix: str) -> list[str]:
        with _mapped():
            # Expired keys are listed until diskcache sweeps them up, so each one is looked up.
            return [key for key in list(self._cache.iterkeys()) if key.startswith(prefix) and key in self._cache]

    def claim(self, name: str, holder: str, seconds: float) -> bool:
        key = f"claim:{name}"
        with _mapped():
            if self._is_anothers(name, holder, self._cache.get(key, retry=True)):
                return False  # without a transaction: all workers ask this all the time, and these they wait for
        with self._transaction() as cache:
            if self._is_anothers(name, holder, cache.get(key)):
                return False
            cache.set(key, claim_of(holder, seconds), expire=CLAIM_KEPT)
        self._watch.forget(name)
        return True

    def _is_anothers(self, name: str, holder: str, claim: str | None) -> bool:
        return claim is not None and holder_of(claim) != holder and not self._watch.has_run_out(name, claim)

    def release(self, name: str, holder: str) -> None:
        key = f"claim:{name}"
        with self._transaction() as cache:
            before = cast("str | None", cache.get(key))
            if before is not None and holder_of(before) == holder:
                cache.delete(key)

    def close(self) -> None:
        self._cache.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """One step that no other process can come between."""
        with _mapped(), self._cache.transact():
            yield self._cache


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except diskcache.Timeout as error:
        raise StoreAway(f"the session store could not be locked within {PATIENCE_SECONDS:g} s") from error
    except sqlite3.Error as error:
        raise StoreAway(f"the session store cannot be used: {_why(error)}") from error


def _why(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorname", "") or type(error).__name__
    return next((words for start, words in REASONS.items() if code.startswith(start)), f"SQLite reports {code}")
