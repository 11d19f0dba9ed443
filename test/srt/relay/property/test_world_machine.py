"""Both sides together, under schedules that Hypothesis chooses: S1-S5 and L1-L3 of the specification.

`RELAY_SCHEDULES=20000 scripts/test property` runs that many instead of a few hundred.
"""

from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from embedding_relay.testing.world import World
from support.effort import DAILY, SCHEDULES, effort, unhurried
from support.schedules import (
    ENCODES,
    KINDS_OF_SCHEDULES,
    RANKS,
    STEPS_OF_TOWERS,
    Schedule,
    Shape,
    run_chaos,
    run_offers_and_reports_lost,
    run_orderly,
)

pytestmark = unhurried

numbers = st.integers(0, 30)

shapes = st.sampled_from(RANKS).flatmap(
    lambda ranks: st.builds(
        Shape,
        block_size=st.integers(1, 4),
        encode_blocks=st.integers(1, 6),
        language_blocks=st.tuples(*[st.integers(1, 5)] * ranks),
        defaults=st.tuples(*[st.sampled_from((None, 1, 3, 8, 20))] * ranks),
        encodes=st.sampled_from(ENCODES),
        takes_offer_ahead=st.booleans(),
        keeps_rows=st.booleans(),
        steps_of_tower=st.sampled_from(STEPS_OF_TOWERS),
    )
)


class OrderlyMachine(RuleBasedStateMachine):
    """Nothing is lost and nobody fails: every request succeeds, and none of them needs a deadline for it (L1)."""

    @initialize(shape=shapes)
    def begin(self, shape: Shape) -> None:
        self.schedule = Schedule(shape.build())

    @rule(total=st.integers(1, 40), text_rows=st.integers(0, 6), peer=numbers)
    def start(self, total: int, text_rows: int, peer: int) -> None:
        self.schedule.start(total, text_rows, peer)

    @rule(which=numbers)
    def deliver(self, which: int) -> None:
        self.schedule.deliver_in_order(which)

    @rule(which=numbers)
    def deliver_and_repeat_later(self, which: int) -> None:
        self.schedule.deliver_in_order(which, again=True)

    @rule(which=numbers)
    def work(self, which: int) -> None:
        self.schedule.work(which)

    def teardown(self) -> None:
        if hasattr(self, "schedule"):
            self.schedule.finish_without_clock()


class ChaosMachine(RuleBasedStateMachine):
    """Messages are delayed, reordered, repeated and lost, writes fail and land late, processes restart."""

    @initialize(shape=shapes)
    def begin(self, shape: Shape) -> None:
        self.schedule = Schedule(shape.build())

    @rule(total=st.integers(1, 30), text_rows=st.integers(0, 4), peer=numbers)
    def start(self, total: int, text_rows: int, peer: int) -> None:
        self.schedule.start(total, text_rows, peer)

    @rule(which=numbers, times=st.integers(1, 6))
    def deliver_some_in_order(self, which: int, times: int) -> None:
        for _ in range(times):
            self.schedule.deliver_in_order(which)

    @rule(which=numbers, times=st.integers(1, 4))
    def work(self, which: int, times: int) -> None:
        for _ in range(times):
            self.schedule.work(which)

    @rule(which=numbers, again=st.booleans())
    def deliver_out_of_order(self, which: int, again: bool) -> None:
        self.schedule.deliver_any(which, again)

    @rule(which=numbers)
    def lose(self, which: int) -> None:
        self.schedule.lose(which)

    @rule(rank=numbers, fault=numbers)
    def spoil_write(self, rank: int, fault: int) -> None:
        self.schedule.spoil_write(rank, fault)

    @rule(peer=numbers)
    def toggle_data_plane(self, peer: int) -> None:
        self.schedule.toggle_data_plane(peer)

    @rule()
    def land_late(self) -> None:
        self.schedule.land_late()

    @rule()
    def look_for_quiet(self) -> None:
        self.schedule.look_for_quiet()

    @rule(rank=numbers, which=numbers)
    def cancel(self, rank: int, which: int) -> None:
        self.schedule.cancel(rank, which)

    @rule(peer=numbers, which=numbers)
    def refuse(self, peer: int, which: int) -> None:
        self.schedule.refuse(peer, which)

    @rule(total=st.integers(1, 30), peer=numbers, half=st.sampled_from(("encode", "language")))
    def start_one_half(self, total: int, peer: int, half: str) -> None:
        self.schedule.start(total, 0, peer, [half])

    @rule(seconds=st.sampled_from((0.1, 1.0, 3.0, 8.0, 25.0)))
    def pass_time(self, seconds: float) -> None:
        self.schedule.pass_time(seconds)

    @rule(peer=numbers)
    def toggle_registry(self, peer: int) -> None:
        self.schedule.toggle_registry(peer)

    @rule(peer=numbers, same_address=st.booleans())
    def restart_encode(self, peer: int, same_address: bool) -> None:
        self.schedule.restart_encode(peer, same_address)

    @rule(rank=numbers, same_address=st.booleans())
    def restart_language(self, rank: int, same_address: bool) -> None:
        self.schedule.restart_language(rank, same_address)

    @rule(rank=numbers)
    def replace_language(self, rank: int) -> None:
        self.schedule.replace_language(rank)

    def teardown(self) -> None:
        if hasattr(self, "schedule"):
            self.schedule.finish()


TestOrderly = OrderlyMachine.TestCase
TestOrderly.settings = effort(80)
TestChaos = ChaosMachine.TestCase
TestChaos.settings = effort(160)


# Schedules from a seed are ten times cheaper than those that Hypothesis chooses, and longer.
SEEDS = 640 * SCHEDULES // DAILY


@pytest.mark.parametrize("schedule", KINDS_OF_SCHEDULES, ids=lambda run: run.__name__)
def test_schedules_by_seed(schedule: Callable[[int], World]) -> None:
    for seed in range(int(SEEDS * KINDS_OF_SCHEDULES[schedule])):
        schedule(seed)


@pytest.mark.parametrize("schedule", [run_orderly, run_chaos, run_offers_and_reports_lost])
def test_schedules_of_large_pools_by_seed(schedule: Callable[..., World]) -> None:
    """Where a room has many blocks, it goes through many pairs of halves."""
    for seed in range(SEEDS // 8):
        schedule(seed, shape=Shape.wide)
