"""The store for workers on several machines: Redis."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Final, cast

import redis

from embedding_relay.batch.store.contract import CLAIM_KEPT, StoreAway, Watch, claim_of, holder_of

logger = logging.getLogger(__name__)

PREFIX: Final = "sglang-relay:batch:"
PATIENCE_SECONDS: Final = 5.0

# Each returns 1 or 0, and does nothing unless the value is still the one that was looked at.
REPLACE: Final = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('set', KEYS[1], ARGV[2], 'px', ARGV[3])
return 1
"""
REMOVE: Final = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('del', KEYS[1])
"""


# The first that fits counts.
REASONS: Final = (
    (redis.exceptions.BusyLoadingError, "Redis is still loading its data"),
    (redis.exceptions.AuthenticationError, "Redis wants another user or password"),
    (redis.exceptions.AuthorizationError, "Redis wants another user or password"),
    (redis.exceptions.TimeoutError, f"Redis has not answered within {PATIENCE_SECONDS:g} s"),
    (redis.exceptions.ConnectionError, "Redis cannot be reached"),
    (redis.exceptions.OutOfMemoryError, "Redis is out of memory"),
    (redis.exceptions.ReadOnlyError, "this Redis is a copy that cannot be written"),
    (redis.exceptions.NoPermissionError, "Redis does not allow it to this user"),
)


def _milliseconds(seconds: float) -> int:
    return max(1, round(1000 * seconds))


class RedisStore:
    def __init__(self, url: str) -> None:
        # Without these time-outs TCP would wait many minutes for a Redis whose machine is gone. The client is given no
        # retries: what got no answer may have been done.
        try:
            self._redis = redis.Redis.from_url(
                url, socket_timeout=PATIENCE_SECONDS, socket_connect_timeout=PATIENCE_SECONDS
            )
        except ValueError:
            raise ValueError("the store's URL must be like redis://:PASSWORD@HOST:6379/0") from None
        self._replace = self._redis.register_script(REPLACE)
        self._remove = self._redis.register_script(REMOVE)
        self._watch = Watch()

    def create(self, key: str, value: bytes, seconds: float) -> bool:
        with _mapped():
            return bool(self._redis.set(PREFIX + key, value, nx=True, px=_milliseconds(seconds)))

    def get(self, key: str) -> bytes | None:
        with _mapped():
            return cast("bytes | None", self._redis.get(PREFIX + key))

    def change(self, key: str, seconds: float, by: Callable[[bytes], bytes]) -> bytes | None:
        with _mapped():
            while (before := cast("bytes | None", self._redis.get(PREFIX + key))) is not None:
                after = by(before)
                if self._replace([PREFIX + key], [before, after, _milliseconds(seconds)]):
                    return after
                # Another worker changed it meanwhile: again, from what it left.
            return None

    def delete(self, key: str) -> bool:
        with _mapped():
            return bool(self._redis.delete(PREFIX + key))

    def keys(self, prefix: str) -> list[str]:
        # Glob characters of the prefix are put in brackets, so that they stand for themselves.
        pattern = "".join(f"[{letter}]" if letter in "*?[\\" else letter for letter in PREFIX + prefix) + "*"
        with _mapped():
            found = {key.decode() for key in self._redis.scan_iter(pattern, count=1000)}
        return [key.removeprefix(PREFIX) for key in found]

    def claim(self, name: str, holder: str, seconds: float) -> bool:
        key, kept = f"{PREFIX}claim:{name}", _milliseconds(CLAIM_KEPT)
        with _mapped():
            while True:
                before = cast("bytes | None", self._redis.get(key))
                after = claim_of(holder, seconds)
                if before is None:
                    taken = self._redis.set(key, after, nx=True, px=kept)
                elif holder_of(before.decode()) == holder or self._watch.has_run_out(name, before.decode()):
                    taken = self._replace([key], [before, after, kept])
                else:
                    return False
                if taken:
                    self._watch.forget(name)
                    return True
                # Somebody has claimed it, or given it up, since we looked.

    def release(self, name: str, holder: str) -> None:
        key = f"{PREFIX}claim:{name}"
        with _mapped():
            before = cast("bytes | None", self._redis.get(key))
            if before is not None and holder_of(before.decode()) == holder:
                self._remove([key], [before])

    def close(self) -> None:
        self._redis.close()


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        logger.debug("batch: Redis: %s", error)
        raise StoreAway(f"the session store cannot be used: {_why(error)}") from error


def _why(error: redis.RedisError) -> str:
    return next((words for kind, words in REASONS if isinstance(error, kind)), "Redis refuses it, see the log")
