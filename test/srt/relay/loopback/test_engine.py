"""The real Mooncake engine behind the data-plane interface."""

from __future__ import annotations

import builtins
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from embedding_relay.memory import engine, quiet
from embedding_relay.memory.engine import MooncakeDataPlane, MooncakeLink
from embedding_relay.memory.handshake import address_of, ask
from embedding_relay.memory.plane import Entry, Region, TransferError, Unreachable
from embedding_relay.protocol.errors import SettingError
from support.engine_stand_in import EngineStandIn
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
    with sending_plane() as (plane, ones):
        link = plane.link(target.session_id)
        target.clear()
        yield target, link, ones
        link.close()


@contextmanager
def sending_plane() -> Iterator[tuple[MooncakeDataPlane, int]]:
    memory = torch.ones(SIZE, dtype=torch.uint8)
    plane = MooncakeDataPlane(HOST, "tcp", receives=False, patience=5)
    plane.start([Region(memory.data_ptr(), SIZE)])
    yield plane, memory.data_ptr()
    plane.close()


def test_a_write_has_landed_when_it_returns(linked: Linked) -> None:
    target, link, ones = linked
    link.write([Entry(ones, target.pointer, 1000), Entry(ones, target.pointer + 5000, 24)])
    assert target.ones() == 1024
    link.write([])
    assert link.is_quiet()


def test_nothing_to_write_proves_no_way(linked: Linked) -> None:
    target, link, ones = linked
    link.write([])
    assert not link._is_proven
    link.write([Entry(ones, target.pointer, 8)])
    assert target.ones() == 8


def test_many_entries_land_where_they_belong(linked: Linked) -> None:
    target, link, ones = linked
    length = 4000
    link.write([Entry(ones, target.pointer + 2 * at * length, length) for at in range(300)])
    assert target.ones() == 300 * length
    assert link._second is not None
    assert link._second._is_proven


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


def test_a_write_has_not_landed_when_it_has_only_left(
    linked_to_mortal: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator may have asked Mooncake for its old way, in which nobody confirms anything."""
    monkeypatch.setenv("MC_TCP_PROTO", "1")
    target, *_ = linked_to_mortal
    with sending_plane() as (plane, ones):
        link = plane.link(target.session_id)
        link.write([Entry(ones, target.pointer, 8)])
        _stop(target)
        with pytest.raises(TransferError):
            link.write([Entry(ones, target.pointer, 8)])
        link.close()


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


@pytest.mark.parametrize("entries", [1, 64], ids=["one engine", "two engines"])
def test_a_failed_write_lands_late_and_quiet_is_claimed_only_after_it_has(
    linked_to_mortal: Linked, entries: int
) -> None:
    """The reason for the quarantine, with the real engine: an error, a new engine, and megabytes that land later."""
    target, link, ones = linked_to_mortal
    length = SIZE // entries
    everything = [Entry(ones + at, target.pointer + at, length) for at in range(0, SIZE, length)]
    link.write(everything)
    target.clear()
    target.signal(signal.SIGSTOP)
    with pytest.raises(TransferError):
        link.write(everything)
    link.renew()
    time.sleep(0.3)
    assert not link.is_quiet()
    target.signal(signal.SIGCONT)
    assert _becomes_quiet(link)
    landed = target.ones()
    assert landed, "the late write that this test is about did not happen"
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


# ---- what an engine is


@pytest.mark.parametrize("receives", [True, False])
def test_an_instance_that_is_asked_for_rdma_and_has_none_does_not_start(
    receives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mooncake takes TCP instead, and reports success."""
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    with pytest.raises(SettingError, match=r"runs over tcp, and was asked for rdma \(device: no-such-device"):
        MooncakeDataPlane(HOST, "rdma", "no-such-device", receives=receives).start([])


def test_a_device_that_the_machine_shows_and_nobody_can_open_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mlx5_7").touch()
    monkeypatch.setattr(engine, "_INFINIBAND", str(tmp_path))
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    before = quiet.own_sockets()
    with pytest.raises(SettingError, match=r"has mlx5_7\).*ibverbs-providers.*set MC_FORCE_TCP=1$") as refused:
        MooncakeDataPlane(HOST, device="mlx5_7").start([])
    assert "\n" not in str(refused.value)
    # An engine says that it ends, on stderr: it has to before the line that is to be the last.
    assert quiet.own_sockets().keys() == before.keys()


def test_an_instance_on_another_address_than_loopback_starts_and_is_written_to() -> None:
    """Its own engine is asked over loopback, and names the address that its peers use."""
    memory = torch.ones(2048, dtype=torch.uint8)
    memory[1024:] = 0
    plane = MooncakeDataPlane("127.0.0.2", "tcp")
    plane.start([Region(memory.data_ptr(), 2048)])
    link = plane.link(plane.session_id)
    link.write([Entry(memory.data_ptr(), memory.data_ptr() + 1024, 1024)])
    assert memory.all()
    link.close()
    plane.close()


def test_an_engine_says_over_what_it_moves_bytes(target: Target) -> None:
    facts = ask(address_of(target.session_id))
    assert (facts.protocols, facts.regions) == ({"tcp"}, ((target.pointer, SIZE),))


def test_the_memory_is_registered_anew_only_after_a_failure(linked: Linked, monkeypatch: pytest.MonkeyPatch) -> None:
    target, link, ones = linked
    made = []
    make_engine = MooncakeDataPlane.make_engine
    monkeypatch.setattr(MooncakeDataPlane, "make_engine", lambda plane: made.append(1) or make_engine(plane))
    for _ in range(3):  # as a worker does that is idle for long, and another one after it
        link.write([Entry(ones, target.pointer, 8)])
        link.close()
        link = link._plane.link(target.session_id)
    assert made == []
    link.write([Entry(ones, target.pointer, 8)])
    link.renew()
    link.write([Entry(ones, target.pointer, 8)])
    assert made == [1]
    link.close()


def test_an_engine_that_knew_a_dead_peer_is_not_used_for_its_successor(stand_in: EngineStandIn) -> None:
    """It would go on where the dead one took its data, and take the failure for a write that may land."""
    with sending_plane() as (plane, ones), second_stand_in() as successor:
        link = plane.link(stand_in.session_id)
        link.write([Entry(ones, 4096, 8)])
        link.close()
        stand_in.says = successor.says
        link = plane.link(stand_in.session_id)
        link.write([Entry(ones, 4096, 8)])
        assert len(successor.connections) == 1
        link.close()


# ---- whose connection is whose


def test_links_that_write_for_the_first_time_together_hold_their_own_connections(target: Target) -> None:
    mortal = Target(HOST)
    with sending_plane() as (plane, ones):
        links = [plane.link(mortal.session_id), plane.link(target.session_id)]
        pairs = zip(links, (mortal, target), strict=True)
        _together(*(partial(link.write, [Entry(ones, to.pointer, 8)]) for link, to in pairs))
        mortal.signal(signal.SIGSTOP)
        with pytest.raises(TransferError):
            links[0].write([Entry(ones, mortal.pointer, SIZE)])
        links[0].renew()
        assert not links[0].is_quiet()
        links[1].write([Entry(ones, target.pointer, 8)])
        mortal.signal(signal.SIGCONT)
        assert _becomes_quiet(links[0])
        links[0].write([Entry(ones, mortal.pointer, SIZE)])
        assert mortal.ones() == SIZE
        for link in links:
            link.close()
    mortal.close()


def test_links_that_fail_together_are_proven_quiet_each(stand_in: EngineStandIn) -> None:
    with sending_plane() as (plane, ones), second_stand_in() as other:
        ends = (stand_in, other)
        links = [plane.link(end.session_id) for end in ends]
        _together(*(partial(link.write, [Entry(ones, 4096, 8)]) for link in links))
        for end in ends:
            end.acknowledges = False
        _together(*(partial(_fail_to_write, link, ones) for link in links))
        _together(*(link.renew for link in links))
        for end, link in zip(ends, links, strict=True):
            assert not link.is_quiet()
            end.read_to_the_end()
            assert _becomes_quiet(link)
            link.close()


def test_an_engine_never_replaces_a_connection_of_which_the_peer_reads_nothing(
    linked_to_mortal: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of several would carry an entry that lands later, and nobody would have the first ones."""
    target, *_ = linked_to_mortal
    monkeypatch.setenv("MC_TCP_STATUS_TIMEOUT_SEC", "1")
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "1")
    port = ask(address_of(target.session_id)).data_port
    with sending_plane() as (plane, ones):
        link = plane.link(target.session_id)
        link.write([Entry(ones, target.pointer, 8)])
        target.signal(signal.SIGSTOP)
        with pytest.raises(TransferError):
            link.write([Entry(ones, target.pointer + 100 * at, 100) for at in range(9)])
        assert _connections_to(port) == 1
        link.renew()
        target.signal(signal.SIGCONT)
        assert _becomes_quiet(link)
        link.close()


def test_a_descriptor_that_means_something_else_by_now_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the copy it was closed, and its number given to a pipe."""
    ends = os.pipe()
    monkeypatch.setattr(quiet, "own_sockets", lambda: {"socket:[1]": [ends[0]]})
    before = len(os.listdir("/proc/self/fd"))
    quiet.HeldConnections().hold({(HOST, 1)})
    quiet.shorten_accept(1)
    assert len(os.listdir("/proc/self/fd")) == before
    for end in ends:
        os.close(end)


# ---- peers that do not answer


def test_a_first_write_to_a_stopped_peer_fails_within_seconds_and_nothing_of_it_lands(linked_to_mortal: Linked) -> None:
    target, link, ones = linked_to_mortal
    _stop(target)
    started = time.monotonic()
    with pytest.raises(Unreachable, match=f"engine of {target.session_id} cannot be reached: timed out"):
        link.write([Entry(ones, target.pointer, SIZE)])
    assert time.monotonic() - started < 10
    assert link.is_quiet(), "nothing was sent"
    target.signal(signal.SIGCONT)
    link.write([Entry(ones, target.pointer, 8)])
    assert target.ones() == 8


def test_a_peer_whose_data_port_refuses_was_sent_nothing(stand_in: EngineStandIn) -> None:
    stand_in.stop_listening(at_handshake=False)
    with sending_plane() as (plane, ones):
        link = plane.link(stand_in.session_id)
        with pytest.raises(Unreachable, match="refused"):
            link.write([Entry(ones, 4096, SIZE)])
        link.renew()
        assert link.is_quiet()
        assert plane.renewals == 0
        link.close()


def test_a_first_write_that_nobody_confirms_may_still_land(stand_in: EngineStandIn) -> None:
    stand_in.acknowledges = False
    with sending_plane() as (plane, ones):
        link = plane.link(stand_in.session_id)
        started = time.monotonic()
        with pytest.raises(TransferError, match=r"first write .* was not confirmed"):
            link.write([Entry(ones, 4096, SIZE)])
        assert time.monotonic() - started < 10
        link.renew()
        assert not link.is_quiet()
        stand_in.read_to_the_end()
        assert _becomes_quiet(link)
        link.close()


@pytest.mark.parametrize(
    "says",
    [
        {"protocol": "rdma"},
        {"protocol": 7},
        {"tcp_data_host": "192.0.2.1"},
        {"tcp_data_port": 0},
        {"tcp_proto_version": 1},
    ],
)
def test_a_peer_that_is_no_engine_for_us_is_sent_nothing(stand_in: EngineStandIn, says: dict[str, Any]) -> None:
    stand_in.says |= says
    with sending_plane() as (plane, ones):
        link = plane.link(stand_in.session_id)
        with pytest.raises(Unreachable, match=stand_in.session_id):
            link.write([Entry(ones, 4096, 8)])
        link.close()
    assert stand_in.connections == []


# ---- what proves quiet


def test_a_peer_that_only_listens_no_more_may_still_read(stand_in: EngineStandIn) -> None:
    """It refuses connections, and has megabytes in its kernel that it will get to."""
    with sending_plane() as (plane, ones):
        link = plane.link(stand_in.session_id)
        link.write([Entry(ones, 4096, 8)])
        stand_in.acknowledges = False
        _fail_to_write(link, ones)
        link.renew()
        stand_in.stop_listening()
        time.sleep(0.3)
        assert not link.is_quiet()
        stand_in.read_to_the_end()
        assert _becomes_quiet(link)
        link.close()


def test_a_connection_that_was_cut_proves_nothing_before_the_peer_is_gone(stand_in: EngineStandIn) -> None:
    with cut_link_to(stand_in) as link:
        for _ in range(3):  # our engine was told of the reset, and whoever looks next would read an end-of-file
            assert not link.is_quiet()
        stand_in.stop_listening()
        assert link.is_quiet()


def test_another_engine_at_the_same_port_is_proof_that_the_first_is_gone(stand_in: EngineStandIn) -> None:
    with cut_link_to(stand_in) as link:
        assert not link.is_quiet()
        stand_in.says["buffers"] = [{"name": "stand-in", "addr": 8192, "length": 1 << 30}]
        assert link.is_quiet()


@pytest.fixture
def stand_in() -> Iterator[EngineStandIn]:
    with second_stand_in() as someone:
        yield someone


@contextmanager
def second_stand_in() -> Iterator[EngineStandIn]:
    someone = EngineStandIn(HOST)
    yield someone
    someone.close()


@contextmanager
def cut_link_to(stand_in: EngineStandIn) -> Iterator[MooncakeLink]:
    """In the middle of a write, of which the peer has read the beginning."""
    with sending_plane() as (plane, ones):
        link = plane.link(stand_in.session_id)
        link.write([Entry(ones, 4096, 8)])
        stand_in.acknowledges = False
        writing = threading.Thread(target=_fail_to_write, args=(link, ones))
        writing.start()
        assert stand_in.has_left_unread.wait(10)
        stand_in.reset()
        writing.join()
        link.renew()
        yield link
        link.close()


def _fail_to_write(link: MooncakeLink, ones: int) -> None:
    with pytest.raises(TransferError):
        link.write([Entry(ones, 4096, SIZE)])


def _together(*calls: Callable[[], object]) -> None:
    barrier, problems = threading.Barrier(len(calls)), []

    def run(call: Callable[[], object]) -> None:
        try:
            barrier.wait(10)
            call()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def _stop(target: Target) -> None:
    """And see it stopped: its threads take a moment, in which they answer."""
    target.signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{target.process.pid}/task")
    while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
        time.sleep(0.001)


def _connections_to(port: int) -> int:
    """Of this machine, whether somebody has a descriptor of them or not."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(int(row.split()[2].rpartition(":")[2], 16) == port and row.split()[3] != "06" for row in rows)


def _becomes_quiet(link: MooncakeLink) -> bool:
    deadline = time.monotonic() + 5
    while not link.is_quiet() and time.monotonic() < deadline:
        time.sleep(0.02)
    return link.is_quiet()
