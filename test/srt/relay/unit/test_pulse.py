"""A scheduler that answers, one that is slow, frozen, stuck or unhealthy: what becomes of those who wait for it."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from embedding_relay.config import RelayConfig
from embedding_relay.protocol.errors import SettingError
from embedding_relay.pulse import MOST_ROOMS, Condition, Pulse, SchedulerWatch, socket_name

QUICK = RelayConfig(heartbeat_interval=0.1, heartbeat_max_failures=2, waiting_timeout=1)
SILENCE = QUICK.timing.silence
LATE = SILENCE + 10  # for a machine that has other things to do

_ports = itertools.count(os.getpid() << 8)  # a name is as unique as this process and the test


class Scheduler:
    """The answering end, and what its instance says about itself."""

    def __init__(self) -> None:
        self.name = socket_name("127.0.0.1", next(_ports))
        self.unhealthy_reason: str | None = None
        self.held = threading.Event()
        self.held.set()
        self.pulse = Pulse(self.name, self._say)
        self.pulse.start()

    def _say(self) -> str | None:
        self.held.wait()  # a frozen process
        return self.unhealthy_reason


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler()
    yield scheduler
    scheduler.held.set()
    scheduler.pulse.close()


class Front:
    def __init__(self, name: str, config: RelayConfig = QUICK) -> None:
        self.troubles: list[str] = []
        self.unhealthy: list[str] = []
        self.watch = SchedulerWatch(name, config, on_trouble=self.troubles.append, on_unhealthy=self.unhealthy.append)
        self.watch.start()


async def until_trouble(front: Front) -> float:
    """How long it took."""
    started = asyncio.get_running_loop().time()
    while not front.troubles:
        await asyncio.sleep(0.01)
    return asyncio.get_running_loop().time() - started


async def until_well(front: Front, scheduler: Scheduler) -> None:
    give_up = asyncio.get_running_loop().time() + LATE
    while True:
        scheduler.pulse.beat()
        if await front.watch.trouble_before_a_request() is None:
            return
        assert asyncio.get_running_loop().time() < give_up


def test_a_scheduler_that_answers_is_no_trouble(scheduler: Scheduler) -> None:
    async def scenario() -> None:
        front = Front(scheduler.name)
        with front.watch.a_request_waits():
            for _ in range(8):
                scheduler.pulse.beat()
                await asyncio.sleep(SILENCE / 4)
        assert not front.troubles
        assert await front.watch.trouble_before_a_request() is None
        front.watch.close()

    asyncio.run(scenario())


def test_a_frozen_one_is_noticed_in_time_and_so_is_its_return(scheduler: Scheduler) -> None:
    async def scenario() -> None:
        front = Front(scheduler.name)
        scheduler.held.clear()
        with front.watch.a_request_waits():
            took = await until_trouble(front)
        assert SILENCE <= took < LATE
        assert "has not answered for " in front.troubles[0]
        assert "has not answered" in str(await front.watch.trouble_before_a_request())
        scheduler.held.set()
        await until_well(front, scheduler)
        front.watch.close()

    asyncio.run(scenario())


def test_one_that_was_never_there_is_noticed() -> None:
    async def scenario() -> None:
        front = Front(socket_name("127.0.0.1", next(_ports)))
        with front.watch.a_request_waits():
            assert await until_trouble(front) < LATE
        front.watch.close()

    asyncio.run(scenario())


def test_one_that_has_ended_is_not_waited_for(scheduler: Scheduler) -> None:
    """As when its server ends, which waits for the answers to requests that still came."""
    patient = RelayConfig(heartbeat_interval=QUICK.heartbeat_interval, heartbeat_max_failures=1000)

    async def scenario() -> None:
        front = Front(scheduler.name, patient)
        with front.watch.a_request_waits():
            await asyncio.sleep(QUICK.heartbeat_interval)
            assert await front.watch.trouble_before_a_request() is None
            scheduler.pulse.close()
            assert await front.watch.trouble_before_a_request() == "this instance has ended: its scheduler has gone"
            assert await until_trouble(front) < LATE
        front.watch.close()

    asyncio.run(scenario())


def test_a_loop_that_does_not_come_round_is_stuck(scheduler: Scheduler) -> None:
    async def scenario() -> None:
        front = Front(scheduler.name)
        scheduler.pulse.beat()
        with front.watch.a_request_waits():
            assert await until_trouble(front) >= QUICK.waiting_timeout - QUICK.heartbeat_interval
        assert "stuck for " in front.troubles[0]
        await until_well(front, scheduler)
        front.watch.close()

    asyncio.run(scenario())


def test_being_unhealthy_is_told_once_and_stays(scheduler: Scheduler) -> None:
    async def scenario() -> None:
        front = Front(scheduler.name)
        scheduler.unhealthy_reason = "a thread died"
        with front.watch.a_request_waits():
            await until_trouble(front)
        assert await front.watch.trouble_before_a_request() == "this instance is unhealthy: a thread died"
        assert front.unhealthy == ["a thread died"]
        front.watch.close()

    asyncio.run(scenario())


def test_a_busy_front_does_not_blame_the_scheduler(scheduler: Scheduler) -> None:
    """The answer came while this event loop did something else for long."""

    async def scenario() -> None:
        front = Front(scheduler.name)
        with front.watch.a_request_waits():
            await asyncio.sleep(QUICK.heartbeat_interval / 2)
            blocked = threading.Event()
            blocked.wait(3 * SILENCE)
            await asyncio.sleep(0.1 * SILENCE)
        assert not front.troubles
        front.watch.close()

    asyncio.run(scenario())


def test_nobody_else_can_answer(scheduler: Scheduler) -> None:
    async def scenario() -> None:
        front = Front(scheduler.name)
        scheduler.held.clear()
        with front.watch.a_request_waits(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as forger:
            await asyncio.sleep(QUICK.heartbeat_interval)
            with pytest.raises(PermissionError):
                forger.sendto(b'{"busy_for":0.0}', front.watch._socket.getsockname())
            await until_trouble(front)
        front.watch.close()

    asyncio.run(scenario())


def test_an_address_is_taken_once(scheduler: Scheduler) -> None:
    with pytest.raises(SettingError, match="the same --host and --port"):
        Pulse(scheduler.name, lambda: None).start()


def test_nothing_is_left() -> None:
    before = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    scheduler = Scheduler()
    scheduler.pulse.close()
    scheduler.pulse.close()
    assert (set(threading.enumerate()), len(os.listdir("/proc/self/fd"))) == before


# ---- rooms that the other half waits for


def test_the_scheduler_says_for_which_rooms_blocks_are_offered(scheduler: Scheduler) -> None:
    async def scenario() -> None:
        heard: list[int] = []
        scheduler.pulse.is_offered = lambda room: room % 2 == 1
        front = Front(scheduler.name)
        front.watch.on_offered = heard.extend
        rooms = [2**63 - 1 - number for number in range(2 * MOST_ROOMS)]
        front.watch.ask_offered(rooms)
        while not heard:
            await asyncio.sleep(0.001)
        assert heard == [room for room in rooms[:MOST_ROOMS] if room % 2 == 1]
        assert front.troubles == []
        front.watch.close()

    asyncio.run(asyncio.wait_for(scenario(), LATE))


@pytest.mark.parametrize("question", [b"", b"[", b'["a"]', b"{}", b"[1.5]", b"\xff"])
def test_a_question_that_nobody_understands_is_one_about_its_health(scheduler: Scheduler, question: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asker:
        asker.settimeout(LATE)
        asker.bind("")
        asker.sendto(question, scheduler.name)
        assert msgspec.json.decode(asker.recv(4096), type=Condition).offered == ()
