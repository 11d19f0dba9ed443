"""Which ranks receive rows: ranks are threads here, and what they hand in is gathered as SGLang's collective does."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from embedding_relay.memory import shared_segment
from embedding_relay.memory.shared_segment import NotShared
from embedding_relay.protocol.errors import LocalError
from embedding_relay.transport import neighbours
from embedding_relay.transport.neighbours import ALONE, Neighbours, Offer, meet

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


class Group:
    """Every rank gets what all have handed in, once the last one has."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._barrier = threading.Barrier(size, timeout=20)
        self._handed_in: list[Any] = [None] * size

    def gather(self, rank: int) -> Callable[[Any], Sequence[Any]]:
        def hand_in(own: Any) -> Sequence[Any]:
            self._handed_in[rank] = own
            self._barrier.wait()
            all_of_them = list(self._handed_in)
            self._barrier.wait()
            return all_of_them

        return hand_in


@contextmanager
def ranks(size: int, before: Callable[[int], None] = lambda rank: None, **options: Any) -> Iterator[list[Neighbours]]:
    """What each rank is to the others; `before` runs in a rank's own thread, which ends with it."""
    group = Group(size)

    def rank_of(rank: int) -> Neighbours:
        before(rank)
        return meet(rank, group.gather(rank), **options)

    with ThreadPoolExecutor(size) as threads:
        found = list(threads.map(rank_of, range(size)))
    try:
        yield found
    finally:
        for one in found:
            for connection in (*one.borrowers.values(), *([one.lender] if one.lender else [])):
                connection.close()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_first_rank_of_a_host_receives_for_all(size: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ranks(size) as (first, *others):
        assert first.receiving == 1
        assert first.lender is None
        assert sorted(first.borrowers) == list(range(1, size))
        for rank, other in enumerate(others, 1):
            assert (other.receiving, other.borrowers) == (1, {})
            assert other.lender is not None
            other.lender.send(b"it is %d" % rank)
            assert first.borrowers[rank].recv(20) == b"it is %d" % rank
            assert first.borrowers[rank].gettimeout() is None
            assert other.lender.gettimeout() is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == size, "each says once which way it is"
    listed = ", ".join(map(str, range(1, size)))
    assert f"relay: rank 0 receives rows, for itself and for rank {listed} of the same host" in said
    assert "relay: rank 1 takes its rows from rank 0, which is on the same host" in said


def test_on_two_hosts_one_of_each_receives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel says that they are two."""
    original = neighbours._offer

    def offer(listener: socket.socket) -> tuple[Offer | None, str]:
        made, why = original(listener)
        assert made is not None
        return made._replace(host=f"{made.host} {getattr(here, 'host', '')}"), why

    here = threading.local()
    monkeypatch.setattr(neighbours, "_offer", offer)
    with ranks(5, lambda rank: setattr(here, "host", "A" if rank in (0, 3) else "B")) as found:
        assert [one.receiving for one in found] == [2] * 5
        assert [sorted(one.borrowers) for one in found] == [[3], [2, 4], [], [], []]
        assert [one.lender is None for one in found] == [True, True, False, False, False]


@pytest.mark.skipif(os.geteuid() != 0, reason="another network namespace needs root")
def test_in_another_network_namespace_a_rank_receives_for_itself() -> None:
    def leave(rank: int) -> None:
        if rank == 1:
            assert ctypes.CDLL(None).unshare(_NEW_NETWORK) == 0  # of this thread, which is a process to the kernel

    with ranks(3, leave) as found:
        assert [one.receiving for one in found] == [2] * 3
        assert [sorted(one.borrowers) for one in found] == [[2], [], []]
        assert [one.lender is None for one in found] == [True, True, False]


def test_a_setting_has_each_receive_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ranks(2, may_share=False) as found:
        assert found == [Neighbours(receiving=2)] * 2
    assert {record.getMessage() for record in caplog.records} == {
        f"relay: rank {rank} receives rows for itself alone: SGLANG_EMBEDDING_DATA_PLANE=mooncake" for rank in (0, 1)
    }


def test_without_shared_memory_each_receives_for_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(length: int) -> int:
        raise PermissionError("not in this container")

    monkeypatch.setattr(neighbours, "sealed_memory", forbidden)
    with caplog.at_level(logging.INFO), ranks(3) as found:
        assert found == [Neighbours(receiving=3)] * 3
    assert "it cannot share memory with others: not in this container" in caplog.text


@pytest.mark.parametrize("why", [NotShared("another user has its memory"), ConnectionRefusedError("refused")])
def test_a_rank_that_cannot_connect_receives_for_itself(
    why: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = neighbours._connect

    def connect(name: str, rank: int) -> socket.socket:
        if rank == 2:
            raise why
        return original(name, rank)

    monkeypatch.setattr(neighbours, "_connect", connect)
    with caplog.at_level(logging.INFO), ranks(4) as found:
        assert [one.receiving for one in found] == [2] * 4
        assert sorted(found[0].borrowers) == [1, 3]
        assert (found[2].borrowers, found[2].lender) == ({}, None)
    assert f"relay: rank 2 receives rows for itself alone: {why}" in caplog.text


@pytest.mark.parametrize("says", [b"", b"nonsense", b"0", b"-1", b"9" * 40])
def test_a_stranger_gets_nothing(says: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of our own user; others are not heard at all. It connects before the ranks do, and names none of them."""
    original, strangers = neighbours._connect, []

    def connect(name: str, rank: int) -> socket.socket:
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stranger.settimeout(5)
        stranger.connect(shared_segment.socket_name(name))
        stranger.send(says)
        strangers.append(stranger)
        return original(name, rank)

    monkeypatch.setattr(neighbours, "_connect", connect)
    with ranks(2) as found:
        assert sorted(found[0].borrowers) == [1]
        assert strangers[0].recv(1) == b""
    strangers[0].close()


def test_another_user_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "is_our_user", lambda connection: False)
    with ranks(2) as found:
        assert found == [Neighbours(receiving=2)] * 2


def test_a_rank_that_has_connected_and_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_ANSWER_TIMEOUT", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0relay-test-nobody-comes")
        listener.listen()
        with pytest.raises(LocalError, match=r"ranks \{1\} of this host have not connected"):
            neighbours._accept(listener, {1})


def test_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with ranks(4):
        assert len(os.listdir("/proc/self/fd")) == before + 6
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_rank_without_others_needs_nobody() -> None:
    assert Neighbours() == ALONE
    with ranks(1) as found:
        assert found == [ALONE]
