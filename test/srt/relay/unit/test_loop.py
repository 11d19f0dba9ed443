"""The control loop turn by turn: what runs when, what is counted, and when it wakes. Sockets: the loopback lane."""

from __future__ import annotations

import select
import time
from typing import Any

import pytest

from embedding_relay.protocol.errors import LocalError, UndecodableFrames
from embedding_relay.protocol.messages import Address
from embedding_relay.transport import loop as loops
from embedding_relay.transport.loop import ControlLoop, _timeout_ms
from embedding_relay.transport.sockets import Listener


class Handler:
    """Notes what it is given; frames that begin with `bad` are none."""

    def __init__(self, due: float | None = None) -> None:
        self.given: list[Any] = []
        self.due = due

    def receive(self, frames: Any, now: float) -> None:
        if frames[0] == b"bad":
            raise UndecodableFrames("it says so itself")
        self.given.append(frames)

    def tick(self, now: float) -> None:
        self.given.append("tick")

    def next_wakeup(self) -> float | None:
        return self.due


class Peers:
    def __init__(self) -> None:
        self.looked_at: list[float] = []

    def close_idle(self, now: float) -> None:
        self.looked_at.append(now)


class Messages:
    def __init__(self, *messages: tuple[str, list[bytes]]) -> None:
        self._messages = messages

    def messages(self) -> Any:
        return iter(self._messages)


def turn(loop: ControlLoop, handler: Handler, *messages: tuple[str, list[bytes]], woken: bool = True) -> Peers:
    peers = Peers()
    loop._turn(handler, Messages(*messages), peers, woken=woken)  # type: ignore[arg-type]
    return peers


@pytest.fixture
def loop() -> ControlLoop:
    return ControlLoop("127.0.0.1", 1000)


def test_calls_come_before_messages_and_these_before_the_tick(loop: ControlLoop) -> None:
    handler = Handler(due=time.monotonic())
    loop.post(lambda now: handler.given.append("call"))
    peers = turn(loop, handler, ("10.0.0.1", [b"one"]), ("10.0.0.1", [b"two"]))
    assert handler.given == ["call", [b"one"], [b"two"], "tick"]
    assert len(peers.looked_at) == 1


def test_a_call_waits_for_the_turn_that_it_has_woken_the_loop_for(loop: ControlLoop) -> None:
    """It may have been posted since the loop woke for something else: then the next turn comes at once."""
    handler = Handler()
    loop._wakeup.open()
    loop.post(lambda now: handler.given.append("call"))
    turn(loop, handler, ("10.0.0.1", [b"one"]), woken=False)
    assert handler.given == [[b"one"]]
    assert select.select([loop._wakeup.fileno()], [], [], 0)[0]
    turn(loop, handler)
    assert handler.given == [[b"one"], "call"]
    loop._wakeup.close()


def test_no_tick_before_its_time(loop: ControlLoop) -> None:
    for due in (None, time.monotonic() + 1000):
        handler = Handler(due)
        turn(loop, handler)
        assert handler.given == []


def test_a_call_that_posts_another_does_not_hold_up_the_turn(loop: ControlLoop) -> None:
    ran: list[str] = []

    def first(now: float) -> None:
        ran.append("first")
        loop.post(lambda _: ran.append("second"))

    loop._wakeup.open()
    loop.post(first)
    loop._wakeup.clear()
    loop._run_calls()
    assert ran == ["first"]
    assert select.select([loop._wakeup.fileno()], [], [], 0)[0], "and the next turn comes at once"
    loop._run_calls()
    assert ran == ["first", "second"]
    loop._wakeup.close()


def test_frames_that_are_no_message_cost_a_line_for_each_peer_and_so_many_at_most(
    loop: ControlLoop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "_MAX_NAMED_PEERS", 2)
    handler = Handler()
    turn(loop, handler, *((f"10.0.0.{number}", [b"bad"]) for number in (1, 1, 2, 3)), ("10.0.0.1", [b"good"]))
    assert loop.undecodable == 4
    assert handler.given == [[b"good"]]
    assert caplog.messages == [
        f"relay message from 10.0.0.{number} dropped, and so will be all like it: it says so itself"
        for number in (1, 2)
    ]


def test_it_counts_a_moment_after_something_happened_and_once(
    loop: ControlLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, counted = 100.0, list[float]()
    monkeypatch.setattr(loops.time, "monotonic", lambda: now)

    def count() -> None:
        counted.append(now)

    loop._count_soon(count)
    assert loop._count_at == 100.25
    now = 100.2
    loop._count_soon(count)
    assert counted == []
    now = 100.25
    loop._count_soon(count)
    assert counted == [100.25]
    assert loop._count_at is None, "and sleeps"


def test_how_long_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops.time, "monotonic", lambda: 100.0)
    assert _timeout_ms(None, None) is None
    assert _timeout_ms(None, 100.0101, 200.0) == 11
    assert _timeout_ms(99.0) == 0


def test_what_is_not_open_neither_runs_nor_sends_and_has_nobody(loop: ControlLoop) -> None:
    with pytest.raises(LocalError, match="before it runs"):
        loop.run(Handler(), lambda: None)
    with pytest.raises(LocalError, match="before it sends"):
        loop.send(Address("127.0.0.1", 1), [b""])
    assert (loop.connections, loop.refused_clients) == (0, 0)
    loop.close()


@pytest.mark.parametrize("key", [None, b"k" * 32])
@pytest.mark.parametrize("problem", [ValueError("no port"), KeyboardInterrupt()])
def test_nothing_stays_open_when_there_is_no_port(
    key: bytes | None, problem: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(Listener, "open", fail)
    loop = ControlLoop("127.0.0.1", 1000, key)
    with pytest.raises(type(problem)):
        loop.open()
    assert loop._context is None
    assert loop._wakeup.fileno() == -1
