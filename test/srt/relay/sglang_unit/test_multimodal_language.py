"""The language half in a scheduler: who waits for which rows, what SGLang is given, and what an operator's commands do.

SGLang's scheduler is real up to its forward pass (support/scheduler.py says what is not); the transfer is a stand-in.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedding_relay.protocol.errors import (
    BAD_GATEWAY,
    BAD_REQUEST,
    CLIENT_GONE,
    CONFLICT,
    INTERNAL,
    UNAVAILABLE,
    Failure,
)
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.registry.entry import name_of_rank
from sglang.srt.disaggregation.multimodal import multimodal_language, request_notes
from sglang.srt.disaggregation.multimodal.front import Refusal, _as_message, abort_message, lost_rows_message
from sglang.srt.disaggregation.multimodal.multimodal_language import LanguageRole
from sglang.srt.disaggregation.multimodal.request_notes import EncodeHalf, Note, encode_half
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.io_struct import (
    AbortReq,
    BeginWeightUpdateReqInput,
    ContinueGenerationReqInput,
    EndWeightUpdateReqInput,
    FlushCacheReqInput,
    PauseGenerationReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UpdateWeightFromDiskReqInput,
)
from support import scheduler as stand_ins
from support.scheduler import SchedulerWithoutModel, TransferWithoutThread

MODE = "language"

KEEP_DEVICE_CACHE = ContinueGenerationReqInput(torch_empty_cache=False)
# Each keeps the model from running, and what ends that.
HOLDS = {
    "pause-in-place": (PauseGenerationReqInput(mode="in_place"), KEEP_DEVICE_CACHE),
    "pause-retract": (PauseGenerationReqInput(mode="retract"), KEEP_DEVICE_CACHE),
    "weight-update": (BeginWeightUpdateReqInput(), EndWeightUpdateReqInput()),
    "memory-release": (ReleaseMemoryOccupationReqInput(), ResumeMemoryOccupationReqInput()),
}
holds = pytest.mark.parametrize(("hold", "go_on"), HOLDS.values(), ids=HOLDS)
LOST = Failure(BAD_GATEWAY, "the encode instance is gone")


@pytest.fixture(autouse=True)
def role(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> LanguageRole:
    scheduler.embedding_relay = LanguageRole(scheduler, transfer)
    return scheduler.embedding_relay


def request(rid: str, room: int, **options: Any) -> Any:
    """With a picture whose pixels are elsewhere: one placeholder stands for it."""
    return stand_ins.request(rid, room, **{"need_wait_for_mm_inputs": True, **options})


def queued(scheduler: SchedulerWithoutModel) -> list[str]:
    return [req.rid for req in scheduler.waiting_queue]


# ---- the way of a request


def test_a_request_with_a_picture_waits_for_its_rows(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    scheduler.turn(request("a", 7))
    assert transfer.rooms("request") == [7]
    assert transfer.asked[0][2].bootstrap_addr == "127.0.0.1:8998"
    for status in (Status.WAITING_FOR_INPUT, Status.TRANSFERRING):
        transfer.stands(7, status)
        scheduler.turn()
        assert queued(scheduler) == []
        assert role.tables() == {"parked": 1, "shared": 0}
        assert not scheduler.is_fully_idle()


def test_a_request_whose_rows_are_here_is_one_of_sglangs_own(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    scheduler.turn(request("a", 7))
    transfer.rows_arrive(7, seed=3)
    scheduler.turn()
    (req,) = scheduler.waiting_queue
    assert list(req.origin_input_ids_unpadded) == [1, 9, 9, 2]
    (item,) = req.multimodal_inputs.mm_items
    assert torch.equal(item.precomputed_embeddings, torch.full((2, 2), 3.0))
    assert role.tables() == {"parked": 0, "shared": 0}


def test_no_token_is_asked_for_beyond_the_positions_that_the_model_has(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    transfer.limits = dataclasses.replace(transfer.limits, positions=8)
    scheduler.turn(request("a", 7))
    transfer.rows_arrive(7)
    transfer.asked[0][2].target.mrope_delta = 1
    scheduler.turn()
    (req,) = scheduler.waiting_queue
    assert req.sampling_params.max_new_tokens == 8 - 4 - 1


@pytest.mark.parametrize("wanted", [True, False])
def test_the_ids_of_the_expanded_prompt_are_sent_ahead_if_the_client_wants_them(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, wanted: bool
) -> None:
    recv_req = request("a", 7)
    request_notes.write(recv_req, Note(wants_prompt_ids=wanted))
    scheduler.turn(recv_req)
    transfer.rows_arrive(7)
    scheduler.turn()
    assert queued(scheduler) == ["a"]
    told = [answer.finished_reason for answer in scheduler.answers]
    assert told == ([{"relay_prompt_token_ids": [1, 9, 9, 2]}] if wanted else [])


def test_text_goes_to_sglang_at_once(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> None:
    scheduler.turn(request("a", 7, need_wait_for_mm_inputs=None))
    assert queued(scheduler) == ["a"]
    assert transfer.asked == []


def test_a_room_that_fails_is_answered_with_its_reason(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 7))
    transfer.stands(7, Status.FAILED, LOST)
    scheduler.turn()
    assert scheduler.answer_to("a") == LOST
    assert queued(scheduler) == []
    assert scheduler.is_fully_idle()


def test_the_instances_own_bootstrap_port_is_meant_where_none_is_named(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.server_args = SimpleNamespace(disaggregation_bootstrap_port=4321)
    scheduler.turn(request("a", 7, bootstrap_port=None))
    assert transfer.asked[0][2].bootstrap_addr == "127.0.0.1:4321"


@pytest.mark.parametrize(("rank", "peer"), [(None, 0), (0, 0), (2, 2)])
def test_rows_are_asked_of_the_encode_rank_that_makes_them(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, rank: int | None, peer: int
) -> None:
    scheduler.turn(request("a", 7, disagg_prefill_dp_rank=rank))
    assert transfer.asked[0][2].bootstrap_addr == name_of_rank(Address("127.0.0.1", 8998), peer)


def test_no_host_is_the_clients_fault(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> None:
    scheduler.turn(request("a", 7, bootstrap_host=None))
    answer = scheduler.answer_to("a")
    assert answer is not None
    assert answer.code == BAD_REQUEST
    assert transfer.asked == []


def test_one_room_cannot_be_used_by_two_transfers_at_once(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    scheduler.turn(request("a", 7))
    transfer.rows_arrive(7)
    scheduler.turn(request("b", 8))
    transfer.stands(8, Status.WAITING_FOR_INPUT)
    third = request("c", 8)
    role.agreement.begin(role.prealloc_queue.add(third, encode_half(third)).number)
    scheduler.turn()
    answer = scheduler.answer_to("c")
    assert answer is not None
    assert answer.code == CONFLICT


def test_rows_that_cannot_be_handed_over_fail_their_request_alone(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler.turn(request("a", 7), request("b", 8))
    transfer.rows_arrive(7)
    transfer.asked[0][2].target.items[:, 1] = 999
    transfer.rows_arrive(8)
    scheduler.turn()
    answer = scheduler.answer_to("a")
    assert answer is not None
    assert answer.code == INTERNAL
    assert queued(scheduler) == ["b"]


# ---- rows that this instance has asked for itself


def asked_here(rid: str, room: int, **options: Any) -> Any:
    """The bootstrap fields are not about the encode half then."""
    recv_req = request(rid, room, **options)
    request_notes.write(recv_req, Note(EncodeHalf("10.0.0.9", 4321, room + 1000, 2)))
    return recv_req


def test_its_rows_are_those_of_the_room_that_was_chosen_here(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    scheduler.turn(asked_here("a", 7, bootstrap_host=None))
    assert transfer.rooms("request") == [1007]
    assert transfer.asked[0][2].bootstrap_addr == name_of_rank(Address("10.0.0.9", 4321), 2)
    transfer.rows_arrive(1007)
    scheduler.turn()
    (req,) = scheduler.waiting_queue
    assert req.bootstrap_room == 7  # SGLang's own business
    assert role.tables() == {"parked": 0, "shared": 0}


def test_rows_that_will_not_come_fail_their_request(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    scheduler.turn(asked_here("a", 7), request("b", 8))
    scheduler.turn(lost_rows_message(1007, LOST))
    assert scheduler.answer_to("a") == LOST
    assert len(scheduler.answers) == 1
    assert transfer.rooms("cancel") == [1007]
    transfer.stands(1007, Status.FAILED, LOST)
    scheduler.turn()
    assert role.tables() == {"parked": 1, "shared": 0}


def test_rows_that_are_here_already_are_not_lost(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(asked_here("a", 7))
    transfer.rows_arrive(1007)
    scheduler.turn()
    scheduler.turn(lost_rows_message(1007, LOST))
    assert queued(scheduler) == ["a"]
    assert scheduler.answers == []


def test_the_news_that_rows_are_lost_may_be_faster_than_the_request(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    scheduler.turn(*(lost_rows_message(room, LOST) for room in range(1000, 1500)))
    scheduler.turn(asked_here("a", 499))
    assert scheduler.answer_to("a") == LOST
    assert transfer.rooms("cancel") == [1499]
    assert role.tables() == {"parked": 0, "shared": 0}
    assert len(role.lost) == multimodal_language._MOST_LOST - 1


# ---- what is refused


def test_an_abort_is_answered_and_told_to_the_encode_half(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 7), request("b", 8))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    scheduler.turn(AbortReq(rid="a"))
    assert transfer.reason(7).code == CLIENT_GONE
    assert scheduler.ended() == ["a"]
    transfer.rows_arrive(8)
    scheduler.turn()
    assert queued(scheduler) == ["b"]


def test_an_abort_of_our_own_says_why(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> None:
    scheduler.turn(request("a", 7))
    scheduler.turn(abort_message("a", LOST))
    assert transfer.reason(7) == LOST
    assert scheduler.answer_to("a") == LOST


def test_an_abort_of_all_requests_is_heard_by_all_other_halves(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    """What SGLang's `pause_generation` does in its mode `abort`, which never tells the scheduler that it is paused."""
    scheduler.turn(*(request(str(room), room) for room in (1, 2, 3)))
    transfer.stands(1, Status.WAITING_FOR_INPUT)
    transfer.stands(2, Status.TRANSFERRING)
    scheduler.turn()
    scheduler.turn(AbortReq(abort_all=True))
    assert sorted(scheduler.ended()) == ["1", "2", "3"]
    assert [transfer.reason(room).code for room in (1, 2, 3)] == [CLIENT_GONE] * 3
    assert scheduler.is_fully_idle()


def test_what_the_tokenizer_manager_refused_is_told_to_the_encode_half(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    failure = Failure(BAD_REQUEST, "no picture")
    scheduler.turn(_as_message(Refusal(7, "127.0.0.1", None, failure)))
    assert transfer.reason(7) == failure
    assert scheduler.answers == []


def test_a_refusal_without_a_host_has_nobody_to_be_told_to(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(_as_message(Refusal(7, None, None, Failure(BAD_REQUEST, "no picture"))))
    assert transfer.asked == []


def test_a_refusal_of_a_room_that_others_wait_for_ends_nothing(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    """Of several samples one can fail before it reaches the scheduler."""
    scheduler.turn(request("a", 7), _as_message(Refusal(7, "127.0.0.1", 8998, Failure(BAD_REQUEST, "no picture"))))
    assert transfer.rooms("cancel") == []
    transfer.rows_arrive(7)
    scheduler.turn()
    assert queued(scheduler) == ["a"]


def test_an_unhealthy_instance_takes_no_pictures_and_answers_no_health_request(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    transfer.unhealthy_reason = "a thread died"
    scheduler.turn()
    health = request("health", 8, bootstrap_host=FAKE_BOOTSTRAP_HOST, need_wait_for_mm_inputs=None)
    scheduler.turn(request("a", 7), health)
    answer = scheduler.answer_to("a")
    assert answer == transfer.reason(7)
    assert answer is not None
    assert answer.code == UNAVAILABLE
    assert queued(scheduler) == []


REFUSED = {
    "no-priority": (UNAVAILABLE, {"abort_on_priority_when_disabled": True}, {"priority": 3}),
    "full": (UNAVAILABLE, {"max_queued_requests": 0}, {}),
    "beam": (BAD_REQUEST, {}, {"sampling": {"beam_width": 2}}),
    "too-long": (BAD_REQUEST, {"max_req_input_len": 2}, {}),
    "no-session": (BAD_REQUEST, {}, {"session_params": SimpleNamespace(id="gone")}),
}


@pytest.mark.parametrize(("code", "settings", "options"), REFUSED.values(), ids=REFUSED)
def test_what_sglang_refuses_when_the_rows_are_here_concerns_its_client_alone(
    scheduler: SchedulerWithoutModel,
    transfer: TransferWithoutThread,
    code: int,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """The encode half has been told of its success: it waits for nothing any more."""
    vars(scheduler).update(settings)
    scheduler.turn(request("a", 7, **options))
    transfer.rows_arrive(7)
    scheduler.turn()
    for req in scheduler.waiting_queue:  # SGLang answers what it queued with an error by one token's prefill
        assert req.to_finish.status_code == code
    if not scheduler.waiting_queue:
        answer = scheduler.answer_to("a")
        assert answer is not None
        assert answer.code == code
    assert transfer.rooms("cancel") == []
    assert scheduler.embedding_relay.is_idle()


# ---- several samples


def test_samples_share_the_rows_of_their_room(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    """SGLang asks `n + 1` times: first for the prompt alone, then for each sample."""
    samples = [request(str(number), 7, sampling={"n": 3}) for number in range(4)]
    scheduler.turn(samples[0])
    transfer.rows_arrive(7)
    scheduler.turn()
    assert queued(scheduler) == ["0"]
    scheduler.turn(samples[1], samples[2])
    scheduler.turn(samples[3])
    assert queued(scheduler) == ["0", "1", "2", "3"]
    assert transfer.rooms("request") == [7]
    assert role.tables() == {"parked": 0, "shared": 0}


def test_a_failure_is_shared_too(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> None:
    samples = [request(str(number), 7, sampling={"n": 2}) for number in range(3)]
    scheduler.turn(samples[0])
    transfer.stands(7, Status.FAILED, LOST)
    for sample in samples[1:]:
        scheduler.turn(sample)
    assert [scheduler.answer_to(str(number)) for number in range(3)] == [LOST] * 3


def test_a_sample_that_is_aborted_at_once_takes_nothing_from_the_others(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    samples = [request(str(number), 7, sampling={"n": 2}) for number in range(3)]
    scheduler.turn(samples[0])
    transfer.rows_arrive(7)
    scheduler.turn()
    scheduler.turn(samples[1], AbortReq(rid="1"))
    scheduler.turn(samples[2])
    assert queued(scheduler) == ["0", "2"]
    assert transfer.rooms("request") == [7]


def test_rows_that_no_sample_comes_for_are_not_kept_for_ever(
    scheduler: SchedulerWithoutModel,
    transfer: TransferWithoutThread,
    role: LanguageRole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(multimodal_language.time, "monotonic", lambda: now)
    scheduler.turn(request("a", 7, sampling={"n": 2}))
    transfer.rows_arrive(7)
    scheduler.turn()
    now += transfer.config.waiting_timeout - 1
    scheduler.turn(request("b", 7, sampling={"n": 2}))
    assert role.tables()["shared"] == 1
    now += 2
    scheduler.turn()
    assert role.tables()["shared"] == 0


# ---- an operator's commands


def answers_of_commands(scheduler: SchedulerWithoutModel) -> list[bool]:
    return [one.success for one in scheduler.answers if hasattr(one, "success")]


@holds
def test_nothing_is_handed_over_while_an_operator_holds_the_model(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole, hold: Any, go_on: Any
) -> None:
    scheduler.turn(request("a", 7), hold)
    transfer.rows_arrive(7)
    scheduler.turn()
    scheduler.turn()
    assert queued(scheduler) == []
    assert role.tables()["parked"] == 1
    scheduler.turn(go_on)
    assert queued(scheduler) == ["a"]
    scheduler.turn()
    assert queued(scheduler) == ["a"]


@holds
def test_samples_are_held_back_with_their_rows(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, hold: Any, go_on: Any
) -> None:
    samples = [request(str(number), 7, sampling={"n": 2}) for number in range(3)]
    scheduler.turn(samples[0], hold)
    transfer.rows_arrive(7)
    scheduler.turn(samples[1])
    scheduler.turn()
    assert queued(scheduler) == []
    scheduler.turn(go_on)
    scheduler.turn(samples[2])
    assert queued(scheduler) == ["0", "1", "2"]


@holds
def test_a_held_instance_takes_requests_and_answers_those_that_end(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, hold: Any, go_on: Any
) -> None:
    scheduler.turn(request("lost", 1), hold)
    scheduler.turn(request("new", 2), request("left", 3))
    transfer.stands(1, Status.FAILED, LOST)
    scheduler.turn(AbortReq(rid="left"))
    assert scheduler.answer_to("lost") == LOST
    assert sorted(scheduler.ended()) == ["left", "lost"]
    transfer.rows_arrive(2)
    scheduler.turn(go_on)
    assert queued(scheduler) == ["new"]


@pytest.mark.parametrize("status", [Status.BOOTSTRAPPING, Status.WAITING_FOR_INPUT, Status.TRANSFERRING])
@pytest.mark.parametrize("paused", [False, True])
def test_no_parked_request_is_in_the_way_of_a_flush(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, status: Status, paused: bool
) -> None:
    scheduler.turn(request("a", 7))
    transfer.stands(7, status)
    scheduler.turn()
    if paused:
        scheduler.turn(PauseGenerationReqInput(mode="in_place"))
    scheduler.turn(FlushCacheReqInput())
    assert answers_of_commands(scheduler) == [True]
    assert scheduler.tree_cache.times == 1
    assert scheduler.ended() == []
    assert not scheduler.is_fully_idle(), "only for the flush"


@pytest.mark.parametrize("update", [UpdateWeightFromDiskReqInput(model_path="elsewhere", load_format="auto")])
def test_an_update_beside_parked_requests_flushes_the_cache(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, update: Any
) -> None:
    scheduler.turn(request("a", 7), PauseGenerationReqInput(mode="retract"), update)
    assert answers_of_commands(scheduler) == [True]
    assert scheduler.tree_cache.times == 1
    transfer.rows_arrive(7)
    scheduler.turn(KEEP_DEVICE_CACHE)
    assert queued(scheduler) == ["a"]


@pytest.mark.parametrize(
    "command",
    [
        FlushCacheReqInput(),
        UpdateWeightFromDiskReqInput(model_path="elsewhere", load_format="auto", flush_cache=False),
        EndWeightUpdateReqInput(),
    ],
)
def test_rows_of_earlier_requests_are_forgotten_with_sglangs_caches_and_with_weights(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, command: Any
) -> None:
    scheduler.turn(request("a", 7), PauseGenerationReqInput(mode="in_place"))
    assert transfer.forgotten == 0
    scheduler.turn(*([BeginWeightUpdateReqInput()] if isinstance(command, EndWeightUpdateReqInput) else []), command)
    assert transfer.forgotten >= 1


def test_a_flush_that_sglang_refuses_forgets_nothing(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.waiting_queue.append(SimpleNamespace(kv=SimpleNamespace(holds_kv=False), rid="other"))
    scheduler.turn(FlushCacheReqInput())
    assert answers_of_commands(scheduler) == [False]
    assert transfer.forgotten == 0


def test_the_transfer_hears_what_the_client_calls_its_pictures(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    noted = request("a", 7)
    request_notes.write(noted, request_notes.Note(sources=("one", "two")))
    scheduler.turn(noted, request("b", 8))
    assert [(room, receiver.sources) for _, room, receiver in transfer.asked] == [(7, ("one", "two")), (8, ())]


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("rows_are_here", [False, True])
def test_memory_is_released_beside_parked_requests(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, paused: bool, rows_are_here: bool
) -> None:
    scheduler.turn(request("a", 7))
    if paused:
        scheduler.turn(PauseGenerationReqInput(mode="in_place"))
    if rows_are_here:
        transfer.rows_arrive(7)
    scheduler.turn(ReleaseMemoryOccupationReqInput())
    assert len(scheduler.answers) == 1
    if not rows_are_here:
        transfer.rows_arrive(7)
    scheduler.turn()
    assert queued(scheduler) == []
    scheduler.turn(ResumeMemoryOccupationReqInput(), KEEP_DEVICE_CACHE)
    assert queued(scheduler) == ["a"]
