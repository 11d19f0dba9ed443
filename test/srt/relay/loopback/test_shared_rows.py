"""Rows that ranks of one host share: what one has received the others read, and nobody writes there meanwhile."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from embedding_relay.memory import shared_rows
from embedding_relay.memory.buffers import ReceivedRows, bytes_for, rows_in
from embedding_relay.memory.device import HOST
from embedding_relay.memory.layout import Aux, BufferLayout
from embedding_relay.memory.shared_rows import Borrower, Lender
from support.loopback import small_layout
from support.row_sharing import (
    LAYOUT,
    LIMIT,
    Heard,
    borrow_for_ever,
    filled,
    is_all,
    lend_for_ever,
    other_process,
    until,
)
from support.signals import send_signal


class Host:
    """A lender and its borrowers, all in this process: the memory is mapped once for each."""

    def __init__(self, borrowers: int = 1, limit: int = LIMIT, layout: BufferLayout = LAYOUT) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(borrowers)]
        self.lender = Lender({rank + 1: pair[0] for rank, pair in enumerate(pairs)}, limit)
        self.borrowers = [Borrower(pair[1], layout, HOST) for pair in pairs]
        self.heard = [Heard() for _ in pairs]
        self.ends: list[str] = []
        self.returns = 0
        self.lender.start(self._returned, self.ends.append)
        for borrower, heard in zip(self.borrowers, self.heard, strict=True):
            borrower.start(heard.give, heard.ends.append)

    def _returned(self) -> None:
        self.returns += 1

    def let_go(self, number: int) -> None:
        for heard in self.heard:
            del heard.rows[number]

    def close(self) -> None:
        for heard in self.heard:
            heard.rows.clear()
        self.lender.close()
        self.lender.close()
        for borrower in self.borrowers:
            borrower.close()
            borrower.close()


@contextmanager
def host(borrowers: int = 1, limit: int = LIMIT, layout: BufferLayout = LAYOUT) -> Iterator[Host]:
    made = Host(borrowers, limit, layout)
    try:
        yield made
    finally:
        made.close()


def segments() -> int:
    """Mappings of memory that is shared with others."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:sglang-embedding-relay" in line for line in maps)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ---- what is read is what was received


@pytest.mark.parametrize("borrowers", [1, 3])
@pytest.mark.parametrize("total", [1, 5, 1000])
@pytest.mark.parametrize(
    "layout", [LAYOUT, small_layout(deepstack_rows=2, dtype="float32")], ids=["plain", "deepstack"]
)
def test_every_borrower_has_the_rows_and_what_is_said_of_them(borrowers: int, total: int, layout: BufferLayout) -> None:
    with host(borrowers, layout=layout) as made:
        rows = filled(made.lender, total, 7, layout)
        made.lender.lend(0, rows)
        for heard in made.heard:
            there = heard.wait_for(0)
            assert is_all(there, 7)
            assert there.aux == rows.aux
            assert [one.shape for one in there.columns] == [one.shape for one in rows.columns]
            assert [one.dtype for one in there.columns] == [one.dtype for one in rows.columns]


def test_there_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    with host(3) as made:
        rows = filled(made.lender, 1000, 1)
        made.lender.lend(0, rows)
        there = [heard.wait_for(0) for heard in made.heard]
        assert segments() == 4
        rows.embeddings.fill_(2)
        assert all(bool((one.embeddings == 2).all()) for one in there)


def test_a_borrower_cannot_write_there() -> None:
    with host() as made:
        made.lender.lend(0, filled(made.lender, 10, 1))
        there = made.heard[0].wait_for(0).embeddings
        with open("/proc/self/maps") as maps:
            (mapping,) = [line for line in maps if _is_within(line, there.data_ptr())]
        assert mapping.split()[1] == "r--s"


def _is_within(line: str, address: int) -> bool:
    first, last = (int(end, 16) for end in line.split()[0].split("-"))
    return first <= address < last


# ---- when memory is used again


def test_memory_is_used_again_when_both_ranks_have_let_it_go() -> None:
    with host() as made:
        rows = filled(made.lender, 100, 1)
        made.lender.lend(0, rows)
        made.heard[0].wait_for(0)
        where = rows.fill_ids.data_ptr()
        del rows
        assert filled(made.lender, 100, 2).fill_ids.data_ptr() != where, "the borrower has it"
        assert is_all(made.heard[0].rows[0], 1)
        part = made.heard[0].rows[0].embeddings[3:5]
        made.let_go(0)
        assert filled(made.lender, 100, 3).fill_ids.data_ptr() != where, "and still a part of it"
        assert bool((part == 1).all())
        del part
        until(lambda: made.lender.lent == 0)
        assert made.returns == 1
        found = [filled(made.lender, 100, 4) for _ in range(3)]
        assert where in [one.fill_ids.data_ptr() for one in found]


def test_what_the_lender_still_has_is_not_used_again() -> None:
    with host() as made:
        rows = filled(made.lender, 100, 1)
        made.lender.lend(0, rows)
        made.heard[0].wait_for(0)
        made.let_go(0)
        until(lambda: made.lender.lent == 0)
        assert filled(made.lender, 100, 2).fill_ids.data_ptr() != rows.fill_ids.data_ptr()
        assert is_all(rows, 1)


def test_what_was_never_lent_comes_back_by_itself() -> None:
    """Its room has failed."""
    with host() as made:
        where = filled(made.lender, 100, 1).fill_ids.data_ptr()
        assert filled(made.lender, 100, 2).fill_ids.data_ptr() == where


def test_a_borrower_that_says_nothing_holds_rows_of_all() -> None:
    with host(2) as made:
        made.lender.lend(0, filled(made.lender, 100, 1))
        for heard in made.heard:
            heard.wait_for(0)
        del made.heard[0].rows[0]
        until(lambda: made.returns == 1)
        assert made.lender.lent == 1
        del made.heard[1].rows[0]
        until(lambda: made.lender.lent == 0)


def test_no_more_is_kept_than_was_asked_for_on_any_rank() -> None:
    with host(limit=1 << 20) as made:
        many = [filled(made.lender, 4000, 1) for _ in range(6)]  # of 640 KiB
        for number, rows in enumerate(many):
            made.lender.lend(number, rows)
            made.heard[0].wait_for(number)
        del rows
        many.clear()
        assert segments() == 12
        for number in range(6):
            made.let_go(number)
        until(lambda: made.lender.lent == 0)
        until(lambda: segments() == 2)


def test_requests_leave_no_descriptor_and_little_memory() -> None:
    with host(2) as made:
        for number in range(300):
            made.lender.lend(number, filled(made.lender, random.Random(number).randint(1, 3000), 1))
            for heard in made.heard:
                heard.wait_for(number)
            if number == 20:
                before = descriptors()
            made.let_go(number)
            until(lambda: made.lender.lent == 0)
        assert descriptors() == before
        assert made.lender._memory.kept <= LIMIT
        assert not os.path.exists("/dev/shm") or not [one for one in os.listdir("/dev/shm") if "relay" in one]
    gc.collect()
    until(lambda: segments() == 0)


def test_memory_that_is_lacking_is_an_error_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(length: int) -> int:
        raise OSError("no space is left")

    with host() as made:
        with monkeypatch.context() as patch:
            patch.setattr(shared_rows, "sealed_memory", full)
            with pytest.raises(MemoryError, match="65536 bytes of memory for the ranks of this host cannot be had"):
                made.lender.take(100)
        made.lender.lend(0, filled(made.lender, 10, 1))
        assert is_all(made.heard[0].wait_for(0), 1)


def test_many_may_be_given_back_before_anybody_listens() -> None:
    """More than a socket holds, in both directions at once: neither thread waits for the other."""
    with host() as made:
        rows = filled(made.lender, 1, 1)
        for number in range(5000):
            made.lender.lend(number, rows)
        until(lambda: len(made.heard[0].rows) == 5000)
        made.heard[0].rows.clear()
        until(lambda: made.lender.lent == 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the lane of a card has the rows in page-locked memory")
def test_where_no_memory_can_be_page_locked_rows_are_read_where_they_are(caplog: pytest.LogCaptureFixture) -> None:
    with host() as made:
        made.borrowers[0]._is_copied = True
        made.lender.lend(0, filled(made.lender, 10, 1))
        assert is_all(made.heard[0].wait_for(0), 1)
        assert made.lender.lent == 1
    assert "10 rows go to the device from memory that is not page-locked" in caplog.text


# ---- random schedules, and the faults that they must notice


def run_schedule(seed: int) -> None:
    """Requests are received, lent, read and let go in any order; an AssertionError if one changes while it is read."""
    dice = random.Random(seed)
    with host(dice.choice([1, 2, 3]), limit=dice.choice([0, 1 << 20, LIMIT])) as made:
        here: dict[int, ReceivedRows] = {}
        for number in range(60):
            here[number] = filled(made.lender, dice.choice([1, 50, 1500]), number % 100)
            if dice.random() < 0.1:
                del here[number]  # it failed
                continue
            made.lender.lend(number, here[number])
            for heard in made.heard:
                heard.wait_for(number)
            for _ in range(dice.choice([0, 1, 2])):
                dice.choice([lambda: _drop_some(here, dice), lambda: _drop_one(made, dice)])()
            for heard in made.heard:
                assert all(is_all(rows, number % 100) for number, rows in heard.rows.items())
            assert all(is_all(rows, number % 100) for number, rows in here.items())
        here.clear()
        for heard in made.heard:
            heard.rows.clear()
        until(lambda: made.lender.lent == 0)
        assert (made.ends, [heard.ends for heard in made.heard]) == ([], [[]] * len(made.heard))


def _drop_some(here: dict[int, ReceivedRows], dice: random.Random) -> None:
    for number in dice.sample(sorted(here), len(here) // 2):
        del here[number]


def _drop_one(made: Host, dice: random.Random) -> None:
    heard = dice.choice(made.heard)
    if heard.rows:
        del heard.rows[dice.choice(sorted(heard.rows))]


@pytest.mark.parametrize("seed", range(10))
def test_rows_stay_as_they_are_while_anybody_reads_them(seed: int) -> None:
    run_schedule(seed)


def memory_is_free_when_the_lender_has_let_it_go(patch: pytest.MonkeyPatch) -> None:
    def lend(self: Lender, number: int, rows: ReceivedRows) -> None:
        original(self, number, rows)
        _, ranks = self._lent[number]
        self._lent[number] = (
            rows_in(torch.empty(bytes_for(1, LAYOUT), dtype=torch.uint8), Aux(1, 0, False, 1), LAYOUT),
            ranks,
        )

    original = Lender.lend
    patch.setattr(Lender, "lend", lend)


def the_first_to_give_back_gives_back_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lender, "_returned", lambda self, number, rank: self._lent.pop(number, None))


def rows_are_given_back_when_they_were_heard_of(patch: pytest.MonkeyPatch) -> None:
    def rows(self: Borrower, lent: Any) -> ReceivedRows:
        found = original(self, lent)
        self._unused(lent.number)
        return found

    original = Borrower._rows
    patch.setattr(Borrower, "_rows", rows)
    patch.setattr(Lender, "_returned", lambda self, number, rank: self._lent.pop(number, None))


@pytest.mark.parametrize(
    "fault",
    [
        memory_is_free_when_the_lender_has_let_it_go,
        the_first_to_give_back_gives_back_for_all,
        rows_are_given_back_when_they_were_heard_of,
    ],
)
def test_a_planted_fault_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    for seed in range(10):
        try:
            run_schedule(seed)
        except AssertionError:
            return
    pytest.fail("10 schedules noticed nothing")


# ---- the end


def test_a_rank_that_closes_is_no_accident() -> None:
    with host(2) as made:
        made.lender.lend(0, filled(made.lender, 10, 1))
        made.heard[0].wait_for(0)
        made.borrowers[1].close()
        made.lender.close()
        until(lambda: not any(one._thread and one._thread.is_alive() for one in made.borrowers))
        assert is_all(made.heard[0].rows[0], 1), "what a rank has stays readable"
        assert (made.ends, [heard.ends for heard in made.heard]) == ([], [[], []])


def test_a_borrower_that_is_killed_is_noticed_and_holds_nothing() -> None:
    with other_process(borrow_for_ever) as (process, pipe, connection):
        ends: list[str] = []
        lender = Lender({1: connection}, LIMIT)
        lender.start(lambda: None, ends.append)
        lender.lend(0, filled(lender, 100, 7))
        assert pipe.recv() is True
        assert lender.lent == 1
        process.kill()
        until(lambda: ends == ["rank 1, which takes its rows from this one, is gone"])
        assert lender.lent == 0
        lender.close()


def test_a_lender_that_is_killed_is_noticed_and_what_is_here_stays() -> None:
    with other_process(lend_for_ever) as (process, _, connection):
        heard = Heard()
        borrower = Borrower(connection, LAYOUT, HOST)
        borrower.start(heard.give, heard.ends.append)
        rows = heard.wait_for(0)
        process.kill()
        until(lambda: heard.ends == ["the rank of this host that receives the rows is gone"])
        assert is_all(rows, 7)
        borrower.close()


def test_a_lender_closes_though_a_borrower_is_stopped() -> None:
    with other_process(borrow_for_ever) as (process, pipe, connection):
        lender = Lender({1: connection}, LIMIT)
        lender.start(lambda: None, lambda reason: None)
        rows = filled(lender, 100, 7)
        lender.lend(0, rows)
        assert pipe.recv() is True
        send_signal(process.pid, signal.SIGSTOP)
        for number in range(1, 3000):  # more than its socket holds
            lender.lend(number, rows)
        lender.close()
        assert lender.lent == 0
