"""Several ranks of one instance do the same in the same turn, however differently they hear of their rooms.

Each rank is SGLang's own scheduler up to its forward pass (support/scheduler.py says what is not real). SGLang's
broadcast is a list that all of them are given; each has a transfer of its own, which knows only what a test tells it.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from embedding_relay.config import RelayConfig
from embedding_relay.memory.buffers import ReceivedRows
from embedding_relay.observer import NOBODY
from embedding_relay.protocol.errors import BAD_GATEWAY, INTERNAL, UNAVAILABLE, Failure, LocalError
from embedding_relay.protocol.status import Status
from embedding_relay.transport.borrowing import BorrowingManager
from embedding_relay.transport.encode import NoTransfer
from embedding_relay.transport.ranks import Agreement, RoomEnded, Unhealthy
from sglang.srt.disaggregation.multimodal import multimodal_language
from sglang.srt.disaggregation.multimodal.multimodal_embedding import EncodeRole
from sglang.srt.disaggregation.multimodal.multimodal_language import LanguageRole
from sglang.srt.disaggregation.multimodal.tower import VisionTower
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.io_struct import (
    AbortReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
)
from sglang.srt.managers.mm_schedule import init_mm_embedding_cache
from support import scheduler as stand_ins
from support.scheduler import SchedulerWithoutModel, TransferWithoutThread

MODE = "language"  # of the process; a rank has the role that a test gives it

LOST = Failure(BAD_GATEWAY, "the encode instance is gone")
GO_ON = ContinueGenerationReqInput(torch_empty_cache=False)


class Wire:
    """Between the ranks of one instance: what was said and not yet read. A test may keep it back."""

    sockets = ()

    def __init__(self) -> None:
        self.said: list[tuple[int, Any]] = []
        self.is_slow = False

    def drain(self) -> list[tuple[int, Any]]:
        if self.is_slow:
            return []
        said, self.said = self.said, []
        return said

    def from_rank(self, rank: int) -> Any:
        return _Sender(self, rank)


class _Sender:
    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank

    def say(self, report: Any) -> None:
        self.wire.said.append((self.rank, report))


class Ranks:
    """One instance: its schedulers, and the stream of messages that SGLang gives to each of them."""

    def __init__(self, count: int) -> None:
        self.schedulers = [SchedulerWithoutModel() for _ in range(count)]
        self.transfers: list[Any] = []
        self.hands_on = True
        """SGLang hands on nothing in some turns (`--scheduler-recv-interval`)."""
        first = self.schedulers[0]
        first.request_receiver.recv_requests = self._first_receives
        self._stream: list[Any] = []

    def _first_receives(self, local_reqs: Any = None) -> list[Any]:
        self._stream = self.schedulers[0]._take_inbox(local_reqs) if self.hands_on else []
        return list(self._stream)

    def turn(self, *messages: Any) -> None:
        """One turn on every rank; the messages are the same objects, as the ranks of a test change none of them."""
        first, *others = self.schedulers
        first.inbox += messages
        first.ingest_requests()
        for other in others:
            other.inbox += self._stream
            other.ingest_requests()

    def same(self, what: Any) -> Any:
        """What is so on every rank."""
        found = [what(scheduler) for scheduler in self.schedulers]
        assert all(one == found[0] for one in found), found
        return found[0]

    def queued(self) -> list[str]:
        """What SGLang has, in its order."""
        rids: list[str] = self.same(lambda scheduler: [req.rid for req in scheduler.waiting_queue])
        return rids

    def tables(self) -> dict[str, int]:
        tables: dict[str, int] = self.same(lambda scheduler: scheduler.embedding_relay.tables())
        return tables

    def close(self) -> None:
        for transfer in self.transfers:
            transfer.close()


class LanguageRanks(Ranks):
    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.wire = Wire()
        self.transfers = [TransferWithoutThread() for _ in range(count)]
        for rank, (scheduler, transfer) in enumerate(zip(self.schedulers, self.transfers, strict=True)):
            ends = {"reporter": self.wire.from_rank(rank)} if rank else {"reports": self.wire}
            scheduler.embedding_relay = LanguageRole(scheduler, transfer, ranks=count, **ends)

    def has_rows(self, rank: int, room: int) -> None:
        self.transfers[rank].rows_arrive(room)

    def hear_everything(self) -> None:
        """Nothing is on its way between the ranks any more."""

    def fails(self, rank: int, room: int, failure: Failure = LOST) -> None:
        self.transfers[rank].stands(room, Status.FAILED, failure)


class Undelivered:
    """In place of a `Borrower`: rows that the first rank has lent, and that this rank has not heard of yet."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, ReceivedRows]] = deque()

    def start(self, give: Any, on_death: Any) -> None:
        self.give = give

    def close(self) -> None: ...

    def deliver(self) -> bool:
        """The next of them; whether there was one."""
        if self.waiting:
            self.give(*self.waiting.popleft())
            return True
        return False


class SharingRanks(LanguageRanks):
    """All on one host: the first receives, and the others hear of it, each in its own time. The memory is not real."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        for transfer in self.transfers[1:]:
            transfer.close()
        self.undelivered = [Undelivered() for _ in range(count)]
        first = self.transfers[0]
        for rank in range(1, count):
            borrower: Any = self.undelivered[rank]
            manager = BorrowingManager(borrower, first.config, first.limits, NOBODY)
            manager.start()
            self.transfers[rank] = manager
            self.schedulers[rank].embedding_relay = LanguageRole(
                self.schedulers[rank], manager, ranks=count, reporter=self.wire.from_rank(rank)
            )

    def has_rows(self, rank: int, room: int) -> None:
        """The first rank has received them, or another hears of the next that it has."""
        if rank:
            self.undelivered[rank].deliver()
            return
        super().has_rows(0, room)
        receiver = [more for what, other, more in self.transfers[0].asked if (what, other) == ("request", room)][-1]
        for other in self.undelivered[1:]:
            other.waiting.append((receiver.number, receiver.target))

    def hear_everything(self) -> None:
        for rank in self.undelivered:
            while rank.deliver():
                pass


@pytest.fixture(params=[2, 4])
def sharing(mode: str, request: pytest.FixtureRequest) -> Iterator[SharingRanks]:
    made = SharingRanks(request.param)
    yield made
    made.close()


@pytest.fixture(params=[2, 4])
def ranks(mode: str, request: pytest.FixtureRequest) -> Iterator[LanguageRanks]:
    made = LanguageRanks(request.param)
    yield made
    made.close()


def request(rid: str, room: int, **options: Any) -> Any:
    return stand_ins.request(rid, room, **{"need_wait_for_mm_inputs": True, **options})


# ---- language ranks


def test_each_rank_asks_for_the_rows_itself(ranks: LanguageRanks) -> None:
    ranks.turn(request("a", 7))
    assert [transfer.rooms("request") for transfer in ranks.transfers] == [[7]] * len(ranks.transfers)


def test_a_room_is_handed_over_when_the_slowest_rank_has_it(ranks: LanguageRanks) -> None:
    ranks.turn(request("a", 7))
    for rank in reversed(range(len(ranks.transfers))):
        assert ranks.queued() == []
        ranks.has_rows(rank, 7)
        ranks.turn()
    assert ranks.queued() == ["a"]
    assert ranks.tables() == {"parked": 0, "shared": 0}


def test_rooms_keep_one_order_whatever_the_order_on_each_rank(ranks: LanguageRanks) -> None:
    ranks.turn(*(request(str(room), room) for room in (1, 2, 3)))
    for rank in range(len(ranks.transfers)):
        for room in (1, 2, 3) if rank % 2 else (3, 1, 2):
            ranks.has_rows(rank, room)
            ranks.turn()
    assert sorted(ranks.queued()) == ["1", "2", "3"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("others_have_it", [False, True])
def test_a_room_that_one_rank_lost_is_lost_on_all(ranks: LanguageRanks, rank: int, others_have_it: bool) -> None:
    ranks.turn(request("a", 7))
    others = [other for other in range(len(ranks.transfers)) if other != rank]
    if others_have_it:
        for other in others:
            ranks.has_rows(other, 7)
        ranks.turn()
    ranks.fails(rank, 7)
    ranks.turn()
    assert ranks.queued() == []
    assert ranks.same(lambda scheduler: scheduler.answer_to("a")) == LOST
    cancelled = [ranks.transfers[other].rooms("cancel") for other in others]
    assert cancelled == [[] if others_have_it else [7]] * len(others), "no rank receives for nobody"
    ranks.turn()
    assert ranks.same(lambda scheduler: scheduler.is_fully_idle())


def test_an_abort_between_the_report_and_the_decision_is_the_same_for_all(ranks: LanguageRanks) -> None:
    ranks.turn(request("a", 7))
    for rank in range(len(ranks.transfers)):
        ranks.has_rows(rank, 7)
    ranks.turn(AbortReq(rid="a"))
    ranks.turn()
    assert ranks.queued() == []
    assert ranks.same(lambda scheduler: scheduler.ended()) == ["a"]
    assert ranks.same(lambda scheduler: scheduler.is_fully_idle())


def test_a_rank_that_is_unhealthy_makes_the_instance_so(ranks: LanguageRanks) -> None:
    ranks.wire.said.append((1, Unhealthy("relay-control died")))
    ranks.transfers[0].report_unhealthy = lambda reason: setattr(ranks.transfers[0], "unhealthy_reason", reason)
    ranks.turn()
    ranks.turn(request("a", 7))
    answer = ranks.same(lambda scheduler: scheduler.answer_to("a"))
    assert answer.code == UNAVAILABLE
    assert "rank 1: relay-control died" in answer.text
    ranks.turn(request("health", 8, bootstrap_host=FAKE_BOOTSTRAP_HOST, need_wait_for_mm_inputs=None))
    assert ranks.queued() == []


def test_a_decision_that_sglang_did_not_hand_on_is_handed_on_later(ranks: LanguageRanks) -> None:
    ranks.turn(request("a", 7))
    for rank in range(len(ranks.transfers)):
        ranks.has_rows(rank, 7)
    ranks.hands_on = False
    ranks.turn()
    ranks.turn()
    assert ranks.queued() == []
    ranks.hands_on = True
    ranks.turn()
    assert ranks.queued() == ["a"]


def test_a_paused_instance_hands_over_nothing_on_any_rank(ranks: LanguageRanks) -> None:
    ranks.turn(request("a", 7), request("b", 8))
    for rank in range(len(ranks.transfers)):
        ranks.has_rows(rank, 8)
        ranks.has_rows(rank, 7)
    ranks.turn(PauseGenerationReqInput(mode="in_place"))
    assert ranks.queued() == []
    assert ranks.tables()["parked"] == 2
    ranks.turn(GO_ON)
    assert sorted(ranks.queued()) == ["a", "b"]


def test_a_rank_that_says_nothing_fails_the_room_in_the_end(
    ranks: LanguageRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(multimodal_language.time, "monotonic", lambda: now)
    ranks.turn(request("a", 7))
    ranks.has_rows(0, 7)
    ranks.turn()
    now += ranks.transfers[0].config.waiting_timeout
    ranks.turn()
    assert ranks.same(lambda scheduler: scheduler.answer_to("a")).code == INTERNAL


def test_samples_are_counted_alike_on_every_rank(ranks: LanguageRanks) -> None:
    """SGLang hands a message on to the next pipeline stage when this one has dealt with it: it must be as it came."""
    samples = [request(str(number), 7, sampling={"n": 2}) for number in range(3)]
    ranks.turn(samples[0])
    for rank in range(len(ranks.transfers)):
        ranks.has_rows(rank, 7)
    ranks.turn()
    ranks.turn(samples[1], request("between", 8, need_wait_for_mm_inputs=None))
    assert all(sample.need_wait_for_mm_inputs for sample in samples)
    assert ranks.queued() == ["0", "between", "1"]
    assert ranks.tables()["shared"] == 1
    ranks.turn(samples[2])
    assert ranks.tables()["shared"] == 0


def test_only_the_clock_of_the_first_rank_forgets_samples(
    ranks: LanguageRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(multimodal_language.time, "monotonic", lambda: now)
    ranks.turn(request("a", 7, sampling={"n": 2}))
    for rank in range(len(ranks.transfers)):
        ranks.has_rows(rank, 7)
    ranks.turn()
    assert ranks.tables()["shared"] == 1
    for scheduler in ranks.schedulers[1:]:
        for room in scheduler.embedding_relay.shared.values():
            room.over_since -= 1000.0
    ranks.turn(request("b", 7, sampling={"n": 2}))
    assert ranks.queued() == ["a", "b"]
    now += ranks.transfers[0].config.waiting_timeout
    ranks.turn()
    assert ranks.tables()["shared"] == 0


def test_only_the_first_rank_sleeps_and_answers_for_the_instance(ranks: LanguageRanks) -> None:
    ranks.turn(request("a", 7))
    for scheduler in ranks.schedulers:
        asked: list[int] = []
        role = scheduler.embedding_relay
        role._poller = type("Sleeps", (), {"poll": lambda _, ms, asked=asked: asked.append(ms)})()
        scheduler.is_fully_idle()
        role.sleep_until_something_happens()
        assert asked == ([1000] if role.is_first else [])
        assert role.decide() == []


# ---- language ranks of one host


def test_only_the_first_rank_of_a_host_asks_for_rows(sharing: SharingRanks) -> None:
    sharing.turn(request("a", 7))
    assert sharing.transfers[0].rooms("request") == [7]
    assert sharing.tables() == {"parked": 1, "shared": 0}


def test_a_room_is_handed_over_when_the_last_rank_has_heard_of_it(sharing: SharingRanks) -> None:
    sharing.turn(request("a", 7))
    for rank in range(len(sharing.transfers)):
        assert sharing.queued() == []
        sharing.has_rows(rank, 7)
        sharing.turn()
    assert sharing.queued() == ["a"]
    rows = [scheduler.waiting_queue[0].multimodal_inputs.mm_items[0] for scheduler in sharing.schedulers]
    first = rows[0].precomputed_embeddings
    assert all(torch.equal(one.precomputed_embeddings, first) for one in rows)
    assert sharing.tables() == {"parked": 0, "shared": 0}


def test_when_sglang_lets_a_request_go_so_does_everything_else(sharing: SharingRanks) -> None:
    """Without the collector of cycles, for which the memory of the rank that receives would have to wait."""
    gc.disable()
    try:
        sharing.turn(request("a", 7))
        for rank in range(len(sharing.transfers)):
            sharing.has_rows(rank, 7)
        sharing.turn()
        for scheduler in sharing.schedulers:
            req = scheduler.waiting_queue.pop()
            rows = weakref.ref(req.multimodal_inputs.mm_items[0].precomputed_embeddings)
            assert rows() is not None
            del req
            assert rows() is None
    finally:
        gc.enable()


def test_a_room_that_fails_at_the_first_rank_of_a_host_fails_on_all(sharing: SharingRanks) -> None:
    sharing.turn(request("a", 7))
    sharing.fails(0, 7)
    sharing.turn()
    assert sharing.same(lambda scheduler: scheduler.answer_to("a")) == LOST
    assert all(manager._asked == {} for manager in sharing.transfers[1:])
    sharing.turn()
    assert sharing.same(lambda scheduler: scheduler.is_fully_idle())


def test_rows_of_a_request_whose_client_has_left_are_let_go(sharing: SharingRanks) -> None:
    sharing.turn(request("a", 7))
    sharing.has_rows(0, 7)
    sharing.turn(AbortReq(rid="a"))
    sharing.turn()
    assert sharing.same(lambda scheduler: scheduler.ended()) == ["a"]
    for rank, manager in enumerate(sharing.transfers[1:], 1):
        sharing.has_rows(rank, 7)
        assert (manager._asked, manager._early) == ({}, {})
    assert sharing.same(lambda scheduler: scheduler.is_fully_idle())


def test_a_declined_request_is_no_business_of_the_other_ranks(sharing: SharingRanks) -> None:
    for scheduler in sharing.schedulers:
        scheduler.embedding_relay.unhealthy_reason = "ill"
    sharing.turn(request("a", 7))
    assert sharing.transfers[0].rooms("cancel") == [7]
    assert all(manager._asked == {} for manager in sharing.transfers[1:])
    assert sharing.same(lambda scheduler: scheduler.answer_to("a")).code == UNAVAILABLE


# ---- any schedule


def run_schedule(seed: int, kind: type[LanguageRanks] = LanguageRanks) -> None:
    """Rooms end in any order on each rank, reports are late, clients leave, an operator pauses, turns are left out.

    An AssertionError if two ranks differ in what SGLang has, or a request is not answered once.
    """
    dice = random.Random(seed)
    ranks = kind(dice.choice([1, 2, 2, 4]))
    still_open: set[tuple[int, int]] = set()
    rooms = 0

    def end(rank: int, room: int) -> None:
        hears_of_others = isinstance(ranks, SharingRanks) and rank > 0
        if ranks.transfers[rank]._board.status(room) is None and not hears_of_others:
            return  # it was cancelled there
        if dice.random() < 0.1 and not hears_of_others:
            ranks.fails(rank, room)
        else:
            ranks.has_rows(rank, room)

    try:
        for _ in range(60):
            messages: list[Any] = []
            for _ in range(dice.choice([0, 0, 1, 2])):
                rooms += 1
                messages.append(request(f"r{rooms}", rooms, sampling={"n": dice.choice([1, 1, 2])}))
                still_open |= {(rank, rooms) for rank in range(len(ranks.transfers))}
            if rooms and dice.random() < 0.1:
                messages.append(AbortReq(rid=f"r{dice.randint(1, rooms)}"))
            if dice.random() < 0.1:
                messages.append(dice.choice([PauseGenerationReqInput(mode="in_place"), GO_ON]))
            ranks.wire.is_slow = dice.random() < 0.3
            ranks.hands_on = dice.random() < 0.8 or bool(messages)
            ranks.turn(*messages)
            for rank, room in dice.sample(sorted(still_open), min(len(still_open), dice.randint(0, 4))):
                still_open.remove((rank, room))
                end(rank, room)
            ranks.queued()
            ranks.tables()
        ranks.wire.is_slow, ranks.hands_on = False, True
        for rank, room in sorted(still_open):
            end(rank, room)
        ranks.hear_everything()
        for _ in range(3):
            ranks.turn(GO_ON)
        answered = ranks.same(lambda scheduler: sorted(one.rid for one in scheduler.answers if hasattr(one, "rid")))
        assert sorted(ranks.queued() + answered) == sorted(f"r{n + 1}" for n in range(rooms)), "each once"
        assert ranks.tables()["parked"] == 0
        assert len(ranks.schedulers[0].embedding_relay.agreement) == 0
    finally:
        ranks.close()


KINDS = pytest.mark.parametrize("kind", [LanguageRanks, SharingRanks], ids=["each receives", "one receives"])


@KINDS
@pytest.mark.parametrize("seed", range(40))
def test_ranks_do_the_same_under_any_schedule(mode: str, kind: type[LanguageRanks], seed: int) -> None:
    run_schedule(seed, kind)


# ---- faults that an implementer might make: the schedules must notice each


def a_room_is_ready_when_the_first_rank_has_it(patch: pytest.MonkeyPatch) -> None:
    def hear(self: Agreement, rank: int, ended: RoomEnded, now: float) -> None:
        if ended.number in self._well and rank == 0:
            self._decide(ended.number, ended.failure)

    patch.setattr(Agreement, "hear", hear)


def each_rank_decides_for_itself(patch: pytest.MonkeyPatch) -> None:
    def act_on(self: LanguageRole, heard: Any) -> None:
        for queue in (self.prealloc_queue.queue, self.transfer_queue.queue):
            for one in list(queue.values()):
                if one.receiver.poll() in (Status.SUCCESS, Status.FAILED):
                    self._end(one.number, one.receiver.failure())
        original(self, [])

    original = LanguageRole.act_on
    patch.setattr(LanguageRole, "act_on", act_on)


def rooms_keep_the_order_in_which_this_rank_got_them(patch: pytest.MonkeyPatch) -> None:
    def end(self: LanguageRole, number: int, failure: Failure | None) -> None:
        for queue in (self.prealloc_queue.queue, self.transfer_queue.queue):
            for one in queue.values():
                if one.number == number:
                    one.is_decided, one.failure = True, failure
        self.transfer_queue.extend({r: one for r, one in self.prealloc_queue.queue.items() if one.is_decided})
        for room in self.transfer_queue.queue:
            self.prealloc_queue.queue.pop(room, None)

    patch.setattr(LanguageRole, "_end", end)


def a_decision_is_said_once(patch: pytest.MonkeyPatch) -> None:
    def decide(self: LanguageRole) -> list[Any]:
        messages = original(self)
        self._unheard = None
        return messages

    original = LanguageRole.decide
    patch.setattr(LanguageRole, "decide", decide)


def a_failure_elsewhere_is_not_heard(patch: pytest.MonkeyPatch) -> None:
    def hear(self: Agreement, rank: int, ended: RoomEnded, now: float) -> None:
        original(self, rank, RoomEnded(ended.number) if rank else ended, now)

    original = Agreement.hear
    patch.setattr(Agreement, "hear", hear)


def a_rank_that_does_not_receive_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    def request(self: BorrowingManager, receiver: Any, hint_rows: int | None) -> None:
        original(self, receiver, hint_rows)
        self.update_status(receiver.room, Status.SUCCESS)

    original = BorrowingManager.request
    patch.setattr(BorrowingManager, "request", request)


OF_ALL_RANKS = [
    a_room_is_ready_when_the_first_rank_has_it,
    each_rank_decides_for_itself,
    rooms_keep_the_order_in_which_this_rank_got_them,
    a_decision_is_said_once,
]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        *((fault, kind) for fault in OF_ALL_RANKS for kind in (LanguageRanks, SharingRanks)),
        (a_failure_elsewhere_is_not_heard, LanguageRanks),
        (a_rank_that_does_not_receive_does_not_wait, SharingRanks),
    ],
)
def test_a_planted_fault_is_caught(
    mode: str, fault: Any, kind: type[LanguageRanks], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    for seed in range(40):
        try:
            run_schedule(seed, kind)
        except (AssertionError, LocalError):
            return
    pytest.fail("40 schedules noticed nothing")


# ---- encode ranks


class Model:
    """A vision tower that notes what it is asked for; with several ranks, each has a part of every layer."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.fails = False

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        self.calls.append(items[0].hash)
        if self.fails:
            raise ValueError("not with these pixels")
        return torch.zeros((2 * len(items), 1))


class EncodeRanks(Ranks):
    def __init__(self, count: int, group_tokens: int | None = None) -> None:
        super().__init__(count)
        self.models = [Model() for _ in range(count)]
        self.transfer = TransferWithoutThread()
        self.transfers = [self.transfer]
        for rank, (scheduler, model) in enumerate(zip(self.schedulers, self.models, strict=True)):
            manager = NoTransfer(RelayConfig.from_environment()) if rank else self.transfer
            tower = VisionTower(model, "cpu", 1, group_tokens=group_tokens)
            scheduler.embedding_relay = EncodeRole(scheduler, manager, tower)

    def turn(self, *messages: Any) -> None:
        """SGLang remembers rows in its process, and here the ranks share one."""
        first, *others = self.schedulers
        first.inbox += messages
        init_mm_embedding_cache(1 << 20)
        first.ingest_requests()
        for other in others:
            other.inbox += self._stream
            init_mm_embedding_cache(1 << 20)
            other.ingest_requests()

    def encoded(self) -> list[int]:
        assert all(model.calls == self.models[0].calls for model in self.models)
        return self.models[0].calls


@pytest.fixture(params=[2, 4])
def encoders(mode: str, request: pytest.FixtureRequest) -> Iterator[EncodeRanks]:
    made = EncodeRanks(request.param)
    yield made
    made.close()


def picture(rid: str, room: int) -> Any:
    return stand_ins.request(rid, room, pictures=1, seed=room)


def test_all_ranks_run_the_tower_and_the_first_sends_the_rows(encoders: EncodeRanks) -> None:
    encoders.turn(picture("a", 1), picture("b", 2))
    for room in (2, 1):
        encoders.transfer.stands(room, Status.WAITING_FOR_INPUT)
    encoders.turn()
    encoders.turn()
    assert len(encoders.encoded()) == 2
    assert encoders.transfer.rooms("send") == [1, 2]
    for room in (1, 2):
        encoders.transfer.stands(room, Status.SUCCESS)
    encoders.turn()
    assert encoders.same(lambda scheduler: scheduler.ended()) == ["a", "b"]
    assert encoders.tables() == {"parked": 0}


def test_a_room_that_fails_at_the_first_rank_is_over_on_all(encoders: EncodeRanks) -> None:
    encoders.turn(picture("a", 1))
    encoders.transfer.stands(1, Status.FAILED, LOST)
    encoders.turn()
    assert encoders.same(lambda scheduler: scheduler.answer_to("a")) == LOST
    assert encoders.encoded() == []


@pytest.mark.parametrize("failing", [[0], [1], [0, 1]])
def test_a_tower_that_fails_on_some_rank_stops_no_other(encoders: EncodeRanks, failing: list[int]) -> None:
    for rank in failing:
        encoders.models[rank].fails = True
    encoders.turn(picture("a", 1), picture("b", 2))
    for room in (1, 2):
        encoders.transfer.stands(room, Status.WAITING_FOR_INPUT)
    for _ in range(4):
        encoders.turn()
    assert len(encoders.encoded()) == 2
    if 0 in failing:
        assert encoders.same(lambda scheduler: scheduler.ended()) == ["a", "b"]
    else:
        assert encoders.transfer.rooms("send") == [1, 2]


def test_the_tower_rests_on_all_ranks_while_an_operator_holds_the_model(encoders: EncodeRanks) -> None:
    encoders.turn(picture("a", 1))
    encoders.transfer.stands(1, Status.WAITING_FOR_INPUT)
    encoders.turn(PauseGenerationReqInput(mode="in_place"))
    encoders.turn()
    assert encoders.encoded() == []
    encoders.turn(GO_ON)
    encoders.turn()
    assert len(encoders.encoded()) == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_ranks_compute_the_same_groups_if_one_of_them_fails(mode: str, failing: int) -> None:
    ranks = EncodeRanks(2, group_tokens=1)
    ranks.turn(stand_ins.request("a", 1, pictures=3))
    ranks.transfer.stands(1, Status.WAITING_FOR_INPUT)
    ranks.turn()
    ranks.models[failing].fails = True
    ranks.turn()
    ranks.models[failing].fails = False
    for _ in range(3):
        ranks.turn()
    assert len(ranks.encoded()) == (2 if failing == 0 else 3), "who sends them knows that they will not be whole"
    if failing == 0:
        assert ranks.same(lambda scheduler: scheduler.ended()) == ["a"]
    else:
        assert [source.made for source in ranks.transfer.sources(1)] == [3, 5, None]
    ranks.close()


def run_encode_schedule(seed: int) -> None:
    """Rooms move on at the first rank, its tower fails, clients leave, an operator pauses, turns are left out, rows are
    made item by item, and the language side has some.

    An AssertionError if the towers of two ranks were asked for different things, or a request is not answered once.
    """
    dice = random.Random(seed)
    ranks = EncodeRanks(dice.choice([1, 2, 2, 4]), dice.choice([None, 2]))
    for scheduler in ranks.schedulers:
        scheduler.embedding_relay.max_bytes_in_flight = 16  # the rows of two pictures
    rooms = 0
    try:
        for _ in range(60):
            messages: list[Any] = []
            for _ in range(dice.choice([0, 0, 1, 2])):
                rooms += 1
                pictures = dice.choice([1, 1, 3])
                messages.append(stand_ins.request(f"r{rooms}.", rooms, pictures=pictures, seed=rooms))
            if rooms and dice.random() < 0.1:
                messages.append(AbortReq(rid=f"r{dice.randint(1, rooms)}."))
            if dice.random() < 0.1:
                messages.append(dice.choice([PauseGenerationReqInput(mode="in_place"), GO_ON]))
            ranks.models[0].fails = dice.random() < 0.1
            ranks.hands_on = dice.random() < 0.8 or bool(messages)
            ranks.turn(*messages)
            for room in dice.sample(range(1, rooms + 1), min(rooms, 3)):
                advance(ranks.transfer, room, dice)
            ranks.encoded()
            ranks.tables()
        ranks.hands_on, ranks.models[0].fails = True, False
        for _ in range(2 * rooms + 3):
            ranks.turn(GO_ON)
            for room in range(1, rooms + 1):
                advance(ranks.transfer, room, dice)
        ranks.encoded()
        assert ranks.tables()["parked"] == 0
        rids = {f"r{n + 1}." for n in range(rooms)}  # the first rank also says when a tower has run
        answered = ranks.same(lambda scheduler: sorted(rid for rid in map(rid_of, scheduler.answers) if rid in rids))
        assert answered == sorted(rids), "each once"
    finally:
        ranks.close()


def rid_of(answer: Any) -> str | None:
    return getattr(answer, "rid", None)


def advance(transfer: TransferWithoutThread, room: int, dice: random.Random) -> None:
    """The language side asks, or has all rows that were sent, or is gone."""
    if dice.random() < 0.1:
        transfer.stands(room, Status.FAILED, LOST)
    elif (sources := transfer.sources(room)) and sources[-1].made is None:
        transfer.stands(room, Status.SUCCESS)
    elif transfer._board.status(room) is not None and dice.random() < 0.2:
        transfer.promise(room, 0)
    elif transfer._board.status(room) is Status.BOOTSTRAPPING:
        transfer.stands(room, Status.WAITING_FOR_INPUT)


@pytest.mark.parametrize("seed", range(20))
def test_encode_ranks_do_the_same_under_any_schedule(mode: str, seed: int) -> None:
    run_encode_schedule(seed)


def each_rank_runs_the_tower_when_it_can(patch: pytest.MonkeyPatch) -> None:
    def act_on(self: EncodeRole, heard: Any) -> None:
        original(self, [msgspec.structs.replace(one, batch=()) for one in heard])
        if batch := self._next_batch():
            self._encode(batch)

    original = EncodeRole.act_on
    patch.setattr(EncodeRole, "act_on", act_on)


def test_a_planted_fault_of_the_encode_half_is_caught(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a tower that failed on one rank alone weigh nothing there: the ranks must not count for themselves."""
    each_rank_runs_the_tower_when_it_can(monkeypatch)
    for seed in range(40):
        try:
            run_encode_schedule(seed)
        except AssertionError:
            return
    pytest.fail("40 schedules noticed nothing")


def test_the_warm_up_request_waits_on_all_ranks(encoders: EncodeRanks) -> None:
    encoders.transfer.is_reachable = False
    encoders.turn()
    encoders.turn(stand_ins.request("warm-up", 1, bootstrap_host=FAKE_BOOTSTRAP_HOST))
    assert encoders.same(lambda scheduler: scheduler.ended()) == []
    encoders.transfer.is_reachable = True
    encoders.turn()
    assert encoders.same(lambda scheduler: scheduler.ended()) == ["warm-up"]


def test_a_report_names_a_room_by_its_number(ranks: LanguageRanks) -> None:
    ranks.turn(request("a", 7))
    ranks.has_rows(1, 7)
    assert ranks.wire.said == [(1, RoomEnded(0))]
