"""The control loop and its sockets, without a protocol."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from embedding_relay.protocol.errors import SettingError
from embedding_relay.transport import sockets
from support.recorder import MAX_FRAME, Recorder


@pytest.fixture(params=[None, b"k" * 32], ids=["plain", "curve"])
def key(request: pytest.FixtureRequest) -> bytes | None:
    key: bytes | None = request.param
    return key


@pytest.fixture
def here(key: bytes | None) -> Iterator[Recorder]:
    recorder = Recorder(key=key)
    yield recorder
    recorder.close()


@pytest.fixture
def there(key: bytes | None) -> Iterator[Recorder]:
    recorder = Recorder(key=key)
    yield recorder
    recorder.close()


def test_messages_to_one_address_stay_in_order(here: Recorder, there: Recorder) -> None:
    for number in range(2000):
        here.send(there.address, b"%d" % number, b"x")
    there.await_frames(2000)
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
    there.await_frames(1)
    assert (there.frames, there.loop.undecodable) == ([[b"good"]], 5)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "127.0.0.1 dropped" in caplog.text
    assert "it says so itself" in caplog.text


def test_a_frame_that_is_too_long_costs_its_sender_the_connection_and_nothing_else(
    key: bytes | None, here: Recorder, there: Recorder
) -> None:
    here.send(there.address, b"x" * 2 * MAX_FRAME)
    time.sleep(0.2)
    other = Recorder(key=key)
    other.send(there.address, b"good")
    there.await_frames(1)
    other.close()
    assert there.frames == [[b"good"]]


def test_the_longest_frame_passes(here: Recorder, there: Recorder) -> None:
    here.send(there.address, b"x" * MAX_FRAME)
    there.await_frames(1)
    assert there.frames == [[b"x" * MAX_FRAME]]


def test_a_socket_that_is_not_used_is_closed_and_opened_again(
    here: Recorder, there: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "IDLE_SECONDS", 0.1)
    here.send(there.address, b"1")
    there.await_frames(1)
    assert here.loop.connections == 1
    time.sleep(0.4)
    assert here.loop.connections == 0
    here.send(there.address, b"2")
    there.await_frames(2)
    assert there.frames == [[b"1"], [b"2"]]


def test_a_peer_that_is_not_there_holds_up_nobody(key: bytes | None, here: Recorder, there: Recorder) -> None:
    gone = Recorder(key=key)
    gone.close()
    for _ in range(100):
        here.send(gone.address, b"hello?")
    here.send(there.address, b"good")
    there.await_frames(1)


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_other_hosts(host: str, key: bytes | None, here: Recorder) -> None:
    other = Recorder(host, key)
    assert other.address.host == host
    here.send(other.address, b"hello")
    other.await_frames(1)
    other.close()


def test_a_host_that_is_not_ours_is_refused(key: bytes | None) -> None:
    with pytest.raises(SettingError, match=r"no control port can be opened on 192\.0\.2\.1"):
        Recorder("192.0.2.1", key)
    with pytest.raises(SettingError, match=r"no-such-host\.invalid is no address of this machine"):
        Recorder("no-such-host.invalid", key)
