"""The control loop and its sockets, without a protocol."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from sglang.srt.disaggregation.mooncake import wires_multimodal
from sglang.srt.disaggregation.mooncake.control_multimodal import ControlLoop
from sglang.srt.disaggregation.multimodal.protocol.errors import SettingError, UndecodableFrames
from sglang.srt.disaggregation.multimodal.protocol.messages import Address


class Recorder:
    """A handler that takes everything but `bad`."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.frames: list[list[bytes]] = []
        self.ticks: list[float] = []
        self.counted = 0
        self.wakeup: float | None = None
        self.arrived = threading.Event()
        self.loop = ControlLoop(host, max_frame=1000)
        self.address = self.loop.open()
        self._thread = threading.Thread(target=self.loop.run, args=(self, self.count))
        self._thread.start()

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        if frames[0] == b"bad":
            raise UndecodableFrames("it says so itself")
        self.frames.append(list(frames))
        self.arrived.set()

    def tick(self, now: float) -> None:
        self.ticks.append(now)
        self.wakeup = None

    def next_wakeup(self) -> float | None:
        return self.wakeup

    def count(self) -> None:
        self.counted += 1

    def send(self, to: Address, *frames: bytes) -> None:
        self.loop.post(lambda now: self.loop.send(to, frames))

    def close(self) -> None:
        self.loop.stop()
        self._thread.join()


@pytest.fixture
def here() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.close()


@pytest.fixture
def there() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.close()


def until(condition: threading.Event) -> None:
    assert condition.wait(5)


def test_messages_to_one_address_stay_in_order(here: Recorder, there: Recorder) -> None:
    for number in range(2000):
        here.send(there.address, b"%d" % number, b"x")
    deadline = time.monotonic() + 10
    while len(there.frames) < 2000 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert there.frames == [[b"%d" % number, b"x"] for number in range(2000)]


def test_what_was_posted_runs_in_order_and_before_the_end() -> None:
    recorder, ran = Recorder(), list[int]()
    for number in range(100):
        recorder.loop.post(lambda now, number=number: ran.append(number))  # type: ignore[misc]
    recorder.close()
    assert ran == list(range(100))
    recorder.loop.post(lambda now: ran.append(-1))  # too late, and harmless
    assert len(ran) == 100


def test_a_timer_is_kept_and_an_idle_loop_does_not_wake(here: Recorder) -> None:
    at = time.monotonic() + 0.1
    here.loop.post(lambda now: setattr(here, "wakeup", at))
    time.sleep(0.5)
    assert len(here.ticks) == 1
    assert at <= here.ticks[0] < at + 0.1
    counted, before = here.counted, time.process_time()
    time.sleep(0.5)
    assert here.counted == counted == 1
    assert time.process_time() - before < 0.02


def test_nonsense_is_counted_and_its_peer_named_once(
    here: Recorder, there: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        here.send(there.address, b"bad")
    here.send(there.address, b"good")
    until(there.arrived)
    assert (there.frames, there.loop.undecodable) == ([[b"good"]], 5)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "127.0.0.1 dropped" in caplog.text
    assert "it says so itself" in caplog.text


def test_a_frame_that_is_too_long_costs_its_sender_the_connection_and_nothing_else(
    here: Recorder, there: Recorder
) -> None:
    here.send(there.address, b"x" * 2000)
    time.sleep(0.2)
    other = Recorder()
    other.send(there.address, b"good")
    until(there.arrived)
    other.close()
    assert there.frames == [[b"good"]]


def test_a_socket_that_is_not_used_is_closed_and_opened_again(
    here: Recorder, there: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wires_multimodal, "IDLE_SECONDS", 0.1)
    here.send(there.address, b"1")
    until(there.arrived)
    assert here.loop.connections == 1
    time.sleep(0.4)
    assert here.loop.connections == 0
    there.arrived.clear()
    here.send(there.address, b"2")
    until(there.arrived)
    assert there.frames == [[b"1"], [b"2"]]


def test_a_peer_that_is_not_there_holds_up_nobody(here: Recorder, there: Recorder) -> None:
    gone = Recorder()
    gone.close()
    for _ in range(100):
        here.send(gone.address, b"hello?")
    here.send(there.address, b"good")
    until(there.arrived)


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_other_hosts(host: str, here: Recorder) -> None:
    other = Recorder(host)
    assert other.address.host == host
    here.send(other.address, b"hello")
    until(other.arrived)
    other.close()


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(SettingError, match=r"no control port can be opened on 192\.0\.2\.1"):
        Recorder("192.0.2.1")
