"""The store for workers on several machines: Redis."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Final, cast

import redis

from embedding_relay.batch.store.contract import StoreAway

PREFIX: Final = "sglang-relay:batch:"
PATIENCE_SECONDS: Final = 5.0

# Each returns 1 or 0. A value is replaced only while it is still the one that the new one was made from. A claim is a
# key with a time to live; who holds it is checked in the same atomic step.
REPLACE: Final = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('set', KEYS[1], ARGV[2], 'px', ARGV[3])
return 1
"""
CLAIM: Final = """
local holder = redis.call('get', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2])
return 1
"""
RELEASE: Final = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('del', KEYS[1])
"""


def _milliseconds(seconds: float) -> int:
    return max(1, round(1000 * seconds))


class RedisStore:
    def __init__(self, url: str) -> None:
        # Without these time-outs TCP would wait many minutes for a Redis whose machine is gone. The client is given no
        # retries: what got no answer may have been done.
        self._redis = redis.Redis.from_url(
            url, socket_timeout=PATIENCE_SECONDS, socket_connect_timeout=PATIENCE_SECONDS
        )
        self._replace = self._redis.register_script(REPLACE)
        self._claim = self._redis.register_script(CLAIM)
        self._release = self._redis.register_script(RELEASE)

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
        with _mapped():
            return bool(self._claim([f"{PREFIX}claim:{name}"], [holder, _milliseconds(seconds)]))

    def release(self, name: str, holder: str) -> None:
        with _mapped():
            self._release([f"{PREFIX}claim:{name}"], [holder])

    def close(self) -> None:
        self._redis.close()


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise StoreAway(f"the session store cannot be used: {error}") from error
