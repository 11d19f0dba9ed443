"""What the other ranks of an instance say reaches the first one, and what strangers say does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from embedding_relay.protocol.errors import BAD_GATEWAY, Failure
from embedding_relay.transport.ranks import Meeting, Report, Reporter, Reports, RoomEnded, Unhealthy
from support.patience import wait_until

HOST = "127.0.0.1"
LOST = Failure(BAD_GATEWAY, "the encode instance is gone")


@pytest.fixture(params=[None, b"k" * 32], ids=["plain", "curve"])
def key(request: pytest.FixtureRequest) -> bytes | None:
    key: bytes | None = request.param
    return key


@pytest.fixture
def reports(key: bytes | None) -> Iterator[Reports]:
    opened = Reports.open(HOST, key)
    yield opened
    opened.close()


class Heard:
    """What the first rank has heard, read as its scheduler does: when a socket has something."""

    def __init__(self, reports: Reports) -> None:
        self.reports = reports
        self.said: list[tuple[int, Report]] = []
        self._poller = zmq.Poller()
        for socket in reports.sockets:
            self._poller.register(socket, zmq.POLLIN)

    def wait_for(self, count: int) -> list[tuple[int, Report]]:
        while len(self.said) + self.reports.refused < count:
            assert self._poller.poll(10_000), f"only {self.said}"
            self.said += self.reports.drain()
        return self.said


def test_every_rank_is_heard_in_its_own_order(reports: Reports, key: bytes | None) -> None:
    ranks = [Reporter(reports.meeting, rank, key) for rank in (1, 2)]
    for rank in ranks:
        rank.start()
    said: list[Report] = [RoomEnded(0), RoomEnded(1, LOST), Unhealthy("relay-control died")]
    for report in said:
        for rank in ranks:
            rank.say(report)
    heard = Heard(reports).wait_for(6)
    for rank in (1, 2):
        assert [report for who, report in heard if who == rank] == said
    for one in ranks:
        one.close()


def test_any_thread_may_report(reports: Reports, key: bytes | None) -> None:
    rank = Reporter(reports.meeting, 1, key)
    rank.start()
    threads = [
        threading.Thread(target=lambda first=first: [rank.say(RoomEnded(first + n)) for n in range(100)])
        for first in (0, 100, 200)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    heard = Heard(reports).wait_for(300)
    assert sorted(report.number for _, report in heard if isinstance(report, RoomEnded)) == list(range(300))
    rank.close()


def test_a_rank_that_is_closed_says_nothing(reports: Reports, key: bytes | None) -> None:
    rank = Reporter(reports.meeting, 1, key)
    rank.say(RoomEnded(0))
    rank.start()
    rank.close()
    rank.close()
    rank.say(RoomEnded(1))
    assert list(reports.drain()) == []


@pytest.mark.parametrize("key", [None], ids=["plain"])
@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"a word"],
        [b"a word", msgspec.json.encode({"rank": 1, "report": {"type": "RoomEnded", "number": 0}})],
        [b"THE WORD"],
        [b"THE WORD", b"{}"],
        [b"THE WORD", b"\xff"],
        [b"THE WORD", b'{"rank":-1,"report":{"type":"RoomEnded","number":0}}'],
        [b"THE WORD", b'{"rank":1,"report":{"type":"RoomEnded","number":0}}', b""],
    ],
)
def test_a_stranger_is_not_heard(reports: Reports, key: bytes | None, frames: list[bytes]) -> None:
    word = reports.meeting.word.encode()
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.connect(f"tcp://{reports.meeting.address}")
        push.send_multipart([word if frame == b"THE WORD" else frame for frame in frames] or [b""])
        wait_until(lambda: list(reports.drain()) == [] and reports.refused == 1)


@pytest.mark.parametrize("key", [b"k" * 32], ids=["curve"])
def test_without_the_secret_nobody_gets_as_far_as_a_word(reports: Reports, key: bytes) -> None:
    with_another_key = Reporter(reports.meeting, 1, b"o" * 32)
    with_another_key.start()
    with_another_key.say(RoomEnded(0))
    ours = Reporter(reports.meeting, 2, key)
    ours.start()
    ours.say(RoomEnded(1))
    assert Heard(reports).wait_for(1) == [(2, RoomEnded(1))]
    with_another_key.close()
    ours.close()


def test_the_word_is_another_each_time() -> None:
    first, second = Reports.open(HOST), Reports.open(HOST)
    assert first.meeting.word != second.meeting.word
    assert isinstance(msgspec.json.decode(msgspec.json.encode(first.meeting), type=Meeting), Meeting)
    first.close()
    second.close()
