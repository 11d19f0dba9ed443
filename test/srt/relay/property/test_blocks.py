"""The allocator against a model that is one dictionary."""

import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.errors import LeaseError
from support.effort import effort, unhurried

pytestmark = unhurried

OWNERS = st.integers(0, 3)


def test_blocks_become_one_run_again_in_whatever_order_they_come_back() -> None:
    for seed in range(100):
        pool, order = BlockPool(9), list(range(9))
        pool.lease(9, "all")
        random.Random(seed).shuffle(order)
        for block in order:
            pool.give_back([block], "all")
        assert pool.lease(9, "all") == tuple(range(9))


def test_where_no_run_is_long_enough_the_longest_is_taken_whole() -> None:
    pool = BlockPool(10)
    pool.lease(10, "all")
    pool.give_back([0, 2, 3, 5, 6, 7, 9], "all")
    assert pool.lease(5, "one") == (5, 6, 7, 2, 3)
    assert pool.lease(2, "other") == (0, 9)


def test_a_block_is_not_given_back_twice_at_once() -> None:
    pool = BlockPool(4)
    blocks = pool.lease(3, "one")
    for end in (pool.give_back, pool.quarantine):
        with pytest.raises(LeaseError, match="names a block twice"):
            end([*blocks, 0], "one")
    pool.give_back(blocks, "one")
    assert pool.free == 4


def fewest_runs(free: set[int], n: int) -> tuple[int, ...]:
    """The longest runs, and for what is left of n the shortest that has as many; of equal ones the first."""
    chosen: list[int] = []
    while n:
        runs = [list(run) for run in runs_of(free)]
        run = min([run for run in runs if len(run) >= n], key=len, default=None) or max(runs, key=len)
        chosen += run[:n]
        free = free.difference(run[:n])
        n -= len(run[:n])
    return tuple(chosen)


def runs_of(blocks: set[int]) -> Iterator[range]:
    for start in sorted(blocks):
        if start - 1 not in blocks:
            stop = next(block for block in itertools.count(start) if block not in blocks)
            yield range(start, stop)


class PoolMachine(RuleBasedStateMachine):
    """`model`: block -> (owner, whether it is in quarantine); a free block is not in it."""

    @initialize(count=st.integers(1, 24))
    def begin(self, count: int) -> None:
        self.pool = BlockPool(count)
        self.model: dict[int, tuple[int, bool]] = {}

    def held(self, owner: int) -> list[int]:
        return [block for block, state in self.model.items() if state == (owner, False)]

    @rule(owner=OWNERS, n=st.integers(-1, 26))
    def lease(self, owner: int, n: int) -> None:
        free = set(range(self.pool.count)) - set(self.model)
        if not 1 <= n <= len(free):
            with pytest.raises(LeaseError):
                self.pool.lease(n, owner)
            return
        blocks = self.pool.lease(n, owner)
        assert blocks == fewest_runs(free, n)
        self.model.update(dict.fromkeys(blocks, (owner, False)))

    @rule(owner=OWNERS, data=st.data(), quarantine=st.booleans())
    def end_a_lease(self, owner: int, data: st.DataObject, quarantine: bool) -> None:
        held = self.held(owner)
        blocks = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
        if quarantine:
            self.pool.quarantine(blocks, owner)
            self.model.update(dict.fromkeys(blocks, (owner, True)))
        else:
            self.pool.give_back(blocks, owner)
            for block in blocks:
                del self.model[block]

    @rule(owner=OWNERS, blocks=st.lists(st.integers(-1, 25), min_size=1, max_size=4), quarantine=st.booleans())
    def end_a_lease_that_is_not_held(self, owner: int, blocks: list[int], quarantine: bool) -> None:
        held = self.held(owner)
        if len(set(blocks)) == len(blocks) and set(blocks) <= set(held):
            return
        with pytest.raises(LeaseError):
            (self.pool.quarantine if quarantine else self.pool.give_back)(blocks, owner)

    @rule(owner=OWNERS)
    def release(self, owner: int) -> None:
        quarantined = [block for block, state in self.model.items() if state == (owner, True)]
        if quarantined:
            assert self.pool.release_quarantine(owner) == len(quarantined)
            for block in quarantined:
                del self.model[block]

    @rule(owner=OWNERS)
    def release_of_nothing(self, owner: int) -> None:
        if not any(state[0] == owner for state in self.model.values()):
            with pytest.raises(LeaseError):
                self.pool.release_quarantine("nobody")

    @precondition(lambda self: not self.model)
    @rule()
    def everything_is_one_run_again(self) -> None:
        assert self.pool.lease(self.pool.count, 0) == tuple(range(self.pool.count))
        self.pool.give_back(range(self.pool.count), 0)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        quarantined = sum(is_quarantined for _, is_quarantined in self.model.values())
        assert self.pool.quarantined == quarantined
        assert self.pool.leased == len(self.model) - quarantined
        assert self.pool.free == self.pool.count - len(self.model)
        for block in range(self.pool.count):
            assert self.pool.owner_of(block) == self.model.get(block, (None,))[0]


TestPool = PoolMachine.TestCase
TestPool.settings = effort(150)


def test_a_pool_has_at_least_one_block() -> None:
    with pytest.raises(LeaseError, match="pool of 0 blocks"):
        BlockPool(0)


def test_a_block_in_quarantine_is_neither_given_back_nor_counted_twice() -> None:
    pool = BlockPool(3)
    pool.lease(2, "one")
    pool.quarantine([0], "one")
    for end in (pool.give_back, pool.quarantine):
        with pytest.raises(LeaseError, match="one does not hold block 0"):
            end([1, 0], "one")
        assert (pool.free, pool.leased, pool.quarantined) == (1, 1, 1), "nothing is changed"
    assert pool.release_quarantine("one") == 1
    assert pool.free == 2
