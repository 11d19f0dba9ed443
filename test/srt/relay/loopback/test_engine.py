"""The real Mooncake engine behind the data-plane interface."""

from __future__ import annotations

import builtins
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from embedding_relay.memory.engine import MooncakeDataPlane, MooncakeLink
from embedding_relay.memory.plane import Entry, Region, TransferError
from embedding_relay.protocol.errors import SettingError
from support.loopback import HOST
from support.target import SIZE, Target, write_over_ipv6

Linked = tuple[Target, MooncakeLink, int]
"""A target, a link to it, and the address of 64 MiB of ones."""


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    target = Target(HOST)
    yield target
    target.close()


@pytest.fixture
def linked(target: Target) -> Iterator[Linked]:
    with link_to(target) as linked:
        yield linked


@pytest.fixture
def linked_to_mortal() -> Iterator[Linked]:
    """A target that the test may kill."""
    target = Target(HOST)
    with link_to(target) as linked:
        yield linked
    target.close()


@contextmanager
def link_to(target: Target) -> Iterator[Linked]:
    memory = torch.ones(SIZE, dtype=torch.uint8)
    plane = MooncakeDataPlane(HOST, "tcp", receives=False)
    plane.start([Region(memory.data_ptr(), SIZE)])
    link = plane.link(target.session_id)
    target.clear()
    yield target, link, memory.data_ptr()
    link.close()
    plane.close()


def test_a_write_has_landed_when_it_returns(linked: Linked) -> None:
    target, link, ones = linked
    link.write([Entry(ones, target.pointer, 1000), Entry(ones, target.pointer + 5000, 24)])
    assert target.ones() == 1024
    link.write([])
    assert link.is_quiet()


def test_a_write_outside_of_registered_memory_is_refused_and_the_link_can_be_renewed(linked: Linked) -> None:
    target, link, ones = linked
    with pytest.raises(TransferError, match=target.session_id):
        link.write([Entry(ones, target.pointer + SIZE, 8)])
    link.renew()
    link.write([Entry(ones, target.pointer, 8)])
    assert target.ones() == 8


def test_too_many_entries_never_reach_the_engine(linked: Linked) -> None:
    target, link, ones = linked
    with pytest.raises(TransferError, match="513 entries"):
        link.write([Entry(ones, target.pointer, 1)] * 513)
    assert target.ones() == 0


def test_a_dead_peer_is_an_error_at_once_and_proven_quiet(linked_to_mortal: Linked) -> None:
    target, link, ones = linked_to_mortal
    link.write([Entry(ones, target.pointer, 8)])
    target.process.kill()
    target.process.join()
    started = time.monotonic()
    with pytest.raises(TransferError):
        link.write([Entry(ones, target.pointer, SIZE)])
    link.renew()
    assert time.monotonic() - started < 3
    assert _becomes_quiet(link)


def test_a_failed_write_lands_late_and_quiet_is_claimed_only_after_it_has(linked_to_mortal: Linked) -> None:
    """The reason for the quarantine, with the real engine: `-1`, a new engine, and megabytes that land afterwards."""
    target, link, ones = linked_to_mortal
    link.write([Entry(ones, target.pointer, 8)])
    target.signal(signal.SIGSTOP)
    with pytest.raises(TransferError):
        link.write([Entry(ones, target.pointer, SIZE)])
    link.renew()
    time.sleep(0.3)
    assert not link.is_quiet()
    target.signal(signal.SIGCONT)
    assert _becomes_quiet(link)
    landed = target.ones()
    assert landed > 8, "the late write that this test is about did not happen"
    time.sleep(0.3)
    assert target.ones() == landed
    link.write([Entry(ones, target.pointer, SIZE)])
    assert target.ones() == SIZE


def test_an_engine_that_is_thrown_away_holds_up_nobody(linked: Linked) -> None:
    """Left to itself its destructor waits for a second, and with it every thread of Python: the scheduler's, too."""
    target, link, ones = linked
    took = []
    for _ in range(3):
        link.write([Entry(ones, target.pointer, 8)])
        started = time.monotonic()
        link.renew()
        took.append(time.monotonic() - started)
    assert min(took) < 0.5, took


def test_ipv6() -> None:
    write_over_ipv6()


def test_a_missing_wheel_is_one_line_with_the_three_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without_mooncake(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("mooncake"):
            raise ImportError("libcudart.so.12: cannot open shared object file")
        return importing(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "mooncake.engine", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_mooncake)
    with pytest.raises(SettingError, match=r"libcudart.*\[cpu\], \[cuda12\] or \[cuda13\]"):
        MooncakeDataPlane(HOST, "tcp").start([])


def _becomes_quiet(link: MooncakeLink) -> bool:
    deadline = time.monotonic() + 5
    while not link.is_quiet() and time.monotonic() < deadline:
        time.sleep(0.02)
    return link.is_quiet()
