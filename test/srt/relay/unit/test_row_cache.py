"""The rows that a language rank keeps: what is found, what goes first, what is pinned, and whose memory it is."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from embedding_relay.memory import row_cache
from embedding_relay.memory.row_cache import RowCache

ROW = 32 << 10
BLOCK = 4 * ROW


def rows(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, ROW), dtype=np.uint8)


def kept(cache: RowCache, key: str, room: int = 99) -> Any:
    """What a room finds under this key, or None."""
    cache.pin(room, [key])
    held = cache.held(room, key)
    if held is None:
        return None
    into = np.empty((held.rows, ROW), dtype=np.uint8)
    held.read(0, into)
    cache.unpin(room)
    return into


def test_what_is_put_is_found() -> None:
    cache = RowCache(10 * BLOCK, ROW)
    assert cache.can_keep
    there = rows(11)
    assert cache.put("a", [there[:3], there[3:9], there[9:]])
    assert np.array_equal(kept(cache, "a"), there)
    assert kept(cache, "b") is None
    assert (len(cache), cache.bytes, "a" in cache) == (1, 3 * BLOCK, True)


def test_any_part_of_it_can_be_read() -> None:
    cache = RowCache(10 * BLOCK, ROW)
    there = rows(11)
    cache.put("a", [there])
    cache.pin(1, ["a"])
    held: Any = cache.held(1, "a")
    for first in range(11):
        for count in range(12 - first):
            into = np.zeros((count, ROW), dtype=np.uint8)
            held.read(first, into)
            assert np.array_equal(into, there[first : first + count])


def test_the_longest_unused_goes_first() -> None:
    cache = RowCache(3 * BLOCK, ROW)
    for number, key in enumerate("abc"):
        cache.put(key, [rows(4, number)])
    kept(cache, "a")
    cache.put("b", [rows(4, 1)])  # it is here already, and used
    cache.put("d", [rows(1, 3)])
    assert [key for key in "abcd" if key in cache] == ["a", "b", "d"]
    assert cache.evictions == 1
    for key, number in (("a", 0), ("b", 1)):
        assert np.array_equal(kept(cache, key), rows(4, number))


def test_nothing_is_evicted_for_what_does_not_fit() -> None:
    cache = RowCache(3 * BLOCK, ROW)
    for key in "ab":
        cache.put(key, [rows(4)])
    cache.pin(1, ["a"])
    assert not cache.put("c", [rows(9)])
    assert not cache.put("d", [rows(4 * 4)])
    assert not cache.put("e", [])
    assert ("b" in cache, cache.evictions, cache.bytes) == (True, 0, 2 * BLOCK)
    assert cache.put("c", [rows(8)])
    assert [key for key in "abc" if key in cache] == ["a", "c"]


def test_what_a_room_has_pinned_stays_until_its_last_pin_goes() -> None:
    cache = RowCache(2 * BLOCK, ROW)
    cache.put("a", [rows(4, 1)])
    assert cache.pin(1, ["a", "a", "x"]) == ("a",)
    assert cache.pin(1, ["a"]) == (), "no news"
    assert cache.pin(2, ["a"]) == ("a",)
    cache.put("b", [rows(4, 2)])
    cache.put("c", [rows(4, 3)])
    assert [key for key in "abc" if key in cache] == ["a", "c"]
    cache.unpin(1)
    cache.put("d", [rows(4, 4)])
    held: Any = cache.held(2, "a")
    into = np.empty((4, ROW), dtype=np.uint8)
    held.read(0, into)
    assert np.array_equal(into, rows(4, 1))
    assert cache.held(1, "a") is None
    cache.unpin(2)
    cache.unpin(2)
    cache.put("e", [rows(8, 5)])
    assert [key for key in "acde" if key in cache] == ["e"]


def test_what_is_cleared_is_found_by_nobody_new() -> None:
    cache = RowCache(2 * BLOCK, ROW)
    cache.put("a", [rows(4, 1)])
    cache.put("b", [rows(4, 2)])
    cache.remember("picture", "a")
    cache.pin(1, ["a"])
    cache.clear()
    assert (len(cache), cache.bytes, cache.guess(["picture"]), cache.evictions) == (0, BLOCK, [], 0)
    assert cache.pin(2, ["a", "b"]) == ()
    assert not cache.put("c", [rows(8)]), "a room still reads one of its two blocks"
    assert cache.put("a", [rows(4, 3)]), "the same picture, made anew"
    held: Any = cache.held(1, "a")
    into = np.empty((4, ROW), dtype=np.uint8)
    held.read(0, into)
    assert np.array_equal(into, rows(4, 1)), "as it was when the room pinned it"
    cache.unpin(1)
    assert cache.bytes == BLOCK
    assert np.array_equal(kept(cache, "a"), rows(4, 3))


def test_memory_is_taken_as_it_is_needed_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "_GROWTH_BYTES", 2 * BLOCK)
    taken: list[int] = []
    four, eight, empty = rows(4), rows(8), np.empty
    monkeypatch.setattr(np, "empty", lambda shape, dtype: taken.append(shape[0]) or empty(shape, dtype))
    cache = RowCache(5 * BLOCK + 7, ROW)
    assert not taken
    cache.put("a", [four])
    assert (taken, cache.bytes) == ([2], BLOCK)
    for number in range(20):
        assert cache.put(f"{number}", [eight])
    assert (taken, cache.bytes) == ([2, 2, 1], 4 * BLOCK)


def test_a_cache_of_nothing_keeps_nothing() -> None:
    cache = RowCache(BLOCK - 1, ROW)
    assert not cache.can_keep
    assert not cache.put("a", [rows(1)])
    assert cache.pin(1, ["a"]) == ()


def test_rows_wider_than_a_block_are_blocks_of_their_own() -> None:
    cache = RowCache(1 << 20, 200 << 10)
    there = np.ones((5, 200 << 10), dtype=np.uint8)
    assert cache.put("a", [there])
    assert cache.bytes == 1000 << 10
    assert not cache.put("b", [np.ones((6, 200 << 10), dtype=np.uint8)])


def test_what_clients_call_a_picture_is_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "_MOST_SOURCES", 2)
    cache = RowCache(BLOCK, ROW)
    cache.remember("one", "a")
    cache.remember("two", "b")
    cache.remember("one", "c")
    cache.remember("three", "d")
    assert cache.guess(["one", "two", "three", "one"]) == ["c", "d", "c"]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_a_room_reads_what_it_pinned(seed: int) -> None:
    chance, cache = random.Random(seed), RowCache(12 * BLOCK, ROW)
    versions: dict[str, int] = {}
    pinned: dict[tuple[int, str], int] = {}
    for step in range(200):
        key, room = chance.choice("abcdefgh"), chance.randrange(3)
        match chance.choice(("put", "put", "pin", "unpin", "clear")):
            case "put":
                was_here = key in cache
                made = np.full((chance.randint(1, 12), ROW), step % 256, dtype=np.uint8)
                if cache.put(key, [made]) and not was_here:
                    versions[key] = step
            case "pin":
                for found in cache.pin(room, [key]):
                    pinned[room, found] = versions[found]
            case "unpin":
                cache.unpin(room)
                pinned = {where: version for where, version in pinned.items() if where[0] != room}
            case "clear" if step % 7 == 0:
                cache.clear()
        for (owner, name), version in pinned.items():
            held: Any = cache.held(owner, name)
            into = np.empty((held.rows, ROW), dtype=np.uint8)
            held.read(0, into)
            assert (into == version % 256).all()
    for room in range(3):
        cache.unpin(room)
    cache.clear()
    assert cache.bytes == 0
