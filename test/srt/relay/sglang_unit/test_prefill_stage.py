"""The prefill stage: what becomes of the decode half of a request that fails before SGLang has seen it.

The scheduler is real up to its forward pass, as in test_multimodal_language.py. SGLang's sender is a stand-in: it says
what a test wants, and there is no decode instance that would ask for a cache.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from embedding_relay.protocol.errors import BAD_GATEWAY, Failure
from embedding_relay.protocol.status import Status
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.multimodal import prefill_stage, request_notes
from sglang.srt.disaggregation.multimodal.front import Refusal, _as_message, lost_rows_message
from sglang.srt.disaggregation.multimodal.prefill_stage import PrefillRole
from sglang.srt.disaggregation.multimodal.request_notes import EncodeHalf, Note
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.environ import envs
from support import scheduler as stand_ins
from support.scheduler import SchedulerWithoutModel, TransferWithoutThread

LOST = Failure(BAD_GATEWAY, "the encode instance is gone")
MODE = "language"


class Sender:
    """Of SGLang's senders what the role uses."""

    made: list[Sender]
    supports_host_tensor_indices = True

    def __init__(self, *, mgr: Any, bootstrap_addr: str, bootstrap_room: int) -> None:
        self.kv_mgr, self.address, self.bootstrap_room = mgr, bootstrap_addr, bootstrap_room
        self.status = KVPoll.Bootstrapping
        self.is_cleared = False
        self.made.append(self)

    def poll(self) -> Any:
        return self.status

    def failure_exception(self) -> None:
        self.is_cleared = True
        raise RuntimeError("what SGLang raises")


class Told:
    """In place of SGLang's manager of caches."""

    def __init__(self) -> None:
        self.failures: list[tuple[int, str]] = []
        self.kv_status_msg_carries_reason = False

    def conclude_failure(self, *, bootstrap_room: int, failure_reason: str) -> None:
        self.failures.append((bootstrap_room, failure_reason))


@pytest.fixture(autouse=True)
def role(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, monkeypatch: pytest.MonkeyPatch
) -> PrefillRole:
    Sender.made = []
    monkeypatch.setattr(prefill_stage, "_LOOK_AGAIN_MS", 0)
    monkeypatch.setattr(prefill_stage, "get_kv_class", lambda _backend, _kind: Sender)
    queue = SimpleNamespace(transfer_backend="mooncake", bootstrap_port=8111, kv_manager=Told())
    scheduler.disagg_prefill_bootstrap_queue = queue
    scheduler.embedding_relay = PrefillRole(scheduler, transfer)
    return scheduler.embedding_relay


def asked_here(rid: str, room: int, **options: Any) -> Any:
    recv_req = stand_ins.request(rid, room, need_wait_for_mm_inputs=True, **options)
    request_notes.write(recv_req, Note(EncodeHalf("10.0.0.9", 4321, room + 1000)))
    return recv_req


def told(scheduler: SchedulerWithoutModel) -> list[tuple[int, str]]:
    failures: list[tuple[int, str]] = scheduler.disagg_prefill_bootstrap_queue.kv_manager.failures
    return failures


def test_the_decode_half_is_told_when_it_asks(scheduler: SchedulerWithoutModel, role: PrefillRole) -> None:
    scheduler.turn(asked_here("a", 7))
    scheduler.turn(lost_rows_message(1007, LOST))
    assert scheduler.answer_to("a") == LOST
    (sender,) = Sender.made
    assert (sender.address, sender.bootstrap_room) == ("127.0.0.1:8111", 7)
    scheduler.turn()
    assert told(scheduler) == []
    assert not scheduler.is_fully_idle()
    assert role.longest_sleep_ms < 100
    sender.status = KVPoll.WaitingForInput
    scheduler.turn()
    assert told(scheduler) == [(7, LOST.text)]
    assert scheduler.disagg_prefill_bootstrap_queue.kv_manager.kv_status_msg_carries_reason
    assert sender.is_cleared
    assert not role.untold
    assert scheduler.is_fully_idle()
    assert role.longest_sleep_ms == 1000
    scheduler.turn()
    assert len(told(scheduler)) == 1


def test_one_that_never_asks_is_given_up_by_sglangs_deadline(
    scheduler: SchedulerWithoutModel, role: PrefillRole
) -> None:
    scheduler.turn(asked_here("a", 7))
    scheduler.turn(lost_rows_message(1007, LOST))
    Sender.made[0].status = KVPoll.Failed
    scheduler.turn()
    assert told(scheduler) == []
    assert Sender.made[0].is_cleared
    assert not role.untold


def test_those_who_may_never_ask_are_bounded(scheduler: SchedulerWithoutModel, role: PrefillRole) -> None:
    for room in range(prefill_stage._MOST_UNTOLD + 3):
        role.refuse(Refusal(room, "127.0.0.1", 8998, LOST))
    assert len(role.untold) == prefill_stage._MOST_UNTOLD
    assert [sender.bootstrap_room for sender in Sender.made if sender.is_cleared] == [0, 1, 2]


def test_a_room_that_fails_in_the_transfer_is_told_alike(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(asked_here("a", 7), asked_here("b", 8))
    transfer.stands(1008, Status.FAILED, LOST)
    scheduler.turn()
    assert [sender.bootstrap_room for sender in Sender.made] == [8]


def test_so_is_one_that_fails_before_the_scheduler_has_it(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(_as_message(Refusal(7, "127.0.0.1", 8998, LOST)))
    (sender,) = Sender.made
    sender.status = KVPoll.WaitingForInput
    scheduler.turn()
    assert told(scheduler) == [(7, LOST.text)]
    assert transfer.asked == []


def test_a_request_that_has_its_rows_is_sglangs(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(asked_here("a", 7))
    transfer.rows_arrive(1007)
    scheduler.turn()
    assert [req.rid for req in scheduler.waiting_queue] == ["a"]
    assert Sender.made == []


@pytest.mark.parametrize("without", [{"bootstrap_room": None}, {"bootstrap_host": FAKE_BOOTSTRAP_HOST}])
def test_who_has_no_decode_half_tells_nobody(
    scheduler: SchedulerWithoutModel, role: PrefillRole, without: dict[str, Any]
) -> None:
    recv_req = asked_here("a", 7)
    for field, value in without.items():
        setattr(recv_req, field, value)
    role.answer_with_failure(recv_req, LOST)
    assert scheduler.answer_to("a") == LOST
    assert Sender.made == []


def test_without_an_accelerator_nothing_waits_for_one(
    scheduler: SchedulerWithoutModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sender, "supports_host_tensor_indices", True)
    early = envs.SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX
    with early.override(True):
        prefill_stage.do_without_cuda(scheduler)
        assert not Sender.supports_host_tensor_indices
        assert not early.get()
