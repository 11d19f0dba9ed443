"""Two language ranks of one host: one receives from an encode instance, the other reads the same rows there."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from embedding_relay.config import RelayConfig
from embedding_relay.memory.device import HOST as ON_THE_HOST
from embedding_relay.memory.shared_rows import Borrower
from embedding_relay.observer import NOBODY
from embedding_relay.protocol.errors import BAD_REQUEST, CLIENT_GONE, CONFLICT, UNAVAILABLE, Failure
from embedding_relay.protocol.status import Status
from embedding_relay.transport.borrowing import BorrowingManager
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from support.loopback import (
    ENDED,
    HOST,
    EncodeInstance,
    LanguageRank,
    assert_all_given_back,
    encode_instance,
    settle,
    small_layout,
)
from support.row_sharing import until
from support.rows import LIMITS, Spec, difference, make_rows

LAYOUT = small_layout()
ROOMY = RelayConfig(default_allocate_tokens=1024)
TIGHT = dataclasses.replace(ROOMY, default_allocate_tokens=128)


@dataclass
class Pair:
    receiving: LanguageManager
    borrowing: BorrowingManager
    encode: EncodeInstance
    numbers: int = 0

    def ask(
        self, *rooms: int, later: bool = False, sources: tuple[str, ...] = ()
    ) -> tuple[list[MooncakeEmbeddingReceiver], ...]:
        """The ends of these rooms at either rank; `later`: the second rank is not there yet."""
        managers = (self.receiving, self.borrowing)
        ends = tuple(
            [
                MooncakeEmbeddingReceiver(manager, self.encode.peer, room, self.numbers + at, sources)
                for at, room in enumerate(rooms)
            ]
            for manager in managers
        )
        self.numbers += len(rooms)
        for end in (*ends[0], *([] if later else ends[1])):
            end.start()
        return ends

    def at_rest(self) -> None:
        settle(self.receiving.metrics, lambda now: now.sizes["lent"] == 0)
        assert (self.borrowing._asked, self.borrowing._early) == ({}, {})
        assert_all_given_back(self.encode, LanguageRank(self.receiving, LAYOUT))


@pytest.fixture(scope="module")
def encode() -> Iterator[EncodeInstance]:
    with encode_instance(LAYOUT) as instance:
        yield instance


@contextmanager
def two_ranks(encode: EncodeInstance, config: RelayConfig = ROOMY, hosts: int = 1) -> Iterator[Pair]:
    """Of one host; `hosts`: on how many the instance has ranks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiving = LanguageManager.open(
        LAYOUT, config, host=HOST, ranks=hosts, max_rows=1_000_000, limits=LIMITS, borrowers={1: ours}
    )
    borrowing = BorrowingManager(Borrower(theirs, LAYOUT, ON_THE_HOST), config, LIMITS, NOBODY)
    receiving.start()
    borrowing.start()
    try:
        yield Pair(receiving, borrowing, encode)
    finally:
        receiving.close()
        borrowing.close()
        borrowing.close()


def forget(*ends: list[MooncakeEmbeddingReceiver]) -> None:
    """As a scheduler when its requests have ended."""
    for end in (end for one in ends for end in one):
        end.target = None


def ended(*ends: list[MooncakeEmbeddingReceiver]) -> bool:
    return all(end.poll() in ENDED for one in ends for end in one)


def test_a_picture_that_comes_again_is_at_both_and_did_not_travel(encode: EncodeInstance) -> None:
    specs = [Spec(room, 900, like=301, salt=0) for room in (301, 302)]
    made = make_rows(LAYOUT, specs[0])
    names = tuple(map(str, range(len(made.segments))))
    sizes = []
    with two_ranks(encode) as pair:
        for spec in specs:
            ends = pair.ask(spec.room, sources=names)
            encode.expect(spec)
            until(lambda ends=ends: ended(*ends))  # type: ignore[misc]
            for [end] in ends:
                assert difference(LAYOUT, made, end.rows()) is None
            sizes.append(ends[0][0].bytes)
            forget(*ends)
        assert sizes[0] - sizes[1] == sum(rows.nbytes for _, rows in made.segments)
        pair.at_rest()


@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["one round", "many rounds"])
def test_both_have_every_bit_and_one_copy_was_written(config: RelayConfig) -> None:
    """An encode instance of its own: nothing that came before is still to be counted there."""
    specs = [Spec(room, total) for room, total in enumerate((1, 900, 2500, 100), 1)]
    with encode_instance(LAYOUT) as encode, two_ranks(encode, config) as pair:
        ends = pair.ask(*(spec.room for spec in specs))
        encode.expect(*specs)
        until(lambda: ended(*ends))
        for one in ends:
            for end, spec in zip(one, specs, strict=True):
                assert end.poll() is Status.SUCCESS, end.failure()
                assert difference(LAYOUT, make_rows(LAYOUT, spec), end.rows()) is None
        received = sum(end.bytes for end in ends[0])
        assert pair.receiving.metrics().sizes["borrowers"] == 1
        settle(encode.metrics, lambda now: now.totals["bytes"] == received)
        forget(*ends)
        pair.at_rest()


def test_two_hosts_receive_a_copy_each() -> None:
    """Four ranks, two on either host; to the encode instance there are two."""
    spec = Spec(81, 2500)
    with (
        encode_instance(LAYOUT) as encode,
        two_ranks(encode, hosts=2) as one,
        two_ranks(encode, TIGHT, hosts=2) as other,
    ):
        ends = [*one.ask(spec.room), *other.ask(spec.room)]
        encode.expect(spec)
        until(lambda: ended(*ends))
        for (end,) in ends:
            assert end.poll() is Status.SUCCESS, end.failure()
            assert difference(LAYOUT, make_rows(LAYOUT, spec), end.rows()) is None
        received = ends[0][0].bytes + ends[2][0].bytes
        settle(encode.metrics, lambda now: now.totals["bytes"] == received)
        forget(*ends)
        one.at_rest()
        other.at_rest()


def test_rows_may_be_there_before_the_second_rank_has_the_request(encode: EncodeInstance) -> None:
    with two_ranks(encode) as pair:
        here, there = pair.ask(11, 12, later=True)
        encode.expect(Spec(11, 300), Spec(12, 300))
        until(lambda: len(pair.borrowing._early) == 2)
        for end in there:
            end.start()
        assert [end.poll() for end in there] == [Status.SUCCESS] * 2
        assert difference(LAYOUT, make_rows(LAYOUT, Spec(12, 300)), there[1].rows()) is None
        forget(here, there)
        pair.at_rest()


@pytest.mark.parametrize("is_early", [False, True])
def test_a_room_that_is_cancelled_at_the_second_rank_holds_nothing(encode: EncodeInstance, is_early: bool) -> None:
    gone = Failure(CLIENT_GONE, "the request was aborted")
    room = 21 + is_early
    with two_ranks(encode) as pair:
        here, (there,) = pair.ask(room)
        said: list[Failure | None] = []
        there.on_end = said.append
        if is_early:
            there.abort(gone)
        encode.expect(Spec(room, 300))
        until(lambda: ended(here))
        if not is_early:
            until(lambda: there.poll() is Status.SUCCESS)
            assert said == [None]
        else:
            assert (there.poll(), there.failure(), said) == (Status.FAILED, gone, [gone])
        forget(here, [there])
        pair.at_rest()


def test_a_room_that_fails_says_nothing_to_the_second_rank(encode: EncodeInstance) -> None:
    """What becomes of it there, the first rank of the instance decides."""
    wrong = Failure(BAD_REQUEST, "no such picture")
    with two_ranks(encode) as pair:
        (here,), (there,) = pair.ask(31)
        encode.refuse(31, wrong)
        until(lambda: here.poll() is Status.FAILED)
        assert there.poll() is Status.BOOTSTRAPPING
        there.abort(here.failure())
        assert there.failure() == wrong
        pair.at_rest()


def test_a_room_that_is_in_use_fails_and_what_comes_for_its_number_goes_back(encode: EncodeInstance) -> None:
    with two_ranks(encode) as pair:
        (here,), (first,) = pair.ask(41)
        again = MooncakeEmbeddingReceiver(pair.borrowing, encode.peer, 41, 1)
        again.start()
        failure = again.failure()
        assert failure is not None
        assert failure.code == CONFLICT
        other = MooncakeEmbeddingReceiver(pair.receiving, encode.peer, 42, 1)
        other.start()
        encode.expect(Spec(42, 10), Spec(41, 10))
        until(lambda: ended([here, other, first]))
        until(lambda: 1 in pair.borrowing._early)
        pair.numbers = 2
        ends = pair.ask(43)
        encode.expect(Spec(43, 10))
        until(lambda: ended(*ends))
        forget([here, first, again, other], *ends)
        pair.at_rest()


def test_a_room_that_nobody_wants_the_rows_of_ends_at_once(encode: EncodeInstance) -> None:
    with two_ranks(encode) as pair:
        declined = MooncakeEmbeddingReceiver(pair.borrowing, encode.peer, 51)
        declined.start()
        declined.abort(Failure(UNAVAILABLE, "too many wait"))
        assert declined.poll() is Status.FAILED
        assert pair.borrowing.check_status(51) is None


def test_without_the_rank_that_receives_the_other_is_ill(encode: EncodeInstance) -> None:
    with two_ranks(encode) as pair:
        _, (there,) = pair.ask(61)
        reasons: list[str] = []
        pair.borrowing.on_unhealthy = reasons.append
        assert pair.receiving._lender is not None
        pair.receiving._lender._closing = True  # as if killed: it says nothing
        for connection in pair.receiving._lender._connections.values():
            connection.shutdown(socket.SHUT_RDWR)
        until(lambda: reasons == ["the rank of this host that receives the rows is gone"])
        failure = there.failure()
        assert failure is not None
        assert failure.code == UNAVAILABLE
        assert not pair.borrowing.healthy()


def test_a_room_without_memory_fails_and_the_next_one_does_not(
    encode: EncodeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(length: int) -> int:
        raise OSError("no space is left")

    with two_ranks(encode) as pair:
        with monkeypatch.context() as patch:
            patch.setattr("embedding_relay.memory.shared_rows.sealed_memory", full)
            (here,), (there,) = pair.ask(71)
            encode.expect(Spec(71, 300))
            until(lambda: here.poll() is Status.FAILED)
            assert "no space is left" in str(here.failure())
            there.abort(here.failure())
        ends = pair.ask(72)
        encode.expect(Spec(72, 300))
        until(lambda: ended(*ends))
        assert [end.poll() for one in ends for end in one] == [Status.SUCCESS] * 2
        forget(*ends)
        pair.at_rest()
