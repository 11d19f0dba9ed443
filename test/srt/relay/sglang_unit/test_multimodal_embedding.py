"""The encode half in a scheduler: what is parked, encoded, handed over, refused, and what an operator's commands do.

SGLang's scheduler is real up to its forward pass (support/scheduler.py says what is not); the tower's model and the
transfer are stand-ins.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedding_relay import recorder
from embedding_relay.gathering import Gathering
from embedding_relay.protocol.errors import BAD_REQUEST, CLIENT_GONE, INTERNAL, UNAVAILABLE, Failure
from embedding_relay.protocol.status import Status
from sglang.srt.disaggregation.multimodal import request_notes
from sglang.srt.disaggregation.multimodal.front import Refusal, _as_message, abort_message
from sglang.srt.disaggregation.multimodal.item_keys import ItemKeys
from sglang.srt.disaggregation.multimodal.multimodal_embedding import EncodeRole
from sglang.srt.disaggregation.multimodal.request_notes import Note
from sglang.srt.disaggregation.multimodal.tower import VisionTower
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, prepare_abort
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenizedGenerateReqInput,
    BeginWeightUpdateReqInput,
    ContinueGenerationReqInput,
    EndWeightUpdateReqInput,
    FlushCacheReqInput,
    MMInputsProcessError,
    PauseGenerationReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    UpdateWeightFromDiskReqInput,
)
from sglang.srt.managers.mm_schedule import init_mm_embedding_cache
from sglang.srt.managers.schedule_batch import Req
from support.scheduler import MAX_PROMPT, SchedulerWithoutModel, TransferWithoutThread, request

MODE = "encode"

KEEP_DEVICE_CACHE = ContinueGenerationReqInput(torch_empty_cache=False)
NEW_WEIGHTS = UpdateWeightFromDiskReqInput(model_path="elsewhere", load_format="auto")
# Each keeps the model from running, and what ends that.
HOLDS = {
    "pause-in-place": (PauseGenerationReqInput(mode="in_place"), KEEP_DEVICE_CACHE),
    "pause-retract": (PauseGenerationReqInput(mode="retract"), KEEP_DEVICE_CACHE),
    "weight-update": (BeginWeightUpdateReqInput(), EndWeightUpdateReqInput()),
    "memory-release": (ReleaseMemoryOccupationReqInput(), ResumeMemoryOccupationReqInput()),
}
holds = pytest.mark.parametrize(("hold", "go_on"), HOLDS.values(), ids=HOLDS)


class Model:
    """A vision tower whose rows say which weights made them."""

    def __init__(self, scheduler: SchedulerWithoutModel) -> None:
        self._weights = scheduler.weights
        self.calls = 0
        self.fails = False

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        self.calls += 1
        if self.fails:
            raise ValueError("not with these pixels")
        return torch.full((2 * len(items), 1), float(self._weights.version))


@pytest.fixture
def model(scheduler: SchedulerWithoutModel) -> Model:
    init_mm_embedding_cache(1 << 20)
    return Model(scheduler)


@pytest.fixture(autouse=True)
def role(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model) -> EncodeRole:
    scheduler.embedding_relay = EncodeRole(scheduler, transfer, VisionTower(model, "cpu", 1))
    return scheduler.embedding_relay


def sent(transfer: TransferWithoutThread, room: int) -> float:
    """The version of the weights that made the rows of a room."""
    (source,) = [more for what, other, more in transfer.asked if (what, other) == ("send", room)]
    return float(source.segments[0][1][0, 0])


# ---- the way of a request


def test_a_request_with_a_picture_waits_for_its_language_half(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model, role: EncodeRole
) -> None:
    scheduler.turn(request("a", 7, pictures=1))
    assert transfer.rooms("expect") == [7]
    assert scheduler.waiting_queue == []
    assert role.tables() == {"parked": 1}
    assert not scheduler.is_fully_idle()
    scheduler.turn()
    assert model.calls == 0


def test_rows_are_made_when_they_are_asked_for_and_the_half_is_answered_when_they_are_there(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model
) -> None:
    scheduler.turn(request("a", 7, pictures=2))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    assert model.calls == 1
    assert sent(transfer, 7) == 1
    assert scheduler.ended() == []
    assert scheduler.encoded() == ["relay-encoded-7"]  # the HTTP process counts its pixels no longer
    transfer.stands(7, Status.SUCCESS)
    scheduler.turn()
    assert scheduler.answer_to("a") is None
    assert scheduler.ended() == ["a"]
    assert scheduler.is_fully_idle()


def test_pixels_are_let_go_when_their_rows_are_made_and_when_nobody_wants_them(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: EncodeRole
) -> None:
    scheduler.turn(request("made", 1, pictures=1), request("left", 2, pictures=1))
    items = [one.req.multimodal_inputs.mm_items[0] for one in role.bootstrap_queue.queue]
    assert all(item.feature is not None for item in items)
    transfer.stands(1, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    assert [item.feature is None for item in items] == [True, False]
    scheduler.turn(AbortReq(rid="left"))
    assert items[1].feature is None


def test_the_tower_waits_for_slow_readers(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: EncodeRole
) -> None:
    role.max_bytes_in_flight = 8  # as many as the rows of one picture
    for room in (1, 2):
        scheduler.turn(request(str(room), room, pictures=1, seed=room))
        transfer.stands(room, Status.WAITING_FOR_INPUT)
        scheduler.turn()
    assert transfer.rooms("send") == [1]
    assert not role.has_work()
    transfer.stands(1, Status.SUCCESS)
    scheduler.turn()
    assert transfer.rooms("send") == [1, 2]


def test_whoever_watches_hears_what_the_tower_was_asked_for(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: EncodeRole
) -> None:
    told: list[Any] = []
    transfer.observer = SimpleNamespace(encoded=told.append, parked=lambda _: None)
    scheduler.turn(request("a", 7, pictures=1))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    assert told == [role.tower.totals]


def test_the_budget_of_bytes_in_flight_is_set_in_mebibytes(scheduler: SchedulerWithoutModel, role: EncodeRole) -> None:
    transfer = TransferWithoutThread(SGLANG_EMBEDDING_MAX_IN_FLIGHT_MIB=3)
    assert EncodeRole(scheduler, transfer, role.tower).max_bytes_in_flight == 3 * 1024 * 1024
    transfer.close()


def test_log_probabilities_are_the_language_halfs_business(scheduler: SchedulerWithoutModel, role: EncodeRole) -> None:
    scheduler.turn(request("a", 7, pictures=1, return_logprob=True, logprob_start_len=0))
    (parked,) = role.bootstrap_queue.queue
    assert not parked.req.return_logprob


def test_text_is_answered_at_once_and_needs_no_other_half(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 7))
    assert scheduler.answer_to("a") is None
    (answer,) = scheduler.answers
    assert answer.finished_reason.to_json() == {"type": "length", "length": 0}
    assert scheduler.waiting_queue == []
    assert transfer.asked == []


def test_one_batch_a_turn(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: EncodeRole) -> None:
    scheduler.turn(*(request(str(room), room, pictures=1, seed=room) for room in (1, 2)))
    for room in (1, 2):
        transfer.stands(room, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    assert transfer.rooms("send") == [1]
    assert role.has_work()
    scheduler.turn()
    assert transfer.rooms("send") == [1, 2]
    assert not role.has_work()


def test_a_tower_that_fails_fails_its_batch(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model
) -> None:
    model.fails = True
    scheduler.turn(request("a", 7, pictures=1))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    scheduler.turn()
    assert scheduler.answer_to("a") == transfer.reason(7)
    assert transfer.reason(7).code == INTERNAL


def test_pixels_whose_language_half_never_comes_are_not_encoded(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model
) -> None:
    scheduler.turn(request("a", 7, pictures=1))
    nobody = Failure(UNAVAILABLE, "nobody asked")
    transfer.stands(7, Status.FAILED, nobody)
    scheduler.turn()
    assert scheduler.answer_to("a") == nobody
    assert model.calls == 0


@pytest.mark.parametrize("status", [Status.BOOTSTRAPPING, Status.WAITING_FOR_INPUT])
def test_an_abort_ends_a_request_wherever_it_is_and_its_other_half_hears_of_it(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, status: Status
) -> None:
    scheduler.turn(request("a", 7, pictures=1), request("b", 8, pictures=1))
    transfer.stands(7, status)
    scheduler.turn()
    scheduler.turn(AbortReq(rid="a"))
    assert transfer.reason(7).code == CLIENT_GONE
    assert scheduler.ended() == ["a"]
    answer = scheduler.answer_to("a")
    assert answer is not None
    assert answer.code == BAD_REQUEST


def test_an_abort_of_our_own_says_why(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> None:
    scheduler.turn(request("a", 7, pictures=1))
    failure = Failure(UNAVAILABLE, "the scheduler did not answer")
    scheduler.turn(abort_message("a", failure))
    assert transfer.reason(7) == failure


def test_an_abort_of_all_requests_is_heard_by_all_other_halves(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    """What SGLang's `pause_generation` does in its mode `abort`, which never tells the scheduler that it is paused."""
    scheduler.turn(*(request(str(room), room, pictures=1) for room in (1, 2, 3)))
    transfer.stands(1, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    scheduler.turn(AbortReq(abort_all=True))
    assert sorted(scheduler.ended()) == ["1", "2", "3"]
    assert [transfer.reason(room).code for room in (1, 2, 3)] == [CLIENT_GONE] * 3
    assert scheduler.is_fully_idle()


def test_what_the_tokenizer_manager_refused_is_told_to_the_other_half(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    failure = Failure(BAD_REQUEST, "no picture")
    scheduler.turn(_as_message(Refusal(7, "127.0.0.1", 8998, failure)))
    assert transfer.reason(7) == failure
    assert scheduler.answers == []


# ---- what SGLang's scheduler refuses


def refused(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, recv_req: Any) -> Failure:
    """Both halves have heard the same."""
    scheduler.turn(recv_req)
    scheduler.turn()
    assert transfer.rooms("expect") == []
    answer = scheduler.answer_to(recv_req.rid)
    assert answer is not None
    assert transfer.reason(recv_req.bootstrap_room) == answer
    return answer


def test_beam_search_is_refused_to_both_halves(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    answer = refused(scheduler, transfer, request("a", 7, pictures=1, sampling={"beam_width": 2}))
    assert answer.code == BAD_REQUEST
    assert "Beam search is not supported" in answer.text


def test_a_mask_of_the_sampling_that_cannot_be_had_is_refused_to_both_halves(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    """The tokenizer manager takes the wish away here; should one come, it must not leave the other half waiting."""
    recv_req = request("a", 7, pictures=1, return_sampling_mask=True, sampling={"top_k": 1 << 20})
    assert "return_sampling_mask" in refused(scheduler, transfer, recv_req).text


def test_a_refusal_that_only_its_client_hears_in_full_is_told_to_the_other_half(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a diffusion language model, where SGLang's `Req` does not say what was wrong."""
    monkeypatch.setattr(scheduler, "validate_dllm_request", lambda req: "not with this model")
    scheduler.turn(request("a", 7, pictures=1))
    answer = scheduler.answer_to("a")
    assert answer is not None
    assert transfer.reason(7).code == answer.code == BAD_REQUEST


def test_the_other_half_gets_the_status_that_sglang_gave(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(recv_req: Any, cleanup: Any, **_: Any) -> None:
        req = Req(recv_req.rid, "", recv_req.input_ids, recv_req.sampling_params)
        req.bootstrap_room, req.bootstrap_host = recv_req.bootstrap_room, recv_req.bootstrap_host
        prepare_abort(req, "busy", status_code=UNAVAILABLE)
        scheduler.output_streamer.stream_output([req], False)

    monkeypatch.setattr(scheduler, "_handle_generate_request", refuse)
    assert refused(scheduler, transfer, request("a", 7, pictures=1)) == Failure(UNAVAILABLE, "busy")


def test_a_refusal_without_a_status_is_the_clients_fault(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    def refuse(recv_req: Any, cleanup: Any, **_: Any) -> None:
        req = Req(recv_req.rid, "", recv_req.input_ids, recv_req.sampling_params)
        req.bootstrap_room, req.bootstrap_host = recv_req.bootstrap_room, recv_req.bootstrap_host
        prepare_abort(req, "not this one")
        scheduler.output_streamer.stream_output([req], False)

    scheduler._handle_generate_request = refuse
    scheduler.turn(request("a", 7, pictures=1))
    assert transfer.reason(7) == Failure(BAD_REQUEST, "not this one")


def test_a_prompt_that_is_too_long(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> None:
    assert refused(scheduler, transfer, request("a", 7, pictures=MAX_PROMPT)).code == BAD_REQUEST


def test_pixels_that_did_not_reach_the_scheduler(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    recv_req = request("a", 7, pictures=1)
    recv_req.mm_inputs = MMInputsProcessError("lost")
    assert refused(scheduler, transfer, recv_req) == Failure(INTERNAL, "lost")


def test_a_session_that_is_not_there(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> None:
    """The tokenizer manager takes sessions away here."""
    recv_req = request("a", 7, pictures=1, session_params=SimpleNamespace(id="gone"))
    scheduler.turn(recv_req)
    answer = scheduler.answer_to("a")
    assert answer is not None
    assert "does not exist" in answer.text
    assert transfer.reason(7) == answer


def test_each_request_of_a_batch_is_refused_for_itself(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    batch = BatchTokenizedGenerateReqInput(
        batch=[request("a", 7, pictures=1, sampling={"beam_width": 2}), request("b", 8, pictures=1)]
    )
    scheduler.turn(batch)
    assert transfer.reason(7).code == BAD_REQUEST
    assert transfer.rooms("expect") == [8]


def test_priority_and_a_full_queue_are_no_concern_of_a_half_that_queues_nothing(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.max_queued_requests = 0
    scheduler.turn(request("a", 7, pictures=1, priority=3))
    assert transfer.rooms("expect") == [7]


def test_a_request_that_waits_for_its_grammar_is_not_refused(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer manager takes grammars away here; should one come, SGLang queues its request later."""
    grammar = scheduler.grammar_manager
    monkeypatch.setattr(grammar, "process_req_with_grammar", lambda req: grammar.grammar_queue.append(req) or True)
    scheduler.turn(request("a", 7, pictures=1))
    assert transfer.asked == []
    scheduler._add_request_to_queue(grammar.grammar_queue.pop())
    assert transfer.rooms("expect") == [7]


@pytest.mark.parametrize("options", [{}, {"pictures": 1}, {"sampling": {"beam_width": 2}}])
def test_health_requests_leave_no_trace_in_the_transfer(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, options: dict[str, Any]
) -> None:
    scheduler.turn()
    scheduler.turn(request("a", 7, bootstrap_host=FAKE_BOOTSTRAP_HOST, **options))
    assert scheduler.ended() == ["a"]
    assert transfer.asked == []


def test_no_room_is_the_clients_fault(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> None:
    scheduler.turn(request("a", None, pictures=1))
    answer = scheduler.answer_to("a")
    assert answer is not None
    assert answer.code == BAD_REQUEST
    assert transfer.asked == []


def test_an_unhealthy_instance_takes_no_pictures_and_answers_no_health_request(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    transfer.unhealthy_reason = "a thread died"
    scheduler.turn()
    scheduler.turn(request("a", 7, pictures=1), request("health", 8, bootstrap_host=FAKE_BOOTSTRAP_HOST))
    answer = scheduler.answer_to("a")
    assert answer == transfer.reason(7)
    assert answer is not None
    assert answer.code == UNAVAILABLE
    assert transfer.rooms("expect") == []
    scheduler.turn(request("text", 9))
    assert scheduler.ended() == ["a", "text"]
    assert scheduler.answer_to("text") is None


def test_the_warm_up_request_waits_until_others_can_find_this_instance(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    transfer.is_reachable = False
    scheduler.turn(request("warm-up", 1, bootstrap_host=FAKE_BOOTSTRAP_HOST))
    scheduler.turn()
    assert scheduler.ended() == []
    transfer.is_reachable = True
    scheduler.turn()
    assert scheduler.ended() == ["warm-up"]
    assert scheduler.waiting_queue == []


def test_who_has_found_this_instance_need_not_wait_until_others_can(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    transfer.is_reachable = False
    scheduler.turn(request("text", 1), request("picture", 2, pictures=1))
    assert scheduler.ended() == ["text"]
    assert transfer.rooms("expect") == [2]


def test_an_item_without_offsets_is_a_fault_of_the_instance(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    recv_req = request("a", 7, pictures=2)
    recv_req.mm_inputs.mm_items[1].offsets = None
    assert refused(scheduler, transfer, recv_req).code == INTERNAL


# ---- an operator's commands


def answers_of_commands(scheduler: SchedulerWithoutModel) -> list[bool]:
    return [one.success for one in scheduler.answers if hasattr(one, "success")]


@holds
def test_the_tower_rests_while_an_operator_holds_the_model(
    scheduler: SchedulerWithoutModel,
    transfer: TransferWithoutThread,
    model: Model,
    role: EncodeRole,
    hold: Any,
    go_on: Any,
) -> None:
    scheduler.turn(request("a", 7, pictures=1), hold)
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    scheduler.turn()
    assert model.calls == 0
    assert not role.has_work(), "the scheduler may sleep"
    assert not scheduler.is_fully_idle(), "but not stop"
    scheduler.turn(go_on)
    assert role.has_work(), "and the next turn comes at once"
    scheduler.turn()
    assert model.calls == 1
    assert transfer.rooms("send") == [7]


@holds
def test_a_held_instance_takes_requests_and_answers_those_that_end(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, hold: Any, go_on: Any
) -> None:
    scheduler.turn(request("made", 1, pictures=1, seed=1))
    transfer.stands(1, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    scheduler.turn(hold)
    scheduler.turn(request("new", 2, pictures=1), request("left", 3, pictures=1))
    transfer.stands(1, Status.SUCCESS)
    transfer.stands(2, Status.FAILED, Failure(UNAVAILABLE, "too late"))
    scheduler.turn(AbortReq(rid="left"))
    assert sorted(scheduler.ended()) == ["left", "made", "new"]
    scheduler.turn(go_on)
    assert scheduler.is_fully_idle()


@pytest.mark.parametrize("status", [Status.BOOTSTRAPPING, Status.WAITING_FOR_INPUT, Status.TRANSFERRING])
@pytest.mark.parametrize("paused", [False, True])
def test_no_parked_request_is_in_the_way_of_a_flush(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, status: Status, paused: bool
) -> None:
    scheduler.turn(request("a", 7, pictures=1))
    transfer.stands(7, status)
    scheduler.turn()
    if paused:
        scheduler.turn(PauseGenerationReqInput(mode="in_place"))
    scheduler.turn(FlushCacheReqInput())
    assert answers_of_commands(scheduler) == [True]
    assert scheduler.tree_cache.times == 1
    assert scheduler.ended() == []
    assert not scheduler.is_fully_idle(), "only for the flush"


def test_a_flush_that_waits_for_idleness_waits_for_parked_requests(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 7, pictures=1), FlushCacheReqInput(timeout_s=60))
    assert answers_of_commands(scheduler) == []
    transfer.stands(7, Status.FAILED, Failure(UNAVAILABLE, "nobody asked"))
    scheduler.turn()
    scheduler.turn()
    assert answers_of_commands(scheduler) == [True]


def test_a_flush_beside_work_of_sglangs_own_is_refused_as_ever(scheduler: SchedulerWithoutModel) -> None:
    scheduler.waiting_queue.append(SimpleNamespace(kv=SimpleNamespace(holds_kv=False), rid="other"))
    scheduler.turn(FlushCacheReqInput())
    assert answers_of_commands(scheduler) == [False]


@pytest.mark.parametrize("paused", [False, True])
def test_memory_is_released_beside_parked_requests(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: EncodeRole, paused: bool
) -> None:
    scheduler.turn(request("a", 7, pictures=1))
    if paused:
        scheduler.turn(PauseGenerationReqInput(mode="retract"))
    scheduler.turn(ReleaseMemoryOccupationReqInput())
    assert len(scheduler.answers) == 1
    assert role.tables() == {"parked": 1}


def test_memory_is_released_when_the_device_has_nothing_left_to_do(
    scheduler: SchedulerWithoutModel, role: EncodeRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(role.tower, "wait_for_device", lambda: done.append("waited"))
    monkeypatch.setattr(scheduler.memory_saver_adapter, "pause", done.append)
    scheduler.turn(ReleaseMemoryOccupationReqInput(tags=["weights"]))
    assert done == ["waited", "weights"]


UPDATES = {
    "flushing": (UpdateWeightFromDiskReqInput(model_path="elsewhere", load_format="auto"),),
    "not flushing": (UpdateWeightFromDiskReqInput(model_path="elsewhere", load_format="auto", flush_cache=False),),
    "in a session": (BeginWeightUpdateReqInput(), EndWeightUpdateReqInput()),
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_rows_that_older_weights_made_serve_no_newer_request(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, update: tuple[Any, ...]
) -> None:
    """The same picture has the same hash, by which SGLang remembers its rows."""
    scheduler.turn(*(request(str(room), room, pictures=1) for room in (1, 2, 3)))
    transfer.stands(1, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    scheduler.turn(PauseGenerationReqInput(mode="in_place"), *update)
    transfer.stands(2, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    scheduler.turn(KEEP_DEVICE_CACHE)
    scheduler.turn()
    assert (sent(transfer, 1), sent(transfer, 2)) == (1, 2)


def test_an_update_in_the_same_turn_comes_before_the_tower(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 1, pictures=1), request("b", 2, pictures=1))
    transfer.stands(1, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    transfer.stands(2, Status.WAITING_FOR_INPUT)
    scheduler.turn(NEW_WEIGHTS)
    assert sent(transfer, 2) == 2


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("is_begun", [False, True])
def test_rows_that_older_weights_made_are_not_left_out_for_their_promise(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, update: tuple[Any, ...], is_begun: bool
) -> None:
    """A language rank has them, and says so to the end. It may have been decided in the same turn to leave them out."""
    scheduler.turn(request("a", 1, pictures=2), PauseGenerationReqInput(mode="in_place"))
    transfer.promise(1, 0, 1)
    if is_begun:
        transfer.stands(1, Status.WAITING_FOR_INPUT)
    scheduler.turn(*update)
    transfer.stands(1, Status.WAITING_FOR_INPUT)
    transfer.promise(1, 0, 1)
    scheduler.turn(KEEP_DEVICE_CACHE)
    scheduler.turn()
    assert transfer.rooms("forget") == [1]
    (source,) = transfer.sources(1)
    assert (source.absent, len(source.segments)) == ((), 2)


def test_what_was_to_be_left_out_is_made_if_the_weights_change_in_the_same_turn(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: EncodeRole
) -> None:
    scheduler.turn(request("a", 1, pictures=2))
    transfer.promise(1, 0, 1)
    transfer.stands(1, Status.WAITING_FOR_INPUT)
    scheduler.turn(NEW_WEIGHTS)
    scheduler.turn()
    assert transfer.rooms("forget") == [1]
    source = transfer.sources(1)[-1]
    assert (source.absent, source.made, len(source.segments)) == ((), None, 2)


def test_a_flush_forgets_the_rows_of_pictures(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model
) -> None:
    for room in (1, 2):
        scheduler.turn(request(str(room), room, pictures=1))
        transfer.stands(room, Status.WAITING_FOR_INPUT)
        scheduler.turn()
    assert model.calls == 1, "the second was remembered"
    scheduler.turn(FlushCacheReqInput())
    scheduler.turn(request("3", 3, pictures=1))
    transfer.stands(3, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    assert model.calls == 2


# ---- rows as they are made


@pytest.fixture
def item_by_item(role: EncodeRole) -> EncodeRole:
    role.tower.group_tokens = 1
    return role


def rows_of_items(transfer: TransferWithoutThread, room: int) -> list[tuple[int, int | None]]:
    """Of each time that rows were handed over: of how many items, and the row before which everything is made."""
    return [(len(source.segments), source.made) for source in transfer.sources(room)]


def test_a_request_with_several_pictures_hands_over_each_when_it_is_made(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, item_by_item: EncodeRole, model: Model
) -> None:
    scheduler.turn(request("a", 7, pictures=3))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    assert rows_of_items(transfer, 7) == [(1, 3)]
    assert item_by_item.has_work(), "the next turn comes at once"
    items = item_by_item.turns.queue[0].items
    assert [item.feature is None for item in items] == [True, False, False]
    scheduler.turn()
    scheduler.turn()
    assert rows_of_items(transfer, 7) == [(1, 3), (2, 5), (3, None)]
    assert transfer.rooms("send") == [7], "once, and then more"
    assert model.calls == 3
    assert not item_by_item.has_work()
    transfer.stands(7, Status.SUCCESS)
    scheduler.turn()
    assert scheduler.answer_to("a") is None
    assert scheduler.is_fully_idle()


def test_without_the_setting_all_rows_are_handed_over_at_once(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model
) -> None:
    scheduler.turn(request("a", 7, pictures=3))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    assert rows_of_items(transfer, 7) == [(3, None)]
    assert model.calls == 1


def test_between_two_groups_of_a_request_others_have_their_turns(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, item_by_item: EncodeRole
) -> None:
    scheduler.turn(request("large", 1, pictures=8), request("small", 2, pictures=1, seed=50))
    transfer.stands(1, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    transfer.stands(2, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    scheduler.turn()
    assert transfer.rooms("send") == [1, 2]
    assert len(transfer.sources(1)) < 8
    transfer.stands(2, Status.SUCCESS)
    scheduler.turn()
    assert scheduler.ended() == ["small"]


@pytest.mark.parametrize("how", ["aborted", "failed", "tower"])
def test_a_request_that_ends_in_the_middle_leaves_nothing_behind(
    scheduler: SchedulerWithoutModel,
    transfer: TransferWithoutThread,
    item_by_item: EncodeRole,
    model: Model,
    how: str,
) -> None:
    scheduler.turn(request("a", 7, pictures=3))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    items = item_by_item.turns.queue[0].items
    match how:
        case "aborted":
            scheduler.turn(AbortReq(rid="a"))
        case "failed":
            transfer.stands(7, Status.FAILED, Failure(UNAVAILABLE, "the reader is gone"))
            scheduler.turn()
        case "tower":
            model.fails = True
            scheduler.turn()
            scheduler.turn()
    made = model.calls
    scheduler.turn()
    assert model.calls == made
    assert all(item.feature is None for item in items)
    assert scheduler.answer_to("a") is not None
    assert item_by_item.tables() == {"parked": 0}
    assert scheduler.is_fully_idle()


@holds
def test_an_operator_holds_the_model_between_two_groups(
    scheduler: SchedulerWithoutModel,
    transfer: TransferWithoutThread,
    item_by_item: EncodeRole,
    hold: Any,
    go_on: Any,
) -> None:
    scheduler.turn(request("a", 7, pictures=2))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    scheduler.turn(hold)
    scheduler.turn()
    assert rows_of_items(transfer, 7) == [(1, 3)]
    scheduler.turn(go_on)
    scheduler.turn()
    assert rows_of_items(transfer, 7) == [(1, 3), (2, None)]


def test_a_request_that_is_begun_goes_on_however_many_rows_are_in_flight(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, item_by_item: EncodeRole
) -> None:
    """Its own are among them, and its reader waits for the others."""
    item_by_item.max_bytes_in_flight = 1
    scheduler.turn(request("a", 7, pictures=2), request("b", 8, pictures=2, seed=50))
    for room in (7, 8):
        transfer.stands(room, Status.WAITING_FOR_INPUT)
    for _ in range(4):
        scheduler.turn()
    assert rows_of_items(transfer, 7) == [(1, 3), (2, None)]
    assert rows_of_items(transfer, 8) == []
    transfer.stands(7, Status.SUCCESS)
    scheduler.turn()
    scheduler.turn()
    assert rows_of_items(transfer, 8) == [(1, 3), (2, None)]


# ---- rows that the language side has


def absent(source: Any) -> list[int]:
    return [number for number, _ in source.absent]


def test_what_every_language_rank_has_is_not_made(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model
) -> None:
    scheduler.turn(request("a", 7, pictures=3))
    transfer.promise(7, 1)
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    (source,) = transfer.sources(7)
    assert (absent(source), [start for start, _ in source.segments], source.made) == ([1], [1, 5], None)


def test_a_request_of_which_nothing_is_to_be_made_runs_no_tower_and_waits_for_none(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model, role: EncodeRole
) -> None:
    role.max_bytes_in_flight = 1
    scheduler.turn(request("a", 7, pictures=1), request("b", 8, pictures=2))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    transfer.promise(8, 0, 1)
    transfer.stands(8, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    (source,) = transfer.sources(8)
    assert (absent(source), list(source.segments)) == ([0, 1], [])
    assert model.calls == 1
    assert recorder.TOWER_BEGAN not in [moment.what for moment in role.recorder.moments(8)]


def test_a_request_says_what_its_items_are(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model
) -> None:
    keys = ItemKeys("a model", lambda: b"weights")
    scheduler.embedding_relay = EncodeRole(scheduler, transfer, VisionTower(model, "cpu", 1), keys)
    scheduler.turn(request("a", 7, pictures=2))
    (sender,) = [more for what, _, more in transfer.asked if what == "expect"]
    assert [item.runs for item in sender.items] == [((1, 3),), ((3, 5),)]
    assert len({item.key for item in sender.items}) == 2
    scheduler.turn(NEW_WEIGHTS)
    scheduler.turn(request("b", 8, pictures=2))
    other = [more for what, _, more in transfer.asked if what == "expect"][1]
    assert not {item.key for item in other.items} & {item.key for item in sender.items}, "other weights, other rows"
    scheduler.turn(FlushCacheReqInput())
    scheduler.turn(request("c", 9, pictures=2))
    again = [more for what, _, more in transfer.asked if what == "expect"][2]
    assert again.items == other.items, "a flush changes no rows"


def test_a_picture_that_the_tower_cannot_take_fails_none_of_those_beside_it(
    scheduler: SchedulerWithoutModel,
    transfer: TransferWithoutThread,
    role: EncodeRole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, together = role.tower.encode, []

    def fail_for_the_second(groups: list[list[Any]]) -> Any:
        together.append([item.hash for (item,) in groups])
        if 8 in together[-1]:
            raise ValueError("not with these pixels")
        return encode(groups)

    role.tower.batch_tokens = 100
    monkeypatch.setattr(role.tower, "encode", fail_for_the_second)
    scheduler.turn(*(request(name, room, pictures=1, seed=room - 1) for name, room in (("a", 7), ("b", 8), ("c", 9))))
    for room in (7, 8, 9):
        transfer.stands(room, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    assert together == [[7, 8, 9], [7], [8], [9]]
    assert (sent(transfer, 7), sent(transfer, 9)) == (1, 1)
    scheduler.turn()
    answer = scheduler.answer_to("b")
    assert answer is not None
    assert answer.code == INTERNAL


def test_what_the_tower_failed_with_is_in_the_log_and_not_in_the_answer(
    scheduler: SchedulerWithoutModel,
    transfer: TransferWithoutThread,
    role: EncodeRole,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error in /usr/lib/libvision.so")

    monkeypatch.setattr(role.tower, "encode", fail)
    scheduler.turn(request("a", 7, pictures=1))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    scheduler.turn()
    answer = scheduler.answer_to("a")
    assert answer == transfer.reason(7)
    assert answer is not None
    assert answer.code == INTERNAL
    assert "/usr" not in answer.text
    assert "libvision.so" in caplog.text


def test_small_requests_wait_for_those_on_their_way_no_longer_than_they_may(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, model: Model, role: EncodeRole
) -> None:
    """And the scheduler, which no message wakes when they do not come, sleeps no longer."""
    now = 1000.0
    role.tower.batch_tokens = 100
    role.turns.gathering = Gathering(lambda: now)
    role.turns.gathering.passed(1 / 64, 1 / 64)

    def come(name: str, room: int, behind: int) -> None:
        coming = request(name, room, pictures=1, seed=room)
        request_notes.write(coming, Note(behind=behind))
        scheduler.turn(coming)
        transfer.stands(room, Status.WAITING_FOR_INPUT)
        scheduler.turn()

    come("a", 7, 1)
    assert model.calls == 0
    assert not role.has_work()
    assert role.longest_sleep_ms == 16
    come("b", 8, 0)
    assert transfer.rooms("send") == [7, 8]
    assert role.longest_sleep_ms == 1000

    come("c", 9, 1)
    assert transfer.rooms("send") == [7, 8]
    now += 1 / 64  # nobody came
    assert role.has_work()
    scheduler.turn()
    assert transfer.rooms("send") == [7, 8, 9]


def test_what_a_pass_took_and_how_much_of_it_was_computing_is_learned(
    scheduler: SchedulerWithoutModel,
    transfer: TransferWithoutThread,
    role: EncodeRole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned: list[tuple[float, float]] = []
    encode = role.tower.encode

    def wait_and_encode(groups: list[list[Any]]) -> Any:
        time.sleep(0.05)  # as if other work had the core
        return encode(groups)

    role.tower.batch_tokens = 100
    monkeypatch.setattr(role.tower, "encode", wait_and_encode)
    monkeypatch.setattr(role.turns.gathering, "passed", lambda *seconds: learned.append(seconds))
    scheduler.turn(request("a", 7, pictures=1))
    transfer.stands(7, Status.WAITING_FOR_INPUT)
    scheduler.turn()
    [(took, computed)] = learned
    assert computed < 0.05 <= took
