"""Who is let in, who waits and who is refused, by what a request costs: by hand, at random, and in an event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from embedding_relay.admission import Account, Gate, Limits, Refused, Size, Ticket
from embedding_relay.protocol.errors import BAD_REQUEST, UNAVAILABLE

LIMIT = 3200
SMALL = LIMIT // 32
KEPT = LIMIT // 8


def limits(**changed: Any) -> Limits:
    return Limits(**{"bytes": LIMIT, "largest": 0, "waiting": 100, "patience": 5.0, "name": "THE_SETTING", **changed})


def inside(account: Account) -> int:
    return sum(account.taken.values())


def test_what_fits_is_let_in_and_what_does_not_waits_for_what_leaves() -> None:
    account = Account(limits())
    first, second = account.enter(1500, 0), account.enter(1500, 0)
    assert (first.is_in, second.is_in) == (True, False)  # an eighth is not for them
    account.leave(first, 1)
    assert second.is_in
    assert inside(account) == 1500
    account.leave(second, 2)
    assert inside(account) == account.waiting == 0


def test_large_requests_are_served_in_order_even_where_a_later_one_would_fit() -> None:
    account = Account(limits())
    first = account.enter(2000, 0)
    second, third = account.enter(2000, 0), account.enter(500, 0)
    assert not third.is_in
    account.leave(first, 1)
    assert (second.is_in, third.is_in) == (True, True)


def test_small_requests_do_not_stand_behind_large_ones() -> None:
    account = Account(limits())
    for _ in range(10):
        account.enter(2800, 0)
    small = [account.enter(SMALL, 0) for _ in range(5)]
    assert [one.is_in for one in small] == [True, True, True, True, False]  # what is kept for them, and no more


def test_small_requests_take_whatever_is_free_while_no_large_one_waits() -> None:
    account = Account(limits())
    assert all(account.enter(SMALL, 0).is_in for _ in range(32))
    assert not account.enter(SMALL, 0).is_in


def test_small_requests_that_came_later_never_keep_a_large_one_out() -> None:
    account = Account(limits())
    first, large = account.enter(2000, 0), account.enter(2800, 0)
    later = [account.enter(SMALL, 1) for _ in range(50)]
    account.leave(first, 2)
    assert large.is_in
    assert inside(account) <= LIMIT
    assert sum(one.is_in for one in later) * SMALL == KEPT


def test_one_that_is_larger_than_the_limit_goes_alone_among_the_large_ones() -> None:
    account = Account(limits(largest=10_000))
    first = account.enter(500, 0)
    giant = account.enter(9000, 0)
    after = account.enter(500, 0)
    assert not giant.is_in
    account.leave(first, 1)
    assert (giant.is_in, after.is_in) == (True, False)
    assert account.enter(SMALL, 1).is_in
    account.leave(giant, 2)
    assert after.is_in


def test_one_that_is_larger_than_the_limit_waits_for_small_ones_that_have_more_than_is_kept_for_them() -> None:
    account = Account(limits(largest=10_000))
    small = [account.enter(SMALL, 0) for _ in range(6)]
    giant = account.enter(9000, 0)
    account.leave(small[0], 1)
    assert not giant.is_in
    account.leave(small[1], 2)
    assert giant.is_in


def test_somebody_who_leaves_is_a_move_whether_or_not_it_helps() -> None:
    account = Account(limits())
    first, _ = account.enter(1000, 0), account.enter(1000, 0)
    waiting = account.enter(2800, 0)
    account.leave(first, 7)
    assert not waiting.is_in
    assert account.moved_at == 7


def test_one_that_no_machine_can_take_is_refused_for_good() -> None:
    account = Account(limits(largest=2**33))
    with pytest.raises(Refused, match=r"9,216 MiB .* no more than 8,192 MiB \(THE_SETTING\)") as caught:
        account.enter(9 * 2**30, 0)
    assert (caught.value.failure.code, caught.value.retry_after) == (BAD_REQUEST, None)


def test_a_line_is_so_long_and_no_longer() -> None:
    account = Account(limits(waiting=2))
    for _ in range(3):
        account.enter(2800, 0)
    with pytest.raises(Refused, match="2 requests wait for it already") as caught:
        account.enter(2800, 0)
    assert (caught.value.failure.code, caught.value.retry_after) == (UNAVAILABLE, 1)
    assert account.waiting == 2


@pytest.mark.parametrize(("waited", "told"), [(0.2, 1), (7.2, 8), (500, 60)])
def test_whoever_is_refused_may_ask_again_after_what_the_last_one_has_waited(waited: float, told: int) -> None:
    account = Account(limits())
    first = account.enter(2800, 0)
    account.enter(2800, 0)
    account.leave(first, waited)
    assert account.refusal_of_late(waited).retry_after == told


def test_what_a_request_really_costs_takes_the_place_of_the_guess() -> None:
    account = Account(limits())
    first, second = account.enter(2800, 0), account.enter(1000, 0)
    account.correct(first, 1000, 1)
    assert second.is_in
    account.correct(first, 5000, 2)  # it is there: nothing can be done about it but to keep others out
    assert inside(account) == 6000
    assert not account.enter(200, 3).is_in
    account.leave(first, 4)
    account.correct(first, 5000, 5)  # over
    assert inside(account) == 1200


def test_whoever_leaves_twice_or_while_it_waits_takes_nothing_along() -> None:
    account = Account(limits())
    first, second, third = account.enter(2800, 0), account.enter(2800, 0), account.enter(2800, 0)
    account.leave(second, 1)
    account.leave(second, 1)
    account.leave(first, 2)
    account.leave(first, 2)
    assert third.is_in
    assert inside(account) == 2800


def test_one_that_others_wait_for_is_let_in_beyond_the_limit_one_at_a_time() -> None:
    account = Account(limits())
    for room in range(5):
        account.enter(2800, room, [room])
    assert not account.let_in_extra([99], 6)
    assert account.let_in_extra([3, 4], 6)
    assert inside(account) == 5600
    assert not account.let_in_extra([4], 7)
    assert [ticket.rooms for ticket in account.lines[Size.LARGE]] == [(1,), (2,), (4,)]


# ---- at random


class World:
    """Requests that take turns at will, and two claims: who is let in leaves space for what is kept; the oldest of all
    is never kept out by younger ones."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.account = Account(limits(largest=2 * LIMIT))
        self.alive: list[Ticket] = []
        self.now = 0.0

    def step(self) -> None:
        self.now += 1
        match self.dice.choice(["enter", "enter", "leave", "correct", "give up"]):
            case "enter":
                cost = self.dice.choice([1, SMALL, SMALL + 1, 1000, 2500, LIMIT, 2 * LIMIT])
                self.alive.append(self.account.enter(self.dice.randint(1, cost), self.now))
            case "leave" if one := self._pick(lambda ticket: ticket.is_in):
                self._end(one)
            case "correct" if one := self._pick(lambda ticket: ticket.is_in):
                self.account.correct(one, self.dice.randint(0, one.cost), self.now)
            case "give up" if one := self._pick(lambda ticket: not ticket.is_in):
                self._end(one)

    def _pick(self, which: Callable[[Ticket], bool]) -> Ticket | None:
        return self.dice.choice(found) if (found := [one for one in self.alive if which(one)]) else None

    def _end(self, ticket: Ticket) -> None:
        self.account.leave(ticket, self.now)
        self.alive.remove(ticket)

    def check(self) -> None:
        in_now = [one for one in self.alive if one.is_in]
        assert inside(self.account) == sum(one.cost for one in in_now)
        for size in Size:
            assert self.account.lines[size] == [one for one in self.alive if one.size is size and not one.is_in]

    def serve_in_order_of_age(self) -> None:
        """As a language instance may: it has blocks for the oldest only. Younger ones that are in stay there."""
        while self.alive:
            oldest = min(self.alive, key=lambda one: one.since)
            assert oldest.is_in, "the oldest of all waits for younger ones"
            self.now += 1
            self._end(oldest)


@pytest.mark.parametrize("seed", range(60))
def test_the_oldest_request_is_always_let_in_whatever_the_others_do(seed: int) -> None:
    world = World(seed)
    for _ in range(120):
        world.step()
        world.check()
    world.serve_in_order_of_age()
    assert inside(world.account) == 0


# ---- in an event loop


class Watcher:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.standing: dict[str, tuple[int, int]] = {}

    def let_in(self, name: str, waited: float) -> None:
        self.told.append(f"{name} in")

    def refused(self, name: str) -> None:
        self.told.append(f"{name} refused")

    def stands(self, name: str, taken: int, waiting: int) -> None:
        self.standing[name] = (taken, waiting)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


class Held:
    """A request that stays until a test ends it."""

    def __init__(self, gate: Gate, cost: int, rooms: Sequence[int] = ()) -> None:
        self.is_in = False
        self._over = asyncio.Event()
        self.task = asyncio.create_task(self._stay(gate, cost, rooms))

    async def _stay(self, gate: Gate, cost: int, rooms: Sequence[int]) -> None:
        async with gate.admitted(cost, rooms):
            self.is_in = True
            await self._over.wait()

    async def end(self) -> None:
        self._over.set()
        await self.task


def test_a_request_waits_until_another_one_is_over_and_all_is_told() -> None:
    async def scenario() -> None:
        watcher = Watcher()
        gate = Gate(limits(), watcher)
        first, second = Held(gate, 2800), Held(gate, 2800)
        await until(lambda: first.is_in and gate.account.waiting == 1)
        assert watcher.standing == {"small": (0, 0), "large": (2800, 1)}
        await first.end()
        await until(lambda: second.is_in)
        await second.end()
        assert watcher.standing == {"small": (0, 0), "large": (0, 0)}
        assert watcher.told == ["large in", "large in"]

    run(scenario)


def test_a_request_that_waits_too_long_is_refused_and_leaves_the_line() -> None:
    async def scenario() -> None:
        watcher = Watcher()
        gate = Gate(limits(patience=0.05), watcher, name="body")
        first = Held(gate, 2800)
        await until(lambda: first.is_in)
        with pytest.raises(Refused, match=r"THE_SETTING\), and this one has waited for 0.05 s"):
            async with gate.admitted(2800):
                pass
        assert watcher.standing == {"body": (2800, 0)}
        assert watcher.told == ["body in", "body refused"]
        await first.end()

    run(scenario)


def test_a_request_whose_client_goes_away_gives_back_what_it_had() -> None:
    async def scenario() -> None:
        gate = Gate(limits())
        first, second, third = Held(gate, 2800), Held(gate, 2800), Held(gate, 2800)
        await until(lambda: gate.account.waiting == 2)
        second.task.cancel()
        first.task.cancel()
        await until(lambda: third.is_in)
        await third.end()
        assert inside(gate.account) == gate.account.waiting == 0

    run(scenario)


def test_while_nobody_moves_those_that_wait_are_asked_about_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedding_relay.admission._LOOK", 0.01)
    monkeypatch.setattr("embedding_relay.admission._MOST_ASKED", 2)

    async def scenario() -> None:
        asked: list[list[int]] = []
        gate = Gate(limits(), ask_offered=asked.append)
        held = [Held(gate, 2800, [room]) for room in range(4)]
        await until(lambda: len(asked) >= 2)
        assert asked[:2] == [[1, 2], [3, 1]]
        gate.let_in_offered([3])
        await until(lambda: held[3].is_in)
        gate.let_in_offered([2])  # one at a time
        assert not held[2].is_in
        for one in (held[3], held[0], held[1], held[2]):
            await one.end()

    run(scenario)


def test_as_long_as_somebody_moves_nobody_is_let_in_beyond_the_limit() -> None:
    async def scenario() -> None:
        gate = Gate(limits(), ask_offered=lambda rooms: None)
        first, second = Held(gate, 2800), Held(gate, 2800, [7])
        await until(lambda: gate.account.waiting == 1)
        gate.let_in_offered([7])
        assert gate.account.waiting == 1
        await first.end()
        await until(lambda: second.is_in)
        await second.end()

    run(scenario)
