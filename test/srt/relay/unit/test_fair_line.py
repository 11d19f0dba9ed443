"""Who is served next, for how long others wait, and what is left of those who leave."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.fair_line import FairLine

GIANT, SMALL = 100.0, 1.0


class Bench:
    """Serves those who have a turn one after the other, as far as a test lets it; notes who was served."""

    def __init__(self, places: int) -> None:
        self.line = FairLine(places)
        self.served: list[str] = []
        self.inside: set[str] = set()
        self.most = 0
        self._leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, cost: float) -> None:
        self.tasks[name] = asyncio.create_task(self._work(name, cost))
        await settled()

    async def finish(self, name: str) -> None:
        self._leave[name].set()
        await settled()

    async def finish_all(self) -> None:
        while self.inside:
            await self.finish(min(self.inside, key=self.served.index))

    async def _work(self, name: str, cost: float) -> None:
        async with self.line.turn(cost):
            self._leave[name] = asyncio.Event()
            self.served.append(name)
            self.inside.add(name)
            self.most = max(self.most, len(self.inside))
            try:
                await self._leave[name].wait()
            finally:
                self.inside.discard(name)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_without_a_line_nobody_waits() -> None:
    async def work() -> None:
        bench = Bench(2)
        await bench.come("first", GIANT)
        await bench.come("second", SMALL)
        assert bench.served == ["first", "second"]
        await bench.finish_all()

    asyncio.run(work())


def test_equal_ones_are_served_in_the_order_in_which_they_came() -> None:
    async def work() -> None:
        bench = Bench(1)
        for number in range(5):
            await bench.come(str(number), GIANT)
        await bench.finish_all()
        assert bench.served == ["0", "1", "2", "3", "4"]

    asyncio.run(work())


def test_a_small_one_waits_for_those_that_are_served_and_not_for_those_that_wait() -> None:
    async def work() -> None:
        bench = Bench(1)
        for number in range(20):
            await bench.come(f"giant {number}", GIANT)
        await bench.come("small", SMALL)
        await bench.finish("giant 0")
        assert bench.served == ["giant 0", "small"]
        await bench.finish_all()
        assert len(bench.served) == 21

    asyncio.run(work())


def test_a_giant_has_its_share_though_small_ones_keep_coming() -> None:
    """Two share: the giant's turn has come when the small ones together have had as much as it costs."""

    async def work() -> None:
        bench = Bench(1)
        await bench.come("small 0", SMALL)
        await bench.come("giant", GIANT)
        for number in range(1, 1000):
            await bench.come(f"small {number}", SMALL)
            await bench.finish(f"small {number - 1}")
            if "giant" in bench.inside:
                break
        assert GIANT <= number <= 4 * GIANT
        await bench.finish_all()

    asyncio.run(work())


def test_who_leaves_while_it_waits_holds_up_nobody() -> None:
    async def work() -> None:
        bench = Bench(1)
        for name in ("inside", "leaves", "stays"):
            await bench.come(name, SMALL)
        bench.tasks["leaves"].cancel()
        await bench.finish("inside")
        assert bench.served == ["inside", "stays"]
        await bench.finish_all()
        await bench.come("later", SMALL)
        assert bench.served[-1] == "later"
        await bench.finish_all()

    asyncio.run(work())


def test_who_is_cancelled_just_when_its_turn_comes_gives_its_place_back() -> None:
    async def work() -> None:
        bench = Bench(1)
        for name in ("inside", "cancelled", "stays"):
            await bench.come(name, SMALL)
        bench._leave["inside"].set()
        await asyncio.sleep(0)
        assert bench.line._free == 0
        assert bench.served == ["inside"], "its place is given to the next one, which does not know it yet"
        bench.tasks["cancelled"].cancel()
        await settled()
        await bench.finish_all()
        assert bench.served[-1] == "stays"
        await bench.come("later", SMALL)
        assert bench.served[-1] == "later"
        await bench.finish_all()

    asyncio.run(work())


def test_what_fails_gives_its_place_back() -> None:
    async def work() -> None:
        line = FairLine(1)

        async def fail() -> None:
            async with line.turn(SMALL):
                raise RuntimeError

        for _ in range(3):
            assert isinstance((await asyncio.gather(fail(), return_exceptions=True))[0], RuntimeError)
        bench = Bench(1)
        bench.line = line
        await bench.come("next", SMALL)
        assert bench.served == ["next"]
        await bench.finish_all()

    asyncio.run(work())


@given(
    st.integers(1, 3),
    st.lists(st.one_of(st.floats(0.0, 1000.0), st.sampled_from(["finish", "cancel"])), max_size=40),
    st.randoms(use_true_random=False),
)
def test_never_more_than_there_are_places_and_all_are_served(
    places: int, steps: list[object], rng: random.Random
) -> None:
    async def work() -> None:
        bench, cancelled = Bench(places), set()
        for number, step in enumerate(steps):
            if isinstance(step, float):
                await bench.come(str(number), step)
            elif step == "finish" and bench.inside:
                await bench.finish(rng.choice(sorted(bench.inside)))
            elif step == "cancel" and (alive := sorted(name for name, task in bench.tasks.items() if not task.done())):
                name = rng.choice(alive)
                cancelled.add(name)
                if bench.inside and rng.random() < 0.5:  # just when another one's turn comes
                    bench._leave[rng.choice(sorted(bench.inside))].set()
                    await asyncio.sleep(0)
                bench.tasks[name].cancel()
                if rng.random() < 0.5:
                    await settled()
            await settled()
            waiting = [name for name, task in bench.tasks.items() if not task.done() and name not in bench.inside]
            assert len(bench.inside) == places or not waiting
        await bench.finish_all()
        assert bench.most <= places
        assert {name for name in bench.tasks if name not in cancelled} <= set(bench.served)
        assert all(task.done() for task in bench.tasks.values())

    asyncio.run(work())
