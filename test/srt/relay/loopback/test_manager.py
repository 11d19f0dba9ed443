"""What managers of both kinds have in common: what is open, what is counted, and who hears that something has died.

Without a protocol and without a peer: the data plane and the protocol core are stand-ins. The scheduler's view of its
rooms is in test_status_board.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from embedding_relay.config import RelayConfig
from embedding_relay.memory.plane import private_memory
from embedding_relay.observer import Nobody, Numbers
from embedding_relay.protocol.counts import Counts, Event
from embedding_relay.protocol.errors import Failure, LocalError, SettingError
from embedding_relay.protocol.status import Status
from embedding_relay.transport.manager import MooncakeEmbeddingManager, RoomEnd, open_rank
from support.loopback import HOST, small_layout

LAYOUT = small_layout(blocks=4)


class Plane:
    renewals, mapped = 3, 2
    allocate = staticmethod(private_memory)

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem, self.regions, self.closed = problem, list[Any](), 0

    def start(self, regions: Sequence[Any]) -> None:
        self.regions += regions
        if self.problem:
            raise self.problem

    def close(self) -> None:
        self.closed += 1


class Manager(MooncakeEmbeddingManager):
    """Without a protocol."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._core: Any = SimpleNamespace(counts=Counts(), sizes=lambda: {"rooms": 5})
        self.helpers_closed = 0

    def _close_helpers(self) -> None:
        self.helpers_closed += 1

    def _sizes(self) -> dict[str, int]:
        return {"senders": 6}

    def _totals(self) -> dict[str, int]:
        return {"rows": 7}

    def receive(self, frames: Sequence[bytes], now: float) -> None: ...

    def tick(self, now: float) -> None: ...

    def next_wakeup(self) -> float | None:
        return None


class Watches(Nobody):
    def __init__(self) -> None:
        self.numbers: list[Numbers] = []

    def counted(self, numbers: Numbers) -> None:
        self.numbers.append(numbers)


def opened(plane: Any) -> Any:
    return open_rank(LAYOUT, RelayConfig(), HOST, plane)


@pytest.fixture
def manager() -> Iterator[Any]:
    manager: Any = Manager(opened(Plane()), Watches())
    yield manager
    manager.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- what is open


def test_the_plane_gets_the_memory_and_everything_is_closed_once(manager: Any) -> None:
    assert [region.length for region in manager.plane.regions] == [length for _, length in LAYOUT.memory]
    manager.start()
    end = RoomEnd(1)
    assert manager.follow(end)
    for _ in range(2):
        manager.close()
    assert (manager.plane.closed, manager.helpers_closed) == (1, 1)
    assert manager._buffers.regions == (), "the memory is given back"
    assert end.failure() == Failure(503, "this instance is stopping")
    assert manager.healthy()


@pytest.mark.parametrize("problem", [SettingError("no engine"), KeyboardInterrupt()])
def test_nothing_stays_open_when_a_part_does_not_start(problem: Any) -> None:
    plane, before = Plane(problem), descriptors()
    with pytest.raises(type(problem)):
        opened(plane)
    assert plane.closed == 1
    assert descriptors() == before


@pytest.mark.parametrize("problem", [LocalError("no manager"), KeyboardInterrupt()])
def test_nothing_stays_open_when_nobody_takes_it_over(problem: Any) -> None:
    rank = opened(Plane())
    with rank.closing_on_error():
        pass
    assert rank.plane.closed == 0
    with pytest.raises(type(problem)), rank.closing_on_error():
        raise problem
    assert rank.plane.closed == 1
    assert rank.board.wakeup.fileno() == -1


# ---- health and numbers


def test_the_first_thing_that_died_is_the_reason_and_each_is_heard(
    manager: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert manager.healthy()
    manager.report_unhealthy("one died")
    heard: list[str] = []
    manager.on_unhealthy = heard.append
    manager.report_unhealthy("another died")
    assert not manager.healthy()
    assert manager.unhealthy_reason == "one died"
    assert heard == ["another died"]
    assert caplog.messages == ["relay is unhealthy: one died", "relay is unhealthy: another died"]


def test_the_control_thread_does_not_wait_long_for_the_interpreter(manager: Any) -> None:
    before = sys.getswitchinterval()
    manager.start()
    assert sys.getswitchinterval() == pytest.approx(0.0005)
    manager.close()
    assert sys.getswitchinterval() == before


def test_a_control_thread_that_ends_ends_every_room(manager: Any) -> None:
    end = RoomEnd(1)
    assert manager.follow(end)
    manager._end_all("it died")
    assert end.failure() == Failure(503, "it died")
    assert manager.unhealthy_reason == "it died"


def test_what_is_counted(manager: Any) -> None:
    manager.follow(RoomEnd(1))
    manager._core.counts.failures[502] += 1
    manager._loop.undecodable = 2
    manager._count()
    numbers = manager.metrics()
    assert manager.observer.numbers == [numbers]
    assert numbers.sizes == {"blocks": 4, "followed": 1, "connections": 0, "mapped": 2, "rooms": 5, "senders": 6}
    assert numbers.totals == {"rows": 7}
    assert numbers.failures == {502: 1}
    assert +numbers.events == {Event.UNDECODABLE: 2, Event.ENGINES_RENEWED: 3}


# ---- rooms


def test_where_a_room_stands(manager: Any) -> None:
    end = RoomEnd(1)
    manager.follow(end)
    manager.update_status(1, Status.TRANSFERRING)
    assert manager.check_status(1) is end.poll() is Status.TRANSFERRING
    assert manager.drain_events() == [1]
    manager.update_status(1, Status.TRANSFERRING)
    manager.update_status(9, Status.TRANSFERRING)
    assert manager.drain_events() == [], "nothing has changed"
    assert manager.check_status(9) is None


def test_a_language_rank_writes_no_rows(manager: Any) -> None:
    for call in (
        lambda: manager.send_embedding(1, None),
        lambda: manager.add_transfer_request(None, 1.0),
        lambda: manager.transfer_worker("one"),
    ):
        with pytest.raises(LocalError, match="the manager of a language rank"):
            call()
