"""Prefill of the rows that are here: which of them, what SGLang is given, and what is left when something breaks.

SGLang's scheduler is real up to its forward pass (support/scheduler.py says what is not): a prefix stays in its queue
until a test says that SGLang has begun with it, and then that it has ended, as the real one shows it to its streamer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedding_relay import recorder
from embedding_relay.memory.buffers import ReceivedRows
from embedding_relay.protocol.errors import BAD_GATEWAY, CLIENT_GONE, Failure
from embedding_relay.protocol.status import Status
from sglang.srt.disaggregation.multimodal import hooks, modes, prefix
from sglang.srt.disaggregation.multimodal.multimodal_language import LanguageRole
from sglang.srt.managers.io_struct import AbortReq, FlushCacheReqInput, PauseGenerationReqInput
from sglang.srt.managers.schedule_batch import FINISH_LENGTH
from support import scheduler as stand_ins
from support.columns import changed, columns
from support.received import received
from support.scheduler import SchedulerWithoutModel, TransferWithoutThread

MODE = "language"

# A text row, three rows of one picture, two text rows, four rows of another, one of text.
ROWS = (-1, 0, 0, 0, -1, -1, 1, 1, 1, 1, -1)
LOST = Failure(BAD_GATEWAY, "the encode instance is gone")


@pytest.fixture(autouse=True)
def few_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "LEAST_NEW_ROWS", 3)


@pytest.fixture
def transfer() -> Any:
    made = TransferWithoutThread(SGLANG_EMBEDDING_PREFIX_PREFILL=1)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def role(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> LanguageRole:
    scheduler.chunked_prefill_size = 8192
    scheduler.embedding_relay = LanguageRole(scheduler, transfer)
    return scheduler.embedding_relay


def request(rid: str, room: int, **options: Any) -> Any:
    return stand_ins.request(rid, room, **{"need_wait_for_mm_inputs": True, **options})


def receiver_of(transfer: TransferWithoutThread, room: int) -> Any:
    (receiver,) = [more for what, other, more in transfer.asked if (what, other) == ("request", room)]
    return receiver


def rows_come(transfer: TransferWithoutThread, room: int, copied: int, target: ReceivedRows | None = None) -> None:
    """So many of the rows are in their place, and the control thread says so."""
    receiver = receiver_of(transfer, room)
    receiver.target = receiver.target or target or received(columns(*ROWS))
    receiver.copied = copied
    transfer.stands(room, Status.TRANSFERRING)
    transfer._board.touch(room)


def all_rows_come(transfer: TransferWithoutThread, room: int) -> None:
    rows_come(transfer, room, len(ROWS))
    transfer.stands(room, Status.SUCCESS)


def queued(scheduler: SchedulerWithoutModel) -> list[str]:
    """Prefixes by how many rows they have."""
    of = prefix.of
    return [f"{p.rows} rows" if (p := of(req)) else req.rid for req in scheduler.waiting_queue]


def begins(scheduler: SchedulerWithoutModel) -> Any:
    """SGLang takes the first request of its queue into a batch."""
    return scheduler.waiting_queue.pop(0)


def ends(req: Any, *others: Any) -> list[Any]:
    """SGLang has computed it; what its streamer gets to see of the batch."""
    seen: list[Any] = []
    req.finished_reason = FINISH_LENGTH(length=0)
    hooks.keep_prefixes_to_ourselves(lambda _, reqs, *__: seen.extend(reqs), None, [req, *others], False)
    return seen


def begun(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> Any:
    """The prefix of room 7 whose computation has begun."""
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    return begins(scheduler)


# ---- which rows


@pytest.mark.parametrize(
    ("copied", "end"),
    [(0, None), (1, None), (2, None), (4, None), (5, 5), (6, 6), (8, 6), (10, 6), (11, 11)],
)
def test_a_prefix_ends_with_whole_items(copied: int, end: int | None) -> None:
    """Of an item whose last row is the last one that is here more may follow."""
    rows = prefix.first_rows(received(columns(*ROWS)), copied)
    assert (rows and rows.total) == end
    if rows is not None:
        assert len(rows.fill_ids) == len(rows.mrope) == len(rows.items) == len(rows.embeddings) == end


def test_items_side_by_side_are_told_apart() -> None:
    rows = prefix.first_rows(received(columns(-1, 0, 0, 1, 1)), 4)
    assert rows is not None
    assert rows.total == 3


def test_items_are_numbered_anew_if_the_first_one_comes_later() -> None:
    """SGLang may number all pictures before all videos."""
    whole = received(columns(-1, 1, 1, -1, 0, 0))
    rows = prefix.first_rows(whole, 4)
    assert rows is not None
    assert (rows.items[:, 0].tolist(), rows.media_items) == ([-1, 0, 0, -1], 1)
    assert whole.items[:, 0].tolist() == [-1, 1, 1, -1, 0, 0], "the rows themselves stay as they are"


@pytest.mark.parametrize("index", [-2, 2])
def test_rows_of_an_item_that_cannot_be_are_no_prefix(index: int) -> None:
    assert prefix.first_rows(received(changed(columns(*ROWS), "items", 2, 0, index)), 6) is None


def test_the_position_behind_a_prefix_is_the_one_after_its_largest() -> None:
    small = changed(columns(*ROWS), "mrope", 3, 0, 40)
    rows = prefix.first_rows(received(small), 6)
    assert rows is not None
    assert rows.mrope_delta == 41 - 6


# ---- the way of a prefix


def test_the_first_rows_are_prefilled_while_others_are_on_their_way(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    scheduler.turn(request("a", 7, sampling={"json_schema": "{}", "stop": ["x"]}, extra_key="tenant", stream=True))
    rows_come(transfer, 7, 4)
    scheduler.turn()
    assert queued(scheduler) == []
    rows_come(transfer, 7, 6)
    scheduler.turn()
    (req,) = scheduler.waiting_queue
    assert list(req.origin_input_ids_unpadded) == list(range(6))
    assert req.sampling_params.max_new_tokens == 0
    assert (req.sampling_params.json_schema, req.stream, req.extra_key) == (None, False, "tenant")
    (item,) = req.multimodal_inputs.mm_items
    assert torch.equal(item.precomputed_embeddings, receiver_of(transfer, 7).target.embeddings[1:4])
    assert ends(begins(scheduler)) == []
    all_rows_come(transfer, 7)
    scheduler.turn()
    assert queued(scheduler) == ["a"]
    (whole,) = scheduler.waiting_queue
    assert list(whole.origin_input_ids)[:6] == list(req.origin_input_ids), "or the cache would not have it"
    assert whole.sampling_params.max_new_tokens == 4
    assert scheduler.answers == []
    noted = [moment.what for moment in role.recorder.moments(7)]
    assert noted.index(recorder.PREFIX_BEGAN) < noted.index(recorder.PREFIX_ENDED)


def test_off_by_a_setting(scheduler: SchedulerWithoutModel) -> None:
    transfer = TransferWithoutThread(SGLANG_EMBEDDING_PREFIX_PREFILL=0)
    scheduler.embedding_relay = LanguageRole(scheduler, transfer)
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    assert queued(scheduler) == []
    all_rows_come(transfer, 7)
    scheduler.turn()
    assert queued(scheduler) == ["a"]
    transfer.close()


def test_a_few_rows_are_not_worth_a_pass_of_their_own(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "LEAST_NEW_ROWS", 7)
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 10)
    scheduler.turn()
    assert queued(scheduler) == []


def test_one_prefix_at_a_time_and_the_next_has_enough_more(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    target = received(columns(*ROWS, total=16))
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6, target)
    scheduler.turn()
    first = begins(scheduler)
    rows_come(transfer, 7, 15)
    scheduler.turn()
    assert queued(scheduler) == [], "the first is not over"
    ends(first)
    scheduler.turn()
    assert queued(scheduler) == ["15 rows"]
    ends(begins(scheduler))
    scheduler.turn()
    assert queued(scheduler) == []


def test_rows_of_an_item_that_goes_on_are_no_reason_to_begin_again(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    ends(begun(scheduler, transfer))
    rows_come(transfer, 7, 10)
    scheduler.turn()
    assert queued(scheduler) == []


@pytest.mark.parametrize("room", [{"is_decided": True}, {"waiting": []}])
def test_a_prompt_that_is_whole_or_that_nobody_wants_is_not_begun_with(
    scheduler: SchedulerWithoutModel, role: LanguageRole, room: dict[str, Any]
) -> None:
    receiver = SimpleNamespace(room=7, target=received(columns(*ROWS)), copied=6)
    one = SimpleNamespace(receiver=receiver, waiting=[request("a", 7)], is_decided=False, prefix=None, prefilled=0)
    assert role.prefixes is not None
    vars(one).update(room)
    role.prefixes.advance([one])  # type: ignore[list-item]
    assert queued(scheduler) == []
    vars(one).update(is_decided=False, waiting=[request("a", 7)])
    role.prefixes.advance([one])  # type: ignore[list-item]
    assert queued(scheduler) == ["6 rows"]


def test_whoever_waits_for_the_device_goes_first(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 7), request("text", 8, need_wait_for_mm_inputs=None))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    assert queued(scheduler) == ["text"]
    begins(scheduler)
    scheduler.chunked_req = object()
    scheduler.turn()
    assert queued(scheduler) == []
    scheduler.chunked_req = None
    scheduler.turn()
    assert queued(scheduler) == ["6 rows"]


def test_a_prefix_that_sglang_has_not_begun_with_holds_nobody_up(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    assert queued(scheduler) == ["6 rows"]
    all_rows_come(transfer, 7)
    scheduler.turn()
    assert queued(scheduler) == ["a"]
    assert scheduler.answers == []


def test_the_whole_prompt_waits_for_a_prefix_that_is_being_computed(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    """Beside it, it would compute the same again."""
    req = begun(scheduler, transfer)
    all_rows_come(transfer, 7)
    scheduler.turn()
    scheduler.turn()
    assert queued(scheduler) == []
    ends(req)
    assert role.has_work(), "the next turn comes at once"
    scheduler.turn()
    assert queued(scheduler) == ["a"]
    assert not role.has_work()


def test_nobody_sees_the_answer_to_a_prefix_and_others_see_theirs(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    req = begun(scheduler, transfer)
    other = SimpleNamespace(rid="relay-prefix-of-a-client", finished=lambda: True)
    assert ends(req, other) == [other]
    assert ends(req) == [], "SGLang may show it twice"
    monkeypatch.setattr(modes, "current", lambda: None)
    assert ends(other) == [other]


def test_several_samples_begin_with_one_prefix(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    samples = [request(str(number), 7, sampling={"n": 2}) for number in range(3)]
    scheduler.turn(samples[0])
    rows_come(transfer, 7, 6)
    scheduler.turn()
    (req,) = scheduler.waiting_queue
    assert req.sampling_params.n == 1
    ends(begins(scheduler))
    all_rows_come(transfer, 7)
    scheduler.turn(*samples[1:])
    assert queued(scheduler) == ["0", "1", "2"]


def test_prefixes_are_counted(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    told: list[Any] = []
    role.prefixes._observer = SimpleNamespace(prefilled=lambda totals: told.append(dict(totals)))
    ends(begun(scheduler, transfer))
    assert told == [{"prefixes": 1, "prefix_rows": 6}]


# ---- what is not begun with


@pytest.mark.parametrize(
    "options",
    [
        {"lora_id": "adapter"},
        {"session_id": "s"},
        {"return_hidden_states": True},
        {"return_logprob": True, "logprob_start_len": 0},
    ],
)
def test_a_request_that_a_cached_prefix_would_change_is_not_divided(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, options: dict[str, Any]
) -> None:
    scheduler.turn(request("a", 7, **options))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    assert queued(scheduler) == []


def test_log_probabilities_of_the_answer_alone_do_not_matter(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 7, return_logprob=True))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    (req,) = scheduler.waiting_queue
    assert not req.return_logprob


@pytest.mark.parametrize(("where", "row"), [("fill_ids", 2), ("items", 2), ("mrope", 5)])
def test_rows_that_the_model_could_not_take_are_not_begun_with(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, where: str, row: int
) -> None:
    scheduler.turn(request("a", 7))
    transfer.limits = prefix.ModelLimits(vocabulary=1000, modalities=frozenset({1}), positions=500)
    scheduler.embedding_relay.prefixes._limits = transfer.limits
    rows_come(transfer, 7, 6, received(changed(columns(*ROWS), where, row, 1, 100_000)))
    scheduler.turn()
    assert queued(scheduler) == []
    rows_come(transfer, 7, 6)


def test_embeddings_that_are_no_numbers_are_not_begun_with(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    target = received(columns(*ROWS))
    target.flaw = "rows 1 to 3 have embeddings from nan to nan"
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6, target)
    scheduler.turn()
    assert queued(scheduler) == []


def test_a_prompt_that_will_be_too_long_is_not_begun_with(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6, received(columns(*ROWS, total=stand_ins.MAX_PROMPT + 1)))
    scheduler.turn()
    assert queued(scheduler) == []


def cache(*, sharing: bool = True, swa: bool = False, mamba: bool = False) -> Any:
    return SimpleNamespace(
        supports_prefix_sharing=lambda: sharing, supports_swa=lambda: swa, supports_mamba=lambda: mamba
    )


REASONS: dict[str, tuple[dict[str, Any], int]] = {
    "several ranks": ({}, 2),
    "generates no tokens": ({"is_generation": False}, 1),
    "speculatively": ({"spec_algorithm": SimpleNamespace(is_none=lambda: False)}, 1),
    "radix cache is off": ({"tree_cache": cache(sharing=False)}, 1),
    "more than one kind": ({"tree_cache": cache(swa=True)}, 1),
    "keeps more than one": ({"tree_cache": cache(mamba=True)}, 1),
    "chunked prefill is off": ({"chunked_prefill_size": None}, 1),
}


@pytest.mark.parametrize(("reason", "case"), REASONS.items(), ids=REASONS)
def test_an_instance_that_cannot_says_why(
    scheduler: SchedulerWithoutModel, reason: str, case: tuple[dict[str, Any], int]
) -> None:
    attributes, ranks = case
    assert prefix.why_not(scheduler, 1) is None
    vars(scheduler).update(attributes)
    assert reason in (prefix.why_not(scheduler, ranks) or "")


# ---- when something breaks


def test_a_room_that_fails_takes_its_prefix_back(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    transfer.stands(7, Status.FAILED, LOST)
    scheduler.turn()
    assert queued(scheduler) == []
    assert scheduler.answer_to("a") == LOST
    assert len(scheduler.answers) == 1, "of the prefix nobody hears"
    assert role.tables() == {"parked": 0, "shared": 0}
    assert scheduler.is_fully_idle()


def test_a_room_that_fails_ends_the_prefix_that_is_being_computed(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborted: list[str] = []
    req = begun(scheduler, transfer)
    monkeypatch.setattr(scheduler, "abort_request", lambda message: aborted.append(message.rid))
    transfer.stands(7, Status.FAILED, LOST)
    scheduler.turn()
    assert aborted == [req.rid]
    assert scheduler.answer_to("a") == LOST
    assert ends(req) == []


def test_a_client_that_leaves_takes_its_prefix_along(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    scheduler.turn(AbortReq(rid="a"))
    assert transfer.reason(7).code == CLIENT_GONE
    scheduler.turn()
    assert queued(scheduler) == []
    assert scheduler.ended() == ["a"]


def test_a_prefix_that_sglang_drops_itself_holds_nobody_up(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    """As it does with all that wait when an operator aborts everything, or after a deadline of its own."""
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    (req,) = scheduler.waiting_queue
    scheduler.abort_request(AbortReq(rid=req.rid))
    assert prefix.of(req).is_over  # type: ignore[union-attr]
    all_rows_come(transfer, 7)
    scheduler.turn()
    assert queued(scheduler) == ["a"]


def test_a_prefix_is_not_in_the_way_of_a_flush(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread
) -> None:
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    assert queued(scheduler) == ["6 rows"]
    scheduler.turn(FlushCacheReqInput())
    assert [one.success for one in scheduler.answers if hasattr(one, "success")] == [True]
    all_rows_come(transfer, 7)
    scheduler.turn()
    assert queued(scheduler) == ["a"]


def test_no_prompt_is_begun_while_an_operator_holds_the_model(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, role: LanguageRole
) -> None:
    scheduler.turn(request("a", 7), PauseGenerationReqInput(mode="in_place"))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    assert queued(scheduler) == []
    all_rows_come(transfer, 7)
    scheduler.turn()
    assert not role.has_work(), "the scheduler may sleep"


def test_rows_that_cannot_be_given_to_sglang_fail_nobody_before_their_time(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("not these")

    monkeypatch.setattr(prefix.media, "request_inputs", fail)
    scheduler.turn(request("a", 7))
    rows_come(transfer, 7, 6)
    scheduler.turn()
    assert (queued(scheduler), scheduler.answers) == ([], [])
    monkeypatch.undo()
    all_rows_come(transfer, 7)
    scheduler.turn()
    assert queued(scheduler) == ["a"]
